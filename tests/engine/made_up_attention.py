"""A network that calls attention as ComfyUI's do, in every way that its attention may be called."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from fake_graphs import graphs_on_cpu
from torch import Tensor, nn
from torch.nn import functional

from tacod.plan import Layout, Plan, Shape
from tacod.rank.comfyui.check import check_split
from tacod.rank.comfyui.network import Network
from tacod.rank.comfyui.tables.base import Attention, Blocks, Cut, Table
from tacod.rank.families.inputs import Inputs
from tacod.rank.forward.graphs import Forwards
from tacod.rank.forward.others_graph import OthersGraph
from tacod.rank.forward.run import Call, relative_difference, run
from tacod.rank.parallel.sequence import SequenceParallel
from tacod.rank.parallel.topology import Topology

WIDTH, HEADS, TEXT, IMAGE = 24, 6, 7, 18
TOTAL = TEXT + IMAGE


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    mask: Tensor | None = None,
    attn_precision: Any = None,
    skip_reshape: bool = False,
    skip_output_reshape: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    is_causal: bool = False,
    **options: Any,
) -> Tensor:
    """Attention with the arguments of ComfyUI's, of all tokens."""
    if not skip_reshape:
        width = q.shape[-1] // heads
        q, k, v = (torch.unflatten(each, -1, (-1, width)).transpose(1, 2) for each in (q, k, v))
    if enable_gqa:
        k, v = (each.repeat_interleave(q.shape[1] // each.shape[1], dim=1) for each in (k, v))
    dtype = v.dtype
    if attn_precision is not None:
        q, k, v = (each.to(attn_precision) for each in (q, k, v))
    if mask is not None and mask.ndim < 4:
        mask = mask[(None,) * (3 - mask.ndim)].unsqueeze(1)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(q.dtype)
    out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale).to(dtype)
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


def noise(*shape: int) -> Tensor:
    """The same for all ranks and blocks."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(7))


def bits(*shape: int) -> Tensor:
    """Who attends to whom, everybody to somebody."""
    mask = noise(*shape) > 0
    mask[..., 0] = True
    return mask


HOW: dict[str, Callable[[], dict[str, Any]]] = {
    "plain": dict,
    "by heads": lambda: {"skip_reshape": True},
    "by heads, and out": lambda: {"skip_reshape": True, "skip_output_reshape": True},
    "out by heads": lambda: {"skip_output_reshape": True},
    "usual scale": lambda: {"scale": (WIDTH // HEADS) ** -0.5},
    "another scale": lambda: {"scale": 0.9},
    "fewer heads of keys": lambda: {"enable_gqa": True},
    "fewer heads of keys, by heads": lambda: {"enable_gqa": True, "skip_reshape": True, "scale": 0.2},
    "in fp32": lambda: {"attn_precision": torch.float32},
    "exact": lambda: {"low_precision_attention": False, "_inside_attn_wrapper": True, "softcap": None},
    "mask": lambda: {"mask": noise(TOTAL, TOTAL)},
    "mask of one image": lambda: {"mask": noise(1, TOTAL, TOTAL)},
    "mask of each image": lambda: {"mask": noise(2, 1, TOTAL, TOTAL)},
    "mask for all heads": lambda: {"mask": noise(2, 1, TOTAL, TOTAL).expand(-1, HEADS, -1, -1)},
    "mask of bits": lambda: {"mask": bits(TOTAL, TOTAL)},
    "key mask": lambda: {"mask": noise(1, TOTAL)},
    "key mask of each image": lambda: {"mask": noise(2, 1, 1, TOTAL)},
    "key mask of bits": lambda: {"mask": bits(2, 1, TOTAL)},
    # Those that ranks can't exchange.
    "causal": lambda: {"is_causal": True},
    "mask of each head": lambda: {"mask": noise(1, HEADS, TOTAL, TOTAL)},
    "fewer heads that nobody told of": lambda: {"few": True},
}
"""Ways to call it, by name; a call says which by its place."""
REFUSED = {
    "causal": "an attention with is_causal, which isn't known here",
    "mask of each head": "of each head",
    "fewer heads that nobody told of": "an attention of 6 heads of 4, with 12 channels of keys",
}


class Block(nn.Module):
    """Text and image, which attend together."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, text: Tensor, image: Tensor, how: str, transformer_options: Any) -> tuple[Tensor, Tensor]:
        q, k, v = self.qkv(torch.cat((text, image), dim=1)).chunk(3, dim=-1)
        options = HOW[how]()
        if options.pop("few", False) or options.get("enable_gqa"):
            k, v = k[..., : WIDTH // 2], v[..., : WIDTH // 2]
        if options.get("skip_reshape"):
            q, k, v = (torch.unflatten(each, -1, (-1, WIDTH // HEADS)).transpose(1, 2) for each in (q, k, v))
        override = transformer_options.get("optimized_attention_override")
        mask = options.pop("mask", None)
        more = {**options, "transformer_options": transformer_options}
        # By its place or by name.
        given = (q, k, v, HEADS, mask) if how.startswith("mask") else (q, k, v, HEADS)
        more |= {} if how.startswith("mask") else {"mask": mask}
        if override is None:
            if how == "fewer heads that nobody told of":
                more["enable_gqa"] = True
            out = attention(*given, **more)
        else:
            out = override(attention, *given, **more)
        if options.get("skip_output_reshape"):
            out = out.transpose(1, 2).flatten(2)
        out = self.out(out)
        return text + out[:, : text.shape[1]], image + out[:, text.shape[1] :]


class Attending(nn.Module):
    """Blocks one after the other; it may fail at a place, on one rank."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(WIDTH, WIDTH)
        self.fails_before: int | None = None

    def forward(
        self, x: Tensor, timestep: Tensor, context: Tensor, how: int, transformer_options: Any, **others: Any
    ) -> Tensor:
        text, image = context, x.mT
        # As some networks do, which would spoil a second call.
        x.add_(1)
        for place, block in enumerate([*self.blocks, None]):
            if place == self.fails_before and "optimized_attention_override" in transformer_options:
                raise ValueError("this rank is angry")
            if block is not None:
                text, image = block(text, image, list(HOW)[how], transformer_options)
        out: Tensor = self.head(image)
        return out.mT


def network(
    how: int = 0, dtype: torch.dtype = torch.float32, over: Mapping[str, Attention] = MappingProxyType({})
) -> Network:
    """The network with its table, whose small forward attends in one of the ways."""
    torch.manual_seed(0)
    table = Table(
        network="",
        blocks=(Blocks("blocks", attention=over),),
        tokens={"text": Cut(1, ("text",)), "image": Cut(1, ("image",))},
        gather=("head", ("image",)),
        heads=lambda net: HEADS,
        width=lambda net: WIDTH,
        lengths=lambda net, shapes: (shapes["context"][1], shapes["x"][2]),
        probe=lambda net: {"x": (2, WIDTH, IMAGE), "context": (2, TEXT, WIDTH), "how": how},
    )
    return Network(Attending().to(dtype), dtype, "0", table=table)


def inputs(made: Network, how: int, text: int) -> Inputs:
    """A call's."""
    values = {"x": noise(2, WIDTH, IMAGE), "context": noise(2, text, WIDTH)}
    values = {name: each.to(made.dtype) for name, each in values.items()}
    given = {**values, "timestep": torch.zeros(1), "how": how}
    return Inputs(given, made.specs_for(given))


def called(topology: Topology, layout: Layout, how: str, text: int, dtype: str) -> tuple[float, str, str]:
    """How far a call is from that of one rank, why tokens aren't shared out afterwards, and what is said of it."""
    index = list(HOW).index(how)
    made = network(dtype=getattr(torch, dtype))
    made.use_table(topology.world_size)
    expected = made.run(SequenceParallel(), inputs(made, index, text))
    plan = Plan(layout, topology.world_size, Shape(HEADS, WIDTH, 2, (text, IMAGE)))
    out = run(Call(made, plan, inputs(made, index, text)), topology)
    return relative_difference(out, expected), made.reason, made.told(plan)


def graphed(topology: Topology, layout: Layout, how: str, breaking: int = -1) -> tuple[bool, list[int], list[str]]:
    """Whether calls of two lengths of text are the same with graphs and without, replays, and what is said of each.

    The network of the rank ``breaking`` keeps something else at each call.
    """
    index = list(HOW).index(how)
    plan = Plan(layout, topology.world_size, Shape(HEADS, WIDTH, 2, (TEXT, IMAGE)))
    outs: list[list[Any]] = []
    said: list[str] = []
    for graphs in (False, True):
        made, forwards = network(), Forwards(topology, graphs)
        made.use_table(topology.world_size)
        if topology.rank == breaking:
            made.inner.register_forward_hook(lambda net, args, out: setattr(net, "kept", object()))
        with graphs_on_cpu():
            outs.append([])
            for call in (0, 1, 2, 3, 0, 1, 2, 3):
                # Of the shorter one there are fewer tokens than ranks.
                given = inputs(made, index, TEXT if call < 2 else 1)
                given["x"].mul_(call + 1)
                outs[-1].append(forwards(Call(made, plan, given)))
                if graphs:
                    said.append(made.told(plan))
    replays = [each._graph.replays for each in forwards._captured() if isinstance(each, OthersGraph)]  # type: ignore[attr-defined]
    return all(map(torch.equal, *outs)), replays, said


def checked(topology: Topology, how: str, failing: int, place: int) -> tuple[str, float]:
    """Why a load shares out no tokens, and how long it took, where one rank fails before one of the blocks."""
    made = network(list(HOW).index(how))
    if topology.rank == failing:
        made.inner.fails_before = place
    begin = time.perf_counter()
    check_split(made, topology, torch.device("cpu"))
    return made.reason, time.perf_counter() - begin

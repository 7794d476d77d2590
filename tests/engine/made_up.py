"""Cases of made-up families, which together use all of the kit: a tiny model, its inputs, and what they must give.

They are no families of the package: nothing finds them there.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import made_up_plain
import torch
from made_up_joint import Joint
from made_up_pair import Pair
from made_up_video import Video
from torch import Tensor, nn

from tacod.group.work import Facts, Stepped
from tacod.plan import Layout, Plan
from tacod.rank.engine import Engine
from tacod.rank.families.base import DiT, Output
from tacod.rank.forward.graphs import Forwards
from tacod.rank.forward.run import Call
from tacod.rank.loader import Resident
from tacod.rank.parallel.topology import Topology
from tacod.rank.weights.streaming import Streaming
from tacod_client.exchange import pack
from tacod_client.tensors import from_wire, to_wire

KINDS: dict[str, type[DiT]] = {"video": Video, "joint": Joint, "pair": Pair}
CONFIG = {"dim": 32, "num_heads": 4, "num_kv_heads": 2, "in_channels": 4, "text_dim": 6, "num_layers": 2}
CASES = ["video", "video_bare", "joint", "joint_bare", "joint_masks", "pair", "pair_bare"]


def model(name: str, dtype: torch.dtype = torch.float32) -> DiT:
    """A tiny model of one of `KINDS`, always of the same random weights."""
    torch.manual_seed(1)
    made = KINDS[name](CONFIG).requires_grad_(False).eval()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.4 if parameter.ndim > 1 else 1.0)
    return made.to(dtype)


def inputs(case: str, batch: int = 2, seed: int = 2) -> dict[str, Any]:
    """What a forward of one of `CASES` takes, in fp32; its sides are odd."""
    name, _, variant = case.partition("_")
    g = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=g)

    time = torch.rand(batch, generator=g)
    if name == "pair":
        bare = {"x": [noise(4, 3, 5, 4), noise(3, 7, 4)], "timestep": [time, 0.5 * time], "context": noise(7, 6)}
        if variant == "bare":
            return bare
        # Of both, each token has a time of its own.
        times = [torch.rand(batch, tokens, 1, generator=g) for tokens in (18, 7)]
        masks = torch.rand(batch, 4, 3, 5, 4, generator=g), torch.rand(1, 3, 7, 4, generator=g)
        return bare | {"timestep": times, "denoise_mask": masks[0], "audio_denoise_mask": masks[1]}
    made: dict[str, Any] = {"timestep": time, "context": noise(7, 6)}
    keys = torch.rand(batch, 7, generator=g) < 0.6
    keys[:, 3] = True
    if name == "video":
        made |= {"x": noise(4, 3, 5, 7), "timestep": 1000 * torch.rand(batch, 3, generator=g)}
        extra = {"attention_mask": keys, "clip_fea": noise(4, 6), "control": noise(29, 32)}
    else:
        made |= {"x": noise(4, 5, 8)}
        extra = {"attention_mask": keys, "ref_latents": [noise(4, 4, 3), noise(4, 2, 5)]}
        if variant == "masks":
            # The images agree, so that `prepare` leaves the hidden tokens out.
            extra["attention_mask"] = keys[:1].expand(batch, -1).clone()
    return made if variant == "bare" else made | extra


def expected(case: str, given: dict[str, Any]) -> list[Tensor]:
    """The outputs of plain PyTorch."""
    name = case.partition("_")[0]
    out = getattr(made_up_plain, name)(dict(model(name).state_dict()), **given)
    return out if isinstance(out, list) else [out]


def engine_of(made: DiT, topology: Topology) -> Engine:
    """An engine that holds a model by the id ``m``."""
    engine = Engine(torch.device("cpu"), topology)
    facts = Facts(made.family, 0, 0, "fp32", made.heads, made.width, made.sampling())
    whole = Streaming(topology.everyone, engine.device, "replicated", [None] * topology.world_size, False)
    engine.models["m"] = Resident(made, {}, {}, facts, whole)
    return engine


def packed(given: dict[str, Any]) -> dict[str, Any]:
    """A forward's arguments as they arrive from a client; a residual is for after the first block."""
    plain = {name: value for name, value in given.items() if name != "control"}
    sent = pack(plain, "arguments", {}, None)
    if "control" in given:
        sent["control"] = {"tensors": [to_wire(given["control"], "control")], "input": [0]}
    return sent


def error(topology: Topology, layout: Layout, case: str, batch: int = 2) -> float:
    """The largest relative error of an engine's forward in a layout, on this rank; it may be idle."""
    made = model(case.partition("_")[0])
    given = inputs(case, batch)
    engine = engine_of(made, topology)
    outs: list[Tensor] = []

    class Kept(Forwards):
        """Forwards in this layout, whose outputs every rank keeps, idle ones too."""

        def __call__(self, call: Call) -> Output:
            out = super().__call__(replace(call, plan=Plan(layout, topology.world_size, call.plan.shape)))
            outs.extend(out if isinstance(out, list) else [out])
            return out

    engine.forwards = Kept(topology)
    with torch.inference_mode():
        told = engine.forward("m", "auto", packed(given), b"session")
    wanted = expected(case, given)
    if topology.rank == 0:
        assert isinstance(told, Stepped)
        sent = told.out if isinstance(told.out, list) else [told.out]
        assert all(torch.equal(from_wire(one, "torch"), other) for one, other in zip(sent, outs, strict=True))
        assert isinstance(told.out, list) == isinstance(given["x"], list)
    return max(
        float((one - other).norm() / other.norm()) if one.shape == other.shape else float("inf")
        for one, other in zip(outs, wanted, strict=True)
    )

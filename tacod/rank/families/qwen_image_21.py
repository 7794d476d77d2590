"""Qwen-Image 2.1 (Qwen team): one causal sequence of text and reference images, and the image that attends to it.

Text and references have the modulation of time 0 and don't attend to the image: they are the prefix, of which the image
needs the keys and values in each block. Parameters are named as in ComfyUI's files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from tacod.checkpoint import TensorInfo
from tacod.rank.families import kit
from tacod.rank.families.base import DiT
from tacod.rank.families.config import choice, count_blocks, fixed, integer, rope_axes, shape_of
from tacod.rank.families.inputs import Argument, Places, Spec
from tacod.rank.families.latents import QWEN_IMAGE_21
from tacod.rank.families.names import Names
from tacod.rank.families.noise import Flow
from tacod.rank.families.stream import Attention, ForwardPass, Stream
from tacod.rank.ops.norm import rms_norm
from tacod.rank.parallel.joint_attention import KeysValues

__all__ = ["QwenImage21"]

_EPSILON = 1e-6
_AXES = [16, 56, 56]
_THETA = 10000


class Block(nn.Module):
    """Attention and SwiGLU; all blocks share one set of modulations."""

    def __init__(self, width: int, heads: int, hidden: int, fused: bool) -> None:
        super().__init__()
        self.attn = kit.SelfAttention(
            width,
            heads,
            layers=("to_q", "to_k", "to_v"),
            out="to_out.0",
            norm="head",
            norms=("norm_q.weight", "norm_k.weight"),
            bias=False,
            out_bias=False,
            epsilon=_EPSILON,
        )
        # Files have the MLP's first layer and its gate as one or apart.
        names = ("gate_up", "out") if fused else ("gate_layer", "out", "proj")
        self.img_mlp = kit.MLP(width, hidden, names, "swiglu", bias=False)

    def forward(self, f: ForwardPass) -> None:
        """The image one block further; it attends to the prefix too."""
        self._advance(f, f.image, before=f.keys_values[self])

    def prefix(self, f: ForwardPass) -> Tensor:
        """The prefix one block further; gives its keys and values."""
        return self._advance(f, f.text, mask=f.mask, keep=True).kept.heads

    def _advance(self, f: ForwardPass, stream: Stream, **how: Any) -> Attention:
        scale, gate, mlp_scale, mlp_gate = f.modulations
        normed = stream.normed(None, scale)
        attention = f.attend((stream, lambda: self.attn(normed, stream.rotation)), **how)
        (attended,) = attention.wait()
        stream.add(gate, self.attn.project(attended))
        stream.add(mlp_gate, self.img_mlp(stream.normed(None, mlp_scale)))
        return attention


class TextIn(nn.Module):
    """The text's embedder; its norm's weight is stored minus 1 and used in fp32."""

    def __init__(self, context_width: int, width: int) -> None:
        super().__init__()
        self.text_norm = nn.Module()
        self.text_norm.weight = nn.Parameter(torch.zeros(context_width))
        self.in_layer = nn.Linear(context_width, width, bias=False)
        self.out_layer = nn.Linear(width, width, bias=False)

    def forward(self, context: Tensor) -> Tensor:
        """[B, L, context_width] to [B, L, width]."""
        weight = self.text_norm.weight
        assert isinstance(weight, Tensor)
        return kit.feed_forward(self.in_layer, self.out_layer, rms_norm(context, 1 + weight.float(), _EPSILON))


class QwenImage21(DiT):
    """``config`` is ComfyUI's ``unet_config``. Raises `ModelUnsupported`, naming the key, for one that can't be."""

    family: ClassVar[str] = "qwen_image_21"
    title = "Qwen-Image-2.1"
    models = ("generation and editing", "Turbo")
    lora_marks = r"transformer_blocks[._]\d+[._]img_mlp[._](gate_layer|gate_up|proj|out)[._]"
    tiny: ClassVar[Mapping[str, Any]] = {
        "image_model": "qwen_image21",
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 3,
        "context_in_dim": 32,
        "mlp_ratio": 2,
        "axes_dims_rope": [4, 6, 6],
        "fused_mlp": False,
    }
    diffusers: ClassVar[Mapping[str, Any]] = {
        "QwenImage21Transformer2DModel": lambda c: {
            "num_layers": c.only("patch_size", 1) and c.whole("num_layers", 32),
            "axes_dims_rope": c.items("axes_dims_rope", _AXES),
            "eps": c.get("eps", _EPSILON),
            "causal_condition": c.get("causal_condition", True),
        }
    }
    usual: ClassVar[Mapping[str, int]] = {"B": 1, "H": 64, "W": 64, "L": 256}
    downscale = 16
    image_models: ClassVar[tuple[str, ...]] = ("qwen_image21",)
    process = Flow()
    latent_format = QWEN_IMAGE_21
    # The authors' names are diffusers'; ComfyUI's files have two layers as one.
    names = Names("""
        {img_in,modulation.1,norm_out.linear,proj_out}
        txt_in.{text_norm,in_layer,out_layer}
        time_text_embed.timestep_embedder.linear_{1,2}
        transformer_blocks.*.attn.{to_q,to_k,to_v,to_out.0,norm_q,norm_k}
        transformer_blocks.*.img_mlp.{gate_layer,proj,gate_up,out}
    """)
    lora_names = Names("""
        transformer_blocks.*.img_mlp.{gate_layer,proj}  transformer_blocks.*.img_mlp.gate_up[0/2,1/2]
    """)

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        fixed(config, eps=_EPSILON, causal_condition=True)
        self.heads = integer(config, "num_attention_heads", 32)
        head_width = integer(config, "attention_head_dim", 128)
        self.width = width = self.heads * head_width
        self.axes = rope_axes({"axes_dims_rope": _AXES, **config}, "axes_dims_rope", 3, head_width)
        self.channels, self.out_channels = integer(config, "in_channels", 64), integer(config, "out_channels", 64)
        self.context_width = integer(config, "context_in_dim", 4096)
        hidden = width * integer(config, "mlp_ratio", 3)
        fused: bool = choice(config, "fused_mlp", True, False)

        self.img_in = nn.Linear(self.channels, width, bias=False)
        self.txt_in = TextIn(self.context_width, width)
        names = "timestep_embedder.linear_1", "timestep_embedder.linear_2"
        self.time_text_embed = kit.MLPEmbedder(256, width, names, bias=False)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 4 * width, bias=False))
        self.transformer_blocks = nn.ModuleList(
            Block(width, self.heads, hidden, fused) for _ in range(integer(config, "num_layers", 32, most=1024))
        )
        self.norm_out = nn.ModuleDict({"linear": nn.Linear(width, width, bias=False)})
        self.proj_out = nn.Linear(width, self.out_channels, bias=False)

    @classmethod
    def detect(cls, tensors: Mapping[str, TensorInfo]) -> dict[str, Any] | None:
        """See `DiT.detect`."""
        if "txt_in.text_norm.weight" not in tensors or "modulation.1.weight" not in tensors:
            return None
        block = "transformer_blocks.0"
        width, channels = shape_of(tensors, "img_in.weight", 2)
        (head_width,) = shape_of(tensors, f"{block}.attn.norm_q.weight", 1)
        return {
            "image_model": "qwen_image21",
            "in_channels": channels,
            "out_channels": shape_of(tensors, "proj_out.weight", 2)[0],
            "num_layers": count_blocks(tensors, "transformer_blocks"),
            "attention_head_dim": head_width,
            "num_attention_heads": width // max(head_width, 1),
            "context_in_dim": shape_of(tensors, "txt_in.text_norm.weight", 1)[0],
            "mlp_ratio": shape_of(tensors, f"{block}.img_mlp.out.weight", 2)[1] // max(width, 1),
            "fused_mlp": f"{block}.img_mlp.gate_up.weight" in tensors,
        }

    def arguments(self) -> dict[str, Spec]:
        """See `DiT.arguments`.

        ``image_slots`` has for each reference the place in the text before which it stands; the last ones may be left
        out and then stand behind the text.
        """
        return {
            "x": Argument(("B", self.channels, "H", "W")),
            "timestep": Argument(("B",), fp32=True),
            "context": Argument(("B", "L", self.context_width)),
            "ref_latents": Argument(("B", self.channels, "h", "w"), required=False, many=True),
            "image_slots": Places("L"),
        }

    def lengths(self, arguments: Mapping[str, Any]) -> tuple[int, int]:
        """See `DiT.lengths`: text with its references, image."""
        references = sum(kit.Grid(each, 1).length for each in arguments.get("ref_latents") or ())
        return arguments["context"].shape[1] + references, kit.Grid(arguments["x"], 1).length

    def timestep(self, sigma: Tensor) -> Tensor:
        """See `DiT.timestep`."""
        return sigma

    def prefix(self, f: ForwardPass, **arguments: Any) -> list[Tensor]:
        """See `DiT.prefix`: the keys and values of text and references in each block.

        Every rank embeds all of the text and the references: it is little.
        """
        x, context = arguments["x"], arguments["context"]
        target, device = kit.Grid(x, 1), context.device
        text, start, place = self.txt_in(context), 0, 0
        tokens, places, runs = [], [], []
        for end, latent in _runs(**arguments):
            tokens.append(text[:, start:end])
            line = torch.arange(place, place + end - start, device=device, dtype=torch.float32)
            places.append(line[:, None].expand(-1, 3))
            runs.append((end - start, False))
            place, start = place + end - start, end
            if latent is not None:
                grid = kit.Grid(latent, 1)
                tokens.append(self.img_in(grid.patches(latent)))
                places.append(_around(grid, target, place, device))
                runs.append((grid.length, True))
                place += max(grid.counts)
        f.modulations = _gated(self.modulation[1](self._conditioning(torch.zeros(1, device=device), x.dtype)))
        f.text = f.shard(torch.cat(tokens, dim=1), rotation=self._rotation(torch.cat(places)))
        f.mask = f.sequence.in_order_of_ranks(_causal(runs, device)[None], f.text.lengths)
        return [block.prefix(f) for block in f.over(self.trunk)]

    def begin(self, f: ForwardPass, **arguments: Any) -> None:
        """See `DiT.begin`."""
        x, dtype = arguments["x"], arguments["x"].dtype
        # The authors round the time to the compute dtype, times 1000 and then by itself; training had it so.
        rounded = ((arguments["timestep"] * 1000).to(dtype) / 1000).to(dtype).float()
        vectors = self._conditioning(rounded, dtype)
        f.scale = self.norm_out["linear"](vectors)
        f.modulations = _gated(self.modulation[1](vectors))
        length, _ = self.lengths(arguments)
        f.keys_values = {block: KeysValues(heads, (length,)) for block, heads in zip(self.trunk, f.prefix, strict=True)}
        # The image's position is that behind the text and the longer side of each reference.
        place = arguments["context"].shape[1] + sum(max(each.shape[2:]) for each in arguments.get("ref_latents") or ())
        f.grid = kit.Grid(x, 1)
        positions = _around(f.grid, f.grid, place, x.device)
        f.image = f.shard(f.grid.patches(x), self.img_in, self._rotation(positions))

    def _conditioning(self, time: Tensor, dtype: torch.dtype) -> Tensor:
        """The vector of each time [B] in 0 to 1, [B, 1, width]."""
        return functional.silu(self.time_text_embed.numbers(1000 * time[:, None], dtype))

    @property
    def trunk(self) -> Sequence[Any]:
        """See `DiT.trunk`."""
        return list(self.transformer_blocks)

    def end(self, f: ForwardPass) -> Tensor:
        """See `DiT.end`."""
        latent: Tensor = f.grid.latent(f.gather(f.image, self.proj_out(f.image.normed(None, f.scale))))
        return latent

    def _rotation(self, positions: Tensor) -> Any:
        return lambda shard: kit.rope(shard(positions), self.axes, _THETA)


def _runs(
    context: Tensor, ref_latents: Sequence[Tensor] = (), image_slots: Sequence[int] = (), **_: Any
) -> list[tuple[int, Tensor | None]]:
    """Where each run of text ends, and the reference behind it; None behind the last one."""
    length = context.shape[1]
    ends = [*image_slots, *[length] * len(ref_latents)][: len(ref_latents)]
    return list(zip([*ends, length], [*ref_latents, None], strict=True))


def _gated(modulation: Tensor) -> tuple[Tensor, ...]:
    """Scale and gate, twice, [B, 1, W] each."""
    scale, gate, mlp_scale, mlp_gate = modulation.chunk(4, dim=-1)
    return scale, gate.tanh(), mlp_scale, mlp_gate.tanh()


def _around(grid: kit.Grid, target: kit.Grid, place: int, device: torch.device) -> Tensor:
    """The position of each token of an image: ``place``, row and column from its middle, [N, 3] in fp32.

    Where a side is odd and the target's even, or the other way round, it is half a token off, so that both have the
    same middle.
    """
    origin = [
        side // 2 - side + 0.5 * (side % 2 - other % 2) for side, other in zip(grid.counts, target.counts, strict=True)
    ]
    return functional.pad(grid.positions(origin, device=device), (1, 0), value=place)


def _causal(runs: Sequence[tuple[int, bool]], device: torch.device) -> Tensor:
    """What each token attends to, boolean [P, P]: what comes before it, and all of its own image."""
    total = sum(count for count, _ in runs)
    seen = torch.ones(total, total, dtype=torch.bool, device=device).tril()
    start = 0
    for count, image in runs:
        if image:
            seen[start : start + count, start : start + count] = True
        start += count
    return seen

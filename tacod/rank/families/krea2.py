"""Krea 2 (Krea): one stream of text, references and image, with grouped-query attention and gated attention outputs.

The text comes as hidden states of several layers of its encoder. Parameters are named as in the authors' files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from tacod.checkpoint import TensorInfo
from tacod.rank.families import kit
from tacod.rank.families.base import DiT
from tacod.rank.families.config import (
    choice,
    count_blocks,
    fixed,
    integer,
    kv_heads_of,
    number,
    rope_axes,
    shape_of,
    width_of_heads,
)
from tacod.rank.families.inputs import Argument, Spec
from tacod.rank.families.latents import WAN21
from tacod.rank.families.names import Names
from tacod.rank.families.noise import Flow
from tacod.rank.families.stream import ForwardPass, Stream
from tacod.rank.ops.norm import Norm
from tacod.rank.ops.qkv import QKV, Rotation

__all__ = ["Krea2"]

_EPSILON = 1e-5
_PATCH = (1, 2, 2)
_TEXT_BLOCKS = 2
"""Blocks over a token's layers, and as many over the tokens."""
_MULTIPLIER = 4
_PUBLISHED = {"features": 6144, "heads": 48, "kvheads": 12, "txtdim": 2560, "txtheads": 20, "txtkvheads": 20}
_METHODS = "index", "index_timestep_zero"
_AS_INDEX = {"offset": "index", "uxo": "index"}
"""What ComfyUI's menu offers for other models."""
_THEIRS = "{transformer,text_fusion.layerwise,text_fusion.refiner}_blocks.*"
_OURS = "{blocks,txtfusion.layerwise_blocks,txtfusion.refiner_blocks}.*"
_UNMODULATED: tuple[Tensor | None, ...] = (None,) * 6


class CentredScale(nn.Module):
    """The weight of an RMS norm, which files store minus 1; it is used in fp32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(width))

    @property
    def norm(self) -> Norm:
        """The norm of tokens."""
        return Norm("rms", _EPSILON, 1 + self.scale.float())


class Attention(kit.SelfAttention):
    """Self-attention whose output is gated, channel by channel, by a layer of its input."""

    def __init__(self, width: int, heads: int, kv_heads: int) -> None:
        super().__init__(
            width,
            heads,
            kv_heads=kv_heads,
            layers=("wq", "wk", "wv"),
            out="wo",
            norm="head",
            norms=("qknorm.qnorm.scale", "qknorm.knorm.scale"),
            bias=False,
            out_bias=False,
            epsilon=_EPSILON,
        )
        self.gate = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, rotation: Rotation | None = None, epsilon: float | None = None) -> QKV:
        """See `SelfAttention.forward`; the norms' weights are as `CentredScale`'s."""
        qkv = super().forward(x, rotation, epsilon)
        assert qkv.norm is not None
        query, key = 1 + qkv.norm.query.float(), 1 + qkv.norm.key.float()
        return replace(qkv, norm=replace(qkv.norm, query=query, key=key))


class Block(nn.Module):
    """Attention and SwiGLU after RMS norms, modulated or, in the text fusion, not."""

    def __init__(self, width: int, heads: int, kv_heads: int, multiplier: int, modulated: bool) -> None:
        super().__init__()
        hidden = _hidden(width, multiplier)
        self.prenorm, self.postnorm = CentredScale(width), CentredScale(width)
        self.attn = Attention(width, heads, kv_heads)
        self.mlp = kit.MLP(width, hidden, ("gate", "down", "up"), "swiglu", bias=False)
        if modulated:
            self.mod = nn.ParameterDict({"lin": torch.zeros(6 * width)})

    def forward(self, f: ForwardPass) -> None:
        """Text, references and image one block further."""
        self.advance(f.joint, f.attend, (f.modulations + self.mod["lin"]).chunk(6, dim=-1))

    def advance(
        self, stream: Stream, attend: Callable[..., Any], modulation: Sequence[Tensor | None] = _UNMODULATED
    ) -> None:
        """Change a stream by this block; ``attend`` is `ForwardPass.attend` or takes the same arguments."""
        scale, shift, gate, mlp_scale, mlp_shift, mlp_gate = modulation
        normed = stream.normed(shift, scale, norm=self.prenorm.norm)
        attention = attend((stream, lambda: self.attn(normed, stream.rotation)), overlap=True)
        opened = self.attn.gate(normed).sigmoid()
        (attended,) = attention.wait()
        stream.add(gate, self.attn.project(attended * opened))
        stream.add(mlp_gate, self.mlp(stream.normed(mlp_shift, mlp_scale, norm=self.postnorm.norm)))


class Alone:
    """Attention within sequences that this rank has whole, in the place of `ForwardPass.attend`."""

    def __init__(self, projection: tuple[Stream, Callable[[], QKV]], overlap: bool = False) -> None:
        self._qkv = projection[1]()

    def wait(self) -> tuple[Tensor]:
        """See `Attention.wait`."""
        q, k, v = (each.transpose(1, 2) for each in self._qkv.by_heads())
        return (functional.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2),)


class TextFusion(nn.Module):
    """Makes one vector of each token's layers, and refines the tokens by attention among them."""

    layerwise_blocks: Any
    refiner_blocks: Any

    def __init__(self, layers: int, width: int, heads: int, kv_heads: int, multiplier: int) -> None:
        super().__init__()
        self.layers = layers
        made = [Block(width, heads, kv_heads, multiplier, modulated=False) for _ in range(2 * _TEXT_BLOCKS)]
        self.layerwise_blocks = nn.ModuleList(made[:_TEXT_BLOCKS])
        self.refiner_blocks = nn.ModuleList(made[_TEXT_BLOCKS:])
        self.projector = nn.Linear(layers, 1, bias=False)

    def fuse(self, context: Tensor) -> Tensor:
        """Some tokens [B, S, layers * width], each on its own: [B, S, width]."""
        stream = Stream(torch.unflatten(context, -1, (self.layers, -1)).flatten(0, 1), (self.layers,))
        for block in self.layerwise_blocks:
            block.advance(stream, Alone)
        fused: Tensor = self.projector(stream.tokens.transpose(1, 2)).squeeze(-1)
        return torch.unflatten(fused, 0, context.shape[:2])


class LastLayer(nn.Module):
    """A modulated norm and the projection to patches."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.norm = CentredScale(width)
        self.linear = nn.Linear(width, outputs)
        self.modulation = nn.ParameterDict({"lin": torch.zeros(2, width)})


class Krea2(DiT):
    """``config`` is ComfyUI's ``unet_config``. Raises `ModelUnsupported`, naming the key, for one that can't be.

    Beside ComfyUI's keys, ``axes_dim`` says how many channels of a head each axis of the positions turns.
    """

    family: ClassVar[str] = "krea2"
    title = "Krea 2"
    models = ("Raw", "Turbo")
    lora_marks = r"txtfusion[._]|text_fusion[._]"
    tiny: ClassVar[Mapping[str, Any]] = {
        "image_model": "krea2",
        "features": 96,
        "channels": 4,
        "layers": 2,
        "heads": 6,
        "kvheads": 2,
        "txtlayers": 3,
        "txtdim": 16,
        "txtheads": 4,
        "txtkvheads": 2,
        "multiplier": 2,
    }
    diffusers: ClassVar[Mapping[str, Any]] = {
        "Krea2Transformer2DModel": lambda c: {
            "layers": c.whole("num_layers", 28),
            "axes_dim": c.items("axes_dims_rope", (32, 48, 48)),
            "theta": c.get("rope_theta", 1000),
            "norm_eps": c.get("norm_eps", _EPSILON),
        }
    }
    usual: ClassVar[Mapping[str, int]] = {"B": 1, "H": 128, "W": 128, "L": 256}
    image_models: ClassVar[tuple[str, ...]] = ("krea2",)
    process = Flow()
    latent_format = WAN21
    names = Names(
        """
        img_in                                              first
        time_embed.linear_{1,2}                             tmlp.{0,2}
        time_mod_proj                                       tproj.1
        txt_in.{norm.weight,linear_1,linear_2}              txtmlp.{0.scale,1,3}
        text_fusion.projector                               txtfusion.projector
        transformer_blocks.*.scale_shift_table              blocks.*.mod.lin|
        final_layer.{scale_shift_table,norm.weight,linear}  last.{modulation.lin,norm.scale,linear}
        THEIRS.norm{1,2}.weight                             OURS.{pre,post}norm.scale
        THEIRS.attn.to_{q,k,v,gate,out.0}                   OURS.attn.{wq,wk,wv,gate,wo}
        THEIRS.attn.norm_{q,k}.weight                       OURS.attn.qknorm.{q,k}norm.scale
        THEIRS.ff.{gate,up,down}                            OURS.mlp.{gate,up,down}
        """.replace("THEIRS", _THEIRS).replace("OURS", _OURS)
    )
    lora_names = Names(f"{_THEIRS}.attn.to_out  {_OURS}.attn.wo")

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        config = {**_PUBLISHED, **config}
        fixed(config, patch=_PATCH[-1], bias=False, norm_eps=_EPSILON)
        self.width, self.heads = width, heads = width_of_heads(config, "features", "heads")
        text, text_heads = width_of_heads(config, "txtdim", "txtheads")
        self.channels = self.out_channels = integer(config, "channels", 16)
        self.text_layers, self.text_width = integer(config, "txtlayers", 12), text
        turned = width // heads // 16 * 6
        axes = config.get("axes_dim", [width // heads - 2 * turned, turned, turned])
        self.axes = rope_axes({"axes_dim": axes}, "axes_dim", 3, width // heads)
        self.theta = number(config, "theta", 1000)
        self.reference_method: str | None = choice(config, "default_ref_method", None, *_METHODS)
        self.time_width = integer(config, "tdim", 256)
        multiplier = integer(config, "multiplier", _MULTIPLIER)

        self.first = nn.Linear(self.channels * 4, width)
        self.tmlp = kit.MLP(self.time_width, width, ("0", "2"), outputs=width)
        self.tproj = nn.Sequential(nn.GELU("tanh"), nn.Linear(width, 6 * width))
        self.txtfusion = TextFusion(
            self.text_layers, text, text_heads, kv_heads_of(config, "txtkvheads", text_heads), multiplier
        )
        self.txtmlp = nn.Sequential(
            CentredScale(text), nn.Linear(text, width), nn.GELU("tanh"), nn.Linear(width, width)
        )
        kv_heads = kv_heads_of(config, "kvheads", heads)
        self.blocks = nn.ModuleList(
            Block(width, heads, kv_heads, multiplier, modulated=True)
            for _ in range(integer(config, "layers", 28, most=1024))
        )
        self.last = LastLayer(width, self.out_channels * 4)

    @classmethod
    def detect(cls, tensors: Mapping[str, TensorInfo]) -> dict[str, Any] | None:
        """See `DiT.detect`."""
        if "txtfusion.projector.weight" not in tensors:
            return None
        text = "txtfusion.layerwise_blocks.0.attn"
        width, inputs = shape_of(tensors, "first.weight", 2)
        heads, kv_heads = _heads(tensors, "blocks.0.attn")
        text_heads, text_kv_heads = _heads(tensors, text)
        text_width = shape_of(tensors, f"{text}.wq.weight", 2)[1]
        hidden = [shape_of(tensors, f"{mlp}.0.mlp.up.weight", 2)[0] for mlp in ("blocks", "txtfusion.layerwise_blocks")]
        return {
            "image_model": "krea2",
            "features": width,
            "channels": inputs // 4,
            "patch": _PATCH[-1],
            "layers": count_blocks(tensors, "blocks"),
            "heads": heads,
            "kvheads": kv_heads,
            "txtlayers": shape_of(tensors, "txtfusion.projector.weight", 2)[1],
            "txtdim": text_width,
            "txtheads": text_heads,
            "txtkvheads": text_kv_heads,
            # Where widths are small several give the same.
            "multiplier": next(
                (n for n in range(1, 65) if hidden == [_hidden(width, n), _hidden(text_width, n)]), _MULTIPLIER
            ),
            "tdim": shape_of(tensors, "tmlp.0.weight", 2)[1],
        }

    def arguments(self) -> dict[str, Spec]:
        """See `DiT.arguments`.

        ``context`` has a token's layers one after the other. ``ref_latents`` count if there is a
        ``ref_latents_method``: by ``"index"`` they have the image's timestep, by ``"index_timestep_zero"`` 0.
        """
        return {
            "x": Argument(("B", self.channels, 1, "H", "W")),
            "timestep": Argument(("B",), fp32=True),
            "context": Argument(("B", "L", self.text_layers * self.text_width)),
            "ref_latents": Argument(("B", self.channels, 1, "h", "w"), required=False, many=True),
            "ref_latents_method": Argument(None, required=False, choices=_METHODS, also=_AS_INDEX),
        }

    def lengths(self, arguments: Mapping[str, Any]) -> tuple[int, ...]:
        """See `DiT.lengths`: text, references if there are any, image."""
        image, *references = (grid.length for grid in self._grids(arguments))
        return arguments["context"].shape[1], *([sum(references)] if references else []), image

    def timestep(self, sigma: Tensor) -> Tensor:
        """See `DiT.timestep`."""
        return sigma

    def begin(self, f: ForwardPass, **arguments: Any) -> None:
        """See `DiT.begin`. The text is fused and refined here; its tokens are shared out all along."""
        x, context = arguments["x"], arguments["context"]
        grids = self._grids(arguments)
        f.grid = grids[0]
        still = len(grids) > 1 and self._method(arguments) == "index_timestep_zero"
        now = arguments["timestep"]
        # Row 1 is that of references at time 0.
        times = torch.stack((now, 0 * now), dim=1) if still else now[:, None]
        vectors = self.tmlp(kit.sinusoid(1000 * times, self.time_width).to(x.dtype))
        f.modulations = self.tproj(vectors)
        f.conditioning = vectors[:, :1]

        origin = torch.zeros(context.shape[1], 3, device=x.device)
        f.text = f.shard(context, self.txtfusion.fuse, self._rotation(origin))
        rotation, f.text.rotation = f.text.rotation, None
        for block in self.txtfusion.refiner_blocks:
            block.advance(f.text, f.attend)
        normed = f.text.normed(norm=self.txtmlp[0].norm)
        f.text.tokens, f.text.rotation = kit.feed_forward(self.txtmlp[1], self.txtmlp[3], normed), rotation

        streams = [f.text]
        if len(grids) > 1:
            latents = arguments["ref_latents"]
            patches = torch.cat([grid.patches(each) for grid, each in zip(grids[1:], latents, strict=True)], dim=1)
            places = [grid.positions((at, 0, 0), device=x.device) for at, grid in enumerate(grids[1:], start=1)]
            rows = torch.ones(patches.shape[1], dtype=torch.int64, device=x.device) if still else None
            f.references = f.shard(patches, self.first, self._rotation(torch.cat(places)), rows)
            streams.append(f.references)
        f.image = f.shard(f.grid.patches(x), self.first, self._rotation(f.grid.positions(device=x.device)))
        f.joint = f.join(*streams, f.image)

    @property
    def trunk(self) -> Sequence[Any]:
        """See `DiT.trunk`."""
        return list(self.blocks)

    def end(self, f: ForwardPass) -> Tensor:
        """See `DiT.end`."""
        scale, shift = (f.conditioning + row for row in self.last.modulation["lin"])
        patches = self.last.linear(f.image.normed(shift, scale, norm=self.last.norm.norm))
        latent: Tensor = f.grid.latent(f.gather(f.image, patches))
        return latent

    def _method(self, arguments: Mapping[str, Any]) -> str | None:
        method: str | None = arguments.get("ref_latents_method") or self.reference_method
        return method

    def _grids(self, arguments: Mapping[str, Any]) -> list[kit.Grid]:
        """The grids of the image and of its references; ComfyUI ignores references if no method is given."""
        references = arguments.get("ref_latents") if self._method(arguments) is not None else None
        image = kit.Grid(arguments["x"], _PATCH)
        return [image, *(kit.Grid(each, _PATCH, "ref_latents") for each in references or ())]

    def _rotation(self, positions: Tensor) -> Any:
        return lambda shard: kit.rope(shard(positions), self.axes, self.theta)


def _hidden(width: int, multiplier: int) -> int:
    """The hidden width of a feed-forward part, in whole 128s."""
    return -(-int(2 * width / 3) * multiplier // 128) * 128


def _heads(tensors: Mapping[str, TensorInfo], attention: str) -> tuple[int, int]:
    """Heads of queries, and of keys and values, by the width of what norms a head."""
    (head,) = shape_of(tensors, f"{attention}.qknorm.qnorm.scale", 1)
    queries, keys = (shape_of(tensors, f"{attention}.{layer}.weight", 2)[0] for layer in ("wq", "wk"))
    return queries // max(head, 1), keys // max(head, 1)

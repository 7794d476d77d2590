"""FLUX.3 (Black Forest Labs, 2026): klein, base and distilled.

Image, references and text pass blocks of their own, in which each attends to itself alone, and are one stream then.
Distilled models are flow maps: they are told the noise level that a step goes to. Parameters are named as in the
authors' files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from tacod.checkpoint import TensorInfo
from tacod.rank.families import kit
from tacod.rank.families.base import DiT, LatentFormat
from tacod.rank.families.config import choice, count_blocks, fixed, integer, number, rope_axes, shape_of
from tacod.rank.families.flux import EMBEDDER
from tacod.rank.families.inputs import Argument, Spec
from tacod.rank.families.names import Names
from tacod.rank.families.noise import Flow
from tacod.rank.families.stream import ForwardPass, Stream
from tacod.rank.ops.linear import linear_add, linear_fp32
from tacod.rank.ops.qkv import QKV, QKNorm

__all__ = ["Flux3"]

_EPSILON = 1e-6
_MODES = {"image": "image", "txt": "text", "image_cond": "references"}
"""By the authors' names for them the streams of a forward, in the order of their rows in joint modulations."""
_THEIRS = "{mode_blocks.image,mode_blocks.image_cond,txt_mode_blocks,single_transformer_blocks}.*"
_OURS = "{content_mode_blocks.image,content_mode_blocks.image_cond,txt_mode_blocks,single_blocks}.*"


class Block(nn.Module):
    """Attention and SwiGLU side by side, from one norm and into one residual, on one stream of the forward."""

    def __init__(self, stream: str, heads: int, head_width: int, hidden: int) -> None:
        super().__init__()
        width = heads * head_width
        self.stream, self.heads = stream, heads
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.norm = kit.QKNormWeights(head_width, head_width, ("query_norm.scale", "key_norm.scale"))
        self.attn_out = nn.Linear(width, width, bias=False)
        self.mlp_in = nn.Linear(width, 2 * hidden, bias=False)
        self.mlp_out = nn.Linear(hidden, width, bias=False)

    def forward(self, f: ForwardPass) -> None:
        """The stream one block further; without references theirs is none."""
        stream: Stream | None = getattr(f, self.stream)
        if stream is None:
            return
        shift, scale, gate = f.modulations[self.stream]
        normed = stream.normed(shift, scale)
        attention = f.attend((stream, lambda: self._qkv(normed, stream)), overlap=True)
        branch = kit.feed_forward(self.mlp_in, self.mlp_out, normed, "swiglu")
        (attended,) = attention.wait()
        stream.add(gate, linear_add(self.attn_out, attended, branch))

    def _qkv(self, normed: Tensor, stream: Stream) -> QKV:
        projected = self.q_proj(normed), self.k_proj(normed), self.v_proj(normed)
        return QKV(projected, self.heads, QKNorm(*self.norm.weights, _EPSILON), stream.rotation)


class Flux3(DiT):
    """``config`` has the keys of diffusers' class, and ``image_model``.

    Raises `ModelUnsupported`, naming the key, for a configuration that can't be. For a flow map
    (``flow_map``) there is no `sample`.
    """

    family: ClassVar[str] = "flux3"
    title = "FLUX.3 klein"
    models = ("base", "distilled")
    beside = ("repa_projectors.",)
    lora_marks = r"mode_blocks[._]|single_blocks[._]\d+[._]([qkv]_proj|attn_out|mlp_(in|out))"
    tiny: ClassVar[Mapping[str, Any]] = {
        "image_model": "flux3",
        "in_channels": 4,
        "cond_in_channels": 4,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 3,
        "joint_attention_dim": 16,
        "mlp_ratio": 1.0,
        "axes_dims_rope": [4, 4, 4, 4],
        "flow_map": True,
    }
    diffusers: ClassVar[Mapping[str, Any]] = {
        "Flux3Transformer2DModel": lambda c: {
            "num_layers": c.whole("num_layers", 5),
            "num_single_layers": c.whole("num_single_layers", 28),
            "axes_dims_rope": c.items("axes_dims_rope", (32, 32, 32, 32)),
            "rope_theta": c.get("rope_theta", 10000),
            "eps": c.get("eps", _EPSILON),
            "flow_map": c.get("flow_map", False),
        }
    }
    diffusers_optional = frozenset(f"target_timestep_embedder.linear_{n}" for n in (1, 2))
    usual: ClassVar[Mapping[str, int]] = {"B": 1, "H": 64, "W": 64, "L": 480}
    usual_values: ClassVar[Mapping[str, float]] = {"target_timestep": 0.5}
    downscale = 16
    image_models: ClassVar[tuple[str, ...]] = ("flux3",)
    process = Flow()
    latent_format = LatentFormat(1.0, 0.0)
    names = Names(
        """
        {,target_}timestep_embedder.linear_{1,2}                 {,ref_}time_in.{in,out}_layer
        {early,single}_stream_modulations.MODES.linear           {early,single}_stream_modulations.MODES.lin
        x_embedders.{image,image_cond}                           emb_in.{image,image_cond}
        context_embedder                                         txt_in
        norm_out.linear                                          final_layer.image.adaLN_modulation.1~
        proj_out                                                 final_layer.image.linear
        THEIRS.attn.to_{q,k,v,out.0}                             OURS.{q_proj,k_proj,v_proj,attn_out}
        THEIRS.attn.norm_{q,k}.weight                            OURS.norm.{query,key}_norm.scale
        THEIRS.ff.linear_{in,out}                                OURS.mlp_{in,out}
        """.replace("MODES", "{image,txt,image_cond}")
        .replace("THEIRS", _THEIRS)
        .replace("OURS", _OURS)
    )

    content_mode_blocks: Any
    final_layer: Any

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        fixed(config, eps=_EPSILON)
        self.heads, head = integer(config, "num_attention_heads", 24), integer(config, "attention_head_dim", 128)
        self.width = width = self.heads * head
        self.channels = self.out_channels = integer(config, "in_channels", 128)
        self.reference_channels = integer(config, "cond_in_channels", 128)
        self.context_width = integer(config, "joint_attention_dim", 20480)
        self.time_width = integer(config, "timestep_channels", 256)
        self.axes = rope_axes({"axes_dims_rope": [head // 4] * 4, **config}, "axes_dims_rope", 4, head)
        self.theta = number(config, "rope_theta", 10000)
        self.flow_map = choice(config, "flow_map", False, True)
        self.unsampled = "the noise level that each step goes to (target_timestep)" if self.flow_map else ""
        hidden = round(width * number(config, "mlp_ratio", 3.0))
        early, single = (
            integer(config, key, usual, most=1024) for key, usual in (("num_layers", 5), ("num_single_layers", 28))
        )

        def blocks(stream: str, count: int) -> nn.ModuleList:
            return nn.ModuleList(Block(stream, self.heads, head, hidden) for _ in range(count))

        inputs = {"image": self.channels, "image_cond": self.reference_channels}
        self.emb_in = nn.ModuleDict({name: nn.Linear(count, width, bias=False) for name, count in inputs.items()})
        self.txt_in = nn.Linear(self.context_width, width, bias=False)
        self.time_in = kit.MLPEmbedder(self.time_width, width, EMBEDDER, bias=False)
        if self.flow_map:
            self.ref_time_in = kit.MLPEmbedder(self.time_width, width, EMBEDDER, bias=False)
        self.early_stream_modulations, self.single_stream_modulations = (
            nn.ModuleDict({mode: kit.Modulation(width, 3 * width, bias=False) for mode in _MODES}) for _ in range(2)
        )
        self.content_mode_blocks = nn.ModuleDict({mode: blocks(_MODES[mode], early) for mode in inputs})
        self.txt_mode_blocks = blocks("text", early)
        self.single_blocks = blocks("joint", single)
        self.final_layer = nn.ModuleDict({"image": kit.FinalLayer(width, self.out_channels, bias=False)})

    @classmethod
    def detect(cls, tensors: Mapping[str, TensorInfo]) -> dict[str, Any] | None:
        """See `DiT.detect`. A quarter of a head's channels turns with each axis."""
        if "early_stream_modulations.image.lin.weight" not in tensors:
            return None
        width, channels = shape_of(tensors, "emb_in.image.weight", 2)
        (head,) = shape_of(tensors, "single_blocks.0.norm.key_norm.scale", 1)
        return {
            "image_model": "flux3",
            "in_channels": channels,
            "cond_in_channels": shape_of(tensors, "emb_in.image_cond.weight", 2)[1],
            "num_layers": count_blocks(tensors, "txt_mode_blocks"),
            "num_single_layers": count_blocks(tensors, "single_blocks"),
            "attention_head_dim": head,
            "num_attention_heads": width // max(head, 1),
            "joint_attention_dim": shape_of(tensors, "txt_in.weight", 2)[1],
            "timestep_channels": shape_of(tensors, "time_in.in_layer.weight", 2)[1],
            "mlp_ratio": shape_of(tensors, "single_blocks.0.mlp_out.weight", 2)[1] / max(width, 1),
            "axes_dims_rope": [head // 4] * 4,
            "rope_theta": 10000,
            "flow_map": "ref_time_in.in_layer.weight" in tensors,
        }

    def arguments(self) -> dict[str, Spec]:
        """See `DiT.arguments`. ``target_timestep`` is the noise level that the step goes to, which flow maps need."""
        target = {"target_timestep": Argument(("B",), fp32=True)} if self.flow_map else {}
        return {
            "x": Argument(("B", self.channels, "H", "W")),
            "timestep": Argument(("B",), fp32=True),
            "context": Argument(("B", "L", self.context_width)),
            "ref_latents": Argument(("B", self.reference_channels, "h", "w"), required=False, many=True),
            **target,
        }

    def lengths(self, arguments: Mapping[str, Any]) -> tuple[int, ...]:
        """See `DiT.lengths`: text, references if there are any, image."""
        image, *references = (grid.length for grid in _grids(arguments))
        return arguments["context"].shape[1], *([sum(references)] if references else []), image

    def timestep(self, sigma: Tensor) -> Tensor:
        """See `DiT.timestep`."""
        return sigma

    def begin(self, f: ForwardPass, **arguments: Any) -> None:
        """See `DiT.begin`. Text and references have time 0."""
        x, context = arguments["x"], arguments["context"]
        f.grid, *grids = _grids(arguments)
        self._modulate(f, arguments, [mode for mode in _MODES if mode != "image_cond" or grids])

        def positions(grid: kit.Grid, plane: int) -> Tensor:
            # Cells are half a step apart.
            cells = functional.pad(grid.positions(device=x.device) / 2, (1, 0))
            return functional.pad(cells, (0, 1), value=plane)

        def rotation(places: Tensor) -> Any:
            return lambda shard: kit.rope(shard(places), self.axes, self.theta)

        words = functional.pad(torch.arange(context.shape[1], device=x.device)[:, None].float(), (3, 0))
        f.text = f.shard(context, self.txt_in, rotation(words))
        f.references = None
        if grids:
            latents = arguments["ref_latents"]
            patches = torch.cat([grid.patches(each) for grid, each in zip(grids, latents, strict=True)], dim=1)
            places = torch.cat([positions(grid, -1 - at) for at, grid in enumerate(grids)])
            f.references = f.shard(patches, self.emb_in["image_cond"], rotation(places))
        f.image = f.shard(f.grid.patches(x), self.emb_in["image"], rotation(positions(f.grid, 0)))

    def _modulate(self, f: ForwardPass, arguments: Mapping[str, Any], modes: Sequence[str]) -> None:
        """Compute the modulations of these modes' streams, the image's among them, and of the joint one."""
        now = arguments["timestep"]
        early, single, last = self.early_stream_modulations, self.single_stream_modulations, self.final_layer["image"]
        vectors = self._embed(self.time_in, torch.stack((now, torch.zeros_like(now))))
        if self.flow_map:
            vectors = vectors + self._embed(self.ref_time_in, arguments["target_timestep"])
        moving, still = functional.silu(vectors).to(arguments["x"].dtype)
        f.modulate([early["image"].linear, single["image"].linear, last.adaLN_modulation.linear], moving)
        f.modulate([each[mode].linear for each in (early, single) for mode in modes if mode != "image"], still)
        f.modulations = {_MODES[mode]: f.modulation(early[mode].linear, 3) for mode in modes}
        rows = zip(*(f.modulation(single[mode].linear, 3) for mode in modes), strict=True)
        f.modulations["joint"] = tuple(torch.cat(each, dim=1) for each in rows)

    def _embed(self, embedder: Any, times: Tensor) -> Tensor:
        """Times [...] in fp32 [..., W], by layers without biases: what is rounded here moves all tokens alike."""
        first, second = (getattr(embedder, name) for name in EMBEDDER)
        hidden = linear_fp32(first, kit.sinusoid(1000 * times, self.time_width))
        return linear_fp32(second, functional.silu(hidden))

    @property
    def trunk(self) -> Sequence[Any]:
        """See `DiT.trunk`. The image's own blocks come first: what the first one adds is what the step cache sees."""
        modes = self.content_mode_blocks
        return [*modes["image"], *self.txt_mode_blocks, *modes["image_cond"], _join, *self.single_blocks]

    def end(self, f: ForwardPass) -> Tensor:
        """See `DiT.end`."""
        latent: Tensor = f.grid.latent(self.final_layer["image"](f))
        return latent


def _join(f: ForwardPass) -> None:
    """Text, references and image become ``f.joint``, each with a row of its modulations: the image's is the first."""
    streams, rows = [f.text, f.image], [1, 0]
    if f.references is not None:
        streams, rows = [f.text, f.references, f.image], [1, 2, 0]
    f.joint = f.join(*streams)
    device = f.joint.tokens.device
    segments = [torch.full((each.size,), row, device=device) for each, row in zip(streams, rows, strict=True)]
    f.joint.segments = torch.cat(segments)


def _grids(arguments: Mapping[str, Any]) -> list[kit.Grid]:
    """Of the image, then of each reference."""
    references = arguments.get("ref_latents") or ()
    return [kit.Grid(arguments["x"], 1), *(kit.Grid(each, 1, "ref_latents") for each in references)]

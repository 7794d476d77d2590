"""Flux.1 (Black Forest Labs): dev, schnell, Kontext, and those that take more channels (Fill, Canny, Depth).

LongCat-Image (Meituan, 2025) is this network without a pooled text, with text and image on one diagonal of positions.
Parameters are named as in the authors' files (black-forest-labs/flux, Apache-2.0).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from tacod.checkpoint import TensorInfo
from tacod.rank.families import kit
from tacod.rank.families.base import DiT, LatentFormat
from tacod.rank.families.config import (
    choice,
    count_blocks,
    fixed,
    integer,
    number,
    rope_axes,
    shape_of,
    width_of_heads,
)
from tacod.rank.families.inputs import Argument, Number, Numbers, Residuals, Spec, Unread
from tacod.rank.families.names import Names
from tacod.rank.families.noise import Flow
from tacod.rank.families.stream import ForwardPass
from tacod_client.errors import ArgumentError

__all__ = ["EMBEDDER", "Flux"]

_METHODS_OF_OTHERS = {"index_timestep_zero": "offset"}
"""Methods of other models that ComfyUI's menu offers, and what Flux.1 did with them up to 0.16; later it fails."""
EMBEDDER = "in_layer", "out_layer"
"""The layers of `kit.MLPEmbedder` in these files."""
_LONGCAT_AXES, _LONGCAT_CONTEXT = [1, 2], 3584
"""The axes along which LongCat-Image's text advances, and its text's width, by which its files are told."""

_NAMES = """
    x_embedder                                                       img_in
    context_embedder                                                 txt_in
    time_text_embed.{timestep,text,guidance}_embedder.linear_{1,2}   {time,vector,guidance}_in.{in,out}_layer
    norm_out.linear                                                  final_layer.adaLN_modulation.1~
    proj_out                                                         final_layer.linear
    transformer_blocks.*.{norm1,norm1_context}.linear                double_blocks.*.{img,txt}_mod.lin
    transformer_blocks.*.attn.to_{q,k,v}                             double_blocks.*.img_attn.qkv[0,1,2]
    transformer_blocks.*.attn.add_{q,k,v}_proj                       double_blocks.*.txt_attn.qkv[0,1,2]
    transformer_blocks.*.attn.norm_{q,k}.weight         double_blocks.*.img_attn.norm.{query,key}_norm.scale
    transformer_blocks.*.attn.norm_added_{q,k}.weight   double_blocks.*.txt_attn.norm.{query,key}_norm.scale
    transformer_blocks.*.attn.{to_out.0,to_add_out}                  double_blocks.*.{img,txt}_attn.proj
    transformer_blocks.*.{ff,ff_context}.net.{0.proj,2}              double_blocks.*.{img,txt}_mlp.{0,2}
    single_transformer_blocks.*.norm.linear                          single_blocks.*.modulation.lin
    single_transformer_blocks.*.attn.to_{q,k,v}                      single_blocks.*.linear1[0,1,2]
    single_transformer_blocks.*.proj_mlp                             single_blocks.*.linear1[3:]
    single_transformer_blocks.*.attn.norm_{q,k}.weight               single_blocks.*.norm.{query,key}_norm.scale
    single_transformer_blocks.*.proj_out                             single_blocks.*.linear2
"""
"""diffusers' names; see `tacod.rank.families.names`."""


class Flux(DiT):
    """Flux.1 dev, schnell and Kontext; LongCat-Image, whose ``txt_ids_dims`` are the axes along which text advances.

    ``config`` is ComfyUI's ``unet_config``. Raises `ModelUnsupported`, naming the key, for a configuration that can't
    be.
    """

    family: ClassVar[str] = "flux"
    title = "Flux.1"
    models: ClassVar[tuple[str, ...]] = ("dev", "schnell", "Kontext", "Fill", "Canny", "Depth", "LongCat-Image")
    lora_marks = r"(double|single)_blocks[._]|single_transformer_blocks[._]"
    tiny: ClassVar[Mapping[str, Any]] = {
        "image_model": "flux",
        "in_channels": 4,
        "out_channels": 4,
        "vec_in_dim": 8,
        "context_in_dim": 8,
        "hidden_size": 48,
        "num_heads": 3,
        "depth": 2,
        "depth_single_blocks": 1,
        "axes_dim": [4, 6, 6],
        "guidance_embed": True,
    }
    clamps = True
    usual_optional: ClassVar[tuple[str, ...]] = ("y", "guidance")
    usual_values: ClassVar[Mapping[str, float]] = {"guidance": 3.5}
    diffusers: ClassVar[Mapping[str, Any]] = {
        "FluxTransformer2DModel": lambda c: {
            "depth": c.whole("num_layers", 19),
            "depth_single_blocks": c.whole("num_single_layers", 38),
            "axes_dim": c.items("axes_dims_rope", (16, 56, 56)),
            "patch_size": 2 * c.only("patch_size", 1),
            "guidance_embed": c.get("guidance_embeds", False),
        }
    }
    usual: ClassVar[Mapping[str, int]] = {"B": 1, "H": 128, "W": 128, "L": 256}
    image_models: ClassVar[tuple[str, ...]] = ("flux",)
    process = Flow()
    latent_format = LatentFormat(0.3611, 0.1159)
    diffusers_optional = frozenset(f"time_text_embed.guidance_embedder.linear_{n}" for n in (1, 2))
    # ComfyUI's, from 0.14 on, and so in what its nodes save or send.
    spellings: ClassVar[Mapping[str, str]] = {
        f".{part}_norm.weight": f".{part}_norm.scale" for part in ("query", "key")
    }
    names = Names(_NAMES)
    # Chroma and FLUX.2 have these too: ComfyUI takes each other's spellings.
    lora_names = Names(f"""
        {_NAMES}
        transformer_blocks.*.{{ff,ff_context}}.linear_{{in,out}}  double_blocks.*.{{img,txt}}_mlp.{{0,2}}
        single_transformer_blocks.*.attn.to_{{qkv_mlp_proj,out}}  single_blocks.*.linear{{1,2}}
    """)

    pooled_width: int | None
    epsilon: float
    """Epsilon of the norms of queries and keys: the authors', which ComfyUI had up to 0.13 (docs/comfyui.md)."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.epsilon = 1e-6
        fixed(config, global_modulation=False, mlp_silu_act=False, yak_mlp=False, txt_norm=False)
        fixed(config, ops_bias=True)
        self.width, self.heads = width, heads = width_of_heads(config, "hidden_size", "num_heads")
        self.patch = integer(config, "patch_size", 2)
        self.channels, self.out_channels = integer(config, "in_channels"), integer(config, "out_channels", 16)
        self.context_width = integer(config, "context_in_dim")
        self.text_axes: list[int] = choice(config, "txt_ids_dims", [], _LONGCAT_AXES)
        if self.text_axes:
            fixed(config, vec_in_dim=None)
        self.pooled_width = None if self.text_axes else integer(config, "vec_in_dim")
        self.axes = rope_axes(config, "axes_dim", 3, width // heads)
        self.theta = number(config, "theta", 10000)
        self.guided: bool = choice(config, "guidance_embed", False, True)
        self.reference_method: str = choice(config, "default_ref_method", *kit.REFERENCE_METHODS)
        self.reference_index = number(config, "ref_index_scale", 1.0)
        bias: bool = choice(config, "qkv_bias", True, False)
        hidden = int(width * number(config, "mlp_ratio", 4.0))
        double, single = integer(config, "depth", most=1024), integer(config, "depth_single_blocks", least=0, most=1024)

        self.img_in = nn.Linear(self.channels * self.patch**2, width)
        self.txt_in = nn.Linear(self.context_width, width)
        self.time_in = kit.MLPEmbedder(256, width, EMBEDDER)
        if self.pooled_width is not None:
            self.vector_in = kit.MLPEmbedder(self.pooled_width, width, EMBEDDER)
        if self.guided:
            self.guidance_in = kit.MLPEmbedder(256, width, EMBEDDER)
        self.double_blocks = nn.ModuleList(kit.DoubleBlock(width, heads, hidden, bias) for _ in range(double))
        self.single_blocks = nn.ModuleList(kit.SingleBlock(width, heads, hidden) for _ in range(single))
        self.final_layer = kit.FinalLayer(width, self.out_channels * self.patch**2)

    @classmethod
    def detect(cls, tensors: Mapping[str, TensorInfo]) -> dict[str, Any] | None:
        """See `DiT.detect`."""
        key_norm = "double_blocks.0.img_attn.norm.key_norm.scale"
        marks = key_norm, "img_in.weight", "double_blocks.0.img_mod.lin.weight"
        others = "double_stream_modulation_img.", "distilled_guidance_layer.", "txt_norm."
        if any(mark not in tensors for mark in marks) or any(key.startswith(others) for key in tensors):
            return None
        width, inputs = shape_of(tensors, "img_in.weight", 2)
        outputs, _ = shape_of(tensors, "final_layer.linear.weight", 2)
        (head_width,) = shape_of(tensors, key_norm, 1)
        _, context_width = shape_of(tensors, "txt_in.weight", 2)
        pooled = any(key.startswith("vector_in.") for key in tensors)
        patch = 2
        return {
            "image_model": "flux",
            "in_channels": inputs // patch**2,
            "out_channels": outputs // patch**2,
            "vec_in_dim": shape_of(tensors, "vector_in.in_layer.weight", 2)[1] if pooled else None,
            "context_in_dim": context_width,
            "hidden_size": width,
            "mlp_ratio": 4.0,
            "num_heads": width // max(head_width, 1),
            "depth": count_blocks(tensors, "double_blocks"),
            "depth_single_blocks": count_blocks(tensors, "single_blocks"),
            "axes_dim": [16, 56, 56],
            "theta": 10000,
            "patch_size": patch,
            "qkv_bias": "double_blocks.0.img_attn.qkv.bias" in tensors,
            "guidance_embed": "guidance_in.in_layer.weight" in tensors,
            "txt_ids_dims": [] if pooled or context_width != _LONGCAT_CONTEXT else _LONGCAT_AXES,
        }

    def arguments(self) -> dict[str, Spec]:
        """See `DiT.arguments`.

        ``guidance`` is not used by models that are not distilled for it; those that are do without it too, as ComfyUI
        has it. ``attention_mask`` is added to the scores over text and image. ``rope_options`` stretch and shift the
        positions of the image and its references, or of the image alone (``rope_options_for="image"``); those of
        LongCat-Image lie behind its text, as ComfyUI has it, if they don't say otherwise. ``qk_norm_eps`` is added to
        the mean square in the norms of queries and keys, by default `epsilon`.
        """
        blocks = {"input": len(self.double_blocks), "output": len(self.single_blocks), "middle": 0}
        return {
            "x": Argument(("B", self.channels, "H", "W")),
            "timestep": Argument(("B",), fp32=True),
            "context": Argument(("B", "L", self.context_width)),
            "y": Unread() if self.pooled_width is None else Argument(("B", self.pooled_width), required=False),
            "guidance": Argument(("B",), required=False, fp32=True),
            "ref_latents": Argument(("B", self.channels, "h", "w"), required=False, many=True),
            "ref_latents_method": Argument(
                None, required=False, choices=kit.REFERENCE_METHODS, also=_METHODS_OF_OTHERS
            ),
            "attention_mask": Argument(("B", "S", "S"), required=False, mask=True, shared=True),
            "rope_options": Numbers(kit.ROPE_OPTIONS),
            "rope_options_for": Argument(None, required=False, choices=("all", "image")),
            "qk_norm_eps": Number(0.0, 0.01),
            "control": Residuals(self.width, blocks),
        }

    def lengths(self, arguments: Mapping[str, Any]) -> tuple[int, int]:
        """Tokens of the text, and of the image with its references. Raises `ArgumentError` for a mask of others."""
        text, image = arguments["context"].shape[1], sum(grid.length for grid in self.grids(arguments))
        mask = arguments.get("attention_mask")
        if mask is not None and mask.shape[1] != text + image:
            raise ArgumentError(
                f"attention_mask: its shape is {list(mask.shape)}, but text and image have {text + image} tokens",
                argument="attention_mask",
            )
        return text, image

    def timestep(self, sigma: Tensor) -> Tensor:
        """See `DiT.timestep`."""
        return sigma

    def begin(self, f: ForwardPass, **arguments: Any) -> None:
        """See `DiT.begin`."""
        x, y = arguments["x"], arguments.get("y")
        c = self.embed_times(arguments["timestep"], arguments)
        if self.pooled_width is not None:
            c = c + self.vector_in(x.new_zeros(len(x), self.pooled_width) if y is None else y)
        f.modulate(self.modulating, functional.silu(c))
        self.begin_streams(f, arguments, arguments.get("ref_latents_method") or self.reference_method)

    def embed_times(self, timestep: Tensor, arguments: Mapping[str, Any]) -> Tensor:
        """The conditioning of ``timestep`` [B] and of guidance: [B, width]."""
        dtype, guidance = arguments["x"].dtype, arguments.get("guidance")
        c: Tensor = self.time_in.numbers(1000 * timestep.float(), dtype)
        if self.guided and guidance is not None:
            c = c + self.guidance_in.numbers(1000 * guidance.float(), dtype)
        return c

    def embed_patches(self, patches: Tensor) -> Tensor:
        """Tokens of some patches of the image, [B, S, C * patch] to [B, S, width]."""
        tokens: Tensor = self.img_in(patches)
        return tokens

    def begin_streams(
        self, f: ForwardPass, arguments: Mapping[str, Any], method: str, segments: Tensor | None = None
    ) -> None:
        """Make the streams of text and image, with references placed by ``method``, and the attention's mask.

        ``segments`` are the image's.
        """
        x, context, mask = arguments["x"], arguments["context"], arguments.get("attention_mask")
        f.epsilon = arguments.get("qk_norm_eps", self.epsilon)
        f.mask = None if mask is None else f.sequence.in_order_of_ranks(mask, self.lengths(arguments))
        grids = self.grids(arguments)
        f.grid = grids[0]
        images = (x, *(arguments.get("ref_latents") or ()))
        patches = torch.cat([grid.patches(image) for grid, image in zip(grids, images, strict=True)], dim=1)
        text = kit.line(context.shape[1], 0, 1, x.device)
        behind = {"shift_t": 1.0, "shift_y": len(text), "shift_x": len(text)}
        options = (behind if self.text_axes == _LONGCAT_AXES else {}) | (arguments.get("rope_options") or {})
        stretched = 1 if arguments.get("rope_options_for") == "image" else len(grids)
        each = [options] * stretched + [{}] * (len(grids) - stretched)
        places = kit.image_positions(grids, method, self.reference_index, each, x.device)
        places = functional.pad(places, (0, len(self.axes) - places.shape[1]))
        f.image = f.shard(patches, self.embed_patches, self._rotation(places), segments)
        places = places.new_zeros(len(text), len(self.axes))
        for axis in self.text_axes:
            places[:, axis] = text
        f.text = f.shard(context, self.txt_in, self._rotation(places))

    @property
    def trunk(self) -> list[Any]:
        """See `DiT.trunk`."""
        return [*self.double_blocks, kit.join_streams, *self.single_blocks]

    @property
    def residual_blocks(self) -> Mapping[str, Any]:
        """See `DiT.residual_blocks`."""
        return {"input": self.double_blocks, "output": self.single_blocks}

    def end(self, f: ForwardPass) -> Tensor:
        """See `DiT.end`."""
        latent: Tensor = f.grid.latent(self.final_layer(f))
        return latent

    def grids(self, arguments: Mapping[str, Any]) -> list[kit.Grid]:
        """The grids of the image and of each reference."""
        images = [("x", arguments["x"]), *(("ref_latents", each) for each in arguments.get("ref_latents") or ())]
        return [kit.Grid(image, self.patch, name) for name, image in images]

    def _rotation(self, positions: Tensor) -> Any:
        return lambda shard: kit.rope(shard(positions), self.axes, self.theta)

"""Qwen-Image (Wu et al., 2025, arXiv:2508.02324): text to image, Edit with reference images, and Layered.

Parameters are named as in the authors' files, which are diffusers' (Apache-2.0).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from tacod.checkpoint import TensorInfo
from tacod.rank.families import kit
from tacod.rank.families.base import DiT, Output
from tacod.rank.families.config import choice, count_blocks, fixed, integer, rope_axes, shape_of
from tacod.rank.families.inputs import Argument, Inputs, Residuals, Spec, Unread
from tacod.rank.families.kit.attention import find, register
from tacod.rank.families.latents import WAN21
from tacod.rank.families.names import Names
from tacod.rank.families.noise import Flow
from tacod.rank.families.stream import ForwardPass
from tacod.rank.ops.qkv import QKV, QKNorm, Rotation
from tacod_client.errors import ModelUnsupported

__all__ = ["QwenImage"]

_PATCH = 2
_THETA = 10000.0
_AT_TIME_ZERO = "index_timestep_zero"
_METHODS = ("index", _AT_TIME_ZERO, "negative_index", "offset")
"""Where references lie: on planes 1, 2, …, the same with the modulation of time 0 (Edit-2511), on planes -1, -2, …
(Layered), or beside each other on plane 1."""
_MARK_2511 = "__index_timestep_zero__"
"""An empty tensor that marks ComfyUI's files of Edit-2511."""
_LAYER = "time_text_embed.addition_t_embedding.weight"


class Attention(kit.SelfAttention):
    """The image's layers, with the text's layers in the same module."""

    def __init__(self, width: int, heads: int) -> None:
        norms = "norm_q.weight", "norm_k.weight"
        super().__init__(width, heads, layers=("to_q", "to_k", "to_v"), out="to_out.0", norm="head", norms=norms)
        for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"):
            register(self, name, nn.Linear(width, width))
        for name in ("norm_added_q.weight", "norm_added_k.weight"):
            register(self, name, nn.Parameter(torch.ones(self.head_width)))

    def of_text(self, x: Tensor, rotation: Rotation | None) -> QKV:
        """Queries, keys and values of the text ``x`` [B, L, W]."""
        q, k, v = (find(self, f"add_{part}_proj")(x) for part in "qkv")
        norm = QKNorm(find(self, "norm_added_q.weight"), find(self, "norm_added_k.weight"))
        return QKV((q, k, v), self.heads, norm, rotation)


class Block(nn.Module):
    """Text and image, each with its own weights, in one attention.

    After the attention of the ``last`` block nothing reads the text, so the layers behind it are not computed.
    """

    def __init__(self, width: int, heads: int, last: bool) -> None:
        super().__init__()
        self.img_mod, self.txt_mod = kit.AdaLN(width, 6 * width), kit.AdaLN(width, 6 * width)
        self.attn = Attention(width, heads)
        self.img_mlp, self.txt_mlp = (kit.MLP(width, 4 * width, ("net.0.proj", "net.2")) for _ in range(2))
        self.last = last
        if last:
            for unread in (self.txt_mlp, find(self.attn, "to_add_out")):
                unread.requires_grad_(False)

    def forward(self, f: ForwardPass) -> None:
        """Text and image one block further; the last block leaves the text as it is."""
        text, image = f.modulation(self.txt_mod.linear, 6), f.modulation(self.img_mod.linear, 6)
        to_text, to_image = f.attend(
            (f.text, lambda: self.attn.of_text(f.text.normed(*text[:2]), f.text.rotation)),
            (f.image, lambda: self.attn(f.image.normed(*image[:2]), f.image.rotation)),
            mask=f.mask,
        ).wait()
        kit.after_attention(f.image, image, self.attn.project(to_image), self.img_mlp)
        if not self.last:
            kit.after_attention(f.text, text, find(self.attn, "to_add_out")(to_text), self.txt_mlp, later=True)


class QwenImage(DiT):
    """Qwen-Image, Edit, Edit-2511 and Layered.

    ``config`` is ComfyUI's ``unet_config``. Raises `ModelUnsupported`, naming the key, for a configuration that can't
    be.
    """

    family: ClassVar[str] = "qwen_image"
    title = "Qwen-Image"
    models = ("Qwen-Image", "Edit", "Edit-2509", "Edit-2511", "Layered")
    lora_marks = r"transformer_blocks[._]\d+[._](img|txt)_m(lp|od)"
    image_models: ClassVar[tuple[str, ...]] = ("qwen_image",)
    tiny: ClassVar[Mapping[str, Any]] = {
        "image_model": "qwen_image",
        "in_channels": 16,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 3,
        "joint_attention_dim": 8,
        "axes_dims_rope": [4, 6, 6],
        "default_ref_method": "negative_index",
        "use_additional_t_cond": True,
    }
    diffusers: ClassVar[Mapping[str, Any]] = {
        "QwenImageTransformer2DModel": lambda c: {
            "num_layers": c.whole("num_layers", 60),
            "axes_dims_rope": c.items("axes_dims_rope", (16, 56, 56)),
            "patch_size": c.only("patch_size", _PATCH),
            "default_ref_method": _usual_method(c.flag("use_layer3d_rope", False), c.flag("zero_cond_t", False)),
        }
    }
    diffusers_optional = frozenset({_LAYER.removesuffix(".weight")})
    usual: ClassVar[Mapping[str, int]] = {"B": 1, "T": 1, "H": 128, "W": 128, "L": 128}
    process = Flow()
    latent_format = WAN21
    names = Names("""
        {img_in,txt_in,txt_norm,norm_out.linear,proj_out}
        time_text_embed.{timestep_embedder.linear_1,timestep_embedder.linear_2,addition_t_embedding}
        transformer_blocks.*.{img,txt}_mod.1
        transformer_blocks.*.{img,txt}_mlp.net.{0.proj,2}
        transformer_blocks.*.attn.to_{q,k,v,out.0,add_out}
        transformer_blocks.*.attn.add_{q,k,v}_proj
        transformer_blocks.*.attn.{norm,norm_added}_{q,k}
    """)

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        fixed(config, patch_size=_PATCH, final_layer=True)
        self.heads, head_width = integer(config, "num_attention_heads"), integer(config, "attention_head_dim")
        self.width = width = self.heads * head_width
        self.axes = rope_axes(config, "axes_dims_rope", 3, head_width)
        inputs = integer(config, "in_channels")
        if inputs % _PATCH**2:
            raise ModelUnsupported(f"config key 'in_channels' is {inputs}; expected a multiple of {_PATCH**2}")
        self.channels = inputs // _PATCH**2
        self.out_channels: int = choice(config, "out_channels", self.channels)
        self.context_width = integer(config, "joint_attention_dim")
        self.reference_method: str = choice(config, "default_ref_method", *_METHODS)
        self.layered: bool = choice(config, "use_additional_t_cond", False, True)
        layers = integer(config, "num_layers", most=1024)

        names = "timestep_embedder.linear_1", "timestep_embedder.linear_2"
        self.time_text_embed = kit.MLPEmbedder(256, width, names)
        if self.layered:
            register(self, _LAYER, kit.drawn(2, width))
        self.txt_norm = nn.RMSNorm(self.context_width, eps=1e-6)
        self.img_in, self.txt_in = nn.Linear(inputs, width), nn.Linear(self.context_width, width)
        self.transformer_blocks = nn.ModuleList(Block(width, self.heads, i == layers - 1) for i in range(layers))
        self.norm_out = kit.Modulation(width, 2 * width, "linear")
        self.proj_out = nn.Linear(width, _PATCH**2 * self.out_channels)
        if self.reference_method == _AT_TIME_ZERO:
            self.register_buffer(_MARK_2511, torch.empty(0))

    @classmethod
    def detect(cls, tensors: Mapping[str, TensorInfo]) -> dict[str, Any] | None:
        """See `DiT.detect`. A ControlNet's blocks are the same, but it has blocks of its own beside them."""
        block = "transformer_blocks.0"
        marks = f"{block}.attn.norm_added_q.weight", f"{block}.img_mlp.net.0.proj.weight", "txt_norm.weight"
        if any(mark not in tensors for mark in marks) or "controlnet_blocks.0.weight" in tensors:
            return None
        width, inputs = shape_of(tensors, "img_in.weight", 2)
        outputs, _ = shape_of(tensors, "proj_out.weight", 2)
        (context_width,) = shape_of(tensors, "txt_norm.weight", 1)
        if (context_width, outputs) == (2560, 128):
            # Mage-Flow, another model of the same blocks.
            return None
        (head_width,) = shape_of(tensors, f"{block}.attn.norm_q.weight", 1)
        layered = _LAYER in tensors
        return {
            "image_model": "qwen_image",
            "in_channels": inputs,
            "out_channels": outputs // _PATCH**2,
            "patch_size": _PATCH,
            "num_layers": count_blocks(tensors, "transformer_blocks"),
            "attention_head_dim": head_width,
            "num_attention_heads": width // max(head_width, 1),
            "joint_attention_dim": context_width,
            "axes_dims_rope": [16, 56, 56],
            "default_ref_method": _usual_method(layered, _MARK_2511 in tensors),
            "use_additional_t_cond": layered,
        }

    def arguments(self) -> dict[str, Spec]:
        """See `DiT.arguments`.

        ``x`` has one frame for each image or layer. ``attention_mask`` says which tokens of the text count.
        ``additional_t_cond`` is a row of Layered's table for each image; 0 by default.
        """
        layer = Argument(("B",), required=False, shared=True, rows=2) if self.layered else Unread()
        return {
            "x": Argument(("B", self.channels, "T", "H", "W")),
            "timestep": Argument(("B",), fp32=True),
            "context": Argument(("B", "L", self.context_width)),
            "attention_mask": Argument(("B", "L"), required=False, keys=True, shared=True),
            "ref_latents": Argument(("B", self.channels, "t", "h", "w"), required=False, many=True),
            "ref_latents_method": Argument(None, required=False, choices=_METHODS, also={"uxo": "offset"}),
            "additional_t_cond": layer,
            "control": Residuals(self.width, {"input": len(self.transformer_blocks), "output": 0, "middle": 0}),
        }

    def prepare(self, inputs: Inputs) -> Inputs:
        """Drop the end of the text that no image attends to; a token's position is its place in the text."""
        return kit.drop_hidden(inputs, "attention_mask", "context", only_last=True)

    def lengths(self, arguments: Mapping[str, Any]) -> tuple[int, int]:
        """Tokens of the text, and of the image with its references."""
        return arguments["context"].shape[1], sum(grid.length for grid in self._grids(arguments))

    def timestep(self, sigma: Tensor) -> Tensor:
        """See `DiT.timestep`."""
        return sigma

    def begin(self, f: ForwardPass, **arguments: Any) -> None:
        """See `DiT.begin`."""
        x, context, mask = arguments["x"], arguments["context"], arguments.get("attention_mask")
        grids = self._grids(arguments)
        f.grid = grids[0]
        method = arguments.get("ref_latents_method") or self.reference_method
        now = self._conditioning(arguments["timestep"], arguments)
        segments = None
        if method == _AT_TIME_ZERO and len(grids) > 1:
            # Row 0 is the image's, row 1 the references'.
            both = torch.stack((now, self._conditioning(0 * arguments["timestep"], arguments)), dim=1)
            of_text = [block.txt_mod.linear for block in self.trunk]
            f.modulate(of_text, now)
            f.modulate([layer for layer in self.modulating if layer not in of_text], both)
            segments = (torch.arange(sum(grid.length for grid in grids), device=x.device) >= f.grid.length).long()
        else:
            f.modulate(self.modulating, now)

        latents = [x, *(arguments.get("ref_latents") or ())]
        patches = torch.cat([grid.patches(each) for grid, each in zip(grids, latents, strict=True)], dim=1)
        places = _positions(grids, method, x.device)
        f.image = f.shard(patches, self.img_in, lambda shard: kit.rope(shard(places), self.axes, _THETA), segments)
        # The text goes on along the diagonal from the image's corner.
        first = max(f.grid.counts[1:]) // 2
        line = torch.arange(first, first + context.shape[1], device=x.device)[:, None].expand(-1, 3)
        f.text = f.shard(
            context,
            lambda each: self.txt_in(self.txt_norm(each)),
            lambda shard: kit.rope(shard(line), self.axes, _THETA),
        )
        f.mask = None
        if mask is not None:
            lengths = self.lengths(arguments)
            whole = torch.cat((mask, mask.new_ones(len(mask), lengths[1])), dim=1)
            f.mask = f.sequence.in_order_of_ranks(whole, lengths)

    def _conditioning(self, t: Tensor, arguments: Mapping[str, Any]) -> Tensor:
        """The conditioning of the modulations at times ``t`` [B]: [B, W]."""
        embedded = self.time_text_embed.numbers(t, arguments["x"].dtype, scale=1000.0)
        if self.layered:
            row = arguments.get("additional_t_cond")
            embedded = embedded + find(self, _LAYER)[0 if row is None else row]
        return functional.silu(embedded)

    def _grids(self, arguments: Mapping[str, Any]) -> list[kit.Grid]:
        """Of the image, and of each reference."""
        images = [("x", arguments["x"]), *(("ref_latents", each) for each in arguments.get("ref_latents") or ())]
        return [kit.Grid(image, (1, _PATCH, _PATCH), name) for name, image in images]

    @property
    def trunk(self) -> Sequence[Any]:
        """See `DiT.trunk`."""
        return list(self.transformer_blocks)

    @property
    def residual_blocks(self) -> Mapping[str, Sequence[Any]]:
        """See `DiT.residual_blocks`."""
        return {"input": list(self.transformer_blocks)}

    def end(self, f: ForwardPass) -> Output:
        """See `DiT.end`."""
        scale, shift = f.modulation(self.norm_out.linear, 2)
        latent: Tensor = f.grid.latent(f.gather(f.image, self.proj_out(f.image.normed(shift, scale))))
        return latent


def _usual_method(layered: bool, at_time_zero: bool) -> str:
    """Where a model's references lie by default."""
    return "negative_index" if layered else _AT_TIME_ZERO if at_time_zero else "index"


def _positions(grids: Sequence[kit.Grid], method: str, device: torch.device) -> Tensor:
    """The (plane, row, column) of each patch of an image and of its references, [N, 3] in fp32.

    Each is centred on (0, 0). Where there are several frames each has a plane: 0, 1, ….
    """
    layout = "offset" if method == "offset" else "index"
    step = -1.0 if method == "negative_index" else 1.0
    origins = [(0.0, 0, 0), *kit.reference_origins(grids, layout, step)]
    positions = []
    for grid, (plane, top, left) in zip(grids, origins, strict=True):
        frames, rows, columns = grid.counts
        origin = plane if frames == 1 else 0.0, top - rows // 2, left - columns // 2
        positions.append(grid.positions(origin, device=device))
    return torch.cat(positions)

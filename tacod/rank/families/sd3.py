"""Stable Diffusion 3 and 3.5: the MMDiT of Esser et al., 2024 (arXiv:2403.03206), and its MMDiT-X with dual attention.

Parameters are named as in Stability's files (sd3-ref, MIT).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from tacod.checkpoint import TensorInfo
from tacod.rank.families import kit
from tacod.rank.families.base import DiT, LatentFormat
from tacod.rank.families.config import choice, count_blocks, fixed, integer, shape_of
from tacod.rank.families.inputs import Argument, Residuals, Spec
from tacod.rank.families.names import Names
from tacod.rank.families.noise import Flow
from tacod.rank.families.stream import ForwardPass
from tacod_client.errors import ArgumentError, ModelUnsupported

__all__ = ["SD3"]

_HEAD_WIDTH = 64
_NORMS = {None: None, "rms": "head", "ln": "layer"}


class Half(nn.Module):
    """What a joint block does to one stream, before and after the shared attention.

    ``last`` is the text stream of the last block, which only feeds the attention; ``dual`` is an image stream that
    also attends to itself alone.
    """

    def __init__(self, width: int, qk_norm: str | None, *, last: bool = False, dual: bool = False) -> None:
        super().__init__()

        def attention(out: str | None) -> kit.SelfAttention:
            names = "ln_q.weight", "ln_k.weight"
            return kit.SelfAttention(width, width // _HEAD_WIDTH, out=out, norm=_NORMS[qk_norm], norms=names)

        self.attn = attention(None if last else "proj")
        if dual:
            self.attn2 = attention("proj")
        if not last:
            self.mlp = kit.MLP(width, 4 * width, ("fc1", "fc2"))
        self.parts = 2 if last else 9 if dual else 6
        self.adaLN_modulation = kit.AdaLN(width, self.parts * width)


class JointBlock(nn.Module):
    """Text and image, each with its own weights, in one attention."""

    def __init__(self, width: int, qk_norm: str | None, *, last: bool, dual: bool) -> None:
        super().__init__()
        self.context_block = Half(width, qk_norm, last=last)
        self.x_block = Half(width, qk_norm, dual=dual)
        self.last, self.dual = last, dual

    def forward(self, f: ForwardPass) -> None:
        """Text and image one block further; the last block leaves the text as it is."""
        text, image = self.context_block, self.x_block
        text_mod, image_mod = (f.modulation(each.adaLN_modulation.linear, each.parts) for each in (text, image))
        attention = f.attend(
            (f.text, lambda: text.attn(f.text.normed(*text_mod[:2]))),
            (f.image, lambda: image.attn(f.image.normed(*image_mod[:2]))),
            overlap=self.dual,
        )
        if self.dual:
            own = f.attend((f.image, lambda: image.attn2(f.image.normed(*image_mod[6:8]))))
            attention.start()
            f.image.add(image_mod[8], image.attn2.project(*own.wait()))
        to_text, to_image = attention.wait()
        kit.after_attention(f.image, image_mod, image.attn.project(to_image), image.mlp)
        if not self.last:
            kit.after_attention(f.text, text_mod, text.attn.project(to_text), text.mlp, later=True)


class SD3(DiT):
    """Stable Diffusion 3 medium, 3.5 large and 3.5 medium.

    ``config`` is ComfyUI's ``unet_config``. The width is 64 times ``depth``, which is also the number of heads and of
    blocks. Raises `ModelUnsupported`, naming the key, for a configuration that can't be.
    """

    family: ClassVar[str] = "sd3"
    title = "SD3 and SD3.5"
    models = ("SD3 medium", "SD3.5 large", "SD3.5 medium")
    lora_marks = r"joint_blocks[._]"
    tiny: ClassVar[Mapping[str, Any]] = {
        "image_model": "sd3",
        "in_channels": 4,
        "patch_size": 2,
        "depth": 2,
        "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 8, "out_features": 128}},
        "adm_in_channels": 8,
        "pos_embed_max_size": 16,
        "qk_norm": "rms",
        "x_block_self_attn_layers": [0],
    }
    diffusers: ClassVar[Mapping[str, Any]] = {
        "SD3Transformer2DModel": lambda c: {
            "depth": c.only("attention_head_dim", _HEAD_WIDTH) and c.whole("num_layers", 18),
            "x_block_self_attn_layers": c.items("dual_attention_layers", ()),
        }
    }
    usual: ClassVar[Mapping[str, int]] = {"B": 2, "H": 128, "W": 128, "L": 154}
    image_models: ClassVar[tuple[str, ...]] = ("sd3",)
    process = Flow()
    latent_format = LatentFormat(1.5305, 0.0609)
    names = Names("""
        context_embedder                                            context_embedder
        pos_embed.pos_embed                                         pos_embed
        pos_embed.proj                                              x_embedder.proj
        proj_out                                                    final_layer.linear
        norm_out.linear                                             final_layer.adaLN_modulation.1~
        time_text_embed.{timestep,text}_embedder.linear_{1,2}       {t,y}_embedder.mlp.{0,2}
        transformer_blocks.*.norm1.linear                           joint_blocks.*.x_block.adaLN_modulation.1
        transformer_blocks.*.norm1_context.linear                   joint_blocks.*.context_block.adaLN_modulation.1~
        transformer_blocks.*.{ff,ff_context}.net.{0.proj,2}         joint_blocks.*.{x,context}_block.mlp.{fc1,fc2}
        transformer_blocks.*.attn.{to_out.0,to_add_out}             joint_blocks.*.{x,context}_block.attn.proj
        transformer_blocks.*.attn.to_{q,k,v}                        joint_blocks.*.x_block.attn.qkv[0,1,2]
        transformer_blocks.*.attn.add_{q,k,v}_proj                  joint_blocks.*.context_block.attn.qkv[0,1,2]
        transformer_blocks.*.attn.{norm,norm_added}_{q,k}           joint_blocks.*.{x,context}_block.attn.ln_{q,k}
        transformer_blocks.*.attn2.to_{q,k,v}                       joint_blocks.*.x_block.attn2.qkv[0,1,2]
        transformer_blocks.*.attn2.norm_{q,k}                       joint_blocks.*.x_block.attn2.ln_{q,k}
        transformer_blocks.*.attn2.to_out.0                         joint_blocks.*.x_block.attn2.proj
    """)

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        _check_config(config)
        self.heads = integer(config, "depth", most=1024)
        self.width = width = _HEAD_WIDTH * self.heads
        self.patch = integer(config, "patch_size", 2)
        self.channels = integer(config, "in_channels")
        self.out_channels = integer(config, "out_channels", self.channels)
        self.pooled_width = integer(config, "adm_in_channels")
        self.context_width = _context_width(config, width)
        self.grid_size = integer(config, "pos_embed_max_size")
        qk_norm = choice(config, "qk_norm", None, "rms", "ln")
        dual = _dual_layers(config, self.heads)

        self.x_embedder = kit.PatchEmbed(self.channels, (self.patch, self.patch), width)
        self.t_embedder = kit.MLPEmbedder(256, width)
        self.y_embedder = kit.MLPEmbedder(self.pooled_width, width)
        self.context_embedder = nn.Linear(self.context_width, width)
        self.pos_embed = nn.Parameter(_positions(self.grid_size, width), requires_grad=False)
        self.joint_blocks = nn.ModuleList(
            JointBlock(width, qk_norm, last=i == self.heads - 1, dual=i in dual) for i in range(self.heads)
        )
        self.final_layer = kit.FinalLayer(width, self.patch**2 * self.out_channels)

    @classmethod
    def detect(cls, tensors: Mapping[str, TensorInfo]) -> dict[str, Any] | None:
        """See `DiT.detect`."""
        first = "joint_blocks.0.context_block.attn"
        if f"{first}.qkv.weight" not in tensors:
            return None
        width, channels, patch, _ = shape_of(tensors, "x_embedder.proj.weight", 4)
        outputs, _ = shape_of(tensors, "final_layer.linear.weight", 2)
        _, context_width = shape_of(tensors, "context_embedder.weight", 2)
        _, positions, _ = shape_of(tensors, "pos_embed", 3)
        normed = f"{first}.ln_q.weight" in tensors
        dual = "joint_blocks.{}.x_block.attn2.qkv.weight"
        return {
            "image_model": "sd3",
            "in_channels": channels,
            "patch_size": patch,
            "out_channels": outputs // max(patch**2, 1),
            "depth": width // _HEAD_WIDTH,
            "input_size": None,
            "adm_in_channels": shape_of(tensors, "y_embedder.mlp.0.weight", 2)[1],
            "context_size": context_width,
            "context_embedder_config": {
                "target": "torch.nn.Linear",
                "params": {"in_features": context_width, "out_features": width},
            },
            "num_patches": positions,
            "pos_embed_max_size": math.isqrt(positions),
            "pos_embed_scaling_factor": None,
            "context_processor_layers": count_blocks(tensors, "context_processor.layers") or None,
            "qk_norm": ("ln" if f"{first}.ln_q.bias" in tensors else "rms") if normed else None,
            "x_block_self_attn_layers": [
                i for i in range(count_blocks(tensors, "joint_blocks")) if dual.format(i) in tensors
            ],
        }

    def arguments(self) -> dict[str, Spec]:
        """See `DiT.arguments`."""
        return {
            "x": Argument(("B", self.channels, "H", "W")),
            "timestep": Argument(("B",), fp32=True),
            "context": Argument(("B", "L", self.context_width)),
            "y": Argument(("B", self.pooled_width)),
            "control": Residuals(self.width, {"input": 0, "output": self.heads, "middle": 0}, whole=True),
        }

    def lengths(self, arguments: Mapping[str, Any]) -> tuple[int, int]:
        """Tokens of the text and of the image. Raises `ArgumentError` for one larger than the position table."""
        grid = kit.Grid(arguments["x"], self.patch)
        if max(grid.counts) > self.grid_size:
            most = self.grid_size * self.patch
            raise ArgumentError(f"x: this model takes latents of at most {most} by {most}", argument="x")
        return arguments["context"].shape[1], grid.length

    def timestep(self, sigma: Tensor) -> Tensor:
        """See `DiT.timestep`."""
        return sigma * 1000

    def begin(self, f: ForwardPass, **arguments: Any) -> None:
        """See `DiT.begin`. Raises `ArgumentError` if ``x`` is larger than the model's position table."""
        self.lengths(arguments)
        x = arguments["x"]
        f.grid = kit.Grid(x, self.patch)
        c = self.t_embedder.numbers(arguments["timestep"], x.dtype) + self.y_embedder(arguments["y"])
        f.modulate(self.modulating, functional.silu(c))
        positions = self._crop_positions(*f.grid.counts).to(x.dtype)
        f.image = f.shard(self.x_embedder.whole(f.grid.pad(x)) + positions)
        f.text = f.shard(arguments["context"], self.context_embedder)

    @property
    def trunk(self) -> Sequence[Any]:
        """See `DiT.trunk`."""
        return list(self.joint_blocks)

    @property
    def residual_blocks(self) -> Mapping[str, Any]:
        """See `DiT.residual_blocks`."""
        return {"output": self.joint_blocks}

    def end(self, f: ForwardPass) -> Tensor:
        """See `DiT.end`."""
        latent: Tensor = f.grid.latent(self.final_layer(f), channels_last=True)
        return latent

    def _crop_positions(self, rows: int, columns: int) -> Tensor:
        """The middle ``rows`` by ``columns`` of the position table: [1, rows * columns, width]."""
        top, left = (self.grid_size - rows) // 2, (self.grid_size - columns) // 2
        table = torch.unflatten(self.pos_embed, 1, (self.grid_size, self.grid_size))
        return table[:, top : top + rows, left : left + columns].flatten(1, 2)


def _check_config(config: Mapping[str, Any]) -> None:
    fixed(config, learn_sigma=False, rmsnorm=False, scale_mod_only=False, swiglu=False, x_block_self_attn=False)
    fixed(config, qkv_bias=True, context_processor_layers=None, register_length=0)
    for key, expected in (
        ("num_blocks", integer(config, "depth")),
        ("num_patches", integer(config, "pos_embed_max_size") ** 2),
    ):
        if config.get(key) is not None:
            fixed(config, **{key: expected})
    if config.get("mlp_ratio", 4.0) != 4.0:
        raise ModelUnsupported(f"config key 'mlp_ratio' is {config['mlp_ratio']!r:.80}; this version runs 4.0")


def _context_width(config: Mapping[str, Any], width: int) -> int:
    embedder = config.get("context_embedder_config")
    params = embedder.get("params") if isinstance(embedder, Mapping) else None
    if not isinstance(params, Mapping) or params.get("out_features") != width:
        raise ModelUnsupported(
            f"config key 'context_embedder_config' is {embedder!r:.120}; expected a torch.nn.Linear "
            f"whose out_features are {width}, 64 times the depth"
        )
    return integer(params, "in_features")


def _dual_layers(config: Mapping[str, Any], depth: int) -> set[int]:
    layers = config.get("x_block_self_attn_layers", [])
    if not isinstance(layers, list) or any(type(i) is not int or not 0 <= i < depth for i in layers):
        raise ModelUnsupported(
            f"config key 'x_block_self_attn_layers' is {layers!r:.80}; expected a list of blocks from 0 to {depth - 1}"
        )
    return set(layers)


def _positions(size: int, width: int) -> Tensor:
    """Sines and cosines of columns and rows, [1, size * size, width]: what training starts from; files replace it."""
    if (table := torch.empty(1, size * size, width)).is_meta:
        return table  # to compute it without memory, torch would import its compiler, which takes seconds
    frequencies = 10000 ** -(torch.arange(width // 4) / (width // 4))
    angles = torch.arange(size)[:, None] * frequencies
    line = torch.cat((angles.sin(), angles.cos()), dim=-1)
    columns, rows = line[None].expand(size, -1, -1), line[:, None].expand(-1, size, -1)
    return torch.cat((columns, rows), dim=-1).flatten(0, 1)[None]

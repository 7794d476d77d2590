"""PixArt: alpha (Chen et al., 2023, arXiv:2310.00426) and Sigma (Chen et al., 2024, arXiv:2403.04692).

Image tokens attend to themselves, then to the text, which no block changes: each rank makes all of its keys and values
itself, and only self-attention needs the other ranks. Parameters are named as in the authors' files (PixArt-alpha and
PixArt-sigma, Apache-2.0).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tacod.checkpoint import TensorInfo
from tacod.rank.families import kit
from tacod.rank.families.base import DiT, LatentFormat
from tacod.rank.families.config import (
    choice,
    count_blocks,
    fixed,
    integer,
    optional_integer,
    optional_number,
    shape_of,
    width_of_heads,
)
from tacod.rank.families.inputs import Argument, Spec
from tacod.rank.families.names import Names
from tacod.rank.families.noise import Epsilon
from tacod.rank.families.stream import ForwardPass
from tacod.rank.ops.table_cache import table
from tacod_client.errors import ArgumentError, ModelUnsupported

__all__ = ["PixArt"]

_ALPHA, _SIGMA = "pixart_alpha", "pixart_sigma"
_PUBLISHED = {"hidden_size": 1152, "num_heads": 16}
_UNIT = 64
"""The unit of positions: a side of 64 latents (512 pixels)."""
_PROCESS = Epsilon(1e-4, 2e-2)


@functools.cache
def _log_levels(device: torch.device) -> Tensor:
    return _PROCESS.levels.log().float().to(device)


_LAYERS = "fc1", "fc2"
"""The layers of `kit.MLP` in these files."""


class Block(nn.Module):
    """Self-attention, cross attention and feed-forward; its modulation is the model's plus a table of its own."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.attn = kit.SelfAttention(width, heads)
        self.cross_attn = kit.CrossAttention(width, heads)
        self.mlp = kit.MLP(width, hidden, _LAYERS)
        self.scale_shift_table = kit.drawn(6, width)

    def forward(self, f: ForwardPass) -> None:
        """The image one block further; the modulation of all blocks is [B, 6, width]."""
        parts = (self.scale_shift_table + f.shared_modulation).chunk(6, dim=1)
        (attended,) = f.attend((f.image, lambda: self.attn(f.image.normed(*parts[:2])))).wait()
        f.image.add(parts[2], self.attn.project(attended))
        f.image.add(None, self.cross_attn(f.image.tokens, f.text))
        f.image.add(parts[5], self.mlp(f.image.normed(*parts[3:5])))


class Caption(nn.Module):
    """Projects the text's features to the model's width.

    ``y_embedding`` stands for no text in training; files hold it, and forwards don't use it.
    """

    def __init__(self, inputs: int, width: int, tokens: int | None) -> None:
        super().__init__()
        self.y_proj = kit.MLP(inputs, width, _LAYERS, outputs=width)
        if tokens is not None:
            self.register_buffer("y_embedding", torch.zeros(tokens, inputs))


class Final(nn.Module):
    """Tokens to the pixels of their patches."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, outputs)
        self.scale_shift_table = kit.drawn(2, width)


class PixArt(DiT):
    """PixArt-alpha and PixArt-Sigma, from 512 pixels to 2K.

    ``config`` is ComfyUI's ``unet_config``, and ``num_patches`` where the file holds a table of positions. Raises
    `ModelUnsupported`, naming the key, for a configuration that can't be.
    """

    family: ClassVar[str] = "pixart"
    title = "PixArt"
    models = ("alpha 512–1024", "Sigma 512–2K")
    tiny: ClassVar[Mapping[str, Any]] = {
        "image_model": _ALPHA,
        "num_heads": 3,
        "hidden_size": 48,
        "depth": 2,
        "caption_channels": 8,
    }
    diffusers: ClassVar[Mapping[str, Any]] = dict.fromkeys(
        # The second is the name under which PixArt was published.
        ("PixArtTransformer2DModel", "Transformer2DModel(ada_norm_single)"),
        lambda c: {
            "micro_condition": (sized := c.flag("use_additional_conditions", c.whole("sample_size", 128) == 128)),
            "image_model": _ALPHA if sized else _SIGMA,
            "num_heads": c.whole("num_attention_heads", 16),
            "depth": c.whole("num_layers", 28),
        },
    )
    usual: ClassVar[Mapping[str, int]] = {"B": 2, "H": 128, "W": 128, "L": 120}
    image_models: ClassVar[tuple[str, ...]] = (_ALPHA, _SIGMA)
    process = _PROCESS
    latent_format = LatentFormat(0.13025, 0.0)
    """Sigma's, with the VAE of SDXL; an alpha's own is that of Stable Diffusion 1."""
    diffusers_optional = frozenset(
        f"adaln_single.emb.{kind}_embedder.linear_{n}" for kind in ("resolution", "aspect_ratio") for n in (1, 2)
    )
    # The authors' ``y_embedding`` and ``pos_embed`` have no place in diffusers' files.
    names = Names("""
        pos_embed.proj                                                  x_embedder.proj
        adaln_single.emb.timestep_embedder.linear_{1,2}                 t_embedder.mlp.{0,2}
        adaln_single.emb.{resolution,aspect_ratio}_embedder.linear_{1,2}   {csize,ar}_embedder.mlp.{0,2}
        adaln_single.linear                                             t_block.1
        caption_projection.linear_{1,2}                                 y_embedder.y_proj.fc{1,2}
        proj_out                                                        final_layer.linear
        scale_shift_table                                               final_layer.scale_shift_table
        transformer_blocks.*.scale_shift_table                          blocks.*.scale_shift_table
        transformer_blocks.*.attn1.to_{q,k,v}                           blocks.*.attn.qkv[0,1,2]
        transformer_blocks.*.attn1.to_out.0                             blocks.*.attn.proj
        transformer_blocks.*.attn2.to_q                                 blocks.*.cross_attn.q_linear
        transformer_blocks.*.attn2.to_{k,v}                             blocks.*.cross_attn.kv_linear[0,1]
        transformer_blocks.*.attn2.to_out.0                             blocks.*.cross_attn.proj
        transformer_blocks.*.ff.net.{0.proj,2}                          blocks.*.mlp.{fc1,fc2}
    """)

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        fixed(config, qk_norm=False, kv_compress_config=None)
        if _model(config) == _ALPHA:
            self.latent_format = LatentFormat(0.18215, 0.0)
        self.width, self.heads = width, _ = width_of_heads({**_PUBLISHED, **config}, "hidden_size", "num_heads")
        _check_width(config, width)
        self.patch = integer(config, "patch_size", 2, most=_UNIT)
        self.channels = self.out_channels = integer(config, "in_channels", 4)
        self.context_width = integer(config, "caption_channels", 4096)
        self.outputs = self.channels * (2 if choice(config, "pred_sigma", True, False) else 1)
        self.sized = _is_sized(config)
        self.interpolation = optional_number(config, "pe_interpolation")
        self.precision = optional_integer(config, "pe_precision", least=0)
        hidden = int(width * (optional_number(config, "mlp_ratio") or 4))
        positions = optional_integer(config, "num_patches")

        self.x_embedder = kit.PatchEmbed(self.channels, (self.patch, self.patch), width)
        self.t_embedder = kit.MLPEmbedder(256, width)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.y_embedder = Caption(self.context_width, width, optional_integer(config, "model_max_length"))
        if self.sized:
            self.csize_embedder = kit.MLPEmbedder(256, width // 3)
            self.ar_embedder = kit.MLPEmbedder(256, width // 3)
        if positions is not None:
            # Positions are made for each size of latent; files of the authors hold those of the training size.
            self.register_buffer("pos_embed", torch.zeros(1, positions, width))
        self.blocks = nn.ModuleList(
            Block(width, self.heads, hidden) for _ in range(integer(config, "depth", 28, most=1024))
        )
        self.final_layer = Final(width, self.patch**2 * self.outputs)

    @classmethod
    def detect(cls, tensors: Mapping[str, TensorInfo]) -> dict[str, Any] | None:
        """See `DiT.detect`. The number of heads is not in the shapes: published models have 16."""
        if "t_block.1.weight" not in tensors or "y_embedder.y_proj.fc1.weight" not in tensors:
            return None
        width, channels, patch, _ = shape_of(tensors, "x_embedder.proj.weight", 4)
        outputs, _ = shape_of(tensors, "final_layer.linear.weight", 2)
        sized = "ar_embedder.mlp.0.weight" in tensors
        config = {
            "image_model": _ALPHA if sized else _SIGMA,
            "num_heads": 16,
            "patch_size": patch,
            "hidden_size": width,
            "in_channels": channels,
            "depth": count_blocks(tensors, "blocks"),
            "caption_channels": shape_of(tensors, "y_embedder.y_proj.fc1.weight", 2)[1],
            "pred_sigma": outputs != channels * patch**2,
            "micro_condition": sized,
        }
        if "y_embedder.y_embedding" in tensors:
            config["model_max_length"] = shape_of(tensors, "y_embedder.y_embedding", 2)[0]
        if "pos_embed" in tensors:
            positions = shape_of(tensors, "pos_embed", 3)[1]
            side = math.isqrt(positions) * patch
            config |= {"num_patches": positions, "input_size": side, "pe_interpolation": side // _UNIT}
        return config

    def arguments(self) -> dict[str, Spec]:
        """See `DiT.arguments`.

        ``c_size`` is height and width of the wanted image in pixels and ``c_ar`` their ratio, both by default those of
        ``x``; a Sigma doesn't look at them.
        """
        return {
            "x": Argument(("B", self.channels, "H", "W")),
            "timestep": Argument(("B",), fp32=True),
            "context": Argument(("B", "L", self.context_width)),
            "c_size": Argument(("B", 2), required=False),
            "c_ar": Argument(("B", 1), required=False),
        }

    def lengths(self, arguments: Mapping[str, Any]) -> tuple[int]:
        """Tokens of the image, whose sequence the text is not part of.

        Raises `ArgumentError` for an ``x`` of a size that PixArt has no positions for.
        """
        x = arguments["x"]
        height, width = x.shape[-2:]
        if height % self.patch or width % self.patch:
            raise ArgumentError(
                f"x: its latents are {height} by {width}; PixArt cuts them into patches of {self.patch} by "
                f"{self.patch}, so make both sides of the image multiples of {8 * self.patch} pixels",
                argument="x",
            )
        if not _base(x, self.patch):
            raise ArgumentError(
                f"x: its latents of {height} by {width} are too small for PixArt's positions, which count in units "
                f"of 512 pixels; make height and width of the image add up to {16 * (_UNIT // 2 + 1)} pixels or more "
                "(272 by 272, for example)",
                argument="x",
            )
        return (math.prod(kit.Grid(x, self.patch).counts),)

    def timestep(self, sigma: Tensor) -> Tensor:
        """See `DiT.timestep`; the step of training, 0 to 999, whose noise level is nearest on a log scale."""
        distances = sigma.float().log().unsqueeze(-1) - _log_levels(sigma.device)
        return distances.abs().argmin(-1).float()

    def begin(self, f: ForwardPass, **arguments: Any) -> None:
        """See `DiT.begin`. Raises `ArgumentError` for a size that PixArt has no positions for."""
        self.lengths(arguments)
        x = arguments["x"]
        t = self.t_embedder.numbers(arguments["timestep"], x.dtype)
        if self.sized:
            t = t + self._sizes(x, arguments.get("c_size"), arguments.get("c_ar"))
        f.conditioning = t
        f.shared_modulation = torch.unflatten(self.t_block(t), -1, (6, -1))
        f.text = self.y_embedder.y_proj(arguments["context"])
        f.grid = kit.Grid(x, self.patch)
        f.image = f.shard(self.x_embedder.whole(x) + self._positions(x).to(x.dtype))

    def _sizes(self, x: Tensor, size: Tensor | None, ratio: Tensor | None) -> Tensor:
        """The embedding of the wanted image's size and shape, [B, width]."""
        height, width = x.shape[-2:]
        # Filled on the device: a graph can't take them from the host.
        one = (len(x), 1)
        if size is None:
            size = torch.cat((x.new_full(one, 8 * height), x.new_full(one, 8 * width)), 1)
        ratio = x.new_full(one, height / width) if ratio is None else ratio
        embedders = ((self.csize_embedder, size), (self.ar_embedder, ratio))
        return torch.cat([each.numbers(given, x.dtype).flatten(1) for each, given in embedders], dim=1)

    @property
    def trunk(self) -> Sequence[Any]:
        """See `DiT.trunk`."""
        return list(self.blocks)

    def end(self, f: ForwardPass) -> Tensor:
        """See `DiT.end`."""
        final = self.final_layer
        shift, scale = (final.scale_shift_table + f.conditioning[:, None]).chunk(2, dim=1)
        pixels = torch.unflatten(final.linear(f.image.normed(shift, scale)), -1, (-1, self.outputs))
        # The other half of the channels is the predicted variance, which samplers don't use.
        latent: Tensor = f.grid.latent(f.gather(f.image, pixels[..., : self.channels].flatten(2)), channels_last=True)
        return latent

    def _positions(self, x: Tensor) -> Tensor:
        """Sines and cosines of each patch's column, then of its row: [rows * columns, width] in fp32.

        ComfyUI computes them in the compute dtype; in bf16 that alone costs more accuracy than all of the layers.
        """
        interpolation = self.interpolation
        if interpolation is None or self.precision is not None:
            interpolation = round(_side(x) / _UNIT, self.precision or 0)
        rows, columns = kit.Grid(x, self.patch).counts
        half, base = self.width // 2, _base(x, self.patch)
        across = _line(columns, base, interpolation, half, x.device)[None].expand(rows, -1, -1)
        down = _line(rows, base, interpolation, half, x.device)[:, None].expand(-1, columns, -1)
        return torch.cat((across, down), dim=-1).flatten(0, 1)


def _side(x: Any) -> int:
    """The mean of a latent's height and width."""
    height, width = x.shape[-2:]
    return int(height + width) // 2


def _base(x: Any, patch: int) -> int:
    """The largest position along a side before interpolation: the image's size in units, rounded, in patches."""
    return round(_side(x) / _UNIT) * _UNIT // patch


@table(kept=64)
def _line(count: int, base: int, interpolation: float, width: int, device: torch.device) -> Tensor:
    """Sines, then cosines of ``count`` positions from 0 towards ``base / interpolation``: fp32 [count, width].

    Computed on the CPU for every device, like `sinusoid`'s frequencies.
    """
    exponents = torch.arange(width // 2, dtype=torch.float32, device="cpu") / (width / 2)
    places = torch.arange(count, dtype=torch.float32, device="cpu") / (count / base) / interpolation
    angles = places[:, None] * (1 / 10000**exponents)
    return torch.cat((angles.sin(), angles.cos()), dim=-1).to(device)


def _model(config: Mapping[str, Any]) -> str:
    model: str = choice(config, "image_model", _SIGMA, _ALPHA)
    return model


def _is_sized(config: Mapping[str, Any]) -> bool:
    """Whether the model is told the size of the wanted image: by default an alpha is."""
    default = _model(config) == _ALPHA
    sized: bool = choice(config, "micro_condition", default, not default)
    return sized


def _check_width(config: Mapping[str, Any], width: int) -> None:
    parts = 12 if _is_sized(config) else 4
    if width % parts:
        raise ModelUnsupported(
            f"config key 'hidden_size' is {width}; it must be a multiple of {parts}, for positions take it in four "
            "parts and micro-conditions in three"
        )

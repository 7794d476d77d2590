"""PixArt: alpha (Chen et al., 2023, arXiv:2310.00426) and Sigma (Chen et al., 2024, arXiv:2403.04692).

Image tokens attend to themselves, then to the text, which no block changes: each rank makes all of its keys and values
itself, and only self-attention needs the other ranks. Parameters are named as in the authors' files (PixArt-alpha and
PixArt-sigma, Apache-2.0).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from tacod.checkpoint import TensorInfo
from tacod.rank.families.base import (
    Argument,
    DiT,
    LatentFormat,
    Patches,
    Place,
    Spec,
    count_blocks,
    grid,
    settle,
    shape_of,
    sinusoid,
    unpatchify,
    whole,
)
from tacod.rank.families.noise import Epsilon
from tacod.rank.forward.step_cache import StepCache, last_tokens
from tacod.rank.ops.fused import add_gated, norm_modulate
from tacod.rank.ops.linear import linear_gelu
from tacod.rank.ops.qkv import QKV
from tacod.rank.ops.table_cache import table
from tacod.rank.parallel.sequence import SequenceParallel
from tacod_client.errors import ArgumentError, ModelUnsupported

__all__ = ["PixArt"]

_ALPHA, _SIGMA = "pixart_alpha", "pixart_sigma"
_UNIT = 64
"""The side in latents (512 pixels) that positions are counted in."""


_PROCESS = Epsilon(1e-4, 2e-2)


@functools.cache
def _log_levels(device: torch.device) -> Tensor:
    return _PROCESS.levels.log().float().to(device)


class Attention(nn.Module):
    """The projections around the self-attention that the ranks share."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.heads = heads

    def forward(self, x: Tensor) -> QKV:
        """Queries, keys and values of ``x`` [B, S, width]."""
        return QKV(self.qkv(x), self.heads)


class CrossAttention(nn.Module):
    """Attention of this rank's image tokens to the whole text."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.q_linear = nn.Linear(width, width)
        self.kv_linear = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)
        self.heads = heads

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        q = torch.unflatten(self.q_linear(x), -1, (self.heads, -1)).transpose(1, 2)
        k, v = torch.unflatten(self.kv_linear(text), -1, (2, self.heads, -1)).transpose(1, 3).unbind(2)
        attended = functional.scaled_dot_product_attention(q, k, v)
        projected: Tensor = self.proj(attended.transpose(1, 2).flatten(2))
        return projected


class Mlp(nn.Module):
    """The feed-forward part of a block, and the projection of the text."""

    def __init__(self, inputs: int, hidden: int, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(inputs, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(linear_gelu(self.fc1, x))
        return out


class Block(nn.Module):
    """Self-attention, cross attention and feed-forward; its modulation is the model's plus a table of its own."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.attn = Attention(width, heads)
        self.cross_attn = CrossAttention(width, heads)
        self.mlp = Mlp(width, hidden, width)
        self.scale_shift_table = nn.Parameter(torch.randn(6, width) / width**0.5)

    def forward(
        self, sequence: SequenceParallel, lengths: tuple[int], x: Tensor, text: Tensor, modulation: Tensor
    ) -> Tensor:
        """This rank's image tokens, one block further; ``modulation`` is [B, 6, width]."""
        parts = (self.scale_shift_table + modulation).chunk(6, dim=1)
        arrived = x
        attending = sequence.attend((lambda: self.attn(norm_modulate(arrived, *parts[:2])),), lengths)
        attended = attending.wait()
        x = add_gated(x, parts[2], self.attn.proj(attended))
        x = x + self.cross_attn(x, text)
        return add_gated(x, parts[5], self.mlp(norm_modulate(x, *parts[3:5])))


class Embedder(nn.Module):
    """Numbers [B, D] into the space of the conditioning, each by itself: [B, D * width]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, numbers: Tensor, dtype: torch.dtype) -> Tensor:
        embedded: Tensor = self.mlp(sinusoid(numbers.flatten()).to(dtype))
        return embedded.reshape(len(numbers), -1)


class Caption(nn.Module):
    """The text's features in the model's width.

    ``y_embedding`` stands for no text in training; files hold it, a forward doesn't look at it.
    """

    def __init__(self, inputs: int, width: int, tokens: int | None) -> None:
        super().__init__()
        self.y_proj = Mlp(inputs, width, width)
        if tokens is not None:
            self.register_buffer("y_embedding", torch.zeros(tokens, inputs))

    def forward(self, context: Tensor) -> Tensor:
        text: Tensor = self.y_proj(context)
        return text


class Final(nn.Module):
    """Tokens to the pixels of their patches."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, outputs)
        self.scale_shift_table = nn.Parameter(torch.randn(2, width) / width**0.5)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        shift, scale = (self.scale_shift_table + t[:, None]).chunk(2, dim=1)
        pixels: Tensor = self.linear(norm_modulate(x, shift, scale))
        return pixels


class PixArt(DiT):
    """PixArt-alpha and PixArt-Sigma, from 512 pixels to 2K.

    ``config`` is ComfyUI's ``unet_config``, and ``num_patches`` where the file holds a table of positions. Raises
    `ModelUnsupported`, naming the key, for a configuration that can't be.
    """

    family: ClassVar[str] = "pixart"
    usual = (2, 120)
    image_models: ClassVar[tuple[str, ...]] = (_ALPHA, _SIGMA)
    process = _PROCESS
    latent_format = LatentFormat(0.13025, 0.0)
    """Sigma's, which has the VAE of SDXL; an alpha's own is that of Stable Diffusion 1."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        settle(config, "qk_norm", False)
        settle(config, "kv_compress_config", None)
        if _model(config) == _ALPHA:
            self.latent_format = LatentFormat(0.18215, 0.0)
        self.heads = whole(config, "num_heads", 16)
        self.width = width = _width(config, self.heads)
        self.patch = whole(config, "patch_size", 2, most=_UNIT)
        self.channels = self.out_channels = whole(config, "in_channels", 4)
        self.context_width = whole(config, "caption_channels", 4096)
        self.outputs = self.channels * (2 if settle(config, "pred_sigma", True, False) else 1)
        self.sized = _is_sized(config)
        self.interpolation = _number(config, "pe_interpolation")
        self.precision = _optional(config, "pe_precision", least=0)
        hidden = int(width * (_number(config, "mlp_ratio") or 4))
        positions = _optional(config, "num_patches")

        self.x_embedder = Patches(self.channels, self.patch, width)
        self.t_embedder = Embedder(width)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.y_embedder = Caption(self.context_width, width, _optional(config, "model_max_length"))
        if self.sized:
            self.csize_embedder = Embedder(width // 3)
            self.ar_embedder = Embedder(width // 3)
        if positions is not None:
            # Positions are made for each size of latent; files of the authors hold those of the training size.
            self.register_buffer("pos_embed", torch.zeros(1, positions, width))
        self.blocks = nn.ModuleList(
            Block(width, self.heads, hidden) for _ in range(whole(config, "depth", 28, most=1024))
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

    @classmethod
    def diffusers_layout(cls, config: Mapping[str, Any]) -> dict[str, Place]:
        """See `DiT.diffusers_layout`; ``y_embedding`` and ``pos_embed`` have no place there."""
        width = _width(config, whole(config, "num_heads", 16))
        names = {
            "pos_embed.proj": "x_embedder.proj",
            "adaln_single.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
            "adaln_single.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
            "adaln_single.linear": "t_block.1",
            "caption_projection.linear_1": "y_embedder.y_proj.fc1",
            "caption_projection.linear_2": "y_embedder.y_proj.fc2",
            "proj_out": "final_layer.linear",
        }
        if _is_sized(config):
            for theirs, ours in (("resolution", "csize"), ("aspect_ratio", "ar")):
                names[f"adaln_single.emb.{theirs}_embedder.linear_1"] = f"{ours}_embedder.mlp.0"
                names[f"adaln_single.emb.{theirs}_embedder.linear_2"] = f"{ours}_embedder.mlp.2"
        layout = {"scale_shift_table": Place("final_layer.scale_shift_table")}
        for i in range(whole(config, "depth", 28, most=1024)):
            theirs, ours = f"transformer_blocks.{i}", f"blocks.{i}"
            layout[f"{theirs}.scale_shift_table"] = Place(f"{ours}.scale_shift_table")
            names |= {
                f"{theirs}.attn1.to_out.0": f"{ours}.attn.proj",
                f"{theirs}.attn2.to_q": f"{ours}.cross_attn.q_linear",
                f"{theirs}.attn2.to_out.0": f"{ours}.cross_attn.proj",
                f"{theirs}.ff.net.0.proj": f"{ours}.mlp.fc1",
                f"{theirs}.ff.net.2": f"{ours}.mlp.fc2",
            }
            for kind in ("weight", "bias"):
                for part, name in enumerate(("to_q", "to_k", "to_v")):
                    layout[f"{theirs}.attn1.{name}.{kind}"] = Place(f"{ours}.attn.qkv.{kind}", (part * width, width))
                for part, name in enumerate(("to_k", "to_v")):
                    layout[f"{theirs}.attn2.{name}.{kind}"] = Place(
                        f"{ours}.cross_attn.kv_linear.{kind}", (part * width, width)
                    )
        for theirs, ours in names.items():
            layout |= {f"{theirs}.{kind}": Place(f"{ours}.{kind}") for kind in ("weight", "bias")}
        return layout

    @classmethod
    def diffusers_config(cls, tensors: Mapping[str, TensorInfo]) -> dict[str, Any] | None:
        """See `DiT.diffusers_config`."""
        marks = ("adaln_single.linear.weight", "caption_projection.linear_1.weight", "pos_embed.proj.weight")
        if any(key not in tensors for key in marks):
            return None
        sized = "adaln_single.emb.resolution_embedder.linear_1.weight" in tensors
        return {
            "image_model": _ALPHA if sized else _SIGMA,
            "num_heads": 1,
            "hidden_size": shape_of(tensors, "pos_embed.proj.weight", 4)[0],
            "depth": count_blocks(tensors, "transformer_blocks"),
            "micro_condition": sized,
        }

    def arguments(self) -> dict[str, Spec]:
        """See `DiT.arguments`."""
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
        return (math.prod(grid(x, self.patch)),)

    def timestep(self, sigma: Tensor) -> Tensor:
        """See `DiT.timestep`; the step of training, 0 to 999, whose noise level is nearest on a log scale."""
        distances = sigma.float().log().unsqueeze(-1) - _log_levels(sigma.device)
        return distances.abs().argmin(-1).float()

    def forward(  # type: ignore[override]
        self,
        sequence: SequenceParallel,
        x: Tensor,
        timestep: Tensor,
        *,
        context: Tensor,
        c_size: Tensor | None = None,
        c_ar: Tensor | None = None,
        step_cache: StepCache | None = None,
    ) -> Tensor:
        """See `DiT.forward`.

        ``c_size`` is height and width of the wanted image in pixels and ``c_ar`` their ratio, both by default those of
        ``x``; a Sigma doesn't look at them. Raises `ArgumentError` for a size that PixArt has no positions for.
        """
        lengths = self.lengths({"x": x})
        t = self.t_embedder(timestep, x.dtype)
        if self.sized:
            height, width = x.shape[-2:]
            # Filled on the device: a graph can't take them from the host.
            one = (len(x), 1)
            size = torch.cat((x.new_full(one, 8 * height), x.new_full(one, 8 * width)), 1) if c_size is None else c_size
            ratio = x.new_full(one, height / width) if c_ar is None else c_ar
            t = t + torch.cat((self.csize_embedder(size, x.dtype), self.ar_embedder(ratio, x.dtype)), dim=1)
        modulation = torch.unflatten(self.t_block(t), -1, (6, -1))

        text = self.y_embedder(context)
        image = sequence.shard(self.x_embedder(x) + self._positions(x).to(x.dtype))

        def blocks() -> Iterator[Tensor]:
            nonlocal image
            yield image
            for block in self.blocks:
                image = block(sequence, lengths, image, text, modulation)
                yield image

        image = last_tokens(blocks(), sequence, step_cache)

        # The other half of the channels is the predicted variance, which samplers don't use.
        pixels = torch.unflatten(self.final_layer(image, t), -1, (self.patch, self.patch, self.outputs))
        pixels = sequence.gather(pixels[..., : self.channels], *lengths)
        return unpatchify(pixels, *grid(x, self.patch), self.patch)

    def _positions(self, x: Tensor) -> Tensor:
        """Sines and cosines of each patch's column, then of its row: [rows * columns, width] in fp32.

        ComfyUI computes them in the compute dtype; in bf16 that alone costs more accuracy than all of the layers.
        """
        interpolation = self.interpolation
        if interpolation is None or self.precision is not None:
            interpolation = round(_side(x) / _UNIT, self.precision or 0)
        rows, columns = grid(x, self.patch)
        half, base = self.width // 2, _base(x, self.patch)
        across = _line(columns, base, interpolation, half, x.device)[None].expand(rows, -1, -1)
        down = _line(rows, base, interpolation, half, x.device)[:, None].expand(-1, columns, -1)
        return torch.cat((across, down), dim=-1).flatten(0, 1)


def _side(x: Any) -> int:
    """The mean of a latent's height and width."""
    height, width = x.shape[-2:]
    return int(height + width) // 2


def _base(x: Any, patch: int) -> int:
    """How far positions reach along either side, before interpolation: its patches if it were a whole unit, or so."""
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
    model: str = settle(config, "image_model", _SIGMA, _ALPHA)
    return model


def _is_sized(config: Mapping[str, Any]) -> bool:
    """Whether the model is told the size of the wanted image: by default an alpha is."""
    default = _model(config) == _ALPHA
    sized: bool = settle(config, "micro_condition", default, not default)
    return sized


def _width(config: Mapping[str, Any], heads: int) -> int:
    width = whole(config, "hidden_size", 1152)
    if width % heads:
        raise ModelUnsupported(f"config key 'num_heads' is {heads}; it must divide 'hidden_size', which is {width}")
    parts = 12 if _is_sized(config) else 4
    if width % parts:
        raise ModelUnsupported(
            f"config key 'hidden_size' is {width}; it must be a multiple of {parts}, for positions take it in four "
            "parts and micro-conditions in three"
        )
    return width


def _optional(config: Mapping[str, Any], key: str, least: int = 1) -> int | None:
    return None if config.get(key) is None else whole(config, key, least=least)


def _number(config: Mapping[str, Any], key: str) -> float | None:
    value = config.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9:
        raise ModelUnsupported(f"config key {key!r} is {value!r:.80}; expected a number above 0, or none")
    return value

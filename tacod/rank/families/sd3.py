"""Stable Diffusion 3 and 3.5: the MMDiT of Esser et al., 2024 (arXiv:2403.03206), and its MMDiT-X with dual attention.

Parameters are named as in Stability's files (sd3-ref, MIT).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from tacod.checkpoint import TensorInfo
from tacod.rank.families.base import (
    Argument,
    Control,
    DiT,
    LatentFormat,
    Patches,
    Place,
    Residuals,
    Spec,
    count_blocks,
    grid,
    pad_to_patches,
    settle,
    shape_of,
    sinusoid,
    unpatchify,
    whole,
)
from tacod.rank.families.noise import Flow
from tacod.rank.forward.step_cache import StepCache, last_tokens
from tacod.rank.ops.fused import add_gated, add_gated_norm, norm_modulate
from tacod.rank.ops.linear import linear_gelu
from tacod.rank.ops.qkv import QKV, QKNorm
from tacod.rank.parallel.modulation import modulations
from tacod.rank.parallel.sequence import SequenceParallel
from tacod_client.errors import ArgumentError, ModelUnsupported

__all__ = ["SD3"]

_HEAD_WIDTH = 64
_EPSILON = 1e-6


class Attention(nn.Module):
    """The projections of one stream around the attention that the streams share."""

    def __init__(self, width: int, qk_norm: str | None, project: bool = True) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        if project:
            self.proj = nn.Linear(width, width)
        if qk_norm == "rms":
            self.ln_q: nn.Module = nn.RMSNorm(_HEAD_WIDTH, eps=_EPSILON)
            self.ln_k: nn.Module = nn.RMSNorm(_HEAD_WIDTH, eps=_EPSILON)
        elif qk_norm == "ln":
            self.ln_q = nn.LayerNorm(_HEAD_WIDTH, eps=_EPSILON)
            self.ln_k = nn.LayerNorm(_HEAD_WIDTH, eps=_EPSILON)
        else:
            self.ln_q, self.ln_k = nn.Identity(), nn.Identity()

    def forward(self, x: Tensor) -> QKV:
        """Queries, keys and values of ``x`` [B, S, width]."""
        qkv = self.qkv(x)
        heads = x.shape[-1] // _HEAD_WIDTH
        if isinstance(self.ln_q, nn.RMSNorm) and isinstance(self.ln_k, nn.RMSNorm):
            return QKV(qkv, heads, QKNorm(self.ln_q.weight, self.ln_k.weight))
        if isinstance(self.ln_q, nn.LayerNorm):
            q, k, v = torch.unflatten(qkv, -1, (3, heads, -1)).unbind(2)
            qkv = torch.stack((self.ln_q(q), self.ln_k(k), v), dim=2).flatten(2)
        return QKV(qkv, heads)


class Mlp(nn.Module):
    """The feed-forward part of a block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(linear_gelu(self.fc1, x))
        return out


class Stream(nn.Module):
    """What a joint block does to one stream, before and after the shared attention.

    ``last`` is the text stream of the last block, which only feeds the attention; ``dual`` is an image stream that
    also attends to itself alone.
    """

    def __init__(self, width: int, qk_norm: str | None, *, last: bool = False, dual: bool = False) -> None:
        super().__init__()
        self.attn = Attention(width, qk_norm, project=not last)
        if dual:
            self.attn2 = Attention(width, qk_norm)
        if not last:
            self.mlp = Mlp(width)
        self.parts = 2 if last else 9 if dual else 6
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, self.parts * width))

    def feed_forward(self, x: Tensor, to: Tensor, modulation: Sequence[Tensor]) -> Tensor:
        """The stream ``x`` after its attention, whose output is ``to``, and its MLP."""
        x, normed = add_gated_norm(x, modulation[2], self.attn.proj(to), *modulation[3:5])
        return add_gated(x, modulation[5], self.mlp(normed))


class JointBlock(nn.Module):
    """Text and image, each with its own weights, in one attention."""

    def __init__(self, width: int, qk_norm: str | None, *, last: bool, dual: bool) -> None:
        super().__init__()
        self.context_block = Stream(width, qk_norm, last=last)
        self.x_block = Stream(width, qk_norm, dual=dual)
        self.last, self.dual = last, dual

    def forward(
        self,
        sequence: SequenceParallel,
        lengths: tuple[int, int],
        context: Tensor,
        x: Tensor,
        modulation: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """This rank's text and image tokens, one block further; the last block leaves the text as it is.

        ``modulation`` is of both streams: shift, scale and gate of the attention, of the MLP, and of the second
        attention, as far as there are any, each [B, 1, parts * width].
        """
        text, image = self.context_block, self.x_block
        text_mod, image_mod = modulation[0].chunk(text.parts, dim=-1), modulation[1].chunk(image.parts, dim=-1)
        arrived = x
        attending = sequence.attend(
            (
                lambda: text.attn(norm_modulate(context, *text_mod[:2])),
                lambda: image.attn(norm_modulate(arrived, *image_mod[:2])),
            ),
            lengths,
            overlap=self.dual,
        )
        if self.dual:
            own = sequence.attend((lambda: image.attn2(norm_modulate(arrived, *image_mod[6:8])),), lengths[1:])
            attending.start()
            x = add_gated(x, image_mod[8], image.attn2.proj(own.wait()))
        to_text, to_image = torch.split(attending.wait(), [context.shape[1], x.shape[1]], dim=1)
        x = image.feed_forward(x, to_image, image_mod)
        if not self.last:
            context = text.feed_forward(context, to_text, text_mod)
        return context, x


class Embedder(nn.Module):
    """A vector into the space of the conditioning."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        embedded: Tensor = self.mlp(x)
        return embedded


class Final(nn.Module):
    """Tokens to the pixels of their patches."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, outputs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        pixels: Tensor = self.linear(norm_modulate(x, *modulation.chunk(2, dim=-1)))
        return pixels


class SD3(DiT):
    """Stable Diffusion 3 medium, 3.5 large and 3.5 medium.

    ``config`` is ComfyUI's ``unet_config``. The width is 64 times ``depth``, which is also the number of heads and of
    blocks. Raises `ModelUnsupported`, naming the key, for a configuration that can't be.
    """

    family: ClassVar[str] = "sd3"
    usual = (2, 154)
    image_models: ClassVar[tuple[str, ...]] = ("sd3",)
    process = Flow()
    latent_format = LatentFormat(1.5305, 0.0609)

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        _check_config(config)
        self.heads = whole(config, "depth", most=1024)
        self.width = width = _HEAD_WIDTH * self.heads
        self.patch = whole(config, "patch_size", 2)
        self.channels = whole(config, "in_channels")
        self.out_channels = whole(config, "out_channels", self.channels)
        self.pooled_width = whole(config, "adm_in_channels")
        self.context_width = _context_width(config, width)
        self.grid_size = whole(config, "pos_embed_max_size")
        qk_norm = settle(config, "qk_norm", None, "rms", "ln")
        dual = _dual_layers(config, self.heads)

        self.x_embedder = Patches(self.channels, self.patch, width)
        self.t_embedder = Embedder(256, width)
        self.y_embedder = Embedder(self.pooled_width, width)
        self.context_embedder = nn.Linear(self.context_width, width)
        self.pos_embed = nn.Parameter(_positions(self.grid_size, width), requires_grad=False)
        self.joint_blocks = nn.ModuleList(
            JointBlock(width, qk_norm, last=i == self.heads - 1, dual=i in dual) for i in range(self.heads)
        )
        self.final_layer = Final(width, self.patch**2 * self.out_channels)

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
                i
                for i in range(count_blocks(tensors, "joint_blocks"))
                if f"joint_blocks.{i}.x_block.attn2.qkv.weight" in tensors
            ],
        }

    @classmethod
    def diffusers_layout(cls, config: Mapping[str, Any]) -> dict[str, Place]:
        """See `DiT.diffusers_layout`."""
        depth = whole(config, "depth", most=1024)
        width, both, dual = _HEAD_WIDTH * depth, ("weight", "bias"), _dual_layers(config, depth)
        qk_norm = settle(config, "qk_norm", None, "rms", "ln")
        norm_kinds: tuple[str, ...] = {None: (), "rms": both[:1], "ln": both}[qk_norm]
        names = {
            "context_embedder": "context_embedder",
            "pos_embed.proj": "x_embedder.proj",
            "proj_out": "final_layer.linear",
            "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
            "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
            "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
            "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
        }
        layout = {"pos_embed.pos_embed": Place("pos_embed")}
        swapped = {"norm_out.linear": "final_layer.adaLN_modulation.1"}
        for i in range(depth):
            theirs, text, image = (
                f"transformer_blocks.{i}",
                f"joint_blocks.{i}.context_block",
                f"joint_blocks.{i}.x_block",
            )
            names |= {
                f"{theirs}.norm1.linear": f"{image}.adaLN_modulation.1",
                f"{theirs}.attn.to_out.0": f"{image}.attn.proj",
                f"{theirs}.ff.net.0.proj": f"{image}.mlp.fc1",
                f"{theirs}.ff.net.2": f"{image}.mlp.fc2",
            }
            if i < depth - 1:
                names |= {
                    f"{theirs}.norm1_context.linear": f"{text}.adaLN_modulation.1",
                    f"{theirs}.attn.to_add_out": f"{text}.attn.proj",
                    f"{theirs}.ff_context.net.0.proj": f"{text}.mlp.fc1",
                    f"{theirs}.ff_context.net.2": f"{text}.mlp.fc2",
                }
            else:
                # Shift and scale only, which diffusers keeps the other way round, as in its last norm.
                swapped[f"{theirs}.norm1_context.linear"] = f"{text}.adaLN_modulation.1"
            attentions = [
                (f"{theirs}.attn", f"{image}.attn", ("to_q", "to_k", "to_v"), "norm"),
                (f"{theirs}.attn", f"{text}.attn", ("add_q_proj", "add_k_proj", "add_v_proj"), "norm_added"),
            ]
            if i in dual:
                names[f"{theirs}.attn2.to_out.0"] = f"{image}.attn2.proj"
                attentions.append((f"{theirs}.attn2", f"{image}.attn2", ("to_q", "to_k", "to_v"), "norm"))
            for attn, to, parts, norm in attentions:
                for kind in both:
                    for part, name in enumerate(parts):
                        layout[f"{attn}.{name}.{kind}"] = Place(f"{to}.qkv.{kind}", (part * width, width))
                for kind in norm_kinds:
                    layout |= {f"{attn}.{norm}_{letter}.{kind}": Place(f"{to}.ln_{letter}.{kind}") for letter in "qk"}
        for theirs, ours in swapped.items():
            layout |= {f"{theirs}.{kind}": Place(f"{ours}.{kind}", swap=True) for kind in both}
        for theirs, ours in names.items():
            layout |= {f"{theirs}.{kind}": Place(f"{ours}.{kind}") for kind in both}
        return layout

    @classmethod
    def diffusers_config(cls, tensors: Mapping[str, TensorInfo]) -> dict[str, Any] | None:
        """See `DiT.diffusers_config`."""
        first = "transformer_blocks.0.attn"
        marks = ("pos_embed.proj", "time_text_embed.text_embedder.linear_1", "proj_out")
        if any(f"{key}.weight" not in tensors for key in marks):
            return None
        width, _, _, _ = shape_of(tensors, "pos_embed.proj.weight", 4)
        blocks = range(count_blocks(tensors, "transformer_blocks"))
        normed = f"{first}.norm_q.weight" in tensors
        return {
            "depth": width // _HEAD_WIDTH,
            "qk_norm": ("ln" if f"{first}.norm_q.bias" in tensors else "rms") if normed else None,
            "x_block_self_attn_layers": [
                i for i in blocks if f"transformer_blocks.{i}.attn2.to_out.0.weight" in tensors
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
        if max(grid(arguments["x"], self.patch)) > self.grid_size:
            most = self.grid_size * self.patch
            raise ArgumentError(f"x: this model takes latents of at most {most} by {most}", argument="x")
        return arguments["context"].shape[1], math.prod(grid(arguments["x"], self.patch))

    def timestep(self, sigma: Tensor) -> Tensor:
        """See `DiT.timestep`."""
        return sigma * 1000

    def forward(  # type: ignore[override]
        self,
        sequence: SequenceParallel,
        x: Tensor,
        timestep: Tensor,
        *,
        context: Tensor,
        y: Tensor,
        control: Control | None = None,
        step_cache: StepCache | None = None,
    ) -> Tensor:
        """See `DiT.forward`. Raises `ArgumentError` if ``x`` is larger than the model's position table."""
        height, width = x.shape[-2:]
        rows, columns = grid(x, self.patch)
        lengths = self.lengths({"x": x, "context": context})
        image = self.x_embedder(pad_to_patches(x, self.patch)) + self._crop_positions(rows, columns).to(x.dtype)
        c = self.t_embedder(sinusoid(timestep).to(x.dtype)) + self.y_embedder(y)

        image = sequence.shard(image)
        text = self.context_embedder(sequence.shard(context))
        control = control or Control({})
        *each, final = modulations(self.modulating, functional.silu(c), sequence)
        modulation = iter(each)

        def blocks() -> Iterator[Tensor]:
            nonlocal text, image
            yield image
            for i, block in enumerate(self.joint_blocks):
                text, image = block(sequence, lengths, text, image, (next(modulation), next(modulation)))
                image = control.add("output", i, sequence, image, lengths[1])
                yield image

        image = last_tokens(blocks(), sequence, step_cache)
        pixels = sequence.gather(self.final_layer(image, final), lengths[1])
        pixels = torch.unflatten(pixels, -1, (self.patch, self.patch, self.out_channels))
        return unpatchify(pixels, rows, columns, self.patch)[:, :, :height, :width]

    @property
    def modulating(self) -> list[Any]:
        """See `DiT.modulating`."""
        blocks: Any = self.joint_blocks
        streams = [stream for block in blocks for stream in (block.context_block, block.x_block)]
        return [each.adaLN_modulation[1] for each in (*streams, self.final_layer)]

    def _crop_positions(self, rows: int, columns: int) -> Tensor:
        """The middle ``rows`` by ``columns`` of the position table: [1, rows * columns, width]."""
        top, left = (self.grid_size - rows) // 2, (self.grid_size - columns) // 2
        table = torch.unflatten(self.pos_embed, 1, (self.grid_size, self.grid_size))
        return table[:, top : top + rows, left : left + columns].flatten(1, 2)


def _check_config(config: Mapping[str, Any]) -> None:
    for key in ("learn_sigma", "rmsnorm", "scale_mod_only", "swiglu", "x_block_self_attn"):
        settle(config, key, False)
    settle(config, "qkv_bias", True)
    settle(config, "context_processor_layers", None)
    settle(config, "register_length", 0)
    for key, expected in (
        ("num_blocks", whole(config, "depth")),
        ("num_patches", whole(config, "pos_embed_max_size") ** 2),
    ):
        if config.get(key) is not None:
            settle(config, key, expected)
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
    return whole(params, "in_features")


def _dual_layers(config: Mapping[str, Any], depth: int) -> set[int]:
    layers = config.get("x_block_self_attn_layers", [])
    if not isinstance(layers, list) or any(type(i) is not int or not 0 <= i < depth for i in layers):
        raise ModelUnsupported(
            f"config key 'x_block_self_attn_layers' is {layers!r:.80}; expected a list of blocks from 0 to {depth - 1}"
        )
    return set(layers)


def _positions(size: int, width: int) -> Tensor:
    """Sines and cosines of columns and rows, [1, size * size, width]: what training starts from; files replace it."""
    frequencies = 10000 ** -(torch.arange(width // 4) / (width // 4))
    angles = torch.arange(size)[:, None] * frequencies
    line = torch.cat((angles.sin(), angles.cos()), dim=-1)
    columns, rows = line[None].expand(size, -1, -1), line[:, None].expand(-1, size, -1)
    return torch.cat((columns, rows), dim=-1).flatten(0, 1)[None]

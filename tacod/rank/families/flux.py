"""Flux.1 (Black Forest Labs): dev, schnell, Kontext, and those that take more channels (Fill, Canny, Depth).

Double blocks after the MMDiT of Esser et al., 2024 (arXiv:2403.03206), single blocks after Dehghani et al., 2023
(arXiv:2302.05442), rotary positions after Su et al., 2021 (arXiv:2104.09864). Parameters are named as in the authors'
files (black-forest-labs/flux, Apache-2.0).
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
    Number,
    Numbers,
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
from tacod.rank.ops.fused import Residual, norm_modulate
from tacod.rank.ops.linear import linear_gelu, split_inputs, split_outputs
from tacod.rank.ops.qkv import QKV, QKNorm, Rotation
from tacod.rank.parallel.modulation import modulations
from tacod.rank.parallel.sequence import SequenceParallel
from tacod_client.errors import ArgumentError, ModelUnsupported

__all__ = ["Flux"]

_METHODS = ("offset", "index", "uxo")
_METHODS_OF_OTHERS = {"index_timestep_zero": "offset"}
"""What ComfyUI's menu offers for other models, and what Flux.1 made of it up to 0.16; since then it fails with it."""
_ROPE_OPTIONS = ("scale_x", "scale_y", "scale_t", "shift_x", "shift_y", "shift_t")
_STRETCHED = ("all", "image")
_QK_NORM_EPS = 1e-6
"""The authors', which ComfyUI had up to 0.13; since then it has PyTorch's smallest step, 1.2e-7 (docs/comfyui.md)."""


class Embedder(nn.Module):
    """A vector into the space of the conditioning."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.in_layer = nn.Linear(inputs, width)
        self.out_layer = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        embedded: Tensor = self.out_layer(functional.silu(self.in_layer(x)))
        return embedded


class Norm(nn.Module):
    """The scale of a root mean square norm over a head's channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))


class Heads(nn.Module):
    """Norms of queries and keys."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query_norm = Norm(width)
        self.key_norm = Norm(width)

    @property
    def scales(self) -> tuple[Tensor, Tensor]:
        """Of queries and keys."""
        return self.query_norm.scale, self.key_norm.scale


class Attention(nn.Module):
    """The projections of one stream around the attention that the streams share."""

    def __init__(self, width: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.norm = Heads(width // heads)
        self.proj = nn.Linear(width, width)
        self.heads = heads

    def forward(self, x: Tensor, rotation: Rotation, epsilon: float) -> QKV:
        """Queries, keys and values of ``x`` [B, S, width]."""
        return QKV(self.qkv(x), self.heads, QKNorm(*self.norm.scales, epsilon), rotation)


class Modulation(nn.Module):
    """Shift, scale and gate, once or twice, from the conditioning."""

    def __init__(self, width: int, parts: int) -> None:
        super().__init__()
        self.lin = nn.Linear(width, parts * width)


class DoubleBlock(nn.Module):
    """Text and image, each with its own weights, in one attention."""

    def __init__(self, width: int, heads: int, hidden: int, bias: bool) -> None:
        super().__init__()
        self.img_mod = Modulation(width, 6)
        self.img_attn = Attention(width, heads, bias)
        self.img_mlp = _mlp(width, hidden)
        self.txt_mod = Modulation(width, 6)
        self.txt_attn = Attention(width, heads, bias)
        self.txt_mlp = _mlp(width, hidden)

    def forward(
        self,
        sequence: SequenceParallel,
        lengths: tuple[int, int],
        rotations: Sequence[Rotation],
        text: Residual,
        image: Residual,
        modulation: tuple[Tensor, Tensor],
        mask: Tensor | None = None,
        epsilon: float = _QK_NORM_EPS,
    ) -> tuple[Residual, Residual]:
        """This rank's text and image tokens, one block further; ``modulation`` is of both, [B, 1, 6 * width] each."""
        text_mod, image_mod = (each.chunk(6, dim=-1) for each in modulation)
        streams = (
            lambda: self.txt_attn(text.normed(*text_mod[:2]), rotations[0], epsilon),
            lambda: self.img_attn(image.normed(*image_mod[:2]), rotations[1], epsilon),
        )
        attended = sequence.attend(streams, lengths, mask).wait()
        to_text, to_image = torch.split(attended, [text.tokens.shape[1], image.tokens.shape[1]], dim=1)

        image = Residual(image.tokens, image_mod[2], self.img_attn.proj(to_image))
        hidden = _feed_forward(self.img_mlp, image.normed(*image_mod[3:5]))
        image = Residual(image.tokens, image_mod[5], hidden)
        text = Residual(text.tokens, text_mod[2], self.txt_attn.proj(to_text))
        hidden = _feed_forward(self.txt_mlp, text.normed(*text_mod[3:5]))
        return _finite(Residual(text.tokens, text_mod[5], hidden)), image


class SingleBlock(nn.Module):
    """Attention and feed-forward side by side, on text and image as one sequence."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(width, 3 * width + hidden)
        self.linear2 = nn.Linear(width + hidden, width)
        self.norm = Heads(width // heads)
        self.modulation = Modulation(width, 3)
        self.heads = heads
        self.width = width

    def forward(
        self,
        sequence: SequenceParallel,
        lengths: tuple[int, int],
        rotation: Rotation,
        x: Residual,
        modulation: Tensor,
        mask: Tensor | None = None,
        epsilon: float = _QK_NORM_EPS,
    ) -> Residual:
        """This rank's tokens, one block further; ``modulation`` is [B, 1, 3 * width].

        Both matrices are used in two parts, so that the feed-forward is computed while queries, keys and values travel,
        and the larger part of the second matrix while what was attended to comes back.
        """
        shift, scale, gate = modulation.chunk(3, dim=-1)
        normed = x.normed(shift, scale)
        to_heads, to_hidden = split_outputs(self.linear1, 3 * self.width)
        from_hidden, from_heads = split_inputs(self.linear2, self.width)
        attending = sequence.attend(
            (lambda: QKV(to_heads(normed), self.heads, QKNorm(*self.norm.scales, epsilon), rotation),),
            lengths,
            mask,
            overlap=True,
        )
        hidden = linear_gelu(to_hidden, normed)
        attending.start()
        out = from_hidden(hidden)
        return _finite(Residual(x.tokens, gate, from_heads(attending.wait(), out)))


class Final(nn.Module):
    """Tokens to the pixels of their patches."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, outputs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        pixels: Tensor = self.linear(norm_modulate(x, *modulation.chunk(2, dim=-1)))
        return pixels


class Flux(DiT):
    """Flux.1 dev, schnell and Kontext.

    ``config`` is ComfyUI's ``unet_config``. Raises `ModelUnsupported`, naming the key, for a configuration that can't
    be.
    """

    family: ClassVar[str] = "flux"
    usual = (1, 256)
    image_models: ClassVar[tuple[str, ...]] = ("flux",)
    process = Flow()
    latent_format = LatentFormat(0.3611, 0.1159)
    # ComfyUI's, from 0.14 on, and so in what its nodes save or send.
    spellings: ClassVar[Mapping[str, str]] = {
        f".{part}_norm.weight": f".{part}_norm.scale" for part in ("query", "key")
    }

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        _check_config(config)
        self.heads = whole(config, "num_heads")
        self.width = width = whole(config, "hidden_size")
        self.patch = whole(config, "patch_size", 2)
        self.channels = whole(config, "in_channels")
        self.out_channels = whole(config, "out_channels", 16)
        self.context_width = whole(config, "context_in_dim")
        self.pooled_width = whole(config, "vec_in_dim")
        self.axes = _axes(config, width, self.heads)
        self.theta = _number(config, "theta", 10000)
        self.guided: bool = settle(config, "guidance_embed", False, True)
        self.reference_method: str = settle(config, "default_ref_method", *_METHODS)
        self.reference_index = _number(config, "ref_index_scale", 1.0)
        bias: bool = settle(config, "qkv_bias", True, False)
        hidden = int(width * _number(config, "mlp_ratio", 4.0))

        self.img_in = nn.Linear(self.channels * self.patch**2, width)
        self.txt_in = nn.Linear(self.context_width, width)
        self.time_in = Embedder(256, width)
        self.vector_in = Embedder(self.pooled_width, width)
        if self.guided:
            self.guidance_in = Embedder(256, width)
        self.double_blocks = nn.ModuleList(
            DoubleBlock(width, self.heads, hidden, bias) for _ in range(whole(config, "depth", most=1024))
        )
        self.single_blocks = nn.ModuleList(
            SingleBlock(width, self.heads, hidden)
            for _ in range(whole(config, "depth_single_blocks", least=0, most=1024))
        )
        self.final_layer = Final(width, self.out_channels * self.patch**2)

    @classmethod
    def detect(cls, tensors: Mapping[str, TensorInfo]) -> dict[str, Any] | None:
        """See `DiT.detect`."""
        key_norm = "double_blocks.0.img_attn.norm.key_norm.scale"
        others = ("double_stream_modulation_img.lin.weight", "distilled_guidance_layer.norms.0.scale", "txt_norm.scale")
        if key_norm not in tensors or "img_in.weight" not in tensors or any(key in tensors for key in others):
            return None
        width, inputs = shape_of(tensors, "img_in.weight", 2)
        outputs, _ = shape_of(tensors, "final_layer.linear.weight", 2)
        (head_width,) = shape_of(tensors, key_norm, 1)
        patch = 2
        return {
            "image_model": "flux",
            "in_channels": inputs // patch**2,
            "out_channels": outputs // patch**2,
            "vec_in_dim": shape_of(tensors, "vector_in.in_layer.weight", 2)[1],
            "context_in_dim": shape_of(tensors, "txt_in.weight", 2)[1],
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
            "txt_ids_dims": [],
        }

    @classmethod
    def diffusers_layout(cls, config: Mapping[str, Any]) -> dict[str, Place]:
        """See `DiT.diffusers_layout`."""
        width, both = whole(config, "hidden_size"), ("weight", "bias")
        hidden = int(width * _number(config, "mlp_ratio", 4.0))
        fused_kinds = both if settle(config, "qkv_bias", True, False) else both[:1]
        names = {
            "x_embedder": "img_in",
            "context_embedder": "txt_in",
            "proj_out": "final_layer.linear",
            **_embedder("timestep", "time_in"),
            **_embedder("text", "vector_in"),
        }
        if settle(config, "guidance_embed", False, True):
            names |= _embedder("guidance", "guidance_in")
        layout = {
            f"norm_out.linear.{kind}": Place(f"final_layer.adaLN_modulation.1.{kind}", swap=True) for kind in both
        }
        for i in range(whole(config, "depth", most=1024)):
            theirs, ours = f"transformer_blocks.{i}", f"double_blocks.{i}"
            for stream, suffix, out, norm, parts in (
                ("img", "", "to_out.0", "norm", ("to_q", "to_k", "to_v")),
                ("txt", "_context", "to_add_out", "norm_added", ("add_q_proj", "add_k_proj", "add_v_proj")),
            ):
                names |= {
                    f"{theirs}.norm1{suffix}.linear": f"{ours}.{stream}_mod.lin",
                    f"{theirs}.attn.{out}": f"{ours}.{stream}_attn.proj",
                    f"{theirs}.ff{suffix}.net.0.proj": f"{ours}.{stream}_mlp.0",
                    f"{theirs}.ff{suffix}.net.2": f"{ours}.{stream}_mlp.2",
                }
                layout |= {
                    f"{theirs}.attn.{norm}_q.weight": Place(f"{ours}.{stream}_attn.norm.query_norm.scale"),
                    f"{theirs}.attn.{norm}_k.weight": Place(f"{ours}.{stream}_attn.norm.key_norm.scale"),
                }
                for kind in fused_kinds:
                    for part, name in enumerate(parts):
                        fused = Place(f"{ours}.{stream}_attn.qkv.{kind}", (part * width, width))
                        layout[f"{theirs}.attn.{name}.{kind}"] = fused
        for i in range(whole(config, "depth_single_blocks", least=0, most=1024)):
            theirs, ours = f"single_transformer_blocks.{i}", f"single_blocks.{i}"
            names |= {f"{theirs}.norm.linear": f"{ours}.modulation.lin", f"{theirs}.proj_out": f"{ours}.linear2"}
            layout |= {
                f"{theirs}.attn.norm_q.weight": Place(f"{ours}.norm.query_norm.scale"),
                f"{theirs}.attn.norm_k.weight": Place(f"{ours}.norm.key_norm.scale"),
            }
            for kind in both:
                for part, name in enumerate(("to_q", "to_k", "to_v")):
                    layout[f"{theirs}.attn.{name}.{kind}"] = Place(f"{ours}.linear1.{kind}", (part * width, width))
                layout[f"{theirs}.proj_mlp.{kind}"] = Place(f"{ours}.linear1.{kind}", (3 * width, hidden))
        for theirs, ours in names.items():
            layout |= {f"{theirs}.{kind}": Place(f"{ours}.{kind}") for kind in both}
        return layout

    @classmethod
    def diffusers_config(cls, tensors: Mapping[str, TensorInfo]) -> dict[str, Any] | None:
        """See `DiT.diffusers_config`."""
        first = "transformer_blocks.0"
        marks = ("x_embedder", "time_text_embed.timestep_embedder.linear_1", f"{first}.ff.net.0.proj", "proj_out")
        if any(f"{key}.weight" not in tensors for key in marks):
            return None
        width, _ = shape_of(tensors, "x_embedder.weight", 2)
        hidden, _ = shape_of(tensors, f"{first}.ff.net.0.proj.weight", 2)
        return {
            "hidden_size": width,
            "mlp_ratio": hidden / max(width, 1),
            "depth": count_blocks(tensors, "transformer_blocks"),
            "depth_single_blocks": count_blocks(tensors, "single_transformer_blocks"),
            "qkv_bias": f"{first}.attn.to_q.bias" in tensors or f"{first}.attn.to_qkv.bias" in tensors,
            "guidance_embed": "time_text_embed.guidance_embedder.linear_1.weight" in tensors,
        }

    def arguments(self) -> dict[str, Spec]:
        """See `DiT.arguments`."""
        return {
            "x": Argument(("B", self.channels, "H", "W")),
            "timestep": Argument(("B",), fp32=True),
            "context": Argument(("B", "L", self.context_width)),
            "y": Argument(("B", self.pooled_width), required=False),
            "guidance": Argument(("B",), required=self.guided, fp32=True),
            "ref_latents": Argument(("B", self.channels, "h", "w"), required=False, many=True),
            "ref_latents_method": Argument(None, required=False, choices=_METHODS, also=_METHODS_OF_OTHERS),
            "attention_mask": Argument(("B", "S", "S"), required=False, mask=True, shared=True),
            "rope_options": Numbers(_ROPE_OPTIONS),
            "rope_options_for": Argument(None, required=False, choices=_STRETCHED),
            "qk_norm_eps": Number(0.0, 0.01),
            "control": Residuals(
                self.width, {"input": len(self.double_blocks), "output": len(self.single_blocks), "middle": 0}
            ),
        }

    def lengths(self, arguments: Mapping[str, Any]) -> tuple[int, int]:
        """Tokens of the text, and of the image with its references. Raises `ArgumentError` for a mask of others."""
        images = [("x", arguments["x"]), *(("ref_latents", each) for each in arguments.get("ref_latents") or ())]
        text = arguments["context"].shape[1]
        image = sum(math.prod(grid(each, self.patch, name)) for name, each in images)
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

    def forward(  # type: ignore[override]
        self,
        sequence: SequenceParallel,
        x: Tensor,
        timestep: Tensor,
        *,
        context: Tensor,
        y: Tensor | None = None,
        guidance: Tensor | None = None,
        ref_latents: Sequence[Tensor] | None = None,
        ref_latents_method: str | None = None,
        attention_mask: Tensor | None = None,
        rope_options: Mapping[str, float] | None = None,
        rope_options_for: str | None = None,
        qk_norm_eps: float | None = None,
        control: Control | None = None,
        step_cache: StepCache | None = None,
    ) -> Tensor:
        """See `DiT.forward`. ``guidance`` is [B] in fp32, and not used by models that are not distilled for it.

        ``attention_mask`` [B or 1, S, S] is added to the scores over text and image. ``rope_options`` stretch and shift
        the positions of the image and its references, or of the image alone (``rope_options_for="image"``).
        ``qk_norm_eps`` is added to the mean square in the norms of queries and keys, 1e-6 by default.
        """
        images = (x, *(ref_latents or ()))
        lengths = self.lengths({"x": x, "context": context, "ref_latents": ref_latents})
        c = self._condition(x, timestep, y, guidance)
        image = self.img_in(sequence.shard(torch.cat([self._patchify(each) for each in images], dim=1)))
        text = self.txt_in(sequence.shard(context))

        stretched = 1 if rope_options_for == "image" else len(images)
        options = [(rope_options or {}) if i < stretched else {} for i in range(len(images))]
        image_at = self._image_positions(images, ref_latents_method or self.reference_method, options)
        text_at = image_at.new_zeros(lengths[0], len(self.axes))
        mine = [sequence.shard(positions, dim=0) for positions in (text_at, image_at)]
        rotation = self._rotation(torch.cat(mine))
        rotations = rotation.split([len(at) for at in mine])
        mask = None if attention_mask is None else sequence.in_order_of_ranks(attention_mask, lengths)
        control = control or Control({})
        epsilon = _QK_NORM_EPS if qk_norm_eps is None else qk_norm_eps

        *each, final = modulations(self.modulating, functional.silu(c), sequence)
        modulation = iter(each)

        def blocks() -> Iterator[Tensor]:
            streams = Residual(text), Residual(image)
            yield image
            for i, block in enumerate(self.double_blocks):
                now = next(modulation), next(modulation)
                streams = block(sequence, lengths, rotations, *streams, now, mask, epsilon)
                if control.find("input", i) is not None:
                    added = control.add("input", i, sequence, streams[1].tokens, lengths[1])
                    streams = streams[0], Residual(added)
                if i == 0:
                    yield streams[1].tokens
            tokens = Residual(torch.cat((streams[0].tokens, _finite(streams[1]).tokens), dim=1))
            for i, block in enumerate(self.single_blocks):
                tokens = block(sequence, lengths, rotation, tokens, next(modulation), mask, epsilon)
                if control.find("output", i) is not None:
                    tokens = Residual(control.add("output", i, sequence, tokens.tokens, lengths[1], text.shape[1]))
            yield tokens.tokens[:, text.shape[1] :]

        image = last_tokens(blocks(), sequence, step_cache)
        rows, columns = grid(x, self.patch)
        pixels = sequence.gather(self.final_layer(image, final), lengths[1])[:, : rows * columns]
        pixels = torch.unflatten(pixels, -1, (self.out_channels, self.patch, self.patch)).movedim(2, -1)
        return unpatchify(pixels, rows, columns, self.patch)[:, :, : x.shape[-2], : x.shape[-1]]

    @property
    def modulating(self) -> list[Any]:
        """See `DiT.modulating`."""
        blocks: tuple[Any, Any] = self.double_blocks, self.single_blocks
        double = [each.lin for block in blocks[0] for each in (block.txt_mod, block.img_mod)]
        single = [block.modulation.lin for block in blocks[1]]
        return [*double, *single, self.final_layer.adaLN_modulation[1]]

    def _condition(self, x: Tensor, timestep: Tensor, y: Tensor | None, guidance: Tensor | None) -> Tensor:
        c: Tensor = self.time_in(sinusoid(1000 * timestep.float()).to(x.dtype))
        if self.guided and guidance is not None:
            c = c + self.guidance_in(sinusoid(1000 * guidance.float()).to(x.dtype))
        pooled: Tensor = self.vector_in(x.new_zeros(len(x), self.pooled_width) if y is None else y)
        return c + pooled

    def _patchify(self, x: Tensor) -> Tensor:
        """A latent [B, C, H, W] as tokens [B, N, C * patch * patch]."""
        return functional.pixel_unshuffle(pad_to_patches(x, self.patch), self.patch).flatten(2).transpose(1, 2)

    def _image_positions(self, images: Sequence[Tensor], method: str, options: Sequence[Mapping[str, float]]) -> Tensor:
        """The (index, row, column) of each patch of the image and of its references: [N, 3] in fp32.

        ``options`` are the `_ROPE_OPTIONS` of each.
        """
        origins = [(0.0, 0, 0), *_reference_origins(images, method, self.patch, self.reference_index)]
        positions = []
        for image, (index, top, left), each in zip(images, origins, options, strict=True):
            rows, columns = grid(image, self.patch)
            down = _stretched(rows, each.get("scale_y", 1.0), top + each.get("shift_y", 0.0), image)
            across = _stretched(columns, each.get("scale_x", 1.0), left + each.get("shift_x", 0.0), image)
            place = torch.stack(torch.meshgrid(down, across, indexing="ij"), dim=-1).flatten(0, 1)
            positions.append(functional.pad(place, (1, 0), value=index + each.get("shift_t", 0.0)))
        return torch.cat(positions)

    def _rotation(self, positions: Tensor) -> Rotation:
        """The rotation of tokens at ``positions`` [S, axes]."""
        angles = []
        for axis, width in enumerate(self.axes):
            exponents = torch.arange(0, width, 2, device=positions.device, dtype=torch.float64) / width
            angles.append(positions[:, axis, None].double() * self.theta**-exponents)
        angle = torch.cat(angles, dim=-1)
        return Rotation(angle.cos().float(), angle.sin().float())


def _stretched(n: int, scale: float, shift: float, like: Tensor) -> Tensor:
    """Positions from ``shift`` on, ``scale`` apart."""
    if scale == 1.0:
        return torch.arange(n, device=like.device, dtype=torch.float32) + shift
    return torch.linspace(shift, (n - 1.0) * scale + shift, n, device=like.device, dtype=torch.float32)


def _reference_origins(images: Sequence[Tensor], method: str, patch: int, scale: float) -> list[tuple[float, int, int]]:
    """Where each reference lies beside the image: its index, and the row and column of its first patch.

    ``offset`` lays them out beside each other on a plane of their own, as Kontext was trained; ``index`` gives each
    its own plane; ``uxo`` goes on diagonally from the image's corner, in its plane.
    """
    rows, columns = grid(images[0], patch)
    origins: list[tuple[float, int, int]] = []
    tall, wide = (rows * patch, columns * patch) if method == "uxo" else (0, 0)
    for number, reference in enumerate(images[1:], start=1):
        height, width = reference.shape[-2:]
        if method == "index":
            origins.append((scale * number, 0, 0))
            continue
        top, left = tall, wide
        if method == "uxo":
            tall, wide = tall + height, wide + width
        else:
            below = height + tall <= width + wide
            top, left = (tall, 0) if below else (0, wide)
            tall, wide = max(tall, top + height), max(wide, left + width)
        origins.append((0.0 if method == "uxo" else 1.0, (top + patch // 2) // patch, (left + patch // 2) // patch))
    return origins


def _embedder(theirs: str, ours: str) -> dict[str, str]:
    """The layers of an `Embedder`: their names in diffusers and here."""
    prefix = f"time_text_embed.{theirs}_embedder.linear"
    return {f"{prefix}_1": f"{ours}.in_layer", f"{prefix}_2": f"{ours}.out_layer"}


def _mlp(width: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, width))


def _feed_forward(mlp: nn.Sequential, x: Tensor) -> Tensor:
    out: Tensor = mlp[2](linear_gelu(mlp[0], x))
    return out


def _finite(stream: Residual) -> Residual:
    """In fp16 Flux's residual stream overflows; the other dtypes have room."""
    if stream.dtype != torch.float16:
        return stream
    return Residual(torch.nan_to_num(stream.tokens, nan=0.0, posinf=65504, neginf=-65504))


def _check_config(config: Mapping[str, Any]) -> None:
    for key in ("global_modulation", "mlp_silu_act", "yak_mlp", "txt_norm"):
        settle(config, key, False)
    settle(config, "ops_bias", True)
    settle(config, "txt_ids_dims", [])


def _number(config: Mapping[str, Any], key: str, default: float) -> float:
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9:
        raise ModelUnsupported(f"config key {key!r} is {value!r:.80}; expected a number above 0")
    return float(value)


def _axes(config: Mapping[str, Any], width: int, heads: int) -> list[int]:
    if width % heads:
        raise ModelUnsupported(f"config key 'num_heads' is {heads}; it must divide 'hidden_size', which is {width}")
    axes = config.get("axes_dim")
    if not isinstance(axes, list) or len(axes) != 3 or any(type(n) is not int or n < 0 or n % 2 for n in axes):
        raise ModelUnsupported(f"config key 'axes_dim' is {axes!r:.80}; expected three even numbers")
    if sum(axes) != width // heads:
        raise ModelUnsupported(
            f"config key 'axes_dim' is {axes}, which sums to {sum(axes)}; it must sum to the width of a head, "
            f"which is {width // heads} ('hidden_size' {width} over 'num_heads' {heads})"
        )
    return axes

"""Kandinsky 5 (Kandinsky Lab, 2025, arXiv:2511.14993): Lite and Pro for video, and Lite for images.

Parameters are named as in the authors' files (kandinskylab/kandinsky-5, MIT), and so are they in diffusers.
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
from tacod.rank.families.config import count_blocks, fixed, integer, numbers, rope_axes, shape_of
from tacod.rank.families.inputs import Argument, Number, Numbers, Spec, Unread
from tacod.rank.families.latents import FLUX, HUNYUAN_VIDEO
from tacod.rank.families.names import Names
from tacod.rank.families.noise import Flow
from tacod.rank.families.stream import ForwardPass
from tacod.rank.ops.fused import Residual
from tacod.rank.ops.norm import Norm
from tacod.rank.ops.qkv import Rotation
from tacod_client.errors import ArgumentError, ModelUnsupported

__all__ = ["Kandinsky5"]

_PATCH = (1, 2, 2)
_THETA = 10000.0
_NORM = Norm("layer", 1e-5)
_EPSILON = torch.finfo(torch.float32).eps
_PRO_WIDTH = 4096
_LARGE = 14080
"""Cells of a frame from which on Pro's positions are closer to each other."""
_LARGE_FACTORS = (1.0, 3.16, 3.16)


class TextEmbedder(nn.Module):
    """A linear layer and a layer norm."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.in_layer = nn.Linear(inputs, width)
        self.norm = nn.LayerNorm(width, _NORM.epsilon)

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] to [..., width]."""
        embedded: Tensor = self.norm(self.in_layer(x))
        return embedded


class _Block(nn.Module):
    """Self-attention and feed-forward, which the text's blocks and the video's have."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.self_attention = kit.SelfAttention(
            width,
            heads,
            layers=("to_query", "to_key", "to_value"),
            out="out_layer",
            norm="head",
            norms=("query_norm.weight", "key_norm.weight"),
        )
        self.feed_forward = kit.MLP(width, hidden, ("in_layer", "out_layer"), "gelu_exact", bias=False)


class TextBlock(_Block):
    """A text, which every rank has whole, attends to itself."""

    def __init__(self, width: int, heads: int, hidden: int, time: int) -> None:
        super().__init__(width, heads, hidden)
        self.text_modulation = kit.Modulation(time, 6 * width, "out_layer")

    def forward(self, f: ForwardPass, text: Residual, rotation: Rotation) -> None:
        """A text one block further."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = f.modulation(self.text_modulation.linear, 6)
        normed = text.normed(shift, scale, norm=_NORM)
        attended = self.self_attention.attend_whole(normed, rotation, f.epsilon)
        text.add(gate, self.self_attention.project(attended))
        text.add(mlp_gate, self.feed_forward(text.normed(mlp_shift, mlp_scale, norm=_NORM)))


class VisualBlock(_Block):
    """Self-attention over the video, cross-attention to the text, GELU."""

    def __init__(self, width: int, heads: int, hidden: int, time: int) -> None:
        super().__init__(width, heads, hidden)
        self.visual_modulation = kit.Modulation(time, 9 * width, "out_layer")
        self.cross_attention = kit.CrossAttention(
            width,
            heads,
            q="to_query",
            kv=(("to_key", "to_value"),),
            out="out_layer",
            norm="head",
            norms=("query_norm.weight", "key_norm.weight"),
        )

    def forward(self, f: ForwardPass) -> None:
        """The video one block further."""
        parts = f.modulation(self.visual_modulation.linear, 9)
        normed = f.image.normed(*parts[:2], norm=_NORM)
        (attended,) = f.attend((f.image, lambda: self.self_attention(normed, f.image.rotation, f.epsilon))).wait()
        f.image.add(parts[2], self.self_attention.project(attended))
        normed = f.image.normed(*parts[3:5], norm=_NORM)
        f.image.add(parts[5], self.cross_attention(normed, f.text, epsilon=f.epsilon))
        f.image.add(parts[8], self.feed_forward(f.image.normed(*parts[6:8], norm=_NORM)))


class OutLayer(nn.Module):
    """Tokens to the latents of their patches."""

    def __init__(self, width: int, time: int, outputs: int) -> None:
        super().__init__()
        self.modulation = kit.Modulation(time, 2 * width, "out_layer")
        self.out_layer = nn.Linear(width, outputs)

    def forward(self, f: ForwardPass) -> Tensor:
        """The patches of all tokens of all ranks, [B, N, outputs]."""
        shift, scale = f.modulation(self.modulation.linear, 2)
        return f.gather(f.image, self.out_layer(f.image.normed(shift, scale, norm=_NORM)))


class Kandinsky5(DiT):
    """Text and image to video, and text to image.

    ``config`` is ComfyUI's ``unet_config``, and what its class has besides: ``in_text_dim``, ``in_text_dim2``,
    ``out_visual_dim``. Raises `ModelUnsupported`, naming the key, for a configuration that can't be.
    """

    family: ClassVar[str] = "kandinsky5"
    title = "Kandinsky 5"
    models = ("Lite T2V and I2V", "Pro T2V and I2V", "Lite T2I")
    lora_marks = r"(visual|text)_transformer_blocks[._]\d+[._]((self|cross)_attention|feed_forward)[._](to|in|out)_"
    tiny: ClassVar[Mapping[str, Any]] = {
        "image_model": "kandinsky5",
        "model_dim": 48,
        "time_dim": 32,
        "ff_dim": 80,
        "visual_embed_dim": 36,
        "out_visual_dim": 4,
        "in_text_dim": 16,
        "in_text_dim2": 16,
        "num_text_blocks": 1,
        "num_visual_blocks": 2,
        "axes_dims": [4, 6, 6],
    }
    diffusers: ClassVar[Mapping[str, Any]] = {
        "Kandinsky5Transformer3DModel": lambda c: {
            "axes_dims": c.items("axes_dims", (16, 24, 24)),
            "num_text_blocks": c.whole("num_text_blocks", 2),
            "num_visual_blocks": c.whole("num_visual_blocks", 32),
            "patch_size": c.items("patch_size", _PATCH),
        }
    }
    usual: ClassVar[Mapping[str, int]] = {"B": 1, "T": 3, "H": 64, "W": 96, "L": 256}
    image_models: ClassVar[tuple[str, ...]] = ("kandinsky5",)
    process = Flow()
    names = Names("""
        time_embeddings.{in,out}_layer
        {text,pooled_text}_embeddings.{in_layer,norm}
        visual_embeddings.in_layer
        out_layer.modulation.out_layer
        out_layer.out_layer
        text_transformer_blocks.*.text_modulation.out_layer
        text_transformer_blocks.*.self_attention.{to_query,to_key,to_value,query_norm,key_norm,out_layer}
        text_transformer_blocks.*.feed_forward.{in,out}_layer
        visual_transformer_blocks.*.visual_modulation.out_layer
        visual_transformer_blocks.*.self_attention.{to_query,to_key,to_value,query_norm,key_norm,out_layer}
        visual_transformer_blocks.*.cross_attention.{to_query,to_key,to_value,query_norm,key_norm,out_layer}
        visual_transformer_blocks.*.feed_forward.{in,out}_layer
    """)

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        fixed(config, patch_size=list(_PATCH))
        self.width = width = integer(config, "model_dim", 1792)
        self.axes = rope_axes({"axes_dims": [16, 24, 24], **config}, "axes_dims", 3)
        if not sum(self.axes) or width % sum(self.axes):
            raise ModelUnsupported(
                f"config key 'axes_dims' is {self.axes}; its sum, the width of a head, must divide 'model_dim', which "
                f"is {width}"
            )
        self.heads = heads = width // sum(self.axes)
        self.factors = numbers(config, "rope_scale_factor", (1.0, 2.0, 2.0))
        inputs = integer(config, "visual_embed_dim", 132)
        if inputs % 4:
            raise ModelUnsupported(
                f"config key 'visual_embed_dim' is {inputs}; it must be a multiple of 4, the numbers of a patch for "
                "each channel"
            )
        self.channels, self.out_channels = inputs // 4, integer(config, "out_visual_dim", 16)
        self.is_image = self.channels == self.out_channels
        """Whether it makes images: latents of videos come with others that are given, and a mask."""
        self.latent_format = FLUX if self.is_image else HUNYUAN_VIDEO
        self.context_width = integer(config, "in_text_dim", 3584)
        self.pooled_width = integer(config, "in_text_dim2", 768)
        time, hidden = integer(config, "time_dim", 512), integer(config, "ff_dim", 7168)

        self.time_embeddings = kit.MLPEmbedder(width, time, ("in_layer", "out_layer"))
        self.text_embeddings = TextEmbedder(self.context_width, width)
        self.pooled_text_embeddings = TextEmbedder(self.pooled_width, time)
        self.visual_embeddings = nn.ModuleDict({"in_layer": nn.Linear(inputs, width)})
        self.text_transformer_blocks = nn.ModuleList(
            TextBlock(width, heads, hidden, time) for _ in range(integer(config, "num_text_blocks", 2, least=0))
        )
        self.visual_transformer_blocks = nn.ModuleList(
            VisualBlock(width, heads, hidden, time) for _ in range(integer(config, "num_visual_blocks", 32))
        )
        self.out_layer = OutLayer(width, time, 4 * self.out_channels)

    @classmethod
    def detect(cls, tensors: Mapping[str, TensorInfo]) -> dict[str, Any] | None:
        """See `DiT.detect`. How positions turn and are stretched is told by the width of the model."""
        if "visual_transformer_blocks.0.cross_attention.key_norm.weight" not in tensors:
            return None
        width, inputs = shape_of(tensors, "visual_embeddings.in_layer.weight", 2)
        return {
            "image_model": "kandinsky5",
            "model_dim": width,
            "axes_dims": [32, 48, 48] if width in (_PRO_WIDTH, 2560) else [16, 24, 24],
            **({"rope_scale_factor": [1.0, 1.0, 1.0]} if width == 2560 else {}),
            "time_dim": shape_of(tensors, "time_embeddings.in_layer.bias", 1)[0],
            "ff_dim": shape_of(tensors, "visual_transformer_blocks.0.feed_forward.in_layer.weight", 2)[0],
            "visual_embed_dim": inputs,
            "out_visual_dim": shape_of(tensors, "out_layer.out_layer.weight", 2)[0] // 4,
            "in_text_dim": shape_of(tensors, "text_embeddings.in_layer.weight", 2)[1],
            "in_text_dim2": shape_of(tensors, "pooled_text_embeddings.in_layer.weight", 2)[1],
            "num_text_blocks": count_blocks(tensors, "text_transformer_blocks"),
            "num_visual_blocks": count_blocks(tensors, "visual_transformer_blocks"),
        }

    def arguments(self) -> dict[str, Spec]:
        """See `DiT.arguments`.

        ``y`` is the pooled text. ``time_dim_replace`` takes the place of the first channels of the first frames.
        ``qk_norm_eps`` is added to the mean square in the norms of queries and keys.
        """
        sides = ("H", "W") if self.is_image else ("T", "H", "W")
        given = Argument(("B", self.out_channels, "R", "H", "W"), required=False, shared=True)
        return {
            "x": Argument(("B", self.channels, *sides)),
            "timestep": Argument(("B",), fp32=True),
            "context": Argument(("B", "L", self.context_width)),
            "y": Argument(("B", self.pooled_width)),
            "time_dim_replace": given,
            "rope_options": Numbers(kit.ROPE_OPTIONS),
            "qk_norm_eps": Number(0.0, 0.01),
            "attention_mask": Unread(),
            "control": Unread(),
        }

    def lengths(self, arguments: Mapping[str, Any]) -> tuple[int, ...]:
        """See `DiT.lengths`. The text is whole on every rank, so it is no stream."""
        frames, height, width = self._sides(arguments["x"])
        if height % 2 or width % 2:
            raise ArgumentError(
                f"x: its latents are {height} by {width}; both must be even, so make both sides multiples of 16 pixels",
                argument="x",
            )
        given = arguments.get("time_dim_replace")
        if given is not None and given.shape[2] > frames:
            raise ArgumentError(
                f"time_dim_replace: it has {given.shape[2]} frames and x has {frames}; give no more than x has",
                argument="time_dim_replace",
            )
        return (frames * height // 2 * width // 2,)

    def timestep(self, sigma: Tensor) -> Tensor:
        """See `DiT.timestep`."""
        return sigma * 1000

    def begin(self, f: ForwardPass, **arguments: Any) -> None:
        """See `DiT.begin`."""
        x, context = arguments["x"], arguments["context"]
        f.epsilon = arguments.get("qk_norm_eps", _EPSILON)
        times = self.time_embeddings.numbers(arguments["timestep"], x.dtype, self.width)
        f.modulate(self.modulating, functional.silu(times + self.pooled_text_embeddings(arguments["y"])))

        text = Residual(self.text_embeddings(context))
        places = torch.arange(context.shape[1], device=x.device)[:, None]
        rotation = kit.rope(places, (sum(self.axes),), _THETA)
        for block in self.text_transformer_blocks:
            block(f, text, rotation)
        f.text = text.tokens

        video = x.unsqueeze(2) if self.is_image else x
        given = arguments.get("time_dim_replace")
        if given is not None:
            video = video.clone()
            video[:, : given.shape[1], : given.shape[2]] = given
        f.grid = grid = kit.Grid(video, _PATCH)
        positions = self._positions(grid, arguments.get("rope_options"), x.device)
        f.image = f.shard(
            grid.patches(video, channels_last=True),
            self.visual_embeddings["in_layer"],
            lambda shard: kit.rope(shard(positions), self.axes, _THETA),
        )

    @property
    def trunk(self) -> Sequence[Any]:
        """See `DiT.trunk`."""
        return list(self.visual_transformer_blocks)

    def end(self, f: ForwardPass) -> Tensor:
        """See `DiT.end`."""
        latent: Tensor = f.grid.latent(self.out_layer(f))
        return latent.squeeze(2) if self.is_image else latent

    def _sides(self, x: Tensor) -> tuple[int, int, int]:
        """Frames, rows and columns of a latent."""
        *frames, height, width = x.shape[2:]
        return frames[0] if frames else 1, height, width

    def _positions(self, grid: kit.Grid, options: Mapping[str, float] | None, device: torch.device) -> Tensor:
        """The (frame, row, column) of each patch, [N, 3] in fp32: as the options say, or closer by a factor."""
        if options is not None:
            return grid.positions(*kit.origin_and_scale(options), device)
        large = self.width == _PRO_WIDTH and grid.sides[1] * grid.sides[2] >= _LARGE
        return grid.positions(scale=[1 / each for each in (_LARGE_FACTORS if large else self.factors)], device=device)

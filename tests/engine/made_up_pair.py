"""A made-up family of two latents, video and sound, each with a stream of its own in one attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from tacod.checkpoint import TensorInfo
from tacod.rank.families import kit
from tacod.rank.families.base import DiT, LatentFormat, Output
from tacod.rank.families.config import integer, width_of_heads
from tacod.rank.families.inputs import Argument, Spec
from tacod.rank.families.noise import Flow
from tacod.rank.families.stream import ForwardPass
from tacod_client.errors import ArgumentError


class Half(nn.Module):
    """One stream's part of a block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.modulation = kit.Modulation(width, 2 * width)
        self.attn = kit.SelfAttention(width, heads, norm="layer")
        self.fc1, self.fc2 = nn.Linear(width, width), nn.Linear(width, width)


class Block(nn.Module):
    """Sound and video, which attend to both."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.sound, self.video = Half(width, heads), Half(width, heads)

    def forward(self, f: ForwardPass) -> None:
        """Both one block further."""
        streams = (self.sound, f.sound), (self.video, f.image)
        parts = [f.modulation(half.modulation.linear, 2) for half, _ in streams]
        attended = f.attend(
            (f.sound, lambda: self.sound.attn(f.sound.normed(*parts[0]))),
            (f.image, lambda: self.video.attn(f.image.normed(*parts[1]))),
        ).wait()
        for (half, stream), mine in zip(streams, attended, strict=True):
            stream.add(None, half.attn.project(mine))
            stream.add(None, kit.feed_forward(half.fc1, half.fc2, stream.normed(), "silu"))


class Pair(DiT):
    """``config`` is ComfyUI's ``unet_config``."""

    family: ClassVar[str] = "made_up_pair"
    title = "Made-up Pair"
    models = ("tiny",)
    image_models: ClassVar[tuple[str, ...]] = ("made_up_pair",)
    usual: ClassVar[Mapping[str, int]] = {"B": 1, "T": 2, "H": 16, "W": 16, "S": 9, "L": 8}
    process = Flow()
    latent_format = LatentFormat(0.5, (0.1, 0.2, 0.3, 0.4)), LatentFormat(2.0, 0.0)
    channels, sound_channels = 4, 3

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.width, self.heads = width_of_heads(config, "dim", "num_heads")
        self.out_channels = self.channels
        self.patch_embed = kit.PatchEmbed(self.channels, (1, 2, 2), self.width)
        self.sound_in = nn.Linear(self.sound_channels * 4, self.width)
        self.time_in = kit.MLPEmbedder(256, self.width)
        self.text_in = nn.Linear(integer(config, "text_dim"), self.width)
        self.blocks = nn.ModuleList(Block(self.width, self.heads) for _ in range(integer(config, "num_layers")))
        self.video_out = nn.Linear(self.width, 4 * self.channels)
        self.sound_out = nn.Linear(self.width, 4 * self.sound_channels)

    @classmethod
    def detect(cls, tensors: Mapping[str, TensorInfo]) -> dict[str, Any] | None:
        """See `DiT.detect`; the configuration has to be told."""
        return None

    def arguments(self) -> dict[str, Spec]:
        """See `DiT.arguments`: ``x`` is a list of a video and a sound of S steps of 4 bands.

        Each has a timestep of its own, for all of its tokens or for each. A mask is as large as its latent.
        """
        sound = ("B", self.sound_channels, "S", 4)
        return {
            "x": Argument(("B", self.channels, "T", "H", "W"), many=True, others=(sound,)),
            "timestep": Argument(("B",), fp32=True, many=True, others=(("B",),), per=("N", 1)),
            "context": Argument(("B", "L", self.text_in.in_features)),
            "denoise_mask": Argument(("B", "C", "T", "H", "W"), required=False, shared=True),
            "audio_denoise_mask": Argument(("B", "D", "S", 4), required=False, shared=True),
        }

    def _grids(self, x: Sequence[Any]) -> tuple[kit.Grid, kit.Grid]:
        return kit.Grid(x[0], (1, 2, 2)), kit.Grid(x[1], (1, 4))

    def lengths(self, arguments: Mapping[str, Any]) -> tuple[int, ...]:
        """See `DiT.lengths`."""
        video, sound = self._grids(arguments["x"])
        for name, latent in zip(("denoise_mask", "audio_denoise_mask"), arguments["x"], strict=True):
            mask = arguments.get(name)
            if mask is not None and mask.shape[2:] != latent.shape[2:]:
                raise ArgumentError(f"{name}: expected the latent's sides, {list(latent.shape[2:])}", argument=name)
        return sound.length, video.length

    def output_shapes(self, latents: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """See `DiT.output_shapes`: as the latents have it."""
        return list(latents)

    def timestep(self, sigma: Tensor) -> Tensor:
        """See `DiT.timestep`."""
        return sigma

    def begin(self, f: ForwardPass, **arguments: Any) -> None:
        """See `DiT.begin`."""
        x = list(arguments["x"])
        f.grids = grids = self._grids(x)
        for index, name in enumerate(("denoise_mask", "audio_denoise_mask")):
            if arguments.get(name) is not None:
                x[index] = x[index] * (1 + arguments[name][:, :1])
        streams, text = [], self.text_in(arguments["context"].mean(dim=1))[:, None]
        parts = ("video", self.patch_embed), ("sound", self.sound_in)
        for latent, grid, timestep, (name, embed) in zip(x, grids, arguments["timestep"], parts, strict=True):
            rows = timestep.flatten(1) if timestep.ndim > 1 else timestep[:, None]
            conditioning = self.time_in.numbers(1000 * rows, latent.dtype) + text
            layers = [getattr(block, name).modulation.linear for block in self.blocks]
            f.modulate(layers, functional.silu(conditioning))
            segments = torch.arange(grid.length, device=latent.device) if rows.shape[1] > 1 else None
            streams.append(f.shard(grid.patches(latent), embed, segments=segments))
        f.image, f.sound = streams
        f.outputs = f.image, f.sound

    @property
    def trunk(self) -> Sequence[Any]:
        """See `DiT.trunk`."""
        return list(self.blocks)

    def end(self, f: ForwardPass) -> Output:
        """See `DiT.end`."""
        video, sound = f.grids
        return [
            video.latent(f.gather(f.image, self.video_out(f.image.normed()))),
            sound.latent(f.gather(f.sound, self.sound_out(f.sound.normed()))),
        ]

"""Chroma Radiance (Lodestone Rock, 2025): Chroma with pixels in place of latents.

Its tokens end in a network for each patch that the patch's token gives the weights of, after PixNerd (Wang et al.,
2025, arXiv:2507.23268). Parameters are named as in the authors' files (lodestone-rock/flow, Apache-2.0).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from tacod.checkpoint import TensorInfo
from tacod.rank.families.base import LatentFormat
from tacod.rank.families.chroma import Chroma, rms_norm
from tacod.rank.families.config import choice, count_blocks, fixed, integer, shape_of
from tacod.rank.families.kit.attention import find, register
from tacod.rank.families.names import Names
from tacod.rank.families.stream import ForwardPass
from tacod.rank.ops.largest import sharing
from tacod.rank.ops.linear import linear_fp32
from tacod_client.errors import ArgumentError

__all__ = ["ChromaRadiance"]

_TILE = 512
"""Patches whose weights are in memory at once: at the published size 100 kB each, for each layer."""


class PixelBlock(nn.Module):
    """A gated feed-forward on the pixels of each patch, with weights that the patch's token makes."""

    def __init__(self, width: int, channels: int, ratio: int) -> None:
        super().__init__()
        self.param_generator = nn.Linear(width, 3 * channels**2 * ratio)
        register(self, "norm.scale", nn.Parameter(torch.ones(channels)))

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        """Pixels ``x`` [N, pixels, channels] in fp32 of the patches of ``tokens`` [N, width], one block further."""
        first, gate, second = self.param_generator(tokens).chunk(3, dim=-1)

        def multiply(x: Tensor, numbers: Tensor) -> Tensor:
            """By a matrix whose columns have length 1; what they are divided by is taken from the product."""
            matrix = torch.unflatten(numbers, -1, (x.shape[-1], -1))
            lengths = matrix.float().norm(dim=1, keepdim=True).clamp_min(1e-12)
            product: Tensor = torch.bmm(x.to(tokens.dtype), matrix).float() / lengths
            return product

        normed = rms_norm(x, find(self, "norm.scale"))
        added: Tensor = multiply(functional.silu(multiply(normed, first)) * multiply(normed, gate), second)
        return x + added


class ChromaRadiance(Chroma):
    """Chroma Radiance, of 16 by 16 pixels a token.

    Its last convolution needs the border pixels of neighbouring patches, so each rank computes what its patches add to
    their surroundings, and all is added up when it is gathered. Pixels are fp32 between the matrices: what a token's
    rounding costs is multiplied here.
    """

    family: ClassVar[str] = "chroma_radiance"
    title = "Chroma Radiance"
    models = ("Radiance", "Radiance x0")
    tiny: ClassVar[Mapping[str, Any]] = {
        **Chroma.tiny,
        "image_model": "chroma_radiance",
        "in_channels": 3,
        "out_channels": 3,
        "patch_size": 4,
        "nerf_hidden_size": 8,
        "nerf_mlp_ratio": 2,
        "nerf_depth": 2,
        "nerf_max_freqs": 4,
        "nerf_final_head_type": "conv",
    }
    diffusers: ClassVar[Mapping[str, Any]] = {}
    usual: ClassVar[Mapping[str, int]] = {"B": 2, "H": 1024, "W": 1024, "L": 256}
    downscale = 1
    image_models: ClassVar[tuple[str, ...]] = ("chroma_radiance",)
    latent_format = LatentFormat(1.0, 0.0)
    names = Names("")

    def make_ends(self, config: Mapping[str, Any]) -> None:
        """See `Chroma.make_ends`."""
        self.channels = self.out_channels = integer(config, "in_channels")
        fixed(config, out_channels=self.channels, nerf_embedder_dtype="float32")
        channels, self.frequencies = integer(config, "nerf_hidden_size", 64), integer(config, "nerf_max_freqs", 8)
        ratio, depth = integer(config, "nerf_mlp_ratio", 4), integer(config, "nerf_depth", 4, most=1024)
        self._convolves: bool = choice(config, "nerf_final_head_type", "conv", "linear") == "conv"
        self.predicts_clean: bool = choice(config, "use_x0", False, True)
        sequential: bool = choice(config, "use_sequential_txt_ids", False, True)
        self.text_axes = [0] if sequential else []
        for name, told in (("__x0__", self.predicts_clean), ("__sequential__", sequential)):
            if told:
                # What files say by it stands in the configuration.
                self.register_buffer(name, torch.empty(0))
        self.img_in_patch = nn.Conv2d(self.channels, self.width, self.patch, stride=self.patch)
        embedder = nn.Linear(self.channels + self.frequencies**2, channels)
        register(self, "nerf_image_embedder.embedder.0", embedder)
        self.nerf_blocks = nn.ModuleList(PixelBlock(self.width, channels, ratio) for _ in range(depth))
        last = nn.Conv2d(channels, self.channels, 3) if self._convolves else nn.Linear(channels, self.channels)
        self._last = "nerf_final_layer_conv.conv" if self._convolves else "nerf_final_layer.linear"
        self._last_norm = self._last.rpartition(".")[0] + ".norm.scale"
        register(self, self._last_norm, nn.Parameter(torch.ones(channels)))
        register(self, self._last, last)

    @classmethod
    def detect(cls, tensors: Mapping[str, TensorInfo]) -> dict[str, Any] | None:
        """See `DiT.detect`."""
        if "nerf_blocks.0.norm.scale" not in tensors:
            return None
        _, channels, _, patch = shape_of(tensors, "img_in_patch.weight", 4)
        hidden, inputs = shape_of(tensors, "nerf_image_embedder.embedder.0.weight", 2)
        generated, _ = shape_of(tensors, "nerf_blocks.0.param_generator.weight", 2)
        return cls.detect_trunk(
            tensors,
            image_model="chroma_radiance",
            in_channels=channels,
            out_channels=channels,
            patch_size=patch,
            nerf_hidden_size=hidden,
            nerf_mlp_ratio=generated // max(3 * hidden**2, 1),
            nerf_depth=count_blocks(tensors, "nerf_blocks"),
            nerf_max_freqs=round(max(inputs - channels, 0) ** 0.5),
            nerf_tile_size=512,
            nerf_final_head_type="conv" if "nerf_final_layer_conv.norm.scale" in tensors else "linear",
            nerf_embedder_dtype="float32",
            use_x0="__x0__" in tensors,
            use_sequential_txt_ids="__sequential__" in tensors,
        )

    def lengths(self, arguments: Mapping[str, Any]) -> tuple[int, int]:
        """See `Flux.lengths`; a model of clean images takes whole patches alone, and the others fill up the last."""
        rows, columns = arguments["x"].shape[2:]
        if self.predicts_clean and (rows % self.patch or columns % self.patch):
            raise ArgumentError(
                f"x: it is {rows} by {columns}; this model (x0) takes multiples of {self.patch}", argument="x"
            )
        return super().lengths(arguments)

    def begin(self, f: ForwardPass, **arguments: Any) -> None:
        """See `DiT.begin`."""
        super().begin(f, **arguments)
        f.x, f.timestep = arguments["x"], arguments["timestep"]

    def embed_patches(self, patches: Tensor) -> Tensor:
        """See `Flux.embed_patches`."""
        return functional.linear(patches, self.img_in_patch.weight.flatten(1), self.img_in_patch.bias)

    def end(self, f: ForwardPass) -> Tensor:
        """See `DiT.end`."""
        last, pixels = find(self, self._last), f.sequence.shard(f.grid.patches(f.x))
        # A convolution of 3 by 3 reaches one pixel beyond the patch on each side.
        reach = 1 if self._convolves else 0

        def project(x: Tensor) -> Tensor:
            """The last layer's output for pixels [N, pixels, channels]: [N, channels, rows, columns]."""
            sides = (self.patch, self.patch)
            if not self._convolves:
                return torch.unflatten(linear_fp32(last, x).mT, 2, sides)
            return functional.conv2d(torch.unflatten(x.mT, 2, sides), last.weight.float(), padding=2 * reach)

        # A tile is of one image, whose ranks all have a part of it, or nothing.
        with sharing(f.sequence.whole.maximum):
            parts = [project(self._pixels(*tile)).flatten(1) for tile in _tiles(f, f.image.tokens, pixels)]
        patches = f.gather(f.image, torch.unflatten(torch.cat(parts), 0, pixels.shape[:2]))
        size = tuple(count * self.patch for count in f.grid.counts)
        out = functional.fold(patches.mT, size, self.patch + 2 * reach, padding=reach, stride=self.patch)
        rows, columns = f.grid.sides
        out = out[:, :, :rows, :columns]
        if self._convolves:
            # What reaches into a patch from its neighbours has been added up now.
            out = out + last.bias.float()[:, None, None]
        if self.predicts_clean:
            out = (f.x - out) / f.timestep[:, None, None, None]
        image: Tensor = out.to(f.x.dtype)
        return image

    def _pixels(self, tokens: Tensor, patches: Tensor) -> Tensor:
        """The last layer's input, fp32 [N, pixels, channels], for patches [N, C * patch] and their tokens."""
        waves = _cosines(self.patch, self.frequencies, tokens.device).expand(len(tokens), -1, -1)
        x = torch.cat((torch.unflatten(patches, 1, (self.channels, -1)).mT.float(), waves), dim=-1)
        x = linear_fp32(find(self, "nerf_image_embedder.embedder.0"), x)
        for block in self.nerf_blocks:
            x = block(x, tokens)
        return rms_norm(x, find(self, self._last_norm))


def _tiles(f: ForwardPass, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """What this rank has, [B, S, ...] each, as [patches, ...] of a part of an image at a time.

    These parts are alike on all ranks, as their layers' scales are; a rank may have no patches of one.
    """
    count = sum(f.image.lengths)
    begin, end = f.sequence.place(count)
    for images in zip(*tensors, strict=True):
        for start in range(0, count, _TILE):
            first, last = (min(max(at, begin), end) - begin for at in (start, start + _TILE))
            yield tuple(image[first:last] for image in images)


@functools.cache
def _cosines(side: int, count: int, device: torch.device) -> Tensor:
    """Products of cosines along a patch's columns and rows, the high ones damped: fp32 [side * side, count * count]."""
    waves, places = torch.arange(count, dtype=torch.float32), torch.linspace(0, 1, side)
    line = torch.cos(places[:, None] * waves * torch.pi)
    products = line[None, :, :, None] * line[:, None, None, :] / (1 + waves[:, None] * waves)
    return products.reshape(side**2, count**2).to(device)

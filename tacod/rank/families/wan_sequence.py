"""What stands in the sequence of Wan's forwards: references, the video, videos beside it, and poses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tacod.rank.families import kit
from tacod.rank.families.wan_files import POSED
from tacod.rank.families.wan_parts import PATCH, PIXELS, embed_patches
from tacod.rank.families.wan_scail import check_masks
from tacod.rank.ops.qkv import Rotation
from tacod_client.errors import ArgumentError

__all__ = [
    "Place",
    "Video",
    "check_fits",
    "embed_videos",
    "frames_before",
    "list_places",
    "list_videos",
    "rotate",
    "video_grid",
]

_THETA = 10000.0
_APART = 120.0
"""How far SCAIL's references, or poses, are moved away from the video, in tokens."""


@dataclass(frozen=True)
class Video:
    """Latents [B, C, T, H, W], or of one frame [B, C, H, W], that a convolution makes tokens of, in their order."""

    latents: Tensor
    layer: Any
    mask: Tensor | None = None
    """Latents of the same sides, whose tokens by ``mask_layer`` are added."""
    mask_layer: Any = None
    rounded: bool = False
    """Whether the layer computes in the latents' dtype, not in fp32."""

    @property
    def length(self) -> int:
        """How many tokens there are."""
        return kit.Grid(self.latents, PATCH[-self.latents.ndim + 2 :]).length

    def tokens(self, first: int, last: int) -> Tensor:
        """Some tokens, [B, last - first, width]."""
        grid = kit.Grid(self.latents, PATCH[-self.latents.ndim + 2 :])
        patches = grid.patches(self.latents)[:, first:last]
        if self.rounded:
            return functional.linear(patches, self.layer.weight.flatten(1), self.layer.bias)
        tokens = embed_patches(self.layer, patches)
        if self.mask is not None:
            tokens = tokens + embed_patches(self.mask_layer, grid.patches(self.mask)[:, first:last])
        return tokens


def embed_videos(videos: Sequence[Video], first: int, last: int) -> Tensor:
    """Tokens ``first`` to ``last`` of videos one behind the other, [B, last - first, width]."""
    parts, begin = [], 0
    for video in videos:
        end = begin + video.length
        parts.append(video.tokens(*(min(max(place - begin, 0), end - begin) for place in (first, last))))
        begin = end
    return torch.cat(parts, dim=1)


@dataclass(frozen=True)
class Place:
    """Where the tokens of a grid are: from ``origin`` on (frame, row, column), ``scale`` apart."""

    grid: kit.Grid
    origin: Sequence[float] = (0.0, 0.0, 0.0)
    scale: Sequence[float] = (1.0, 1.0, 1.0)
    source: int = 0
    """Which of the videos beside ``x`` it is, from 1 on; they are turned once more, by this number."""


def rotate(
    places: Sequence[Place], axes: Sequence[int], shard: Callable[[Tensor], Tensor], device: torch.device
) -> Rotation:
    """The rotation of this rank's tokens of what lies at these places."""
    positions = [place.grid.positions(place.origin, place.scale, device) for place in places]
    turned = kit.rope(shard(torch.cat(positions)), axes, _THETA)
    if not any(place.source for place in places):
        return turned
    sources = [each.new_full((len(each), 1), place.source) for each, place in zip(positions, places, strict=True)]
    other = kit.rope(shard(torch.cat(sources)), (sum(axes),), _THETA)
    return Rotation(turned.cos * other.cos - turned.sin * other.sin, turned.sin * other.cos + turned.cos * other.sin)


def frames_before(arguments: Mapping[str, Any]) -> int:
    """Frames of references, which stand before the video."""
    reference = arguments.get("reference_latent")
    return 0 if reference is None else reference.shape[2] if len(reference.shape) == 5 else 1


def video_grid(arguments: Mapping[str, Any], before: int = 0) -> kit.Grid:
    """Of the video with the frames behind it, and so many frames before it."""
    frames, *sides = arguments["x"].shape[2:]
    if "time_dim_concat" in arguments:
        frames += arguments["time_dim_concat"].shape[2]
    return _grid(before + frames, sides)


def list_videos(model: Any, arguments: Mapping[str, Any]) -> list[Video]:
    """Everything that tokens are made of, in order, with the layers of a `Wan` that make them."""
    video = [arguments[name] for name in ("x", "time_dim_concat") if name in arguments]
    reference = arguments.get("reference_latent")
    if model.kind not in POSED:
        beside = arguments.get("context_latents", ())
        videos = [Video(each, model.patch_embedding) for each in (torch.cat(video, 2), *beside)]
        return videos if reference is None else [Video(reference, model.ref_conv, rounded=True), *videos]
    video = video if reference is None else [reference, *video]
    masks = arguments.get("ref_mask_latents"), model.patch_embedding_mask
    videos = [Video(torch.cat(video, 2), model.patch_embedding, *masks)]
    if "pose_latents" in arguments:
        masks = arguments.get("sam_latents"), model.patch_embedding_mask
        videos.append(Video(arguments["pose_latents"], model.patch_embedding_pose, *masks))
    return videos


def list_places(arguments: Mapping[str, Any], kind: str) -> list[Place]:
    """Where everything is that tokens are made of, in the same order, for a kind of `Wan`; it looks at shapes only."""
    origin, scale = kit.origin_and_scale(arguments.get("rope_options", {}))
    video = video_grid(arguments, frames_before(arguments))
    if kind in POSED:
        return _place_poses(video, origin, scale, arguments)
    beside = [kit.Grid(each, PATCH, "context_latents") for each in arguments.get("context_latents", ())]
    return [Place(each, origin, scale, number) for number, each in enumerate((video, *beside))]


def check_fits(arguments: Mapping[str, Any], kind: str, downscale: int, most_clip: float) -> None:
    """Raise `ArgumentError` for what ComfyUI's network of this kind has no place for.

    Args:
        arguments: Of a forward; only their shapes matter.
        kind: Of `Wan`.
        downscale: Pixels of a latent cell.
        most_clip: For how many tokens of CLIP there are positions.
    """
    *_, height, width = arguments["x"].shape
    for name in ("camera_conditions", "vace_context", *(() if kind in POSED else ("reference_latent", "pose_latents"))):
        if name in arguments and (height % 2 or width % 2):
            raise ArgumentError(
                f"x: its latents are {height} by {width}; with {name} both must be even, so make both sides of the "
                f"video multiples of {2 * downscale} pixels",
                argument="x",
            )
    if kind in POSED:
        check_masks(arguments)
    camera, clip = arguments.get("camera_conditions"), arguments.get("clip_fea")
    if camera is not None and tuple(camera.shape[3:]) != (PIXELS * height, PIXELS * width):
        raise ArgumentError(
            f"camera_conditions: expected {PIXELS * height} by {PIXELS * width} pixels, as the video has; got "
            f"{camera.shape[3]} by {camera.shape[4]}",
            argument="camera_conditions",
        )
    if clip is not None and clip.shape[1] > most_clip:
        raise ArgumentError(
            f"clip_fea: its K is {clip.shape[1]}, but this model has positions for {most_clip} tokens",
            argument="clip_fea",
        )
    strengths = arguments.get("vace_strength")
    if strengths is not None and len(strengths) != arguments["vace_context"].shape[1]:
        raise ArgumentError(
            f"vace_strength: expected {arguments['vace_context'].shape[1]} numbers, one for each video of "
            f"vace_context; got {len(strengths)}",
            argument="vace_strength",
        )


def _place_poses(
    video: kit.Grid, origin: Sequence[float], scale: Sequence[float], arguments: Mapping[str, Any]
) -> list[Place]:
    """Where SCAIL's references, video and poses are.

    ``video`` is the grid of references and video together; ``origin`` and ``scale`` are how its positions are changed.
    Poses have the frames' own sides, however small they are. Where a character is replaced, references are below the
    video, and poses beside it at its own times; else poses are beside it, behind the references in time.
    """
    frames, *sides = video.sides
    first = arguments["reference_latent"].shape[2] if "reference_latent" in arguments else 0
    replaces = arguments.get("ref_mask_flag") is not None and not arguments["ref_mask_flag"]
    begin = float(max(first - 1, 0) if replaces else first)
    places = [Place(video, origin, scale)]
    if replaces:
        places = [Place(_grid(frames - first, sides), (origin[0] + begin, *origin[1:]), scale)]
        if first:
            places.insert(0, Place(_grid(first, sides), (0.0, _APART, 0.0)))
    if "pose_latents" in arguments:
        poses = kit.Grid(arguments["pose_latents"], PATCH, "pose_latents")
        padded = (2 * count for count in poses.counts[1:])
        stretch = [side / other for side, other in zip(sides, padded, strict=True)]
        down, right = ((each - 1) / 2 for each in stretch)
        places.append(Place(poses, (begin, down, _APART + right), (1.0, *stretch)))
    return places


def _grid(frames: int, sides: Sequence[int]) -> kit.Grid:
    return kit.Grid(torch.empty(1, 1, frames, *sides, device="meta"), PATCH)

"""What SCAIL and SCAIL-2 (Zhipu AI, 2025 and 2026) add to Wan's network: references, poses, and masks of both.

Reference frames stand before the video's, and a video of poses, often of half the size, behind them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tacod.rank.families import kit
from tacod.rank.families.inputs import Argument, Spec
from tacod.rank.families.wan_parts import PATCH, Place
from tacod_client.errors import ArgumentError

__all__ = ["MASK_CHANNELS", "check_masks", "place_poses", "scail_arguments"]

MASK_CHANNELS = 28
"""Channels of SCAIL-2's masks."""
_APART = 120.0
"""How far references, or poses, are moved away from the video, in tokens."""


def scail_arguments(channels: int, masks: int | None) -> dict[str, Spec]:
    """The arguments of these models; ``masks`` are the channels of SCAIL-2's masks.

    ``pose_latents`` are the poses and ``reference_latent`` the references. ``ref_mask_latents`` are masks of references
    and video, ``sam_latents`` of the poses, without which they are left out. ``ref_mask_flag`` is false where a
    character of the video is replaced.
    """
    specs: dict[str, Spec] = {
        "time_dim_concat": Argument(("B", channels, "C", "H", "W"), required=False),
        "reference_latent": Argument(("B", channels, "R", "H", "W"), required=False),
        "pose_latents": Argument(("B", channels, "PT", "PH", "PW"), required=False),
    }
    if masks is not None:
        specs["ref_mask_latents"] = Argument(("B", masks, "M", "H", "W"), required=False)
        specs["sam_latents"] = Argument(("B", masks, "PT", "PH", "PW"), required=False)
        specs["ref_mask_flag"] = Argument(None, required=False, choices=(True, False))
    return specs


def check_masks(arguments: Mapping[str, Any]) -> None:
    """Raise `ArgumentError` for masks of another number of frames than references and video have."""
    masks = arguments.get("ref_mask_latents")
    frames = sum(arguments[name].shape[2] for name in ("reference_latent", "x", "time_dim_concat") if name in arguments)
    if masks is not None and masks.shape[2] != frames:
        raise ArgumentError(
            f"ref_mask_latents: it has {masks.shape[2]} frames; expected {frames}, those of the references and of x",
            argument="ref_mask_latents",
        )


def place_poses(
    video: kit.Grid, origin: Sequence[float], scale: Sequence[float], arguments: Mapping[str, Any]
) -> list[Place]:
    """Where references, video and poses are.

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

"""What SCAIL and SCAIL-2 (Zhipu AI, 2025 and 2026) add to Wan's network: references, poses, and masks of both.

Reference frames stand before the video's, and a video of poses, often of half the size, behind them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tacod.rank.families.inputs import Argument, Spec
from tacod_client.errors import ArgumentError

__all__ = ["MASK_CHANNELS", "check_masks", "scail_arguments"]

MASK_CHANNELS = 28
"""Channels of SCAIL-2's masks."""


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

"""How noisy each token of MiniMax-H3 is: by its kind, and by a mask."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tacod.rank.families.inputs import Inputs
from tacod.rank.families.minimax_h3_parts import PATCH

__all__ = ["MASKS", "PICTURE_TIME", "SIGMA_MIN", "SOUND_TIME", "mask_levels", "prepare_masks", "shifted", "times_of"]

SIGMA_MIN = 1e-6
_NEAR_1 = 1.0 - 1e-3
"""A mask from here on makes everything anew."""
PICTURE_TIME, SOUND_TIME = 0.999, 1.0
"""How clean given pictures and sounds are."""
MASKS = {"denoise_mask": ("video_levels", "video_rows"), "audio_denoise_mask": ("sound_levels", "sound_rows")}
"""The masks, and what `prepare_masks` makes of each: its values, and the place of each token's value in them."""


def prepare_masks(inputs: Inputs) -> Inputs:
    """The inputs with the values of masks, each once, in their place. A mask that hides nothing is dropped."""
    for name, places in MASKS.items():
        if name in inputs:
            values = mask_values(inputs[name])
            found = (None, None) if bool((values >= _NEAR_1).all()) else torch.unique(values, return_inverse=True)
            inputs = inputs.replace(**{name: None, **dict(zip(places, found, strict=True))})
    return inputs


def shifted(sigma: Tensor, from_shift: float, to_shift: float) -> Tensor:
    """A noise level of one shifted schedule as that of another one at the same step."""
    base = sigma / (from_shift + sigma * (1.0 - from_shift))
    return to_shift * base / (1.0 + (to_shift - 1.0) * base)


def times_of(sigma: Tensor, sound_sigma: Tensor, payload: Mapping[str, Any], arguments: Mapping[str, Any]) -> Tensor:
    """The times of each image's tokens [B, M]: the four of the layout, then those of the masks' values."""
    video, sound = 1 - sigma, 1 - sound_sigma
    times = [
        video,
        sound,
        video.clamp(min=payload.get("visual_cond_noise_aug", PICTURE_TIME)),
        sound.clamp(min=payload.get("audio_cond_noise_aug", SOUND_TIME)),
    ]
    masks = mask_levels(arguments)
    found = [torch.stack(times, dim=-1)]
    for name, time, clean in (("denoise_mask", video, PICTURE_TIME), ("audio_denoise_mask", sound, SOUND_TIME)):
        levels, _ = masks[name]
        if levels is not None:
            noise = sigma if name == "denoise_mask" else 1 - time
            masked = 1 - levels * noise[:, None]
            found.append(torch.minimum(masked, time.clamp(min=clean)[:, None]))
    return torch.cat(found, dim=1)


def mask_levels(arguments: Mapping[str, Any]) -> dict[str, tuple[Tensor | None, Tensor | None]]:
    """For each mask its values, and the place of each token's value among them; None without a mask."""
    found = {}
    for name, (levels, rows) in MASKS.items():
        values = arguments.get(levels), arguments.get(rows)
        if name in arguments:
            values = torch.unique(mask_values(arguments[name]), return_inverse=True)
        found[name] = values
    return found


def mask_values(mask: Tensor) -> Tensor:
    """A mask's value for each token: of a video [1, 1, T, H, W] the largest in its patch."""
    mask = mask[0, 0]
    if mask.ndim < 3:
        return mask.flatten()
    padding = (0, mask.shape[2] % PATCH[2], 0, mask.shape[1] % PATCH[1])
    return functional.max_pool2d(functional.pad(mask, padding, mode="replicate"), PATCH[1:]).flatten()

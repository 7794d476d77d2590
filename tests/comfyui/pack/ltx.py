"""What stands in for the models around LTX's videos: VAEs of frames and of sound."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

__all__ = ["NODES"]

PIXELS, FRAMES = 32, 8
BANDS = (8, 16)
SAMPLES = 640
"""Of a step of sound."""


class LtxVAE:
    """What nodes use of LTX's VAE. Latents are sums of the pixels' means; every eighth frame has one."""

    downscale_index_formula = (FRAMES, PIXELS, PIXELS)

    def __init__(self) -> None:
        self.mixture = torch.randn(128, 3, generator=torch.Generator().manual_seed(3))

    def encode(self, frames: torch.Tensor) -> torch.Tensor:
        means = functional.avg_pool2d(frames[::FRAMES, :, :, :3].movedim(-1, 1) - 0.5, PIXELS)
        return 3 * torch.einsum("ck,tkhw->cthw", self.mixture, means)[None]


class SoundVAE:
    """What nodes use of LTX-2's VAE of sound."""

    audio_sample_rate = 16000

    def encode(self, wave: torch.Tensor) -> torch.Tensor:
        steps = wave.mean(dim=-1).unfold(1, SAMPLES, SAMPLES)
        return steps[..., : BANDS[0] * BANDS[1]].unflatten(-1, BANDS).transpose(1, 2).contiguous()


class TestLtxVAE:
    """The VAE of LTX's videos, or of LTX-2's sounds."""

    RETURN_TYPES = ("VAE",)
    FUNCTION = "make"
    CATEGORY = "testing"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"sound": ("BOOLEAN", {"default": False})}}

    def make(self, sound: bool) -> tuple[Any]:
        return (SoundVAE() if sound else LtxVAE(),)


NODES = (TestLtxVAE,)

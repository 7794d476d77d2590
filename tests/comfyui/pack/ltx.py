"""What stands in for the models around LTX's videos: VAEs of frames and of sound."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import comfy.model_management
import comfy.model_patcher
import torch
from torch.nn import functional

__all__ = ["NODES"]

PIXELS, FRAMES = 32, 8
BANDS = (8, 16)
SAMPLES = 640
"""Of a step of sound."""
STEPS = 25
"""Of sound, in a second."""


def enlarged(latent: torch.Tensor, times: int) -> torch.Tensor:
    """With each row and column so many times."""
    return latent.repeat_interleave(times, dim=-2).repeat_interleave(times, dim=-1)


class Statistics:
    """Those of a latent's channels: mean 1, deviation 2."""

    @staticmethod
    def un_normalize(latent: torch.Tensor) -> torch.Tensor:
        return 2 * latent + 1

    @staticmethod
    def normalize(latent: torch.Tensor) -> torch.Tensor:
        return (latent - 1) / 2


class LtxVAE:
    """What nodes use of LTX's VAE. Latents are sums of the pixels' means; every eighth frame has one."""

    downscale_index_formula = (FRAMES, PIXELS, PIXELS)
    first_stage_model = SimpleNamespace(per_channel_statistics=Statistics)

    def __init__(self) -> None:
        self.mixture = torch.randn(128, 3, generator=torch.Generator().manual_seed(3))

    def encode(self, frames: torch.Tensor) -> torch.Tensor:
        means = functional.avg_pool2d(frames[::FRAMES, :, :, :3].movedim(-1, 1) - 0.5, PIXELS)
        return 3 * torch.einsum("ck,tkhw->cthw", self.mixture, means)[None]

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        return enlarged(latent[:, :3], PIXELS).movedim(1, -1).sigmoid()


class SoundVAE:
    """What nodes use of LTX-2's VAE of sound."""

    audio_sample_rate = 16000
    latent_channels = BANDS[0]
    first_stage_model = SimpleNamespace(
        latent_frequency_bins=BANDS[1],
        output_sample_rate=audio_sample_rate,
        num_of_latents_from_frames=lambda frames, rate: max(1, round(frames / rate * STEPS)),
    )

    def encode(self, wave: torch.Tensor) -> torch.Tensor:
        steps = wave.mean(dim=-1).unfold(1, SAMPLES, SAMPLES)
        return steps[..., : BANDS[0] * BANDS[1]].unflatten(-1, BANDS).transpose(1, 2).contiguous()

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        steps = latent.transpose(1, 2).flatten(2)
        wave = steps.repeat_interleave(SAMPLES // steps.shape[-1], dim=-1).flatten(1)
        return torch.stack([wave, wave], dim=-1).tanh()


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


class Doubled(torch.nn.Module):
    """Has rows and columns twice as many."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(1.0))

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        return self.scale * enlarged(latent, 2)


class Upscaler(comfy.model_patcher.ModelPatcher):
    """What nodes use of a model that makes latents larger: LTX's, and HunyuanVideo 1.5's."""

    def __init__(self) -> None:
        super().__init__(Doubled(), load_device=torch.device("cpu"), offload_device=torch.device("cpu"))

    def model_dtype(self) -> torch.dtype:
        return torch.float32

    def resample_latent(self, latent: torch.Tensor) -> torch.Tensor:
        return 0.9 * latent


class TestLatentUpscaler:
    """A model that makes latents larger."""

    RETURN_TYPES = ("LATENT_UPSCALE_MODEL",)
    FUNCTION = "make"
    CATEGORY = "testing"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {}}

    def make(self) -> tuple[Any]:
        return (Upscaler(),)


class TestContexts:
    """What a MODEL's network makes of a text outside of a sampling run, as LTXVPredictDuration asks for it."""

    RETURN_TYPES = ("LATENT",)
    FUNCTION = "make"
    CATEGORY = "testing"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL",), "conditioning": ("CONDITIONING",)}}

    def make(self, model: Any, conditioning: Any) -> tuple[Any]:
        comfy.model_management.load_models_gpu([model])
        network = model.model.diffusion_model
        context = network.preprocess_text_embeds(conditioning[0][0].to(network.dtype), unprocessed=True)
        return ({"samples": context.float()[None]},)


NODES = (TestLtxVAE, TestLatentUpscaler, TestContexts)

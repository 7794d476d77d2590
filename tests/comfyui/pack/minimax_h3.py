"""What stands in for the models around MiniMax-H3: an encoder of prompts, and a VAE of sounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

__all__ = ["NODES"]

_STEP = 800
"""Samples for each step of a latent."""


class Encoder:
    """Gives random tokens for a prompt; three more, of another kind, for each picture, sound or video."""

    def __init__(self, seed: int, width: int) -> None:
        self.seed, self.width = seed, width

    def tokenize(
        self, prompt: str, images: Sequence[Any] = (), minimax_ref_items: Sequence[Mapping[str, Any]] = ()
    ) -> list[int]:
        kinds = [0] * len(images) + [2 if each["type"] == "audio" else 0 for each in minimax_ref_items]
        return [kind for each in kinds for kind in (1, each, each)] + [1] * (len(prompt) + 3)

    def encode_from_tokens_scheduled(self, tags: list[int]) -> list[Any]:
        random = torch.Generator().manual_seed(self.seed)
        return [[torch.randn(1, len(tags), self.width, generator=random), {"minimax_token_tags": torch.tensor(tags)}]]


class SoundVAE:
    """Latents are sums of the means of samples, [1, channels, 2, steps]."""

    audio_sample_rate = 32000

    def __init__(self, channels: int) -> None:
        self.mixture = torch.randn(channels, 4, generator=torch.Generator().manual_seed(4))

    def encode(self, waveform: torch.Tensor) -> torch.Tensor:
        steps = waveform.shape[1] // _STEP
        parts = waveform[0, : steps * _STEP].reshape(steps, 4, _STEP // 4, 2).mean(dim=2)
        return torch.einsum("cp,tps->cst", self.mixture, 10 * parts)[None]

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        return latent.mean(dim=1).repeat_interleave(_STEP, dim=-1).movedim(1, -1).tanh()


class TestH3Clip:
    """An encoder of prompts."""

    RETURN_TYPES = ("CLIP",)
    FUNCTION = "make"
    CATEGORY = "testing"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": dict.fromkeys(("seed", "width"), ("INT", {"max": 2**31}))}

    def make(self, seed: int, width: int) -> tuple[Any]:
        return (Encoder(seed, width),)


class TestSoundVAE:
    """A VAE of a tiny model's sounds."""

    RETURN_TYPES = ("VAE",)
    FUNCTION = "make"
    CATEGORY = "testing"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"channels": ("INT", {"max": 128})}}

    def make(self, channels: int) -> tuple[Any]:
        return (SoundVAE(channels),)


NODES = (TestH3Clip, TestSoundVAE)

"""Text encoders, VAEs and loaders of tiny models, in the place of those that one has to download."""

from __future__ import annotations

from typing import Any

import nodes
import torch

__all__ = ["BESIDE", "NODES", "conditioning"]

_WHOLE = ("INT", {"default": 0, "min": 0, "max": 2**31})


BESIDE = ("llama_layers", "llama_width", "t5_ids")
"""Sizes of what a text encoder gives beside the text, if not 0."""
WORDS = 32128
"""Of T5's tokenizer."""


def conditioning(
    seed: int,
    tokens: int,
    width: int,
    pooled: int,
    llama_layers: int = 0,
    llama_width: int = 0,
    t5_ids: int = 0,
) -> Any:
    """Random conditioning; HiDream's also has the states of another encoder, Anima's the words of another tokenizer."""
    random = torch.Generator().manual_seed(seed)
    context = torch.randn(1, tokens, width, generator=random)
    # Text encoders that have none say so.
    extra: dict[str, Any] = {"pooled_output": torch.randn(1, pooled, generator=random) if pooled else None}
    if llama_layers:
        extra["conditioning_llama3"] = torch.randn(1, llama_layers, tokens + 2, llama_width, generator=random)
    if t5_ids:
        extra["t5xxl_ids"] = torch.randint(0, WORDS, (t5_ids,), generator=random)
        extra["t5xxl_weights"] = 0.5 + torch.rand(t5_ids, generator=random)
    return [[context, extra]]


class Clip:
    """What nodes use of a text encoder: random conditioning by the text's length."""

    def __init__(self, **sizes: int) -> None:
        self.sizes = sizes

    def clone(self) -> Clip:
        return Clip(**self.sizes)

    def set_tokenizer_option(self, name: str, value: int) -> None:
        """They change nothing here."""

    def tokenize(self, text: str, **beside: Any) -> str:
        return text

    def encode_from_tokens_scheduled(self, text: str) -> Any:
        return conditioning(len(text), 11, **self.sizes)


class VAE:
    """What VAEDecode and VAEEncode use of a VAE."""

    def __init__(self, channels: int, frames: bool = False) -> None:
        self.channels, self.frames = channels, frames

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        return latent[:, :3].movedim(1, -1).sigmoid()

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        latent = torch.zeros(len(pixels), self.channels, pixels.shape[1] // 8, pixels.shape[2] // 8)
        return latent.unsqueeze(2) if self.frames else latent


class TestClip:
    """A text encoder of a tiny model."""

    RETURN_TYPES = ("CLIP",)
    FUNCTION = "make"
    CATEGORY = "testing"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": dict.fromkeys(("width", "pooled"), _WHOLE), "optional": dict.fromkeys(BESIDE, _WHOLE)}

    def make(self, **sizes: int) -> tuple[Any]:
        return (Clip(**sizes),)


class TestImageVAE:
    """A VAE of a tiny model."""

    RETURN_TYPES = ("VAE",)
    FUNCTION = "make"
    CATEGORY = "testing"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        channels = ("INT", {"default": 16, "min": 1, "max": 128})
        return {"required": {"channels": channels, "frames": ("BOOLEAN", {"default": False})}}

    def make(self, channels: int, frames: bool) -> tuple[Any]:
        return (VAE(channels, frames),)


class TestCheckpoint:
    """A tiny model with its text encoder and VAE."""

    RETURN_TYPES = ("MODEL", "CLIP", "VAE")
    FUNCTION = "make"
    CATEGORY = "testing"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"unet_name": ("STRING", {}), "width": _WHOLE, "pooled": _WHOLE}}

    def make(self, unet_name: str, width: int, pooled: int) -> tuple[Any, ...]:
        return *nodes.UNETLoader().load_unet(unet_name, "default"), Clip(width=width, pooled=pooled), VAE(16)


NODES = (TestClip, TestImageVAE, TestCheckpoint)

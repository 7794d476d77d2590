"""Text encoders, VAEs and loaders of tiny models, in the place of those that one has to download."""

from __future__ import annotations

from typing import Any

import nodes
import torch

__all__ = ["NODES"]


class Clip:
    """What nodes use of a text encoder: random conditioning by the text's length."""

    def __init__(self, width: int, pooled: int) -> None:
        self.width, self.pooled = width, pooled

    def clone(self) -> Clip:
        return Clip(self.width, self.pooled)

    def set_tokenizer_option(self, name: str, value: int) -> None:
        """They change nothing here."""

    def tokenize(self, text: str, **beside: Any) -> str:
        return text

    def encode_from_tokens_scheduled(self, text: str) -> Any:
        random = torch.Generator().manual_seed(len(text))
        context = torch.randn(1, 11, self.width, generator=random)
        return [[context, {"pooled_output": torch.randn(1, self.pooled, generator=random)} if self.pooled else {}]]


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
        whole = ("INT", {"default": 1, "min": 0, "max": 2**31})
        return {"required": {"width": whole, "pooled": whole}}

    def make(self, width: int, pooled: int) -> tuple[Any]:
        return (Clip(width, pooled),)


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
    """A tiny Flux with its text encoder and VAE."""

    RETURN_TYPES = ("MODEL", "CLIP", "VAE")
    FUNCTION = "make"
    CATEGORY = "testing"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"unet_name": ("STRING", {})}}

    def make(self, unet_name: str) -> tuple[Any, ...]:
        return *nodes.UNETLoader().load_unet(unet_name, "default"), Clip(32, 24), VAE(16)


NODES = (TestClip, TestImageVAE, TestCheckpoint)

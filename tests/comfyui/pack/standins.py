"""Text encoders, VAEs and loaders of tiny models, in the place of those that one has to download."""

from __future__ import annotations

from typing import Any

import nodes
import torch

__all__ = ["BESIDE", "NODES", "conditioning"]

_WHOLE = ("INT", {"default": 0, "min": 0, "max": 2**31})


BESIDE = ("llama_layers", "llama_width", "t5_ids", "byt5_width")
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
    byt5_width: int = 0,
    hidden: int = 0,
    raw: bool = False,
) -> Any:
    """Random conditioning; HiDream's also has the states of another encoder, Anima's the words of another tokenizer.

    HunyuanImage's has the states of ByT5. A mask hides the last ``hidden`` tokens. A ``raw`` text is for LTX-2's
    connectors.
    """
    random = torch.Generator().manual_seed(seed)
    context = torch.randn(1, tokens, width, generator=random)
    # Text encoders that have none say so.
    extra: dict[str, Any] = {"pooled_output": torch.randn(1, pooled, generator=random) if pooled else None}
    if llama_layers:
        extra["conditioning_llama3"] = torch.randn(1, llama_layers, tokens + 2, llama_width, generator=random)
    if t5_ids:
        extra["t5xxl_ids"] = torch.randint(0, WORDS, (t5_ids,), generator=random)
        extra["t5xxl_weights"] = 0.5 + torch.rand(t5_ids, generator=random)
    if byt5_width:
        extra["conditioning_byt5small"] = torch.randn(1, 6, byt5_width, generator=random)
    if hidden:
        extra["attention_mask"] = torch.tensor([[1] * (tokens - hidden) + [0] * hidden])
    if raw:
        extra["unprocessed_ltxav_embeds"] = True
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
    """What nodes use of a VAE; to encode, it folds squares of the image into channels."""

    def __init__(self, channels: int, frames: bool = False, side: int = 8) -> None:
        self.channels, self.frames, self.side = channels, frames, side

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        return latent[:, :3].movedim(1, -1).sigmoid()

    def spacial_compression_encode(self) -> int:
        return self.side

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        height, width = (self.side * (each // self.side) for each in pixels.shape[1:3])
        folded = torch.nn.functional.pixel_unshuffle(pixels[:, :height, :width].movedim(-1, 1), self.side)
        latent = folded[:, : self.channels]
        return latent.unsqueeze(2) if self.frames else latent


class SeenImage:
    """What nodes use of what a vision encoder made of an image: 4 tokens of 8 channels after each of 27 layers."""

    def __init__(self) -> None:
        self.all_hidden_states = torch.randn(1, 27, 4, 8, generator=torch.Generator().manual_seed(2))
        self.penultimate_hidden_states = self.all_hidden_states[:, -2]


class StyleModel:
    """Turns an image into 5 tokens of text."""

    def __init__(self, width: int) -> None:
        self.width = width

    def get_cond(self, seen: SeenImage) -> torch.Tensor:
        return torch.randn(1, 5, self.width, generator=torch.Generator().manual_seed(3))


class TestClip:
    """A text encoder of a tiny model."""

    RETURN_TYPES = ("CLIP",)
    FUNCTION = "make"
    CATEGORY = "testing"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        optional = {**dict.fromkeys((*BESIDE, "hidden"), _WHOLE), "raw": ("BOOLEAN", {"default": False})}
        return {"required": dict.fromkeys(("width", "pooled"), _WHOLE), "optional": optional}

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
        side = ("INT", {"default": 8, "min": 8, "max": 64})
        return {"required": {"channels": channels, "frames": ("BOOLEAN", {"default": False}), "side": side}}

    def make(self, channels: int, frames: bool, side: int) -> tuple[Any]:
        return (VAE(channels, frames, side),)


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


class TestSeenImage:
    """What a vision encoder made of an image."""

    RETURN_TYPES = ("CLIP_VISION_OUTPUT",)
    FUNCTION = "make"
    CATEGORY = "testing"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {}}

    def make(self) -> tuple[Any]:
        return (SeenImage(),)


class TestStyleModel:
    """What FLUX.1 Redux turns images into text with."""

    RETURN_TYPES = ("STYLE_MODEL",)
    FUNCTION = "make"
    CATEGORY = "testing"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"width": _WHOLE}}

    def make(self, width: int) -> tuple[Any]:
        return (StyleModel(width),)


NODES = (TestClip, TestImageVAE, TestCheckpoint, TestSeenImage, TestStyleModel)

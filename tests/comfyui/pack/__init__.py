"""Nodes that only tests use: conditioning and latents from nothing; and ComfyUI gets to know tiny models."""

from __future__ import annotations

import json
from typing import Any

import comfy.model_detection
import torch

_detect = comfy.model_detection.detect_unet_config


def detect(state_dict: Any, key_prefix: str, metadata: Any = None) -> Any:
    """ComfyUI's, with what a tiny model's own metadata says of its sizes."""
    config = _detect(state_dict, key_prefix, metadata=metadata)
    if config is not None and metadata and "tacod.config" in metadata:
        told = json.loads(metadata["tacod.config"])
        # ComfyUI knows SD3 by other means than by this key.
        config |= {key: value for key, value in told.items() if key != "image_model" or key in config}
    return config


comfy.model_detection.detect_unet_config = detect


class TestConditioning:
    """Random conditioning."""

    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "make"
    CATEGORY = "testing"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        whole = ("INT", {"default": 0, "min": 0, "max": 2**31})
        return {"required": {"seed": whole, "tokens": whole, "width": whole, "pooled": whole}}

    def make(self, seed: int, tokens: int, width: int, pooled: int) -> tuple[Any]:
        random = torch.Generator().manual_seed(seed)
        context = torch.randn(1, tokens, width, generator=random)
        extra = {"pooled_output": torch.randn(1, pooled, generator=random)} if pooled else {}
        return ([[context, extra]],)


class TestLatent:
    """A random latent, as of an image that is to be painted over."""

    RETURN_TYPES = ("LATENT",)
    FUNCTION = "make"
    CATEGORY = "testing"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        whole = ("INT", {"default": 1, "min": 0, "max": 2**31})
        names = ("seed", "batch", "channels", "height", "width")
        return {"required": {**dict.fromkeys(names, whole), "scale": ("FLOAT", {"default": 1.0})}}

    def make(self, seed: int, batch: int, channels: int, height: int, width: int, scale: float) -> tuple[Any]:
        random = torch.Generator().manual_seed(seed)
        return ({"samples": scale * torch.randn(batch, channels, height, width, generator=random)},)


class TestMask:
    """The left half."""

    RETURN_TYPES = ("MASK",)
    FUNCTION = "make"
    CATEGORY = "testing"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        whole = ("INT", {"default": 64, "min": 1, "max": 4096})
        return {"required": {"height": whole, "width": whole}}

    def make(self, height: int, width: int) -> tuple[Any]:
        mask = torch.zeros(1, height, width)
        mask[:, :, : width // 2] = 1
        return (mask,)


NODE_CLASS_MAPPINGS = {kind.__name__: kind for kind in (TestConditioning, TestLatent, TestMask)}

"""The models, with their networks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, ClassVar

import comfy.ldm.aura.mmdit
import comfy.ldm.waves.model
import comfy.model_management
import comfy.text_encoders.waves
import torch

TOKENIZER = comfy.text_encoders.waves.Tokenizer


class Model:
    """A model by its configuration."""

    marks: ClassVar[tuple[str, ...]]
    network: ClassVar[Any]
    quant_config = None
    text_encoder = TOKENIZER

    def __init__(self, unet_config: dict[str, Any]) -> None:
        self.unet_config = dict(unet_config)

    def set_inference_dtype(self, dtype: torch.dtype, manual_cast_dtype: torch.dtype | None) -> None:
        """Say what weights are kept in."""
        self.unet_config["dtype"] = dtype

    def get_model(self, state_dict: dict[str, Any], prefix: str = "") -> Any:
        """The model around a network."""
        return SimpleNamespace(diffusion_model=self.network(**self.unet_config))

    def process_unet_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Weights by the network's own names; of one that is for texts and images it makes two."""
        found = {}
        for name, each in state_dict.items():
            if name.endswith(".both.weight"):
                of_text, of_image = (part.contiguous() for part in each.chunk(2))
                found[name.replace("both", "text")], found[name.replace("both", "image")] = of_text, of_image
            else:
                found[name.replace("wave_in.", "embed.")] = each
        return found


class AuraFlow(Model):
    """With two kinds of blocks."""

    network = comfy.ldm.aura.mmdit.MMDiT


class Waves(Model):
    """Of sounds."""

    network = comfy.ldm.waves.model.Waves

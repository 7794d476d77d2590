"""Qwen-Image-2.1 for a ComfyUI that is older than 0.37: what stands around the network, its node, and tacod's network.

So a graph shows what is between ComfyUI and the daemon. That the network computes what ComfyUI's does is shown by the
goldens.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, ClassVar

import comfy.conds
import comfy.latent_formats
import comfy.model_base
import comfy.supported_models
import comfy.supported_models_base
import torch

from tacod.rank.families.latents import QWEN_IMAGE_21
from tacod.rank.families.qwen_image_21 import QwenImage21
from tacod.rank.parallel.sequence import SequenceParallel

__all__ = ["NAME", "NODES", "register"]

NAME = "qwen_image21"


class Network(QwenImage21):
    """Takes and keeps what ComfyUI's does."""

    def __init__(self, dtype: Any = None, device: Any = None, operations: Any = None, **config: Any) -> None:
        with torch.device(device or "cpu"):
            super().__init__(config)
        self.to(dtype).requires_grad_(False)
        self.runs = 0

    def reset_prefix_cache(self, enabled: bool) -> None:
        """Called as a run begins or ends; what a run would keep is computed anew at each step here."""
        self.runs += enabled

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """See `_forward`."""
        return self._forward(*args, **kwargs)

    def _forward(
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor,
        context: torch.Tensor,
        ref_latents: Any = None,
        image_slots: Any = None,
        transformer_options: Mapping[str, Any] = {},
        **kwargs: Any,
    ) -> torch.Tensor:
        if transformer_options.get("qwen_image21_cache", {}).get("dtype", "default") != "default":
            raise RuntimeError("this stand-in has no cache that rounds")
        assert self.runs, "ComfyUI says when a run begins"
        given = {"ref_latents": ref_latents, "image_slots": image_slots}
        given = {name: value for name, value in given.items() if value}
        out = super().forward(SequenceParallel(), x, timesteps.float(), context=context, **given)
        assert isinstance(out, torch.Tensor)
        return out


class Latents(comfy.latent_formats.LatentFormat):
    """64 channels, each with a mean and a deviation of its own."""

    latent_channels = 64
    spacial_downscale_ratio = 16

    def process_in(self, latent: torch.Tensor) -> torch.Tensor:
        return QWEN_IMAGE_21.into_model(latent)

    def process_out(self, latent: torch.Tensor) -> torch.Tensor:
        return QWEN_IMAGE_21.out_of_model(latent)


class Base(comfy.model_base.BaseModel):
    """Tells the network of the patcher that samples, and when a run begins and ends."""

    def __init__(self, model_config: Any, device: Any = None) -> None:
        super().__init__(model_config, comfy.model_base.ModelType.FLUX, device=device, unet_model=Network)

    @property
    def current_patcher(self) -> Any:
        return self._current_patcher

    @current_patcher.setter
    def current_patcher(self, patcher: Any) -> None:
        self._current_patcher = patcher
        network = getattr(self, "diffusion_model", None)
        if network is not None:
            network.current_patcher = patcher
            network.reset_prefix_cache(patcher is not None and not patcher.hook_patches)

    def extra_conds(self, **kwargs: Any) -> Any:
        conds = super().extra_conds(**kwargs)
        conds["c_crossattn"] = comfy.conds.CONDRegular(kwargs["cross_attn"])
        if kwargs.get("reference_latents") is not None:
            conds["ref_latents"] = comfy.conds.CONDList(list(map(self.process_latent_in, kwargs["reference_latents"])))
        if kwargs.get("image_slots") is not None:
            conds["image_slots"] = comfy.conds.CONDConstant(kwargs["image_slots"])
        return conds


class Config(comfy.supported_models_base.BASE):
    """What ComfyUI knows of the family."""

    unet_config: ClassVar[dict[str, Any]] = {"image_model": NAME}
    unet_extra_config: ClassVar[dict[str, Any]] = {}
    sampling_settings: ClassVar[dict[str, Any]] = {"multiplier": 1.0, "shift": 0.69}
    memory_usage_factor = 1.8
    latent_format = Latents
    supported_inference_dtypes: ClassVar[list[torch.dtype]] = [torch.bfloat16, torch.float32]

    def get_model(self, state_dict: Any, prefix: str = "", device: Any = None) -> Base:
        return Base(self, device=device)


class TextEncodeQwenImage21:
    """Texts with pictures before them, and an empty latent of the first picture's size."""

    RETURN_TYPES = ("CONDITIONING", "CONDITIONING", "LATENT")
    RETURN_NAMES = ("positive", "negative", "latent")
    FUNCTION = "make"
    CATEGORY = "testing"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        text = ("STRING", {"default": "", "multiline": True})
        resolution = ("INT", {"default": 1024, "min": 0, "max": 4096})
        required = {"clip": ("CLIP",), "prompt": text, "negative_prompt": text, "resolution": resolution}
        return {"required": required, "optional": {"vae": ("VAE",), "images.image_1": ("IMAGE",)}}

    def make(
        self, clip: Any, prompt: str, negative_prompt: str, resolution: int, vae: Any = None, **images: torch.Tensor
    ) -> tuple[Any, ...]:
        latents = [vae.encode(image) for image in images.values()]
        beside = {"reference_latents": latents, "image_slots": [0] * len(latents)} if latents else {}
        texts = [clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in (prompt, negative_prompt)]
        made = [[[context, {**values, **beside}] for context, values in text] for text in texts]
        sides = latents[0].shape[-2:] if latents else (resolution // 16,) * 2
        return *made, {"samples": torch.zeros(1, Latents.latent_channels, *sides)}


IS_THERE = find_spec("comfy.ldm.qwen_image21") is not None
NODES = () if IS_THERE else (TextEncodeQwenImage21,)


def register() -> None:
    """Make it known, unless this ComfyUI has the real one."""
    if not IS_THERE:
        comfy.supported_models.models.append(Config)

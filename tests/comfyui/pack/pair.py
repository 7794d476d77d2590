"""A made-up model of two latents, video and sound, as ComfyUI has LTX-2: what stands around the network, and a network.

It is the tests' made-up family, so a graph shows what is between ComfyUI and the daemon.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import comfy.conds
import comfy.latent_formats
import comfy.model_base
import comfy.patcher_extension
import comfy.samplers
import comfy.supported_models
import comfy.supported_models_base
import torch

from tacod.rank.parallel.sequence import SequenceParallel

__all__ = ["NAME", "NODES", "register"]

_FILE = Path(__file__).resolve().parents[2] / "engine" / "made_up_pair.py"
_spec = importlib.util.spec_from_file_location(_FILE.stem, _FILE)
assert _spec is not None
assert _spec.loader is not None
made_up_pair = sys.modules[_FILE.stem] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(made_up_pair)
NAME = made_up_pair.Pair.family
UNPACKS = "x0 = comfy.nested_tensor" in inspect.getsource(comfy.samplers)
"""Whether samplers unpack latents for previews; before they did, ComfyUI's formats of several latents had none."""


class Tokens:
    """Each token's value of a mask, [B, N, 1], by the first channel of a mask."""

    def __init__(self, step: int) -> None:
        self.step = step

    def patchify(self, mask: torch.Tensor) -> torch.Tensor:
        return mask[:, 0, ..., :: self.step, :: self.step].flatten(1)[..., None]


class Network(made_up_pair.Pair):  # type: ignore[name-defined, misc]
    """Takes what LTX-2's does."""

    def __init__(self, dtype: Any = None, device: Any = None, operations: Any = None, **config: Any) -> None:
        with torch.device(device or "cpu"):
            super().__init__(config)
        self.to(dtype).requires_grad_(False)
        self.patchifier, self.a_patchifier = Tokens(2), Tokens(1)

    def forward(
        self, x: Any, timestep: Any, context: Any, transformer_options: Mapping[str, Any] = {}, **kwargs: Any
    ) -> Any:
        """See `_forward`."""
        return comfy.patcher_extension.WrapperExecutor.new_class_executor(
            self._forward,
            self,
            comfy.patcher_extension.get_all_wrappers(
                comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, transformer_options
            ),
        ).execute(x, timestep, context, transformer_options, **kwargs)

    def _forward(
        self,
        x: Any,
        timestep: Any,
        context: Any,
        transformer_options: Mapping[str, Any] = {},
        denoise_mask: Any = None,
        audio_denoise_mask: Any = None,
        **kwargs: Any,
    ) -> Any:
        masks = {"denoise_mask": denoise_mask, "audio_denoise_mask": audio_denoise_mask}
        given = {name: mask for name, mask in masks.items() if mask is not None}
        return super().forward(SequenceParallel(), list(x), list(timestep), context=context, **given)


class Latents(comfy.latent_formats.LatentFormat):
    """The video's, for previews too."""

    latent_channels = made_up_pair.Pair.channels
    latent_dimensions = 3

    def __init__(self) -> None:
        if UNPACKS:
            self.latent_rgb_factors = [[0.1, 0.2, 0.3], [0.2, -0.1, 0.1], [-0.3, 0.2, 0.2], [0.1, 0.1, -0.2]]


class Base(comfy.model_base.BaseModel):
    """Unpacks masks as it does latents, and gives each latent a time of its own."""

    def __init__(self, model_config: Any, device: Any = None) -> None:
        super().__init__(model_config, comfy.model_base.ModelType.FLUX, device=device, unet_model=Network)

    def extra_conds(self, **kwargs: Any) -> Any:
        conds = super().extra_conds(**kwargs)
        conds["c_crossattn"] = comfy.conds.CONDRegular(kwargs["cross_attn"])
        conds["latent_shapes"] = comfy.conds.CONDConstant(kwargs["latent_shapes"])
        mask = kwargs.get("denoise_mask")
        if mask is not None:
            parts = comfy.utils.unpack_latents(mask, kwargs["latent_shapes"])
            for name, part in zip(("denoise_mask", "audio_denoise_mask"), parts, strict=True):
                conds[name] = comfy.conds.CONDRegular(part)
        return conds

    def process_timestep(
        self, timestep: Any, x: Any, denoise_mask: Any = None, audio_denoise_mask: Any = None, **kwargs: Any
    ) -> Any:
        times = []
        network = self.diffusion_model
        for mask, tokens in ((denoise_mask, network.patchifier), (audio_denoise_mask, network.a_patchifier)):
            by_image = None if mask is None else timestep.view(-1, *[1] * (mask.ndim - 1))
            # Each row of sound is one token.
            rows = None if mask is None else (mask * by_image)[..., :1] if mask.ndim == 4 else mask * by_image
            times.append(timestep if rows is None else tokens.patchify(rows))
        return tuple(times)

    def scale_latent_inpaint(self, sigma: Any, noise: Any, latent_image: Any, **kwargs: Any) -> Any:
        return latent_image


class Config(comfy.supported_models_base.BASE):
    """What ComfyUI knows of the family."""

    unet_config: ClassVar[dict[str, Any]] = {"image_model": NAME}
    unet_extra_config: ClassVar[dict[str, Any]] = {}
    sampling_settings: ClassVar[dict[str, Any]] = {"multiplier": 1.0, "shift": 1.0}
    memory_usage_factor = 1.0
    latent_format = Latents
    supported_inference_dtypes: ClassVar[list[torch.dtype]] = [torch.float32]

    def get_model(self, state_dict: Any, prefix: str = "", device: Any = None) -> Base:
        return Base(self, device=device)


class TestHalves:
    """A wrapper around the network, which halves what it gives."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "make"
    CATEGORY = "testing"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL",)}}

    def make(self, model: Any) -> tuple[Any]:
        def halve(execute: Any, x: Any, timestep: Any, *rest: Any, **named: Any) -> Any:
            assert [each.ndim for each in x] == [5, 4]
            assert len(timestep) == 2
            return [each / 2 for each in execute(x, timestep, *rest, **named)]

        model = model.clone()
        model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "halves", halve)
        return (model,)


NODES = (TestHalves,)


def register() -> None:
    """Make it known."""
    comfy.supported_models.models.append(Config)

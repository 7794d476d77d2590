"""What stands in for the models around a video's: a VAE of frames, and an encoder of images."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import comfy.ldm.hunyuan_video.model as hunyuan_video
import comfy.ldm.wan.model as wan
import comfy.supported_models
import torch
from torch import nn
from torch.nn import functional

try:
    import comfy.ldm.wan.model_animate as animate
except ImportError:
    # This version of ComfyUI has no Wan Animate.
    animate = None

__all__ = ["NODES", "VideoVAE", "shrink"]

CLIP_WIDTH = 40
"""Of the tokens of images in the goldens; ComfyUI's class has a fixed one."""
BYT5_SIZES = {"in_dim": 36, "hidden_dim": 44, "out_dim": 44}
"""Of the mapper of ByT5's tokens."""
FACE = {"widths": [2] * 8, "style": 8, "motion": 4, "outputs": 512, "face": 8}
"""Of the encoder of faces; ComfyUI's class has fixed ones."""
_projection = wan.MLPProj
_mapper = getattr(hunyuan_video, "ByT5Mapper", None)


def _small(*sizes: int, **settings: Any) -> Any:
    """HunyuanVideo 1.5 says the sizes by their names; there they are settings."""
    return _projection(*((CLIP_WIDTH, *sizes[1:]) if sizes else ()), **settings)


def _small_mapper(**settings: Any) -> Any:
    return _mapper(**{**settings, **BYT5_SIZES})


class SmallEncoder(animate.EncoderApp if animate else nn.Module):
    """ComfyUI's encoder of pictures of a face, with few channels."""

    def __init__(self, style: int, **settings: Any) -> None:
        nn.Module.__init__(self)
        widths = FACE["widths"]
        layers = [animate.ResBlock(*each, **settings) for each in itertools.pairwise(widths)]
        last = animate.EqualConv2d(widths[-1], style, 4, padding=0, bias=False, **settings)
        self.convs = nn.ModuleList([animate.ConvLayer(3, widths[0], 1, **settings), *layers, last])


class SmallFaceEncoder(animate.FaceEncoder if animate else nn.Module):
    """ComfyUI's encoder of a face's motion, with few channels."""

    def __init__(
        self,
        in_dim: int,
        hidden_dim: int,
        num_heads: int,
        dtype: Any = None,
        device: Any = None,
        operations: Any = None,
    ) -> None:
        nn.Module.__init__(self)
        plain, face = {"dtype": dtype, "device": device}, FACE["face"]
        self.num_heads, self.act = num_heads, nn.SiLU()
        self.conv1_local = animate.CausalConv1d(in_dim, num_heads * face, 3, operations=operations, **plain)
        self.conv2 = animate.CausalConv1d(face, face, 3, stride=2, operations=operations, **plain)
        self.conv3 = animate.CausalConv1d(face, face, 3, stride=2, operations=operations, **plain)
        for number in (1, 2, 3):
            norm = operations.LayerNorm(face, elementwise_affine=False, eps=1e-6, **plain)
            self.add_module(f"norm{number}", norm)
        self.out_proj = operations.Linear(face, hidden_dim, **plain)
        self.padding_tokens = nn.Parameter(torch.empty(1, 1, 1, hidden_dim, **plain))


def shrink() -> None:
    """From now on networks of videos may be as small as the tests' models."""
    wan.MLPProj = _small
    hunyuan_video.ByT5Mapper = _small_mapper
    if animate is not None:
        animate.EncoderApp, animate.FaceEncoder = SmallEncoder, SmallFaceEncoder
        generator = animate.Generator
        animate.Generator = lambda **rest: generator(
            **{**rest, "style_dim": FACE["style"], "motion_dim": FACE["motion"]}
        )
    image = getattr(comfy.supported_models, "Kandinsky5Image", None)
    if image is not None:
        image.unet_config = {key: value for key, value in image.unet_config.items() if key != "model_dim"}


class VideoVAE:
    """What nodes use of a video's VAE. Latents are sums of the pixels' means; every fourth frame has one."""

    def __init__(self, channels: int, pixels: int) -> None:
        self.latent_channels, self.pixels = channels, pixels
        self.mixture = torch.randn(channels, 3, generator=torch.Generator().manual_seed(3))

    def spacial_compression_encode(self) -> int:
        return self.pixels

    def encode(self, frames: torch.Tensor) -> torch.Tensor:
        means = functional.avg_pool2d(frames[::4, :, :, :3].movedim(-1, 1) - 0.5, self.pixels)
        return torch.einsum("ck,tkhw->cthw", self.mixture, means)[None]

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        pictures = latent[:, :3].repeat_interleave(self.pixels, dim=-2).repeat_interleave(self.pixels, dim=-1)
        return pictures.movedim(1, -1).sigmoid()


class TestVideoVAE:
    """A VAE of a tiny video model."""

    RETURN_TYPES = ("VAE",)
    FUNCTION = "make"
    CATEGORY = "testing"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        whole = ("INT", {"default": 16, "min": 1, "max": 128})
        return {"required": {"channels": whole, "pixels": whole}}

    def make(self, channels: int, pixels: int) -> tuple[Any]:
        return (VideoVAE(channels, pixels),)


class TestFrames:
    """Random frames."""

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "make"
    CATEGORY = "testing"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": dict.fromkeys(("seed", "frames", "height", "width"), ("INT", {"max": 2**31}))}

    def make(self, seed: int, frames: int, height: int, width: int) -> tuple[Any]:
        return (torch.rand(frames, height, width, 3, generator=torch.Generator().manual_seed(seed)),)


class TestSound:
    """Random samples in two channels; nodes don't resample them for a VAE of the same rate."""

    RETURN_TYPES = ("AUDIO",)
    FUNCTION = "make"
    CATEGORY = "testing"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": dict.fromkeys(("seed", "samples", "rate"), ("INT", {"max": 2**31}))}

    def make(self, seed: int, samples: int, rate: int) -> tuple[Any]:
        wave = torch.randn(1, 2, samples, generator=torch.Generator().manual_seed(seed))
        return ({"waveform": wave, "sample_rate": rate},)


class TestClipVision:
    """What an encoder of images gives of one."""

    RETURN_TYPES = ("CLIP_VISION_OUTPUT",)
    FUNCTION = "make"
    CATEGORY = "testing"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        whole = ("INT", {"max": 2**31})
        return {"required": dict.fromkeys(("seed", "tokens"), whole), "optional": {"width": whole}}

    def make(self, seed: int, tokens: int, width: int = CLIP_WIDTH) -> tuple[Any]:
        seen = torch.randn(1, tokens, width, generator=torch.Generator().manual_seed(seed))
        return (SimpleNamespace(penultimate_hidden_states=seen, last_hidden_state=seen),)


class TestHeard:
    """What an encoder of sounds gives of one, after each of 3 layers: 20 steps of 4 channels."""

    RETURN_TYPES = ("AUDIO_ENCODER_OUTPUT",)
    FUNCTION = "make"
    CATEGORY = "testing"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"seed": ("INT", {"max": 2**31})}}

    def make(self, seed: int) -> tuple[Any]:
        layers = torch.randn(3, 1, 20, 4, generator=torch.Generator().manual_seed(seed))
        return ({"encoded_audio_all_layers": list(layers), "encoded_audio": layers[-1]},)


NODES = (TestVideoVAE, TestFrames, TestSound, TestHeard, TestClipVision)

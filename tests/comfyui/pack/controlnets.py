"""Tiny ControlNets of ComfyUI's own classes, with random weights, and what they are given."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import comfy.cldm.dit_embedder
import comfy.cldm.mmdit
import comfy.controlnet
import comfy.latent_formats
import comfy.ldm.flux.controlnet
import comfy.ldm.flux.model
import comfy.model_patcher
import comfy.ops
import torch

__all__ = ["NODES"]

_BUILD = {"dtype": torch.float32, "device": "cpu", "operations": comfy.ops.disable_weight_init}


def _flux(config: dict[str, Any], latent: bool) -> comfy.controlnet.ControlNet:
    """XLabs' with an image, or InstantX's with a latent."""
    more = {"patch_size": 2, "mlp_ratio": 4.0, "theta": 10000, "qkv_bias": True, "txt_ids_dims": []}
    # Versions differ in what they take.
    known = {field.name for field in dataclasses.fields(comfy.ldm.flux.model.FluxParams)}
    sizes = {key: value for key, value in {**more, **config}.items() if key in known}
    hint = {"latent_input": True, "control_latent_channels": 16} if latent else {}
    net = comfy.ldm.flux.controlnet.ControlNetFlux(**sizes, **hint, **_BUILD)
    asked = {"compression_ratio": 1, "latent_format": comfy.latent_formats.Flux()} if latent else {}
    return comfy.controlnet.ControlNet(net, **asked, **_ON_CPU, extra_conds=["y", "guidance"])


def _sd3(config: dict[str, Any]) -> comfy.controlnet.ControlNet:
    """InstantX's, of two blocks."""
    sizes = {key: value for key, value in config.items() if key not in ("image_model", "x_block_self_attn_layers")}
    net = comfy.cldm.mmdit.ControlNet(num_blocks=2, control_latent_channels=16, input_size=None, **sizes, **_BUILD)
    asked = {"compression_ratio": 1, "latent_format": comfy.latent_formats.SD3()}
    return comfy.controlnet.ControlNet(net, **asked, **_ON_CPU)


def _sd35(config: dict[str, Any], double: bool) -> comfy.controlnet.ControlNet:
    """Stability's for SD3.5-large, which copies the model's embedding of the pooled text, or of the latent."""
    depth = config["depth"]
    net = comfy.cldm.dit_embedder.ControlNetEmbedder(
        img_size=None,
        patch_size=2,
        in_chans=16,
        num_layers=2,
        main_model_double=depth,
        double_y_emb=double,
        attention_head_dim=64,
        num_attention_heads=depth,
        adm_in_channels=config["adm_in_channels"],
        **_BUILD,
    )
    asked = {"compression_ratio": 1, "latent_format": comfy.latent_formats.SD3(), "preprocess_image": lambda a: a}
    return comfy.controlnet.ControlNetSD35(net, **asked, **_ON_CPU)


def _qwen_fun(config: dict[str, Any]) -> comfy.controlnet.ControlNet:
    """One that embeds the latent with layers of the model that it controls."""
    from comfy.ldm.qwen_image.controlnet import QwenImageFunControlNetModel

    heads, head_width = config["num_attention_heads"], config["attention_head_dim"]
    sizes = {"inner_dim": heads * head_width, "num_attention_heads": heads, "attention_head_dim": head_width}
    blocks = {"num_control_blocks": 1, "main_model_double": config["num_layers"], "injection_layers": (0,)}
    net = QwenImageFunControlNetModel(**sizes, **blocks, **_BUILD)
    asked = {"compression_ratio": 1, "latent_format": comfy.latent_formats.Wan21()}
    return comfy.controlnet.QwenFunControlNet(net, **asked, **_ON_CPU)


def _qwen(config: dict[str, Any], inpaint: bool) -> comfy.controlnet.ControlNet:
    """InstantX's, of one block; that for inpainting takes a mask, too."""
    from comfy.ldm.qwen_image.controlnet import QwenImageControlNetModel

    sizes = {key: value for key, value in config.items() if key not in ("image_model", "num_layers")}
    net = QwenImageControlNetModel(extra_condition_channels=4 if inpaint else 0, num_layers=1, **sizes, **_BUILD)
    asked = {"compression_ratio": 1, "latent_format": comfy.latent_formats.Wan21(), "concat_mask": inpaint}
    return comfy.controlnet.ControlNet(net, **asked, **_ON_CPU)


_ON_CPU = {"load_device": torch.device("cpu"), "manual_cast_dtype": None}
_KINDS = {
    "flux": lambda config: _flux(config, latent=False),
    "flux_latent": lambda config: _flux(config, latent=True),
    "sd3": _sd3,
    "sd35": lambda config: _sd35(config, double=True),
    "sd35_single": lambda config: _sd35(config, double=False),
    "qwen_fun": _qwen_fun,
    "qwen": lambda config: _qwen(config, inpaint=False),
    "qwen_inpaint": lambda config: _qwen(config, inpaint=True),
}


class TestControlNet:
    """A ControlNet with random weights for a model of this configuration."""

    RETURN_TYPES = ("CONTROL_NET",)
    FUNCTION = "make"
    CATEGORY = "testing"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"sort": (list(_KINDS),), "config": ("STRING", {"default": "{}"})}}

    def make(self, sort: str, config: str) -> tuple[Any]:
        control = _KINDS[sort](json.loads(config))
        random = torch.Generator().manual_seed(0)
        # Buffers too: ComfyUI leaves what a file would fill as the memory was.
        for each in (*control.control_model.parameters(), *control.control_model.buffers()):
            each.data = torch.randn(each.shape, generator=random) / max(1, each[0].numel()) ** 0.5
        return (control,)


def _z_image_patch(config: dict[str, Any]) -> torch.nn.Module:
    from comfy.ldm.lumina.controlnet import ZImage_Control

    heads = config["n_heads"]
    return ZImage_Control(dim=config["dim"], n_heads=heads, n_kv_heads=heads, n_control_layers=2, **_BUILD)


def _qwen_patch(config: dict[str, Any]) -> torch.nn.Module:
    from comfy_extras.nodes_model_patch import QwenImageBlockWiseControlNet

    width = config["num_attention_heads"] * config["attention_head_dim"]
    return QwenImageBlockWiseControlNet(num_layers=config["num_layers"], dim=width, **_BUILD)


def _anima_patch(config: dict[str, Any]) -> torch.nn.Module:
    """LLLite's; its sizes are those of a file's tensors."""
    from comfy.ldm.anima.lllite import AnimaLLLite

    module = "lllite_dit_blocks_0_self_attn_q_proj"
    shapes = {
        "lllite_conditioning1.conv1.weight": (4, 3, 4, 4),
        "lllite_conditioning1.conv3.weight": (8, 4, 4, 4),
        "lllite_conditioning1.proj.weight": (8, 8, 1, 1),
        f"{module}.down.weight": (6, config["model_channels"]),
        f"{module}.cond_to_film.weight": (12, 8),
    }
    return AnimaLLLite({name: torch.empty(shape) for name, shape in shapes.items()}, {}, **_BUILD)


def _uso_patch(config: dict[str, Any]) -> torch.nn.Module:
    """USO's, for what `TestSeenImage` gives."""
    from comfy_extras.nodes_model_patch import SigLIPMultiFeatProjModel

    sizes = {"siglip_token_nums": 4, "style_token_nums": 3, "siglip_token_dims": 8}
    return SigLIPMultiFeatProjModel(**sizes, hidden_size=config["hidden_size"], **_BUILD)


def _infinite_talk_patch(config: dict[str, Any]) -> torch.nn.Module:
    """What projects the sounds that `TestHeard` gives; a run gets no further."""
    from comfy.ldm.wan.model_multitalk import MultiTalkAudioProjModel

    net = torch.nn.Module()
    sizes = {"seq_len_vf": 8, "blocks": 2, "channels": 4, "intermediate_dim": 8, "out_dim": 8, "context_tokens": 2}
    net.audio_proj = MultiTalkAudioProjModel(**sizes, **_BUILD)
    return net


_PATCHES = {
    "z_image": _z_image_patch,
    "qwen_image": _qwen_patch,
    "anima": _anima_patch,
    "uso": _uso_patch,
    "infinite_talk": _infinite_talk_patch,
}


class TestModelPatch:
    """A network that runs between another one's blocks, with random weights."""

    RETURN_TYPES = ("MODEL_PATCH",)
    FUNCTION = "make"
    CATEGORY = "testing"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"sort": (list(_PATCHES),), "config": ("STRING", {"default": "{}"})}}

    def make(self, sort: str, config: str) -> tuple[Any]:
        net = _PATCHES[sort](json.loads(config))
        random = torch.Generator().manual_seed(0)
        for weight in net.parameters():
            weight.data = torch.randn(weight.shape, generator=random) / max(1, weight[0].numel()) ** 0.5
        cpu = torch.device("cpu")
        return (comfy.model_patcher.ModelPatcher(net, load_device=cpu, offload_device=cpu),)


class TestImage:
    """A random image."""

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "make"
    CATEGORY = "testing"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        whole = ("INT", {"default": 64, "min": 1, "max": 4096})
        return {"required": {"height": whole, "width": whole}}

    def make(self, height: int, width: int) -> tuple[Any]:
        return (torch.rand(1, height, width, 3, generator=torch.Generator().manual_seed(1)),)


NODES = (TestControlNet, TestModelPatch, TestImage)

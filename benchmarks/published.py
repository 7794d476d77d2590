"""Published models by their configurations, for benchmarks with random weights."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tacod.rank.families import detect
from tacod.rank.families.base import DiT
from tacod.rank.families.inputs import Argument, Inputs

__all__ = ["PUBLISHED", "Published", "Size", "build", "fill", "make_inputs"]


class Size(NamedTuple):
    """Of a picture or a video."""

    width: int
    height: int
    frames: int = 1

    @classmethod
    def parse(cls, text: str) -> Size:
        """Of ``1024``, ``1280x720`` or ``832x480x81``."""
        sides = list(map(int, text.split("x")))
        return cls(*(sides if len(sides) > 1 else 2 * sides))

    def __str__(self) -> str:
        return "x".join(map(str, self if self.frames > 1 else self[:2]))


@dataclass(frozen=True)
class Published:
    """A model, and what a usual forward of it is."""

    config: Mapping[str, Any]
    """ComfyUI's ``unet_config``."""
    comfyui: str | None
    """The name of its class in ComfyUI 0.33.0's ``comfy.supported_models``, if that has it."""
    text: int
    """Tokens of the text."""
    sizes: tuple[Size, ...] = (Size(1024, 1024), Size(2048, 2048))
    """In pixels and frames."""
    cut: Mapping[str, Any] = field(default_factory=dict)
    """What it is cut to on a CPU."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Arguments that ComfyUI's network needs besides, and ours doesn't read."""
    values: Mapping[str, float] = field(default_factory=dict)
    """Arguments of one number per image."""
    frames_per_latent: int = 4
    """Frames of a video that its latents have one for, but for the first."""
    counts: Mapping[int, Mapping[str, int]] = field(default_factory=dict)
    """For numbers of frames the free sizes that don't follow from `frames_per_latent`."""


def _flux2(width: int, heads: int, double: int, single: int, context: int, guided: bool) -> dict[str, Any]:
    return {
        "image_model": "flux2",
        "in_channels": 128,
        "patch_size": 1,
        "out_channels": 128,
        "vec_in_dim": None,
        "context_in_dim": context,
        "hidden_size": width,
        "mlp_ratio": 3.0,
        "num_heads": heads,
        "depth": double,
        "depth_single_blocks": single,
        "axes_dim": [32, 32, 32, 32],
        "theta": 2000,
        "qkv_bias": False,
        "guidance_embed": guided,
        "global_modulation": True,
        "mlp_silu_act": True,
        "txt_ids_dims": [3],
        "ops_bias": False,
        "default_ref_method": "index",
        "ref_index_scale": 10.0,
        "txt_norm": False,
        "yak_mlp": False,
    }


def _wan(width: int, hidden: int, layers: int, channels: int = 16) -> dict[str, Any]:
    return {
        "image_model": "wan2.1",
        "model_type": "t2v",
        "dim": width,
        "ffn_dim": hidden,
        "num_heads": width // 128,
        "num_layers": layers,
        "in_dim": channels,
        "out_dim": channels,
        "text_dim": 4096,
    }


def _minimax_h3(**time: int) -> dict[str, Any]:
    return {
        "image_model": "minimax_h3",
        "num_layers": 50,
        "token_refiner_num_layers": 2,
        "hidden_size": 5376,
        "latents_dim": 24,
        "audio_latents_dim": 32,
        "attention_head_dim": 128,
        "num_attention_heads": 56,
        "ffn_hidden_size": 14336,
        "text_dim": 5120,
        "rope_inv_freq_len": 16,
        **time,
    }


def _ltx(head_width: int, layers: int, **more: Any) -> dict[str, Any]:
    return {
        "image_model": "ltxv",
        "num_layers": layers,
        "num_attention_heads": 32,
        "attention_head_dim": head_width,
        "cross_attention_dim": 32 * head_width,
        "causal_temporal_positioning": True,
        **more,
    }


_LTX2 = {
    "image_model": "ltxav",
    "caption_channels": 3840,
    "use_middle_indices_grid": True,
    "av_ca_timestep_scale_multiplier": 1000.0,
    "rope_type": "split",
    "frequencies_precision": "float64",
}
_LTX23 = {
    "apply_gated_attention": True,
    "cross_attention_adaln": True,
    "caption_proj_before_connector": True,
    "caption_projection_first_linear": False,
    "connector_num_attention_heads": 32,
    "connector_attention_head_dim": 128,
    "connector_num_layers": 8,
    "connector_apply_gated_attention": True,
    "audio_connector_num_attention_heads": 32,
    "audio_connector_attention_head_dim": 64,
}
_SMALL_LTX = {"num_layers": 1, "num_attention_heads": 4, "attention_head_dim": 64, "cross_attention_dim": 256}
_SMALL_LTX2 = {
    **_SMALL_LTX,
    "audio_num_attention_heads": 4,
    "audio_cross_attention_dim": 256,
    "connector_num_layers": 1,
}
_LTX_TIMES: dict[str, Any] = {"frames_per_latent": 8, "counts": {121: {"S": 126}}}


def _cosmos_predict2(width: int, heads: int, blocks: int, kind: str = "cosmos_predict2") -> dict[str, Any]:
    return {
        "image_model": kind,
        "in_channels": 16,
        "out_channels": 16,
        "patch_spatial": 2,
        "patch_temporal": 1,
        "max_img_h": 240,
        "max_img_w": 240,
        "max_frames": 128,
        "model_channels": width,
        "num_heads": heads,
        "num_blocks": blocks,
        "crossattn_emb_channels": 1024,
        "concat_padding_mask": True,
        "use_adaln_lora": True,
        "adaln_lora_dim": 256,
        "pos_emb_cls": "rope3d",
        "pos_emb_learnable": True,
        "pos_emb_interpolation": "crop",
        "min_fps": 1,
        "max_fps": 30,
        "rope_h_extrapolation_ratio": 4.0,
        "rope_w_extrapolation_ratio": 4.0,
        "rope_t_extrapolation_ratio": 1.0,
        "extra_per_block_abs_pos_emb": False,
    }


_SMALL_COSMOS = {"model_channels": 256, "num_heads": 2, "num_blocks": 1}


def _kandinsky5(width: int, time: int, text: int, layers: int, **more: Any) -> dict[str, Any]:
    return {
        "image_model": "kandinsky5",
        "model_dim": width,
        "axes_dims": [16, 24, 24] if width == 1792 else [32, 48, 48],
        "time_dim": time,
        "ff_dim": 4 * width,
        "visual_embed_dim": 132,
        "num_text_blocks": text,
        "num_visual_blocks": layers,
        **more,
    }


def _hunyuan(**more: Any) -> dict[str, Any]:
    return {
        "image_model": "hunyuan_video",
        "in_channels": 16,
        "patch_size": [1, 2, 2],
        "out_channels": 16,
        "vec_in_dim": 768,
        "axes_dim": [16, 56, 56],
        "meanflow": False,
        "context_in_dim": 4096,
        "hidden_size": 3072,
        "mlp_ratio": 4.0,
        "num_heads": 24,
        "depth": 20,
        "depth_single_blocks": 40,
        "theta": 256,
        "qkv_bias": True,
        "byt5": False,
        "guidance_embed": True,
        "use_cond_type_embedding": False,
        "vision_in_dim": None,
        "meanflow_sum": False,
        **more,
    }


_SMALL_HUNYUAN = {"hidden_size": 256, "num_heads": 2, "depth": 1}
_SMALL_H3: dict[str, Any] = {
    "cut": {"num_layers": 1, "token_refiner_num_layers": 1, "num_attention_heads": 2, "ffn_hidden_size": 512},
    "counts": {22: {"T": 7, "A": 37}, 124: {"T": 37, "A": 207}, 362: {"T": 107, "A": 603}},
}
_SMALL_WAN = {"dim": 256, "num_heads": 2, "ffn_dim": 512, "num_layers": 1}
_SMALL_KANDINSKY5 = {"num_text_blocks": 1, "num_visual_blocks": 1, "model_dim": 512, "ff_dim": 512, "time_dim": 64}

PUBLISHED = {
    "flux": Published(
        {
            "image_model": "flux",
            "in_channels": 16,
            "patch_size": 2,
            "out_channels": 16,
            "vec_in_dim": 768,
            "context_in_dim": 4096,
            "hidden_size": 3072,
            "mlp_ratio": 4.0,
            "num_heads": 24,
            "depth": 19,
            "depth_single_blocks": 38,
            "axes_dim": [16, 56, 56],
            "theta": 10000,
            "qkv_bias": True,
            "guidance_embed": True,
            "txt_ids_dims": [],
        },
        "Flux",
        512,
        cut={"hidden_size": 768, "num_heads": 6, "depth": 1, "depth_single_blocks": 1},
        values={"guidance": 3.5},
    ),
    "z_image": Published(
        {
            "image_model": "lumina2",
            "patch_size": 2,
            "in_channels": 16,
            "dim": 3840,
            "cap_feat_dim": 2560,
            "n_layers": 30,
            "qk_norm": True,
            "n_heads": 30,
            "n_kv_heads": 30,
            "axes_dims": [32, 48, 48],
            "axes_lens": [1536, 512, 512],
            "rope_theta": 256.0,
            "ffn_dim_multiplier": 8 / 3,
            "z_image_modulation": True,
            "time_scale": 1000.0,
            "pad_tokens_multiple": 32,
        },
        "ZImage",
        77,
        cut={"n_layers": 1},
        extra={"num_tokens": 77},
    ),
    "krea2": Published(
        {
            "image_model": "krea2",
            "features": 6144,
            "channels": 16,
            "patch": 2,
            "layers": 28,
            "heads": 48,
            "kvheads": 12,
            "txtlayers": 12,
            "txtdim": 2560,
        },
        "Krea2",
        77,
        cut={"layers": 1, "features": 768, "heads": 6, "kvheads": 2},
    ),
    "qwen_image": Published(
        {
            "image_model": "qwen_image",
            "in_channels": 64,
            "out_channels": 16,
            "num_layers": 60,
            "num_attention_heads": 24,
            "attention_head_dim": 128,
            "joint_attention_dim": 3584,
            "axes_dims_rope": [16, 56, 56],
        },
        "QwenImage",
        77,
        sizes=(Size(1024, 1024), Size(1328, 1328)),
        cut={"num_layers": 1},
    ),
    "flux2_klein_9b": Published(
        _flux2(4096, 32, 8, 24, 12288, False), "Flux2", 512, cut={"depth": 1, "depth_single_blocks": 1}
    ),
    "flux2_dev": Published(
        _flux2(6144, 48, 8, 48, 15360, True),
        "Flux2",
        512,
        cut={"depth": 1, "depth_single_blocks": 1},
        values={"guidance": 4.0},
    ),
    "chroma": Published(
        {
            "image_model": "chroma",
            "in_channels": 64,
            "out_channels": 64,
            "patch_size": 2,
            "vec_in_dim": None,
            "context_in_dim": 4096,
            "hidden_size": 3072,
            "mlp_ratio": 4.0,
            "num_heads": 24,
            "depth": 19,
            "depth_single_blocks": 38,
            "axes_dim": [16, 56, 56],
            "theta": 10000,
            "qkv_bias": True,
            "txt_ids_dims": [],
            "in_dim": 64,
            "out_dim": 3072,
            "hidden_dim": 5120,
            "n_layers": 5,
        },
        "Chroma",
        256,
        cut={"hidden_size": 768, "out_dim": 768, "num_heads": 6, "depth": 1, "depth_single_blocks": 1},
        values={"guidance": 0.0},
    ),
    "lumina2": Published(
        {
            "image_model": "lumina2",
            "patch_size": 2,
            "in_channels": 16,
            "dim": 2304,
            "cap_feat_dim": 2304,
            "n_layers": 26,
            "qk_norm": True,
            "n_heads": 24,
            "n_kv_heads": 8,
            "axes_dims": [32, 32, 32],
            "axes_lens": [300, 512, 512],
            "rope_theta": 10000.0,
            "ffn_dim_multiplier": 4.0,
        },
        "Lumina2",
        77,
        cut={"n_layers": 1},
        extra={"num_tokens": 77},
    ),
    "hidream": Published(
        {
            "image_model": "hidream",
            "attention_head_dim": 128,
            "axes_dims_rope": [64, 32, 32],
            "caption_channels": [4096, 4096],
            "max_resolution": [128, 128],
            "in_channels": 16,
            "llama_layers": [*range(32), *[31] * 16],
            "num_attention_heads": 20,
            "num_routed_experts": 4,
            "num_activated_experts": 2,
            "num_layers": 16,
            "num_single_layers": 32,
            "out_channels": 16,
            "patch_size": 2,
            "text_emb_dim": 2048,
        },
        "HiDream",
        128,
        sizes=(Size(1024, 1024),),
        cut={"num_layers": 1, "num_single_layers": 1, "llama_layers": [0, 31], "num_attention_heads": 4},
    ),
    "qwen_image_21": Published(
        {
            "image_model": "qwen_image21",
            "in_channels": 64,
            "out_channels": 64,
            "num_layers": 32,
            "attention_head_dim": 128,
            "num_attention_heads": 32,
            "context_in_dim": 4096,
            "mlp_ratio": 3,
            "fused_mlp": True,
        },
        None,
        256,
        cut={"num_layers": 1, "num_attention_heads": 2},
    ),
    "flux3_klein": Published(
        {
            "image_model": "flux3",
            "in_channels": 128,
            "cond_in_channels": 128,
            "num_layers": 5,
            "num_single_layers": 28,
            "attention_head_dim": 128,
            "num_attention_heads": 24,
            "joint_attention_dim": 20480,
            "timestep_channels": 256,
            "mlp_ratio": 3.0,
            "axes_dims_rope": [32] * 4,
            "rope_theta": 10000,
            "flow_map": False,
        },
        None,
        480,
        cut={"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2},
    ),
    "anima": Published(
        _cosmos_predict2(2048, 16, 28, "anima"), "Anima", 512, sizes=(Size(1024, 1024),), cut=_SMALL_COSMOS
    ),
    "cosmos_predict2_14b": Published(
        _cosmos_predict2(5120, 40, 36), "CosmosT2IPredict2", 512, sizes=(Size(1024, 1024),), cut=_SMALL_COSMOS
    ),
    "hunyuan_video": Published(
        _hunyuan(),
        "HunyuanVideo",
        256,
        sizes=(Size(960, 544, 129), Size(1280, 720, 129)),
        cut={**_SMALL_HUNYUAN, "depth_single_blocks": 1},
        values={"guidance": 6.0},
    ),
    "hunyuan_video_1.5": Published(
        _hunyuan(
            patch_size=[1, 1, 1],
            in_channels=65,
            out_channels=32,
            vec_in_dim=None,
            context_in_dim=3584,
            hidden_size=2048,
            num_heads=16,
            depth=54,
            depth_single_blocks=0,
            byt5=True,
            guidance_embed=False,
            use_cond_type_embedding=True,
            vision_in_dim=1152,
            meanflow_sum=True,
        ),
        "HunyuanVideo15",
        1000,
        sizes=(Size(848, 480, 121), Size(1280, 720, 121)),
        cut=_SMALL_HUNYUAN,
    ),
    "hunyuan_image_2.1": Published(
        _hunyuan(
            patch_size=[1, 1],
            axes_dim=[64, 64],
            in_channels=64,
            out_channels=64,
            vec_in_dim=None,
            context_in_dim=3584,
            hidden_size=3584,
            num_heads=28,
            byt5=True,
            guidance_embed=False,
        ),
        "HunyuanImage21",
        1000,
        sizes=(Size(2048, 2048),),
        cut={**_SMALL_HUNYUAN, "depth_single_blocks": 1},
    ),
    "wan_1.3b": Published(_wan(1536, 8960, 30), "WAN21_T2V", 512, sizes=(Size(832, 480, 81),), cut=_SMALL_WAN),
    "wan_14b": Published(
        _wan(5120, 13824, 40), "WAN21_T2V", 512, sizes=(Size(832, 480, 81), Size(1280, 720, 81)), cut=_SMALL_WAN
    ),
    "wan_5b": Published(_wan(3072, 14336, 30, 48), "WAN22_T2V", 512, sizes=(Size(1280, 704, 121),), cut=_SMALL_WAN),
    "minimax_h3": Published(
        _minimax_h3(adaln_curve_grid=1025, time_embed_dim=8), "MiniMaxH3", 512, (Size(1344, 768, 124),), **_SMALL_H3
    ),
    "minimax_h3_full": Published(
        _minimax_h3(timestep_input_dim=256, time_embed_hidden_size=5376, time_embed_dim=2688),
        "MiniMaxH3",
        512,
        (Size(1344, 768, 124),),
        **_SMALL_H3,
    ),
    "ltx_video_2b": Published(
        _ltx(64, 28), "LTXV", 256, (Size(768, 512, 97),), _SMALL_LTX, {"attention_mask": None}, frames_per_latent=8
    ),
    "ltx_video_13b": Published(
        _ltx(128, 48), "LTXV", 256, (Size(1216, 704, 121),), _SMALL_LTX, {"attention_mask": None}, frames_per_latent=8
    ),
    "ltx2_19b": Published(
        _ltx(128, 48, **_LTX2), "LTXAV", 1024, (Size(1280, 704, 121),), cut=_SMALL_LTX2, **_LTX_TIMES
    ),
    "ltx2.3_21b": Published(
        _ltx(128, 48, **_LTX2, **_LTX23), "LTXAV", 1024, (Size(1280, 704, 121),), cut=_SMALL_LTX2, **_LTX_TIMES
    ),
    "kandinsky5_lite": Published(
        _kandinsky5(1792, 512, 2, 32), "Kandinsky5", 256, sizes=(Size(768, 512, 121),), cut=_SMALL_KANDINSKY5
    ),
    "kandinsky5_pro": Published(
        _kandinsky5(4096, 1024, 4, 60), "Kandinsky5", 256, sizes=(Size(1280, 768, 121),), cut=_SMALL_KANDINSKY5
    ),
    "kandinsky5_image": Published(
        _kandinsky5(2560, 512, 2, 50, visual_embed_dim=64, rope_scale_factor=[1.0, 1.0, 1.0]),
        "Kandinsky5Image",
        256,
        cut=_SMALL_KANDINSKY5,
    ),
}


def build(name: str, device: torch.device, dtype: torch.dtype) -> DiT:
    """A model with random weights, the same in every process; on a CPU it is cut to a block or two."""
    model = PUBLISHED[name]
    family, config = detect({}, {**model.config, **(model.cut if device.type == "cpu" else {})})
    with torch.device("meta"):
        dit = family(config)
    for key, value in dit.state_dict(keep_vars=True).items():
        value.data = value.data.to(dit.dtype_of(key, dtype))
    dit = dit.to_empty(device=device)
    fill({key: value.data for key, value in dit.state_dict(keep_vars=True).items()})
    return dit.eval().requires_grad_(False)


def fill(weights: Mapping[str, Tensor]) -> None:
    """Fill weights at random, each by its name alone: matrices keep what they multiply about as large as it was."""
    for name, weight in weights.items():
        if weight.is_meta or not weight.is_floating_point() or not weight.numel():
            continue
        generator = torch.Generator(weight.device).manual_seed(zlib.crc32(name.encode()))
        values = torch.randn(weight.shape, generator=generator, device=weight.device)
        if weight.ndim > 1:
            values *= weight[0].numel() ** -0.5
        else:
            values = 0.02 * values + (0.0 if name.endswith("bias") else 1.0)
        weight.copy_(values)


def make_inputs(name: str, dit: DiT, size: Size, device: torch.device) -> Inputs:
    """A usual forward's arguments at this size, at noise level 0.7, in the model's dtype."""
    model = PUBLISHED[name]
    generator = torch.Generator().manual_seed(1)
    sizes = {**dict.fromkeys(dit.usual, 1), "L": model.text, "M": model.text}
    sizes |= {"H": size.height // dit.downscale, "W": size.width // dit.downscale}
    sizes["T"] = (size.frames - 1) // model.frames_per_latent + 1
    sizes |= model.counts.get(size.frames, {})
    specs = dit.arguments()
    values: dict[str, Any] = {}

    def noise(spec: Argument) -> Tensor:
        shape = [sizes[side] if isinstance(side, str) else side for side in spec.shape or ()]
        return torch.randn(shape, generator=generator).to(device, dit.dtype)

    for key, spec in specs.items():
        if not isinstance(spec, Argument) or spec.shape is None or spec.keys:
            continue
        if spec.required or key in dit.usual_optional:
            values[key] = [noise(each) for each in spec.members or [spec]] if spec.many else noise(spec)
    level = dit.timestep(torch.full((1,), 0.7)).float().to(device)
    values["timestep"] = [level] * len(values["timestep"]) if isinstance(values["timestep"], list) else level
    values |= {key: torch.full((1,), value, device=device) for key, value in model.values.items()}
    return Inputs(values, specs)

"""diffusers' ``config.json`` in the words of ComfyUI's ``unet_config``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tacod_client.errors import ModelUnsupported

__all__ = ["is_known", "translate"]

Config = Mapping[str, Any]


def translate(path: str, config: Config) -> dict[str, Any]:
    """The whole configuration of the model in the folder ``path``.

    A class whose name has a known one in it is taken for a subclass, whose weights are that one's
    (``FluxTransformer2DModelWithMasking``, as SimpleTuner has it); other weights are refused by their names.

    Raises `ModelUnsupported`, naming the class or the key, for what has no translation.
    """
    translation = _find(config)
    if translation is None:
        name = config.get("_class_name")
        raise ModelUnsupported(
            f"{path}: config.json's _class_name is {name!r:.80}; this version reads folders of {', '.join(_CLASSES)}"
        )
    return translation(config)


def is_known(config: Config) -> bool:
    """Whether its class is one that `translate` reads."""
    return _find(config) is not None


def _find(config: Config) -> Callable[[Config], dict[str, Any]] | None:
    name = config.get("_class_name")
    if name == "Transformer2DModel" and config.get("norm_type") == "ada_norm_single":
        return _pixart  # as diffusers called it when PixArt was published
    return next((read for known, read in _CLASSES.items() if isinstance(name, str) and known in name), None)


def _flux(config: Config) -> dict[str, Any]:
    heads, width = _whole(config, "num_attention_heads", 24), _whole(config, "attention_head_dim", 128)
    inputs = _whole(config, "in_channels", 64)
    outputs = inputs if config.get("out_channels") is None else _whole(config, "out_channels", inputs)
    if config.get("patch_size", 1) != 1 or inputs % 4 or outputs % 4:
        raise ModelUnsupported("config.json: in_channels and out_channels must be patches of 2 by 2, and patch_size 1")
    axes = config.get("axes_dims_rope", (16, 56, 56))
    return {
        "image_model": "flux",
        "in_channels": inputs // 4,
        "out_channels": outputs // 4,
        "vec_in_dim": _whole(config, "pooled_projection_dim", 768),
        "context_in_dim": _whole(config, "joint_attention_dim", 4096),
        "hidden_size": heads * width,
        "mlp_ratio": 4.0,
        "num_heads": heads,
        "depth": _whole(config, "num_layers", 19),
        "depth_single_blocks": _whole(config, "num_single_layers", 38),
        "axes_dim": list(axes) if isinstance(axes, list | tuple) else axes,
        "theta": 10000,
        "patch_size": 2,
        "qkv_bias": True,
        "guidance_embed": config.get("guidance_embeds", False),
        "txt_ids_dims": [],
    }


def _sd3(config: Config) -> dict[str, Any]:
    depth = _whole(config, "num_layers", 18)
    width = _whole(config, "caption_projection_dim", 1152)
    for key, expected, default in (
        ("attention_head_dim", 64, 64),
        ("num_attention_heads", depth, 18),
        ("caption_projection_dim", 64 * depth, 1152),
    ):
        if config.get(key, default) != expected:
            found = f"config.json: {key} is {config.get(key, default)!r:.80}"
            raise ModelUnsupported(f"{found}; with {depth} layers this version runs {expected}")
    context, positions = _whole(config, "joint_attention_dim", 4096), _whole(config, "pos_embed_max_size", 96)
    norm, dual = config.get("qk_norm"), config.get("dual_attention_layers", ())
    return {
        "image_model": "sd3",
        "in_channels": _whole(config, "in_channels", 16),
        "patch_size": _whole(config, "patch_size", 2),
        "out_channels": _whole(config, "out_channels", 16),
        "depth": depth,
        "input_size": None,
        "adm_in_channels": _whole(config, "pooled_projection_dim", 2048),
        "context_size": context,
        "context_embedder_config": {
            "target": "torch.nn.Linear",
            "params": {"in_features": context, "out_features": width},
        },
        "num_patches": positions**2,
        "pos_embed_max_size": positions,
        "pos_embed_scaling_factor": None,
        "context_processor_layers": None,
        "qk_norm": "rms" if norm == "rms_norm" else norm,
        "x_block_self_attn_layers": list(dual) if isinstance(dual, list | tuple) else dual,
    }


def _pixart(config: Config) -> dict[str, Any]:
    heads, size = _whole(config, "num_attention_heads", 16), _whole(config, "sample_size", 128)
    inputs = _whole(config, "in_channels", 4)
    outputs = inputs if config.get("out_channels", 8) is None else _whole(config, "out_channels", 8)
    if outputs not in (inputs, 2 * inputs):
        raise ModelUnsupported(f"config.json: out_channels is {outputs}; expected in_channels, or twice as many")
    sized = config.get("use_additional_conditions")
    sized = size == 128 if sized is None else bool(sized)
    return {
        "image_model": "pixart_alpha" if sized else "pixart_sigma",
        "num_heads": heads,
        "patch_size": _whole(config, "patch_size", 2),
        "hidden_size": heads * _whole(config, "attention_head_dim", 72),
        "in_channels": inputs,
        "depth": _whole(config, "num_layers", 28),
        "caption_channels": _whole(config, "caption_channels", 4096),
        "pred_sigma": outputs != inputs,
        "micro_condition": sized,
    }


def _whole(config: Config, key: str, default: int) -> int:
    value = config.get(key, default)
    if type(value) is not int or not 0 <= value <= 1 << 20:
        raise ModelUnsupported(f"config.json: {key} is {value!r:.80}; expected a whole number")
    return value


_CLASSES: dict[str, Callable[[Config], dict[str, Any]]] = {
    "FluxTransformer2DModel": _flux,
    "PixArtTransformer2DModel": _pixart,
    "SD3Transformer2DModel": _sd3,
}

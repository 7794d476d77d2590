"""Which model a file holds."""

from __future__ import annotations

from typing import Any

import comfy.supported_models


def unet_prefix_from_state_dict(state_dict: dict[str, Any]) -> str:
    """What stands before the network's names."""
    return "model.diffusion_model." if any(key.startswith("model.diffusion_model.") for key in state_dict) else "model."


def detect_unet_config(state_dict: dict[str, Any], key_prefix: str, metadata: Any = None) -> dict[str, Any] | None:
    """What the shapes tell."""
    blocks = {name: len({key.split(".")[1] for key in state_dict if key.startswith(f"{name}.")}) for name in _LISTS}
    if "cond_seq_linear.weight" in state_dict:
        dim, cond = state_dict["cond_seq_linear.weight"].shape
        return {"kind": "aura", "dim": dim, "cond_seq_dim": cond, "blocks": [*blocks.values()][:2]}
    if "wave_in.weight" in state_dict:
        dim, channels = state_dict["wave_in.weight"].shape
        return {"kind": "waves", "dim": dim, "channels": channels, "blocks": blocks["layers"]}
    return None


def model_config_from_unet_config(
    unet_config: dict[str, Any], state_dict: Any = None, unet_key_prefix: str = ""
) -> Any:
    """The model of this configuration."""
    config = dict(unet_config)
    kinds = {"aura": comfy.supported_models.AuraFlow, "waves": comfy.supported_models.Waves}
    return kinds[config.pop("kind")](config)


_LISTS = ("double_layers", "single_layers", "layers")

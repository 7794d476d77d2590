"""What a network makes of a text before its forwards, with weights that lie in its file: Anima's ``llm_adapter``.

ComfyUI calls it once for each text of a run. It is small, and runs here by ComfyUI's own code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher

from .errors import Refused
from .network import skeleton_layers
from .patches import PREFIX

__all__ = ["ADAPTER", "METHOD", "adapted", "without_adapter"]

METHOD = "preprocess_text_embeds"
ADAPTER = "llm_adapter"
_PACKED = {torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8}


def without_adapter(patches: Mapping[str, Any]) -> dict[str, Any]:
    """Patches by ComfyUI's names of weights in a MODEL, but for the adapter's: the daemon has none of its weights."""
    return {key: entries for key, entries in patches.items() if not _is_of_adapter(key)}


def _is_of_adapter(key: str) -> bool:
    return key.startswith(f"{PREFIX}{ADAPTER}.")


def adapted(
    skeleton: torch.nn.Module, state: Callable[[], Mapping[str, torch.Tensor]], patches: Callable[[], Mapping[str, Any]]
) -> Callable[..., torch.Tensor]:
    """The network's `METHOD`, on the device and in the dtype of the text that it gets.

    Args:
        skeleton: The network without weights.
        state: Gives the weights of its file or MODEL, by its own names.
        patches: Gives the patches of weights, by the MODEL's names.
    """

    def run(text: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        adapter = _filled(getattr(skeleton, ADAPTER), state(), patches(), text.device).to(text.device)
        for weight in adapter.parameters():
            # Buffers stay fp32: they are the frequencies of its positions.
            weight.data = weight.data.to(text.dtype)
        network = object.__new__(type(skeleton))
        vars(network).update(vars(skeleton))
        network._modules = {**skeleton._modules, ADAPTER: adapter}
        out: torch.Tensor = getattr(network, METHOD)(text, *args, **kwargs)
        return out

    return run


def _filled(
    shapes: torch.nn.Module, state: Mapping[str, torch.Tensor], patches: Mapping[str, Any], device: torch.device
) -> torch.nn.Module:
    """The adapter with the weights of a file, in the file's dtype, and patches of them as ComfyUI merges them."""
    prefix = f"{ADAPTER}."
    weights = {key.removeprefix(prefix): state[key] for key in state if key.startswith(prefix)}
    dtypes = {each.dtype for each in weights.values() if each.ndim > 1}
    if set(weights) != set(shapes.state_dict()) or len(dtypes) != 1 or dtypes & _PACKED:
        raise Refused(
            f"an {ADAPTER} that is quantized or not whole",
            "it runs in ComfyUI; take a file that has all of it in bf16, fp16 or fp32",
        )
    (dtype,) = dtypes
    # Made anew: the shapes' own tables of angles are without contents.
    adapter: torch.nn.Module = type(shapes)(device="cpu", dtype=dtype, operations=skeleton_layers())
    adapter.requires_grad_(False)
    adapter.load_state_dict(weights)
    patched = {key: entries for key, entries in patches.items() if _is_of_adapter(key)}
    if patched:
        root = torch.nn.Module()
        root.diffusion_model = torch.nn.Module()
        root.diffusion_model.add_module(ADAPTER, adapter)
        patcher = ModelPatcher(root, device, torch.device("cpu"))
        patcher.patches = patched
        for key in patched:
            patcher.patch_weight_to_device(key, device)
    return adapter

"""The file that a MODEL's weights came from, found and checked before it is trusted."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Mapping
from typing import Any

import comfy.model_detection
import comfy.sd
import folder_paths
import torch
from comfy.model_patcher import ModelPatcher
from safetensors import safe_open

__all__ = ["names_in_file", "origin_of", "watch_loaders"]

_STAMP = "taco_dit_file"
_LOADERS = ("load_diffusion_model", "load_checkpoint_guess_config")
_WIDGETS = {"unet_name": "diffusion_models", "ckpt_name": "checkpoints"}
NUMBERS = 64
"""How many numbers of each weight are compared with the file's."""
DEPTH = 64
"""How far up the graph to look for a loader."""
_SCALES = ("scale_weight", "weight_scale")
"""What a file may call the scale of a layer's 8-bit weight; ComfyUI renames it, by version."""
_NOTES = (*_SCALES, "scale_input", "input_scale", "comfy_quant")
"""What stands beside weights in 8 bit; ComfyUI makes up what a file leaves out."""


def watch_loaders() -> None:
    """Note on every model that ComfyUI loads from now on which file it came from; older versions forget that."""
    for name in _LOADERS:
        original = getattr(comfy.sd, name)
        if not hasattr(original, _STAMP):
            setattr(comfy.sd, name, _stamping(original))


def _stamping(load: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(load)

    @functools.wraps(load)
    def stamped(*args: Any, **kwargs: Any) -> Any:
        loaded = load(*args, **kwargs)
        # However the loader was called, the path comes first in what it takes.
        path = next(iter(signature.bind(*args, **kwargs).arguments.values()), None)
        for model in loaded if isinstance(loaded, tuple) else (loaded,):
            if isinstance(model, ModelPatcher) and isinstance(path, str):
                # On the inner model, which all clones of a MODEL share.
                setattr(model.model, _STAMP, path)
        return loaded

    setattr(stamped, _STAMP, True)
    return stamped


def origin_of(model: ModelPatcher, state: Mapping[str, torch.Tensor], graph: Any, node: str | None) -> str | None:
    """The file with just these weights, or None.

    Args:
        model: The MODEL.
        state: Its network's weights as they were loaded, without patches.
        graph: The graph that is being run, by node ids.
        node: The id of the node whose input ``model`` leads to the loader.
    """
    for path in (getattr(model.model, _STAMP, None), _noted(model), _upstream(graph, node)):
        if path is not None and os.path.isfile(path) and _holds(path, state):
            return os.path.realpath(path)
    return None


def _noted(model: ModelPatcher) -> str | None:
    """What newer versions of ComfyUI note themselves: the loader and its arguments."""
    init = getattr(model, "cached_patcher_init", None)
    try:
        path = init[1][0] if init is not None and init[0].__name__ in _LOADERS else None
    except (AttributeError, IndexError, TypeError):
        return None
    return path if isinstance(path, str) else None


def _upstream(graph: Any, node: str | None) -> str | None:
    """The file that a loader further up the graph names in its widget."""
    for _ in range(DEPTH):
        inputs = _inputs(graph, node)
        for widget, folder in _WIDGETS.items():
            if isinstance(inputs.get(widget), str):
                return folder_paths.get_full_path(folder, inputs[widget])
        link = inputs.get("model")
        if not isinstance(link, list) or len(link) != 2:
            return None
        node = link[0]
    return None


def _inputs(graph: Any, node: str | None) -> Mapping[str, Any]:
    try:
        found: Mapping[str, Any] = graph.get_node(node)["inputs"]
    except Exception:  # its own kind of error, which differs by version
        return {}
    return found


def names_in_file(keys: Mapping[str, Any]) -> dict[str, str]:
    """The diffusion model's weights by ComfyUI's names, and what they are called in a file with these keys."""
    prefix = comfy.model_detection.unet_prefix_from_state_dict(keys)
    names = {key.removeprefix(prefix): key for key in keys if key.startswith(prefix)}
    return names or {key: key for key in keys}


def _holds(path: str, state: Mapping[str, torch.Tensor]) -> bool:
    """Whether a file holds these weights: names, shapes, and the first numbers of each as ComfyUI rounds them."""
    if not path.endswith((".safetensors", ".sft")):
        return False
    with safe_open(path, framework="pt") as file:
        names = names_in_file(dict.fromkeys(file.keys()))
        weights = {key: weight for key, weight in state.items() if key.rpartition(".")[2] not in _NOTES}
        for key, weight in weights.items():
            if key not in names or file.get_slice(names[key]).get_shape() != list(weight.shape):
                return False
        scaled = any(key.endswith(_SCALES) for key in names)
        for key in weights:
            if not _same_start(file.get_slice(names[key]), weights[key], scaled):
                return False
            layer = key.removesuffix("weight")
            theirs = [file.get_tensor(names[layer + scale]) for scale in _SCALES if layer + scale in names]
            ours = [state[layer + scale] for scale in _SCALES if layer + scale in state]
            if theirs and not (ours and torch.equal(theirs[0].float(), ours[0].float().cpu())):
                return False
    return True


def _same_start(stored: Any, weight: torch.Tensor, scaled: bool) -> bool:
    """Whether the first numbers agree, and the model's dtype isn't one of those that lose more than a device's own.

    Of a file of scaled weights ComfyUI 0.3.64 keeps more in 8 bit than the file does, and nobody asked for that.
    """
    # The first row holds them, of a matrix as of a vector; a single number is all of itself.
    shape = stored.get_shape()
    theirs = stored[:1].flatten()[:NUMBERS] if len(shape) > 1 else stored[:NUMBERS] if shape else stored[...]
    if weight.dtype.itemsize < theirs.dtype.itemsize and weight.dtype.itemsize == 1 and not scaled:
        return False
    ours = weight[:1].flatten()[:NUMBERS] if len(shape) > 1 else weight[:NUMBERS] if shape else weight
    # As bytes: what is no number equals nothing, itself neither.
    pair = (theirs.to(weight.dtype), ours.detach().cpu())
    return torch.equal(*(each.reshape(-1).contiguous().view(torch.uint8) for each in pair))

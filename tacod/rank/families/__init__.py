"""The model families that this version runs: every module of this package that defines a `DiT`.

Adding a family adds a file here, and edits nothing.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Mapping
from functools import cache
from typing import Any

from tacod.checkpoint import TensorInfo
from tacod.checkpoint.diffusers import DiffusersConfig, check_class
from tacod.rank.families.base import DiT
from tacod.rank.families.names import FUSED_NAMES, Place
from tacod_client.errors import ModelCorrupt, ModelUnsupported

__all__ = ["detect", "diffusers_layout", "families", "from_diffusers", "is_known"]

_KNOWN = 0.5
"""The part of a file's weights and biases that a family's table of names must know, if the file is of that family."""
_LACKING = 2
"""A file may lack as many of the table's names and still be of that family, damaged."""
_UNETS = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "SDXL", 1280: "the SDXL refiner"}
_ELSEWHERE = {
    "double_layers.0.attn.w1q.weight": "AuraFlow",
    "dec_net.cond_embed.weight": "Z-Image of pixels",
    "controlnet_blocks.0.weight": "a ControlNet, which ComfyUI loads beside the model",
}
"""A tensor that tells, and whose it is: to refuse by name what no family here has claimed."""


@cache
def families() -> tuple[type[DiT], ...]:
    """Every family, by name."""
    found = []
    for info in pkgutil.iter_modules(__path__, f"{__name__}."):
        module = importlib.import_module(info.name)
        for _, kind in inspect.getmembers(module, inspect.isclass):
            if issubclass(kind, DiT) and kind.__module__ == module.__name__ and not inspect.isabstract(kind):
                found.append(kind)
    return tuple(sorted(found, key=lambda kind: kind.family))


def detect(
    tensors: Mapping[str, TensorInfo], config: Mapping[str, Any] | None = None
) -> tuple[type[DiT], dict[str, Any]]:
    """A file's family and its configuration in ComfyUI's ``unet_config`` vocabulary, from keys (bare) and shapes.

    ``config`` is what the file itself says (``tacod.config``); it overrides what is detected.
    Raises `ModelUnsupported`, which says what the file is as far as that can be told.
    """
    override = dict(config or {})
    if "image_model" in override:
        named = override["image_model"]
        for family in families():
            if named in family.image_models:
                return family, {**(_detect(family, tensors) or {}), **override}
        raise ModelUnsupported(f"config key 'image_model' is {named!r:.80}; {_we_run()}")
    for family in families():
        detected = _detect(family, tensors)
        if detected is not None:
            return family, {**detected, **override}
    raise ModelUnsupported(_refusal(tensors))


def diffusers_layout(
    tensors: Mapping[str, TensorInfo], config: Mapping[str, Any] | None = None
) -> dict[str, Place] | None:
    """Where the tensors of a file that has diffusers' names lie in a single file; None for one that hasn't.

    ``config`` is what the file itself says. Raises `ModelCorrupt` for one that lacks little of what a family needs.
    """
    if any(mark in tensors for mark in _ELSEWHERE):
        return None
    shapes = {_apart(name): info.shape for name, info in tensors.items()}
    layers = [name for name in shapes if name.endswith((".weight", ".bias"))]
    damaged = []
    for family in families():
        known = sum(map(family.names.knows, layers))
        if not known or known < _KNOWN * len(layers):
            continue
        detected = _detect_theirs(family, shapes)
        if detected is not None:
            return family.diffusers_layout({**detected, **(config or {})})
        lacking = [name for name in family.names.lacks(shapes) if name not in family.diffusers_optional]
        if 0 < len(lacking) <= _LACKING:
            damaged.append((len(lacking), -known, ", ".join(lacking)))
    if damaged and not any(_is_its_own(family, tensors) for family in families()):
        # Of the family that lacks least of it, and knows most of it.
        raise ModelCorrupt(f"the file lacks {min(damaged)[2]}; download it again")
    return None


def _is_its_own(family: type[DiT], tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether the tensors have a family's own names, some of which may be another's in diffusers."""
    try:
        return _detect(family, tensors) is not None
    except ModelUnsupported:
        return True


def _apart(name: str) -> str:
    """A tensor's name in diffusers, for one that holds several, which are as good as the first of them."""
    for whole, first in FUSED_NAMES.items():
        name = name.replace(f".{whole}.", f".{first[0]}.")
    return name


def from_diffusers(path: str, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """The configuration, in ComfyUI's ``unet_config`` vocabulary, of a folder in diffusers' layout.

    It comes from the tensors' shapes, and from ``config``, the ``config.json`` in the folder ``path``, which says what
    shapes don't tell. A class whose name contains a known one is taken for its subclass, with the same weights
    (``FluxTransformer2DModelWithMasking``, as SimpleTuner has it); other weights are refused by their names.

    Raises `ModelUnsupported`, naming the class or the key, for what no family runs, and `ModelCorrupt`, naming the
    tensors, if the folder lacks what the family is told by.
    """
    check_class(path, config)
    given = DiffusersConfig(config)
    name = given.class_name or ""
    classes = [(family, *each) for family in families() for each in family.diffusers.items()]
    family, _, answer_of = next(each for each in classes if each[1] in name)
    answer = answer_of(given)
    shapes = {_apart(name): info.shape for name, info in tensors.items()}
    detected = _detect_theirs(family, shapes)
    if detected is None:
        lacking = [name for name in family.names.lacks(shapes) if name not in family.diffusers_optional]
        raise ModelCorrupt(f"{path} lacks {', '.join(lacking[:5])}; download it again")
    return {**detected, **answer}


def is_known(tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether the keys are those of a family, in its own names or in diffusers'; they needn't be all there."""
    try:
        return diffusers_layout(tensors) is not None or any(_detect(each, tensors) is not None for each in families())
    except (ModelCorrupt, ModelUnsupported):
        return True


def _detect(family: type[DiT], tensors: Mapping[str, TensorInfo]) -> dict[str, Any] | None:
    return family.detect({family.canonical(name): info for name, info in tensors.items()})


def _detect_theirs(family: type[DiT], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any] | None:
    """The same for shapes by diffusers' names; None also if they lack what the family reads."""
    try:
        return family.detect({name: TensorInfo("F32", shape) for name, shape in family.names.ours(shapes).items()})
    except ModelUnsupported:
        return None


def _refusal(tensors: Mapping[str, TensorInfo]) -> str:
    if any(key.startswith(("input_blocks.", "down_blocks.")) for key in tensors):
        widths = {info.shape[-1] for key, info in tensors.items() if key.endswith("attn2.to_k.weight") and info.shape}
        name = next((f" ({_UNETS[width]})" for width in sorted(widths) if width in _UNETS), "")
        return (
            f"the file is a UNet{name}; TACO-DiT runs diffusion transformers, whose tokens it splits over devices, and "
            f"a UNet has no such sequence: load it with ComfyUI's own loader, on one GPU. {_we_run().capitalize()}"
        )
    for key, name in _ELSEWHERE.items():
        if key in tensors:
            return f"the file looks like {name}; {_we_run()}"
    if any(".lora_" in key or key.endswith(".alpha") for key in tensors):
        return "the file is a LoRA, not a model: load the model, and put the LoRA on it with a LoRA loader"
    sample = ", ".join(sorted(tensors)[:3]) or "none"
    return f"no family knows this file by its {len(tensors)} tensors ({sample}, …); {_we_run()}"


def _we_run() -> str:
    return f"this version runs {', '.join(family.family for family in families())}"

"""Weights that a network keeps packed: which of its layers, in which of ComfyUI's formats.

What is said of a layer is read as the daemon reads it (`tacod.checkpoint.quantization`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

from tacod.checkpoint.quantization import DESCRIPTION, FORMATS, OLD_SIDES, SIDES, Quantization, descriptions
from tacod_client.errors import ModelCorrupt, ModelUnsupported

from .errors import Refused

__all__ = [
    "canonical",
    "check_formats",
    "check_layouts",
    "layers_of",
    "note_of",
    "parts_of",
    "read_layers",
    "stands_beside",
]

_BESIDE = {*SIDES, *OLD_SIDES, DESCRIPTION}
_FP8 = "TensorCoreFP8Layout"
_LAYOUTS = {
    "float8_e4m3fn": (_FP8, "TensorCoreFP8E4M3Layout"),
    "float8_e5m2": (_FP8, "TensorCoreFP8E5M2Layout"),
    "mxfp8": ("TensorCoreMXFP8Layout",),
    "nvfp4": ("TensorCoreNVFP4Layout",),
    "int8_tensorwise": ("TensorWiseINT8Layout",),
    "convrot_w4a4": ("TensorCoreConvRotW4A4Layout",),
    "asym_w4a8_int8": ("AsymW4A8Int8Layout",),
}
"""Comfy-kitchen's layouts of tensors in the formats that the daemon reads."""
_READS = f"the daemon reads {', '.join(FORMATS)}; take a file in one of them, or in bf16"


def canonical(name: str) -> str:
    """A tensor's name in ComfyUI's spelling of today."""
    layer, dot, leaf = name.rpartition(".")
    return f"{layer}{dot}{OLD_SIDES.get(leaf, leaf)}"


def stands_beside(name: str) -> bool:
    """Whether a tensor says how to read a layer's weight, and is no weight itself."""
    return name.rpartition(".")[2] in _BESIDE


def note_of(said: Mapping[str, Any]) -> torch.Tensor:
    """A layer's JSON as its ``comfy_quant``."""
    return torch.frombuffer(bytearray(json.dumps(said).encode()), dtype=torch.uint8)


def layers_of(state: Mapping[str, torch.Tensor]) -> dict[str, Quantization]:
    """A state dict's quantized layers by their names. Raises `Refused` for what the daemon doesn't read."""
    sizes = {name: each.numel() for name, each in state.items()}
    try:
        said, _ = descriptions("the MODEL", sizes, (), "", lambda name: bytes(state[name].tolist()))
    except ModelCorrupt as error:
        raise Refused("a quantized layer", f"{error.message}") from None
    return read_layers(said)


def read_layers(said: Mapping[str, Mapping[str, Any]]) -> dict[str, Quantization]:
    """Layers by what is said of each. Raises `Refused`, by name and format, for what the daemon doesn't read."""
    found = {}
    for name, each in said.items():
        try:
            found[name] = Quantization.of(name, each)
        except ModelUnsupported:
            raise Refused(f"layer {name} in format {each.get('format')!r}", _READS) from None
        except ModelCorrupt as error:
            raise Refused(f"layer {name}", error.message) from None
    return found


def parts_of(key: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """A quantized tensor as a file has it: the packed numbers and what stands beside them; empty for other tensors.

    Raises `Refused` for a tensor that can't be taken apart.
    """
    layout = _layout(weight)
    if layout is None:
        return {}
    take_apart = getattr(weight, "state_dict", None)
    if take_apart is None:
        raise Refused(f"{key}, quantized as {layout}", "this comfy-kitchen is too old; update it to 0.2.7 or later")
    parts: dict[str, torch.Tensor | None] = take_apart(key)
    return {name: each for name, each in parts.items() if each is not None}


def check_layouts(parameters: Mapping[str, torch.Tensor]) -> None:
    """Raise `Refused`, by name and layout, for a parameter that is packed in a way that the daemon doesn't read."""
    known = {layout for layouts in _LAYOUTS.values() for layout in layouts}
    for key, weight in parameters.items():
        layout = _layout(weight)
        if layout is not None and (layout not in known or key.rpartition(".")[2] != "weight"):
            raise Refused(f"{key}, quantized as {layout}", _READS)


def check_formats(parameters: Mapping[str, torch.Tensor], layers: Mapping[str, Quantization]) -> None:
    """Raise `Refused`, by name and format, for a layer whose format isn't said, or isn't how its weight is packed.

    Args:
        parameters: A network's.
        layers: Its quantized layers.
    """
    for key, weight in parameters.items():
        layout, layer = _layout(weight), layers.get(key.rpartition(".")[0])
        if layout is not None and (layer is None or layout not in _LAYOUTS[layer.format]):
            said = "no format" if layer is None else f"format {layer.format!r}"
            raise Refused(f"{key}, quantized as {layout} in a layer of {said}", _READS)


def _layout(weight: torch.Tensor) -> str | None:
    """The name of a quantized tensor's layout; None for other tensors."""
    layout: str | None = getattr(weight, "_layout_cls", None)
    return layout

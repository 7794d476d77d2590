"""Weights that a model keeps packed: which layers of a network or of a file, in which of ComfyUI's formats.

A layer's format is JSON in a tensor ``LAYER.comfy_quant``, in a file also in the metadata; older files mark the whole
model with ``scaled_fp8``. Its numbers are packed in ``LAYER.weight``, with scales and tables beside them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tacod.checkpoint.quantization import FORMATS, SIDES

from .errors import Refused

__all__ = [
    "METADATA",
    "NOTE",
    "Layer",
    "canonical",
    "check_formats",
    "check_layouts",
    "formats_in_file",
    "layers_of",
    "note_of",
    "parts_of",
    "stands_beside",
]

NOTE = "comfy_quant"
METADATA = "_quantization_metadata"
MARK = "scaled_fp8"
_SPELLINGS = {"scale_weight": "weight_scale", "scale_input": "input_scale"}
"""What older files and versions call the scales."""
_BESIDE = {*SIDES, *_SPELLINGS, NOTE}
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


@dataclass(frozen=True)
class Layer:
    """What decides how a layer computes, with ComfyUI's defaults for what its JSON leaves out."""

    format: str
    weight_only: bool
    """Whether its inputs are left as they are (``full_precision_matrix_mult``)."""
    rotation: int
    """The size of ConvRot's groups; 0 without a rotation."""
    group: int
    """How many weights share a scale; 0 where the format says it."""
    product: str
    """What an int4 layer multiplies in; empty for other formats."""

    @classmethod
    def of(cls, said: Mapping[str, Any]) -> Layer:
        """A layer's JSON, whose keys may also stand under ``params``."""
        more = said.get("params")
        said = {**(more if isinstance(more, dict) else {}), **said}
        kind = str(said.get("format"))
        rotates = kind in ("convrot_w4a4", "asym_w4a8_int8") or bool(kind == "int8_tensorwise" and said.get("convrot"))
        return cls(
            format=kind,
            weight_only=bool(said.get("full_precision_matrix_mult")),
            rotation=int(said.get("convrot_groupsize", 256)) if rotates else 0,
            group=int(said.get("group_size", 16)) if kind == "asym_w4a8_int8" else 0,
            product=str(said.get("linear_dtype", "int4")) if kind == "convrot_w4a4" else "",
        )


def canonical(name: str) -> str:
    """A tensor's name in ComfyUI's spelling of today."""
    layer, dot, leaf = name.rpartition(".")
    return f"{layer}{dot}{_SPELLINGS.get(leaf, leaf)}"


def stands_beside(name: str) -> bool:
    """Whether a tensor says how to read a layer's weight, and is no weight itself."""
    return name.rpartition(".")[2] in _BESIDE


def note_of(said: Mapping[str, Any]) -> torch.Tensor:
    """A layer's JSON as its ``comfy_quant``."""
    return torch.frombuffer(bytearray(json.dumps(said).encode()), dtype=torch.uint8)


def _notes(names: Iterable[str], read: Callable[[str], torch.Tensor]) -> dict[str, dict[str, Any]]:
    found = {}
    for name in names:
        layer, _, leaf = name.rpartition(".")
        if leaf == NOTE:
            found[layer] = _object(bytes(read(name).tolist()), name)
    return found


def _object(text: str | bytes, name: str) -> dict[str, Any]:
    try:
        return _checked(json.loads(text), name)
    except ValueError as error:
        raise Refused(f"{name}, which is no JSON ({error})", "download the file again") from None


def _checked(said: Any, name: str) -> dict[str, Any]:
    if not isinstance(said, dict):
        raise Refused(f"{name}, which is no JSON object", "download the file again")
    return said


def formats_in_file(
    tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], prefix: str, read: Callable[[str], torch.Tensor]
) -> tuple[dict[str, dict[str, Any]], bool]:
    """The JSON of a file's quantized layers by their keys in it, and whether it is that of ``scaled_fp8`` alone.

    Args:
        tensors: The file's tensors by key, without contents.
        metadata: The file's.
        prefix: What stands before the diffusion model's keys; the metadata may leave it out.
        read: Reads a tensor.
    """
    said = _notes(tensors, read)
    if METADATA in metadata:
        layers = _object(metadata[METADATA], METADATA).get("layers")
        for layer, each in (layers if isinstance(layers, dict) else {}).items():
            key = layer if f"{layer}.weight" in tensors else prefix + layer
            said[key] = _checked(each, f"{METADATA} of {layer}")
        return said, False
    mark = tensors.get(f"{prefix}{MARK}")
    if mark is None:
        return said, False
    marked: dict[str, Any] = {"format": "float8_e4m3fn"}
    if mark.numel() == 2:
        marked["full_precision_matrix_mult"] = True
    scales = [key.removesuffix(".scale_weight") for key in tensors if key.endswith(".scale_weight")]
    return {**said, **dict.fromkeys(scales, marked)}, not said


def layers_of(state: Mapping[str, torch.Tensor]) -> dict[str, Layer]:
    """A state dict's quantized layers by their names."""
    return {layer: Layer.of(said) for layer, said in _notes(state, state.__getitem__).items()}


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


def check_formats(parameters: Mapping[str, torch.Tensor], layers: Mapping[str, Layer]) -> None:
    """Raise `Refused`, by name and format, for a layer whose format isn't said, or is none that the daemon reads.

    Args:
        parameters: A network's.
        layers: Its quantized layers.
    """
    for name, layer in layers.items():
        if layer.format not in FORMATS:
            raise Refused(f"layer {name} in format {layer.format!r}", _READS)
    for key, weight in parameters.items():
        layout, layer = _layout(weight), layers.get(key.rpartition(".")[0])
        if layout is not None and (layer is None or layout not in _LAYOUTS[layer.format]):
            said = "no format" if layer is None else f"format {layer.format!r}"
            raise Refused(f"{key}, quantized as {layout} in a layer of {said}", _READS)


def _layout(weight: torch.Tensor) -> str | None:
    """The name of a quantized tensor's layout; None for other tensors."""
    layout: str | None = getattr(weight, "_layout_cls", None)
    return layout

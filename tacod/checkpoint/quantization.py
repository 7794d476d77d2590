"""How the weights of a file are packed: what it says of its layers, and what lies beside them.

ComfyUI's files say it of each layer, in a tensor ``LAYER.comfy_quant`` that holds JSON, or for all of them in the
metadata ``_quantization_metadata``; older ones have a tensor ``scaled_fp8`` (comfy/utils.py, ``convert_old_quants``).
Nothing here needs torch.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tacod.checkpoint.header import FLOAT8, PLAIN, Entry, TensorInfo
from tacod.checkpoint.json_text import parse_json
from tacod_client.errors import ModelCorrupt, ModelUnsupported

__all__ = [
    "DESCRIPTION",
    "FLOAT8_FORMATS",
    "FORMATS",
    "INPUT_SCALE",
    "METADATA",
    "OLD_SIDES",
    "SCALED",
    "SIDES",
    "Quantization",
    "beside",
    "descriptions",
    "read_quantization",
]

FORMATS = (
    "float8_e4m3fn",
    "float8_e5m2",
    "mxfp8",
    "nvfp4",
    "int8_tensorwise",
    "convrot_w4a4",
    "asym_w4a8_int8",
)
"""The formats that are read, as ``comfy_quant`` names them."""
_INTEGERS = ("int8_tensorwise", "convrot_w4a4", "asym_w4a8_int8")
SCALED = "scaled"
"""The format of a weight of 16 bits or more that has a scale beside it nevertheless."""

DESCRIPTION = "comfy_quant"
"""How the name of a tensor ends that says how its layer is packed."""
METADATA = "_quantization_metadata"
"""Where a file's metadata says it."""
_MARKER = "scaled_fp8"
OLD_SIDES = {"scale_weight": "weight_scale", "scale_input": "input_scale"}
"""What older files call those of `SIDES`."""
SIDES = (
    "weight_scale",
    "weight_scale_2",
    "input_scale",
    "pre_quant_scale",
    "weight_s_rel",
    "weight_s_channel",
    "weight_codebook",
)
"""What may lie beside a layer's weight, after the layer's name."""
INPUT_SCALE = "input_scale"
"""That of `SIDES` which may be left out: where activations aren't quantized, or each token has a scale of its own."""
FLOAT8_FORMATS = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
"""The formats of floats of 8 bits, by safetensors' names of their dtypes."""
_FULL_PRECISION = "full_precision_matrix_mult"
_BYTES = ("U8", "I8")
_MAX_DESCRIPTION = 1 << 16


@dataclass(frozen=True)
class Quantization:
    """How the weight of one layer is packed."""

    format: str
    """One of `FORMATS`, or `SCALED`."""
    rotation: int = 0
    """ConvRot: how many columns are rotated together; 0 for none."""
    group: int = 16
    """asym_w4a8_int8: how many columns share a scale."""
    full_precision: bool = False
    """Whether the file says ``full_precision_matrix_mult``; see `quantizes` for what that means."""
    int8_activations: bool = False
    """convrot_w4a4: whether the activations have 8 bits on every card (``linear_dtype``)."""
    sides: tuple[str, ...] = ()
    """Those of `SIDES` that the file has for it."""
    by_row: bool = False
    """int8_tensorwise: whether each row has a scale of its own."""

    @property
    def label(self) -> str:
        """What users see: the format, and for int8 its kind of scales or rotation."""
        if self.format != "int8_tensorwise":
            return self.format
        return "int8_convrot" if self.rotation else "int8_rowwise" if self.by_row else self.format

    @property
    def quantizes(self) -> bool:
        """Whether ComfyUI may quantize activations in the model's dtype for it: for whole numbers in any case."""
        return not self.full_precision or self.format in _INTEGERS

    @property
    def padding(self) -> int:
        """Rows and columns are padded to multiples of this."""
        return {"nvfp4": 16, "mxfp8": 32}.get(self.format, 1)

    @classmethod
    def of(cls, where: str, description: Mapping[str, Any]) -> Quantization:
        """What a layer's JSON says, with ComfyUI's defaults for what it leaves out; keys may stand under ``params``.

        ``where`` is the layer, for messages. Raises `ModelUnsupported` for what isn't known, `ModelCorrupt` for sizes
        that are none.
        """
        inner = description.get("params")
        said = {**(inner if isinstance(inner, dict) else {}), **description}
        name = said.get("format")
        if name not in FORMATS:
            known = ", ".join(FORMATS)
            raise ModelUnsupported(f"{where} is packed as {name!r:.60}; this version reads {known}")
        if said.get("num_experts") is not None:
            raise ModelUnsupported(f"{where} is packed as {name} by experts, which this version doesn't read")
        rotated = name in ("convrot_w4a4", "asym_w4a8_int8") or (
            name == "int8_tensorwise" and bool(said.get("convrot"))
        )
        linear = said.get("linear_dtype", "int4") if name == "convrot_w4a4" else "int4"
        if linear not in ("int4", "int8"):
            raise ModelUnsupported(f"{where} asks for the linear_dtype {linear!r:.60}; int4 and int8 are known")
        return cls(
            name,
            _number(where, said, "convrot_groupsize", 256) if rotated else 0,
            _number(where, said, "group_size", 16) if name == "asym_w4a8_int8" else 16,
            bool(said.get(_FULL_PRECISION, False)),
            linear == "int8",
        )

    def scales_rows(self, leaf: str) -> bool:
        """Whether what lies beside the weight may have numbers for each row, in the order of rows."""
        return leaf in ("weight_s_rel", "weight_s_channel") or (
            leaf == "weight_scale" and self.format not in ("mxfp8", "nvfp4", SCALED)
        )


def read_quantization(
    path: str, entries: Mapping[str, Entry], texts: Sequence[Mapping[str, str]], prefix: str, strict: bool = True
) -> tuple[dict[str, Entry], dict[str, Quantization]]:
    """The tensors of safetensors files and how their layers are packed, by the name of the weight.

    Args:
        path: The file or folder, for messages.
        entries: The diffusion model's tensors, without ``prefix``.
        texts: The metadata of each file; shards may each describe their own layers.
        prefix: What stands before their names in the file.
        strict: Whether they are all of one model. If not, layers that can't be read are left as they lie.

    Returns:
        The tensors without descriptions, their scales under today's names, and a packed weight's shape that of the
        numbers (with the padding that nvfp4 and mxfp8 may have); and the layers.

    Raises `ModelUnsupported` for a format that isn't known, `ModelCorrupt` for a description that can't be read and
    for weights and scales that aren't what it says.
    """
    kept = {name: entry for name, entry in entries.items() if name.rpartition(".")[2] != DESCRIPTION}

    def read(name: str) -> bytes:
        info, part = entries[name]
        if info.dtype not in _BYTES:
            raise ModelCorrupt(f"{path}: {name} is {info.dtype} {list(info.shape)}, which is no JSON text")
        with open(part.file, "rb") as file:
            return os.pread(file.fileno(), part.stop - part.start, part.start)

    sizes = {name: entry.info.size for name, entry in entries.items()}
    said, marked = descriptions(path, sizes, texts, prefix, read, strict)
    described = {**said, **marked}
    kept.pop(_MARKER, None)
    kept = _todays(path, kept, strict)
    layers = {}
    for layer, leaf in map(_split, kept):
        info = kept[f"{layer}.weight"].info if f"{layer}.weight" in kept else None
        if leaf != "weight_scale" or info is None or (layer in described and layer not in marked):
            continue
        # Some tools write no description: what the dtype and the scale say is that these are to be multiplied.
        if info.dtype in FLOAT8 and layer not in described:
            described[layer] = {"format": FLOAT8_FORMATS[info.dtype], _FULL_PRECISION: True}
        elif info.dtype in PLAIN and kept[f"{layer}.{leaf}"].info.size == 1:
            described.pop(layer, None)
            layers[f"{layer}.weight"] = Quantization(SCALED, sides=(leaf,))
    for layer, description in described.items():
        weight = f"{layer}.weight"
        if weight not in kept:
            # What describes a layer of another module, or of none.
            continue
        try:
            layers[weight], shape = _read(path, layer, description, kept)
        except (ModelCorrupt, ModelUnsupported):
            if strict:
                raise
            continue
        kept[weight] = kept[weight]._replace(info=TensorInfo(layers[weight].format, shape))
    return kept, layers


def _read(
    path: str, layer: str, description: Mapping[str, Any], entries: Mapping[str, Entry]
) -> tuple[Quantization, tuple[int, int]]:
    """How a layer's weight is packed, and the shape of its numbers."""
    found = Quantization.of(f"{path}: {layer}", description)
    info = entries[f"{layer}.weight"].info
    if found.format in FLOAT8_FORMATS.values() and info.dtype in FLOAT8:
        # Older files say e4m3 of both kinds.
        found = replace(found, format=FLOAT8_FORMATS[info.dtype])
    found = replace(found, sides=tuple(leaf for leaf in SIDES if f"{layer}.{leaf}" in entries))
    shape = _check(path, layer, found, entries)
    by_row = found.format == "int8_tensorwise" and entries[f"{layer}.weight_scale"].info.size > 1
    return replace(found, by_row=by_row), shape


def beside(weight: str, leaf: str) -> str:
    """The name of what lies beside a weight."""
    return f"{weight.rpartition('.')[0]}.{leaf}"


def _split(name: str) -> tuple[str, str]:
    layer, _, leaf = name.rpartition(".")
    return layer, leaf


def descriptions(
    path: str,
    sizes: Mapping[str, int],
    texts: Sequence[Mapping[str, str]],
    prefix: str,
    read: Callable[[str], bytes],
    strict: bool = True,
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """What files say of their layers, by the layers' names.

    Args:
        path: Where, for messages.
        sizes: How many numbers each of the diffusion model's tensors has, their names without ``prefix``.
        texts: The metadata of each file; it goes before the tensors.
        prefix: What stands before the names in the files.
        read: Reads a tensor's bytes.
        strict: See `read_quantization`.

    Returns:
        What is said of a layer by name; and of those that are so by the older marker of the whole model.

    Raises `ModelCorrupt` for what can't be read.
    """
    said = {}
    for name in sizes:
        layer, leaf = _split(name)
        if leaf != DESCRIPTION:
            continue
        try:
            if sizes[name] > _MAX_DESCRIPTION:
                raise ModelCorrupt(f"{path}: {name} has {sizes[name]} numbers, which are no JSON text")
            said[layer] = _json(path, name, read(name))
        except ModelCorrupt:
            if strict:
                raise
    metadata = [each[METADATA] for each in texts if METADATA in each]
    for text in metadata:
        layers = _json(path, METADATA, text.encode()).get("layers")
        if not isinstance(layers, dict) or not all(isinstance(each, dict) for each in layers.values()):
            raise ModelCorrupt(f"{path}: the metadata's {METADATA} has no layers; download the file again")
        said |= {layer.removeprefix(prefix): each for layer, each in layers.items()}
    if metadata or _MARKER not in sizes:
        return said, {}
    old = {"format": "float8_e4m3fn", _FULL_PRECISION: sizes[_MARKER] == 2}
    return said, {layer: old for layer, leaf in map(_split, sizes) if leaf == "scale_weight"}


def _json(path: str, name: str, raw: bytes) -> dict[str, Any]:
    try:
        value = parse_json(raw.rstrip(b"\0"))
    except (ValueError, RecursionError) as error:
        raise ModelCorrupt(f"{path}: {name} is not JSON ({error}); download the file again") from None
    if not isinstance(value, dict):
        raise ModelCorrupt(f"{path}: {name} is no JSON object; download the file again")
    return value


def _todays(path: str, entries: Mapping[str, Entry], strict: bool) -> dict[str, Entry]:
    """The same tensors, their scales under the names of today."""
    renamed: dict[str, Entry] = {}
    for name, entry in entries.items():
        layer, leaf = _split(name)
        ours = f"{layer}.{OLD_SIDES[leaf]}" if leaf in OLD_SIDES and f"{layer}.weight" in entries else name
        if strict and (ours in renamed or (ours != name and ours in entries)):
            raise ModelCorrupt(f"{path} has both {name} and {ours}, which are the same scale")
        renamed[ours] = entry
    return renamed


def _number(where: str, said: Mapping[str, Any], key: str, usual: int) -> int:
    value = said.get(key, usual)
    if type(value) is not int or value < 1:
        raise ModelCorrupt(f"{where} has the {key} {value!r:.60}, which is no size")
    return value


_STORED = {
    "float8_e4m3fn": ("F8_E4M3",),
    "float8_e5m2": ("F8_E5M2",),
    "mxfp8": ("F8_E4M3",),
    "nvfp4": ("U8",),
    "int8_tensorwise": ("I8",),
    "convrot_w4a4": _BYTES,
    "asym_w4a8_int8": _BYTES,
}
_PAIRS = ("nvfp4", "convrot_w4a4", "asym_w4a8_int8")
"""Formats with two numbers in a byte."""


def _check(path: str, layer: str, quantization: Quantization, entries: Mapping[str, Entry]) -> tuple[int, int]:
    """The shape of the numbers; every tensor of the layer must be as its format has it."""
    info = entries[f"{layer}.weight"].info
    form = quantization.format

    def corrupt(name: str, found: TensorInfo, why: str) -> ModelCorrupt:
        found_as = f"{found.dtype} {list(found.shape)}"
        return ModelCorrupt(f"{path}: {layer}.{name} is {found_as}, but the layer is packed as {form}, {why}")

    if info.dtype not in _STORED[form] or len(info.shape) != 2:
        raise corrupt("weight", info, f"whose weights are matrices of {' or '.join(_STORED[form])}")
    rows, columns = info.shape[0], info.shape[1] * (2 if form in _PAIRS else 1)
    wanted = _sides(quantization, rows, columns)
    strange = [leaf for leaf in quantization.sides if leaf not in wanted and leaf != INPUT_SCALE]
    if strange:
        raise ModelUnsupported(
            f"{path}: {layer}.{strange[0]} isn't read for the format {form}, and the layer's result depends on it; "
            "take a file of this model without it"
        )
    for leaf, (dtypes, sizes) in wanted.items():
        if leaf not in quantization.sides:
            if leaf in _OPTIONAL.get(form, ()):
                continue
            raise ModelCorrupt(f"{path} lacks {layer}.{leaf}, and {layer} is packed as {form}; download it again")
        side = entries[f"{layer}.{leaf}"].info
        if side.dtype not in dtypes:
            raise corrupt(leaf, side, f"whose {leaf} is {' or '.join(dtypes)}")
        if side.size not in sizes:
            raise corrupt(leaf, side, f"whose {leaf} has {max(sizes)} numbers")
        # In a square layer scales for columns would be as many.
        if quantization.scales_rows(leaf) and side.size > 1 and side.shape[0] != rows:
            raise corrupt(leaf, side, f"whose {leaf} has {rows} rows")
    rotation = quantization.rotation
    if rotation and (rotation < 4 or 4 ** round(math.log(rotation, 4)) != rotation or columns % rotation):
        raise ModelCorrupt(f"{path}: {layer} has {columns} columns, which are no groups of {rotation} (a power of 4)")
    if form == "asym_w4a8_int8" and columns % quantization.group:
        raise ModelCorrupt(f"{path}: {layer} has {columns} columns, which are no groups of {quantization.group}")
    return rows, columns


_OPTIONAL = {
    "float8_e4m3fn": ("input_scale",),
    "float8_e5m2": ("input_scale",),
    "mxfp8": ("input_scale",),
    "nvfp4": ("input_scale", "pre_quant_scale"),
    "asym_w4a8_int8": ("weight_codebook",),
}


def _sides(quantization: Quantization, rows: int, columns: int) -> dict[str, tuple[Sequence[str], Sequence[int]]]:
    """The dtypes and sizes that what lies beside a weight may have, by its leaf; the last size is the usual one."""
    floats = tuple(PLAIN)
    one = (floats, (1,))
    form = quantization.format
    if form in FLOAT8_FORMATS.values():
        return {"weight_scale": (floats, (1, rows)), "input_scale": one}
    if form == "mxfp8":
        return {"weight_scale": (("U8", "F8_E8M0"), (_blocked(rows, columns, 32),)), "input_scale": one}
    if form == "nvfp4":
        blocks = (("F8_E4M3", "U8"), (_blocked(rows, columns, 16),))
        # It has the layer's columns, without padding.
        smoothing = (floats, range(columns - 15, columns + 1))
        return {"weight_scale": blocks, "weight_scale_2": one, "input_scale": one, "pre_quant_scale": smoothing}
    if form == "int8_tensorwise":
        return {"weight_scale": (floats, (1, rows))}
    if form == "convrot_w4a4":
        return {"weight_scale": (floats, (rows,))}
    return {
        "weight_s_rel": (("F8_E4M3", "U8"), (rows * columns // quantization.group,)),
        "weight_s_channel": (floats, (rows,)),
        "weight_codebook": (floats, (16,)),
    }


def _blocked(rows: int, columns: int, block: int) -> int:
    """How many scales there are, in cuBLAS's tiles of 128 rows and 4 blocks."""
    return -(-rows // 128) * 128 * (-(-(columns // block) // 4) * 4)

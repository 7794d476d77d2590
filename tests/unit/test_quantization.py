"""What files say of packed layers: read with the header, checked, and refused by the layer's name."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tacod.checkpoint import read_checkpoint
from tacod.checkpoint.quantization import FORMATS, Quantization
from tacod_client.errors import ModelCorrupt, ModelUnsupported

LAYER = "blocks.0.linear"
SIZES = {"F32": 4, "BF16": 2, "I8": 1, "U8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1}
Tensors = dict[str, tuple[str, list[int]]]
"""Dtype and shape of each tensor, by name."""


def write(path: Path, tensors: Tensors, said: Any = None, metadata: dict[str, str] | None = None) -> str:
    """A file of such tensors, all zeros but for the description of `LAYER`."""
    contents, header = b"", {}
    raw = said if isinstance(said, bytes) else json.dumps(said).encode()
    every = {**tensors, **({} if said is None else {f"{LAYER}.comfy_quant": ("U8", [len(raw)])})}
    for name, (dtype, shape) in every.items():
        count = SIZES[dtype]
        for size in shape:
            count *= size
        data = raw if name.endswith("comfy_quant") else bytes(count)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(contents), len(contents) + len(data)]}
        contents += data
    if metadata:
        header["__metadata__"] = metadata  # type: ignore[assignment]
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + contents)
    return str(path)


def named(**leaves: tuple[str, list[int]]) -> Tensors:
    return {f"{LAYER}.{leaf}": each for leaf, each in leaves.items()}


GOOD: dict[str, tuple[Tensors, dict[str, Any], tuple[int, int], str]] = {
    "fp8": (
        named(weight=("F8_E4M3", [40, 80]), weight_scale=("F32", []), input_scale=("F32", [1])),
        {"format": "float8_e4m3fn"},
        (40, 80),
        "float8_e4m3fn",
    ),
    "e5m2 that is called e4m3": (
        named(weight=("F8_E5M2", [40, 80]), weight_scale=("F32", [40, 1])),
        {"format": "float8_e4m3fn", "full_precision_matrix_mult": True},
        (40, 80),
        "float8_e5m2",
    ),
    "mxfp8": (
        named(weight=("F8_E4M3", [64, 96]), weight_scale=("U8", [128, 4])),
        {"format": "mxfp8"},
        (64, 96),
        "mxfp8",
    ),
    "nvfp4": (
        named(weight=("U8", [48, 40]), weight_scale=("F8_E4M3", [128, 8]), weight_scale_2=("F32", [])),
        {"format": "nvfp4"},
        (48, 80),
        "nvfp4",
    ),
    "int8": (
        named(weight=("I8", [40, 80]), weight_scale=("F32", [])),
        {"format": "int8_tensorwise"},
        (40, 80),
        "int8_tensorwise",
    ),
    "int8 by row": (
        named(weight=("I8", [40, 80]), weight_scale=("F32", [40, 1])),
        {"format": "int8_tensorwise"},
        (40, 80),
        "int8_rowwise",
    ),
    "ConvRot under params": (
        named(weight=("I8", [40, 64]), weight_scale=("BF16", [40, 1])),
        {"format": "int8_tensorwise", "params": {"convrot": True, "convrot_groupsize": 16}},
        (40, 64),
        "int8_convrot",
    ),
    "int4": (
        named(weight=("I8", [40, 128]), weight_scale=("F32", [40])),
        {"format": "convrot_w4a4", "linear_dtype": "int8"},
        (40, 256),
        "convrot_w4a4",
    ),
    "W4A8": (
        named(weight=("I8", [40, 32]), weight_s_rel=("U8", [40, 4]), weight_s_channel=("F32", [40])),
        {"format": "asym_w4a8_int8", "convrot_groupsize": 64, "group_size": 16},
        (40, 64),
        "asym_w4a8_int8",
    ),
}


@pytest.mark.parametrize("name", GOOD)
def test_a_layer_has_the_shape_of_its_numbers(tmp_path: Path, name: str) -> None:
    tensors, said, shape, label = GOOD[name]
    # Text behind a zero byte is padding.
    for text in (said, json.dumps(said).encode() + b"\0\0"):
        checkpoint = read_checkpoint(write(tmp_path / "m.safetensors", tensors, text))
        quantization = checkpoint.quantization[f"{LAYER}.weight"]
        assert checkpoint.tensors[f"{LAYER}.weight"].shape == shape
        assert checkpoint.tensors[f"{LAYER}.weight"].dtype == quantization.format
        assert quantization.label == label
        assert f"{LAYER}.comfy_quant" not in checkpoint.tensors
        assert checkpoint.sides == tensors.keys() - {f"{LAYER}.weight"}
        assert checkpoint.parameters == shape[0] * shape[1]


@pytest.mark.parametrize("name", GOOD)
def test_the_metadata_goes_before_the_tensors(tmp_path: Path, name: str) -> None:
    tensors, said, _, label = GOOD[name]
    path = tmp_path / "m.safetensors"

    def metadata(said: Any) -> dict[str, str]:
        return {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": {LAYER: said}})}

    other = {"format": "nvfp4" if label == "mxfp8" else "mxfp8"}
    for instead in (said, other, {"format": "int3_odd"}, None):
        found = read_checkpoint(write(path, tensors, instead, metadata(said)))
        assert found.quantization[f"{LAYER}.weight"].label == label
    with pytest.raises(ModelUnsupported, match=f"{LAYER} is packed as 'int3_odd'"):
        read_checkpoint(write(path, tensors, said, metadata({"format": "int3_odd"})))
    with pytest.raises((ModelCorrupt, ModelUnsupported), match=rf"{LAYER}\..* {other['format']}"):
        read_checkpoint(write(path, tensors, said, metadata(other)))


OPTIONAL = ("input_scale", "weight_codebook")


@pytest.mark.parametrize("name", GOOD)
def test_a_file_that_isnt_right_is_refused_by_the_layers_name(tmp_path: Path, name: str) -> None:
    tensors, said, _, _ = GOOD[name]
    path = tmp_path / "m.safetensors"
    write(path, tensors, said)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelCorrupt, match="truncated"):
        read_checkpoint(str(path))
    with pytest.raises(ModelUnsupported, match=f"{LAYER} is packed as 'int3_odd'; this version reads float8_e4m3fn"):
        read_checkpoint(write(path, tensors, {**said, "format": "int3_odd"}))
    odd = "weight_s_rel" if said["format"] == "nvfp4" else "pre_quant_scale"
    with pytest.raises(ModelUnsupported, match=rf"{LAYER}\.{odd} isn't read for the format"):
        read_checkpoint(write(path, {**tensors, **named(**{odd: ("F32", [1])})}, said))
    for side, (dtype, shape) in tensors.items():
        leaf = side.rpartition(".")[2]
        if leaf == "weight":
            continue
        less = {each: info for each, info in tensors.items() if each != side}
        if leaf in OPTIONAL:
            read_checkpoint(write(path, less, said))
        else:
            with pytest.raises(ModelCorrupt, match=rf"lacks {LAYER}\.{leaf}, and {LAYER} is packed as"):
                read_checkpoint(write(path, less, said))
        with pytest.raises(ModelCorrupt, match=rf"{LAYER}\.{leaf} is .*, but the layer is packed as"):
            read_checkpoint(write(path, {**tensors, side: (dtype, [7, *shape])}, said))
        with pytest.raises(ModelCorrupt, match=rf"{LAYER}\.{leaf} is F8_E5M2 .*, but the layer is packed as"):
            read_checkpoint(write(path, {**tensors, side: ("F8_E5M2", shape)}, said))


@pytest.mark.parametrize("name", GOOD)
def test_how_other_modules_are_packed_is_nobodys_business(tmp_path: Path, name: str) -> None:
    """A file of several is looked through as a whole to find the model."""
    tensors, said, _, label = GOOD[name]
    path = tmp_path / "m.safetensors"
    odd: Tensors = {"text.weight": ("U8", [3, 5]), "text.comfy_quant": ("U8", [len(json.dumps(said))])}
    doubled = named(weight=("F8_E4M3", [2, 2]), weight_scale=("F32", []), scale_weight=("F32", []))
    for others in (odd, {name.replace(LAYER, "text"): info for name, info in doubled.items()}):
        write(path, {**tensors, **others}, said)
        with pytest.raises(ModelCorrupt, match=r"text(\.| is packed)"):
            read_checkpoint(str(path))
        found = read_checkpoint(str(path), prefix="", whole=True)
        assert found.quantization[f"{LAYER}.weight"].label == label
        assert found.tensors["text.weight"].shape == tuple(others["text.weight"][1])


@pytest.mark.parametrize("name", ["int8 by row", "int4", "W4A8", "fp8 by row"])
def test_scales_for_columns_are_no_scales_for_rows(tmp_path: Path, name: str) -> None:
    """Where there are as many columns as rows, only the shape tells them apart."""
    fp8: Tensors = named(weight=("F8_E4M3", [40, 40]), weight_scale=("F32", [40, 1]))
    tensors, said = (fp8, {"format": "float8_e4m3fn"}) if name == "fp8 by row" else GOOD[name][:2]
    path = tmp_path / "m.safetensors"
    read_checkpoint(write(path, tensors, said))
    for leaf in ("weight_scale", "weight_s_rel", "weight_s_channel"):
        dtype, shape = tensors.get(f"{LAYER}.{leaf}", ("", []))
        if shape:
            turned: Tensors = {
                **tensors,
                f"{LAYER}.{leaf}": (dtype, [*shape[1:], shape[0]] if shape[1:] else [1, *shape]),
            }
            with pytest.raises(ModelCorrupt, match=rf"{LAYER}\.{leaf} is .* has 40 rows"):
                read_checkpoint(write(path, turned, said))


def test_every_format_is_among_them() -> None:
    assert {said["format"] for _, said, _, _ in GOOD.values()} | {"float8_e5m2"} == set(FORMATS)


def test_the_older_way_of_saying_it(tmp_path: Path) -> None:
    layer = named(weight=("F8_E4M3", [4, 8]), scale_weight=("F32", []), scale_input=("F32", []))
    for count, full in ((2, True), (1, False), (0, False)):
        tensors: Tensors = {**layer, "scaled_fp8": ("F8_E4M3", [count])}
        found = read_checkpoint(write(tmp_path / "m.safetensors", tensors))
        expected = Quantization("float8_e4m3fn", full_precision=full, sides=("weight_scale", "input_scale"))
        assert found.quantization == {f"{LAYER}.weight": expected}
        assert "scaled_fp8" not in found.tensors
    # Without a word of it anywhere the scale counts as well.
    found = read_checkpoint(write(tmp_path / "m.safetensors", layer))
    assert found.quantization[f"{LAYER}.weight"].full_precision


def test_a_scale_under_two_names_is_refused(tmp_path: Path) -> None:
    layer = named(weight=("F8_E4M3", [4, 8]), scale_weight=("F32", []), weight_scale=("F32", []))
    with pytest.raises(ModelCorrupt, match="which are the same scale"):
        read_checkpoint(write(tmp_path / "m.safetensors", layer))


@pytest.mark.parametrize("text", ["{", "[]", '{"layers": 3}', '{"layers": {"a": 1}}', "{}"])
def test_metadata_that_says_nothing_is_refused(tmp_path: Path, text: str) -> None:
    tensors = GOOD["int8"][0]
    with pytest.raises(ModelCorrupt, match="_quantization_metadata"):
        read_checkpoint(write(tmp_path / "m.safetensors", tensors, metadata={"_quantization_metadata": text}))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(FORMATS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["format", "params", "x"]), inner),
    max_leaves=6,
)
KEYS = (
    "convrot",
    "convrot_groupsize",
    "group_size",
    "linear_dtype",
    "full_precision_matrix_mult",
    "params",
    "num_experts",
)


def check(path: str) -> None:
    """Read a file, or be told why not, by the layer's name."""
    message = ""
    try:
        checkpoint = read_checkpoint(path)
    except (ModelCorrupt, ModelUnsupported) as error:
        message = error.message
    assert LAYER in message or checkpoint.quantization[f"{LAYER}.weight"].format in FORMATS


@given(st.sampled_from(sorted(GOOD)), st.dictionaries(st.sampled_from(KEYS), JSON), st.none() | JSON)
def test_whatever_a_file_says_costs_a_typed_error_at_most(
    tmp_path_factory: pytest.TempPathFactory, name: str, more: dict[str, Any], instead: Any
) -> None:
    tensors, said, _, _ = GOOD[name]
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    check(write(path, tensors, {**said, **more} if instead is None else instead))


@given(st.sampled_from(sorted(GOOD)), st.data())
def test_whatever_lies_beside_a_weight_costs_a_typed_error_at_most(
    tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject
) -> None:
    tensors, said, _, _ = GOOD[name]
    changed = data.draw(st.sampled_from(sorted(tensors)))
    dtype = data.draw(st.sampled_from(sorted(SIZES)))
    shape = data.draw(st.lists(st.integers(0, 130), max_size=3))
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    check(write(path, {**tensors, changed: (dtype, shape)}, said))


def test_it_is_read_without_torch(tmp_path: Path) -> None:
    path = write(tmp_path / "m.safetensors", *GOOD["nvfp4"][:2])
    read = f"from tacod.checkpoint import read_checkpoint; read_checkpoint({path!r})"
    code = f"import sys; {read}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)

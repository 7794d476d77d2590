"""Model files before any weight is read: where they may lie, and what a header must be."""

from __future__ import annotations

import contextlib
import json
import math
import os
import struct
from pathlib import Path
from typing import Any

import gguf
import pytest
import safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tacod.checkpoint import TensorInfo, locate, read_checkpoint
from tacod.checkpoint.gguf import KINDS
from tacod.checkpoint.header import BLOCKS, MAX_TENSORS
from tacod_client.errors import ModelCorrupt, ModelError, ModelNotAllowed, ModelNotFound, ModelUnsupported

ENTRY = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def write(path: Path, header: Any, contents: int | bytes = 0) -> Path:
    """A safetensors file with this header, JSON or raw bytes, and so many bytes of tensors."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    data = bytes(contents) if isinstance(contents, int) else contents
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


def write_tensors(path: Path, *names: str, metadata: dict[str, str] | None = None) -> Path:
    """A sound file with tensors of 24 bytes."""
    header: dict[str, Any] = {name: {**ENTRY, "data_offsets": [24 * at, 24 * at + 24]} for at, name in enumerate(names)}
    return write(path, header if metadata is None else {"__metadata__": metadata, **header}, 24 * len(names))


# --- locate -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def roots(tmp_path: Path) -> list[str]:
    """Two roots, each with a model, and one model outside."""
    for folder in ("first", "second", "outside"):
        (tmp_path / folder / "sub").mkdir(parents=True)
        write_tensors(tmp_path / folder / "sub" / f"{folder}.safetensors", "a")
    return [str(tmp_path / "first"), str(tmp_path / "second")]


def test_relative_name_is_looked_up_in_each_root(roots: list[str]) -> None:
    for root in roots:
        name = f"sub/{os.path.basename(root)}.safetensors"
        assert locate(name, roots) == os.path.join(root, name)


def test_first_root_comes_first(roots: list[str]) -> None:
    for root in roots:
        write_tensors(Path(root, "same.safetensors"), "a")
    assert locate("same.safetensors", roots) == f"{roots[0]}/same.safetensors"


def test_absolute_name_under_a_root_is_taken(roots: list[str]) -> None:
    path = f"{roots[1]}/sub/second.safetensors"
    assert locate(path, roots) == path


def test_dots_that_stay_inside_are_taken(roots: list[str]) -> None:
    assert locate("sub/../sub/./first.safetensors", roots) == f"{roots[0]}/sub/first.safetensors"


@pytest.mark.parametrize(
    "name",
    ["../outside/sub/outside.safetensors", "sub/../../outside/sub/outside.safetensors", "/etc/passwd", "..", "/"],
)
def test_what_lies_outside_is_refused_whether_it_exists_or_not(roots: list[str], name: str) -> None:
    with pytest.raises(ModelNotAllowed, match=r"outside models\.roots"):
        locate(name, roots)


def test_name_that_begins_like_a_root_is_outside(roots: list[str]) -> None:
    neighbour = Path(roots[0] + "-private")
    neighbour.mkdir()
    write_tensors(neighbour / "a.safetensors", "a")
    with pytest.raises(ModelNotAllowed):
        locate(str(neighbour / "a.safetensors"), roots)


def test_symlink_that_leads_outside_is_refused(roots: list[str], tmp_path: Path) -> None:
    Path(roots[0], "link.safetensors").symlink_to(tmp_path / "outside" / "sub" / "outside.safetensors")
    Path(roots[0], "folder").symlink_to(tmp_path / "outside")
    for name in ("link.safetensors", "folder/sub/outside.safetensors", f"{roots[0]}/link.safetensors"):
        with pytest.raises(ModelNotAllowed):
            locate(name, roots)


def test_symlink_inside_leads_to_the_real_file(roots: list[str]) -> None:
    Path(roots[0], "link.safetensors").symlink_to(f"{roots[1]}/sub/second.safetensors")
    assert locate("link.safetensors", roots) == f"{roots[1]}/sub/second.safetensors"


def test_root_may_be_a_symlink_itself(roots: list[str], tmp_path: Path) -> None:
    (tmp_path / "root").symlink_to(roots[0])
    found = locate("sub/first.safetensors", [str(tmp_path / "root")])
    assert found == f"{roots[0]}/sub/first.safetensors"


def test_without_roots_nothing_is_allowed(roots: list[str]) -> None:
    with pytest.raises(ModelNotAllowed, match="none are configured"):
        locate(f"{roots[0]}/sub/first.safetensors", [])


@pytest.mark.parametrize("name", ["none.safetensors", "sub/none", "", "a\0b", "x" * 5000, "first.safetensors/x"])
def test_what_is_not_there_is_not_found(roots: list[str], name: str) -> None:
    with pytest.raises(ModelNotFound):
        locate(name, roots)


def test_folder_is_refused_as_such(roots: list[str]) -> None:
    with pytest.raises(ModelUnsupported, match="is a folder"):
        locate("sub", roots)


def test_pipe_is_refused_before_it_blocks(roots: list[str]) -> None:
    os.mkfifo(f"{roots[0]}/pipe.safetensors")
    with pytest.raises(ModelUnsupported, match="no regular file"):
        locate("pipe.safetensors", roots)


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".pth", ".bin", ".pkl", ".sft.bin", ".CKPT"])
def test_pickles_are_refused_unread(roots: list[str], suffix: str) -> None:
    Path(roots[0], f"model{suffix}").touch()
    with pytest.raises(ModelUnsupported, match=r"is a pickle.*convert it to \.safetensors"):
        locate(f"model{suffix}", roots)


def test_pickle_behind_another_name_is_refused(roots: list[str]) -> None:
    Path(roots[0], "model.ckpt").touch()
    Path(roots[0], "model.safetensors").symlink_to(f"{roots[0]}/model.ckpt")
    with pytest.raises(ModelUnsupported, match="is a pickle"):
        locate("model.safetensors", roots)


def test_pickle_is_known_by_the_name_that_was_asked_for(roots: list[str]) -> None:
    """Links of a hub's cache lead to files without a suffix."""
    Path(roots[0], "0f1e2d3c").write_bytes(b"\x80\x04.")
    Path(roots[0], "model.ckpt").symlink_to(f"{roots[0]}/0f1e2d3c")
    with pytest.raises(ModelUnsupported, match="is a pickle"):
        locate("model.ckpt", roots)


# --- read_checkpoint --------------------------------------------------------------------------------------------------


def test_bare_keys_are_read_as_they_are(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(str(write_tensors(tmp_path / "m", "img_in.weight", "txt_in.weight")))
    assert checkpoint.prefix == ""
    assert checkpoint.tensors == {name: TensorInfo("F32", (2, 3)) for name in ("img_in.weight", "txt_in.weight")}
    assert checkpoint.parameters == 12
    assert checkpoint.config is None


@pytest.mark.parametrize(
    "prefix",
    [
        "model.diffusion_model.",
        "diffusion_model.",
        "model.model.",
        "net.",
        "model.",
        "module.",
        "transformer.",
        "_orig_mod.",
        "module._orig_mod.model.",
    ],
)
def test_prefix_is_found_and_taken_off(tmp_path: Path, prefix: str) -> None:
    path = write_tensors(tmp_path / "m", "first_stage_model.w", f"{prefix}a.w", f"{prefix}b.w", "text_encoders.w")
    checkpoint = read_checkpoint(str(path))
    assert checkpoint.prefix == prefix
    assert list(checkpoint.tensors) == ["a.w", "b.w"]
    assert checkpoint.parameters == 12


def test_prefix_of_a_few_strays_is_none(tmp_path: Path) -> None:
    bare = [f"double_blocks.{i}.w" for i in range(10)]
    checkpoint = read_checkpoint(str(write_tensors(tmp_path / "m", *bare, *(f"model.{i}" for i in range(5)))))
    assert checkpoint.prefix == ""
    assert checkpoint.parameters == 15 * 6


def test_prefix_that_says_it_goes_before_one_of_more_tensors(tmp_path: Path) -> None:
    names = [*(f"model.encoder.{i}" for i in range(20)), *(f"model.diffusion_model.{i}" for i in range(8))]
    checkpoint = read_checkpoint(str(write_tensors(tmp_path / "m", *names)))
    assert checkpoint.prefix == "model.diffusion_model."
    assert read_checkpoint(str(tmp_path / "m"), prefix="model.encoder.").parameters == 20 * 6


def test_names_that_only_begin_like_a_prefix_are_bare(tmp_path: Path) -> None:
    names = [
        f"{name}{i}.w" for i in range(4) for name in ("transformer_blocks.", "model_ema.", "networks.", "modules.")
    ]
    assert read_checkpoint(str(write_tensors(tmp_path / "m", *names))).prefix == ""


def test_file_may_describe_itself(tmp_path: Path) -> None:
    config = {"image_model": "flux", "num_heads": 5}
    path = write_tensors(tmp_path / "m", "a", metadata={"tacod.config": json.dumps(config), "format": "pt"})
    assert read_checkpoint(str(path)).config == config


@pytest.mark.parametrize("text", ["", "{", "3", "[]", "{}", '{"image_model": 3}', "[" * 100_000])
def test_self_description_must_be_sound(tmp_path: Path, text: str) -> None:
    path = write_tensors(tmp_path / "m", "a", metadata={"tacod.config": text})
    with pytest.raises(ModelCorrupt, match=r"tacod\.config"):
        read_checkpoint(str(path))


def test_empty_tensor_and_single_number_are_read(tmp_path: Path) -> None:
    header = {
        "none": {"dtype": "F32", "shape": [0, 3], "data_offsets": [4, 4]},
        "one": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]},
    }
    checkpoint = read_checkpoint(str(write(tmp_path / "m", header, 4)))
    assert {name: info.shape for name, info in checkpoint.tensors.items()} == {"none": (0, 3), "one": ()}


CORRUPT = {
    "empty file": b"",
    "short length": b"\x08\0\0",
    "length alone": struct.pack("<Q", 8),
    "length beyond the file": struct.pack("<Q", 1000) + b"{}",
    "length of 2^64 - 1": b"\xff" * 8 + b"{}",
    "length 0": struct.pack("<Q", 0),
    "a pickle by another name": b"\x80\x04\x95" + bytes(100),
    "a zip by another name": b"PK\x03\x04" + bytes(100),
    "text": b"<!DOCTYPE html><html>Not found</html>",
}


@pytest.mark.parametrize("name", CORRUPT)
def test_what_is_no_safetensors_is_corrupt(tmp_path: Path, name: str) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(CORRUPT[name])
    with pytest.raises(ModelCorrupt, match="no whole safetensors file"):
        read_checkpoint(str(path))


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"{not json}", "not JSON"),
        (b'{"a": \xff}', "not JSON"),
        ("{}".encode("utf-16"), "not JSON"),
        (b"[" * 200_000, "not JSON"),
        (b"[]", "not a JSON object"),
        (b"12", "not a JSON object"),
        (b'"text"', "not a JSON object"),
        (b"null", "not a JSON object"),
    ],
)
def test_header_must_be_a_json_object(tmp_path: Path, raw: bytes, reason: str) -> None:
    with pytest.raises(ModelCorrupt, match=reason):
        read_checkpoint(str(write(tmp_path / "m", raw)))


@pytest.mark.parametrize("metadata", [3, "text", [], ["a"], {"a": None}, {"a": 3}, {"format": "pt", "config": {}}])
def test_metadata_must_be_strings(tmp_path: Path, metadata: Any) -> None:
    path = write(tmp_path / "m", {"__metadata__": metadata, "a": ENTRY}, 24)
    with pytest.raises(ModelCorrupt, match="__metadata__ is no object of strings"):
        read_checkpoint(str(path))
    with pytest.raises(safetensors.SafetensorError):
        safetensors.safe_open(path, "np").__enter__()


def test_metadata_may_be_null(tmp_path: Path) -> None:
    assert read_checkpoint(str(write(tmp_path / "m", {"__metadata__": None, "a": ENTRY}, 24))).tensors.keys() == {"a"}


@pytest.mark.parametrize("upper", [False, True])
@pytest.mark.parametrize(
    "header",
    [
        {"\ud800": ENTRY},
        {"a\udfff": ENTRY},
        {"__metadata__": {"a": "\ud800"}, "a": ENTRY},
        {"__metadata__": {"\udc80": "a"}, "a": ENTRY},
    ],
)
def test_half_a_surrogate_is_no_text(tmp_path: Path, header: Any, upper: bool) -> None:
    raw = json.dumps(header)
    path = write(tmp_path / "m", (raw.replace("\\ud", "\\uD") if upper else raw).encode(), 24)
    with pytest.raises(ModelCorrupt, match="not JSON"):
        read_checkpoint(str(path))


def test_a_whole_surrogate_pair_is_text(tmp_path: Path) -> None:
    assert read_checkpoint(str(write(tmp_path / "m", {"\U0001f44d": ENTRY}, 24))).tensors.keys() == {"\U0001f44d"}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["layers", "a", "format", "image_model", "transformer"]), inner, max_size=3)
    ),
    max_leaves=6,
)
SAID = ("tacod.config", "config", "_quantization_metadata", "format", "scaled_fp8", "\ud800")


@given(JSON | st.dictionaries(st.sampled_from(SAID), JSON | JSON.map(json.dumps), max_size=4))
def test_whatever_the_metadata_says_costs_a_typed_error_at_most(
    tmp_path_factory: pytest.TempPathFactory, metadata: Any
) -> None:
    path = write(tmp_path_factory.getbasetemp() / "any", {"__metadata__": metadata, "a.weight": ENTRY}, 24)
    with contextlib.suppress(ModelError):
        json.dumps(dict(read_checkpoint(str(path)).config or {}), ensure_ascii=False).encode()


@given(JSON | st.dictionaries(st.text(max_size=3), JSON | st.just("a.safetensors"), max_size=4))
def test_whatever_an_index_says_costs_a_typed_error_at_most(
    tmp_path_factory: pytest.TempPathFactory, weight_map: Any
) -> None:
    folder = tmp_path_factory.getbasetemp() / "any_folder"
    folder.mkdir(exist_ok=True)
    write_tensors(folder / "a.safetensors", "a")
    (folder / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with contextlib.suppress(ModelError):
        read_checkpoint(str(folder))


@pytest.mark.parametrize(
    "entry",
    [
        None,
        3,
        [],
        {},
        {"dtype": "F32", "shape": [6]},
        {**ENTRY, "dtype": "F33"},
        {**ENTRY, "dtype": ["F32"]},
        {**ENTRY, "dtype": None},
        {**ENTRY, "shape": 6},
        {**ENTRY, "shape": {}},
        {**ENTRY, "shape": "6"},
        {**ENTRY, "shape": [-2, -3]},
        {**ENTRY, "shape": [2.0, 3]},
        {**ENTRY, "shape": [True, 6]},
        {**ENTRY, "shape": ["x", 10**12]},
        {**ENTRY, "shape": [[0], 10**12]},
        {**ENTRY, "shape": [2**64, 0]},
        {**ENTRY, "shape": [1] * 10_000},
        {**ENTRY, "data_offsets": [0]},
        {**ENTRY, "data_offsets": [0, 24, 48]},
        {**ENTRY, "data_offsets": 24},
        {**ENTRY, "data_offsets": "ab"},
        {**ENTRY, "data_offsets": [-24, 0]},
        {**ENTRY, "data_offsets": [0.0, 24.0]},
    ],
    ids=lambda entry: str(entry)[:60],
)
def test_malformed_entry_is_named(tmp_path: Path, entry: Any) -> None:
    with pytest.raises(ModelCorrupt, match=r"entry for 'the\.key' is malformed"):
        read_checkpoint(str(write(tmp_path / "m", {"the.key": entry}, 24)))


@pytest.mark.parametrize(
    "changes", [{"shape": [2, 2]}, {"shape": [2, 4]}, {"dtype": "F16"}, {"dtype": "F64"}, {"data_offsets": [24, 0]}]
)
def test_entry_must_fit_its_bytes(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(ModelCorrupt, match=r"'the\.key' is .*which its .* bytes don't hold"):
        read_checkpoint(str(write(tmp_path / "m", {"the.key": {**ENTRY, **changes}}, 24)))


@pytest.mark.parametrize("cut", [1, 24, 40])
def test_truncated_file_is_corrupt(tmp_path: Path, cut: int) -> None:
    path = write_tensors(tmp_path / "m", "a", "b")
    os.truncate(path, path.stat().st_size - cut)
    with pytest.raises(ModelCorrupt, match="is truncated"):
        read_checkpoint(str(path))


def test_longer_file_is_corrupt(tmp_path: Path) -> None:
    path = write_tensors(tmp_path / "m", "a", "b")
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(ModelCorrupt, match="longer than its header says"):
        read_checkpoint(str(path))


@pytest.mark.parametrize("start", [0, 12, 48])
def test_tensors_leave_no_hole_and_do_not_overlap(tmp_path: Path, start: int) -> None:
    header = {"a": ENTRY, "b": {**ENTRY, "data_offsets": [start, start + 24]}}
    with pytest.raises(ModelCorrupt, match="hole or an overlap at byte 24"):
        read_checkpoint(str(write(tmp_path / "m", header, start + 24)))


def empties(count: int, name: str = "a") -> dict[str, Any]:
    return {f"{name}.{number}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for number in range(count)}


def test_more_tensors_than_any_model_has_are_refused(tmp_path: Path) -> None:
    path = str(write(tmp_path / "m", {"__metadata__": {"a": "b"}, **empties(MAX_TENSORS)}))
    assert len(read_checkpoint(path).tensors) == MAX_TENSORS
    header = json.dumps(empties(MAX_TENSORS + 1))
    for raw in (header, header.replace("data_", "data\\u005f")):
        write(tmp_path / "m", raw.encode())
        with pytest.raises(ModelUnsupported, match=r"m has more than 65,536 tensors"):
            read_checkpoint(path)


def test_more_tensors_in_all_shards_than_any_model_has_are_refused(tmp_path: Path) -> None:
    shards = {f"{name}.safetensors": empties(MAX_TENSORS // 2 + 1, name) for name in "ab"}
    for name, header in shards.items():
        write(tmp_path / name, header)
    (tmp_path / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
    index = {"weight_map": {next(iter(header)): name for name, header in shards.items()}}
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelUnsupported, match=r"has more than 65,536 tensors"):
        read_checkpoint(str(tmp_path))


def test_more_tensors_in_gguf_than_any_model_has_are_refused(tmp_path: Path) -> None:
    count = MAX_TENSORS + 1
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_bytes(number=count, tensors=b"".join(gguf_tensor(f"{i}", (0,), 0) for i in range(count))))
    with pytest.raises(ModelUnsupported, match=r"more than 65,536 tensors"):
        read_checkpoint(str(path))


def test_missing_file_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="No such file"):
        read_checkpoint(str(tmp_path / "none"))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 200), st.binary(max_size=8), st.integers(0, 12))
def test_damaged_file_is_read_as_safetensors_reads_it_or_refused(
    tmp_path: Path, place: int, what: bytes, cut: int
) -> None:
    path = write_tensors(tmp_path / "m", "a", "b", metadata={"tacod.config": '{"image_model": "flux"}'})
    data = path.read_bytes()
    path.write_bytes(data[:place] + what + data[place + cut :])
    try:
        tensors = read_checkpoint(str(path)).tensors
    except ModelError:
        return
    try:
        with safetensors.safe_open(path, "np") as file:
            theirs = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError:
        return
    assert {key: info.shape for key, info in tensors.items()} == theirs


# --- GGUF -------------------------------------------------------------------------------------------------------------


def gguf_bytes(fields: bytes = b"", count: int = 0, tensors: bytes = b"", number: int = 0, version: int = 3) -> bytes:
    """A GGUF file with these fields and descriptions of tensors, and as many of either as it says."""
    return b"GGUF" + struct.pack("<IQQ", version, number, count) + fields + tensors


def gguf_string(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def gguf_tensor(name: str, dims: tuple[int, ...], kind: int, offset: int = 0) -> bytes:
    return gguf_string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def gguf_field(*numbers: int, code: str) -> bytes:
    return gguf_string("general.alignment") + struct.pack(code, *numbers)


MALFORMED_GGUF = {
    "empty": b"",
    "magic alone": b"GGUF",
    "another magic": b"GGML" + bytes(100),
    "a long array": gguf_bytes(gguf_field(9, 0, 1 << 60, code="<IIQ"), 1),
    "a long array of strings": gguf_bytes(gguf_field(9, 8, 1 << 60, code="<IIQ"), 1),
    "arrays in an array": gguf_bytes(gguf_field(9, 9, 1 << 60, code="<IIQ") + bytes(64), 1),
    "a long string": gguf_bytes(struct.pack("<Q", 1 << 62), 1),
    "a key that is not UTF-8": gguf_bytes(struct.pack("<Q", 1) + b"\xff" + bytes(64), 1),
    "many fields": gguf_bytes(b"", 1 << 63),
    "many tensors": gguf_bytes(b"", 0, b"", 1 << 63),
    "an unknown value": gguf_bytes(gguf_field(77, 0, code="<IQ"), 1),
    "too many dimensions": gguf_bytes(tensors=gguf_tensor("a", (1,) * 65, 0) + bytes(64), number=1),
    "2^4032 numbers": gguf_bytes(tensors=gguf_tensor("a", ((1 << 63) - 1,) * 64, 0), number=1),
    "2^126 numbers": gguf_bytes(tensors=gguf_tensor("a", (1 << 63, 1 << 63), 0), number=1),
    "2^124 numbers": gguf_bytes(tensors=gguf_tensor("a", (1 << 62, 1 << 62), 0), number=1),
    "past the end": gguf_bytes(tensors=gguf_tensor("a", (64,), 0) + bytes(64), number=1),
    "an offset of 2^64 - 1": gguf_bytes(tensors=gguf_tensor("a", (1,), 0, (1 << 64) - 1) + bytes(64), number=1),
    "half a block": gguf_bytes(tensors=gguf_tensor("a", (16, 2), 8) + bytes(128), number=1),
    "half a block of 256": gguf_bytes(tensors=gguf_tensor("a", (128, 2), 10) + bytes(128), number=1),
    "a block without dimensions": gguf_bytes(tensors=gguf_tensor("a", (), 8) + bytes(128), number=1),
    "a name twice": gguf_bytes(tensors=2 * gguf_tensor("a", (1,), 0) + bytes(128), number=2),
    "an overlap": gguf_bytes(tensors=gguf_tensor("a", (4,), 0) + gguf_tensor("b", (4,), 0, 8) + bytes(128), number=2),
    "an alignment of 0": gguf_bytes(gguf_field(4, 0, code="<II"), 1),
    "an alignment of 3": gguf_bytes(gguf_field(4, 3, code="<II"), 1),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", MALFORMED_GGUF)
def test_malformed_gguf_is_corrupt(tmp_path: Path, name: str) -> None:
    (tmp_path / "m.gguf").write_bytes(MALFORMED_GGUF[name])
    with pytest.raises(ModelCorrupt, match="no whole GGUF file"):
        read_checkpoint(str(tmp_path / "m.gguf"))


@pytest.mark.parametrize(
    ("kind", "told"),
    [(9, "Q8_1"), (16, "IQ2_XXS"), (21, "IQ3_S"), (24, "I8"), (39, "MXFP4"), (999, "of the unknown type 999")],
)
def test_gguf_of_another_kind_is_refused_by_tensor_and_kind(tmp_path: Path, kind: int, told: str) -> None:
    data = gguf_bytes(tensors=gguf_tensor("img_in.weight", (256, 2), kind) + bytes(4096), number=1)
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(ModelUnsupported, match=rf"img_in\.weight is {told}; this version reads Q4_0, .*IQ4_XS, "):
        read_checkpoint(str(tmp_path / "m.gguf"))


@pytest.mark.parametrize("kind", BLOCKS)
def test_gguf_s_kinds_take_the_bytes_that_gguf_says(tmp_path: Path, kind: str) -> None:
    """Up to the last byte and no further."""
    number = gguf.GGMLQuantizationType[kind]
    size = 3 * 512 // BLOCKS[kind][0] * BLOCKS[kind][1]
    assert gguf.GGML_QUANT_SIZES[number] == BLOCKS[kind]
    head = gguf_bytes(tensors=gguf_tensor("a", (512, 3), number), number=1)
    whole = head + bytes(-len(head) % 32 + size)
    path = tmp_path / "m.gguf"
    path.write_bytes(whole)
    assert read_checkpoint(str(path)).tensors == {"a": TensorInfo(kind, (3, 512))}
    (part,) = read_checkpoint(str(path)).parts["a"]
    assert (part.start, part.stop) == (len(whole) - size, len(whole))
    path.write_bytes(whole[:-1])
    with pytest.raises(ModelCorrupt, match="'a' ends at byte"):
        read_checkpoint(str(path))


@pytest.mark.parametrize("shape", [(6, 5, 4, 3, 2), (2, 1, 1, 3, 1, 4, 1)], ids=len)
def test_gguf_s_tensors_may_have_many_dimensions(tmp_path: Path, shape: tuple[int, ...]) -> None:
    size = 4 * math.prod(shape)
    data = gguf_bytes(tensors=gguf_tensor("patch_embedding.weight", shape[::-1], 0), number=1)
    (tmp_path / "m.gguf").write_bytes(data + bytes(-len(data) % 32 + size))
    assert read_checkpoint(str(tmp_path / "m.gguf")).tensors == {"patch_embedding.weight": TensorInfo("F32", shape)}


def gguf_rearranged(*numbers: int, kind: int = 5, count: int | None = None) -> bytes:
    """A tensor ``a.w`` of [9, 64] that a field gives another shape."""
    array = struct.pack(f"<IIQ{len(numbers)}i", 9, kind, len(numbers) if count is None else count, *numbers)
    field = gguf_string("comfy.gguf.orig_shape.a.w") + array
    data = gguf_bytes(field, 1, gguf_tensor("a.w", (64, 9), 8), 1)
    return data + bytes(-len(data) % 32 + 9 * 2 * 34)


@pytest.mark.parametrize("shape", [(16, 4, 3, 3), (576,), (1, 9, 64), (6, 96), (4, 1, 16, 9)])
def test_rearranged_tensor_has_the_shape_that_is_told(tmp_path: Path, shape: tuple[int, ...]) -> None:
    (tmp_path / "m.gguf").write_bytes(gguf_rearranged(*shape))
    assert read_checkpoint(str(tmp_path / "m.gguf")).tensors == {"a.w": TensorInfo("Q8_0", shape)}


NO_SHAPES = {
    "other numbers": gguf_rearranged(16, 4, 3, 2),
    "none": gguf_rearranged(),
    "negative sizes": gguf_rearranged(-9, -64),
    "a size of 0": gguf_rearranged(0, 576),
    "words": gguf_rearranged(16, 36, kind=4),
    "floats": gguf_rearranged(16, 36, kind=6),
    "more sizes than a tensor may have": gguf_rearranged(576, *[1] * 64),
    "a string": gguf_bytes(
        gguf_string("comfy.gguf.orig_shape.a") + struct.pack("<I", 8) + gguf_string("1"),
        1,
        gguf_tensor("a", (1,), 0),
        1,
    ),
}


@pytest.mark.parametrize("name", NO_SHAPES)
def test_shape_that_is_none_of_the_tensor_s_is_corrupt(tmp_path: Path, name: str) -> None:
    (tmp_path / "m.gguf").write_bytes(NO_SHAPES[name])
    with pytest.raises(ModelCorrupt, match=r"comfy\.gguf\.orig_shape\.a.* is no shape of the tensor"):
        read_checkpoint(str(tmp_path / "m.gguf"))


def test_shape_of_another_tensor_is_left_alone(tmp_path: Path) -> None:
    data = gguf_rearranged(16, 36).replace(b"orig_shape.a.w", b"orig_shape.b.w")
    (tmp_path / "m.gguf").write_bytes(data)
    assert read_checkpoint(str(tmp_path / "m.gguf")).tensors == {"a.w": TensorInfo("Q8_0", (9, 64))}


@pytest.mark.parametrize("version", [1, 4, 3 << 24])
def test_gguf_of_another_version_is_refused(tmp_path: Path, version: int) -> None:
    (tmp_path / "m.gguf").write_bytes(gguf_bytes(version=version))
    with pytest.raises(ModelUnsupported, match="version"):
        read_checkpoint(str(tmp_path / "m.gguf"))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 250), st.binary(max_size=8), st.integers(0, 12))
def test_damaged_gguf_is_read_or_refused(tmp_path: Path, place: int, what: bytes, cut: int) -> None:
    fields = gguf_field(4, 32, code="<II") + gguf_string("comfy.gguf.orig_shape.a.weight")
    fields += struct.pack("<IIQII", 9, 5, 2, 4, 16)
    tensors = gguf_tensor("a.weight", (32, 2), 8) + gguf_tensor("a.bias", (4,), 0, 96)
    data = gguf_bytes(fields, 2, tensors, 2) + bytes(160)
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    assert list(read_checkpoint(str(path)).tensors) == ["a.weight", "a.bias"]
    path.write_bytes(data[:place] + what + data[place + cut :])
    with contextlib.suppress(ModelCorrupt, ModelUnsupported):
        read_checkpoint(str(path))


# --- identity ---------------------------------------------------------------------------------------------------------


def test_identity_is_a_function_of_the_file_s_state(tmp_path: Path) -> None:
    path = write_tensors(tmp_path / "m", "a")
    assert read_checkpoint(str(path)).identity == read_checkpoint(str(path)).identity


def test_kinds_have_the_numbers_of_the_gguf_package() -> None:
    theirs = {int(kind): kind.name for kind in gguf.GGMLQuantizationType}
    assert {number: theirs[number] for number in KINDS if number in theirs} == KINDS


def test_identity_changes_with_time_size_header_and_place(tmp_path: Path) -> None:
    path = write_tensors(tmp_path / "m", "a")
    os.utime(path, ns=(10**18, 10**18))
    seen = [read_checkpoint(str(path)).identity]

    def look(path: Path, time_ns: int) -> None:
        os.utime(path, ns=(time_ns, time_ns))
        seen.append(read_checkpoint(str(path)).identity)

    look(path, 10**18 + 1)
    look(write_tensors(tmp_path / "m", "b"), 10**18)
    look(write_tensors(tmp_path / "m", "a", "b"), 10**18)
    look(write_tensors(tmp_path / "other", "a"), 10**18)
    assert len(set(seen)) == len(seen)


@pytest.mark.parametrize("place", [0, 1 << 19, (1 << 20) - 1])
@pytest.mark.parametrize("size", [1 << 10, 1 << 20])
def test_identity_tells_files_apart_that_look_alike(tmp_path: Path, size: int, place: int) -> None:
    """A LoRA that was trained further has the same header and size, and may have got the same time."""
    header = {"a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}
    seen = set()
    for fill in (1, 2):
        path = write(tmp_path / "m", header, size)
        with path.open("r+b") as file:
            file.seek(-size + min(place, size - 1), os.SEEK_END)
            file.write(bytes([fill]))
        os.utime(path, ns=(10**18, 10**18))
        seen.add(read_checkpoint(str(path)).identity)
    assert len(seen) == (1 if (size, place) == (1 << 20, 1 << 19) else 2), "a change in one place of many may be missed"


def test_identity_is_cheap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a large file a few pieces are read."""
    size = 1 << 40
    path = write(tmp_path / "m", {"a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}, 0)
    os.truncate(path, path.stat().st_size + size)
    read: list[int] = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda file, count, at: (read.append(count), pread(file, count, at))[1])
    read_checkpoint(str(path))
    assert 0 < sum(read) <= 1 << 18

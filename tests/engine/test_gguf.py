"""GGUF's kinds against the gguf package; files that mix them, and tensors that their makers gave other shapes."""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_files import HALVES, Bytes, Stored, as_stored, random_blocks, write
from helpers import FLUX, SD3, Tiny, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tacod.checkpoint import TensorInfo, read_checkpoint
from tacod.checkpoint.header import BLOCKS
from tacod.rank.families import detect
from tacod.rank.families.base import DiT
from tacod.rank.ops.packed.base import PackedLinear
from tacod.rank.ops.packed.gguf import BlockLinear, dequantize_blocks
from tacod.rank.parallel.sequence import SequenceParallel
from tacod.rank.weights.load import choose_dtype, get_weight, load_model
from tacod_client.errors import ModelCorrupt, ModelUnsupported

CPU = torch.device("cpu")
FP32 = 1e-6
"""Stored weights against the same numbers in fp32."""
PLAIN = ("F32", "F16", "BF16")
MIX = Tiny("mixed_flux", {**FLUX.config, "hidden_size": 256, "num_heads": 16, "in_channels": 64, "vec_in_dim": 32})
"""Rows of 256 and of 32, and others."""


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def load(path: Path) -> DiT:
    return load_model(read_checkpoint(str(path)), torch.float32, CPU)


def same_bits(ours: Tensor, theirs: Any) -> bool:
    return ours.dtype == torch.float32 and ours.numpy().tobytes() == theirs.astype(np.float32).tobytes()


# --- kinds ------------------------------------------------------------------------------------------------------------


@st.composite
def blocks(draw: Callable[[Any], Any], kind: str) -> Bytes:
    """Up to five rows of up to three blocks of any bytes, with finite scales; the first block as odd as can be."""
    rows, count = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    size = BLOCKS[kind][1]
    data = np.random.default_rng(draw(st.integers(0, 999))).integers(0, 256, (rows * count, size), dtype=np.uint8)
    data[0] = np.frombuffer(draw(st.binary(min_size=size, max_size=size)), np.uint8)
    infinity = 0x7C00
    for at in HALVES[kind]:
        finite = np.array(draw(st.lists(st.integers(0, 2 * infinity - 1), min_size=len(data), max_size=len(data))))
        halves = finite % infinity | finite // infinity << 15
        data[:, at : at + 2] = halves.astype(np.uint16)[:, None].view(np.uint8)
    return data.reshape(rows, count * size)


@pytest.mark.parametrize("kind", BLOCKS)
def test_any_blocks_are_the_numbers_that_gguf_reads_bit_for_bit(kind: str) -> None:
    @settings(max_examples=40, deadline=None)
    @given(blocks(kind))
    def check(data: Bytes) -> None:
        ours = dequantize_blocks(torch.from_numpy(data), kind)
        assert ours.shape == (len(data), data.shape[1] // BLOCKS[kind][1] * BLOCKS[kind][0])
        assert same_bits(ours, gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind]))

    check()


@pytest.mark.parametrize("kind", BLOCKS)
def test_many_rows_are_the_numbers_that_gguf_reads_bit_for_bit(kind: str) -> None:
    data = random_blocks(kind, 137, 768)
    expected = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])
    assert 0.5 < expected.std() * 768**0.5 < 2
    assert abs(expected.mean()) < 0.5 * expected.std()
    assert same_bits(dequantize_blocks(torch.from_numpy(data), kind), expected)


@pytest.mark.parametrize(("kind", "bits"), [("Q4_0", 4), ("Q4_1", 4), ("Q5_0", 5), ("Q5_1", 5), ("Q8_0", 8)])
def test_what_gguf_quantizes_is_near_to_what_it_was(kind: str, bits: int) -> None:
    """Every number in its place, within a step of its block."""
    weight = torch.randn(33, 320)
    ours = dequantize_blocks(torch.from_numpy(as_stored(weight, kind).data), kind)
    numbers, back = (each.reshape(-1, 32) for each in (weight, ours))
    step = (numbers.amax(1) - numbers.amin(1)) / (2**bits - 1)
    assert ((back - numbers).abs().amax(1) <= 1.1 * step).all()


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("rows", [1, 2, 7])
def test_layers_are_dequantized_in_bands(kind: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many rows a band has, and with fewer numbers than a row in it too."""
    data = random_blocks(kind, 7, 512)
    layer = BlockLinear(torch.from_numpy(data), kind, None, torch.float32)
    whole = layer.weight
    assert same_bits(whole, gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind]))
    monkeypatch.setattr("tacod.rank.ops.packed.base._BAND", rows * 512 - 1)
    assert torch.equal(layer.weight, whole)
    assert torch.equal(layer.dequantized(torch.bfloat16), whole.bfloat16())


@pytest.mark.parametrize("kind", BLOCKS)
def test_layers_compile_in_one_piece(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of their kind on a device, too: what they keep there is no tracer's stand-in."""
    monkeypatch.setattr("tacod.rank.ops.packed.gguf._tables", {})
    layers = [BlockLinear(torch.from_numpy(random_blocks(kind, 64, 256, i)), kind, None, torch.float32) for i in (0, 1)]
    torch.compiler.reset()
    compiled = torch.compile(nn.Sequential(layers[0], nn.Linear(64, 256), layers[1]), backend="eager", fullgraph=True)
    x = torch.randn(3, 256)
    torch.export.export(layers[0], (x,))
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore", DeprecationWarning)
        out = compiled(x)
        assert torch.equal(out, layers[1](compiled._orig_mod[1](layers[0](x))))


# --- mixtures ---------------------------------------------------------------------------------------------------------


def mixed(tiny: Tiny) -> dict[str, Stored]:
    """A model's tensors, each in the next kind that fits its rows; vectors too."""
    tensors = {}
    for i, (key, tensor) in enumerate(tiny.model.state_dict().items()):
        fits = [kind for kind, (numbers, _) in BLOCKS.items() if tensor.shape[-1] % numbers == 0]
        kind = [*fits, *PLAIN][i % (len(fits) + len(PLAIN))]
        if kind in PLAIN:
            tensors[key] = as_stored(tensor, kind)
        else:
            rows = math.prod(tensor.shape[:-1])
            tensors[key] = Stored(random_blocks(kind, rows, tensor.shape[-1], i).reshape(*tensor.shape[:-1], -1), kind)
    return tensors


def filled(tiny: Tiny, tensors: dict[str, Stored]) -> DiT:
    """The model with a file's numbers as plain weights."""
    model = copy.deepcopy(tiny.model)
    wanted = model.state_dict()
    model.load_state_dict({key: stored.numbers.reshape(wanted[key].shape) for key, stored in tensors.items()})
    return model


def check_loaded(model: DiT, expected: DiT, inputs: dict[str, Any]) -> None:
    for key, tensor in expected.state_dict().items():
        assert torch.equal(get_weight(model, key), tensor), key
    with torch.inference_mode():
        ours, theirs = (each(SequenceParallel(), **inputs) for each in (model, expected))
    assert relative_error(ours, theirs) <= FP32


def test_one_file_may_mix_all_kinds(tmp_path: Path) -> None:
    tensors = mixed(MIX)
    assert {stored.kind for stored in tensors.values()} == {*BLOCKS, *PLAIN}
    assert {stored.kind for stored in tensors.values() if stored.data.ndim == 1} > {*PLAIN, "Q2_K", "Q5_1", "IQ4_XS"}
    model = load(write(tmp_path / "m.gguf", tensors, json.dumps(MIX.config)))
    generator = torch.Generator().manual_seed(1)
    shapes = {"x": (1, 64, 8, 6), "context": (1, 9, 8), "y": (1, 32)}
    inputs: dict[str, Any] = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    inputs |= {"timestep": torch.tensor([0.7]), "guidance": torch.tensor([3.5])}
    check_loaded(model, filled(MIX, tensors), inputs)
    for key, stored in tensors.items():
        owner = model.get_submodule(key.rpartition(".")[0])
        kept = key.endswith(".weight") and stored.kind in BLOCKS
        assert isinstance(owner, PackedLinear) == kept or not key.endswith(".weight"), key
        if kept:
            assert (owner.kind, owner.bias.dtype) == (stored.kind, torch.float32)


@pytest.mark.parametrize(
    ("many", "few", "expected"),
    [("BF16", "F32", "bf16"), ("F16", "F32", "fp16"), ("F32", "BF16", "fp32"), ("F16", "Q4_0", "bf16")],
)
def test_compute_dtype_is_that_of_most_numbers(tmp_path: Path, many: str, few: str, expected: str) -> None:
    """As city96's tools have it, a few matrices are in fp32, and the first one among them."""
    tensors = {"first.weight": Stored(random_blocks("Q4_0", 3, 32), "Q4_0")}
    if few != "Q4_0":
        tensors = {"first.weight": as_stored(torch.randn(3, 32), few)}
    tensors |= {"second.weight": as_stored(torch.randn(4, 32), many), "bias": as_stored(torch.randn(999), "F32")}
    checkpoint = read_checkpoint(str(write(tmp_path / "m.gguf", tensors, json.dumps(FLUX.config))))
    assert choose_dtype(checkpoint, None, torch.device("cuda")) == expected


# --- other shapes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "IQ4_NL", "Q3_K", "IQ4_XS"])
def test_rearranged_tensors_are_read(kind: str, tmp_path: Path) -> None:
    """Matrices whose rows are no whole blocks, convolutions, the table of positions and vectors, in rows of 256."""
    tensors, shapes = {}, {}
    for i, (key, tensor) in enumerate(SD3.model.state_dict().items()):
        if tensor.numel() % 256 == 0:
            tensors[key], shapes[key] = Stored(random_blocks(kind, tensor.numel() // 256, 256, i), kind), tensor.shape
        else:
            tensors[key] = as_stored(tensor, "F32")
    assert {len(shape) for shape in shapes.values()} == {1, 2, 3, 4}
    model = load(write(tmp_path / "m.gguf", tensors, json.dumps(SD3.config), shapes))
    check_loaded(model, filled(SD3, tensors), SD3.inputs())
    # 192 numbers are whole blocks of 32, and of 256 they are not.
    for layer in (module for module in model.modules() if isinstance(module, PackedLinear | nn.Linear)):
        if layer.in_features == 192:
            assert isinstance(layer, PackedLinear) == (BLOCKS[kind][0] == 32)


def test_position_table_without_its_leading_one_is_read(tmp_path: Path) -> None:
    """As llama.cpp's tools write it."""
    weights = SD3.model.state_dict()
    tensors = {key: as_stored(tensor[0] if key == "pos_embed" else tensor, "F32") for key, tensor in weights.items()}
    path = write(tmp_path / "m.gguf", tensors, json.dumps(SD3.config))
    check_loaded(load(path), SD3.model, SD3.inputs())
    assert detect(read_checkpoint(str(path)).tensors)[1]["pos_embed_max_size"] == 12


class Modulated(type(FLUX.model)):  # type: ignore[misc]
    """A family with a table of three dimensions, as Wan has one in each block."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        self.modulation = nn.Parameter(torch.zeros(1, 1, 6, 80))


@pytest.mark.parametrize(
    ("shape", "read"),
    [
        ((1, 1, 6, 80), True),
        ((1, 6, 80), True),
        ((6, 80), True),
        ((480,), False),
        ((6, 80, 1), False),
        ((80, 6), False),
        ((1, 1, 1, 6, 80), False),
    ],
    ids=str,
)
def test_tensors_may_lack_leading_sizes_of_one(
    shape: tuple[int, ...], read: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tacod.rank.weights.remap.detect", lambda tensors, config: (Modulated, FLUX.config))
    table = torch.randn(1, 1, 6, 80)
    weights = {**FLUX.model.state_dict(), "modulation": table.reshape(shape)}
    tensors = {key: as_stored(tensor, "F32") for key, tensor in weights.items()}
    path = write(tmp_path / "m.gguf", tensors, json.dumps(FLUX.config))
    if read:
        assert torch.equal(get_weight(load(path), "modulation"), table)
    else:
        with pytest.raises(ModelCorrupt, match=r"modulation is .*asks for \[1, 1, 6, 80\]"):
            load(path)


def test_file_with_five_dimensions_is_told_by_its_family(tmp_path: Path) -> None:
    """Not refused for its patch embedding, which city96's tools add in fp32."""
    weights = {"patch_embedding.weight": torch.randn(6, 4, 1, 2, 2), "head.modulation": torch.randn(1, 2, 6)}
    tensors = {key: as_stored(tensor, "F32") for key, tensor in weights.items()}
    path = write(tmp_path / "m.gguf", tensors, json.dumps({"image_model": "wan2.1"}))
    checkpoint = read_checkpoint(str(path))
    assert checkpoint.tensors["patch_embedding.weight"] == TensorInfo("F32", (6, 4, 1, 2, 2))
    with pytest.raises(ModelUnsupported, match=r"head\.head\.weight: .* is the file complete"):
        detect(checkpoint.tensors)

"""Packed layers: ten formats as ComfyUI packs them, against what its own layers give on a CPU."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from helpers import relative_error
from packed_layers import FILES, Golden
from torch import Tensor
from torch.nn import functional

from tacod.checkpoint.quantization import beside
from tacod.rank.ops.linear import linear_fp32, split_outputs
from tacod.rank.ops.packed import base as packed_base
from tacod.rank.ops.packed import float8, kitchen
from tacod.rank.ops.packed.base import PackedLinear
from tacod.rank.ops.packed.float8 import round_e2m1
from tacod.rank.ops.packed.integers import Int4Linear, IntegerLinear, padded
from tacod.rank.weights.packing import has_product
from tacod_client.errors import ModelCorrupt

LAYERS = ("double_blocks.0.img_attn.qkv", "layers.0.feed_forward.w2", "single_blocks.0.linear2")
BIT = [("fp32", torch.float32), ("bf16", torch.bfloat16)]
SUMS = 5e-7
"""How far products in fp32 are apart at most whose sums have another order, as on another processor."""


@pytest.fixture(params=FILES)
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(request.param)


@pytest.mark.parametrize(("named", "dtype"), BIT)
def test_a_layer_gives_what_comfyuis_gives(golden: Golden, named: str, dtype: torch.dtype) -> None:
    """What is a sum of whole numbers is the same to the bit; of others it may have another order."""
    assert len(FILES) == 10
    for name in LAYERS:
        layer = golden.layer(name, dtype)
        assert isinstance(layer, PackedLinear) == (name in golden.packed)
        y = layer(golden[f"{name}.x"].to(dtype))
        assert y.dtype == dtype
        theirs = golden[f"{name}.y_{named}"].to(dtype)
        if isinstance(layer, IntegerLinear) and not isinstance(layer, Int4Linear):
            assert torch.equal(y, theirs), name
        assert relative_error(y, theirs) <= (SUMS if dtype == torch.float32 else 1e-3), name


def test_a_weights_numbers_are_comfyuis(golden: Golden) -> None:
    found = [name for name in golden.packed if f"golden.{name}.dequantised" in golden.tensors]
    assert found
    for name in found:
        layer = golden.layer(name, torch.float32)
        numbers, theirs = layer.dequantized(torch.float32), golden[f"{name}.dequantised"]
        # A rotation is a product.
        rotated = isinstance(layer, IntegerLinear) and layer.group > 0
        assert relative_error(numbers, theirs) <= SUMS if rotated else torch.equal(numbers, theirs), name
        # In bands, as large ones are.
        step = [layer.numbers(slice(row, row + 5), torch.float32) for row in range(0, layer.out_features, 5)]
        assert relative_error(torch.cat(step), theirs) <= SUMS, name


def test_activations_stay_as_they_are_if_asked(golden: Golden) -> None:
    for name in golden.packed:
        layer, x = golden.layer(name, torch.float32, weight_only=True), golden[f"{name}.x"].float()
        assert not layer.quantizes
        assert relative_error(layer(x), functional.linear(x, layer.weight, layer.bias)) < 1e-7


@pytest.mark.parametrize("name", ["int8_rowwise", "int8_convrot", "asym_w4a8_int8", "convrot_w4a4"])
def test_whole_numbers_quantize_activations_of_the_models_dtype_whatever_the_file_says(name: str) -> None:
    """As ComfyUI's do: their product quantizes by itself, and only weights of another dtype are dequantized."""
    golden = Golden(name)
    told = {key: replace(each, full_precision=True) for key, each in golden.checkpoint.quantization.items()}
    for each in golden.packed:
        plain, x = golden.layer(each, torch.bfloat16), golden[f"{each}.x"]
        with mock.patch.object(golden, "checkpoint", replace(golden.checkpoint, quantization=told)):
            layer = golden.layer(each, torch.bfloat16)
        assert layer.quantizes
        assert torch.equal(layer(x.bfloat16()), plain(x.bfloat16()))
        other = layer.in_dtype(torch.float32)
        assert not other.quantizes
        assert relative_error(other(x.float()), functional.linear(x.float(), other.weight, other.bias)) < 1e-6
        assert plain.in_dtype(torch.float32).quantizes
        assert layer.in_dtype(torch.bfloat16).quantizes


NATIVE = {"fp8_scaled": 0, "fp8mixed": 3, "fp8_e5m2": 2, "mxfp8": 3, "nvfp4": 3}
"""How many layers of a file have other outputs where the device multiplies their format."""


@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize(("named", "dtype"), BIT)
def test_floats_of_8_bits_and_fewer_times_such(name: str, named: str, dtype: torch.dtype) -> None:
    golden, seen = Golden(name), 0
    with mock.patch("tacod.rank.weights.packing.has_product", return_value=True):
        layers = {each: golden.layer(each, dtype) for each in golden.packed}
        plain = golden.layer(golden.packed[0], dtype, weight_only=True)
    assert not plain.quantizes
    for each, layer in layers.items():
        wanted = golden.tensors.get(f"golden.{each}.native_{named}")
        quantization = golden.checkpoint.quantization[f"{each}.weight"]
        assert (wanted is None) == quantization.full_precision == (not layer.quantizes)
        if wanted is None:
            continue
        seen += 1
        x = golden[f"{each}.x"].to(dtype)
        y = layer(x)
        assert relative_error(y, wanted.to(dtype)) < (1e-6 if dtype == torch.float32 else 1e-2), each
        # Parts of a layer share the quantized tokens.
        with mock.patch.object(type(layer), "prepared", autospec=True, side_effect=type(layer).prepared) as prepared:
            one, other = split_outputs(layer, 8)
            parts = torch.cat((other(x), one(x)), dim=-1)
            assert prepared.call_count == 1
        assert relative_error(torch.cat((parts[..., -8:], parts[..., :-8]), dim=-1), y) < 1e-6
        assert torch.equal(one(x + 1), split_outputs(layer, 8)[0](x + 1)), "of other tokens, others"
    assert seen == NATIVE[name]


@pytest.mark.parametrize("name", ["mxfp8", "nvfp4"])
def test_activations_are_rounded_in_bands(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    golden = Golden(name)
    with mock.patch("tacod.rank.weights.packing.has_product", return_value=True):
        layers = {each: golden.layer(each, torch.bfloat16) for each in golden.packed}
    for each, layer in layers.items():
        x = golden[f"{each}.x"].bfloat16()
        expected, wrote = layer.prepared(x), []
        with monkeypatch.context() as patched:
            patched.setattr(packed_base, "_BAND", 3 * layer.in_features)
            patched.setattr(float8, f"round_{name}", spy(getattr(float8, f"round_{name}"), wrote))
            assert torch.equal(layer.prepared(x), expected)
        assert wrote == [3, 3, 3, 1]


def spy(function: Any, lengths: list[int]) -> Any:
    def spied(x: Tensor, *rest: Any) -> Any:
        lengths.append(len(x))
        return function(x, *rest)

    return spied


@pytest.mark.parametrize("capability", [(8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
@pytest.mark.parametrize("name", NATIVE)
def test_activations_are_quantized_where_a_gpu_multiplies_the_format(name: str, capability: tuple[int, int]) -> None:
    golden, least = Golden(name), (10, 0) if name in ("mxfp8", "nvfp4") else (8, 9)
    with mock.patch("torch.cuda.get_device_capability", return_value=capability):
        assert has_product(torch.device("cuda"), least) == (capability >= least)
        assert not has_product(torch.device("cpu"), least)
    with mock.patch("tacod.rank.weights.packing.has_product", side_effect=lambda _, wanted: capability >= wanted):
        quantizes = [golden.layer(each, torch.float32).quantizes for each in golden.packed]
    assert sum(quantizes) == (NATIVE[name] if capability >= least else 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numbers_of_4_bits_are_the_nearest(dtype: torch.dtype) -> None:
    levels = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    x = torch.linspace(-8, 8, 4097).to(dtype).float()
    found = round_e2m1(x)
    assert set(found.abs().tolist()) == set(levels.tolist())
    away = (x.clamp(-6, 6).abs()[:, None] - levels).abs()
    assert torch.equal((found.abs() - x.clamp(-6, 6).abs()).abs(), away.amin(dim=1))
    assert torch.equal(found.sign() * found, found.abs())
    # Between two that are as near, the one whose last bit is 0.
    middles = (levels[1:] + levels[:-1]) / 2
    assert round_e2m1(middles).tolist() == [0, 1, 1, 2, 2, 4, 4]
    assert round_e2m1(torch.tensor(torch.nan)).isnan()


@pytest.mark.parametrize("name", ["nvfp4", "mxfp8"])
def test_activations_of_nothing_and_of_no_numbers(name: str) -> None:
    golden, each = Golden(name), LAYERS[1]
    with mock.patch("tacod.rank.weights.packing.has_product", return_value=True):
        layer = golden.layer(each, torch.float32)
    x = golden[f"{each}.x"].float()
    assert layer(x[:, :0]).shape == (2, 0, layer.out_features)
    assert torch.equal(layer(torch.zeros_like(x)), torch.zeros(*x.shape[:-1], layer.out_features))
    x[1, 2, 3] = torch.nan
    y = layer(x)
    assert y[1, 2].isnan().all()
    # One scale for all is none then.
    assert y[0].isnan().all() == (name == "nvfp4")


def test_parts_of_the_outputs_are_the_whole(golden: Golden) -> None:
    for name in golden.packed:
        layer, x = golden.layer(name, torch.float32), golden[f"{name}.x"].float()
        layer = layer.adapted(golden[f"{name}.lora_up"], golden[f"{name}.lora_down"])
        # Its state has the names of the layer before it was packed.
        assert layer.state_dict().keys() <= {"weight", "bias"}
        parts = [layer.outputs(slice(0, 8)), layer.outputs(slice(8, None))]
        assert [part.out_features for part in parts] == [8, layer.out_features - 8]
        assert relative_error(torch.cat([part(x) for part in parts], dim=-1), layer(x)) < 1e-6
        assert torch.equal(torch.cat([part.weight for part in parts]), layer.weight)


def test_a_lora_is_nearer_to_the_exact_merge_than_comfyuis(golden: Golden) -> None:
    lora = json.loads(golden.metadata["golden.lora"])
    for name in golden.packed:
        x, base = golden[f"{name}.x"].float(), golden.layer(name, torch.float32)
        up, down = golden[f"{name}.lora_up"], golden[f"{name}.lora_down"]
        up = up * (lora["strength"] * lora["alpha"] / lora["rank"])
        exact = functional.linear(x, base.weight + up @ down, base.bias)
        ours = relative_error(base.adapted(up, down)(x), exact)
        theirs = relative_error(golden[f"{name}.y_lora_fp32"], exact)
        assert ours < theirs, (name, ours, theirs)
        assert relative_error(base(x), golden[f"{name}.y_fp32"]) <= SUMS, "the base is as it was"


def test_a_layer_of_the_compute_dtype_in_fp32(golden: Golden) -> None:
    for name in golden.packed:
        layer, x = golden.layer(name, torch.bfloat16), golden[f"{name}.x"].float()
        assert torch.equal(linear_fp32(layer, x), golden.layer(name, torch.float32)(x))
        up, down = golden[f"{name}.lora_up"].bfloat16(), golden[f"{name}.lora_down"].bfloat16()
        exact = golden.layer(name, torch.float32).adapted(up, down)(x)
        assert torch.equal(linear_fp32(layer.adapted(up, down), x), exact)
        assert layer.dtype == torch.bfloat16


def test_a_layer_on_the_meta_device_says_its_shape(golden: Golden) -> None:
    layer = golden.layer(golden.packed[0], torch.bfloat16)
    state = layer.state_dict()
    assert set(state) == {"weight", "bias"}
    assert state["weight"].shape == (layer.out_features, layer.in_features)
    assert state["weight"].device.type == "meta"
    assert repr(layer).startswith(f"{type(layer).__name__}(in_features={layer.in_features}, ")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scales_that_are_no_numbers_are_refused(golden: Golden, value: float) -> None:
    name = golden.packed[0]
    for leaf in golden.checkpoint.quantization[f"{name}.weight"].sides:
        whole = golden._side(name, leaf)
        damaged = whole.clone()
        if damaged.dtype == torch.uint8:
            damaged.view(-1)[0] = 0xFF
        elif damaged.dtype == torch.float8_e4m3fn:
            damaged.view(torch.uint8).view(-1)[0] = 0x7F
        else:
            damaged.view(-1)[0] = value
        side = beside(f"{name}.weight", leaf)
        if side not in golden.tensors:
            side = {"weight_scale": f"{name}.scale_weight", "input_scale": f"{name}.scale_input"}[leaf]
        golden.tensors[side] = damaged
        with pytest.raises(ModelCorrupt, match=f"{name}.{leaf} holds numbers that aren't finite"):
            golden.layer(name, torch.float32)
        golden.tensors[side] = whole


def test_a_matrix_is_copied_only_to_be_padded() -> None:
    """A weight that fits a GPU's product must not be copied at each use."""
    matrix = torch.arange(6, dtype=torch.int8).reshape(2, 3)
    assert padded(matrix, 0, 0) is matrix
    assert padded(matrix, 1, 2).tolist() == [[0, 1, 2, 0, 0], [3, 4, 5, 0, 0], [0, 0, 0, 0, 0]]


@pytest.mark.parametrize("name", ["convrot_w4a4", "asym_w4a8_int8", "int8_convrot"])
def test_whole_numbers_are_unpacked_in_bands(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    golden = Golden(name)
    layer, x = golden.layer(golden.packed[0], torch.float32), golden[f"{golden.packed[0]}.x"].float()
    expected, seen, unpack = layer(x), [], type(layer).whole

    def whole(self: IntegerLinear, rows: slice) -> Tensor:
        seen.append(len(unpack(self, rows)))
        return unpack(self, rows)

    monkeypatch.setattr(type(layer), "whole", whole)
    monkeypatch.setattr(packed_base, "_BAND", 5 * layer.in_features)
    assert torch.equal(layer(x), expected)
    # What isn't packed is used as it lies.
    assert max(seen, default=0) == (0 if name == "int8_convrot" else 5)
    assert sum(seen) == (0 if name == "int8_convrot" else layer.out_features)


def test_comfy_kitchen_is_not_asked_for_the_product_of_no_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank may have none; not every kernel takes that."""
    monkeypatch.setattr(kitchen, "_library", lambda: pytest.fail("nothing is to be multiplied"))
    weight = torch.zeros(32, 16, dtype=torch.int8)
    out = kitchen.int8_linear(torch.zeros(0, 16, dtype=torch.bfloat16), weight, torch.ones(()), None, 0)
    assert (out.shape, out.dtype) == ((0, 32), torch.bfloat16)

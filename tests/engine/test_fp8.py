"""Numbers in 8 bits: what they lose, which matrices are multiplied so, and how such a model is patched and loaded."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import FLUX, SD3, Tiny, relative_error
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tacod.checkpoint import read_checkpoint
from tacod.rank.comm.int8 import decode, encode
from tacod.rank.engine import Engine
from tacod.rank.ops.packed.fp8 import Fp8Linear
from tacod.rank.ops.quantize_rows import quantize_rows
from tacod.rank.parallel.topology import Topology
from tacod.rank.weights.fp8 import quantize_blocks
from tacod.rank.weights.load import get_weight, set_weight, share


@given(st.integers(0, 5), st.integers(1, 40), st.sampled_from([torch.float32, torch.bfloat16]), st.integers(0, 99))
def test_bytes_hold_every_row_by_its_largest_number(rows: int, width: int, dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    x = (torch.randn(rows, 2, width) * torch.logspace(-3, 3, rows)[:, None, None]).to(dtype)
    out = torch.empty_like(x)
    decode(encode(x), out)
    largest = x.float().abs().amax(dim=-1, keepdim=True)
    # Half a step of 127, and the rounding of the dtype that it comes back in.
    assert bool(((out.float() - x.float()).abs() <= largest * (0.5 / 127 + torch.finfo(dtype).eps)).all())


def test_rows_of_zeros_stay_zeros() -> None:
    for dtype in (torch.int8, torch.float8_e4m3fn):
        narrow, scales = quantize_rows(torch.zeros(2, 16), dtype)
        assert not narrow.float().any()
        assert bool((scales > 0).all())


def narrowed(tiny: Tiny) -> nn.Module:
    model = share(tiny.model)
    quantize_blocks(model)
    return model


@pytest.mark.parametrize("name", ["layers", "noise_refiner"])
def test_blocks_are_found_whatever_their_name(name: str) -> None:
    """A family of tomorrow may call them otherwise, and keep a layer beside them whose name looks like a block's."""
    model: Any = share(SD3.model)
    blocks = model.joint_blocks
    del model.joint_blocks
    model.add_module(name, blocks)
    model.add_module("subblocks", nn.ModuleDict({"0": nn.Linear(16, 16)}))
    type_of = type(model)
    model.__class__ = type("Other", (type_of,), {"modulating": [], "trunk": property(lambda self: list(blocks))})
    quantize_blocks(model)
    narrow = {each for each, layer in model.named_modules() if isinstance(layer, Fp8Linear)}
    assert narrow
    assert all(each.startswith(f"{name}.") for each in narrow)
    assert model.blocks_at == [f"{name}.{number}" for number in range(len(blocks))]


def test_a_narrow_layer_is_used_in_parts() -> None:
    """Flux splits two of its matrices; in 8 bits that must not change what they mean."""
    torch.manual_seed(0)
    layer = Fp8Linear.of(nn.Linear(32, 48).requires_grad_(False))
    x = torch.randn(1, 5, 32)
    parts = torch.cat([layer.outputs(slice(16))(x), layer.outputs(slice(16, None))(x)], dim=-1)
    assert relative_error(parts, layer(x)) < 1e-6


def test_a_patched_weight_stays_narrow() -> None:
    model, key = copy.deepcopy(narrowed(FLUX)), "single_blocks.0.linear1.weight"
    before = get_weight(model, key)
    assert relative_error(before, get_weight(FLUX.model, key)) < 0.05
    set_weight(model, key, 2 * before)
    assert isinstance(model.get_submodule("single_blocks.0.linear1"), Fp8Linear)
    assert relative_error(get_weight(model, key), 2 * before) < 1e-6
    with pytest.raises(ValueError, match="can't replace"):
        set_weight(model, key, before[:-1])


def test_an_engine_loads_it(tmp_path: Path) -> None:
    path = FLUX.save(tmp_path)
    engine = Engine(torch.device("cpu"), Topology())
    identity = read_checkpoint(str(path)).identity
    told = engine.load("m", str(path), identity, "fp8", None, None, []).model
    assert told.dtype == "fp8"
    model = engine.models["m"].model
    assert model.dtype == torch.bfloat16
    assert isinstance(model.get_submodule("double_blocks.0.img_mlp.0"), Fp8Linear)

"""The kernels of packed layers, in Triton's interpreter on the CPU, against the layers' own arithmetic.

The interpreter doesn't round to bf16 and to floats of 8 bits as a GPU does: tests/gpu compares these to the bit. Triton
chooses the interpreter when it is imported, so that this file runs itself in a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import relative_error
from packed_layers import bytes_of, layers

from tacod.checkpoint.header import BLOCKS
from tacod.rank.ops.packed.base import PackedLinear
from tacod.rank.ops.packed.float8 import quantize_float8
from tacod.rank.ops.packed.integers import Int4Linear, W4A8Linear, quantize_tokens
from tacod.rank.ops.packed.rotation import rotate

FP32 = 2e-6
GROUPS = [(0, 40), (4, 20), (16, 48), (64, 192), (256, 256), (256, 1280)]
"""How many columns are rotated together, and how many there are."""
SHAPES = [(1, 16, 8), (3, 64, 24), (130, 144, 264), (400, 32, 520)]
"""Tokens, inputs and outputs of products."""


def unpacked(layer: PackedLinear, dtype: torch.dtype) -> float:
    """How far the kernel's numbers are from the layer's own."""
    wanted = layer.numbers(slice(None), torch.float32)
    found = layer.unpacked_by_kernel(dtype)
    assert found is not None
    assert found.dtype == dtype
    return relative_error(found, wanted.to(dtype))


def same_blocks(layer: PackedLinear) -> bool:
    """Whether the kernel's numbers in fp32 are the layer's own to the bit: all of them, and those of some rows."""
    parts = (layer, layer.outputs(slice(3, 4)), layer.outputs(slice(1, 6)))
    pairs = [(part.unpacked_by_kernel(torch.float32), part.numbers(slice(None), torch.float32)) for part in parts]
    return all(found is not None and found.numpy().tobytes() == wanted.numpy().tobytes() for found, wanted in pairs)


def factors(layer: Int4Linear | W4A8Linear) -> int:
    """How many of the kernel's whole numbers aren't the layer's own."""
    found = layer.factor_by_kernel()
    assert found is not None
    assert found.dtype == torch.int8
    return int((found != layer.whole(slice(None))).sum())


def tokens(group: int, width: int, dtype: torch.dtype) -> tuple[float, float]:
    """How far the kernel's scales of tokens are from the layers' own, and how far its numbers, in steps."""
    from tacod.rank.ops.packed import kernels

    x = torch.randn(5, 2 * width, dtype=torch.bfloat16).float()[:, :width] * 2.0 ** torch.arange(-60, 15, 15)[:, None]
    x[2] = 0
    found, scales = kernels.quantize_tokens(x.to(dtype), group)
    wanted, wanted_scales = quantize_tokens(rotate(x, group) if group else x)
    assert found.dtype == torch.int8
    steps = float((found.float() - wanted.float()).abs().max())
    return relative_error(scales, wanted_scales), steps


def product(shape: list[int], dtype: torch.dtype, by_row: bool, bias: bool) -> float:
    """How far the kernel's product is from the exact one."""
    from tacod.rank.ops.packed import kernels

    count, inputs, outputs = shape
    x, weight = (bytes_of(rows, inputs).view(torch.int8) for rows in (count, outputs))
    x_scale, weight_scale = torch.rand(count), torch.rand(outputs if by_row else 1)
    added = torch.randn(outputs).to(dtype) if bias else None
    assert kernels.takes(weight)
    found = kernels.multiply(x, x_scale, weight, weight_scale, added, dtype)
    assert found.dtype == dtype
    wanted = (x.double() @ weight.double().t()) * x_scale[:, None].double() * weight_scale.double()
    return relative_error(found, wanted if added is None else wanted + added.double())


def activations(dtype: torch.dtype, target: torch.dtype) -> float:
    """How far the kernel's floats of 8 bits are from the layer's own."""
    from tacod.rank.ops.packed import kernels

    x, scale = (torch.randn(3, 50) * 300).to(dtype), torch.tensor(0.7)
    found = kernels.quantize_float8(x, scale, target)
    assert found.dtype == target
    return relative_error(found.float(), quantize_float8(x, scale, target).float())


def not_finite(group: int, dtype: torch.dtype) -> list[list[bool]]:
    """Which tokens' scales aren't finite, by the kernel and by the layers' own arithmetic: of the second and third."""
    from tacod.rank.ops.packed import kernels

    x = torch.randn(4, 32, dtype=dtype)
    x[1, 17], x[2, 3] = torch.nan, torch.inf
    _, found = kernels.quantize_tokens(x, group)
    _, wanted = quantize_tokens(rotate(x, group) if group else x)
    return [(~scales.flatten().isfinite()).tolist() for scales in (found, wanted)]


def limits(dtype: torch.dtype) -> list[str]:
    """What becomes of NaN and infinities in e5m2. The interpreter's e4m3 has no NaN, as a GPU's has."""
    from tacod.rank.ops.packed import kernels

    x = torch.tensor([torch.nan, torch.inf, -torch.inf, 2.0], dtype=dtype)
    found = kernels.quantize_float8(x, torch.tensor(0.5), torch.float8_e5m2)
    return [str(each) for each in found.float().tolist()]


def interpret() -> dict[str, Any]:
    """All answers."""
    from unittest import mock

    torch.manual_seed(0)
    both = (torch.float32, torch.bfloat16)
    floats = (torch.float8_e4m3fn, torch.float8_e5m2)
    made = {dtype: layers(dtype) for dtype in both}
    packed = [each for each in made[torch.float32].values() if isinstance(each, Int4Linear | W4A8Linear)]
    with (
        torch.inference_mode(),
        mock.patch("torch.cuda.get_device_capability", return_value=(9, 0)),
        mock.patch("torch.cuda.get_device_properties", return_value=SimpleNamespace(multi_processor_count=2)),
    ):
        return {
            "unpacked": {name: [unpacked(made[each][name], each) for each in both] for name in made[torch.float32]},
            "blocks": {kind: same_blocks(made[torch.float32][kind]) for kind in BLOCKS},
            "factors": list(map(factors, packed)),
            "tokens": [[tokens(*case, each) for each in both] for case in GROUPS],
            "products": [
                [product(list(shape), each, by_row, by_row) for each in both for by_row in (False, True)]
                for shape in SHAPES
            ],
            "activations": [activations(each, kind) for each in both for kind in floats],
            "not finite": [not_finite(group, each) for each in both for group in (0, 16)],
            "limits": [limits(each) for each in both],
        }


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    # More threads would wait for so small tensors on cores that other tests use.
    environment["OMP_NUM_THREADS"] = "1"
    told = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
    answers: dict[str, Any] = json.loads(told.stdout)
    return answers


@pytest.mark.parametrize("name", layers(torch.float32))
def test_weights(interpreted: dict[str, Any], name: str) -> None:
    fp32, bf16 = interpreted["unpacked"][name]
    assert fp32 <= 3e-7
    assert bf16 <= 8e-3


@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_of_gguf_to_the_bit(interpreted: dict[str, Any], kind: str) -> None:
    assert interpreted["blocks"][kind]


def test_whole_numbers(interpreted: dict[str, Any]) -> None:
    assert interpreted["factors"] == [0, 0, 0]


@pytest.mark.parametrize("case", range(len(GROUPS)), ids=lambda case: "-".join(map(str, GROUPS[case])))
def test_tokens(interpreted: dict[str, Any], case: int) -> None:
    for scales, steps in interpreted["tokens"][case]:
        assert scales <= 1e-6
        assert steps <= 1, "what lies between two steps may go either way"


def test_a_token_that_isnt_finite_has_no_finite_scale(interpreted: dict[str, Any]) -> None:
    for found, wanted in interpreted["not finite"]:
        assert found == wanted == [False, True, True, False]


@pytest.mark.parametrize("case", range(len(SHAPES)), ids=lambda case: "-".join(map(str, SHAPES[case])))
def test_products(interpreted: dict[str, Any], case: int) -> None:
    *fp32, one, by_row = interpreted["products"][case]
    assert max(fp32) <= FP32
    assert max(one, by_row) <= 4e-3


def test_activations_in_float8(interpreted: dict[str, Any]) -> None:
    assert max(interpreted["activations"]) <= 0.25, "the interpreter cuts digits off"


def test_no_number_is_no_number_in_float8(interpreted: dict[str, Any]) -> None:
    assert interpreted["limits"] == 2 * [["nan", "57344.0", "-57344.0", "4.0"]]


if __name__ == "__main__":
    print(json.dumps(interpret()))

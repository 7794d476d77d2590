"""Linear layers in parts and with what follows, with a bias and without one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import relative_error
from torch import Tensor, nn
from torch.nn import functional

from tacod.rank.ops import linear
from tacod.rank.ops.linear import linear_add, linear_gelu, split_inputs, split_outputs
from tacod.rank.ops.packed.base import PackedLinear
from tacod.rank.ops.packed.float8 import Float8Linear
from tacod.rank.ops.packed.fp8 import Fp8Linear
from tacod.rank.ops.packed.integers import Int8Linear


def plain(bias: bool) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(32, 48, bias=bias).requires_grad_(False)


def stored(bias: bool) -> PackedLinear:
    layer = plain(bias)
    return Float8Linear(layer.weight.to(torch.float8_e4m3fn), layer.bias, torch.float32)


def whole(bias: bool) -> PackedLinear:
    layer = plain(bias)
    scale = layer.weight.abs().amax(dim=1, keepdim=True) / 127
    data = (layer.weight / scale).round().to(torch.int8)
    return Int8Linear(data, 32, scale, 16, layer.bias, torch.float32)


def adapted(bias: bool) -> PackedLinear:
    generator = torch.Generator().manual_seed(3)
    return stored(bias).adapted(torch.randn(48, 2, generator=generator), torch.randn(2, 32, generator=generator))


def narrow(bias: bool) -> Fp8Linear:
    return Fp8Linear.of(plain(bias))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("make", [plain, stored, narrow, whole, adapted])
def test_parts_make_the_whole(make: Any, bias: bool, x: Tensor) -> None:
    layer = make(bias)
    head, tail = split_outputs(layer, 16)
    assert relative_error(torch.cat((head(x), tail(x)), dim=-1), layer(x)) < 1e-6
    later, first = split_inputs(layer, 8)
    assert relative_error(first(x[..., :8].contiguous(), later(x[..., 8:].contiguous())), layer(x)) < 1e-6
    assert relative_error(linear_gelu(tail, x), functional.gelu(layer(x)[..., 16:], approximate="tanh")) < 1e-6


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("make", [plain, stored, narrow, whole, adapted])
def test_a_layer_adds_to_what_is_there(make: Any, bias: bool, x: Tensor) -> None:
    layer = make(bias)
    there = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(2))
    assert relative_error(linear_add(layer, x, there.clone()), layer(x) + there) < 1e-6


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("make", [plain, stored, narrow, whole, adapted])
def test_gelu_in_one_operation(make: Any, bias: bool, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """What GPUs do: on a CPU the same operation has the exact GELU, which is near to its tanh form."""
    monkeypatch.setattr(linear, "has_kernels", lambda x: True)
    layer = make(bias)
    with torch.no_grad():
        wanted = functional.gelu(layer(x))
        assert relative_error(linear_gelu(layer, x), wanted) < 2e-3
        for part, outputs in zip(split_outputs(layer, 16), (wanted[..., :16], wanted[..., 16:]), strict=True):
            assert relative_error(linear_gelu(part, x), outputs) < 2e-3

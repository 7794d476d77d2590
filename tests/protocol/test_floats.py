"""Floats that numpy lacks come as float32 with exactly torch's values, over all of their codes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tacod_client.tensors import from_wire
from tacod_client.wire import Tensor

KINDS = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "BF16": torch.bfloat16}


def codes(dtype: str) -> torch.Tensor:
    """Every bit pattern of a dtype, once."""
    if dtype == "BF16":
        return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    return torch.arange(256, dtype=torch.int32).to(torch.uint8).view(KINDS[dtype])


@pytest.mark.parametrize("dtype", KINDS)
def test_every_code_has_torchs_value(dtype: str) -> None:
    every = codes(dtype)
    ours = from_wire(Tensor(dtype, tuple(every.shape), (every.view(torch.uint8).numpy().data,)), "numpy")
    theirs = every.to(torch.float32).numpy()
    assert ours.dtype == np.float32
    assert np.array_equal(np.isnan(ours), np.isnan(theirs))
    real = ~np.isnan(theirs)
    assert np.array_equal(ours[real].view(np.uint32), theirs[real].view(np.uint32)), "signs of zeros included"


@pytest.mark.parametrize("dtype", KINDS)
def test_every_code_is_kept_in_torch(dtype: str) -> None:
    every = codes(dtype)
    data = every.view(torch.uint8).numpy()
    back = from_wire(Tensor(dtype, tuple(every.shape), (data.data,)), "torch")
    assert back.dtype == KINDS[dtype]
    assert np.array_equal(back.view(torch.uint8).numpy(), data)


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("shape", [(), (0, 2), (2, 2)])
def test_shapes_are_kept(dtype: str, shape: tuple[int, ...]) -> None:
    tensor = Tensor(dtype, shape, None)
    data = bytes(tensor.nbytes)
    assert from_wire(Tensor(dtype, shape, (data,) if data else ()), "numpy").shape == shape

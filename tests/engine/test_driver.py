"""Copies by the driver, as far as they can be told without a GPU."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tacod.rank.comm import cuda_driver
from tacod.rank.comm.cuda_driver import rows_of
from tacod.rank.oom import describe_oom

few = st.integers(1, 4)


@settings(deadline=None)
@given(tokens=few, batch=few, mine=few, before=st.integers(0, 3), after=st.integers(0, 3), width=few)
def test_rows_reach_their_places_and_no_others(
    tokens: int, batch: int, mine: int, before: int, after: int, width: int
) -> None:
    """Some of the heads of a tensor [S, B, H, D]: what the driver does with what it is told."""
    source = torch.randint(1, 100, (tokens, batch, mine, width), dtype=torch.int16)
    whole = torch.zeros(tokens, batch, before + mine + after, width, dtype=torch.int16)
    expected = whole.clone()
    target = whole[:, :, before : before + mine]
    rows, size, pitch = rows_of(source, target)
    bytes_in = source.flatten().view(torch.uint8)
    bytes_out = whole.flatten().view(torch.uint8)
    start = target.storage_offset() * 2
    for row in range(rows):
        bytes_out[start + row * pitch :][:size] = bytes_in[row * size :][:size]
    expected[:, :, before : before + mine] = source
    assert torch.equal(bytes_out.view(torch.int16).view_as(whole), expected)


def test_what_lies_otherwise_is_refused() -> None:
    whole = torch.zeros(4, 3, 6, 2)
    for source, target in (
        (torch.zeros(3, 4, 6, 2).transpose(0, 1), whole),
        (torch.zeros(4, 2, 6, 2), whole[:, :2]),
        (torch.zeros(4, 3, 3, 2), whole[:, :, ::2]),
        (torch.zeros(4, 3, 6, 2, dtype=torch.float64), whole),
    ):
        with pytest.raises(AssertionError):
            rows_of(source, target)


def test_errors_say_what_the_driver_says(monkeypatch: pytest.MonkeyPatch) -> None:
    def string(code: int, words: Any) -> int:
        ctypes.cast(words, ctypes.POINTER(ctypes.c_char_p))[0] = b"out of memory"
        return 0

    library = SimpleNamespace(cuMemHostRegister_v2=lambda *given: 2, cuGetErrorString=string)
    monkeypatch.setattr(cuda_driver, "_library", lambda: library)
    with pytest.raises(RuntimeError, match=r"cuMemHostRegister_v2: out of memory \(2\)") as caught:
        cuda_driver.map_host(4096, 4096)
    assert describe_oom(caught.value) is not None, "a lack of memory is told as such"
    with pytest.raises(RuntimeError, match="has no cuMemHostUnregister; install"):
        cuda_driver.unmap_host(4096)

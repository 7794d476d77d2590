"""Which queries fill whole waves of a GPU's multiprocessors, and whose keys are shared out."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tacod.rank.ops.sdpa import attend, attend_pieces
from tacod.rank.ops.split_kv import whole_waves

TILE = 128


@pytest.mark.parametrize(
    ("heads", "tokens", "expected"),
    [
        (12, 4608, (4224, 3)),  # Flux.1 at 1024² on 2 GPUs: 3.27 waves
        (8, 4608, (4224, 4)),  # and on 3: 2.18
        (24, 4608, (4608, 1)),  # on one: what is over is more than half of a wave
        (12, 16896, (16896, 1)),  # 2048²: 12 waves
        (12, 1412, (1412, 1)),  # so few keys that it isn't worth a second kernel
        (12, 4481, (4481, 1)),  # keys that don't divide
        (0, 4608, (4608, 1)),
    ],
)
def test_what_is_worth_a_second_kernel(heads: int, tokens: int, expected: tuple[int, int]) -> None:
    assert whole_waves(tokens, tokens, heads, 132) == expected


@given(
    queries=st.integers(0, 20_000),
    keys=st.integers(1, 20_000),
    heads=st.integers(0, 40),
    processors=st.integers(1, 200),
)
def test_waves_are_full_and_the_rest_is_one(queries: int, keys: int, heads: int, processors: int) -> None:
    rows, parts = whole_waves(queries, keys, heads, processors)
    if parts == 1:
        assert rows == queries
        return
    assert rows % TILE == 0
    assert keys % parts == 0
    full, rest = rows // TILE * heads, math.ceil((queries - rows) / TILE) * heads
    assert 0 < rest * parts <= processors, "each multiprocessor has one tile, and one part of the keys for it"
    assert math.ceil(full / processors) < math.ceil((full + rest) / processors), "a wave less than without"


def test_elsewhere_there_is_one_result() -> None:
    q, k, v = torch.randn(3, 2, 3, 9, 16)
    (out,) = attend_pieces(q, k, v, split_kv=True)
    assert torch.equal(out, attend(q, k, v))

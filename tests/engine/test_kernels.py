"""The GPU's kernels, in Triton's interpreter on the CPU: what they compute is what PyTorch's operations compute.

Triton chooses the interpreter when it is imported, so that this file runs itself in a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from helpers import relative_error

from tacod.plan import chunks
from tacod.rank import fused

FP32 = 2e-6
ROWS = [(3, 5, 72), (1, 4, 128), (2, 1, 1100)]
PACKS = [
    {"heads": heads, "width": width, "ranks": ranks, "batch": batch, "normed": normed, "turned": turned}
    for heads, width, ranks, batch in ((5, 16, 3, 2), (24, 32, 2, 1), (2, 20, 3, 1), (9, 72, 1, 2))
    for normed, turned in ((True, True), (False, False), (True, False))
]


def rows(shape: list[int]) -> list[float]:
    """Largest errors of sum and norm: with and without the sum, for modulations of all images and of each."""
    from tacod.rank import kernels

    errors = []
    x, y = torch.randn(2, *shape)
    for images in (1, shape[0]):
        gate, shift, scale = torch.randn(images, 1, 3 * shape[-1]).chunk(3, dim=-1)
        wanted = fused.add_gated_norm(x, gate, y, shift, scale)
        errors += map(relative_error, kernels.rows(x, (gate, y), (shift, scale)), wanted)
        errors.append(relative_error(kernels.rows(x, (gate, y))[0], wanted[0]))
        errors.append(relative_error(kernels.rows(x, None, (shift, scale))[1], fused.norm_modulate(x, shift, scale)))
    return errors


def pack(heads: int, width: int, ranks: int, batch: int, normed: bool, turned: bool) -> list[float]:
    """Largest errors over the ranks' places; NaN where something was written that shouldn't be, or wasn't."""
    from tacod.rank import kernels

    tokens = 7
    counts = chunks(heads, ranks)
    norms = (torch.randn(width), torch.randn(width)) if normed else None
    angle = torch.randn(tokens, width // 2)
    rotation = (angle.cos(), angle.sin()) if turned else None
    projected = fused.Projected(torch.randn(batch, tokens, 3 * heads * width), heads, norms, rotation)
    errors = []
    for rank in range(ranks):
        places = []
        for by_kernel in (True, False):
            sent = torch.full((tokens * batch * 3 * heads * width,), torch.nan)
            kept = torch.full((tokens, batch, 3, counts[rank], width), torch.nan)
            if by_kernel:
                kernels.pack(projected.parts, norms, rotation, 1e-6, sent, kept, rank, ranks)
            else:
                projected.pack(sent, kept, rank, counts)
            places.append(torch.cat((sent, kept.flatten())))
        got, wanted = places
        same = torch.equal(got.isnan(), wanted.isnan())
        errors.append(relative_error(got.nan_to_num(), wanted.nan_to_num()) if same else float("nan"))
    return errors


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    told = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
    answers: dict[str, Any] = json.loads(told.stdout)
    return answers


@pytest.mark.parametrize("case", range(len(ROWS)))
def test_sums_and_norms(interpreted: dict[str, Any], case: int) -> None:
    assert max(interpreted["rows"][case]) <= FP32


@pytest.mark.parametrize("case", range(len(PACKS)), ids=lambda case: "-".join(map(str, PACKS[case].values())))
def test_heads_are_packed_for_their_ranks(interpreted: dict[str, Any], case: int) -> None:
    assert all(error <= FP32 for error in interpreted["pack"][case])


if __name__ == "__main__":
    torch.manual_seed(0)
    print(json.dumps({"rows": [rows(list(shape)) for shape in ROWS], "pack": [pack(**case) for case in PACKS]}))

"""The GPU's kernels, in Triton's interpreter on the CPU: what they compute is what PyTorch's operations compute.

Triton chooses the interpreter when it is imported, so that this file runs itself in a process of its own.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from helpers import relative_error

from tacod.rank.families.kit import MLP
from tacod.rank.ops import fused
from tacod.rank.ops.experts import mixture
from tacod.rank.ops.norm import LAYER_NORM, Norm
from tacod.rank.ops.qkv import QKV, QKNorm, Rotation, deal_heads

FP32 = 2e-6
ROWS = [(2, 2, 72), (1, 2, 128), (2, 1, 1100)]
GATED = [*ROWS, (2, 3, 4100)]
PACKS = [
    {"heads": heads, "width": width, "ranks": ranks, "batch": batch, "norm": norm, "turn": turn}
    for heads, width, ranks, batch in ((5, 16, 3, 2), (24, 32, 2, 1), (2, 20, 3, 1), (9, 72, 1, 2))
    for norm, turn in (("head", "pairs"), ("", ""), ("head", ""))
] + [
    {"heads": 6, "width": 16, "ranks": 2, "batch": 2, "norm": "head", "turn": "halves"},
    {"heads": 3, "width": 20, "ranks": 2, "batch": 1, "norm": "", "turn": "halves"},
    {"heads": 6, "width": 16, "ranks": 2, "batch": 2, "norm": "head", "turn": "halves", "rotary": 6},
    {"heads": 6, "width": 16, "ranks": 2, "batch": 2, "norm": "", "turn": "pairs", "rotary": 6},
    {"heads": 5, "width": 72, "ranks": 3, "batch": 3, "norm": "head", "turn": "pairs", "by_image": True},
    {"heads": 5, "width": 72, "ranks": 3, "batch": 3, "norm": "head", "turn": "halves", "rotary": 24, "by_image": True},
    {"heads": 12, "width": 16, "ranks": 3, "batch": 2, "norm": "head", "turn": "pairs", "kv_heads": 4},
    {
        "heads": 6,
        "width": 16,
        "ranks": 4,
        "batch": 2,
        "norm": "head",
        "turn": "halves",
        "kv_heads": 2,
        "split": True,
    },
    {"heads": 5, "width": 16, "ranks": 7, "batch": 1, "norm": "row", "turn": "pairs", "kv_heads": 1},
    {"heads": 5, "width": 16, "ranks": 2, "batch": 2, "norm": "row", "turn": "halves", "split": True},
    {"heads": 5, "width": 12, "ranks": 2, "batch": 2, "norm": "row", "turn": "pairs", "split": True, "by_head": True},
    {"heads": 9, "width": 16, "ranks": 2, "batch": 2, "norm": "head", "turn": "halves", "by_head": True},
    {
        "heads": 5,
        "width": 16,
        "ranks": 3,
        "batch": 3,
        "norm": "",
        "turn": "halves",
        "rotary": 6,
        "by_image": True,
        "by_head": True,
    },
]

WAVES = [(3, 400, 11, "float32", 2), (3, 400, 11, "bfloat16", 2), (2, 250, 9, "float32", 1), (2, 384, 6, "float32", 1)]
"""Heads, tokens, multiprocessors, dtype and results: two; all with shared keys; all at once, for they fill a wave."""
MERGES = [(2, 10, 3, 16), (3, 9, 1, 40), (5, 20, 2, 128)]

EXPERTS = [(37, 96, 40, 4, 2), (5, 64, 128, 3, 1), (300, 64, 48, 4, 2), (1, 64, 64, 5, 3)]
"""Tokens, channels, hidden channels, experts, and how many of them a token goes to."""


def rows(shape: list[int]) -> list[float]:
    """Largest errors of sum and norm, for modulations of a batch of 1 and of each image, and for every variant."""
    from tacod.rank.ops import kernels

    errors = []
    width = shape[-1]
    x, y, weight, bias = *torch.randn(2, *shape), torch.randn(width), torch.randn(width)
    segments = torch.arange(shape[1]) * 2 // shape[1]
    norms = [LAYER_NORM, Norm(epsilon=1e-5, weight=weight, bias=bias), Norm("rms"), Norm("rms", weight=weight)]
    for images, at in itertools.product({1, shape[0]}, (None, segments) if shape[1] > 1 else (None,)):
        gate, shift, scale = torch.randn(images, 1 if at is None else 2, 3 * width).chunk(3, dim=-1)
        modulations = (shift, scale), (None, scale), (shift, None), (None, None)
        for norm, modulation in itertools.product(norms, modulations):
            wanted = fused.add_gated_norm(x, gate, y, *modulation, norm=norm, segments=at)
            errors += map(relative_error, kernels.rows(x, (gate, y), norm, modulation, at), wanted)
        # The kernel adds before it looks at norm and modulation: a norm alone needs no pair of the two.
        for norm, modulation in zip(norms, modulations, strict=True):
            wanted_alone = fused.norm_modulate(x, *modulation, norm=norm, segments=at)
            errors.append(relative_error(kernels.rows(x, None, norm, modulation, at)[1], wanted_alone))
        errors.append(relative_error(kernels.rows(x, (gate, y), segments=at)[0], fused.add_gated(x, gate, y, at)))
    errors.append(relative_error(kernels.rows(x, (None, y))[0], x + y))
    return errors


def pack(
    heads: int,
    width: int,
    ranks: int,
    batch: int,
    norm: str,
    turn: str,
    rotary: int = 0,
    by_image: bool = False,
    kv_heads: int = 0,
    split: bool = False,
    by_head: bool = False,
) -> list[float]:
    """Largest errors by rank, of the kernel against PyTorch's operations; NaN where something was not written."""
    tokens, kv_heads = 4, kv_heads or heads
    counts = [heads * width, kv_heads * width, kv_heads * width]
    norms = None
    if norm:
        sizes = counts[:2] if norm == "row" else [width, width]
        norms = QKNorm(*map(torch.randn, sizes), epsilon=1e-3, across_heads=norm == "row")
    # A longer table, of which this rank's tokens are a part.
    images, each = [batch if by_image else 1] if by_image or by_head else [], [heads] if by_head else []
    angle = torch.randn(*images, tokens + 2, *each, (rotary or width) // 2)
    rotation = Rotation(angle.cos(), angle.sin(), turn == "halves").split([2, tokens])[1] if turn else None
    projected: Any = torch.randn(batch, tokens, sum(counts))
    if split:
        projected = tuple(torch.randn(batch, tokens, count + 3)[..., :count] for count in counts)
    qkv = QKV(projected, heads, norms, rotation, kv_heads)
    shares = deal_heads(heads, kv_heads, (1,) * ranks)
    shapes = [(tokens, batch, share.count, width) for share in shares]
    got, wanted = ([torch.full(shape, torch.nan) for shape in shapes] for _ in range(2))
    qkv.pack(wanted, shares)
    with mock.patch("tacod.rank.ops.qkv.has_kernels", return_value=True):
        qkv.pack(got, shares)
    return [relative_error(*each) for each in zip(got, wanted, strict=True) if each[0].numel()]


def gated_silu(shape: list[int]) -> list[float]:
    """Errors for two tensors, and for the halves of one; of numbers whose exponentials overflow too."""
    from tacod.rank.ops import kernels

    whole = torch.randn(*shape[:-1], 2 * shape[-1])
    whole[..., 0] = 200 * torch.randn(shape[:-1])
    one, other = whole.chunk(2, dim=-1)
    wanted = fused.gated_silu(one, other)
    got = kernels.gated_silu(one, other), kernels.gated_silu(one.contiguous(), other)
    return [relative_error(each, wanted) for each in got]


def copy() -> float:
    """The largest difference after rows were copied into a part of wider ones."""
    from tacod.rank.ops import kernels

    source, target = torch.randn(5, 2, 3, 20), torch.zeros(5, 2, 7, 20)
    part = target[:, :, 2:5]
    kernels.copy(source.flatten(2).flatten(0, 1), part.flatten(2).flatten(0, 1))
    return max(float((part - source).abs().max()), float(target[:, :, :2].abs().max()))


def narrow(rows: int, width: int) -> list[float]:
    """What int8 loses, and how far the kernels are from PyTorch's operations."""
    from tacod.rank.ops import kernels
    from tacod.rank.ops.quantize_rows import quantize_rows

    x, out = torch.randn(rows, width), torch.empty(rows, width)
    got, scales = torch.empty(rows, width, dtype=torch.int8), torch.empty(rows)
    kernels.quantize(x, got, scales)
    kernels.dequantize(got, scales, out)
    wanted, theirs = quantize_rows(x, torch.int8)
    return [relative_error(out, x), float((got - wanted).abs().max()), relative_error(scales, theirs)]


def not_finite() -> list[bool]:
    """Of rows, one of which has a NaN: which come out with one."""
    from tacod.rank.ops import kernels

    x, out = torch.randn(3, 20), torch.empty(3, 20)
    x[1, 7] = torch.nan
    got, scales = torch.empty(3, 20, dtype=torch.int8), torch.empty(3)
    kernels.quantize(x, got, scales)
    kernels.dequantize(got, scales, out)
    return [bool(row.isnan().any()) for row in out]


def merged(parts: int, tokens: int, heads: int, width: int) -> float:
    """How far attention whose keys are shared out is from attention to all of them."""
    from tacod.rank.ops import kernels
    from tacod.rank.ops.sdpa import attend, attend_part

    q, k, v = torch.randn(3, 1, heads, tokens, width)
    k[:, :, : tokens // 3] *= 3  # the parts' weights differ
    each = zip(k.chunk(parts, dim=2), v.chunk(parts, dim=2), strict=True)
    outs, lses = zip(*(attend_part(q, *part) for part in each), strict=True)
    got = kernels.merge(torch.cat(outs).transpose(1, 2).contiguous(), torch.cat(lses))
    return relative_error(got, attend(q, k, v)[0].transpose(0, 1))


def waves(heads: int, tokens: int, processors: int, dtype: str) -> tuple[int, float]:
    """How many results there are, and how far they are from attention at once; with cuDNN's kernel played."""
    from tacod.rank.ops.sdpa import attend, attend_pieces

    q, k, v = torch.randn(tokens, 1, 3, heads, 16, dtype=getattr(torch, dtype)).permute(2, 1, 3, 0, 4)
    k[:, :, : tokens // 3] *= 3
    count = SimpleNamespace(multi_processor_count=processors)
    with (
        playing_cudnn(),
        torch.inference_mode(),
        mock.patch("tacod.rank.ops.split_kv._can_share", return_value=True),
        mock.patch("tacod.rank.ops.split_kv._OWN_COST", 0),
        mock.patch("torch.cuda.get_device_properties", return_value=count),
    ):
        results = [each.permute(2, 0, 1, 3) for each in attend_pieces(q, k, v, split_kv=True)]
    assert all(result.is_contiguous() for result in results)
    return len(results), relative_error(torch.cat(results), attend(q, k, v).permute(2, 0, 1, 3))


def experts(tokens: int, width: int, hidden: int, count: int, active: int, dtype: torch.dtype) -> float:
    """How far the kernel's outputs of experts are from their layers' own."""
    from tacod.rank.ops import expert_kernels

    made = [MLP(width, hidden, ("w1", "w2", "w3"), "swiglu", bias=False).to(dtype) for _ in range(count)]
    layers = [(each.w1, each.w2, each.w3) for each in made]
    x, chosen = torch.randn(tokens, width, dtype=dtype), torch.randn(tokens, count).topk(active)[1]
    chosen[: tokens // 2] = chosen[:1]  # so that some have many tokens, and others few or none
    counts = (chosen[..., None] == torch.arange(count)).sum((0, 1))
    with torch.inference_mode(), mock.patch("torch.cuda.get_device_capability", return_value=(9, 0)):
        weights = [tuple(layer.weight for layer in each) for each in zip(*layers, strict=True)]
        found = expert_kernels.feed_forward(x, chosen.flatten().argsort(), counts, active, *weights)
        return relative_error(found, mixture(x, chosen, layers, made))


def trouble() -> list[str]:
    """What is said of cuDNN's kernel: as it is, with other logarithms, without this argument, and where it can't."""
    from tacod.rank.ops.split_kv import _trouble

    def refuse(*args: object) -> None:
        raise RuntimeError("no plan\nfor this")

    cpu = torch.device("cpu")
    told = []
    for playing in (playing_cudnn(), playing_cudnn(scale=1.443), playing_cudnn(op=refuse)):
        with playing, torch.inference_mode():
            told.append(_trouble(cpu))
    with torch.inference_mode():
        told.append(_trouble(cpu))
    return told


@contextmanager
def playing_cudnn(scale: float = 1.0, op: Callable[..., object] | None = None) -> Iterator[None]:
    """Within, attention that tells its log-sum-exps is computed on the CPU, these times ``scale``."""
    from tacod.rank.ops.sdpa import attend_part

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: None, tell: bool) -> tuple[torch.Tensor, ...]:
        out, lse = attend_part(q, k, v)
        return out.to(q.dtype), lse.unsqueeze(-1) * scale

    with (
        mock.patch.object(torch.ops.aten, "_scaled_dot_product_cudnn_attention", op or attend),
        mock.patch("torch.backends.cuda.can_use_cudnn_attention", return_value=True),
    ):
        yield


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    # More threads would wait for so small tensors on cores that other tests use.
    environment["OMP_NUM_THREADS"] = "1"
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


@pytest.mark.parametrize("case", range(len(GATED)))
def test_silu_times_another(interpreted: dict[str, Any], case: int) -> None:
    assert max(interpreted["gated_silu"][case]) <= FP32


def test_rows_are_copied_into_wider_ones(interpreted: dict[str, Any]) -> None:
    assert interpreted["copy"] == 0


@pytest.mark.parametrize("case", range(len(MERGES)), ids=lambda case: "-".join(map(str, MERGES[case])))
def test_parts_of_attention_are_merged(interpreted: dict[str, Any], case: int) -> None:
    assert interpreted["merged"][case] <= FP32


@pytest.mark.parametrize("case", range(len(WAVES)), ids=lambda case: "-".join(map(str, WAVES[case])))
def test_attention_in_whole_waves(interpreted: dict[str, Any], case: int) -> None:
    count, error = interpreted["waves"][case]
    assert count == WAVES[case][-1]
    assert error <= (FP32 if WAVES[case][3] == "float32" else 5e-3)


def test_shares_are_tried_before_they_are_used(interpreted: dict[str, Any]) -> None:
    fine, logarithms, refusal, nothing = interpreted["trouble"]
    assert fine == ""
    assert logarithms.startswith("what is merged differs by ")
    assert refusal == "no plan"
    assert nothing == "cuDNN's kernel doesn't take them"


def test_numbers_in_8_bits(interpreted: dict[str, Any]) -> None:
    for lost, differing, scales in interpreted["narrow"]:
        assert lost < 1e-2
        assert differing == 0
        assert scales <= FP32


def test_a_row_with_a_nan_keeps_it(interpreted: dict[str, Any]) -> None:
    assert interpreted["not_finite"] == [False, True, False]


@pytest.mark.parametrize("case", range(len(EXPERTS)), ids=lambda case: "-".join(map(str, EXPERTS[case])))
def test_experts(interpreted: dict[str, Any], case: int) -> None:
    fp32, fp16 = interpreted["experts"][case]
    assert fp32 <= FP32
    assert fp16 <= 1e-3


if __name__ == "__main__":
    torch.manual_seed(0)
    told = {
        "experts": [[experts(*case, dtype) for dtype in (torch.float32, torch.float16)] for case in EXPERTS],
        "gated_silu": [gated_silu(list(shape)) for shape in GATED],
        "rows": [rows(list(shape)) for shape in ROWS],
        "pack": [pack(**case) for case in PACKS],
        "copy": copy(),
        "merged": [merged(*case) for case in MERGES],
        "waves": [waves(*case) for *case, _ in WAVES],
        "trouble": trouble(),
        "not_finite": not_finite(),
        "narrow": [narrow(5, 16), narrow(37, 128), narrow(3, 6000)],
    }
    print(json.dumps(told))

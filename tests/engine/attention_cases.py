"""Attention of made-up streams over ranks, against plain PyTorch operations in one process."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from tacod.rank.ops.qkv import QKV, QKNorm, Rotation
from tacod.rank.parallel.sequence import SequenceParallel

WIDTH = 16
EPSILON = 1e-3


def largest_error(
    sequence: SequenceParallel,
    heads: int,
    kv_heads: int,
    lengths: list[int],
    batch: int,
    norm: str,
    turn: str,
    rotary: int,
    by_image: bool,
    separate: bool,
    keys: str,
    seed: int,
) -> float:
    """The largest relative error of a stream; ``keys`` is "all", "some" of them for each image, or "shared" ones."""
    torch.manual_seed(seed)
    sizes = [heads * WIDTH, kv_heads * WIDTH, kv_heads * WIDTH]
    streams = [torch.randn(batch, length, sum(sizes)) for length in lengths]
    weights = [torch.randn(size if norm == "row" else WIDTH) for size in sizes[:2]]
    angles = [torch.randn(*([batch] if by_image else []), length, rotary // 2) for length in lengths]
    mask = torch.rand(1 if keys == "shared" else batch, sum(lengths)) < (2 if keys == "all" else 0.4)
    mask[:, seed % sum(lengths)] = True

    expected = torch.split(_plain(streams, sizes, weights, angles, norm, turn, mask), lengths, dim=1)
    norms = QKNorm(weights[0], weights[1], EPSILON, norm == "row") if norm else None
    local = [sequence.shard(stream) for stream in streams]
    counts = [stream.shape[1] for stream in local]
    rotations: list[Rotation | None] = [None] * len(streams)
    if turn:
        mine = [sequence.shard(angle, dim=-2) for angle in angles]
        parts = [Rotation(angle.cos(), angle.sin(), turn == "halves") for angle in mine]
        rotations = [*Rotation.concatenate(parts).split(counts)]
    projected = [torch.split(stream, sizes, dim=-1) if separate else stream for stream in local]
    made = [
        functools.partial(QKV, each, heads, norms, rotation, kv_heads)
        for each, rotation in zip(projected, rotations, strict=True)
    ]
    order = None if keys == "all" else sequence.in_order_of_ranks(mask, lengths)
    assert order is None or order.shape == (len(mask), 1, 1, sum(lengths))
    out = torch.split(sequence.attend(made, lengths, order).wait().clone(), counts, dim=1)
    whole = [sequence.gather(part, length) for part, length in zip(out, lengths, strict=True)]
    errors = [float((a - b).norm() / b.norm()) for a, b in zip(whole, expected, strict=True) if b.numel()]
    return max(errors) if all(map(math.isfinite, errors)) else math.inf


def _plain(
    streams: list[Tensor],
    sizes: list[int],
    weights: list[Tensor],
    angles: list[Tensor],
    norm: str,
    turn: str,
    mask: Tensor,
) -> Tensor:
    """The joint attention [B, S, H * D], in fp64."""
    q, k, v = (part.double() for part in torch.split(torch.cat(streams, dim=1), sizes, dim=-1))
    if norm == "row":
        q, k = (_norm(x) * weight for x, weight in zip((q, k), weights, strict=True))
    q, k, v = (x.unflatten(-1, (-1, WIDTH)) for x in (q, k, v))
    if norm == "head":
        q, k = (_norm(x) * weight for x, weight in zip((q, k), weights, strict=True))
    if turn:
        angle = torch.cat(angles, dim=-2).double().unsqueeze(-2)
        q, k = _turn(q, angle, turn), _turn(k, angle, turn)
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / WIDTH**0.5
    scores = scores.masked_fill(~mask[:, None, None], -math.inf)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(2).float()


def _norm(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPSILON).sqrt()


def _turn(x: Tensor, angle: Tensor, turn: str) -> Tensor:
    """Channels as complex numbers, times those of the angles."""
    width = 2 * angle.shape[-1]
    pairs = x[..., :width].unflatten(-1, (2, -1) if turn == "halves" else (-1, 2))
    turned = torch.view_as_complex((pairs.mT if turn == "halves" else pairs).contiguous()) * torch.polar(
        torch.ones_like(angle), angle
    )
    out = torch.view_as_real(turned)
    return torch.cat(((out.mT if turn == "halves" else out).flatten(-2), x[..., width:]), dim=-1)

"""A Triton kernel that multiplies tokens by the weights of the experts that they go to.

How many tokens an expert gets is known on the GPU alone. So there are programs for as many tiles as there can be, and
those without tokens end at once; the host waits for nothing. This module is imported on GPUs only.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["feed_forward"]

_TOKENS, _INPUTS = 128, 64
"""A tile's tokens, and the inputs that it reads at once."""


@triton.jit(do_not_specialize=["tiles"])
def _multiply(
    x, order, counts, weights, gates, out, tiles, outputs, inputs, active,
    EXPERTS: tl.constexpr, GATED: tl.constexpr, WHOLE: tl.constexpr,
    TOKENS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    """One tile of an expert's outputs: of its gated hidden channels, or of its last layer, in the order of tokens.

    The former are silu(x · weightᵀ) * (x · gateᵀ), in the order of experts; the latter is x · weightᵀ.
    Programs side by side have the same outputs of one tile of tokens after the other: these weights stay in the cache.
    """
    tile, column = tl.program_id(0) % tiles, tl.program_id(0) // tiles * OUTPUTS
    weight, gate, first, end = weights[0], gates[0], 0, 0
    start, begun = 0, 0
    for expert in tl.static_range(EXPERTS):
        count = tl.load(counts + expert).to(tl.int32)
        here = (tile >= begun) & (tile < begun + tl.cdiv(count, TOKENS))
        weight = tl.where(here, weights[expert], weight)
        gate = tl.where(here, gates[expert], gate)
        first = tl.where(here, start + (tile - begun) * TOKENS, first)
        end = tl.where(here, start + count, end)
        start += count
        begun += tl.cdiv(count, TOKENS)
    if first >= end:
        return
    row = first + tl.arange(0, TOKENS)
    real = row < end
    place = tl.load(order + row, mask=real, other=0)
    source = place // active if GATED else row.to(tl.int64)
    output, depth = column + tl.arange(0, OUTPUTS), tl.arange(0, INPUTS)
    inside = output < outputs
    read = x + source[:, None] * inputs + depth[None, :]
    at = output.to(tl.int64)[None, :] * inputs + depth[:, None]
    sums = tl.zeros([TOKENS, OUTPUTS], tl.float32)
    gate_sums = tl.zeros([TOKENS, OUTPUTS], tl.float32)
    for step in range(tl.cdiv(inputs, INPUTS)):
        if WHOLE:
            tokens = tl.load(read, mask=real[:, None], other=0.0)
            sums = tl.dot(tokens, tl.load(weight + at, mask=inside[None, :], other=0.0), sums)
            if GATED:
                gate_sums = tl.dot(tokens, tl.load(gate + at, mask=inside[None, :], other=0.0), gate_sums)
        else:
            left = depth < inputs - step * INPUTS
            both = left[:, None] & inside[None, :]
            tokens = tl.load(read, mask=real[:, None] & left[None, :], other=0.0)
            sums = tl.dot(tokens, tl.load(weight + at, mask=both, other=0.0), sums)
            if GATED:
                gate_sums = tl.dot(tokens, tl.load(gate + at, mask=both, other=0.0), gate_sums)
        read += INPUTS
        at += INPUTS
    value = sums.to(out.dtype.element_ty)
    if GATED:
        # Each product is rounded, as layers round it.
        gated = value.to(tl.float32)
        value = (gated * tl.sigmoid(gated) * gate_sums.to(out.dtype.element_ty).to(tl.float32)).to(out.dtype.element_ty)
    to = row.to(tl.int64) if GATED else place
    tl.store(out + to[:, None] * outputs + output[None, :], value, mask=real[:, None] & inside[None, :])


def feed_forward(
    x: Tensor,
    order: Tensor,
    counts: Tensor,
    active: int,
    firsts: tuple[Tensor, ...],
    seconds: tuple[Tensor, ...],
    gates: tuple[Tensor, ...],
) -> Tensor:
    """Each token of ``x`` [n, W] by each of its ``active`` experts: [n, active, W].

    ``order`` (int64 [n * active]) has the places of tokens' experts, expert by expert, and ``counts`` (int64) how many
    each expert has. The others are the weights of all experts' layers: [F, W], [W, F] and [F, W].
    """
    x = x.contiguous()
    hidden = x.new_empty(len(order), len(firsts[0]))
    out = x.new_empty(len(order), len(seconds[0]))
    if len(order):
        _launch(x, order, counts, firsts, gates, hidden, active, True)
        _launch(hidden, order, counts, seconds, seconds, out, active, False)
    return torch.unflatten(out, 0, (len(x), active))


def _launch(
    x: Tensor,
    order: Tensor,
    counts: Tensor,
    weights: tuple[Tensor, ...],
    gates: tuple[Tensor, ...],
    out: Tensor,
    active: int,
    gated: bool,
) -> None:
    outputs, inputs = weights[0].shape
    # With a gate there are two products of a tile.
    wide = 128 if gated else 256
    tiles = triton.cdiv(len(order), _TOKENS) + len(weights) - 1
    stages = 3 if torch.cuda.get_device_capability(x.device)[0] >= 9 else 2
    _multiply[(tiles * triton.cdiv(outputs, wide),)](
        x, order, counts, weights, gates, out, tiles, outputs, inputs, active,
        EXPERTS=len(weights), GATED=gated, WHOLE=inputs % _INPUTS == 0,
        TOKENS=_TOKENS, OUTPUTS=wide, INPUTS=_INPUTS, num_warps=8, num_stages=stages,
    )  # fmt: skip

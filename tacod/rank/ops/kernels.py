"""Triton kernels for what a block does between its matrices; each reads and writes every number once.

They compute in fp32 and round once, where PyTorch's separate operations round after each. What they mean is what
`fused`, `qkv`, `quantize_rows`, `int8` and `sdpa` compute without them. Two more wait for other ranks and count time.
This module is imported on GPUs only.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import globaltimer

from tacod.rank.ops.norm import Norm

__all__ = ["barrier", "copy", "count_time", "dequantize", "gated_silu", "merge", "pack", "quantize", "rows"]

_HEADS = 8, 4
"""Heads that one program of `pack` handles: the more, the wider it stores."""
_GATED = 2048
"""The most channels that one program of `gated_silu` handles."""
_MERGED = 8
"""Heads of tokens that one program of `merge` handles."""
_NUMBERS = 4096
"""About how many numbers one program of `quantize` and `dequantize` handles."""


@triton.jit(do_not_specialize=["tokens"])
def _rows(
    x, y, gate, shift, scale, weight, bias, segments, total, normed,
    tokens, width, epsilon,
    x_image, x_token, y_image, y_token, gate_image, gate_row, shift_image, shift_row, scale_image, scale_row,
    ADD: tl.constexpr, GATE: tl.constexpr, NORM: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
    SHIFT: tl.constexpr, SCALE: tl.constexpr, SEGMENTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One token: x + gate * y, and its norm modulated by shift and scale."""
    row = tl.program_id(0).to(tl.int64)
    image, token = row // tokens, row % tokens
    column = tl.arange(0, BLOCK)
    inside = column < width
    gate += image * gate_image
    shift += image * shift_image
    scale += image * scale_image
    if SEGMENTS:
        segment = tl.load(segments + token)
        gate += segment * gate_row
        shift += segment * shift_row
        scale += segment * scale_row
    value = tl.load(x + image * x_image + token * x_token + column, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        more = tl.load(y + image * y_image + token * y_token + column, mask=inside, other=0.0).to(tl.float32)
        if GATE:
            value += more * tl.load(gate + column, mask=inside, other=0.0).to(tl.float32)
        else:
            value += more
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + row * width + column, rounded, mask=inside)
        value = rounded.to(tl.float32)
    if NORM != "none":
        if NORM == "layer":
            mean = tl.sum(value, axis=0) / width
            value = tl.where(inside, value - mean, 0.0)
        out = value * tl.rsqrt(tl.sum(value * value, axis=0) / width + epsilon)
        if WEIGHT:
            out *= tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
        if BIAS:
            out += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
        if SCALE:
            out *= 1.0 + tl.load(scale + column, mask=inside, other=0.0).to(tl.float32)
        if SHIFT:
            out += tl.load(shift + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(normed + row * width + column, out.to(normed.dtype.element_ty), mask=inside)


def rows(
    x: Tensor,
    added: tuple[Tensor | None, Tensor] | None = None,
    norm: Norm | None = None,
    modulation: tuple[Tensor | None, Tensor | None] = (None, None),
    segments: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``x`` [B, S, W] plus gate * y for ``added`` = (gate, y), and that sum's norm * (1 + scale) + shift.

    Gate, shift and scale are [B or 1, M, W] or absent, and ``modulation`` is (shift, scale). M is 1, or ``segments``
    (int64 [S]) names each token's row. Returns both; without ``added`` the first is ``x`` itself, without ``norm`` the
    second is the first.
    """
    batch, tokens, width = x.shape
    x = _dense(x)
    total = x if added is None else torch.empty((batch, tokens, width), dtype=x.dtype, device=x.device)
    normed = total if norm is None else torch.empty((batch, tokens, width), dtype=x.dtype, device=x.device)
    gate, y = (None, x) if added is None else (added[0], _dense(added[1]))
    gates = [x if each is None else _dense(each) for each in (gate, *modulation)]
    weight, bias = (None, None) if norm is None else (norm.weight, norm.bias)
    if batch * tokens:
        _rows[(batch * tokens,)](
            x, y, *gates, x if weight is None else weight, x if bias is None else bias,
            x if segments is None else segments, total, normed,
            tokens, width, 0.0 if norm is None else norm.epsilon,
            x.stride(0), x.stride(1), y.stride(0), y.stride(1),
            *(stride for each in gates for stride in (_image_stride(each), each.stride(1))),
            ADD=added is not None, GATE=gate is not None, NORM="none" if norm is None else norm.kind,
            WEIGHT=weight is not None, BIAS=bias is not None, SHIFT=modulation[0] is not None,
            SCALE=modulation[1] is not None, SEGMENTS=segments is not None, BLOCK=triton.next_power_of_2(width),
            num_warps=8 if width > 1024 else 4,
        )  # fmt: skip
    return total, normed


@triton.jit(do_not_specialize=["one_row", "other_row"])
def _gated_silu(one, other, out, width, one_row, other_row, BLOCK: tl.constexpr):
    """Some channels of one token: silu(one) * other."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    first = tl.load(one + row * one_row + column, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(other + row * other_row + column, mask=inside, other=0.0).to(tl.float32)
    value = first * tl.sigmoid(first) * second
    tl.store(out + row * width + column, value.to(out.dtype.element_ty), mask=inside)


def gated_silu(one: Tensor, other: Tensor) -> Tensor:
    """silu(one) * other, both [B, S, W]; they may be parts of wider rows."""
    rows, others = (_dense(each).flatten(0, -2) for each in (one, other))
    out = torch.empty(one.shape, dtype=one.dtype, device=one.device)
    count, width = rows.shape
    block = min(triton.next_power_of_2(width), _GATED)
    if out.numel():
        _gated_silu[(count, triton.cdiv(width, block))](
            rows, others, out, width, rows.stride(0), others.stride(0), BLOCK=block
        )
    return out


def _dense(x: Tensor) -> Tensor:
    """With neighbouring channels side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _image_stride(x: Tensor) -> int:
    """From one image's to the next one's; a batch of 1 broadcasts."""
    return x.stride(0) if x.shape[0] > 1 else 0


@triton.jit(do_not_specialize=["tokens", "heads", "kv_heads", "batch"])
def _pack(
    q, k, v, q_scale, k_scale, cosine, sine, target,
    tokens, heads, kv_heads, batch, epsilon,
    q_image, q_token, k_image, k_token, v_image, v_token, turn_image, turn_token, turn_head,
    WIDTH: tl.constexpr, NORM: tl.constexpr, TURN: tl.constexpr, HALVES: tl.constexpr, ROTARY: tl.constexpr,
    BY_HEAD: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Some heads of one token: norm and rotate queries and keys, and store all three where they are wanted."""
    row = tl.program_id(0).to(tl.int64)
    image, token = row // tokens, row % tokens
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    channel = tl.arange(0, 2 * HALF)
    if TURN:
        # Channels from ROTARY on stay: their cosine is 1, their sine 0.
        angle = image * turn_image + token * turn_token
        if BY_HEAD:
            angle = angle + (head * turn_head)[:, None]
            known = (head < heads)[:, None]
        else:
            known = tl.full([1, 1], 1, tl.int1)
        if HALVES:
            first = (channel < ROTARY // 2)[None, :]
            turned = (channel < ROTARY)[None, :]
            pair = tl.where(channel < ROTARY // 2, channel, channel - ROTARY // 2)[None, :]
            partner = tl.where(turned, tl.where(first, pair + ROTARY // 2, pair), channel[None, :])
            cos = tl.load(cosine + angle + pair, mask=turned & known, other=1.0)
            sin = tl.load(sine + angle + pair, mask=turned & known, other=0.0)
            sin = tl.where(first, -sin, sin)
        else:
            pair = tl.arange(0, HALF)[None, :]
            cos = tl.load(cosine + angle + pair, mask=(pair < ROTARY // 2) & known, other=1.0)
            sin = tl.load(sine + angle + pair, mask=(pair < ROTARY // 2) & known, other=0.0)
    for part in tl.static_range(3):
        if part == 0:
            source, count, begin = q + image * q_image + token * q_token, heads, 0
        elif part == 1:
            source, count, begin = k + image * k_image + token * k_token, kv_heads, heads
        else:
            source, count, begin = v + image * v_image + token * v_token, kv_heads, heads + kv_heads
        inside = (head[:, None] < count) & (channel[None, :] < WIDTH)
        value = tl.load(source + head[:, None] * WIDTH + channel[None, :], mask=inside, other=0.0)
        if part < 2 and (NORM or TURN):
            out = value.to(tl.float32)
            if NORM:
                weight = q_scale if part == 0 else k_scale
                spread = tl.rsqrt(tl.sum(out * out, axis=1) / WIDTH + epsilon)
                scale = tl.load(weight + channel, mask=channel < WIDTH, other=0.0)
                out = out * spread[:, None] * scale.to(tl.float32)[None, :]
            if TURN and HALVES:
                other = tl.load(source + head[:, None] * WIDTH + partner, mask=inside, other=0.0)
                other = other.to(tl.float32)
                if NORM:
                    scale = tl.load(weight + partner, mask=(channel < WIDTH)[None, :], other=0.0)
                    other = other * spread[:, None] * scale.to(tl.float32)
                out = cos * out + sin * other
            elif TURN:
                even, odd = tl.split(tl.reshape(out, (HEADS, HALF, 2)))
                out = tl.reshape(tl.join(cos * even - sin * odd, sin * even + cos * odd), (HEADS, 2 * HALF))
            value = out.to(value.dtype)
        # Tokens come first: [S, B, heads + 2 * kv_heads, D].
        place = ((token * batch + image) * (heads + 2 * kv_heads) + begin + head) * WIDTH
        tl.store(target + place[:, None] + channel[None, :], value, mask=inside)


def pack(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    norms: tuple[Tensor, Tensor] | None,
    rotation: tuple[Tensor, Tensor] | None,
    epsilon: float,
    target: Tensor,
    halves: bool = False,
) -> None:
    """Some heads' queries, keys and values, normed and rotated, into ``target`` [S, B, H + 2 * G, D], contiguous.

    ``q`` is [B, S, H, D], ``k`` and ``v`` are [B, S, G, D], each with any first two strides, and D even. ``norms`` are
    the RMS weights [D] of queries and keys; ``rotation`` and ``halves`` are as in `qkv.Rotation`.
    """
    batch, tokens, heads, width = q.shape
    if not target.numel():
        return
    assert all(each.stride(-1) == 1 and each.stride(-2) == width for each in (q, k, v))
    q_scale, k_scale = norms or (q, q)
    cosine, sine = rotation or (q, q)
    rotary = 2 * cosine.shape[-1]
    by_head = rotation is not None and cosine.ndim == 4
    turn_image = cosine.stride(0) if rotation is not None and cosine.ndim >= 3 and len(cosine) > 1 else 0
    turn_token, turn_head = cosine.stride()[1:3] if by_head else (rotary // 2, 0)
    assert rotation is None or all(each.stride(-1) == 1 for each in rotation)
    assert rotation is None or by_head or all(each.stride(-2) == rotary // 2 for each in rotation)
    assert rotation is None or cosine.stride() == sine.stride()
    # As few as can be that handle no head.
    many = min(_HEADS, key=lambda n: -heads % n)
    _pack[(batch * tokens, triton.cdiv(heads, many))](
        q, k, v, q_scale, k_scale, cosine, sine, target,
        tokens, heads, k.shape[2], batch, epsilon,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], turn_image, turn_token, turn_head,
        WIDTH=width, NORM=norms is not None, TURN=rotation is not None, HALVES=halves, ROTARY=rotary,
        BY_HEAD=by_head, HEADS=many, HALF=triton.next_power_of_2(width // 2), num_warps=many // 2,
    )  # fmt: skip


@triton.jit
def _copy(source, target, width, source_row, target_row, BLOCK: tl.constexpr):
    """One row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    tl.store(target + row * target_row + column, tl.load(source + row * source_row + column, mask=inside), mask=inside)


def copy(source: Tensor, target: Tensor) -> None:
    """Copy rows [n, W], neighbouring in each row, far apart or not; wide stores make the most of a link."""
    rows, width = source.shape
    if source.numel():
        block = triton.next_power_of_2(width)
        _copy[(rows,)](source, target, width, source.stride(0), target.stride(0), BLOCK=block, num_warps=4)


@triton.jit(do_not_specialize=["rows"])
def _quantize(
    x, quantized, scales, rows, width, stride,
    LIMIT: tl.constexpr, ROUND: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Some rows in 8 bits, and what they are to be multiplied by."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row[:, None] < rows) & (column[None, :] < width)
    value = tl.load(x + row[:, None] * stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    # Without the sign, the bits of floats are in their order, and those of NaN are the largest: a row has its NaN's.
    largest = tl.max(value.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1).to(tl.float32, bitcast=True)
    scale = tl.where(largest < 1e-12, 1e-12, largest) / LIMIT
    value = value / scale[:, None]
    if ROUND:
        value = tl.floor(value + 0.5)
    tl.store(quantized + row[:, None] * width + column[None, :], value.to(quantized.dtype.element_ty), mask=inside)
    tl.store(scales + row, scale, mask=row < rows)


def quantize(x: Tensor, quantized: Tensor, scales: Tensor) -> None:
    """Each row of ``x`` [n, W] in 8 bits, into ``quantized`` [n, W] (int8 or e4m3) times ``scales`` [n] in fp32."""
    rows, width = x.shape
    x = _dense(x)
    whole = quantized.dtype == torch.int8
    block = triton.next_power_of_2(width)
    many = max(_NUMBERS // block, 1)
    if rows:
        _quantize[(triton.cdiv(rows, many),)](
            x, quantized, scales, rows, width, x.stride(0),
            LIMIT=127.0 if whole else 448.0, ROUND=whole, ROWS=many, BLOCK=block,
            num_warps=4 if block <= _NUMBERS else 8,
        )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def _dequantize(quantized, scales, out, rows, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Some rows."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row[:, None] < rows) & (column[None, :] < width)
    value = tl.load(quantized + row[:, None] * width + column[None, :], mask=inside, other=0).to(tl.float32)
    value *= tl.load(scales + row, mask=row < rows, other=0.0)[:, None]
    tl.store(out + row[:, None] * width + column[None, :], value.to(out.dtype.element_ty), mask=inside)


def dequantize(quantized: Tensor, scales: Tensor, out: Tensor) -> None:
    """Rows ``quantized`` [n, W] times ``scales`` [n], into ``out`` [n, W]."""
    rows, width = out.shape
    block = triton.next_power_of_2(width)
    many = max(_NUMBERS // block, 1)
    if rows:
        _dequantize[(triton.cdiv(rows, many),)](
            quantized, scales, out, rows, width, ROWS=many, BLOCK=block, num_warps=4
        )


@triton.jit(do_not_specialize=["parts", "tokens", "heads"])
def _merge(
    part, lse, out, parts, tokens, heads, width,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Some heads of tokens: the mean of the parts, weighted by how much of the softmax each has seen."""
    rows = tokens.to(tl.int64) * heads
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row[:, None] < rows) & (column[None, :] < width)
    seen = lse + row % heads * tokens + row // heads
    top = tl.full([ROWS], -float("inf"), tl.float32)
    for number in range(parts):
        top = tl.maximum(top, tl.load(seen + number * rows, mask=row < rows, other=0.0))
    total = tl.zeros([ROWS], tl.float32)
    value = tl.zeros([ROWS, BLOCK], tl.float32)
    for number in range(parts):
        weight = tl.exp(tl.load(seen + number * rows, mask=row < rows, other=0.0) - top)
        place = part + (number * rows + row[:, None]) * width + column[None, :]
        total += weight
        value += weight[:, None] * tl.load(place, mask=inside, other=0.0).to(tl.float32)
    value /= total[:, None]
    tl.store(out + row[:, None] * width + column[None, :], value.to(out.dtype.element_ty), mask=inside)


def merge(parts: Tensor, lse: Tensor) -> Tensor:
    """Attention [S, H, D] from what parts of the keys give: ``parts`` [n, S, H, D] and ``lse`` [n, H, S] in fp32.

    Both are contiguous; ``lse`` holds the log-sum-exps of the scores, of which none is infinite.
    """
    assert parts.is_contiguous()
    assert lse.is_contiguous()
    count, tokens, heads, width = parts.shape
    out = parts.new_empty(tokens, heads, width)
    if out.numel():
        grid = (triton.cdiv(tokens * heads, _MERGED),)
        block = triton.next_power_of_2(width)
        _merge[grid](parts, lse, out, count, tokens, heads, width, ROWS=_MERGED, BLOCK=block, num_warps=4)
    return out


@triton.jit(do_not_specialize=["rank"])
def _barrier(pads, counter, rank, SIZE: tl.constexpr):
    """Leave a mark with every other rank, wait for theirs, and take them away."""
    began = globaltimer()
    pads = pads.to(tl.pointer_type(tl.uint64))
    for peer in range(SIZE):
        if peer != rank:
            mark = tl.load(pads + peer).to(tl.pointer_type(tl.int32)) + rank
            while tl.atomic_cas(mark, 0, 1, sem="release", scope="sys") != 0:
                pass
    mine = tl.load(pads + rank).to(tl.pointer_type(tl.int32))
    for peer in range(SIZE):
        if peer != rank:
            while tl.atomic_cas(mine + peer, 1, 0, sem="acquire", scope="sys") != 1:
                pass
    tl.atomic_add(counter, globaltimer() - began)


def barrier(pads: int, rank: int, size: int, counter: Tensor) -> None:
    """Wait until every rank is here; ``counter`` (int64 [1]) grows by the nanoseconds that this took.

    ``pads`` is the device address of the addresses of each rank's pad, int32 [size] or longer and 0 before the first
    barrier, that all ranks reach.
    """
    _barrier[(1,)](pads, counter, rank, SIZE=size, num_warps=1)


@triton.jit
def _count_time(counter, sign):
    """What the device's clock shows."""
    tl.atomic_add(counter, globaltimer() * sign)


def count_time(counter: Tensor, sign: int) -> None:
    """Add the device's clock in nanoseconds to ``counter`` (int64 [1]), or take it away: once at each end of a span."""
    _count_time[(1,)](counter, sign, num_warps=1)

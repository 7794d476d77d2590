"""Triton kernels of packed layers: each reads and writes every number once.

They compute in fp32 and round once. What they mean is what the layers beside this module compute without them. This
module is imported on GPUs only.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from tacod.rank.ops.packed.kitchen import needed

__all__ = [
    "dequantize_float8",
    "dequantize_nvfp4",
    "has_float8",
    "multiply",
    "quantize_float8",
    "quantize_tokens",
    "rotate",
    "takes",
    "unpack_codes",
    "unpack_nibbles",
]

_TILE, _WIDE = 4096, 1024
"""About how many numbers one program unpacks or rotates, and how many of them at most lie in one row."""
_DEEP = 128
"""How many inputs a program of `multiply` reads at once."""
_SHALLOW = 4096
"""Up to so many inputs, smaller tiles are the faster ones for more outputs (measured on an H100)."""
_ROUND = tl.constexpr(12582912.0)
"""1.5 * 2^23: a number of fewer than 22 bits plus this, minus this, is rounded to even."""


def has_float8(device: torch.device) -> bool:
    """Whether the GPU's kernels read e4m3."""
    return torch.cuda.get_device_capability(device) >= (8, 9)


@triton.jit
def _rotated(value, STAGES: tl.constexpr, SIZE: tl.constexpr):
    """``value`` [SIZE], each 4 ** STAGES of it in reverse, rotated: `rotation.rotate` of what isn't reversed.

    Half of the matrix of 4 is that of (1/2 1/2 1/2 1/2) in each row, less 1 on the diagonal, with its rows in reverse.
    What holds for it holds for its Kronecker powers, which have a stage each.
    """
    for stage in tl.static_range(STAGES):
        value = tl.reshape(value, [SIZE // 4 // 4**stage, 4, 4**stage])
        value = 0.5 * tl.sum(value, axis=1, keep_dims=True) - value
    return tl.reshape(value, [SIZE])


@triton.jit
def _load_reversed(source, first, count, STAGES: tl.constexpr, SIZE: tl.constexpr):
    """SIZE numbers of ``source`` from ``first`` on, each 4 ** STAGES of them in reverse; 0 from ``count`` on."""
    if STAGES == 0:
        place = first + tl.arange(0, SIZE)
        return tl.load(source + place, mask=place < count, other=0)
    # What lies together is read together, and reversed then.
    run: tl.constexpr = 8 if STAGES > 1 else 4
    runs: tl.constexpr = 4**STAGES // run
    number = tl.arange(0, SIZE // run)
    number = number // runs * runs + (runs - 1 - number % runs)
    place = first + number[:, None] * run + tl.arange(0, run)[None, :]
    return tl.reshape(tl.flip(tl.load(source + place, mask=place < count, other=0), 1), [SIZE])


@triton.jit
def _quantize_tokens(
    x, quantized, scales, width, x_row, STAGES: tl.constexpr, BLOCK: tl.constexpr, EXACT: tl.constexpr
):
    """One token."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    value = _load_reversed(x + row * x_row, 0, width, STAGES, BLOCK).to(tl.float32)
    value = _rotated(value, STAGES, BLOCK)
    # Without the sign, the bits of floats are in their order, and those of NaN are the largest: a token has its NaN's.
    largest = tl.max(value.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=0).to(tl.float32, bitcast=True)
    scale = tl.div_rn(largest, 127.0)
    scale = tl.where(scale < 1e-30, 1e-30, scale)
    if EXACT:
        value = tl.div_rn(value, scale)
    else:
        value *= tl.div_rn(1.0, scale)
    value = (value + _ROUND) - _ROUND
    tl.store(quantized + row * width + column, value.to(tl.int8), mask=column < width)
    tl.store(scales + row, scale)


def quantize_tokens(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Tokens [n, W], each ``group`` of their columns rotated, in int8 [n, W], and their scales, fp32 [n, 1].

    ``group`` is a power of 4 that divides W, or 0 for no rotation.
    """
    x = x if x.stride(-1) == 1 else x.contiguous()
    count, width = x.shape
    quantized = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scales = torch.empty(count, 1, dtype=torch.float32, device=x.device)
    if count:
        block = max(triton.next_power_of_2(width), group)
        _quantize_tokens[(count,)](
            x, quantized, scales, width, x.stride(0), STAGES=_stages(group), BLOCK=block,
            # A division for each number takes as long as all the rest.
            EXACT=x.dtype == torch.float32, num_warps=4 if block <= _TILE else 8,
        )  # fmt: skip
    return quantized, scales


@triton.jit
def _rotate(data, scale, out, count, width, STAGES: tl.constexpr, ROWWISE: tl.constexpr, CHUNK: tl.constexpr):
    """Some groups of columns of a weight."""
    first = tl.program_id(0).to(tl.int64) * CHUNK
    place = first + tl.arange(0, CHUNK)
    value = _load_reversed(data, first, count, STAGES, CHUNK).to(tl.float32)
    if ROWWISE:
        # A group lies in one row.
        value *= tl.load(scale + place // width, mask=place < count, other=0.0)
    else:
        value *= tl.load(scale)
    value = _rotated(value, STAGES, CHUNK)
    tl.store(out + place, value.to(out.dtype.element_ty), mask=place < count)


def rotate(data: Tensor, scale: Tensor, group: int, dtype: torch.dtype) -> Tensor:
    """A weight [m, W] of whole numbers times its scale (fp32: one, or m), each ``group`` of its columns rotated."""
    out = torch.empty(data.shape, dtype=dtype, device=data.device)
    grid = (triton.cdiv(data.numel(), _TILE),)
    _rotate[grid](
        data, scale, out, data.numel(), data.shape[1], STAGES=_stages(group), ROWWISE=scale.numel() > 1, CHUNK=_TILE
    )
    return out


def _stages(group: int) -> int:
    """Which power of 4 a group is; 0 for no group."""
    return max(group.bit_length() - 1, 0) // 2


@triton.jit(do_not_specialize=["tokens", "programs"])
def _multiply(
    x, weight, out, x_scale, weight_scale, bias, tokens, outputs, inputs, programs,
    TOKENS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, TOGETHER: tl.constexpr,
    ROWWISE: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Tiles of the outputs; programs side by side share the tokens of some tiles, and so the cache."""
    down, across = tl.cdiv(tokens, TOKENS), tl.cdiv(outputs, OUTPUTS)
    for tile in tl.range(tl.program_id(0), down * across, programs, flatten=True):
        band, place = tile // (TOGETHER * across), tile % (TOGETHER * across)
        high = tl.minimum(down - band * TOGETHER, TOGETHER)
        row = (band * TOGETHER + place % high) * TOKENS
        column = place // high * OUTPUTS
        sums = tl.zeros([TOKENS, OUTPUTS], tl.int32)
        for step in range(tl.cdiv(inputs, INPUTS)):
            depth = step * INPUTS
            sums = tl.dot(x.load([row, depth]), weight.load([column, depth]).T, sums, out_dtype=tl.int32)
        token, output = row + tl.arange(0, TOKENS), column + tl.arange(0, OUTPUTS)
        token_scale = tl.load(x_scale + token, mask=token < tokens, other=0.0)
        if ROWWISE:
            output_scale = tl.load(weight_scale + output, mask=output < outputs, other=0.0)
        else:
            output_scale = tl.zeros([OUTPUTS], tl.float32) + tl.load(weight_scale)
        value = sums.to(tl.float32) * (token_scale[:, None] * output_scale[None, :])
        if BIAS:
            value += tl.load(bias + output, mask=output < outputs, other=0.0).to(tl.float32)[None, :]
        out.store([row, column], value.to(out.dtype))


def takes(weight: Tensor) -> bool:
    """Whether `multiply` serves an int8 ``weight`` [m, W]: on Hopper (`kitchen.needed`), in rows of whole 16 bytes."""
    fits = weight.shape[1] % 16 == 0 and len(weight) % 8 == 0 and weight.data_ptr() % 16 == 0 and weight.is_contiguous()
    return fits and not needed(torch.cuda.get_device_capability(weight.device))


def multiply(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Scales times int8 ``x`` [n, W] · ``weight``ᵀ [m, W], summed in whole numbers, plus ``bias``: [n, m] in ``dtype``.

    ``x_scale`` is fp32 of n numbers, ``weight_scale`` fp32 of one number or m, ``bias`` [m] or None. See `takes`.
    """
    (tokens, inputs), outputs = x.shape, len(weight)
    out = torch.empty(tokens, outputs, dtype=dtype, device=x.device)
    if not tokens:
        return out
    high, wide, warps, stages = 128, 256 if dtype.itemsize == 2 else 128, 8, 3
    programs = torch.cuda.get_device_properties(x.device).multi_processor_count
    tiles = triton.cdiv(tokens, high) * triton.cdiv(outputs, wide)
    if tiles <= (4 if inputs <= _SHALLOW else 2) * programs:
        # Smaller tiles share the multiprocessors out more evenly.
        high, wide, warps, stages = 64, 128, 4, 4
        tiles = triton.cdiv(tokens, high) * triton.cdiv(outputs, wide)
        programs = 2 * programs
    programs = min(programs, tiles)
    _multiply[(programs,)](
        TensorDescriptor.from_tensor(x, [high, _DEEP]),
        TensorDescriptor.from_tensor(weight, [wide, _DEEP]),
        TensorDescriptor.from_tensor(out, [high, wide]),
        x_scale, weight_scale, weight_scale if bias is None else bias, tokens, outputs, inputs, programs,
        TOKENS=high, OUTPUTS=wide, INPUTS=_DEEP, TOGETHER=8, ROWWISE=weight_scale.numel() > 1, BIAS=bias is not None,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


@triton.jit
def _quantize_float8(x, scale, out, count, LIMIT: tl.constexpr, BLOCK: tl.constexpr):
    """Some numbers."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + place, mask=place < count, other=0.0)
    factor = tl.div_rn(1.0, tl.load(scale)).to(value.dtype)
    value = (value.to(tl.float32) * factor.to(tl.float32)).to(value.dtype).to(tl.float32)
    # NaN stays what it is.
    value = tl.where(value > LIMIT, LIMIT, tl.where(value < -LIMIT, -LIMIT, value))
    tl.store(out + place, value.to(out.dtype.element_ty), mask=place < count)


def quantize_float8(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """See `float8.quantize_float8`."""
    x = x.contiguous()
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    if x.numel():
        grid = (triton.cdiv(x.numel(), _TILE),)
        _quantize_float8[grid](x, scale, out, x.numel(), LIMIT=torch.finfo(dtype).max, BLOCK=_TILE, num_warps=8)
    return out


@triton.jit
def _dequantize_float8(
    data, scale, out, rows, width, data_row, scale_row,
    SCALE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Some numbers of some rows; SCALE is "", "one", "row", or "block": a power of two for each 32 columns."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (row[:, None] < rows) & (column[None, :] < width)
    value = tl.load(data + row[:, None] * data_row + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if SCALE == "one":
        value *= tl.load(scale)
    elif SCALE == "row":
        value *= tl.load(scale + row, mask=row < rows, other=0.0)[:, None]
    elif SCALE == "block":
        power = tl.load(scale + row[:, None] * scale_row + column[None, :] // 32, mask=inside, other=127).to(tl.int32)
        # The bits of 2 ** (power - 127), of which the least isn't a normal number.
        value *= tl.where(power > 0, power << 23, 1 << 22).to(tl.float32, bitcast=True)
    tl.store(out + row[:, None] * width + column[None, :], value.to(out.dtype.element_ty), mask=inside)


def dequantize_float8(data: Tensor, scale: Tensor | None, width: int, dtype: torch.dtype) -> Tensor:
    """The first ``width`` columns of a weight in e4m3 or e5m2, [m, at least width], times its scale: [m, width].

    ``scale`` is fp32 of one number or m, or uint8 [m, blocks] of exponents plus 127 for each 32 columns.
    """
    rows, _ = data.shape
    kind = "" if scale is None else "block" if scale.dtype == torch.uint8 else "row" if scale.numel() > 1 else "one"
    out = torch.empty(rows, width, dtype=dtype, device=data.device)
    many, block = _tile(width)
    _dequantize_float8[(triton.cdiv(rows, many), triton.cdiv(width, block))](
        data, data if scale is None else scale, out, rows, width, data.stride(0),
        scale.stride(0) if scale is not None and kind == "block" else 0, SCALE=kind, ROWS=many, BLOCK=block,
        num_warps=8,
    )  # fmt: skip
    return out


def _tile(width: int) -> tuple[int, int]:
    """How many rows, and how many numbers of each, one program handles."""
    block = max(min(triton.next_power_of_2(width), _WIDE), 32)
    return max(_TILE // block, 1), block


@triton.jit
def _dequantize_nvfp4(
    data, blocks, scale, out, rows, width, data_row, blocks_row, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Some numbers of some rows."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    byte = tl.program_id(1) * (BLOCK // 2) + tl.arange(0, BLOCK // 2)
    inside = (row[:, None] < rows) & (2 * byte[None, :] < width)
    packed = tl.load(data + row[:, None] * data_row + byte[None, :], mask=inside, other=0).to(tl.int32)
    code = tl.reshape(tl.join(packed >> 4, packed & 15), [ROWS, BLOCK // 16, 16])
    # Of e2m1: a sign, an exponent of 2 bits plus 1, and a bit; without an exponent the bit counts halves.
    size = code & 7
    bits = ((size >> 1) + 126) << 23 | (size & 1) << 22
    value = tl.where(size < 2, size.to(tl.float32) * 0.5, bits.to(tl.float32, bitcast=True))
    value = tl.where(code > 7, -value, value)
    block = tl.program_id(1) * (BLOCK // 16) + tl.arange(0, BLOCK // 16)
    there = (row[:, None] < rows) & (16 * block[None, :] < width)
    factor = tl.load(blocks + row[:, None] * blocks_row + block[None, :], mask=there, other=0.0).to(tl.float32)
    value = tl.reshape(value * (tl.load(scale) * factor)[:, :, None], [ROWS, BLOCK])
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (row[:, None] < rows) & (column[None, :] < width)
    tl.store(out + row[:, None] * width + column[None, :], value.to(out.dtype.element_ty), mask=inside)


def dequantize_nvfp4(data: Tensor, blocks: Tensor, scale: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """The first ``width`` columns of a weight in e2m1, uint8 [m, bytes]: [m, width]. See `float8.Nvfp4Linear`."""
    rows = len(data)
    out = torch.empty(rows, width, dtype=dtype, device=data.device)
    many, block = _tile(width)
    _dequantize_nvfp4[(triton.cdiv(rows, many), triton.cdiv(width, block))](
        data, blocks, scale, out, rows, width, data.stride(0), blocks.stride(0), ROWS=many, BLOCK=block, num_warps=8
    )
    return out


@triton.jit
def _unpack_nibbles(data, out, count, BLOCK: tl.constexpr):
    """Some bytes."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    packed = tl.load(data + place, mask=place < count, other=0).to(tl.int32)
    value = tl.reshape(tl.join(((packed & 15) ^ 8) - 8, packed >> 4), [2 * BLOCK])
    place = tl.program_id(0).to(tl.int64) * 2 * BLOCK + tl.arange(0, 2 * BLOCK)
    tl.store(out + place, value.to(tl.int8), mask=place < 2 * count)


def unpack_nibbles(data: Tensor) -> Tensor:
    """Signed numbers of 4 bits, two in a byte of int8 [m, W / 2], the even column in the low nibble: int8 [m, W]."""
    out = torch.empty(len(data), 2 * data.shape[1], dtype=torch.int8, device=data.device)
    grid = (triton.cdiv(data.numel(), _TILE // 2),)
    _unpack_nibbles[grid](data, out, data.numel(), BLOCK=_TILE // 2, num_warps=8)
    return out


@triton.jit
def _unpack_codes(data, relative, codebook, out, count, GROUP: tl.constexpr, BOOK: tl.constexpr, BLOCK: tl.constexpr):
    """Some codes."""
    place = tl.program_id(0).to(tl.int64) * (BLOCK // 2) + tl.arange(0, BLOCK // 2)
    packed = tl.load(data + place, mask=place < count // 2, other=0).to(tl.int32)
    code = tl.reshape(tl.join(packed & 15, packed >> 4), [BLOCK // GROUP, GROUP])
    value = tl.load(codebook + code) if BOOK else code.to(tl.float32) - 8.0
    group = tl.program_id(0).to(tl.int64) * (BLOCK // GROUP) + tl.arange(0, BLOCK // GROUP)
    factor = tl.load(relative + group, mask=group < count // GROUP, other=0.0).to(tl.float32)
    value = (value * factor[:, None] + _ROUND) - _ROUND
    value = tl.reshape(tl.clamp(value, -127.0, 127.0), [BLOCK])
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + place, value.to(tl.int8), mask=place < count)


def unpack_codes(data: Tensor, relative: Tensor, codebook: Tensor | None) -> Tensor | None:
    """Codes of 4 bits, uint8 [m, W / 2], as the numbers of 8 bits that they stand for: int8 [m, W].

    See `integers.W4A8Linear`. None for groups that no power of two counts.
    """
    rows, width = len(data), 2 * data.shape[1]
    group = width // relative.shape[1]
    if group & (group - 1) or group > _TILE:
        return None
    out = torch.empty(rows, width, dtype=torch.int8, device=data.device)
    _unpack_codes[(triton.cdiv(out.numel(), _TILE),)](
        data, relative, relative if codebook is None else codebook, out, out.numel(),
        GROUP=group, BOOK=codebook is not None, BLOCK=_TILE, num_warps=8,
    )  # fmt: skip
    return out

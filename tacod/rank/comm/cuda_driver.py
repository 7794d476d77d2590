"""CUDA driver calls that need none of a GPU's multiprocessors, and that PyTorch doesn't offer.

A matrix product leaves no multiprocessor free, so a kernel beside it waits for its end. Copy engines, and waits for a
number in memory, don't. Calls go on the current stream, and into a graph that it captures.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

__all__ = ["copy_bytes", "copy_rows", "map_host", "rows_of", "unmap_host", "wait_until", "write"]

_DEVICE = 2
_EQUAL = 1


def _side(name: str) -> list[tuple[str, Any]]:
    """One side of a copy."""
    return [
        (f"{name}_x", ctypes.c_size_t),
        (f"{name}_y", ctypes.c_size_t),
        (f"{name}_kind", ctypes.c_uint),
        (f"{name}_host", ctypes.c_void_p),
        (f"{name}_device", ctypes.c_uint64),
        (f"{name}_array", ctypes.c_void_p),
        (f"{name}_pitch", ctypes.c_size_t),
    ]


class _Copy2D(ctypes.Structure):
    """CUDA_MEMCPY2D."""

    _fields_ = [*_side("src"), *_side("dst"), ("width", ctypes.c_size_t), ("height", ctypes.c_size_t)]


@cache
def _library() -> Any:
    return ctypes.CDLL("libcuda.so.1")


def _call(name: str, *arguments: Any) -> None:
    """Call the driver. Raises `RuntimeError` with the driver's message."""
    library = _library()
    if not hasattr(library, name):
        raise RuntimeError(f"this CUDA driver has no {name}; install one of CUDA 12 or newer")
    code = getattr(library, name)(*arguments)
    if code:
        words = ctypes.c_char_p()
        library.cuGetErrorString(code, ctypes.byref(words))
        raise RuntimeError(f"CUDA driver: {name}: {(words.value or b'unknown error').decode()} ({code})")


def _stream() -> ctypes.c_void_p:
    return ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)


def map_host(address: int, size: int) -> None:
    """Give the current GPU access to pages of the host's memory; they stay where they are."""
    _call("cuMemHostRegister_v2", ctypes.c_void_p(address), ctypes.c_size_t(size), ctypes.c_uint(0))


def unmap_host(address: int) -> None:
    """Undo `map_host`."""
    _call("cuMemHostUnregister", ctypes.c_void_p(address))


def copy_bytes(source: int, target: int, size: int) -> None:
    """Copy between two addresses: on this GPU, on a GPU that it can access, or in mapped host memory."""
    _call("cuMemcpyAsync", ctypes.c_uint64(target), ctypes.c_uint64(source), ctypes.c_size_t(size), _stream())


def rows_of(source: Tensor, target: Tensor) -> tuple[int, int, int]:
    """How many rows make up a copy, how many bytes each has, and how far apart they begin in ``target``.

    Both have one shape and dtype, and ``source`` is contiguous. ``target`` is too, and then it is one row; or its first
    two dimensions are, and its others.
    """
    assert source.is_contiguous()
    assert source.shape == target.shape
    assert source.dtype == target.dtype
    if target.is_contiguous():
        return 1, source.nbytes, source.nbytes
    assert target.stride(0) == target.shape[1] * target.stride(1)
    assert target[0, 0].is_contiguous()
    return source.shape[0] * source.shape[1], source[0, 0].nbytes, target.stride(1) * target.element_size()


def copy_rows(source: Tensor, target: Tensor) -> None:
    """Copy a tensor on this GPU, of what `rows_of` can be said, to one on this GPU or one that it reaches."""
    rows, width, pitch = rows_of(source, target)
    if not source.numel():
        return
    if rows == 1:
        copy_bytes(source.data_ptr(), target.data_ptr(), width)
        return
    copy = _Copy2D(
        src_kind=_DEVICE, src_device=source.data_ptr(), src_pitch=width,
        dst_kind=_DEVICE, dst_device=target.data_ptr(), dst_pitch=pitch,
        width=width, height=rows,
    )  # fmt: skip
    _call("cuMemcpy2DAsync_v2", ctypes.byref(copy), _stream())


def write(address: int, value: int) -> None:
    """Write a 32-bit number after the earlier work on this stream, visible to all who share that memory."""
    _call("cuStreamWriteValue32_v2", _stream(), ctypes.c_uint64(address), ctypes.c_uint32(value), ctypes.c_uint(0))


def wait_until(address: int, value: int) -> None:
    """Have later work on this stream wait until that number is there."""
    _call("cuStreamWaitValue32_v2", _stream(), ctypes.c_uint64(address), ctypes.c_uint32(value), ctypes.c_uint(_EQUAL))

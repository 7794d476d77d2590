"""Out-of-memory errors: recognized whatever their type and text, and described."""

from __future__ import annotations

import re
import traceback
from typing import NamedTuple

import psutil
import torch

from tacod_client.units import size

__all__ = ["Shortage", "clear_tracebacks", "describe_oom"]


class Shortage(NamedTuple):
    """What an out-of-memory error says."""

    text: str
    """What was asked for and what is free."""
    lacking_bytes: int | None = None
    """By how much it was too little; None if the error doesn't say."""
    host: bool = False
    """Whether it is the host's memory, and not a GPU's."""


_UNITS = {"bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
_SIZE = rf"([\d.]+) ({'|'.join(_UNITS)})"


def describe_oom(error: Exception) -> Shortage | None:
    """What was asked for and what is free; None if this is no out-of-memory error."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError):
        # The sentences on what was tried, and on what is free; its numbers of GPUs are not those of nvidia-smi.
        told = re.sub(r"GPU \d+ has", "the GPU has", ". ".join(text.split(". ")[:3]))
        wanted, free = (re.search(pattern, text) for pattern in (f"allocate {_SIZE}", f"of which {_SIZE} is free"))
        return _shortage(told, wanted and _bytes(*wanted.groups()), free and _bytes(*free.groups()))
    # PyTorch has no type of its own for the host's memory.
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in text:
        asked = re.search(r"tried to allocate (\d+) bytes", text)
        wanted_bytes = int(asked[1]) if asked else None
        told = "an allocation failed" if wanted_bytes is None else f"tried to allocate {size(wanted_bytes)}"
        free_bytes = psutil.virtual_memory().available
        return _shortage(f"host out of memory: {told}, and {size(free_bytes)} are free", wanted_bytes, free_bytes, True)
    # The driver's word, and cuBLAS's, to those that don't ask PyTorch for memory.
    if isinstance(error, RuntimeError) and ("out of memory" in text or "ALLOC_FAILED" in text):
        return Shortage(f"the GPU is out of memory ({text.splitlines()[0]})")
    return None


def _shortage(text: str, wanted: int | None, free: int | None, host: bool = False) -> Shortage:
    if wanted is None or free is None or wanted <= free:
        return Shortage(text, host=host)
    return Shortage(f"{text}: {size(wanted - free)} lack", wanted - free, host)


def _bytes(number: str, unit: str) -> int:
    return int(float(number) * _UNITS[unit])


def clear_tracebacks(error: Exception) -> None:
    """Clear the local variables of the frames that an error passed: they keep tensors alive while it is handled."""
    passed: BaseException | None = error
    while passed is not None:
        traceback.clear_frames(passed.__traceback__)
        passed = passed.__cause__ or passed.__context__

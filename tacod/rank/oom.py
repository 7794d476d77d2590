"""What an allocator says when there is no memory, by whatever error."""

from __future__ import annotations

import re
import traceback

import psutil
import torch

__all__ = ["let_go", "shortage"]


def shortage(error: Exception) -> str | None:
    """What was asked for and what is free, in short; None if this error is of another kind."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError):
        # The sentences on what was tried, and on what is free; its numbers of GPUs are not those of nvidia-smi.
        return re.sub(r"GPU \d+ has", "the GPU has", ". ".join(text.split(". ")[:3]))
    # PyTorch has no type of its own for the host's memory.
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in text:
        asked = re.search(r"tried to allocate (\d+) bytes", text)
        wanted = f"tried to allocate {int(asked[1]) / 2**30:.2f} GiB" if asked else "an allocation failed"
        free = psutil.virtual_memory().available
        return f"host out of memory: {wanted}, and {free / 2**30:.2f} GiB are free"
    # The driver's word, and cuBLAS's, to those that don't ask PyTorch for memory.
    if isinstance(error, RuntimeError) and ("out of memory" in text or "ALLOC_FAILED" in text):
        return f"the GPU is out of memory ({text.splitlines()[0]})"
    return None


def let_go(error: Exception) -> None:
    """Drop what the functions that failed still hold: an error keeps their tensors alive as long as it is handled."""
    traceback.clear_frames(error.__traceback__)

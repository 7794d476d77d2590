"""Out-of-memory errors: recognized whatever their type and text, and described."""

from __future__ import annotations

import re
import traceback

import psutil
import torch

__all__ = ["clear_tracebacks", "describe_oom"]


def describe_oom(error: Exception) -> str | None:
    """What was asked for and what is free; None if this is no out-of-memory error."""
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


def clear_tracebacks(error: Exception) -> None:
    """Clear the local variables of the frames that an error passed: they keep tensors alive while it is handled."""
    passed: BaseException | None = error
    while passed is not None:
        traceback.clear_frames(passed.__traceback__)
        passed = passed.__cause__ or passed.__context__

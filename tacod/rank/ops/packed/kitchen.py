"""comfy-kitchen's product of whole numbers, where it is installed (https://github.com/Comfy-Org/comfy-kitchen).

It is an optional dependency: ``pip install 'taco-dit[daemon,quantised]'``.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

__all__ = ["int8_linear", "needed", "serves", "takes"]


@lru_cache(maxsize=1)
def _library() -> Any:
    """The package, or None where it is missing or has no kernels for this machine."""
    if torch.version.cuda is None or int(torch.version.cuda.partition(".")[0]) < 13:
        # As in ComfyUI: its kernels are built for CUDA 13.
        return None
    try:
        import comfy_kitchen
    except ImportError:
        return None
    return comfy_kitchen if comfy_kitchen.list_backends().get("cuda", {}).get("available") else None


def takes(weight: Tensor) -> bool:
    """Whether `int8_linear` is there for an int8 ``weight`` [m, W] on a GPU."""
    fits = weight.shape[1] % 16 == 0 and len(weight) % 16 == 0 and weight.is_contiguous()
    return fits and serves(torch.cuda.get_device_capability(weight.device))


def needed(capability: tuple[int, int]) -> bool:
    """Whether GPUs of this compute capability need it: on all but Hopper our own product is slower than bf16's."""
    return capability[0] != 9


def serves(capability: tuple[int, int]) -> bool:
    """Whether the package is installed with kernels for GPUs of this compute capability."""
    return capability >= (7, 5) and _library() is not None


def int8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, group: int) -> Tensor:
    """Tokens [n, W], each ``group`` of their columns rotated if it isn't 0, times int8 ``weight``ᵀ [m, W]: [n, m].

    Tokens are quantized to int8, each with a scale of its own. ``scale`` is fp32, one number or [m, 1].
    """
    if not len(x):
        # A rank may have none of the tokens.
        return x.new_empty(0, len(weight))
    library = _library()
    with library.use_backend("cuda"):
        out: Tensor = library.int8_linear(x.contiguous(), weight, scale, bias, x.dtype, bool(group), group or 256)
    return out

"""ConvRot's rotation: groups of columns times a regular Hadamard matrix.

The matrix of 4 has rows (1 1 1 -1), (1 1 -1 1), (1 -1 1 1) and (-1 1 1 1); larger ones are its Kronecker powers. Over
the root of its size it is symmetric and its own inverse.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["hadamard", "rotate"]

_FOUR = ((1.0, 1.0, 1.0, -1.0), (1.0, 1.0, -1.0, 1.0), (1.0, -1.0, 1.0, 1.0), (-1.0, 1.0, 1.0, 1.0))


@lru_cache(maxsize=32)
def hadamard(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The matrix of ``size``, a power of 4, over its root: [size, size]. Made once on a device."""
    with torch.inference_mode(False):
        four = torch.tensor(_FOUR, dtype=dtype, device=device)
        matrix: Tensor = four
        while len(matrix) < size:
            matrix = torch.kron(matrix, four)
        return matrix.div_(size**0.5)


def rotate(x: Tensor, group: int) -> Tensor:
    """The last dimension of ``x``, each ``group`` of it rotated; in the dtype of ``x``."""
    matrix = hadamard(group, x.dtype, x.device)
    return torch.matmul(x.reshape(-1, x.shape[-1] // group, group), matrix).reshape(x.shape)

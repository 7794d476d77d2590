"""What a block does between its matrices: in one pass by `kernels` on a GPU, by PyTorch's operations elsewhere.

On a GPU these compute in fp32 and round once, so they are nearer to exact arithmetic than the operations one by one.
Under autograd, as in training, the operations are used everywhere.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

__all__ = [
    "Residual",
    "add_gated",
    "add_gated_norm",
    "has_kernels",
    "norm_modulate",
]

_EPSILON = 1e-6
"""Of every norm in these families, unless a forward asks for another."""


def has_kernels(x: Tensor) -> bool:
    """Whether ``x`` is where the kernels run, and nothing is differentiated."""
    return x.is_cuda and not torch.is_grad_enabled()


def norm_modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Adaptive layer norm of ``x`` [B, S, W] (Peebles and Xie, 2022, arXiv:2212.09748): norm(x) * (1 + scale) + shift.

    ``shift`` and ``scale`` are [B or 1, 1, W].
    """
    if has_kernels(x):
        from tacod.rank.ops import kernels

        return kernels.rows(x, None, (shift, scale), _EPSILON)[1]
    return torch.addcmul(shift, functional.layer_norm(x, x.shape[-1:], eps=_EPSILON), 1 + scale)


def add_gated(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """The residual stream one branch further: x + gate * y, with x, y [B, S, W] and gate [B or 1, 1, W]."""
    if has_kernels(x):
        from tacod.rank.ops import kernels

        return kernels.rows(x, (gate, y))[0]
    return x + gate * y


def add_gated_norm(x: Tensor, gate: Tensor, y: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """`add_gated`, and `norm_modulate` of what it gives."""
    if has_kernels(x):
        from tacod.rank.ops import kernels

        return kernels.rows(x, (gate, y), (shift, scale), _EPSILON)
    x = add_gated(x, gate, y)
    return x, norm_modulate(x, shift, scale)


class Residual:
    """A residual stream [B, S, W]; what its last branch adds may wait for the norm that follows, to be one pass."""

    def __init__(self, tokens: Tensor, gate: Tensor | None = None, branch: Tensor | None = None) -> None:
        """``tokens`` + ``gate`` * ``branch``, with the gate [B or 1, 1, W]; or ``tokens`` as they are."""
        self._tokens = tokens
        self._branch = None if gate is None or branch is None else (gate, branch)

    @property
    def dtype(self) -> torch.dtype:
        """Of its tokens."""
        return self._tokens.dtype

    @property
    def tokens(self) -> Tensor:
        """With all that was to be added."""
        if self._branch is not None:
            self._tokens, self._branch = add_gated(self._tokens, *self._branch), None
        return self._tokens

    def normed(self, shift: Tensor, scale: Tensor) -> Tensor:
        """`norm_modulate` of `tokens`."""
        if self._branch is None:
            return norm_modulate(self._tokens, shift, scale)
        self._tokens, normed = add_gated_norm(self._tokens, *self._branch, shift, scale)
        self._branch = None
        return normed

"""What a block does between its matrices: in one pass by `kernels` on a GPU, by PyTorch's operations elsewhere.

Both compute in fp32 and round once, so they are nearer to exact arithmetic than separate operations in bf16. Under
autograd, as in training, PyTorch's operations are used everywhere.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from tacod.rank.ops.norm import LAYER_NORM, Norm

__all__ = [
    "Residual",
    "add_gated",
    "add_gated_norm",
    "gated_silu",
    "has_kernels",
    "norm_modulate",
]


def has_kernels(x: Tensor) -> bool:
    """Whether the kernels can run on ``x``: it is on a GPU, and nothing is differentiated."""
    return x.is_cuda and not torch.is_grad_enabled()


def norm_modulate(
    x: Tensor,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    norm: Norm = LAYER_NORM,
    segments: Tensor | None = None,
) -> Tensor:
    """Adaptive norm of ``x`` [B, S, W] (Peebles and Xie, 2022, arXiv:2212.09748): norm(x) * (1 + scale) + shift.

    ``shift`` and ``scale`` are [B or 1, M, W], and may be absent. M is 1, or ``segments`` (int64 [S]) says which of
    their rows each token has.
    """
    if has_kernels(x):
        from tacod.rank.ops import kernels

        return kernels.rows(x, None, norm, (shift, scale), segments)[1]
    out = norm(x.float())
    if scale is not None:
        factor = 1 + _rows(scale, segments)
        out = out * factor if shift is None else torch.addcmul(_rows(shift, segments), out, factor)
    elif shift is not None:
        out = out + _rows(shift, segments)
    return out.to(x.dtype)


def add_gated(x: Tensor, gate: Tensor | None, y: Tensor, segments: Tensor | None = None) -> Tensor:
    """Add a branch to the residual stream: x + gate * y, with x, y [B, S, W] and gate as in `norm_modulate`.

    Without a gate it is x + y.
    """
    if has_kernels(x):
        from tacod.rank.ops import kernels

        return kernels.rows(x, (gate, y), segments=segments)[0]
    return (x.float() + (y if gate is None else _rows(gate, segments) * y.float())).to(x.dtype)


def add_gated_norm(
    x: Tensor,
    gate: Tensor | None,
    y: Tensor,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    norm: Norm = LAYER_NORM,
    segments: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`add_gated`, and `norm_modulate` of its result."""
    if has_kernels(x):
        from tacod.rank.ops import kernels

        return kernels.rows(x, (gate, y), norm, (shift, scale), segments)
    x = add_gated(x, gate, y, segments)
    return x, norm_modulate(x, shift, scale, norm=norm, segments=segments)


def gated_silu(one: Tensor, other: Tensor) -> Tensor:
    """silu(one) * other, both [B, S, W]: the middle of a SwiGLU (Shazeer, 2020, arXiv:2002.05202)."""
    if has_kernels(one):
        from tacod.rank.ops import kernels

        return kernels.gated_silu(one, other)
    return functional.silu(one) * other


def _rows(modulation: Tensor, segments: Tensor | None) -> Tensor:
    """A modulation [B, M, W] in fp32 for each token; with one row, as it is."""
    modulation = modulation.float()
    return modulation if segments is None else modulation[:, segments]


class Residual:
    """A residual stream [B, S, W]. The last branch may be added together with the next norm, in one pass.

    What `later` is given is done when the tokens are needed next.
    """

    def __init__(self, tokens: Tensor, segments: Tensor | None = None) -> None:
        """``segments`` (int64 [S]) says which row of its modulations each token has; None if they have one row."""
        self._tokens = tokens
        self._branch: tuple[Tensor | None, Tensor] | None = None
        self._later: Callable[[], None] | None = None
        self.segments = segments

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its tokens."""
        return self._tokens.dtype

    @property
    def size(self) -> int:
        """How many tokens this rank has."""
        return self._tokens.shape[1]

    @property
    def tokens(self) -> Tensor:
        """The tokens, with all branches added."""
        self.catch_up()
        if self._branch is not None:
            self._tokens, self._branch = add_gated(self._tokens, *self._branch, self.segments), None
        return self._tokens

    @tokens.setter
    def tokens(self, tokens: Tensor) -> None:
        self._tokens, self._branch, self._later = tokens, None, None

    def later(self, change: Callable[[], None]) -> None:
        """Put off a change of this stream until its tokens are needed, such as while another stream's heads travel."""
        self.catch_up()
        self._later = change

    def catch_up(self) -> None:
        """Do what was put off."""
        if self._later is not None:
            change, self._later = self._later, None
            change()

    def add(self, gate: Tensor | None, branch: Tensor) -> None:
        """Add gate * branch [B, S, W], with the gate as in `norm_modulate`; without a gate, add the branch."""
        self._tokens, self._branch = self.tokens, (gate, branch)

    def normed(self, shift: Tensor | None = None, scale: Tensor | None = None, *, norm: Norm = LAYER_NORM) -> Tensor:
        """`norm_modulate` of `tokens`."""
        self.catch_up()
        if self._branch is None:
            return norm_modulate(self._tokens, shift, scale, norm=norm, segments=self.segments)
        branch, self._branch = self._branch, None
        self._tokens, normed = add_gated_norm(self._tokens, *branch, shift, scale, norm=norm, segments=self.segments)
        return normed

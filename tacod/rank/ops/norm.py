"""Norms of tokens over their channels."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

__all__ = ["LAYER_NORM", "Norm", "rms_norm"]


def rms_norm(x: Tensor, weight: Tensor | None, epsilon: float) -> Tensor:
    """RMS norm of ``x`` [..., W] (Zhang and Sennrich, 2019, arXiv:1910.07467), in the dtype of ``x``.

    A ``weight`` of another dtype, such as fp32, is used in fp32, and the product is rounded once.
    """
    if weight is None or weight.dtype == x.dtype:
        return functional.rms_norm(x, x.shape[-1:], weight, epsilon)
    return functional.rms_norm(x.float(), x.shape[-1:], weight.float(), epsilon).to(x.dtype)


@dataclass(frozen=True)
class Norm:
    """A normalisation of each token over its channels.

    ``kind`` is ``"layer"`` (Ba et al., 2016, arXiv:1607.06450) or ``"rms"`` (Zhang and Sennrich, 2019,
    arXiv:1910.07467). ``weight`` and ``bias`` are [W].
    """

    kind: str = "layer"
    epsilon: float = 1e-6
    weight: Tensor | None = None
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Normalise ``x`` [..., W]; the dtype stays."""
        if self.kind == "rms":
            return rms_norm(x, self.weight, self.epsilon)
        weight, bias = (None if each is None else each.to(x.dtype) for each in (self.weight, self.bias))
        return functional.layer_norm(x, x.shape[-1:], weight, bias, self.epsilon)


LAYER_NORM = Norm()

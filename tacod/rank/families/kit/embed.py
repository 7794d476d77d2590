"""Embedders of numbers and vectors into the space of the conditioning."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from tacod.rank.families.kit.attention import find, register

__all__ = ["MLPEmbedder", "sinusoid"]


def sinusoid(t: Tensor, width: int = 256, scale: float = 1.0, powers: bool = False) -> Tensor:
    """The sinusoidal embedding of ``t`` [...], computed and returned in fp32 [..., width]: cosines, then sines.

    Vaswani et al., 2017, as in guided-diffusion. Rounding ``t`` to bf16 before it costs tens of percent of accuracy.
    ``scale`` multiplies the angles, not ``t``: of angles up to 1000 the order of the products shows in the output, and
    so does the rounding of frequencies, which with ``powers`` are powers of 10000, not exponentials.
    """
    angles = scale * (t.float()[..., None] * _frequencies(width // 2, t.device, powers))
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


@functools.cache
def _frequencies(count: int, device: torch.device, powers: bool) -> Tensor:
    """Falling geometrically from 1 to 1e-4, fp32.

    Computed on the CPU for every device: a GPU's exp differs in the last bit, which at t = 3500 shows in the sixth
    digit of the model's output.
    """
    places = torch.arange(count, dtype=torch.float32, device="cpu")
    return (10000 ** -(places / count) if powers else torch.exp(-math.log(10000) * places / count)).to(device)


class MLPEmbedder(nn.Module):
    """Two linear layers with SiLU between, [..., inputs] to [..., width], named as the authors' files name them.

    ``hidden`` channels are between them, by default ``width``.
    """

    def __init__(
        self,
        inputs: int,
        width: int,
        names: tuple[str, str] = ("mlp.0", "mlp.2"),
        bias: bool = True,
        hidden: int | None = None,
    ) -> None:
        super().__init__()
        self._names = names
        register(self, names[0], nn.Linear(inputs, hidden or width, bias=bias))
        register(self, names[1], nn.Linear(hidden or width, width, bias=bias))

    def forward(self, x: Tensor) -> Tensor:
        """Embed vectors of the compute dtype."""
        first, second = (find(self, name) for name in self._names)
        embedded: Tensor = second(functional.silu(first(x)))
        return embedded

    def numbers(self, t: Tensor, dtype: torch.dtype, width: int = 256, scale: float = 1.0) -> Tensor:
        """Embed numbers [...] by their `sinusoid`, which is cast to ``dtype``: [..., width of this embedder]."""
        embedded: Tensor = self(sinusoid(t, width, scale).to(dtype))
        return embedded

"""Modulations: shift, scale and gate from the conditioning (adaLN; Peebles and Xie, 2022, arXiv:2212.09748)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tacod.rank.families.kit.attention import find, register
from tacod.rank.families.stream import ForwardPass
from tacod.rank.ops.norm import LAYER_NORM, Norm

__all__ = ["AdaLN", "FinalLayer", "Modulation", "drawn"]


def drawn(rows: int, width: int) -> nn.Parameter:
    """A table [rows, width] of small random numbers, until a file replaces them.

    None are drawn on the meta device: for that torch would import its compiler, which takes seconds.
    """
    table = torch.empty(rows, width)
    return nn.Parameter(table if table.is_meta else table.normal_(std=width**-0.5))


class Modulation(nn.Module):
    """A linear layer whose input is the conditioning vector alone; the ranks share such layers out.

    ``layer`` is its name in the authors' files.
    """

    def __init__(self, width: int, outputs: int, layer: str = "lin", bias: bool = True) -> None:
        super().__init__()
        self._layer = layer
        register(self, layer, nn.Linear(width, outputs, bias=bias))

    @property
    def linear(self) -> Any:
        """The layer; it may have been quantized."""
        return find(self, self._layer)


class AdaLN(Modulation):
    """A `Modulation` that files have as a list of SiLU and layer, so that the layer is called ``1``."""

    def __init__(self, width: int, outputs: int, bias: bool = True) -> None:
        super().__init__(width, outputs, "1", bias)


class FinalLayer(nn.Module):
    """A modulated norm and the projection to patches: ``linear`` and ``adaLN_modulation``."""

    def __init__(self, width: int, outputs: int, norm: Norm = LAYER_NORM, bias: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(width, outputs, bias=bias)
        self.adaLN_modulation = AdaLN(width, 2 * width, bias=bias)
        self._norm = norm

    def forward(self, f: ForwardPass) -> Tensor:
        """The image's patches of all ranks, [B, N, outputs]."""
        shift, scale = f.modulation(self.adaLN_modulation.linear, 2)
        return f.gather(f.image, self.linear(f.image.normed(shift, scale, norm=self._norm)))

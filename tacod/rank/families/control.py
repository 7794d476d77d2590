"""A ControlNet's residuals; each rank reads those of its own tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tacod.rank.parallel.sequence import SequenceParallel
from tacod_client import wire
from tacod_client.tensors import from_wire, rows

__all__ = ["Control"]


class Control:
    """The residuals of one forward, as they came. A rank reads its own tokens' part of each after its block.

    ``images`` are this rank's images of those that a residual [B, N, width] is for.
    """

    def __init__(self, residuals: Mapping[str, Sequence[wire.Tensor | None]], images: slice = slice(None)) -> None:
        self.residuals = residuals
        self.images = images
        self._last: tuple[wire.Tensor, Tensor] | None = None

    def find(self, name: str, block: int) -> wire.Tensor | None:
        """The residual for this block; None if there is none."""
        each = self.residuals.get(name, ())
        return each[block] if block < len(each) else None

    def add(self, name: str, block: int, sequence: SequenceParallel, tokens: Tensor, n: int) -> None:
        """Add this block's residual to ``tokens`` [B, S, width], this rank's part of a stream of ``n`` tokens.

        A residual for fewer tokens than the stream has is for the first ones.
        """
        residual = self.find(name, block)
        if residual is None:
            return
        if self._last is None or self._last[0] is not residual:
            self._last = None
            self._last = residual, self.read(residual, sequence, n).to(tokens.device, tokens.dtype)
        mine = self._last[1]
        if mine.shape[1]:
            # In place, as ComfyUI does it: the blocks' outputs are new tensors.
            tokens[:, : mine.shape[1]] += mine

    def read(self, residual: wire.Tensor, sequence: SequenceParallel, n: int) -> Tensor:
        """The part [B or 1, S, width] of a residual that is for this rank's images and its tokens of ``n``."""
        batch, length, _ = residual.shape
        first, last = (min(at, length) for at in sequence.place(n))
        # A batch of 1 broadcasts.
        images = range(batch)[self.images] if batch > 1 else range(1)
        parts: list[Tensor] = [
            from_wire(rows(residual, i * length + first, i * length + last), "torch") for i in images
        ]
        return torch.stack(parts)

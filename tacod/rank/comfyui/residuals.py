"""A ControlNet's residuals for a network of ComfyUI's, which adds them itself: a list, as ComfyUI gives it.

Where ranks share an image's tokens, the network on each of them gets its tokens' part.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tacod.rank.families.control import Control
from tacod.rank.parallel.sequence import SequenceParallel
from tacod_client.errors import ArgumentError

__all__ = ["ResidualList"]


class ResidualList:
    """One of the lists in ComfyUI's ``control``, of tensors or None, read when the network asks for one.

    Args:
        control: The residuals.
        name: Which list.
        shared: Tells which ranks share the image's tokens and how many there are; None while each has all.
        whole: Whether each must be for all of the image's tokens.
        device: Where the tokens are.

    Raises `ArgumentError`, on all ranks alike, for a residual that doesn't fit the tokens that ranks share.
    """

    def __init__(
        self,
        control: Control,
        name: str,
        shared: Callable[[], tuple[SequenceParallel, int] | None],
        whole: bool,
        device: torch.device,
    ) -> None:
        self._control = control
        self._name = name
        self._shared = shared
        self._whole = whole
        self._device = device
        self._left = list(range(len(control.residuals[name])))

    def __len__(self) -> int:
        return len(self._left)

    def __getitem__(self, index: int) -> Tensor | None:
        return self._at(self._left[index])

    def pop(self, index: int = -1) -> Tensor | None:
        """Take one out of the list, the last one by default."""
        return self._at(self._left.pop(index))

    def _at(self, place: int) -> Tensor | None:
        residual = self._control.find(self._name, place)
        if residual is None:
            return None
        length = residual.shape[1]
        sequence, tokens = self._shared() or (SequenceParallel(), length)
        if length > tokens or (self._whole and length < tokens):
            where = f"control.{self._name}[{place}]"
            raise ArgumentError(f"{where}: it is for {length} tokens, but the image has {tokens}", argument=where)
        return self._control.read(residual, sequence, tokens).to(self._device)

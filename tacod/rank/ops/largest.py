"""The largest number of tokens that ranks have in parts: what a layer needs that has one scale for all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["Maximum", "largest", "sharing"]

Maximum = Callable[[Tensor], Tensor]
"""The largest of a number that each of some ranks has, on all of them; it waits for the others."""
_shared: list[tuple[Maximum, ...]] = [()]


@contextmanager
def sharing(*maxima: Maximum) -> Iterator[None]:
    """Within, layers' tokens are a part of those that other ranks have: `largest` is taken over them by each of these.

    Every rank must then call the same layers in the same order, with no tokens too. Without any, tokens are a rank's
    own. Of several of these, one within the other, the inner one counts.
    """
    _shared.append(maxima)
    try:
        yield
    finally:
        _shared.pop()


def largest(x: Tensor) -> Tensor:
    """The largest absolute number of ``x`` and of what the other ranks have, fp32 without dimensions; 0 of nothing."""
    found = x.abs().amax().float() if x.numel() else x.new_zeros((), dtype=torch.float32)
    # Which of NaN and a number is the larger, backends don't agree on. Nothing divided by infinity is a number either.
    found = found.nan_to_num(nan=torch.inf, posinf=torch.inf)
    for maximum in _shared[-1]:
        found = maximum(found)
    return found

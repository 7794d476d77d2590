"""Finds tensors that hold the whole sequence on one rank: what a long video leaves no room for."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["POSITION", "WholeSequences"]

POSITION = 8
"""Numbers of a token's place, and the like: so many a rank may have of all tokens."""

_EXCHANGING = ("/rank/comm/", "/rank/parallel/joint_attention.py", "/rank/ops/sdpa.py", "/rank/ops/qkv.py")
"""Where attention works: there a rank has its heads of all tokens."""


class WholeSequences(TorchDispatchMode):
    """While it is entered, tensors of the whole sequence that are made outside of attention.

    A tensor is of the whole sequence if neighbouring dimensions of it have as many elements as one of ``lengths``.
    """

    def __init__(self, lengths: Sequence[int], numbers: int, batch: int) -> None:
        """Only tensors with more than so many ``numbers`` of each token of each image count."""
        super().__init__()
        self._lengths, self._numbers, self._batch = set(lengths), numbers, batch
        self.found: set[str] = set()
        """The operations that made them, each with the line that asked for it."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else its first operation imports PyTorch's compiler

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and self._is_whole(tensor) and (place := _place()) is not None:
                self.found.add(f"{func} at {place}")
        return out

    def _is_whole(self, tensor: Tensor) -> bool:
        # What is expanded takes no memory.
        stored = min(tensor.numel(), tensor.untyped_storage().nbytes() // tensor.element_size())
        spans = itertools.combinations(range(tensor.ndim + 1), 2)
        lengths = self._lengths & {math.prod(tensor.shape[first:last]) for first, last in spans}
        return bool(lengths) and stored > self._numbers * self._batch * min(lengths)


def _place() -> str | None:
    """The line of the project's code that asked for an operation; None within attention."""
    frame, place = sys._getframe(2), None
    while frame is not None:
        file = frame.f_code.co_filename
        if "/tacod/" in file:
            if any(each in file for each in _EXCHANGING):
                return None
            place = place or f"{file.rpartition('/')[2]}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return place or ""

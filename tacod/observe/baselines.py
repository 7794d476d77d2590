"""Times of forwards on one rank, for comparison with several ranks."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Mapping
from typing import Any

from tacod_client.wire import Tensor

__all__ = ["Baselines", "shapes_of"]

KINDS = 256
"""Kinds of forward that are remembered."""


class Baselines:
    """Compute seconds by model and shapes. The last time counts, because the first one includes a warm-up."""

    def __init__(self) -> None:
        self._seconds: OrderedDict[Any, float] = OrderedDict()

    def note(self, model: str, shapes: Hashable, seconds: float) -> None:
        """A forward with arguments of these shapes took so long on one rank."""
        key = model, shapes
        self._seconds[key] = seconds
        self._seconds.move_to_end(key)
        while len(self._seconds) > KINDS:
            self._seconds.popitem(last=False)

    def of(self, model: str, shapes: Hashable) -> float | None:
        """Seconds of a forward like this one on one rank; None if there was none yet."""
        return self._seconds.get((model, shapes))


def shapes_of(value: Any) -> Any:
    """The shapes of the tensors in arguments, by which one tells how much work a forward is."""
    if isinstance(value, Tensor):
        return value.shape
    if isinstance(value, Mapping):
        return tuple(sorted((name, shapes_of(item)) for name, item in value.items()))
    return tuple(map(shapes_of, value)) if isinstance(value, list | tuple) else ()

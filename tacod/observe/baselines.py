"""Times of forwards on one rank, for comparison with several ranks."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from tacod_client.wire import Tensor

__all__ = ["Baselines", "kind_of"]

KINDS = 256
"""Kinds of forward that are remembered."""


class Baselines:
    """Compute seconds by model and shapes. The last time counts, because the first one includes a warm-up."""

    def __init__(self) -> None:
        self._seconds: OrderedDict[Any, float] = OrderedDict()

    def note(self, model: str, arguments: Mapping[str, Any], seconds: float) -> None:
        """A forward with these arguments took so long on one rank."""
        key = kind_of(model, arguments)
        self._seconds[key] = seconds
        self._seconds.move_to_end(key)
        while len(self._seconds) > KINDS:
            self._seconds.popitem(last=False)

    def of(self, model: str, arguments: Mapping[str, Any]) -> float | None:
        """Seconds of a forward like this one on one rank; None if there was none yet."""
        return self._seconds.get(kind_of(model, arguments))


def kind_of(model: str, arguments: Mapping[str, Any]) -> Any:
    """A key for how much work a forward is: its model, and the shapes of its arguments."""
    return model, tuple(sorted((name, _shapes(value)) for name, value in arguments.items()))


def _shapes(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.shape
    if isinstance(value, Mapping):
        return tuple(sorted((name, _shapes(item)) for name, item in value.items()))
    return tuple(map(_shapes, value)) if isinstance(value, list | tuple) else ()

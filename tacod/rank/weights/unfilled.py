"""Models whose weights come from a file, or that have none: nothing is drawn for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.overrides import TorchFunctionMode

__all__ = ["Unfilled"]


class Unfilled(TorchFunctionMode):
    """Within, modules that are made leave their weights as they are.

    On the device "meta" too it takes time to draw them: the first normal distribution there imports torch's compiler,
    for seconds.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call a function of torch's, or return the tensor that it would have filled."""
        given = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else given["tensor"]
        return func(*args, **given)

"""Errors of weight patches that don't fit: ComfyUI leaves these out and goes on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from tacod_client.errors import ArgumentError

__all__ = ["Misfit", "misfit"]


class Misfit(ArgumentError):
    """A change whose factors don't go together, or of another size than its weight.

    ComfyUI reports it on its console, and draws with the other patches.
    """

    def to_wire(self) -> dict[str, Any]:
        """See `TacodError.to_wire`; to clients it is an `ArgumentError`."""
        return {**super().to_wire(), "code": ArgumentError.__name__}


def misfit(
    what: str, shape: Sequence[int], weight: Sequence[int], key: str, *, left_out: bool | None = None
) -> ArgumentError:
    """The error for a change of another shape than what it is put on; it names the weight and both shapes.

    Unless ``left_out`` says whether ComfyUI leaves the change out, that goes by the numbers: if there are as many,
    ComfyUI merges them in another order, which is refused here.
    """
    if left_out is None:
        left_out = math.prod(shape) != math.prod(weight)
    kind = Misfit if left_out else ArgumentError
    return kind(
        f"{key}: the patch's {what} has shape {list(shape)}, and what it patches {list(weight)}; "
        "it was made for another model",
        argument="patches",
        key=key,
    )

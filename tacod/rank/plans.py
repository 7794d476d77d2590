"""Plans of forwards, each checked and made once for arguments of the same description."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

from tacod.plan import Plan, Request, parse_request
from tacod.rank.arguments import check_arguments, check_tokens
from tacod.rank.families.base import DiT
from tacod.rank.families.inputs import Spec
from tacod.rank.forward.run import plan_for
from tacod_client import wire

__all__ = ["Plans"]

KINDS = 32
"""Kinds of forward of each model that are remembered; the least recently used goes first."""


class Plans:
    """Checks arguments and plans forwards; what a forward of the same kind came to is remembered with its model.

    A kind is all that checks and plans look at: the request's plan, names, dtypes and shapes of tensors, whether they
    lie in shared memory, and all values that are no tensors. Refusals are not remembered.
    """

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size
        self._made: WeakKeyDictionary[DiT, OrderedDict[Hashable, tuple[Mapping[str, Spec], Request, Plan]]]
        self._made = WeakKeyDictionary()

    def find(self, dit: DiT, asked: Any, arguments: Mapping[str, Any]) -> tuple[Mapping[str, Spec], Request, Plan]:
        """The specs of a model's arguments, the parsed request ``asked`` and the plan of a forward with these.

        Raises `ArgumentError` for arguments that the model doesn't take, and for a plan that can't be.
        """
        made = self._made.setdefault(dit, OrderedDict())
        # A network of ComfyUI's may stop sharing tokens.
        kind = dit.shares_tokens, _describe(asked), _describe(arguments)
        known = made.get(kind)
        if known is None:
            known = made[kind] = self._make(dit, asked, arguments)
            while len(made) > KINDS:
                made.popitem(last=False)
        made.move_to_end(kind)
        return known

    def _make(self, dit: DiT, asked: Any, arguments: Mapping[str, Any]) -> tuple[Mapping[str, Spec], Request, Plan]:
        specs = dit.specs_for(arguments)
        check_arguments(arguments, specs, dit.family)
        # What can't be is refused before anything is put on the device.
        request = parse_request(asked, self._world_size)
        plan = plan_for(dit, request, self._world_size, arguments)
        if dit.is_ours:
            # Of other networks it isn't known how many tokens there are.
            check_tokens(arguments, specs, plan.shape.lengths[-1])
        return specs, request, plan


def _describe(value: Any) -> Hashable:
    """What two values have in common if checks and plans can't tell them apart."""
    if isinstance(value, wire.Tensor):
        return value.dtype, value.shape, value.offset is not None
    if isinstance(value, Mapping):
        return tuple((name, _describe(each)) for name, each in sorted(value.items()))
    if isinstance(value, list):
        return (list, *map(_describe, value))
    # Otherwise true would be 1, and 0.0 be -0.0.
    return type(value), repr(value)

"""Forwards of networks that aren't ours as CUDA graphs, and what has to stay as it is for them to be true."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from tacod.rank.families.base import DiT, Output
from tacod.rank.forward.captured import Graph
from tacod.rank.forward.run import Call, run
from tacod.rank.forward.side_effects import SideEffects
from tacod.rank.forward.state import State
from tacod.rank.oom import clear_tracebacks
from tacod.rank.parallel.topology import Topology
from tacod.rank.weights.parts import parts_of
from tacod_client.errors import TacodError

__all__ = ["OthersGraph", "look_on", "state_of"]

KEPT_BYTES = 256 << 20
"""Most bytes of a network's tables that a graph reads: those that the network keeps, of which the graph has a copy, and
those that the host makes in each call."""


class _Around(Protocol):
    """What a call of a network may run in."""

    @property
    def captures(self) -> bool: ...

    def around(self, inputs: Iterable[Tensor]) -> AbstractContextManager[Any]: ...


class _Others(Protocol):
    """A `DiT` whose network isn't ours."""

    inner: nn.Module
    around: _Around | None
    """What its network runs in."""
    outcome: Any
    """How its last forward went."""


def state_of(dit: DiT, device: torch.device) -> State:
    """What a network that isn't ours keeps, as it is now."""
    return State(cast(_Others, dit).inner, device)


def look_on(
    call: Call, topology: Topology, guarded: Callable[[Callable[[], Output]], Output], state: State
) -> SideEffects:
    """The side effects of a call of a network that isn't ours, which runs once more for that; its result is dropped.

    It runs ``guarded`` if there are several ranks: one that fails alone leaves the others waiting, and can't go on
    without a graph. Any other error is a reason against one. So is a change of the network's ``state``: a network that
    knows tensors by their address keeps something new here, where it is computed, and not first in a capture.
    """
    others, device = cast(_Others, call.dit), call.inputs.latents[0].device
    weights = [part for each in others.inner.parameters() for _, part in parts_of(each)]
    effects = SideEffects(device, weights)

    def again() -> Output:
        return run(replace(call, inputs=call.inputs.clone()), topology, listens=True)

    alone = topology.world_size == 1
    try:
        with _within(others, effects):
            again() if alone else guarded(again)
    except Exception as error:
        if not alone and not isinstance(error, TacodError):
            raise
        topology.settle()
        effects.reason = effects.reason or (str(error) or type(error).__name__).splitlines()[0]
        clear_tracebacks(error)
    now = state_of(call.dit, device)
    effects.reason = effects.reason or now.changed(state) or now.drew(state) or _lacks_room(effects, call)
    return effects


def _lacks_room(effects: SideEffects, call: Call) -> str:
    """Why the graph can't hold what it reads; empty if it can."""
    device = call.inputs.latents[0].device
    if any(each.device != device for each in call.inputs.tensors):
        return "an argument lies on another device"
    try:
        nbytes = sum(_bytes(each).nbytes for each in effects.kept.values()) + effects.copies.nbytes
    except (NotImplementedError, RuntimeError):
        return "it keeps a tensor of several parts, such as a sparse one"
    return f"it reads more than {KEPT_BYTES >> 20} MiB of tables" if nbytes > KEPT_BYTES else ""


class OthersGraph(Graph):
    """A whole forward of a network that isn't ours.

    A replay runs none of the network's code. So it equals a call only while the network keeps what it kept when it was
    captured: see `what_is_untrue`. The ``effects`` are those of a call that was looked on, and no reason against it.
    """

    def __init__(self, effects: SideEffects, call: Call, topology: Topology, pool: Any) -> None:
        others, device = cast(_Others, call.dit), call.inputs.latents[0].device
        kept = [_bytes(each) for each in effects.kept.values()]
        self._state = State(others.inner, device)
        with _within(others, effects.copies):
            super().__init__(call, topology, pool)
        self._copies = effects.copies
        after = State(others.inner, device)
        self.fault = effects.copies.fault or after.changed(self._state) or after.drew(self._state)
        self._kept = [(each, each.clone()) for each in kept]
        self._outcome = others.outcome
        self.tries = 0
        """How often such a graph was dropped."""
        self.seen = 0
        """How often code of networks that aren't ours had run when it was last known to be true."""

    def replay(self, call: Call) -> Output:
        """See `Graph.replay`."""
        out = super().replay(call)
        cast(_Others, call.dit).outcome = self._outcome
        return out

    def what_is_untrue(self, call: Call) -> str:
        """Why it no longer does what the call's network would: what that keeps is something else. Empty if it does."""
        if reason := state_of(call.dit, call.inputs.latents[0].device).changed(self._state):
            return reason
        return "" if all(torch.equal(*each) for each in self._kept) else "a table that it reads has other numbers"


@contextmanager
def _within(others: _Others, around: _Around) -> Iterator[None]:
    others.around = around
    try:
        yield
    finally:
        others.around = None


def _bytes(tensor: Tensor) -> Tensor:
    """All bytes of the memory in which a tensor lies; holds that memory."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())

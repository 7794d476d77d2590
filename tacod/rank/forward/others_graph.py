"""Forwards of networks that aren't ours as CUDA graphs, and what has to stay as it is for them to be true."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from tacod.rank.families.base import DiT, Output
from tacod.rank.forward.captured import Graph
from tacod.rank.forward.host_copies import Uncapturable
from tacod.rank.forward.run import Call, run
from tacod.rank.forward.side_effects import SideEffects
from tacod.rank.forward.state import State
from tacod.rank.oom import clear_tracebacks
from tacod.rank.parallel.topology import Topology
from tacod.rank.weights.parts import parts_of
from tacod_client.errors import TacodError

__all__ = ["OthersGraph", "are_true", "look_on", "state_of"]

KEPT_BYTES = 256 << 20
"""Most that a network's tables may take for a graph, which has a copy of them."""


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


def are_true(kinds: Mapping[DiT, Mapping[Any, Any]], device: torch.device) -> bool:
    """Whether all graphs of networks that aren't ours, among all there are, still do what the networks would."""
    for dit, graphs in kinds.items():
        mine = [each for each in graphs.values() if isinstance(each, OthersGraph)]
        if mine:
            state = state_of(dit, device)
            if not all(each.is_true(state) for each in mine):
                return False
    return True


def look_on(call: Call, topology: Topology, guarded: Callable[[Callable[[], Output]], Output]) -> SideEffects:
    """The side effects of a call of a network that isn't ours, which runs once more for that; its result is dropped.

    It runs ``guarded`` if there are several ranks: one that fails alone leaves the others waiting, and can't go on
    without a graph. Any other error is a reason against one.
    """
    others = cast(_Others, call.dit)
    weights = [part for each in others.inner.parameters() for _, part in parts_of(each)]
    effects = SideEffects(call.inputs.latents[0].device, weights)

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
    return effects


class OthersGraph(Graph):
    """A whole forward of a network that isn't ours.

    A replay runs none of the network's code. So it equals a call only while the network keeps what it kept when it was
    captured: see `is_true`. Raises `Uncapturable` if the call has ``effects`` that a replay would not have.
    """

    def __init__(self, effects: SideEffects, call: Call, topology: Topology, pool: Any) -> None:
        others, device = cast(_Others, call.dit), call.inputs.latents[0].device
        if any(each.device != device for each in call.inputs.tensors):
            raise Uncapturable("an argument lies on another device")
        kept = [_bytes(each) for each in effects.kept.values()]
        if not effects.reason and sum(each.nbytes for each in kept) > KEPT_BYTES:
            raise Uncapturable(f"it reads more than {KEPT_BYTES >> 20} MiB of tables that it keeps")
        if effects.reason:
            raise Uncapturable(effects.reason)
        self._state = State(others.inner, device)
        with _within(others, effects.copies):
            super().__init__(call, topology, pool)
        effects.copies.check()
        self._copies = effects.copies
        after = State(others.inner, device)
        if reason := after.changed(self._state) or after.drew(self._state):
            raise Uncapturable(reason)
        self._kept = [(each, each.clone()) for each in kept]
        self._outcome = others.outcome
        self.tries = 0
        """How often such a graph was dropped."""

    def replay(self, call: Call) -> Output:
        """See `Graph.replay`."""
        out = super().replay(call)
        cast(_Others, call.dit).outcome = self._outcome
        return out

    def is_true(self, state: State) -> bool:
        """Whether the network, now in this ``state``, keeps what it kept, and its tables have the same numbers."""
        return not state.changed(self._state) and all(torch.equal(*each) for each in self._kept)


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

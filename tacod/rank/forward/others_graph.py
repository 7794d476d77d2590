"""Forwards of networks that aren't ours as CUDA graphs, and what has to stay as it is for them to be true."""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from tacod.rank.families.base import DiT, Output
from tacod.rank.forward.captured import Graph
from tacod.rank.forward.run import Call
from tacod.rank.forward.side_effects import SideEffects, Uncapturable
from tacod.rank.forward.state import State
from tacod.rank.parallel.topology import Topology

__all__ = ["OthersGraph", "state_of"]

KEPT_BYTES = 256 << 20
"""Most that a network's tables may take for a graph, which has a copy of them."""


class _Others(Protocol):
    """A `DiT` whose network isn't ours."""

    inner: nn.Module
    side_effects: SideEffects | None
    """What its network runs in."""
    outcome: Any
    """How its last forward went."""


def state_of(dit: DiT, device: torch.device) -> State:
    """What a network that isn't ours keeps, as it is now."""
    return State(cast(_Others, dit).inner, device)


class OthersGraph(Graph):
    """A whole forward of a network that isn't ours.

    A replay runs none of the network's code. So it equals a call only while the network keeps what it kept when it was
    captured: see `is_true`. Raises `Uncapturable` if a call has side effects that a replay would not have.
    """

    def __init__(self, call: Call, topology: Topology, pool: Any) -> None:
        others, device = cast(_Others, call.dit), call.inputs.latents[0].device
        if any(each.device != device for each in call.inputs.tensors):
            raise Uncapturable("an argument lies on another device")
        self._state = State(others.inner, device)
        effects = others.side_effects = SideEffects(device, others.inner.parameters())
        try:
            super().__init__(call, topology, pool)
        finally:
            others.side_effects = None
        # The network may have caught what was raised.
        after = State(others.inner, device)
        if reason := effects.reason or after.changed(self._state) or after.drew(self._state):
            raise Uncapturable(reason)
        kept = [_bytes(each) for each in effects.kept.values()]
        if sum(each.nbytes for each in kept) > KEPT_BYTES:
            raise Uncapturable(f"it reads more than {KEPT_BYTES >> 20} MiB of tables that it keeps")
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


def _bytes(tensor: Tensor) -> Tensor:
    """All bytes of the memory in which a tensor lies; holds that memory."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())

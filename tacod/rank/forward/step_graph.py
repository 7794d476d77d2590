"""Forwards with a step cache as three CUDA graphs: up to the first block, the other blocks, and what replaces them.

Between the first and the others the host decides, by `StepCache`, as without graphs. What ranks exchange of their
outputs comes after the graphs (`run`), as each batch group decides by itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tacod.rank.families.base import Output
from tacod.rank.families.inputs import Inputs
from tacod.rank.families.trunk import BlockCache
from tacod.rank.forward.captured import Captured
from tacod.rank.forward.run import Call, clone, on_seat
from tacod.rank.ops.largest import sharing
from tacod.rank.parallel.sequence import SequenceParallel
from tacod.rank.parallel.topology import Topology

__all__ = ["SplitForward", "StepGraph", "compute_both"]


class SplitForward:
    """A rank's part of a forward in two halves. The second one comes in two ways, each from the same state."""

    def __init__(self, call: Call, sequence: SequenceParallel, mine: Inputs) -> None:
        """``mine`` are this rank's images."""
        self._dit, self._inputs, self._sequence = call.dit, mine, sequence
        self._f = self._dit.start(sequence, mine, None if call.prefix is None else call.prefix.tensors)

    def first(self) -> Tensor:
        """What the first block adds, as `BlockCache.find` takes it."""
        with self._sharing():
            self._trunk = self._dit.embed(self._f, self._inputs)
            first = self._trunk.first()
        self._back = self._f.state()
        return first

    def rest(self) -> tuple[Output, Tensor]:
        """The output, and what the other blocks add, as `BlockCache.keep` takes it. Once for each `first`."""
        with self._sharing():
            others = self._trunk.rest()
            return self._dit.end(self._f), others

    def skip(self, others: Tensor) -> Output:
        """The output with this in place of what the other blocks add; also after `rest`."""
        self._back()
        with self._sharing():
            self._trunk.skip(others)
            return self._dit.end(self._f)

    def _sharing(self) -> Any:
        return sharing(self._sequence.whole.maximum, self._sequence.images.maximum)


def compute_both(call: Call, topology: Topology) -> list[Tensor]:
    """What `StepGraph.both` has to give, without graphs; of a rank that the plan leaves idle, nothing."""

    def compute(sequence: SequenceParallel, mine: Inputs) -> list[Tensor]:
        forward = SplitForward(call, sequence, mine)
        first = forward.first().clone()
        out, others = forward.rest()
        # Cloned, as what ranks give each other may lie where the next forward's does.
        computed = [*_list(clone(out)), others.clone()]
        return [first, *computed, *_list(clone(forward.skip(others)))]

    seat = topology.seat(call.plan.layout)
    return [] if seat is None else on_seat(call, seat, False, compute)


class StepGraph(Captured):
    """A rank's part of a forward with a step cache."""

    def __init__(self, call: Call, topology: Topology, pool: Any) -> None:
        super().__init__(call, pool)
        seat = topology.seat(call.plan.layout)
        self._idle = seat is None
        if seat is not None:
            own = self._own(call)
            on_seat(own, seat, False, lambda sequence, mine: self._capture(own, sequence, mine))

    def _capture(self, call: Call, sequence: SequenceParallel, mine: Inputs) -> None:
        forward = SplitForward(call, sequence, mine)
        with self._capturing() as self._first_graph:
            self._first = forward.first()
        with self._capturing() as self._rest_graph:
            self._out, self._others = forward.rest()
        self._taken = torch.empty_like(self._others)
        """What the graph that skips adds; it lies outside of the graphs' pool."""
        # What the first graph leaves for the others is held by the forward until both are captured, so that neither
        # takes its memory.
        with self._capturing() as self._skip_graph:
            self._skipped = forward.skip(self._taken)

    def replay(self, call: Call, cache: BlockCache, sequence: SequenceParallel) -> Output:
        """The output of this rank's images, of which the cache may skip all blocks but the first."""
        self._load(call)
        self._first_graph.replay()
        # Cloned, as the cache keeps it beyond the next replay.
        taken = cache.find(self._first.clone(), sequence)
        if taken is None:
            self._rest_graph.replay()
            cache.keep(self._others.clone())
            return clone(self._out)
        self._taken.copy_(taken)
        self._skip_graph.replay()
        return clone(self._skipped)

    def both(self, call: Call) -> list[Tensor]:
        """What the first block adds, the output and what the others add, and the output with that from memory."""
        if self._idle:
            return []
        self._load(call)
        self._first_graph.replay()
        first = self._first.clone()
        self._rest_graph.replay()
        computed = [*_list(clone(self._out)), self._others.clone()]
        self._taken.copy_(self._others)
        # As in a run: the graph before it is always the first one.
        self._first_graph.replay()
        self._skip_graph.replay()
        return [first, *computed, *_list(clone(self._skipped))]


def _list(out: Output) -> list[Tensor]:
    return out if isinstance(out, list) else [out]

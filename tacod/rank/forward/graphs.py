"""Forwards on all ranks: the first ones of a kind as they come, later ones as one CUDA graph.

A graph replays a forward's kernels and collectives without the host, which at 1024² can't launch them as fast as two
GPUs run them. Nothing else changes: a graph is used only if its first replay equals, to the bit and on every rank, what
the same inputs gave without it.

With a step cache there is none: whether a forward skips its blocks is decided on the host. Nor is there one of a family
whose forwards ask the GPU for numbers, such as which experts tokens go to (`DiT.graphs`).
"""

from __future__ import annotations

import enum
import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch

from tacod.rank.families.base import DiT, Output
from tacod.rank.families.inputs import Inputs
from tacod.rank.forward.run import Call, clone, equal, relative_difference, run
from tacod.rank.forward.step_cache import StepCache, StepCaches
from tacod.rank.ops.table_cache import holding
from tacod.rank.parallel.topology import Topology
from tacod_client.errors import TacodError

__all__ = ["Forwards"]

log = logging.getLogger(__name__)

KINDS = 6
"""Kinds of forward that are kept as graphs of each model."""


class Forwards:
    """Runs forwards. On every rank the same calls come in the same order, so that all have the same graphs."""

    def __init__(self, topology: Topology, graphs: bool = True) -> None:
        self.topology = topology
        self.graphs = graphs
        self.skipped = 0
        """Forwards of which all of this rank's batch groups skipped all but the first block."""
        self.step_caches = StepCaches()
        self.begins: Callable[[], None] = lambda: None
        """Called before each forward begins, also before the one that a graph is captured by."""
        self._kinds: WeakKeyDictionary[DiT, OrderedDict[Hashable, Graph | _Without]] = WeakKeyDictionary()
        self._pool: Any = None

    def __call__(self, call: Call) -> Output:
        """One forward, as `run` does it."""
        self.begins()
        if call.plan.step_cache:
            return self._cached(call)
        inputs = call.inputs
        graphs = self.graphs and call.dit.graphs
        if not graphs or not inputs.latents[0].is_cuda or inputs.control is not None:
            return self._run(call)
        kinds = self._kinds.setdefault(call.dit, OrderedDict())
        kind = (call.plan.layout, call.plan.attention, inputs.key)
        known = kinds.get(kind)
        if isinstance(known, Graph):
            kinds.move_to_end(kind)
            return known.replay(inputs)
        # Also where there will be no graph: the same forward is to give the same bits whenever it comes.
        attention = replace(call.plan.attention, split_kv=True)
        call = replace(call, plan=replace(call.plan, attention=attention))
        out = self._run(call)
        if known is None:
            # The first one makes what is made at first use: kernels, communicators, tables.
            kinds[kind] = _Without.YET
            while len(kinds) > KINDS:
                kinds.popitem(last=False)
        elif known is _Without.YET:
            kinds[kind] = self._capture(call, out)
        return out

    def _cached(self, call: Call) -> Output:
        key = (*call.run_key, call.plan, *(each.shape for each in call.inputs.latents))
        if call.inputs.control is not None:
            # A ControlNet's residuals are others at each step, and what the blocks gave without them is no guess.
            self.step_caches.drop(*key)
            return self._run(call)
        level = float(call.inputs["timestep"].max())
        cache = self.step_caches.find(call.dit, key, call.plan.step_cache, level)
        out = self._run(call, cache=cache)
        seat = self.topology.seat(call.plan.layout)
        self.skipped += seat is not None and seat.batch.agree(cache.skipped)
        return out

    def _run(self, call: Call, cache: StepCache | None = None) -> Output:
        """A forward as it comes."""
        try:
            return run(call, self.topology, cache)
        except TacodError:
            # All ranks refuse it alike, before they meet.
            raise
        except BaseException:
            self.clear()
            self.topology.begin_anew()
            raise

    def clear(self) -> None:
        """Give back what graphs and step caches hold."""
        self._kinds.clear()
        self._pool = None
        self.step_caches.clear()

    def _captured(self) -> Iterator[Graph]:
        """The graphs of all models."""
        return (each for kinds in self._kinds.values() for each in kinds.values() if isinstance(each, Graph))

    def _capture(self, call: Call, expected: Output) -> Graph | _Without:
        if all(graph.pool != self._pool for graph in self._captured()):
            # PyTorch ends a pool with the last graph in it.
            self._pool = torch.cuda.graph_pool_handle()
        everyone = self.topology.everyone
        self.begins()
        graph, reason = None, "another rank could not capture it"
        try:
            graph = Graph(call, self.topology, self._pool)
        except RuntimeError as error:  # a lack of memory is one too
            reason = str(error).splitlines()[0]
            # One that a capture has failed in takes no other.
            self._pool = None
        if everyone.agree(graph is not None):
            assert graph is not None
            out = graph.replay(call.inputs)
            if everyone.agree(equal(out, expected)):
                return graph
            reason = f"its replay differs by {relative_difference(out, expected):.1e}, or another rank's"
        log.warning("no CUDA graph for %s: %s", call.plan, reason)
        return _Without.EVER


class _Without(enum.Enum):
    """Why a kind of forward has no graph: it was seen once, or it can't have one."""

    YET = "yet"
    EVER = "ever"


class Graph:
    """One kind of forward, captured; its inputs and output have places of their own."""

    def __init__(self, call: Call, topology: Topology, pool: Any) -> None:
        self.pool = pool
        self._inputs = call.inputs.map(torch.clone)
        self._graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        stream = torch.cuda.current_stream()
        try:
            # NCCL's own thread may look at events meanwhile.
            with holding() as self._tables, torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
                self._out = run(replace(call, inputs=self._inputs), topology)
        finally:
            # A capture that fails doesn't leave its own.
            torch.cuda.set_stream(stream)

    def replay(self, inputs: Inputs) -> Output:
        """The forward of other inputs of this kind."""
        self._inputs.copy_(inputs)
        self._graph.replay()
        return clone(self._out)

"""Forwards on all ranks: the first ones of a kind as they come, later ones as one CUDA graph.

A graph replays a forward's kernels and collectives without the host, which at 1024² can't launch them as fast as two
GPUs run them. Nothing else changes: a graph is used only if its first replay equals, to the bit and on every rank, what
the same inputs gave without it.

With a step cache there is none: whether a forward skips its blocks is decided in its midst.
"""

from __future__ import annotations

import enum
import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from tacod.plan import Plan
from tacod.rank.families.base import Control, DiT
from tacod.rank.forward.run import run
from tacod.rank.forward.step_cache import StepCaches
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
        """Hears of each forward before it begins: it may take its time, also the one that a graph is captured by."""
        self._kinds: WeakKeyDictionary[DiT, OrderedDict[Hashable, Graph | _Without]] = WeakKeyDictionary()
        self._pool: Any = None

    def __call__(
        self,
        dit: DiT,
        plan: Plan,
        x: Tensor,
        timestep: Tensor,
        arguments: Mapping[str, Any],
        steps: tuple[Hashable, ...] = (),
    ) -> Tensor:
        """One forward, as `run` does it; for the step cache, ``steps`` names the run whose next step it is."""
        self.begins()
        if plan.step_cache:
            return self._cached(dit, plan, x, timestep, arguments, (*steps, plan, x.shape))
        given = {"x": x, "timestep": timestep, **arguments}
        if not self.graphs or not x.is_cuda or any(isinstance(value, Control) for value in given.values()):
            return self._run(dit, plan, x, timestep, arguments)
        kinds = self._kinds.setdefault(dit, OrderedDict())
        kind = (plan.layout, plan.attention, _kind(given))
        known = kinds.get(kind)
        if isinstance(known, Graph):
            kinds.move_to_end(kind)
            return known.replay(given)
        # Also where there will be no graph: the same forward is to give the same bits whenever it comes.
        plan = replace(plan, attention=replace(plan.attention, split_kv=True))
        out = self._run(dit, plan, x, timestep, arguments)
        if known is None:
            # The first one makes what is made at first use: kernels, communicators, tables.
            kinds[kind] = _Without.YET
            while len(kinds) > KINDS:
                kinds.popitem(last=False)
        elif known is _Without.YET:
            kinds[kind] = self._capture(dit, plan, given, out)
        return out

    def _cached(
        self,
        dit: DiT,
        plan: Plan,
        x: Tensor,
        timestep: Tensor,
        arguments: Mapping[str, Any],
        steps: tuple[Hashable, ...],
    ) -> Tensor:
        if any(isinstance(value, Control) for value in arguments.values()):
            # A ControlNet's residuals are others at each step, and what the blocks gave without them is no guess.
            self.step_caches.drop(*steps)
            return self._run(dit, plan, x, timestep, arguments)
        cache = self.step_caches.find(dit, steps, plan.step_cache, float(timestep.max()))
        out = self._run(dit, plan, x, timestep, {**arguments, "step_cache": cache})
        seat = self.topology.seat(plan.layout)
        self.skipped += seat is not None and seat.batch.agree(cache.skipped)
        return out

    def _run(
        self,
        dit: DiT,
        plan: Plan,
        x: Tensor,
        timestep: Tensor,
        arguments: Mapping[str, Any],
    ) -> Tensor:
        """A forward as it comes."""
        try:
            return run(dit, plan, self.topology, x, timestep, arguments)
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

    def _capture(self, dit: DiT, plan: Plan, given: Mapping[str, Any], expected: Tensor) -> Graph | _Without:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        everyone = self.topology.everyone
        self.begins()
        graph, reason = None, "another rank could not capture it"
        try:
            graph = Graph(dit, plan, given, self.topology, self._pool)
        except RuntimeError as error:  # a lack of memory is one too
            reason = str(error).splitlines()[0]
            # One that a capture has failed in takes no other.
            self._pool = None
        if everyone.agree(graph is not None):
            assert graph is not None
            out = graph.replay(given)
            if everyone.agree(torch.equal(out, expected)):
                return graph
            reason = f"its replay differs by {float((out - expected).norm() / expected.norm()):.1e}, or another rank's"
        log.warning("no CUDA graph for %s: %s", plan, reason)
        return _Without.EVER


class _Without(enum.Enum):
    """Why a kind of forward has no graph: it was seen once, or it can't have one."""

    YET = "yet"
    EVER = "ever"


class Graph:
    """One kind of forward, captured; its inputs and output have places of their own."""

    def __init__(self, dit: DiT, plan: Plan, given: Mapping[str, Any], topology: Topology, pool: Any) -> None:
        self._given = {name: _copy(value) for name, value in given.items()}
        self._graph = torch.cuda.CUDAGraph()
        rest = {name: value for name, value in self._given.items() if name not in ("x", "timestep")}
        torch.cuda.synchronize()
        stream = torch.cuda.current_stream()
        try:
            # NCCL's own thread may look at events meanwhile.
            with holding() as self._tables, torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
                self._out = run(dit, plan, topology, self._given["x"], self._given["timestep"], rest)
        finally:
            # A capture that fails doesn't leave its own.
            torch.cuda.set_stream(stream)

    def replay(self, given: Mapping[str, Any]) -> Tensor:
        """The forward of other inputs of this kind."""
        for name, value in given.items():
            _fill(self._given[name], value)
        self._graph.replay()
        return self._out.clone()


def _kind(value: Any) -> Hashable:
    """What a graph is for: the shapes and dtypes of tensors, and all else as it is."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype
    if isinstance(value, Mapping):
        return tuple((name, _kind(item)) for name, item in sorted(value.items()))
    if isinstance(value, list | tuple):
        return tuple(map(_kind, value))
    return (value,)


def _copy(value: Any) -> Any:
    if isinstance(value, list):
        return [_copy(item) for item in value]
    return value.clone() if isinstance(value, Tensor) else value


def _fill(place: Any, value: Any) -> None:
    if isinstance(value, list):
        for each, item in zip(place, value, strict=True):
            _fill(each, item)
    elif isinstance(value, Tensor):
        place.copy_(value)

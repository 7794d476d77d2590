"""Forwards on all ranks: the first ones of a kind without a CUDA graph, later ones as one graph.

A graph replays a forward's kernels and collectives without the host, which at 1024² can't launch them as fast as two
GPUs run them. Results don't change: a graph is used only if its first replay equals, to the bit and on every rank, the
forward of the same inputs without it.

Three kinds of forward have no graph: those with a step cache, because the host decides whether blocks are skipped;
those of a model for which the host reads numbers from the GPU, such as how many tokens an expert gets (`DiT.graphs`);
and long ones, which are watched (`tacod.rank.forward.watch`): their launches hide behind what runs, and a graph can't
be stopped.

A family's prefix (`tacod.rank.forward.prefixes`) is computed before its forward and never within a graph. A graph has a
copy of one prefix and overwrites it when a forward comes with another one.
"""

from __future__ import annotations

import enum
import logging
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import replace
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch

from tacod.rank.families.base import DiT, Output
from tacod.rank.forward.kernel_check import KernelCheck
from tacod.rank.forward.prefixes import Prefix, Prefixes
from tacod.rank.forward.run import Call, clone, compute_prefix, equal, relative_difference, run
from tacod.rank.forward.step_cache import StepCache, StepCaches
from tacod.rank.forward.watch import Watch
from tacod.rank.ops.table_cache import holding
from tacod.rank.parallel.topology import Topology
from tacod_client.errors import TacodError

__all__ = ["Forwards"]

log = logging.getLogger(__name__)

T = TypeVar("T")

KINDS = 6
"""Most graphs of each model, one for each kind of forward."""
PREFIX_BYTES = 4 << 30
"""The usual limit for prefixes."""


class Forwards:
    """Runs forwards. Every rank makes the same calls in the same order, so all have the same graphs."""

    def __init__(self, topology: Topology, graphs: bool = True, prefix_bytes: int = PREFIX_BYTES) -> None:
        """``prefix_bytes`` is the limit for prefixes, and once more for those that the graphs of a model copy."""
        self.topology = topology
        self.graphs = graphs
        self.skipped = 0
        """How many forwards all of this rank's batch groups skipped, except for the first block."""
        self.step_caches = StepCaches()
        self.prefixes = Prefixes(prefix_bytes)
        self._check_kernel = KernelCheck(topology)
        self.begins: Callable[[], None] = lambda: None
        """Called before each forward, also before the one that captures a graph."""
        self.watch: Watch | None = None
        """For the forwards of a command that may be long."""
        self._kinds: WeakKeyDictionary[DiT, OrderedDict[Hashable, Graph | _Without]] = WeakKeyDictionary()
        self._pool: Any = None

    def __call__(self, call: Call) -> Output:
        """One forward, as `run` does it. Raises `ArgumentError` if a rank can't attend as the plan says."""
        self.begins()
        self._check_kernel(call)
        if call.dit.has_prefix:
            call = replace(call, prefix=self._prefix(call))
        if call.plan.step_cache:
            return self._cached(call)
        inputs = call.inputs
        if (
            not self.graphs
            or not inputs.latents[0].is_cuda
            or inputs.control is not None
            or self._is_too_large(call.prefix)
        ):
            return self._run(call)
        kinds = self._kinds.setdefault(call.dit, OrderedDict())
        kind = (call.plan.layout, call.plan.attention, inputs.key)
        known = kinds.get(kind)
        if isinstance(known, Graph):
            kinds.move_to_end(kind)
            return known.replay(call)
        # Asked here, as a model may look at all of its layers for it: no replay waits for that.
        if not call.dit.graphs:
            return self._run(call)
        # Also where there will be no graph: the same forward is to give the same bits whenever it comes.
        attention = replace(call.plan.attention, split_kv=call.plan.attention.kernel == "exact")
        call = replace(call, plan=replace(call.plan, attention=attention))
        out = self._run(call)
        if known is None:
            # The first one makes what is made at first use: kernels, communicators, tables.
            kinds[kind] = _Without.YET
            while len(kinds) > KINDS:
                kinds.popitem(last=False)
        elif known is _Without.YET and self.watch is None:
            more = 0 if call.prefix is None else call.prefix.most_bytes
            while (
                more + sum(each.most_bytes for each in kinds.values() if isinstance(each, Graph)) > self.prefixes.limit
            ):
                kinds.popitem(last=False)
            kinds[kind] = self._capture(call, out)
        return out

    @property
    def prefix_bytes(self) -> int:
        """Bytes of prefixes on this rank, those that graphs copy among them."""
        return self.prefixes.nbytes + sum(graph.prefix_bytes for graph in self._captured())

    def _prefix(self, call: Call) -> Prefix:
        """The prefix of a forward, kept for later ones if its conditioning has a digest."""
        key = call.conditioning, call.plan.layout, call.plan.attention, *(x.shape for x in call.inputs.latents)
        known = self.prefixes.find(call.dit, key)
        if known is None:
            known = self._guarded(lambda: compute_prefix(call, self.topology))
            if call.conditioning is not None:
                self.prefixes.keep(call.dit, key, known)
        return known

    def _is_too_large(self, prefix: Prefix | None) -> bool:
        return prefix is not None and prefix.most_bytes > self.prefixes.limit

    def _cached(self, call: Call) -> Output:
        key = (*call.run_key, call.plan, *(each.shape for each in call.inputs.latents))
        if call.inputs.control is not None:
            # A ControlNet's residuals are others at each step, and what the blocks gave without them is no guess.
            self.step_caches.drop(*key)
            return self._run(call)
        level = max(float(each.max()) for each in call.inputs.timesteps)
        cache = self.step_caches.find(call.dit, key, call.plan.step_cache, level)
        out = self._run(call, cache=cache)
        seat, layout = self.topology.seat(call.plan.layout), call.plan.layout
        if layout.ranks < self.topology.world_size:
            # An idle rank, which may be the one that reports, hears of it too.
            self.skipped += self.topology.everyone.agree(seat is None or cache.skipped)
        else:
            assert seat is not None
            self.skipped += seat.batch.agree(cache.skipped)
        return out

    def _run(self, call: Call, cache: StepCache | None = None) -> Output:
        """A forward without a graph."""
        return self._guarded(lambda: run(call, self.topology, cache, self.watch))

    def _guarded(self, compute: Callable[[], T]) -> T:
        """Part of a forward; if it breaks off, nothing is left of earlier ones."""
        try:
            return compute()
        except TacodError:
            # All ranks refuse or stop at the same place, where nothing is under way between them.
            self.topology.settle()
            raise
        except BaseException:
            self.clear()
            self.topology.begin_anew()
            raise

    def clear(self) -> None:
        """Free the memory of graphs, step caches and prefixes."""
        self._kinds.clear()
        self._pool = None
        self.step_caches.clear()
        self.prefixes.clear()

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
            out = graph.replay(call)
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
    """A captured forward of one kind; it has its own memory for inputs, prefix and output."""

    def __init__(self, call: Call, topology: Topology, pool: Any) -> None:
        self.pool = pool
        self._inputs = call.inputs.map(torch.clone)
        self._prefix = call.prefix and replace(call.prefix, tensors=[each.clone() for each in call.prefix.tensors])
        self._copied = call.prefix and weakref.ref(call.prefix)
        """The prefix that `_prefix` is a copy of."""
        self._graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        stream = torch.cuda.current_stream()
        try:
            # NCCL's own thread may look at events meanwhile.
            with holding() as self._tables, torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
                self._out = run(replace(call, inputs=self._inputs, prefix=self._prefix), topology)
        finally:
            # A capture that fails doesn't leave its own.
            torch.cuda.set_stream(stream)

    @property
    def most_bytes(self) -> int:
        """Bytes of its prefix on the rank that has the most of it."""
        return 0 if self._prefix is None else self._prefix.most_bytes

    @property
    def prefix_bytes(self) -> int:
        """Bytes of its prefix on this rank."""
        return 0 if self._prefix is None else self._prefix.nbytes

    def replay(self, call: Call) -> Output:
        """The forward with other inputs of this kind."""
        self._inputs.copy_(call.inputs)
        if call.prefix is not None and self._prefix is not None and self._copied and call.prefix is not self._copied():
            for mine, theirs in zip(self._prefix.tensors, call.prefix.tensors, strict=True):
                mine.copy_(theirs)
            self._copied = weakref.ref(call.prefix)
        self._graph.replay()
        return clone(self._out)

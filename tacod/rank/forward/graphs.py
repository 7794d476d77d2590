"""Forwards on all ranks: the first ones of a kind without a CUDA graph, later ones as one graph.

A graph replays a forward's kernels and collectives without the host, which at 1024² can't launch them as fast as two
GPUs run them. Results don't change: a graph is used only if its first replay equals, to the bit and on every rank, the
forward of the same inputs without it.

With a step cache a forward is three graphs, as the host decides after the first block (`StepGraph`).

Two kinds of forward have no graph: those of a model for which the host reads numbers from the GPU, such as how many
tokens an expert gets (`DiT.graphs`); and long ones, which are watched (`tacod.rank.forward.watch`): their launches hide
behind what runs, and a graph can't be stopped.

Of a network that isn't ours nobody knows what its code does. A forward is captured once a call of its kind has changed
nothing that the network keeps, and only if one more has no side effects (`tacod.rank.forward.side_effects`). Before
a replay the graph goes if the network keeps something else by now, or its tables have changed (`OthersGraph`).

A family's prefix (`tacod.rank.forward.prefixes`) is computed before its forward and never within a graph. A graph has a
copy of one prefix and overwrites it when a forward comes with another one.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch

from tacod.plan import Plan
from tacod.rank.families.base import DiT, Output
from tacod.rank.families.inputs import Inputs
from tacod.rank.forward.captured import TRIES, Captured, Graph, Without
from tacod.rank.forward.kernel_check import KernelCheck
from tacod.rank.forward.others_graph import OthersGraph, look_on, state_of
from tacod.rank.forward.prefixes import Prefix, Prefixes
from tacod.rank.forward.run import Call, compute_prefix, equal, relative_difference, run
from tacod.rank.forward.state import State
from tacod.rank.forward.step_cache import StepCache, StepCaches
from tacod.rank.forward.step_graph import StepGraph, compute_both
from tacod.rank.forward.watch import Watch
from tacod.rank.oom import clear_tracebacks
from tacod.rank.parallel.topology import Topology
from tacod_client.errors import TacodError

__all__ = ["Forwards"]

log = logging.getLogger(__name__)

T = TypeVar("T")
G = TypeVar("G", bound=Captured)

KINDS = 6
"""Most graphs of each model, one for each kind of forward."""
UNTRUE_ELSEWHERE = "another rank's call changes what its network keeps"
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
        self._kinds: WeakKeyDictionary[DiT, OrderedDict[Hashable, Captured | Without]] = WeakKeyDictionary()
        self._pool: Any = None
        self._others_ran = 0
        """How often code of networks that aren't ours has run, but for replays; alike on all ranks."""
        self._said: WeakKeyDictionary[DiT, set[str]] = WeakKeyDictionary()
        """Why such a network has no graph, as the log has it."""

    def __call__(self, call: Call) -> Output:
        """One forward, as `run` does it. Raises `ArgumentError` if a rank can't attend as the plan says."""
        self.begins()
        self._check_kernel(call)
        if call.dit.has_prefix:
            call = replace(call, prefix=self._prefix(call))
        if call.plan.step_cache:
            return self._cached(call)
        if not self._may_be_captured(call):
            return self._run(call)
        kind = (call.plan.layout, call.plan.attention, call.inputs.key)
        known = self._known(call.dit, kind)
        if isinstance(known, Graph) and self._is_true(known, call, kind):
            return known.replay(call)
        # Asked here, as a model may look at all of its layers for it: no replay waits for that.
        if not call.dit.graphs:
            return self._run(call)
        if not call.dit.is_ours:
            return self._run_others(call, kind)
        call = _splitting_keys(call)
        out = self._run(call)
        self._came(call, kind, lambda: self._capture(call, Graph, lambda graph: graph.replay(call), out))
        return out

    def _run_others(self, call: Call, kind: Hashable) -> Output:
        """A forward without a graph of a network that isn't ours; it is captured if it has changed nothing."""
        known, device = self._known(call.dit, kind), call.inputs.latents[0].device
        if not isinstance(known, Without) or not known.may_come or self.watch is not None:
            out = self._run(call)
            if known is None:
                self._begin(call.dit, kind)
            return out
        # It may write to its arguments.
        again = replace(call, inputs=call.inputs.clone())
        before = state_of(call.dit, device)
        out = self._run(call)
        after = state_of(call.dit, device)
        changed = after.changed(before) or after.drew(before)
        if self.topology.everyone.agree(not changed):
            graph = self._capture_others(again, known.tries, out, after)
            self._kinds.setdefault(call.dit, OrderedDict())[kind] = graph
            return out
        known.tries += 1
        if not known.may_come:
            self._say(call.dit, call.plan, changed or UNTRUE_ELSEWHERE)
        return out

    def _capture_others(self, call: Call, tries: int, out: Output, state: State) -> Captured | Without:
        """The graph of a call that has left its network in this ``state``."""
        self.begins()
        self.others_run()
        effects = look_on(call, self.topology, self._guarded, state)
        graph: Captured | Without = Without(TRIES)
        if self.topology.everyone.agree(not effects.reason):
            graph = self._capture(call, partial(OthersGraph, effects), lambda graph: graph.replay(call), out)
        else:
            self._say(call.dit, call.plan, effects.reason or "another rank could not capture it")
        if isinstance(graph, OthersGraph):
            graph.tries, graph.seen = tries, self._others_ran
            log.info("%s is a CUDA graph: %s", call.plan, call.dit.network)
        return graph

    def others_run(self) -> None:
        """Code of networks that aren't ours runs, also outside of a forward: their graphs may be untrue from now on."""
        self._others_ran += 1

    def _is_true(self, graph: Graph, call: Call, kind: Hashable) -> bool:
        """Whether a graph still does what its network would; one that doesn't is dropped, and captured anew.

        That is found out if code of networks that aren't ours has run since it was last known: networks share code. To
        look takes long, so it is done before a replay. Forwards that have no graph, such as those with a ControlNet,
        don't wait for it.
        """
        if not isinstance(graph, OthersGraph) or graph.seen == self._others_ran:
            return True
        graph.seen = self._others_ran
        reason = graph.what_is_untrue(call)
        if self.topology.everyone.agree(not reason):
            return True
        self._kinds[call.dit][kind] = Without(graph.tries + 1)
        if graph.tries + 1 == TRIES:
            self._say(call.dit, call.plan, f"{reason or UNTRUE_ELSEWHERE}, {TRIES} times")
        return False

    def _may_be_captured(self, call: Call) -> bool:
        inputs = call.inputs
        possible = self.graphs and _is_on_gpu(inputs)
        return possible and inputs.control is None and not self._is_too_large(call.prefix)

    def _known(self, dit: DiT, kind: Hashable) -> Captured | Without | None:
        """What there is of this kind of forward, as the one that was used last."""
        kinds = self._kinds.setdefault(dit, OrderedDict())
        if isinstance(kinds.get(kind), Captured):
            kinds.move_to_end(kind)
        return kinds.get(kind)

    def _came(self, call: Call, kind: Hashable, capture: Callable[[], Captured | Without]) -> None:
        """A forward of this kind has come without a graph: its second one is captured, if it isn't long."""
        kinds = self._kinds.setdefault(call.dit, OrderedDict())
        known = kinds.get(kind)
        if known is None:
            self._begin(call.dit, kind)
        elif isinstance(known, Without) and known.may_come and self.watch is None:
            more = 0 if call.prefix is None else call.prefix.most_bytes
            while (
                more + sum(each.most_bytes for each in kinds.values() if isinstance(each, Captured))
                > self.prefixes.limit
            ):
                kinds.popitem(last=False)
            kinds[kind] = capture()

    def _begin(self, dit: DiT, kind: Hashable) -> None:
        """A first forward of this kind has made what is made at first use: kernels, communicators, tables."""
        kinds = self._kinds.setdefault(dit, OrderedDict())
        kinds[kind] = Without()
        while len(kinds) > KINDS:
            kinds.popitem(last=False)

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
        out = self._cached_run(call, cache)
        seat, layout = self.topology.seat(call.plan.layout), call.plan.layout
        if layout.ranks < self.topology.world_size:
            # An idle rank, which may be the one that reports, hears of it too.
            self.skipped += self.topology.everyone.agree(seat is None or cache.skipped)
        else:
            assert seat is not None
            self.skipped += seat.batch.agree(cache.skipped)
        return out

    def _cached_run(self, call: Call, cache: StepCache) -> Output:
        # Of weights that are fetched, one graph would wait for what another has begun.
        if not self._may_be_captured(call) or call.dit.weights is not None:
            return self._run(call, cache)
        kind = ("step cache", call.plan.layout, call.plan.attention, call.inputs.key)
        known = self._known(call.dit, kind)
        if isinstance(known, StepGraph):
            return self._guarded(lambda: run(call, self.topology, cache, None, known))
        if not call.dit.graphs:
            return self._run(call, cache)
        call = _splitting_keys(call)
        out = self._run(call, cache)
        self._came(call, kind, lambda: self._capture_steps(call))
        return out

    def _capture_steps(self, call: Call) -> Captured | Without:
        self.begins()
        expected = self._guarded(lambda: compute_both(call, self.topology))
        return self._capture(call, StepGraph, lambda graph: graph.both(call), expected)

    def _run(self, call: Call, cache: StepCache | None = None) -> Output:
        """A forward without a graph."""
        if not call.dit.is_ours:
            self.others_run()
        return self._guarded(lambda: run(call, self.topology, cache, self.watch, listens=True))

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

    def _captured(self) -> Iterator[Captured]:
        """The graphs of all models."""
        return (each for kinds in self._kinds.values() for each in kinds.values() if isinstance(each, Captured))

    def _capture(
        self, call: Call, make: Callable[[Call, Topology, Any], G], replay: Callable[[G], Output], expected: Output
    ) -> G | Without:
        """A graph whose first replay gives what is expected, on all ranks."""
        if all(graph.pool != self._pool for graph in self._captured()):
            # PyTorch ends a pool with the last graph in it.
            self._pool = torch.cuda.graph_pool_handle()
        everyone = self.topology.everyone
        self.begins()
        graph, reason = None, "another rank could not capture it"
        try:
            graph = make(call, self.topology, self._pool)
        except Exception as error:  # a lack of memory, or whatever a network raises that must not do something
            reason = (str(error) or type(error).__name__).splitlines()[0]
            clear_tracebacks(error)
            # One that a capture has failed in takes no other.
            self._pool = None
        if everyone.agree(graph is not None):
            assert graph is not None
            # Also one that has a fault: what its network has kept since the capture is computed by this.
            out = replay(graph)
            if everyone.agree(not graph.fault and equal(out, expected)):
                return graph
            reason = graph.fault or f"its replay differs by {relative_difference(out, expected):.1e}, or another rank's"
        self._say(call.dit, call.plan, reason)
        return Without(TRIES)

    def _say(self, dit: DiT, plan: Plan, reason: str) -> None:
        """Have the log say why a kind of forward has no graph; of a network that isn't ours once for each reason."""
        said = self._said.setdefault(dit, set())
        if dit.is_ours or reason not in said:
            log.warning("no CUDA graph for %s: %s", plan, reason)
        said.add(reason)


def _is_on_gpu(inputs: Inputs) -> bool:
    return inputs.latents[0].is_cuda


def _splitting_keys(call: Call) -> Call:
    """Also where there will be no graph: the same forward is to give the same bits whenever it comes."""
    attention = replace(call.plan.attention, split_kv=call.plan.attention.kernel == "exact")
    return replace(call, plan=replace(call.plan, attention=attention))

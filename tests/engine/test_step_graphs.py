"""Forwards with a step cache as graphs: equal to the bit to those without, and captured when others are, or never."""

from __future__ import annotations

import copy
import gc
import logging
import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from conformance import FAMILIES, each_latent, required_inputs, tiny
from fake_graphs import RecordedGraph, graphs_on_cpu
from helpers import FLUX
from rank_worker import WORLD, Ranks, walk
from torch import Tensor

from tacod.plan import AttentionPolicy, Layout, Plan, Shape
from tacod.rank.families.inputs import Inputs
from tacod.rank.forward.graphs import KINDS, Forwards
from tacod.rank.forward.run import Call, equal
from tacod.rank.forward.step_cache import MOST_IN_A_ROW, StepCache
from tacod.rank.forward.step_graph import SplitForward, StepGraph
from tacod.rank.parallel.sequence import SequenceParallel
from tacod.rank.parallel.topology import Topology
from tacod_client.errors import ArgumentError

ONE = Layout(1, 1, 1)
ALL = 1e9


@pytest.fixture(autouse=True)
def on_cpu() -> Iterator[None]:
    with graphs_on_cpu(), torch.inference_mode():
        yield


def step_graphs(forwards: Forwards) -> list[StepGraph]:
    return [each for each in forwards._captured() if isinstance(each, StepGraph)]


def replays(graph: StepGraph) -> tuple[int, ...]:
    """Of the first block, the others, and of what replaces them; without the two of each first test."""
    counted = (graph._first_graph, graph._rest_graph, graph._skip_graph)
    return tuple(each.replays - less for each, less in zip(counted, (2, 1, 1), strict=True))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_gives_the_same_bits(family: str) -> None:
    """Of a run in which steps are computed and skipped, the first two come as they are, and the others are graphs."""
    expected, skipped = walk(family, Forwards(Topology(), graphs=False), ONE, ALL, slice(None))
    assert skipped == [False, *[True] * MOST_IN_A_ROW, False, True, True]
    forwards = Forwards(Topology())
    outs, found = walk(family, forwards, ONE, ALL, slice(None))
    assert found == skipped
    assert all(equal(*each) for each in zip(outs, expected, strict=True))
    if not tiny(family).graphs:
        assert step_graphs(forwards) == []
        return
    (graph,) = step_graphs(forwards)
    assert replays(graph) == (len(outs) - 2, skipped[2:].count(False), skipped[2:].count(True))


def forward(forwards: Forwards, level: float, seed: int = 0, size: int = 8, run: str = "run", **rest: Any) -> Tensor:
    dit = FLUX.model
    given = {**FLUX.inputs(seed, size=(size, size)), "timestep": torch.tensor([level]), **rest}
    plan = Plan(ONE, 1, Shape(dit.heads, dit.width), step_cache=rest.pop("threshold", ALL))
    out = forwards(
        Call(dit, plan, Inputs({k: v for k, v in given.items() if k != "threshold"}, dit.arguments()), (run,))
    )
    assert isinstance(out, Tensor)
    return out


def test_runs_that_alternate_keep_to_themselves() -> None:
    """One graph serves both; what is kept of a run is no memory of the graph."""
    graphed, plain = Forwards(Topology()), Forwards(Topology(), graphs=False)
    for step, level in enumerate((0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)):
        for run, seed in (("one", 1), ("two", 2)):
            outs = [forward(forwards, level, seed + 10 * step, run=run) for forwards in (graphed, plain)]
            assert torch.equal(*outs)
    assert graphed.skipped == plain.skipped == 2 * (8 - 1 - 8 // (MOST_IN_A_ROW + 1))
    (graph,) = step_graphs(graphed)
    computed, skipped = replays(graph)[1:]
    assert computed >= 2
    assert skipped >= 8


def test_another_threshold_has_the_same_graph_and_a_forward_without_a_cache_another() -> None:
    forwards = Forwards(Topology())
    for threshold in (ALL, ALL / 2):
        for level in (0.9, 0.8, 0.7):
            forward(forwards, level, threshold=threshold)
    assert len(step_graphs(forwards)) == len(list(forwards._captured())) == 1
    for _ in range(2):
        forward(forwards, 0.9, threshold=0.0)
    assert len(list(forwards._captured())) == 2
    for size in range(10, 10 + 2 * KINDS, 2):
        for _ in range(2):
            forward(forwards, 0.9, size=size)
    assert len(step_graphs(forwards)) == KINDS, "all kinds of graphs are bounded together"


@pytest.mark.parametrize("threshold", [0.0, ALL])
def test_a_model_that_nobody_has_is_freed_with_its_graphs(threshold: float) -> None:
    dit = copy.deepcopy(FLUX.model)
    plan = Plan(ONE, 1, Shape(dit.heads, dit.width), step_cache=threshold)
    forwards = Forwards(Topology())
    for _ in range(3):
        forwards(Call(dit, plan, Inputs(FLUX.inputs(0), dit.arguments()), ("run",)))
    assert len(list(forwards._captured())) == 1
    left = weakref.ref(dit)
    del dit
    gc.collect()
    assert left() is None
    assert not list(forwards._captured())


def test_a_prefix_of_another_prompt_is_copied() -> None:
    """Of a family with a prefix, the graph has a copy of it."""
    dit = tiny("qwen_image_21")
    plan = Plan(ONE, 1, Shape(dit.heads, dit.width), step_cache=1e-9)
    graphed, plain = Forwards(Topology()), Forwards(Topology(), graphs=False)
    for number, letter in enumerate("aaabbaccab"):
        given = required_inputs(dit, 1, 5, (3, 4), seed=ord(letter))
        given = each_latent(given, lambda each, n=number: each + n)
        outs = [forwards(Call(dit, plan, given, (letter,), conditioning=letter)) for forwards in (graphed, plain)]
        assert equal(*outs)
    (graph,) = step_graphs(graphed)
    assert graph.most_bytes > 0
    assert replays(graph)[0] == 8


def test_watched_ones_are_not_captured() -> None:
    class Watch:
        def begin(self) -> None: ...

        def before(self, block: int, blocks: int) -> None:
            seen.append(block)

        def end(self) -> None: ...

    seen: list[int] = []
    forwards = Forwards(Topology())
    forwards.watch = Watch()  # type: ignore[assignment]
    for level in (0.9, 0.8, 0.7):
        forward(forwards, level)
    assert step_graphs(forwards) == []
    assert seen.count(0) == 3


def test_with_residuals_or_fetched_weights_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    class Weights:
        """All are there."""

        def over(self, modules: Any) -> Any:
            return iter(modules)

        def beside(self, module: Any) -> Any:
            raise AssertionError

        def ahead(self, modules: Any) -> Any:
            return nullcontext()

    forwards = Forwards(Topology())
    monkeypatch.setattr(FLUX.model, "weights", Weights(), raising=False)
    for level in (0.9, 0.8, 0.7):
        forward(forwards, level)
    assert list(forwards._captured()) == []


def test_a_replay_that_differs_is_not_used(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(RecordedGraph, "spoils", 0.1)
    forwards, plain = Forwards(Topology()), Forwards(Topology(), graphs=False)
    with caplog.at_level(logging.WARNING):
        for step, level in enumerate((0.9, 0.8, 0.7, 0.6)):
            assert torch.equal(*(forward(each, level, step) for each in (forwards, plain)))
    assert step_graphs(forwards) == []
    assert caplog.text.count("no CUDA graph for") == 1
    assert "its replay differs by" in caplog.text


def test_what_can_not_be_captured_runs_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A block that reads a number on the host."""
    end = type(FLUX.model).end

    def reading(self: Any, f: Any) -> Any:
        f.image.tokens.sum().item()
        return end(self, f)

    monkeypatch.setattr(type(FLUX.model), "end", reading)
    forwards, plain = Forwards(Topology()), Forwards(Topology(), graphs=False)
    with caplog.at_level(logging.WARNING):
        for step, level in enumerate((0.9, 0.8, 0.7, 0.6)):
            assert torch.equal(*(forward(each, level, step) for each in (forwards, plain)))
    assert step_graphs(forwards) == []
    assert caplog.text.count("not permitted when stream is capturing") == 1


def test_a_forward_that_is_refused_leaves_the_graphs() -> None:
    forwards = Forwards(Topology())
    for level in (0.9, 0.8, 0.7):
        forward(forwards, level)
    dit = FLUX.model
    plan = Plan(ONE, 1, Shape(dit.heads, dit.width), AttentionPolicy(kernel="sage"), step_cache=ALL)
    with pytest.raises(ArgumentError):
        forwards(Call(dit, plan, Inputs(FLUX.inputs(), dit.arguments()), ("run",)))
    assert len(step_graphs(forwards)) == 1


def test_both_halves_are_the_forward() -> None:
    """With and without a cache the same blocks give the same; what is skipped leaves the state for what isn't."""
    dit, given = FLUX.model, Inputs(FLUX.inputs(), FLUX.model.arguments())
    plan = Plan(ONE, 1, Shape(dit.heads, dit.width))
    split = SplitForward(Call(dit, plan, given), SequenceParallel(), given)
    split.first()
    out, others = split.rest()
    assert equal(out, dit.run(SequenceParallel(), given))
    assert equal(split.skip(others), split.skip(others.clone()))
    cache = StepCache(ALL, 1.0)
    dit.run(SequenceParallel(), given, cache)
    assert equal(dit.run(SequenceParallel(), given, cache), split.skip(others))
    assert cache.skipped


LAYOUTS = [(1, 3, 1), (2, 2, 1)]
"""A ring's transfers can't be recorded on a CPU; tests/gpu has it."""


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("family", ["flux"])
def test_on_several_ranks(ranks: Ranks, family: str, layout: tuple[int, ...]) -> None:
    """Also with groups that decide each for its own images, and with ranks that have nothing to do."""
    told = ranks.run(layout, "graphed_steps", family=family)
    assert len(told) == WORLD
    assert all(same for same, _ in told)
    active = layout[0] * layout[1] * layout[2]
    assert all(sum(counts) > 0 for _, counts in told[:active]), "they are used"

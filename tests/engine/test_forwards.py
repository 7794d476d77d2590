"""When a forward is captured and replayed, and when it isn't: the policy, with stand-ins for forwards and graphs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import FLUX
from torch import Tensor

from tacod.plan import AttentionPolicy, Layout, Plan, Shape
from tacod.rank.families.control import Control
from tacod.rank.families.inputs import Inputs
from tacod.rank.forward import graphs as module
from tacod.rank.forward.captured import Captured
from tacod.rank.forward.graphs import KINDS, Forwards
from tacod.rank.forward.run import Call
from tacod.rank.parallel.topology import Topology
from tacod_client.errors import ArgumentError

PLAN = Plan(Layout(1, 1, 1), 1, Shape(1, 16))
Replay = Callable[[Tensor], Tensor]


class World:
    """Counts what ran how."""

    def __init__(self, replay: Replay) -> None:
        self.replay = replay
        self.ran: list[str] = []
        self.fails = False

    def run(self, call: Call, topology: Topology, cache: Any, watch: Any, listens: bool = False) -> Tensor:
        self.ran.append("run, split_kv" if call.plan.attention.split_kv else "run")
        return 2 * call.inputs.latents[0]


class FakeGraph(Captured):
    """What stands for a graph."""

    world: World

    def __init__(self, call: Call, topology: Topology, pool: Any) -> None:
        self.pool = pool
        self._prefix = call.prefix
        self.world.ran.append("capture")
        if self.world.fails:
            raise torch.OutOfMemoryError("CUDA out of memory")

    def replay(self, call: Call) -> Tensor:
        self.world.ran.append("replay")
        return self.world.replay(call.inputs.latents[0])


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[World, Forwards]]:
    def make(replay: Replay = lambda x: 2 * x, graphs: bool = True) -> tuple[World, Forwards]:
        world = World(replay)
        monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
        monkeypatch.setattr(module, "run", world.run)

        monkeypatch.setattr(module, "Graph", FakeGraph)
        monkeypatch.setattr(FakeGraph, "world", world, raising=False)
        return world, Forwards(Topology(), graphs)

    return make


def forward(forwards: Forwards, size: int = 3, plan: Plan = PLAN, **rest: Any) -> Tensor:
    x = torch.arange(size, dtype=torch.float32)
    inputs = Inputs({"x": x, "timestep": torch.zeros(1), **rest}, FLUX.model.arguments())
    out = forwards(Call(FLUX.model, plan, inputs))
    assert isinstance(out, Tensor)
    assert torch.equal(out, 2 * x)
    return out


def test_the_second_is_captured_and_later_ones_are_replayed(make: Any) -> None:
    world, forwards = make()
    for _ in range(4):
        forward(forwards)
    assert world.ran == ["run, split_kv", "run, split_kv", "capture", "replay", "replay", "replay"]
    forward(forwards, size=4)
    assert world.ran[-1] == "run, split_kv", "another shape is another kind"
    forward(forwards, plan=Plan(Layout(1, 1, 1), 1, Shape(1, 16), attention=AttentionPolicy(exchange="int8")))
    assert world.ran[-1] == "run, split_kv", "so is another plan"


def test_watched_ones_are_not_captured(make: Any) -> None:
    """They are long; nothing within a graph could be told of, or stopped. Their bits are those of others."""
    world, forwards = make()
    forwards.watch = object()
    for _ in range(3):
        forward(forwards)
    assert world.ran == ["run, split_kv"] * 3
    forwards.watch = None
    for _ in range(2):
        forward(forwards)
    assert world.ran[3:] == ["run, split_kv", "capture", "replay", "replay"]
    forwards.watch = object()
    forward(forwards)
    assert world.ran[-1] == "replay", "a kind that was short, and of which it isn't known any more"


@pytest.mark.parametrize("fails", [False, True])
def test_each_forward_is_told_of_before_it_begins(make: Any, fails: bool) -> None:
    """Also the one that is captured: the supervisor gives each its time."""
    world, forwards = make()
    world.fails = fails
    forwards.begins = lambda: world.ran.append("told")
    for _ in range(2):
        forward(forwards)
    last = ["capture"] if fails else ["capture", "replay"]
    assert world.ran == ["told", "run, split_kv", "told", "run, split_kv", "told", *last]


def test_a_replay_that_differs_is_not_used(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    world, forwards = make(replay=lambda x: 2.001 * x)
    with caplog.at_level(logging.WARNING):
        for _ in range(5):
            forward(forwards)
    assert world.ran == ["run, split_kv", "run, split_kv", "capture", "replay", *["run, split_kv"] * 3]
    assert "its replay differs by 5.0e-04" in caplog.text


def test_what_can_not_be_captured_runs_as_it_is(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    world, forwards = make()
    world.fails = True
    with caplog.at_level(logging.WARNING):
        for _ in range(4):
            forward(forwards)
    assert world.ran == ["run, split_kv", "run, split_kv", "capture", "run, split_kv", "run, split_kv"]
    assert "no CUDA graph for sequence 1" in caplog.text
    assert "out of memory" in caplog.text


def test_kinds_are_bounded(make: Any) -> None:
    world, forwards = make()
    for size in range(1, KINDS + 2):
        for _ in range(3):
            forward(forwards, size)
    world.ran.clear()
    forward(forwards, KINDS + 1)
    assert world.ran == ["replay"]
    forward(forwards, 1)
    assert world.ran == ["replay", "run, split_kv"], "the one that was used the longest ago made room"


def test_cleared_they_begin_anew(make: Any) -> None:
    world, forwards = make()
    for _ in range(3):
        forward(forwards)
    forwards.clear()
    world.ran.clear()
    forward(forwards)
    assert world.ran == ["run, split_kv"]


def test_never_without_being_asked_nor_with_residuals(make: Any) -> None:
    world, forwards = make(graphs=False)
    for _ in range(3):
        forward(forwards)
    assert world.ran == ["run"] * 3
    world, forwards = make()
    for _ in range(3):
        forward(forwards, control=Control({}))
    assert world.ran == ["run"] * 3


def test_a_forward_that_breaks_off_takes_graphs_and_peers_along(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks may have met a different number of times: their memory is made anew, and graphs point into the old one."""
    world, forwards = make()
    discarded = []
    monkeypatch.setattr(forwards.topology, "begin_anew", lambda: discarded.append(list(forwards._kinds)))
    for _ in range(3):
        forward(forwards)

    def fail(error: Exception) -> None:
        def run(*args: Any, **named: Any) -> Tensor:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(module, "run", run)
            with pytest.raises(type(error)):
                forward(forwards, size=5)

    fail(ArgumentError("x: no", argument="x"))
    assert discarded == [], "all ranks refuse alike"
    world.ran.clear()
    forward(forwards)
    assert world.ran == ["replay"]
    fail(torch.OutOfMemoryError("CUDA out of memory"))
    assert discarded == [[]]
    world.ran.clear()
    forward(forwards)
    assert world.ran == ["run, split_kv"]


def test_a_pool_in_which_a_capture_failed_is_not_used_again(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    world, forwards = make()
    handles = iter("abc")
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(handles))
    pools = []
    for size, fails in ((3, True), (4, False), (5, False)):
        world.fails = fails
        for _ in range(2):
            forward(forwards, size)
        pools.append(forwards._pool)
    assert pools == [None, "b", "b"]

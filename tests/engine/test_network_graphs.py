"""Networks that aren't ours as CUDA graphs: what a replay would get wrong has none, and others give the same bits."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Iterator
from typing import Any
from unittest import mock

import fake_graphs
import made_up
import made_up_attention
import made_up_habits
import pytest
import torch
from fake_graphs import graphs_on_cpu
from made_up_habits import GRAPHS, NEVER, Habit, inputs
from rank_worker import Ranks
from test_network_tables import OneOf
from torch import Tensor, nn

from tacod.plan import Layout, Plan, Shape
from tacod.rank.comfyui.network import Network
from tacod.rank.comfyui.tokens import Misfit
from tacod.rank.families.inputs import Inputs
from tacod.rank.forward import graphs as module
from tacod.rank.forward import others_graph
from tacod.rank.forward.captured import TRIES, Captured, _undone_if_it_breaks_off
from tacod.rank.forward.graphs import Forwards
from tacod.rank.forward.host_copies import HostCopies
from tacod.rank.forward.others_graph import OthersGraph
from tacod.rank.forward.run import Call
from tacod.rank.forward.side_effects import SideEffects
from tacod.rank.forward.state import State
from tacod.rank.parallel.topology import Topology
from tacod_client.exchange import pack

PLAN = Plan(Layout(1, 1, 1), 1, Shape(1, 1))
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def on_cpu() -> Iterator[None]:
    with graphs_on_cpu(), torch.inference_mode():
        yield


class Pair:
    """A network with graphs, and a copy of it that runs without: each forward has to give the same."""

    def __init__(self, made: nn.Module) -> None:
        self.graphed, self.plain = (Network(each, torch.float32, "") for each in (made, copy.deepcopy(made)))
        self.forwards, self.without = Forwards(Topology()), Forwards(Topology(), graphs=False)

    def forward(self, given: dict[str, Any]) -> Tensor:
        outs = []
        for dit, forwards in ((self.graphed, self.forwards), (self.plain, self.without)):
            mine = {name: each.clone() if isinstance(each, Tensor) else each for name, each in given.items()}
            outs.append(forwards(Call(dit, PLAN, Inputs(mine, dit.specs_for(mine)))))
        assert isinstance(outs[0], Tensor)
        assert torch.equal(*outs)
        return outs[0]

    @property
    def graphs(self) -> list[Captured]:
        return list(self.forwards._captured())


def pair(habit: str) -> Pair:
    made_up_habits._known.clear()
    made_up_habits.positions_once.cache_clear()
    return Pair(made_up_habits.network(habit))


@pytest.mark.parametrize("habit", GRAPHS)
def test_it_is_captured_once_a_call_has_changed_nothing(habit: str) -> None:
    both = pair(habit)
    counts = []
    for seed in range(5):
        both.forward(inputs(seed))
        counts.append(len(both.graphs))
    assert counts == [0, 1, 1, 1, 1]
    (graph,) = both.graphs
    assert isinstance(graph, OthersGraph)
    assert graph._graph.replays == 4  # type: ignore[attr-defined]


@pytest.mark.parametrize("habit", [name for name in GRAPHS if name != "keeps_one_table"])
def test_two_shapes_in_turn(habit: str) -> None:
    both = pair(habit)
    for seed in range(8):
        both.forward(inputs(seed, 5 + seed % 2))
    assert len(both.graphs) == (0 if habit == "uses_an_lru_cache" else 2)


def test_a_table_that_is_replaced_each_time_has_no_graph(caplog: pytest.LogCaptureFixture) -> None:
    both = pair("keeps_one_table")
    for seed in range(2 * TRIES + 4):
        both.forward(inputs(seed, 5 + seed % 2))
    assert both.graphs == []
    assert caplog.text.count("no CUDA graph") == 1, "of both shapes for one reason"


@pytest.mark.parametrize("habit", ["keeps_one_table", "overwrites_its_table"])
def test_a_graph_goes_when_another_shape_changes_its_table(habit: str) -> None:
    both = pair(habit)
    # One that is untrue goes before it would be replayed.
    gone: list[Captured] = []
    for length, count in zip((5, 7) * 3, (1, *[2] * 5), strict=True):
        for seed in range(4):
            both.forward(inputs(seed, length))
        assert len(both.graphs) == count
        assert both.graphs[-1] not in gone
        gone += both.graphs


def test_the_log_says_when_a_graph_has_gone_for_good(caplog: pytest.LogCaptureFixture) -> None:
    both = pair("keeps_tables")
    for other in range(TRIES):
        for seed in range(3):
            both.forward(inputs(seed, 5))
        assert len(both.graphs) == 1
        both.forward(inputs(other, 10 + other))
    for seed in range(3):
        both.forward(inputs(seed, 5))
    assert both.graphs == []
    assert caplog.text.count("no CUDA graph") == 1
    assert "what the network keeps: tables[" in caplog.text
    assert f"{TRIES} times" in caplog.text


def test_a_graph_goes_when_what_nobody_sees_writes_to_its_table() -> None:
    """Such as a kernel that PyTorch doesn't dispatch; after a forward without a graph the numbers are compared."""
    both = pair("keeps_tables")
    for seed in range(3):
        both.forward(inputs(seed))
    (gone,) = both.graphs
    for dit in (both.graphed, both.plain):
        dit.inner.tables[2, 5, made_up_habits.WIDTH].numpy()[:] = 3  # type: ignore[index]
    both.forward(inputs(3, 6))
    both.forward(inputs(4))
    assert gone not in both.graphs


def test_only_a_replay_waits_until_what_is_kept_was_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sampling run with a ControlNet has no graph: its steps needn't care for those of others."""
    looked: list[None] = []

    look = OthersGraph.what_is_untrue

    def what_is_untrue(graph: OthersGraph, call: Call) -> str:
        looked.append(None)
        return look(graph, call)

    monkeypatch.setattr(OthersGraph, "what_is_untrue", what_is_untrue)
    both = pair("nothing")
    for seed in range(3):
        both.forward(inputs(seed))
    looked.clear()
    for seed in range(4):
        both.forward(inputs(seed))
    assert not looked
    both.forwards.watch = FakeWatch()  # type: ignore[assignment]
    for seed in range(4):
        both.forward(inputs(seed, 6))
    assert not looked
    both.forwards.watch = None
    for seed in range(4):
        both.forward(inputs(seed))
    assert len(looked) == len(both.graphs) == 1


@pytest.mark.parametrize("habit", NEVER)
def test_what_has_no_graph_and_why(habit: str, caplog: pytest.LogCaptureFixture) -> None:
    both = pair(habit)
    dit, words = both.graphed, NEVER[habit][1]
    for seed in range(TRIES + 3):
        given = inputs(seed % 2)
        if habit.startswith(("draws", "counts_in", "catches")):
            # Random numbers are others in the other network.
            both.forwards(Call(dit, PLAN, Inputs(given, dit.specs_for(given))))
        else:
            both.forward(given)
    assert both.graphs == []
    assert caplog.text.count("no CUDA graph") == 1
    assert words in caplog.text


@pytest.mark.parametrize("habit", NEVER)
def test_without_its_check_it_would_be_captured(habit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the cases above show what they are to show."""
    monkeypatch.setattr(State, "changed", lambda self, before: "")
    monkeypatch.setattr(State, "drew", lambda self, before: "")
    monkeypatch.setattr(SideEffects, "_refuse", lambda self, reason: None)
    monkeypatch.setattr(module, "equal", lambda one, other: True)
    both = pair(habit)
    dit = both.graphed
    for seed in range(2):
        given = inputs(seed)
        both.forwards(Call(dit, PLAN, Inputs(given, dit.specs_for(given))))
    # A read the fake refuses itself, as a GPU does.
    assert len(both.graphs) == (habit not in ("reads_a_number", "decides_by_a_number"))


def test_numbers_in_arguments_are_kinds() -> None:
    both = pair("nothing")
    for factor in (1, 1.0, True, 0.0, -0.0, 2.0):
        for seed in range(3):
            both.forward({**inputs(seed), "transformer_options": {"factor": factor}})
    assert len(both.graphs) == 6


def test_the_order_of_options_is_part_of_a_kind() -> None:
    def way(net: Habit, x: Tensor) -> Tensor:
        for name, each in net.options["parts"].items():
            x = x * each if name == "times" else x + each
        return x

    class Ordered(Habit):
        def forward(self, x: Tensor, timestep: Tensor, **given: Any) -> Tensor:
            self.options = given["transformer_options"]
            try:
                return super().forward(x, timestep)
            finally:
                del self.options

    both = Pair(Ordered(way).requires_grad_(False))
    for seed in range(6):
        parts = {"times": 2.0, "plus": 1.0} if seed < 3 else {"plus": 1.0, "times": 2.0}
        both.forward({**inputs(seed), "transformer_options": {"parts": parts}})
    assert len(both.graphs) == 2


@pytest.mark.parametrize("changes", [True, False])
def test_a_call_outside_of_a_forward_may_change_what_is_kept(changes: bool) -> None:
    both = pair("keeps_tables")
    for seed in range(3):
        both.forward(inputs(seed))
    (graph,) = both.graphs
    both.forwards.others_run()
    for dit in (both.graphed, both.plain) if changes else ():
        dit.methods()["preprocess_text_embeds"].run(torch.ones(1))
    both.forward(inputs(3))
    assert (graph in both.graphs) == (not changes)


def test_a_network_that_nobody_has_is_freed_with_its_graphs() -> None:
    both = pair("keeps_tables")
    for seed in range(3):
        both.forward(inputs(seed))
    left = weakref.ref(both.graphed.inner)
    del both.graphed
    gc.collect()
    assert left() is None
    assert both.graphs == []


def test_a_graph_holds_the_tables_that_it_reads() -> None:
    both = pair("keeps_tables")
    for seed in range(3):
        both.forward(inputs(seed))
    (table,) = both.graphed.inner.tables.values()  # type: ignore[union-attr]
    left = weakref.ref(table.untyped_storage())
    both.graphed.inner.tables.clear()  # type: ignore[union-attr]
    del table
    gc.collect()
    assert left() is not None


def test_watched_forwards_and_fetched_weights_have_none() -> None:
    both = pair("nothing")
    both.forwards.watch = FakeWatch()  # type: ignore[assignment]
    for seed in range(4):
        both.forward(inputs(seed))
    assert both.graphs == []
    both.forwards.watch = None
    both.graphed.weights = object()  # type: ignore[assignment]
    assert not both.graphed.graphs


class FakeWatch:
    def begin(self) -> None: ...

    def before(self, block: int, blocks: int) -> None: ...

    def end(self) -> None: ...


def test_an_error_in_a_capture_leaves_the_network_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fails(OthersGraph):
        def __init__(self, *args: Any) -> None:
            raise TypeError

    monkeypatch.setattr(module, "OthersGraph", Fails)
    both = pair("nothing")
    for seed in range(4):
        both.forward(inputs(seed))
    assert both.graphs == []
    assert both.graphed.around is None


def test_an_error_of_the_call_that_is_looked_on_costs_no_forward(caplog: pytest.LogCaptureFixture) -> None:
    """What an iterator keeps can't be seen."""
    calls = iter(range(10))

    def way(net: Habit, x: Tensor) -> Tensor:
        if next(calls) == 6:
            raise ValueError("this network is angry")
        return x

    made = made_up_habits.network("nothing")
    both = Pair(made)
    made.way = way
    for seed in range(3):
        both.forward(inputs(seed, 5))
    for seed in range(3):
        both.forward(inputs(seed, 6))
    assert len(both.graphs) == 1, "that of the other shape stays"
    assert "angry" in caplog.text
    assert both.graphed.around is None


@pytest.mark.usefixtures("counted")
def test_what_is_first_kept_by_the_call_that_is_looked_on_is_against_a_graph(caplog: pytest.LogCaptureFixture) -> None:
    """Such as tables that are known by an argument's address, which is another one then."""
    both = keeping_in_call(3)
    for seed in range(4):
        both.forward(inputs(seed))
    assert both.graphs == []
    assert "what the network keeps: table" in caplog.text
    assert RecordedGraph.count == 0, "it isn't captured"


@pytest.mark.usefixtures("counted")
def test_what_is_first_kept_by_a_capture_is_computed(caplog: pytest.LogCaptureFixture) -> None:
    """A capture computes nothing: later calls would read memory in which nothing was written."""
    both = keeping_in_call(4)
    for seed in range(2):
        both.forward(inputs(seed))
    assert both.graphs == []
    assert "what the network keeps: table" in caplog.text
    assert RecordedGraph.replayed == 1
    both.forward(inputs(2))


class RecordedGraph(fake_graphs.RecordedGraph):
    """One that counts."""

    count = replayed = 0

    def __init__(self) -> None:
        super().__init__()
        RecordedGraph.count += 1

    def replay(self) -> None:
        super().replay()
        RecordedGraph.replayed += 1


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> None:
    RecordedGraph.count = RecordedGraph.replayed = 0
    monkeypatch.setattr(torch.cuda, "CUDAGraph", RecordedGraph)


def keeping_in_call(number: int) -> Pair:
    """A network that keeps a table from this call on, by what nobody sees."""
    calls = iter(range(1, 100))

    def way(net: Habit, x: Tensor) -> Tensor:
        if next(calls) == number:
            net.table = made_up_habits.positions(x)
        return x + made_up_habits.positions(x)

    both = pair("nothing")
    both.graphed.inner.way = way
    both.plain.inner.way = made_up_habits.adds_positions
    return both


def test_a_refusal_before_a_capture_leaves_the_pool_of_others() -> None:
    both = pair("nothing")
    for seed in range(3):
        both.forward(inputs(seed))
    pool = both.forwards._pool
    both.graphed.inner.way = both.plain.inner.way = made_up_habits.selects
    for seed in range(3):
        both.forward(inputs(seed, 6))
    assert both.forwards._pool is pool is not None


@pytest.mark.parametrize("habit", ["keeps_tables", "copies_without_blocking"])
def test_too_large_tables_have_no_graph(
    habit: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(others_graph, "KEPT_BYTES", 0)
    both = pair(habit)
    copies = mock.patch.object(HostCopies, "nbytes", 20 * (habit != "keeps_tables"))
    with copies:
        for seed in range(3):
            both.forward(inputs(seed))
    assert both.graphs == []
    assert "MiB of tables" in caplog.text


def test_a_table_that_misfits_only_in_a_capture_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """The forward itself has shown that it fits."""
    made = made_up_attention.network()
    made.use_table(2)

    def misfit(*args: Any) -> Tensor:
        raise Misfit("there is no block")

    monkeypatch.setattr(Network, "_call", misfit)
    made.around = HostCopies(CPU)
    with pytest.raises(Misfit):
        made.run(OneOf(0, 2), made_up_attention.inputs(made, 0, 7))
    assert made.is_split


def test_graphs_are_looked_at_after_a_method_of_a_network() -> None:
    made = Network(made_up_habits.network("nothing"), torch.float32, "")
    engine = made_up.engine_of(made, Topology())
    with mock.patch.object(Forwards, "others_run") as run:
        engine.call("m", "preprocess_text_embeds", pack({"embeds": torch.ones(1)}, "arguments", {}, None))
    run.assert_called_once_with()


@pytest.mark.parametrize("broken_off", [True, False])
def test_pytorch_forgets_a_capture_that_the_driver_broke_off(monkeypatch: pytest.MonkeyPatch, broken_off: bool) -> None:
    ended = mock.Mock(side_effect=None if broken_off else RuntimeError("not currently recording to mempool_id"))
    released = mock.Mock()
    generator = mock.Mock()
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "default_generators", (None, generator))
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", ended, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", released, raising=False)
    with _undone_if_it_breaks_off("pool"):
        pass
    assert not ended.called
    assert not generator.graphsafe_set_state.called
    with pytest.raises(ZeroDivisionError), _undone_if_it_breaks_off("pool"):
        raise ZeroDivisionError
    ended.assert_called_once_with(1, "pool")
    assert released.call_count == broken_off
    generator.graphsafe_set_state.assert_called_once_with(generator.clone_state.return_value)


class Hides(dict[str, int]):
    def items(self) -> Any:
        raise ValueError


def test_what_cannot_be_looked_at_is_against_a_graph(caplog: pytest.LogCaptureFixture) -> None:
    both = pair("nothing")
    for dit in (both.graphed, both.plain):
        dit.inner.hidden = Hides()
    for seed in range(TRIES + 3):
        both.forward(inputs(seed))
    assert both.graphs == []
    assert "can't be" in caplog.text


# --- several ranks ----------------------------------------------------------------------------------------------------


# Of a ring's transfers the stand-in for graphs would wait for one before it begins the other.
@pytest.mark.parametrize("sharing", [False, True], ids=["collectives", "memory"])
@pytest.mark.parametrize(("layout", "how"), [((1, 2, 1), "plain"), ((1, 5, 1), "in fp32")], ids=str)
def test_shared_tokens_are_exchanged_within_a_graph(
    ranks: Ranks, layout: tuple[int, ...], how: str, sharing: bool
) -> None:
    found = ranks.run(layout, "network_graphs", how=how, sharing=sharing)
    assert [(same, replays) for same, replays, _ in found] == [(True, [3, 3])] * len(found)
    for _, _, said in found[: layout[1] * layout[2]]:
        # A replay says what its capture did.
        assert [" on each rank" in each for each in said] == [False, False, True, True] * 2


def test_all_ranks_or_none_have_a_graph(ranks: Ranks) -> None:
    found = ranks.run((1, 3, 1), "network_graphs", how="plain", sharing=False, breaking=1)
    assert [(same, replays) for same, replays, _ in found] == [(True, [])] * len(found)

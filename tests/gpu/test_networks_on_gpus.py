"""Networks that aren't ours on GPUs: forwards as CUDA graphs, and weights that a rank lacks. They need no ComfyUI."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import made_up_habits
import made_up_networks
import pytest
import torch
from helpers import Daemon
from made_up_habits import BETWEEN_DEVICES, FROM_HOST, GRAPHS, NEVER, inputs
from torch import Tensor

from tacod.plan import Layout, Plan, Shape
from tacod.rank.comfyui.network import Network
from tacod.rank.families.inputs import Inputs
from tacod.rank.forward.captured import TRIES
from tacod.rank.forward.graphs import Forwards
from tacod.rank.forward.run import Call
from tacod.rank.parallel.topology import Topology

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is available"),
]

WORLDS = [count for count in (1, 2, 3, 4) if count <= torch.cuda.device_count()]
PLAN = Plan(Layout(1, 1, 1), 1, Shape(1, 1))
RANDOM = ("draws", "draws_on_the_host", "counts_in_a_global", "copies_the_time")
"""What differs between two networks at the same call."""
FORWARDS = 5
"""As they come, captured, and replayed."""


# --- on one GPU, without a daemon -------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    made_up_habits._known.clear()
    made_up_habits.positions_once.cache_clear()
    with torch.inference_mode():
        yield


def pair(habit: str) -> tuple[Callable[[int, int], bool], Callable[[], int]]:
    """A network with graphs and one without: whether a forward of both is the same, and how many graphs there are."""
    made = made_up_habits.network(habit).cuda()
    graphed, plain = (Network(each, torch.float32, "") for each in (made, copy.deepcopy(made)))
    forwards, without = Forwards(Topology()), Forwards(Topology(), graphs=False)

    def forward(seed: int, length: int) -> bool:
        outs = []
        for dit, runs in ((graphed, forwards), (plain, without)):
            given = inputs(seed, length, "cuda")
            outs.append(runs(Call(dit, PLAN, Inputs(given, dit.specs_for(given)))))
        return habit in RANDOM or torch.equal(*outs)

    return forward, lambda: len(list(forwards._captured()))


@pytest.mark.parametrize("habit", [*GRAPHS, *FROM_HOST])
def test_replays_equal_calls(habit: str) -> None:
    forward, graphs = pair(habit)
    assert all(forward(seed, 100) for seed in range(FORWARDS))
    assert graphs() == 1


@pytest.mark.parametrize("habit", [*GRAPHS, *FROM_HOST, "overwrites_its_table"])
def test_two_shapes_in_turn(habit: str) -> None:
    """Memory that a table had is given to others in between."""
    forward, graphs = pair(habit)
    for seed in range(3 * FORWARDS):
        assert forward(seed, 100 + seed % 2)
        torch.full((1024, 1024), float("nan"), device="cuda")
    assert graphs() == (0 if habit in ("uses_an_lru_cache", "keeps_one_table", "overwrites_its_table") else 2)


@pytest.mark.parametrize("habit", ["keeps_one_table", "overwrites_its_table"])
def test_a_graph_goes_with_the_table_that_it_reads(habit: str) -> None:
    forward, graphs = pair(habit)
    # One that is untrue goes before it would be replayed.
    for length, count in ((100, 1), (90, 2), (100, 2)):
        assert all(forward(seed, length) for seed in range(FORWARDS))
        torch.full((1024, 1024), float("nan"), device="cuda")
        assert graphs() == count


@pytest.mark.parametrize("habit", [*NEVER, *BETWEEN_DEVICES])
def test_what_a_replay_would_get_wrong_has_no_graph(habit: str, caplog: pytest.LogCaptureFixture) -> None:
    forward, graphs = pair(habit)
    with caplog.at_level(logging.WARNING):
        assert all(forward(seed % 3, 100) for seed in range(TRIES + 3))
    assert graphs() == 0
    words = {**NEVER, **BETWEEN_DEVICES}[habit][1]
    assert caplog.text.count("no CUDA graph") == 1
    assert words in caplog.text


@pytest.mark.parametrize("habit", ["reads_a_number", "waits_for_the_device"])
def test_an_attempt_leaves_the_device_as_it_was(habit: str) -> None:
    """PyTorch's allocator gives memory back, draws random numbers, and captures others."""
    forward, graphs = pair(habit)
    assert all(forward(seed, 100) for seed in range(FORWARDS))
    assert graphs() == 0
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    held = torch.empty(64 << 20, dtype=torch.uint8, device="cuda")
    assert torch.cuda.memory_reserved() > before
    del held
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() == before
    assert torch.rand(3, device="cuda").isfinite().all()
    after, captured = pair("nothing")
    assert all(after(seed, 100) for seed in range(FORWARDS))
    assert captured() == 1


# --- by a daemon, on one to four GPUs ---------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=WORLDS, ids=lambda count: f"{count}gpu")
def gpu_daemon(request: pytest.FixtureRequest, models: Path) -> Iterator[Daemon]:
    with networks_daemon(models, request.param, True) as daemon:
        yield daemon


@pytest.fixture(scope="module")
def daemon_without_graphs(gpu_daemon: Daemon, models: Path) -> Iterator[Daemon]:
    with networks_daemon(models, len(gpu_daemon.rank_pids()), False) as daemon:
        yield daemon


def networks_daemon(models: Path, gpus: int, graphs: bool) -> Daemon:
    settings = {"comfyui.path": str(made_up_networks.COMFYUI), "group.cuda_graphs": graphs}
    return Daemon(roots=[models], gpus=gpus, settings=settings)


def called(kind: str, number: int, images: int) -> dict[str, Any]:
    """A call's arguments; several differ in their latents."""
    given = made_up_networks.inputs(kind, images)
    return {**given, "x": given["x"] + 0.1 * number}


@pytest.mark.parametrize("kind", ["aura", "waves"])
@pytest.mark.parametrize("images", [1, 2])
def test_networks_give_the_same_with_graphs(
    gpu_daemon: Daemon, daemon_without_graphs: Daemon, models: Path, kind: str, images: int
) -> None:
    file = made_up_networks.save(kind, models)
    ranks = len(gpu_daemon.rank_pids())
    plans: list[Any] = ["auto"]
    if kind == "aura" and ranks > 1:
        plans += [{"ulysses": ranks, "ring": 1}, {"ulysses": 1, "ring": ranks}]
    for plan in plans:
        outs: list[list[Tensor]] = []
        for daemon in (gpu_daemon, daemon_without_graphs):
            with daemon.client() as client:
                model = client.load(file, dtype="fp32", plan=plan)
                outs.append([model.forward(**called(kind, number, images)) for number in range(2 * FORWARDS)])
        assert all(map(torch.equal, *outs))
    assert "no CUDA graph" not in gpu_daemon.log


@pytest.mark.parametrize("weights", ["sharded", "host"])
@pytest.mark.parametrize("kind", ["aura", "waves"])
def test_weights_that_a_rank_lacks_change_no_bits(gpu_daemon: Daemon, models: Path, kind: str, weights: str) -> None:
    file = made_up_networks.save(kind, models)
    plan: Any = {"sequence_parallel_degree": len(gpu_daemon.rank_pids())} if kind == "aura" else "auto"
    with gpu_daemon.client() as client:
        whole, apart = (client.load(file, dtype="fp32", weights=each, plan=plan) for each in ("replicated", weights))
        for number in range(FORWARDS):
            given = called(kind, number, 1)
            assert apart.forward(**given).equal(whole.forward(**given))
        for model in (whole, apart):
            client.unload(model.id)

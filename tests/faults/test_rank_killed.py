"""A rank dies: all ranks are replaced, the interrupted work runs again, and the client gets the same tensor."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import torch
from helpers import FLUX, SD3, SOON_S, START_S, Daemon, eventually, stopped

from tacod_client import Client
from tacod_client.stats import PARTS

from .conftest import PROCESSES


@pytest.mark.parametrize("rank", [0, 1])
def test_under_a_forward(sturdy: Daemon, client: Client, rank: int) -> None:
    model = client.load(FLUX.file)
    FLUX.check(model)
    supervisor = psutil.Process(sturdy.pid)
    open_before = supervisor.num_fds(), supervisor.num_threads()
    before, stats = client.status()["group"], client.stats()
    victim = before["ranks"][rank]["pid"]
    with ThreadPoolExecutor(1) as pool, sturdy.client() as watcher:
        with stopped(victim):
            forward = pool.submit(FLUX.check, model)
            eventually(lambda: watcher.status()["queue"]["running"], 3, "the forward runs")
            os.kill(victim, signal.SIGKILL)
        eventually(lambda: watcher.status()["state"] == "degraded", SOON_S, "the death is noticed")
        forward.result(START_S)
    assert model.stats.retries == 1
    after = client.status()["group"]
    assert after["restarts"] == before["restarts"] + 1
    assert not {one["pid"] for one in after["ranks"]} & {one["pid"] for one in before["ranks"]}
    told = client.stats()
    assert told["retried_forwards"] == stats["retried_forwards"] + 1
    assert told["group_restarts"] == after["restarts"]
    assert "was killed by SIGKILL" in sturdy.log
    eventually(lambda: (supervisor.num_fds(), supervisor.num_threads()) == open_before, 5, "no descriptor stays open")
    assert len(sturdy.processes()) == PROCESSES


def test_under_a_sample(sturdy: Daemon, client: Client) -> None:
    steps = 12
    model = client.load(SD3.file)
    undisturbed = SD3.sample(model, steps, sampler="euler_ancestral", seed=3).result()
    retried = client.stats()["retried_forwards"]
    job = SD3.sample(model, steps, sampler="euler_ancestral", seed=3)
    seen: list[int] = []
    for event in job:
        if event.step == 5 and 5 not in seen:
            os.kill(sturdy.rank_pids()[1], signal.SIGKILL)
        seen.append(event.step)
    assert torch.equal(job.result(), undisturbed)
    again = max(index for index, step in enumerate(seen) if step == 1)
    assert again > 4
    assert seen == [*range(1, again + 1), *range(1, steps + 1)]
    assert client.stats()["retried_forwards"] == retried + 1
    stats = model.stats
    assert stats.retries == 1
    assert sum(getattr(stats, f"{part}_s") for part in PARTS) == pytest.approx(stats.seconds)


@pytest.mark.parametrize("weights", ["sharded", "host"])
def test_under_a_sample_with_weights_apart(sturdy: Daemon, client: Client, weights: str) -> None:
    """What it held for the others is gone with it."""
    model = client.load(SD3.file, weights=weights)
    undisturbed = SD3.sample(client.load(SD3.file), 12).result()
    job = SD3.sample(model, 12)
    for event in job:
        if event.step == 5 and model.stats.retries == 0:
            os.kill(sturdy.rank_pids()[1], signal.SIGKILL)
            break
    assert torch.equal(job.result(), undisturbed)
    told = next(each for each in client.models() if each["id"] == model.id)
    assert told["weights"] == weights
    client.unload(model.id)


def test_while_idle(sturdy: Daemon, client: Client) -> None:
    model = client.load(FLUX.file)
    FLUX.check(model)
    os.kill(sturdy.rank_pids()[0], signal.SIGKILL)
    FLUX.check(model, seed=5)
    assert model.stats.retries <= 1


def test_what_other_clients_had_queued_goes_on(sturdy: Daemon, client: Client) -> None:
    with sturdy.client() as other:
        mine = SD3.sample(client.load(SD3.file), 8)
        theirs = SD3.sample(other.load(SD3.file), 8)
        next(iter(mine))
        os.kill(sturdy.rank_pids()[1], signal.SIGKILL)
        assert torch.equal(mine.result(), theirs.result())

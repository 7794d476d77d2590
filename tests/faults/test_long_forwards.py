"""Forwards that take long, by faults that make each block slow: progress, cancel, time limits, and ranks that are lost.

No forward here would be long by itself.
"""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import FLUX, START_S, Daemon, Interruption, Tiny, eventually

from tacod_client import Cancelled, Client, Job, Model

from .conftest import STEP_TIMEOUT_S, on_purpose

DEEP = Tiny("deep_flux", {**FLUX.config, "depth": 3, "depth_single_blocks": 9})
BLOCKS = 13
"""Of these one joins text and image."""
SOON_S = 2.0
"""A cancel takes effect within this time, of 0.3 s for each block; the rest of the forward would take longer."""
Faults = Callable[..., None]


@pytest.fixture(scope="module", autouse=True)
def _model(models: Path) -> None:
    DEEP.save(models)


@pytest.fixture
def slowly(sturdy: Daemon) -> Iterator[Faults]:
    """Have each block take so many seconds, and other faults before that; 0 or the test's end take them back."""
    text = sturdy.config.read_text()

    def faults(seconds: float, at: str = "forward", others: tuple[dict[str, Any], ...] = (), **slow: Any) -> None:
        each = {"kind": "slow", "at": at, "when": "block", "seconds": seconds, "always": True, **slow}
        sections = [on_purpose(**fault) for fault in (*others, each)]
        head = sections[0].partition("[[testing.faults]]")[0]
        faulty = text + head + "".join(section.removeprefix(head) for section in sections)
        sturdy.config.write_text(faulty if seconds else text)
        reload()

    def reload() -> None:
        with sturdy.client() as admin:
            admin.reload()

    yield faults
    sturdy.config.write_text(text)
    reload()


_lengths = itertools.count(140)


def new_text() -> int:
    """A length of text that nobody has had: a kind of forward whose pace isn't known, so that the first is watched."""
    return next(_lengths)


@contextmanager
def under_way(model: Model, **inputs: Any) -> Iterator[dict[str, Any]]:
    """A forward in a thread; afterwards what it came to, or its error."""
    ended: dict[str, Any] = {}

    def forward() -> None:
        try:
            ended["out"] = model.forward(**inputs)
        except BaseException as error:
            ended["error"] = error

    thread = threading.Thread(target=forward)
    thread.start()
    try:
        yield ended
    finally:
        thread.join(START_S)
        assert not thread.is_alive()


def blocks_of(client: Client) -> tuple[int, int] | None:
    """How far the running job is within its step."""
    running = [job for job in client.jobs() if job["state"] == "running"]
    return (running[0]["block"], running[0]["blocks"]) if running and running[0]["blocks"] else None


def test_its_blocks_are_counted(sturdy: Daemon, client: Client, slowly: Faults) -> None:
    """By its client, by ``ps`` and ``top``; of the ranks the slowest counts."""
    model, inputs = client.load(DEEP.file), DEEP.inputs(text=new_text())
    slowly(0.15, rank=1)
    heard: list[tuple[int, int]] = []
    model.on_blocks = lambda block, blocks: heard.append((block, blocks))
    seen = set()
    with sturdy.client() as watcher, under_way(model, **inputs) as ended:
        while not ended:
            seen.add(blocks_of(watcher))
            time.sleep(0.05)
    assert len(seen - {None}) > BLOCKS / 2
    assert heard == sorted(heard)
    assert len(set(heard)) > BLOCKS / 4
    assert {blocks for _, blocks in heard} == {BLOCKS}
    slowly(0)
    assert torch.equal(ended["out"], model.forward(**inputs))


def test_short_ones_are_not_watched(client: Client, slowly: Faults) -> None:
    """Once it is known that they are short: then they cost nothing more, and nothing is done before their blocks."""
    model, inputs = client.load(DEEP.file), DEEP.inputs(text=new_text())
    heard: list[int] = []
    for _ in range(3):
        model.forward(**inputs)
    model.on_blocks = lambda block, blocks: heard.append(block)
    slowly(1.0)
    begun = time.monotonic()
    model.forward(**inputs)
    assert time.monotonic() - begun < BLOCKS
    assert heard == []


ALONE = {"sequence_parallel_degree": 1, "cfg_parallel": False}
EACH_AN_IMAGE = {"cfg_parallel": True}


@pytest.mark.parametrize(
    ("plan", "slow"),
    [
        ({"cfg_parallel": False}, {"rank": 0}),
        ({"cfg_parallel": False}, {"rank": 1}),
        (EACH_AN_IMAGE, {"rank": 0}),
        (EACH_AN_IMAGE, {"rank": 1}),
        (ALONE, {}),
    ],
)
def test_cancel_takes_effect_between_blocks(
    sturdy: Daemon, client: Client, slowly: Faults, slow: dict[str, int], plan: Any
) -> None:
    """On all ranks before the same block, whichever is slow and whether or not they exchange; the ranks live on."""
    model = client.load(DEEP.file, plan=plan)
    inputs = DEEP.inputs(batch=2, text=new_text())
    pids = sturdy.rank_pids()
    slowly(0.3, **slow)
    with sturdy.client() as watcher, under_way(model, **inputs) as ended:
        eventually(lambda: (blocks_of(watcher) or (0, 0))[0] >= 2, START_S, "it is in its blocks")
        (job,) = watcher.jobs()
        begun = time.monotonic()
        assert watcher.cancel(job["job"]) == "cancelling"
        eventually(lambda: ended, START_S, "it ended")
        took = time.monotonic() - begun
        assert isinstance(ended["error"], Cancelled)
        eventually(lambda: watcher.status()["queue"]["running"] == 0, START_S, "the ranks are free")
    assert took < SOON_S
    slowly(0)
    expected = DEEP.forward(**inputs)
    out = model.forward(**inputs)
    assert float((out - expected).norm() / expected.norm()) <= 2e-6
    assert sturdy.rank_pids() == pids


def test_an_interrupted_client_stops_it(sturdy: Daemon, client: Client, slowly: Faults) -> None:
    """As a click on Cancel in ComfyUI, and as a client that goes away."""

    interruption = Interruption()

    model = client.load(DEEP.file)
    slowly(0.3)
    for ending in ("click", "bye"):
        interruption.armed.clear()
        with sturdy.client(on_wait=interruption) as other:
            theirs = other.load(DEEP.file)
            with under_way(theirs, **DEEP.inputs(text=new_text())) as ended:
                eventually(lambda: (blocks_of(client) or (0, 0))[0] >= 1, START_S, "it is in its blocks")
                begun = time.monotonic()
                if ending == "click":
                    interruption.armed.set()
                else:
                    other.close()
                eventually(lambda: client.jobs() == [], START_S, "the job is gone")
                assert time.monotonic() - begun < SOON_S
                interruption.armed.set()
            assert "error" in ended
    slowly(0)
    DEEP.check(model)


def test_a_run_is_cancelled_within_a_step(sturdy: Daemon, client: Client, slowly: Faults) -> None:
    model = client.load(DEEP.file)
    slowly(0.3, at="sample")
    job = DEEP.sample(model, 4)
    eventually(lambda: (blocks_of(client) or (0, 0))[0] >= 2, START_S, "it is in its blocks")
    begun = time.monotonic()
    job.cancel()
    with pytest.raises(Cancelled):
        job.result()
    assert time.monotonic() - begun < SOON_S
    slowly(0)
    DEEP.check(model)


def test_time_limits_are_for_a_block(client: Client, slowly: Faults) -> None:
    """A forward of twice `group.step_timeout_s` is not ended, as long as its blocks go on."""
    model, inputs = client.load(DEEP.file), DEEP.inputs(text=new_text())
    slowly(2 * STEP_TIMEOUT_S / BLOCKS, rank=1)
    begun = time.monotonic()
    out = model.forward(**inputs)
    assert time.monotonic() - begun > 2 * STEP_TIMEOUT_S
    assert model.stats.retries == 0
    slowly(0)
    assert torch.equal(out, model.forward(**inputs))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_hang_in_the_middle_is_noticed(sturdy: Daemon, client: Client, slowly: Faults, rank: int) -> None:
    model, inputs = client.load(DEEP.file), DEEP.inputs(text=new_text())
    hang = {"kind": "sleep", "when": "block", "block": 5, "rank": rank}
    slowly(0.01, others=(hang,))
    begin, begun = len(sturdy.log), time.monotonic()
    model.forward(**inputs)
    assert time.monotonic() - begun < 3 * STEP_TIMEOUT_S + 10
    assert model.stats.retries == 1
    log = sturdy.log[begin:]
    assert f"none further than block {4 if rank else 5} of {BLOCKS}" in log or "none further than block 5" in log
    assert "in inject" in log


def sample(model: Model, steps: int, text: int, **options: Any) -> Job:
    """Start a run."""
    inputs = DEEP.inputs(text=text)
    noise = inputs.pop("x")
    del inputs["timestep"]
    sigmas = torch.linspace(1, 0, steps + 1)
    return model.sample(noise=noise, latent=0.3 * noise, sigmas=sigmas, positive=inputs, **options)


@pytest.mark.parametrize("sampler", ["euler_ancestral", "heun"])
def test_a_rank_that_dies_costs_one_step(client: Client, slowly: Faults, sampler: str) -> None:
    """The run goes on behind the last step, and comes to the same bits, with all that the sampler remembers."""
    steps, text = 6, new_text()
    model = client.load(DEEP.file)
    restarts, before = client.status()["group"]["restarts"], client.stats()["forwards_total"]
    # It dies in the fourth step, and in the one after that.
    deaths = ({"kind": "exit", "at": "sample", "when": "block", "block": 3, "rank": 1, "skip": n} for n in (3, 5))
    slowly(0.06, at="sample", others=tuple(deaths))
    job = sample(model, steps, text, sampler=sampler, seed=3)
    assert [event.step for event in job] == [*range(1, steps + 1)]
    assert client.status()["group"]["restarts"] == restarts + 2
    assert client.stats()["forwards_total"] - before == (2 * steps - 1 if sampler == "heun" else steps)
    assert model.stats.retries == 2
    slowly(0)
    assert torch.equal(job.result(), sample(model, steps, text, sampler=sampler, seed=3).result())


def test_retries_are_for_each_long_step(client: Client, slowly: Faults) -> None:
    """A run of many hours isn't ended by losses that are hours apart; with a step cache it begins anew each time."""
    steps = 5
    model = client.load(DEEP.file)
    deaths = [{"kind": "exit", "at": "sample", "when": "block", "rank": 0, "block": 2, "skip": n} for n in (1, 3, 5, 7)]
    slowly(0.06, at="sample", others=tuple(deaths))
    job = sample(model, steps, new_text())
    assert [event.step for event in job] == [*range(1, steps + 1)]
    assert model.stats.retries == 4
    slowly(0.06, at="sample", others=tuple(deaths[1:2]))
    cached = client.load(DEEP.file, plan={"step_cache": 1e-9})
    assert [event.step for event in sample(cached, steps, new_text())] == [1, 2, 3, *range(1, steps + 1)]


def test_without_room_in_the_store_a_run_begins_anew(sturdy: Daemon, client: Client, slowly: Faults) -> None:
    steps, text = 4, new_text()
    model = client.load(DEEP.file)
    slowly(0.06, at="sample", others=({"kind": "exit", "at": "sample", "when": "block", "rank": 1, "skip": 2},))
    with sturdy.changed({"limits.store_bytes": 8000}):
        job = sample(model, steps, text)
        assert [event.step for event in job] == [1, 2, *range(1, steps + 1)]
    slowly(0)
    assert torch.equal(job.result(), sample(model, steps, text).result())


def test_a_killed_rank_in_the_middle_of_a_forward(sturdy: Daemon, client: Client, slowly: Faults) -> None:
    model, inputs = client.load(DEEP.file), DEEP.inputs(text=new_text())
    slowly(0.2)
    with sturdy.client() as watcher, under_way(model, **inputs) as ended:
        eventually(lambda: (blocks_of(watcher) or (0, 0))[0] >= 2, START_S, "it is in its blocks")
        os.kill(sturdy.rank_pids()[1], signal.SIGKILL)
        eventually(lambda: watcher.status()["state"] == "degraded", 2, "the death is noticed")
    assert model.stats.retries == 1
    slowly(0)
    assert torch.equal(ended["out"], model.forward(**inputs))

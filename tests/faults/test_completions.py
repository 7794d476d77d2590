"""A client has its result by a completion, before the ranks agree: what happens then changes nothing any more."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import FLUX, START_S, Daemon, Interrupted, Interruption, eventually

from tacod_client import Client, JobNotFound, Model, latents
from tacod_client.request import Request
from tacod_client.shared import Memory, Shared
from tacod_client.stats import PARTS
from tacod_client.wire import Message

from .conftest import Inject, on_purpose

LONG_S = 120.0
"""How long a rank takes to report, where a test doesn't wait for it."""


@pytest.fixture(autouse=True)
def all_latents(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small ones lie in shared memory too."""
    monkeypatch.setattr(latents, "LEAST_BYTES", 0)


@pytest.fixture
def completions(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The requests of this process that were told of their completion before their answer came."""
    told: list[int] = []
    complete = Request.complete

    def note(self: Request, message: Message) -> None:
        complete(self, message)
        if self.completed:
            told.append(message.id)

    monkeypatch.setattr(Request, "complete", note)
    return told


def memories(client: Client) -> list[Memory]:
    """What a client shares with the ranks."""
    assert client._connection.shared is not None
    return client._connection.shared._memories


@contextmanager
def untouched(client: Client) -> Iterator[None]:
    """Within, nobody writes to what a client shares with the ranks."""
    (memory,) = memories(client)
    mark = os.urandom(memory.nbytes)
    memory.view[:] = mark
    yield
    assert bytes(memory.view) == mark, "a rank wrote there"


def restarted(watcher: Client, before: int) -> None:
    """Wait until the ranks are new."""

    def is_back() -> bool:
        status = watcher.status()
        return bool(status["group"]["restarts"] == before + 1 and status["state"] == "ready")

    eventually(is_back, START_S, "the ranks are new")


def check_parts(model: Model, forwards: int, retries: int = 0) -> None:
    """Its statistics are whole, and add up."""
    stats = model.stats
    assert (stats.forwards, stats.steps, stats.retries) == (forwards, forwards, retries)
    assert sum(getattr(stats, f"{part}_s") for part in PARTS) == pytest.approx(stats.seconds)


def test_forwards_of_threads_end_with_completions(sturdy: Daemon, client: Client, completions: list[int]) -> None:
    model = client.load(FLUX.file)
    FLUX.check(model)
    cases = [(inputs, model.forward(**inputs)) for inputs in map(FLUX.inputs, range(4))]
    results = client.stats()["jobs_total"]["result"]
    completions.clear()

    def check(case: int) -> None:
        inputs, right = cases[case % len(cases)]
        assert torch.equal(model.forward(**inputs), right)

    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(check, case) for case in range(20)]:
            future.result(START_S)
    check_parts(model, 25)
    assert len(set(completions)) == len(completions)
    assert len(completions) > 5
    assert client.stats()["jobs_total"]["result"] == results + 20
    assert client._connection._waiting == {}, "all answers have come"


@pytest.mark.parametrize("kind", ["exit", "raise"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_is_lost_behind_it(sturdy: Daemon, client: Client, inject: Inject, kind: str, rank: int) -> None:
    """The forward isn't done again, and nothing more is written to the client's memory.

    Rank 1 may be lost while rank 0 is still to tell the client. Then the forward is done again, which has a completion
    of its own; `test_a_rank_is_killed_behind_it` has the order for certain.
    """
    model = client.load(FLUX.file)
    FLUX.check(model)
    inputs = FLUX.inputs(5)
    right = model.forward(**inputs)
    before = client.stats()
    inject(kind=kind, at="forward", when="after", rank=rank)
    with sturdy.client() as watcher:
        restarts = watcher.status()["group"]["restarts"]
        assert torch.equal(model.forward(**inputs), right)
        with untouched(client):
            restarted(watcher, restarts)
        after = watcher.stats()
    retries = model.stats.retries
    assert retries <= rank
    check_parts(model, 3, retries)
    assert after["retried_forwards"] == before["retried_forwards"] + retries
    assert after["jobs_total"]["result"] == before["jobs_total"]["result"] + 1
    assert torch.equal(model.forward(**inputs), right)


def test_a_rank_is_killed_behind_it(sturdy: Daemon, client: Client, inject: Inject, completions: list[int]) -> None:
    """The other one would have reported much later; the client's next forward has waited for that."""
    model = client.load(FLUX.file)
    inputs = FLUX.inputs(6)
    right = model.forward(**inputs)
    inject(kind="slow", at="forward", when="after", rank=1, seconds=LONG_S)
    with sturdy.client() as watcher, ThreadPoolExecutor(1) as pool:
        before = watcher.status()["group"]
        retried = watcher.stats()["retried_forwards"]
        completions.clear()
        assert torch.equal(model.forward(**inputs), right)
        assert len(completions) == 1
        after = pool.submit(model.forward, **inputs)
        eventually(lambda: watcher.status()["queue"]["queued"], 10, "the next one waits")
        assert watcher.status()["queue"]["running"] == 1, "the ranks are still to agree"
        os.kill(before["ranks"][1]["pid"], signal.SIGKILL)
        assert torch.equal(after.result(START_S), right)
        assert watcher.status()["group"]["restarts"] == before["restarts"] + 1
        assert watcher.stats()["retried_forwards"] == retried
    check_parts(model, 3)
    assert model.stats.seconds < LONG_S


def test_rank_0_is_lost_before_it(sturdy: Daemon, client: Client, inject: Inject, completions: list[int]) -> None:
    """Though the result lies there, nobody was told: the forward is done again."""
    model = client.load(FLUX.file)
    inputs = FLUX.inputs(7)
    right = model.forward(**inputs)
    inject(kind="exit", at="forward", when="written", rank=0)
    retried = client.stats()["retried_forwards"]
    completions.clear()
    assert torch.equal(model.forward(**inputs), right)
    assert model.stats.retries == 1
    assert len(completions) <= 1
    assert client.stats()["retried_forwards"] == retried + 1


def test_what_all_ranks_raise_behind_it_is_no_error(sturdy: Daemon, client: Client, inject: Inject) -> None:
    model = client.load(FLUX.file)
    FLUX.check(model)
    restarts = client.status()["group"]["restarts"]
    inject(kind="raise", at="forward", when="after")
    FLUX.check(model, 1)
    check_parts(model, 2)
    assert client.status()["group"]["restarts"] == restarts


def never_reads(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has its end, and doesn't look at it."""
    monkeypatch.setattr(Shared, "_note_channels", lambda self: None)


def does(act: Callable[[socket.socket], Any]) -> Callable[[Client, pytest.MonkeyPatch], None]:
    """It has its end, and does something with it."""

    def have(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
        note = Shared._note_channels

        def note_then_act(self: Shared) -> None:
            note(self)
            for memory in self._memories:
                if memory.channel is not None:
                    act(memory.channel)

        monkeypatch.setattr(Shared, "_note_channels", note_then_act)

    return have


def write(end: socket.socket) -> None:
    """No forward, and another one with a descriptor, which a newer kernel refuses."""
    end.send(b"junk")
    with open(os.devnull) as file, suppress(PermissionError):
        socket.send_fds(end, [b"junk"], [file.fileno()])


def is_an_older_one(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """It doesn't know of them."""
    init = Shared.__init__

    def without(self: Shared, path: bytes, session: bytes, completes: bool = False, forwards: bool = False) -> None:
        init(self, path, session)

    monkeypatch.setattr(Shared, "__init__", without)


@pytest.mark.parametrize(
    ("misuse", "hears"),
    [
        (never_reads, False),
        (does(lambda end: end.shutdown(socket.SHUT_RDWR)), False),
        (does(write), True),
        (is_an_older_one, False),
    ],
    ids=["never reads", "shuts it down", "writes", "is an older one"],
)
def test_a_client_that(
    sturdy: Daemon,
    completions: list[int],
    monkeypatch: pytest.MonkeyPatch,
    misuse: Callable[[Client, pytest.MonkeyPatch], None],
    hears: bool,
) -> None:
    """What it does with its end is its own affair: it gets its results, and so do others."""
    with sturdy.client() as other, sturdy.client() as client:
        theirs = other.load(FLUX.file)
        cases = [(inputs, theirs.forward(**inputs)) for inputs in map(FLUX.inputs, range(3))]
        completions.clear()
        misuse(client, monkeypatch)
        model = client.load(FLUX.file)
        for inputs, right in 10 * cases:
            assert torch.equal(model.forward(**inputs), right)
        assert bool(completions) == hears
        check_parts(model, 30)
        for inputs, right in cases:
            assert torch.equal(theirs.forward(**inputs), right)


def test_a_client_that_closes_its_end_under_a_forward(client: Client, inject: Inject) -> None:
    model = client.load(FLUX.file)
    FLUX.check(model)
    inject(kind="slow", at="forward", when="written", rank=0, seconds=0.5)
    with ThreadPoolExecutor(1) as pool:
        forward = pool.submit(FLUX.check, model, 1)
        (memory,) = memories(client)
        assert memory.channel is not None
        memory.channel.close()
        forward.result(START_S)
    FLUX.check(model, 2)
    assert memory.channel is None
    check_parts(model, 3)


def test_ranks_keep_no_descriptor_of_a_client_that_is_gone(sturdy: Daemon, client: Client) -> None:
    model = client.load(FLUX.file)
    inputs = FLUX.inputs(9)
    model.forward(**inputs)

    def descriptors() -> list[int]:
        """Those of each rank; with a command ranks drop what is no longer there."""
        model.forward(**inputs)
        client.status()
        return [len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in sturdy.rank_pids()]

    before = descriptors()
    for _ in range(4):
        with sturdy.client() as other:
            other.load(FLUX.file).forward(**inputs)
            assert all(now > known for now, known in zip(descriptors(), before, strict=True))
    eventually(lambda: descriptors() == before, 10, "the ranks have let go of all sockets and memories")


def test_a_cancel_that_comes_behind_it(sturdy: Daemon, client: Client, inject: Inject, completions: list[int]) -> None:
    """The forward has ended well; its job is no more to be cancelled."""
    model = client.load(FLUX.file)
    FLUX.check(model)
    before = client.stats()["jobs_total"]
    inject(kind="slow", at="forward", when="after", rank=1, seconds=LONG_S)
    completions.clear()
    with sturdy.client() as watcher:
        FLUX.check(model, 1)
        assert len(completions) == 1
        (job,) = watcher.jobs()
        with pytest.raises(JobNotFound):
            watcher.cancel(job["job"])
        os.kill(sturdy.rank_pids()[1], signal.SIGKILL)
        eventually(lambda: not watcher.jobs(), 30, "the job has ended")
        assert watcher.stats()["jobs_total"] == {**before, "result": before["result"] + 1}
    check_parts(model, 2)


def test_a_completion_that_comes_behind_a_cancel(sturdy: Daemon, inject: Inject) -> None:
    """It is for nobody: the client has given up the request, and uses another place."""

    interruption = Interruption()
    with sturdy.client(on_wait=interruption) as client:
        model = client.load(FLUX.file)
        FLUX.check(model)
        (before,) = memories(client)
        inject(kind="slow", at="forward", when="written", rank=0, seconds=0.5)
        interruption.armed.set()
        with pytest.raises(Interrupted):
            model.forward(**FLUX.inputs(1))
        interruption.armed.clear()
        for seed in range(2, 6):
            FLUX.check(model, seed)
        (after,) = memories(client)
        assert after.number != before.number
        check_parts(model, 5)


def test_a_client_that_leaves_behind_it_has_had_its_result(
    sturdy: Daemon, inject: Inject, completions: list[int]
) -> None:
    with sturdy.client() as watcher:
        with sturdy.client() as client:
            model = client.load(FLUX.file)
            FLUX.check(model)
            before = watcher.stats()
            inject(kind="slow", at="forward", when="after", rank=1, seconds=LONG_S)
            completions.clear()
            FLUX.check(model, 1)
            assert len(completions) == 1
        eventually(lambda: watcher.status()["clients"] == 1, 10, "it is gone")
        assert len(watcher.jobs()) == 1
        os.kill(sturdy.rank_pids()[1], signal.SIGKILL)
        eventually(lambda: not watcher.jobs(), 30, "the job has ended")
        told = watcher.stats()
        assert told["jobs_total"] == {**before["jobs_total"], "result": before["jobs_total"]["result"] + 1}
        eventually(lambda: watcher.stats()["shared_bytes"] == 0, 10, "what it shared is freed")


@pytest.mark.parametrize("limit", ["limits.queue_per_user", "limits.queue"])
def test_what_is_completed_counts_towards_no_limit(
    sturdy: Daemon, client: Client, inject: Inject, completions: list[int], limit: str
) -> None:
    model = client.load(FLUX.file)
    inputs = FLUX.inputs(8)
    right = model.forward(**inputs)
    inject({limit: 1}, kind="slow", at="forward", when="after", rank=1, seconds=0.5, times=3)
    completions.clear()
    for _ in range(6):
        assert torch.equal(model.forward(**inputs), right)
    assert len(completions) >= 3


def test_the_daemon_is_killed_behind_it(models: Path, completions: list[int]) -> None:
    """What the client has it keeps, though nobody tells it any more how long that took."""
    slow = on_purpose(kind="slow", when="after", rank=1, skip=1, seconds=LONG_S)
    with Daemon(2, [models], sections=slow) as daemon, daemon.client() as client:
        model = client.load(FLUX.file)
        FLUX.check(model)
        completions.clear()
        FLUX.check(model, 1)
        assert len(completions) == 1
        daemon.signal(signal.SIGKILL)
        daemon.wait()
        eventually(lambda: not daemon.processes(), 10, "its ranks are gone")
        daemon.config.write_text(daemon.config.read_text().replace(slow, ""))
        daemon.start()
        FLUX.check(model, 2)
        check_parts(model, 3)

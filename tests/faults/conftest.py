"""A daemon for faults that it must survive: short deadlines, and restarts without end."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers import FLUX, SD3, START_S, Daemon, eventually, shared_memory

from tacod.config import I_KNOW
from tacod_client import Cancelled, Client

STEP_TIMEOUT_S = 4.0
RANKS = 2
MANY_STEPS = 20000
"""More than any test waits for; their sigmas are a large buffer."""

Inject = Callable[..., None]


@pytest.fixture(scope="session")
def two_ranks(models: Path) -> Iterator[Daemon]:
    """Two ranks, replaced as often as need be."""
    settings = {
        "heartbeat_s": 1.0,
        "group.step_timeout_s": STEP_TIMEOUT_S,
        "group.max_restarts": 1000,
        # Many restarts in a short time would be spaced out more and more; here each is the first of its window.
        "group.restart_window_s": 0.001,
    }
    with Daemon(RANKS, [models], settings) as daemon:
        with daemon.client() as client:
            # With the first large buffer that it needn't copy, pyzmq starts a thread that lasts.
            job = SD3.sample(client.load(SD3.file), MANY_STEPS)
            job.cancel()
            with pytest.raises(Cancelled):
                job.result()
        yield daemon


@pytest.fixture
def sturdy(two_ranks: Daemon) -> Iterator[Daemon]:
    """The daemon with two ranks; after the test nothing is left of it, and the next job is right."""
    # A count taken while the last client's connection goes may be too low for a moment.
    counts = [holdings(two_ranks)]
    for _ in range(2):
        time.sleep(0.05)
        counts.append(holdings(two_ranks))
    before = {name: max(each[name] for each in counts) for name in counts[0]}
    yield two_ranks
    with two_ranks.client() as client:
        eventually(lambda: client.status()["state"] == "ready", START_S, "the ranks are back")
        eventually(lambda: client.status()["clients"] == 1, 10, "the test's clients are gone")
        assert client.jobs() == []
        FLUX.check(client.load(FLUX.file), seed=99)
    assert len(two_ranks.processes()) == 1 + RANKS
    with suppress(AssertionError):
        eventually(lambda: not growth(before, holdings(two_ranks)), 10, "it holds no more than before")
    assert not growth(before, holdings(two_ranks)), descriptors(two_ranks)


def descriptors(daemon: Daemon) -> list[str]:
    """What the supervisor's descriptors are, to be shown where there are too many."""
    folder = Path(f"/proc/{daemon.pid}/fd")
    return sorted(str(each.readlink()) for each in folder.iterdir())


def holdings(daemon: Daemon) -> dict[str, int]:
    """What a daemon without clients or work holds: descriptors, threads, files, shared memory."""
    supervisor = psutil.Process(daemon.pid)
    return {
        "descriptors": supervisor.num_fds(),
        "threads": supervisor.num_threads(),
        # The rendezvous of each generation of ranks has a name of its own.
        "files": len(list(daemon.folder.rglob("*"))),
        "shared memory": len(shared_memory(daemon.processes())),
    }


def growth(before: dict[str, int], now: dict[str, int]) -> dict[str, int]:
    """What is held more than before."""
    return {name: now[name] - before[name] for name in before if now[name] > before[name]}


@pytest.fixture
def client(sturdy: Daemon) -> Iterator[Client]:
    """A client of the sturdy daemon."""
    with sturdy.client() as client:
        yield client


@pytest.fixture
def inject(sturdy: Daemon) -> Iterator[Inject]:
    """Have one fault on purpose in the sturdy daemon, with other settings if need be; the test's end takes it back."""
    text = sturdy.config.read_text()

    def inject(settings: dict[str, Any] | None = None, **fault: Any) -> None:
        lines = "".join(f"{key} = {json.dumps(value)}\n" for key, value in (settings or {}).items())
        sturdy.config.write_text(lines + text + on_purpose(**fault))
        reload()

    def reload() -> None:
        with sturdy.client() as admin:
            admin.reload()

    yield inject
    sturdy.config.write_text(text)
    reload()


def on_purpose(**fault: Any) -> str:
    """The section of a configuration that has a fault on purpose."""
    lines = [f"{key} = {json.dumps(value)}" for key, value in fault.items()]
    return "\n".join(["[testing]", f"i_know = {json.dumps(I_KNOW)}", "[[testing.faults]]", *lines, ""])

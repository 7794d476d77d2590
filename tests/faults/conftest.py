"""A daemon for faults that it must survive: short deadlines, and restarts without end."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from helpers import FLUX, OFTEN, SD3, START_S, Daemon, eventually, shared_memory

from tacod.config import I_KNOW
from tacod_client import Cancelled, Client

STEP_TIMEOUT_S = 4.0
RANKS = 2
PROCESSES = 2 + RANKS
"""The supervisor, the fork server and the ranks."""
MANY_STEPS = 20000
"""More than any test waits for; their sigmas are a large buffer."""

Inject = Callable[..., None]


@pytest.fixture(scope="session")
def two_ranks(models: Path) -> Iterator[Daemon]:
    """Two ranks, replaced as often as need be."""
    settings = {
        "heartbeat_s": 1.0,
        "group.step_timeout_s": STEP_TIMEOUT_S,
        **OFTEN,
    }
    with Daemon(RANKS, [models], settings) as daemon:
        with daemon.client() as client:
            # With the first large buffer that it needn't copy, pyzmq starts a thread that lasts.
            job = SD3.sample(client.load(SD3.file), MANY_STEPS)
            job.cancel()
            with pytest.raises(Cancelled):
                job.result()
        yield daemon


@pytest.fixture(scope="session")
def patient(models: Path) -> Iterator[Daemon]:
    """One rank, and heartbeats so far apart that no client must answer one."""
    with Daemon(1, [models], {"heartbeat_s": 60.0}) as daemon:
        yield daemon


@pytest.fixture(scope="session")
def grown() -> list[str]:
    """What the daemon with two ranks holds more than before, for each test after which it does."""
    return []


@pytest.fixture
def sturdy(two_ranks: Daemon, grown: list[str]) -> Iterator[Daemon]:
    """The daemon with two ranks; after the test nothing is left of it, and the next job is right."""
    # What is held while the last client's connection goes may be too little for a moment.
    looks = [holdings(two_ranks)]
    for _ in range(2):
        time.sleep(0.05)
        looks.append(holdings(two_ranks))
    before = {kind: max((look[kind] for look in looks), key=len) for kind in looks[0]}
    yield two_ranks
    with two_ranks.client() as client:
        eventually(lambda: client.status()["state"] == "ready", START_S, "the ranks are back")
        eventually(lambda: client.status()["clients"] == 1, 10, "the test's clients are gone")
        # The last one may be completed, while the ranks are to agree.
        eventually(lambda: client.jobs() == [], 10, "the test's jobs have ended")
        FLUX.check(client.load(FLUX.file), seed=99)
    assert len(two_ranks.processes()) == PROCESSES
    more = ""

    def holds_no_more() -> bool:
        nonlocal more
        more = growth(before, holdings(two_ranks))
        return not more

    with suppress(AssertionError):
        eventually(holds_no_more, 10, "it holds no more than before")
    # Not looked at once more: the daemon opens files of /proc for a moment, again and again.
    if more:
        grown.append(more)
    # What is made once, when it is first needed, is no leak; what is made again is one.
    if len(grown) > LAZILY_MADE:
        # Not by assert, whose message pytest would cut.
        each = "\nand\n".join(grown)
        pytest.fail(f"the daemon holds more than before, again and again:\n{each}\nIts log:\n{two_ranks.log[-2000:]}")


LAZILY_MADE = 1
"""How often a daemon may come to hold more, for good, than before a test."""

Holdings = dict[str, list[str]]
"""The names of what a daemon holds, by kind."""


def holdings(daemon: Daemon) -> Holdings:
    """What a daemon without clients or work holds: descriptors, threads, files, shared memory."""
    process = Path(f"/proc/{daemon.pid}")
    return {
        "descriptors": descriptors(process),
        "threads": entries(process / "task", lambda each: (each / "comm").read_text().strip()),
        # The rendezvous of each generation of ranks has a name of its own.
        "files": [str(path.relative_to(daemon.folder)) for path in daemon.folder.rglob("*")],
        "shared memory": list(shared_memory(daemon.processes())),
    }


def descriptors(process: Path) -> list[str]:
    """A process's descriptors by number and name; a unix socket with the path that it is bound to."""
    # A connection that was accepted has its listener's path. A name that isn't a path may hold line breaks.
    rows = [line.split() for line in Path("/proc/net/unix").read_text(errors="replace").splitlines()[1:]]
    sockets = {f"socket:[{row[6]}]": " ".join(row[7:]) for row in rows if len(row) > 6}

    def tell(each: Path) -> str:
        name = str(each.readlink())
        return f"{name} {sockets.get(name, '')}".rstrip()

    return entries(process / "fd", tell)


def entries(folder: Path, tell: Callable[[Path], str]) -> list[str]:
    """What is in a folder of a process's, by number and name; without what goes while this looks."""
    found = []
    for each in folder.iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):
            found.append(f"{each.name} {tell(each)}")
    return found


def growth(before: Holdings, now: Holdings) -> str:
    """Of what there is more than before: what is new, what is gone, and what has stayed, by name."""
    lines = []
    for kind, old in before.items():
        new = now[kind]
        if len(new) > len(old):
            stayed = set(old) & set(new)
            lines.append(f"{kind}: {len(old)} before, {len(new)} now")
            lines += [f"  new: {each}" for each in new if each not in stayed]
            lines += [f"  gone: {each}" for each in old if each not in stayed]
            lines += [f"  as before: {each}" for each in old if each in stayed]
    return "\n".join(lines)


@pytest.fixture
def client(sturdy: Daemon) -> Iterator[Client]:
    """A client of the sturdy daemon."""
    with sturdy.client() as client:
        yield client


@pytest.fixture
def inject(sturdy: Daemon) -> Iterator[Inject]:
    """Have a fault on purpose in the sturdy daemon, once or some times, with other settings if need be.

    The test's end takes it back.
    """
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


def on_purpose(times: int = 1, skip: int = 0, **fault: Any) -> str:
    """The section of a configuration that has a fault on purpose, so many times one after the other."""
    lines = ["[testing]", f"i_know = {json.dumps(I_KNOW)}"]
    for number in range(times):
        lines += ["[[testing.faults]]", f"skip = {skip + number}"]
        lines += [f"{key} = {json.dumps(value)}" for key, value in fault.items()]
    return "\n".join([*lines, ""])

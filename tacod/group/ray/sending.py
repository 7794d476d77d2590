"""Sends the files of a load to the hosts that lack them, in chunks."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np

from tacod.checkpoint import read_checkpoint
from tacod.group.ray.files import FoundFile, NamedFile
from tacod_client.errors import Cancelled, ModelCorrupt, ModelError, TacodError

if TYPE_CHECKING:
    from tacod.group.ray.cluster import Agent

__all__ = ["Refused", "send_missing"]

log = logging.getLogger("tacod.ray")

CHUNK_BYTES = 16 << 20
AHEAD = 4
"""How many chunks are under way at a time."""
TELL_S = 0.2
"""The least time between two words of how far it is."""
LOG_S = 10.0
"""The same in the log."""
LOOK_S = 0.2
"""How often to look for a cancel while hosts make room, or write what has come to their disks."""

_transfers = itertools.count(1)
"""The number of each file's transfer."""

Ask = Callable[..., Awaitable[Any]]


class Refused(Exception):
    """The load can't be, for this error on the wire."""

    def __init__(self, error: dict[str, Any]) -> None:
        super().__init__(error)
        self.error = error


async def send_missing(
    files: Sequence[NamedFile],
    agents: Sequence[Agent],
    found: list[list[FoundFile]],
    ask: Ask,
    put: Callable[[Any], Any],
    tell: Callable[[int, int], None],
    is_stopped: Callable[[], bool],
) -> None:
    """Send each agent's host what it has not ``found``, and note where it lies there.

    ``ask`` calls a method of an agent's actor, ``put`` puts a chunk where all actors get it once; ``tell`` hears how
    many bytes of how many have been sent. Raises `Refused` if a host can't take a file, if the file has changed
    meanwhile, or if ``is_stopped`` says so; then no host keeps a part of one.
    """
    lacking = {
        number: {at: str(error["message"]) for at, each in enumerate(found) if (error := each[number]["error"])}
        for number in range(len(files))
    }
    total = sum(part["size"] for number, at in lacking.items() if at for part in files[number]["parts"])
    progress = _Progress(total, tell)
    for number, places in lacking.items():
        if not places:
            continue
        file, to, transfer = files[number], [agents[at] for at in places], next(_transfers)
        lacks = [*places.values()]
        progress.begin(file, to, lacks)

        def ask_about_it(agent: Agent, method: str, *arguments: Any, transfer: int = transfer) -> Awaitable[Any]:
            return ask(agent, method, transfer, *arguments)

        try:
            answers = await _send(file, to, lacks, ask_about_it, put, progress, is_stopped)
        except BaseException:
            with suppress(Exception):
                await asyncio.gather(*(ask_about_it(agent, "drop_file") for agent in to))
            raise
        for at, answer in zip(places, answers, strict=True):
            found[at][number] = answer


class _Progress:
    """Tells and logs how far it is."""

    def __init__(self, total: int, tell: Callable[[int, int], None]) -> None:
        self._total, self._tell = total, tell
        self._sent = 0
        self._what = ""
        self._tell_at = self._log_at = 0.0

    def begin(self, file: NamedFile, to: Sequence[Agent], lacks: Sequence[str]) -> None:
        """Log which file is being sent from now on."""
        size = sum(part["size"] for part in file["parts"])
        hosts = ", ".join(agent.name for agent in to)
        self._what = f"{file['path']} ({size / 1e9:.2f} GB) to {hosts}"
        reasons = "; ".join(f"{agent.name}: {why}" for agent, why in zip(to, lacks, strict=True))
        log.info("sending %s, as it isn't there (%s)", self._what, reasons)
        self._log_at = time.monotonic() + LOG_S

    def add(self, count: int) -> None:
        """Note that so many bytes more have arrived everywhere."""
        self._sent += count
        now = time.monotonic()
        if now >= self._tell_at or self._sent == self._total:
            self._tell_at = now + TELL_S
            self._tell(self._sent, self._total)
        if now >= self._log_at:
            self._log_at = now + LOG_S
            log.info("sending %s: %.0f %% of all", self._what, 100 * self._sent / max(self._total, 1))


async def _send(
    file: NamedFile,
    to: Sequence[Agent],
    lacks: Sequence[str],
    ask: Ask,
    put: Callable[[Any], Any],
    progress: _Progress,
    is_stopped: Callable[[], bool],
) -> list[FoundFile]:
    """Send one file, which may be a folder's several; returns what the hosts have found it to be.

    ``lacks`` says of each host why it can't use what it has itself.
    """
    began_s = time.monotonic()
    pieces = [{"name": part["name"], "size": part["size"]} for part in file["parts"]]
    begin = ("begin_file", file["path"], file["identity"], file["contents"], pieces)
    # Another actor of a host may be long at making room there.
    _check(await _unless_stopped([ask(agent, *begin) for agent in to], file, is_stopped), lacks)

    async def pass_on(number: int, source: str, start: int, count: int) -> None:
        chunk = await asyncio.to_thread(lambda: put(_read(source, start, count, file["path"])))
        _check(await asyncio.gather(*(ask(agent, "write_file", number, start, chunk) for agent in to)), lacks)
        progress.add(count)

    under_way: set[asyncio.Task[None]] = set()
    try:
        for number, part in enumerate(file["parts"]):
            for start in range(0, part["size"], CHUNK_BYTES):
                _go_on(file, is_stopped)
                count = min(CHUNK_BYTES, part["size"] - start)
                under_way.add(asyncio.create_task(pass_on(number, part["source"], start, count)))
                if len(under_way) >= AHEAD:
                    under_way = await _wait(under_way, asyncio.FIRST_COMPLETED)
        await _wait(under_way, asyncio.ALL_COMPLETED)
    finally:
        for task in under_way:
            task.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)
    await asyncio.to_thread(_check_unchanged, file)
    # So may a disk be that writes all of it.
    answers = await _unless_stopped([ask(agent, "end_file", file["main"]) for agent in to], file, is_stopped)
    _check([answer["error"] for answer in answers], lacks)
    log.info("sent %s in %.1f s", file["path"], time.monotonic() - began_s)
    return answers


async def _wait(tasks: set[asyncio.Task[None]], when: str) -> set[asyncio.Task[None]]:
    """Wait for tasks, and return those that still run. Raises what one of them has raised."""
    if not tasks:
        return tasks
    done, rest = await asyncio.wait(tasks, return_when=when)
    for task in done:
        task.result()
    return rest


async def _unless_stopped(
    calls: Sequence[Awaitable[Any]], file: NamedFile, is_stopped: Callable[[], bool]
) -> list[Any]:
    """What calls return. Raises `Refused` if ``is_stopped`` says so first; what was asked for goes on there."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    rest = {*tasks}
    try:
        while rest:
            _go_on(file, is_stopped)
            done, rest = await asyncio.wait(rest, timeout=LOOK_S, return_when=asyncio.FIRST_EXCEPTION)
            for task in done:
                task.result()
        return [task.result() for task in tasks]
    finally:
        for task in rest:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _go_on(file: NamedFile, is_stopped: Callable[[], bool]) -> None:
    """Raises `Refused` if ``is_stopped`` says so."""
    if is_stopped():
        raise Refused(Cancelled(f"cancelled while {file['path']} was sent to other hosts").to_wire())


def _check(errors: Sequence[dict[str, Any] | None], lacks: Sequence[str]) -> None:
    """Raises `Refused` by the first host's error, if there is one, with why that host ``lacks`` the file."""
    for error, why in zip(errors, lacks, strict=True):
        if error is not None:
            raise Refused({**error, "message": f"{error['message']} (what is there by itself: {why})"})


def _read(source: str, start: int, count: int, path: str) -> Any:
    """Part of a file. Raises `Refused` if the file is shorter, or gone."""
    chunk = np.empty(count, np.uint8)
    try:
        with open(source, "rb", buffering=0) as file:
            file.seek(start)
            room = chunk.data
            while room:
                if not (read := file.readinto(room)):
                    raise Refused(_changed(path).to_wire())
                room = room[read:]
    except OSError:
        raise Refused(_changed(path).to_wire()) from None
    return chunk


def _check_unchanged(file: NamedFile) -> None:
    try:
        if read_checkpoint(file["path"]).identity == file["identity"]:
            return
    except ModelError:
        pass
    raise Refused(_changed(file["path"]).to_wire())


def _changed(path: str) -> TacodError:
    return ModelCorrupt(f"{path} has changed while it was sent to other hosts; load it again when it is complete")

"""The actor of one host: it forks the host's ranks as the supervisor does on one machine, and carries their packets."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import psutil

from tacod import __version__, config, logs
from tacod.group.arena import Arena
from tacod.group.processes import Processes, World
from tacod.group.ranks import GroupLost
from tacod.group.ray.cache import Copy, ModelCache, Piece
from tacod.group.ray.claims import make_folder, remove_leavings
from tacod.group.ray.files import FoundFile, NamedFile, found_at, look_for, problem, use_found
from tacod.group.work import Fault
from tacod_client.errors import Cancelled, ProtocolError, TacodError

__all__ = ["Host"]

log = logging.getLogger("tacod.ray")

T = TypeVar("T")

_FOLDER = "tacod-host-"
BOARD_S = 0.5
"""How long a call waits for a change of the board."""
SHORTEST_WAIT_S, LONGEST_WAIT_S = 5e-4, 5e-3
"""How long one look at the board and the next are apart."""


class Host:
    """One host of a group. Ray makes it, and calls its methods on one thread, several at a time.

    Each generation has an epoch; a call for another one does nothing.
    """

    def __init__(self) -> None:
        logs.configure(os.environ.get("TACOD_LOG_LEVEL", "info"))
        # Of actors that were killed.
        remove_leavings(tempfile.gettempdir(), _FOLDER)
        self._folder, self._lock = make_folder(tempfile.gettempdir(), _FOLDER)
        self._processes: Processes | None = None
        self._listening: socket.socket | None = None
        self._epoch = 0
        self._over = 0
        """The last epoch that was ended; calls may overtake each other, so its start may come later."""
        self._world: World | None = None
        self._ended: set[int] = set()
        self._known: set[int] = set()
        """Ranks that have begun."""
        self._taken = 0
        """The last copy of the board that was taken."""
        self._cache = ModelCache("~", 0)
        self._copy: Copy | None = None
        """The model's file that tacod's host sends."""
        self._sent = ""
        """Its path there."""
        self._transfer = 0
        """The number of its transfer; 0 if no file comes."""
        self._removal: asyncio.Future[None] | None = None
        """Removes the last copy that was given up. There is none before it, as a new copy waits for its end."""

    async def describe(self) -> dict[str, Any]:
        """This host's name, its version of tacod, and the devices that Ray has given to this actor."""
        return {"version": __version__, "name": socket.gethostname(), "devices": _devices()}

    async def listen(self, epoch: int) -> str:
        """The address of a socket at which this host's rank 0 will listen for all ranks."""
        import ray

        self._epoch = epoch
        address = ray.util.get_node_ip_address()
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._listening = socket.socket(family, socket.SOCK_STREAM)
        self._listening.bind((address, 0))
        self._listening.listen(1024)
        shown = f"[{address}]" if ":" in address else address
        return f"tcp://{shown}:{self._listening.getsockname()[1]}"

    async def start(self, epoch: int, world: Mapping[str, Any], start: Mapping[str, Any]) -> None:
        """Start this host's ranks of a ``world``, with the settings and the fault in ``start``.

        ``world`` has `World`'s fields, and how many ranks of other groups may be ``beside`` them.
        """
        if epoch <= self._over:
            return
        import ray

        self._end_ranks()
        self._epoch = epoch
        settings = config.Group.model_validate(start["settings"])
        self._cache = ModelCache(settings.model_cache, settings.model_cache_bytes)
        if self._processes is None:
            self._processes = Processes(_devices(), self._folder, start["comfyui"], world["beside"])
        self._world = World(
            tuple(world["hosts"]),
            world["host"],
            world["rendezvous"],
            _interface(ray.util.get_node_ip_address()),
            self._listening.fileno() if self._listening is not None else None,
        )
        self._ended, self._known, self._taken = set(), set(), 0
        fault = Fault.read(start["fault"]) if start["fault"] is not None else None
        self._processes.spawn(settings, fault, self._world)
        self._close_listening()

    async def deliver(
        self,
        epoch: int,
        packet: bytes,
        start: int,
        contents: Any,
        found: Sequence[FoundFile] | None = None,
        refused: dict[str, Any] | None = None,
    ) -> None:
        """Give this host's ranks the packet of a command, whose ``contents`` lie in the arena from ``start`` on.

        A load's files are where they were ``found`` here, or it is ``refused`` with this error.
        """
        arena = self._arena(epoch)
        if arena is None or self._processes is None:
            return
        arena.shrink()
        arena.write(start, contents)
        if found is not None:
            packet = arena.pack(use_found(arena.unpack(packet, copy=True), found, refused))
        with suppress(GroupLost):  # `reports` tells of it
            self._processes.send(packet, None, False)

    async def reports(self, epoch: int) -> list[tuple[Any, ...]]:
        """What this host's ranks have done since the last call, when there is something.

        ``("began", rank, pid)``, ``("packet", rank, packet, start, contents)``, ``("ended", rank, code)`` or
        ``("lost", -1, reason, cause)``.
        """
        while self._arena(epoch) is not None:
            if found := self._look():
                return found
            assert self._processes is not None
            await _readable([source for source in self._processes.sources if not self._is_old(source)])
        return []

    def _is_old(self, source: int) -> bool:
        """Whether it is the descriptor of a rank whose end is known, which stays readable."""
        assert self._processes is not None
        return any(rank.process.fd == source for rank in self._processes.ranks if rank.index in self._ended)

    def _look(self) -> list[tuple[Any, ...]]:
        processes = self._processes
        assert processes is not None
        assert processes.arena is not None
        found: list[tuple[Any, ...]] = []
        packets = list(processes.receive())
        for rank in processes.ranks:
            if rank.index not in self._known:
                self._known.add(rank.index)
                found.append(("began", rank.index, rank.process.pid))
        for sender, packet in packets:
            try:
                start, stop = processes.arena.span(packet)
                found.append(("packet", sender.index, packet, start, bytes(processes.arena.read(start, stop))))
            except ProtocolError as error:
                found.append(("lost", -1, f"rank {sender.index} sent what can't be read ({error.message})", ""))
        for rank in processes.ranks:
            if rank.index not in self._ended and (code := rank.process.poll()) is not None:
                self._ended.add(rank.index)
                found.append(("ended", rank.index, code))
        try:
            processes.check([])
        except GroupLost as lost:
            found.append(("lost", -1, str(lost), lost.cause))
        return found

    async def take_board(self, epoch: int, number: int, board: bytes) -> None:
        """Take the other hosts' numbers from a copy of the board, unless a copy with a higher number came first."""
        arena, world = self._arena(epoch), self._world
        if arena is not None and world is not None and number > self._taken:
            self._taken = number
            others = [rank for rank, host in enumerate(world.hosts) if host != world.host]
            arena.board.take(board, others, stop=True, decision=0 in others)

    async def changed_board(self, epoch: int, seen: bytes) -> bytes:
        """A copy of the board when it is another than the one that was ``seen``, or after a while."""
        until = time.monotonic() + BOARD_S
        wait_s = SHORTEST_WAIT_S
        while (arena := self._arena(epoch)) is not None and self._world is not None:
            copy = arena.board.copy(len(self._world.hosts))
            if copy != seen or time.monotonic() > until:
                return copy
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, LONGEST_WAIT_S)
        return seen

    async def find(self, files: Sequence[NamedFile], roots: Sequence[str]) -> list[FoundFile]:
        """Where this host has these files, within the same roots or in its cache."""
        return await self._with_cache(lambda cache: look_for(files, roots, cache))

    async def _with_cache(self, work: Callable[[ModelCache], T]) -> T:
        """Do something with the cache, in a thread."""
        cache = self._cache
        try:
            return await asyncio.to_thread(work, cache)
        finally:
            if cache is not self._cache:  # other ranks have started meanwhile
                cache.release()

    # A file comes by `begin_file`, `write_file` and `end_file`, or is given up by `drop_file`. They return an error.
    # A write may come so late that the next file is under way. So each transfer has a number, from 1 on.

    async def begin_file(
        self, epoch: int, transfer: int, path: str, key: str, contents: str, pieces: Sequence[Piece]
    ) -> dict[str, Any] | None:
        """Make room in the cache for what lies at a ``path`` on tacod's host."""
        if self._arena(epoch) is None:
            return None
        self._drop_copy()
        self._transfer, self._sent = transfer, path
        # What is being removed still takes room.
        await self._removed()
        if self._transfer != transfer:
            return None
        try:
            copy = await self._with_cache(lambda cache: cache.begin(key, contents, pieces))
        except TacodError as error:
            return problem(path, error)["error"]
        if self._transfer == transfer:
            self._copy = copy
        else:  # it was given up meanwhile
            await asyncio.to_thread(copy.discard)
        return None

    async def write_file(self, epoch: int, transfer: int, piece: int, start: int, chunk: Any) -> dict[str, Any] | None:
        """Take a part of one of its files."""

        def write(copy: Copy) -> None:
            with self._cache.explained():
                copy.write(piece, start, chunk)

        if self._arena(epoch) is not None and self._transfer == transfer and self._copy is not None:
            try:
                await asyncio.to_thread(write, self._copy)
            except TacodError as error:
                return problem(self._sent, error)["error"]
        return None

    async def end_file(self, epoch: int, transfer: int, main: str) -> FoundFile:
        """Put it into the cache, and find it there."""
        path, copy = self._sent, self._copy
        if self._arena(epoch) is None or self._transfer != transfer or copy is None:
            return problem(path, Cancelled("its ranks have ended"))
        self._copy, self._transfer = None, 0

        def add(cache: ModelCache) -> FoundFile:
            return found_at(path, cache.add(copy, main))

        try:
            return await self._with_cache(add)
        except TacodError as error:
            return problem(path, error)

    async def drop_file(self, epoch: int, transfer: int) -> None:
        """Give up what has come of a file, and wait until that is removed."""
        if epoch == self._epoch and self._transfer == transfer:
            self._drop_copy()
            await self._removed()

    def _drop_copy(self) -> None:
        copy, self._copy, self._transfer = self._copy, None, 0
        if copy is not None:
            # Not here: it waits for a thread that writes.
            self._removal = asyncio.get_running_loop().run_in_executor(None, copy.discard)

    async def _removed(self) -> None:
        """Wait until nothing is left of a copy that was given up."""
        if self._removal is not None:
            await self._removal

    async def stacks(self, ranks: Sequence[int]) -> dict[int, str]:
        """Where these ranks hang."""
        return await asyncio.to_thread(self._processes.stacks, ranks) if self._processes is not None else {}

    async def kill(self, epoch: int) -> None:
        """End this host's ranks of an epoch, and never start any of it again; the fork server stays."""
        self._over = max(self._over, epoch)
        if epoch == self._epoch:
            self._end_ranks()
            self._close_listening()

    def _end_ranks(self) -> None:
        self._epoch = 0
        self._drop_copy()
        if self._processes is not None:
            self._processes.kill()
        self._cache.release()

    async def close(self) -> None:
        """End everything, and leave nothing."""
        await self.kill(self._epoch)
        if self._processes is not None:
            self._processes.close()
        await self._removed()
        shutil.rmtree(self._folder, ignore_errors=True)
        os.close(self._lock)

    def _arena(self, epoch: int) -> Arena | None:
        """The arena of a generation, as long as it runs."""
        return self._processes.arena if epoch == self._epoch and self._processes is not None else None

    def _close_listening(self) -> None:
        if self._listening is not None:
            self._listening.close()
            self._listening = None


async def _readable(descriptors: Sequence[int]) -> None:
    """Wait until one of these is readable, or for a moment: ranks may be killed meanwhile."""
    loop, ready = asyncio.get_running_loop(), asyncio.Event()
    for descriptor in descriptors:
        loop.add_reader(descriptor, ready.set)
    try:
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(ready.wait(), 0.5)
    finally:
        for descriptor in descriptors:
            loop.remove_reader(descriptor)


def _devices() -> list[str]:
    """The names of the devices that this actor holds: GPUs as nvidia-smi numbers them, or CPUs."""
    import ray

    gpus = ray.get_runtime_context().get_accelerator_ids().get("GPU", [])
    if gpus:
        return [str(gpu) for gpu in gpus]
    return [f"cpu:{index}" for index in range(int(ray.get_runtime_context().get_assigned_resources().get("CPU", 0)))]


def _interface(address: str) -> str:
    """The name of the network interface with this address; empty if none has it, as behind a translated address."""
    if ipaddress.ip_address(address).is_loopback:
        return "lo"
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address.partition("%")[0] == address for each in addresses):
            return name
    return ""

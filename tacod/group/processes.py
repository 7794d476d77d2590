"""The ranks as processes: one per device, forked together and ended together."""

from __future__ import annotations

import bisect
import itertools
import json
import logging
import os
import secrets
import signal
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from tacod import config
from tacod.group.arena import PACKET_BYTES, Arena
from tacod.group.descriptors import send_fds
from tacod.group.fork_server import Child, ForkServer
from tacod.group.ranks import GroupLost, Rank
from tacod.group.ray.version import check_installed
from tacod.group.work import Command, Fault, Progress

__all__ = ["ON_GPUS", "LocalRank", "Processes", "World", "cause", "devices", "ending"]

log = logging.getLogger(__name__)

STACKS_S = 1.0
"""How long ranks have to write their stacks; a stopped one never does."""
ON_GPUS = {
    "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    # In a CUDA graph NCCL would have the other ranks map what it sends and receives, as one piece each, which memory in
    # such segments is not: ranks then hang in a replay (https://github.com/pytorch/pytorch/issues/158029).
    "NCCL_GRAPH_REGISTER": "0",
}
"""Environment variables of a GPU's rank."""


class World(NamedTuple):
    """All ranks of a group that several hosts have, seen from one of the hosts."""

    hosts: tuple[int, ...]
    """The number of the host of each rank."""
    host: int
    """This one's number."""
    rendezvous: str
    """``tcp://`` address at which rank 0 listens."""
    interface: str
    """The network interface by which the other hosts reach this one; empty to leave that to NCCL and gloo."""
    listening: int | None = None
    """On rank 0's host, the descriptor of the socket that listens there."""

    @property
    def indexes(self) -> list[int]:
        """The ranks of this host."""
        return [rank for rank, host in enumerate(self.hosts) if host == self.host]


@dataclass
class LocalRank(Rank):
    """A rank that is a child of this process."""

    process: Child
    channel: socket.socket = field(kw_only=True)
    """One end of a pair of unix sockets; the rank has the other."""
    mute: bool = False
    """Whether its end of the channel is closed, which happens when it ends."""

    def send(self, packet: bytes, descriptors: Sequence[int] = ()) -> None:
        """Send it a packet, with descriptors, without waiting. Raises `GroupLost` if it can't take one."""
        try:
            if descriptors:
                send_fds(self.channel, packet, descriptors, socket.MSG_DONTWAIT)
            else:
                self.channel.send(packet, socket.MSG_DONTWAIT)
        except OSError as error:
            raise GroupLost(f"rank {self.index} (pid {self.process.pid}) is not reachable: {error}") from None

    def receive(self) -> bytes | None:
        """Its next packet, or None."""
        if self.mute:
            return None
        try:
            packet = self.channel.recv(PACKET_BYTES, socket.MSG_DONTWAIT)
        except (BlockingIOError, ConnectionResetError):  # the latter: it has ended and left something unread
            return None
        self.mute = not packet
        return packet or None


def devices(groups: Sequence[config.Group]) -> list[list[str]]:
    """The devices of each group's ranks: ``cpu:0`` …, or GPUs by the index or UUID that nvidia-smi shows.

    For Ray, as many names as ranks: it chooses the devices. Raises `config.ConfigError` for a GPU that isn't there or
    that two groups have, if there is none at all, or not a share for each.
    """
    if groups[0].launcher == "ray":
        check_installed()
        return [[f"ray:{index}" for index in range(group.ranks)] for group in groups]
    if groups[0].device == "cpu":
        numbers = itertools.count()
        return [[f"cpu:{next(numbers)}" for _ in range(group.ranks)] for group in groups]
    uuids = _uuids()
    if not uuids:
        raise config.ConfigError(
            "group.gpus: the driver shows no GPU; if `nvidia-smi -L` lists some, let tacod see them (a container's or "
            'service\'s devices), else set group.device = "cpu"'
        )
    found = []
    for group in groups:
        key = "group" if len(groups) == 1 else f"group.{group.name}"
        wanted = group.gpus if group.gpus is not None else list(range(len(uuids)))
        for gpu in wanted:
            if gpu not in uuids and not (isinstance(gpu, int) and gpu < len(uuids)):
                seen = f"0 to {len(uuids) - 1}" if len(uuids) > 1 else "0 alone"
                raise config.ConfigError(f"{key}.gpus: no GPU {gpu!r}; nvidia-smi shows {seen}")
        try:
            group.check_shares(len(wanted))
        except ValueError as error:
            raise config.ConfigError(f"{key}: {error}") from None
        found.append(wanted)
    named = [(gpu, group.name) for group, wanted in zip(groups, found, strict=True) for gpu in wanted]
    try:
        # One of them may go by its index here, and by its UUID there.
        config.check_apart([uuids[gpu] if isinstance(gpu, int) else gpu for gpu, _ in named], named)
    except ValueError as error:
        raise config.ConfigError(f"group: {error}") from None
    return [[str(gpu) for gpu in wanted] for wanted in found]


def _uuids() -> list[str]:
    """The UUIDs of this machine's GPUs, in nvidia-smi's order. Raises `config.ConfigError` if the driver tells none."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise config.ConfigError(
            f'group.device: no NVIDIA driver answers ({error}); on a machine without GPUs set group.device = "cpu"'
        ) from None
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        return [pynvml.nvmlDeviceGetUUID(handle) for handle in handles]
    except pynvml.NVMLError as error:
        raise config.ConfigError(
            f"group.gpus: the driver can't tell which GPUs there are ({error}); `nvidia-smi` and `dmesg` say more"
        ) from None
    finally:
        pynvml.nvmlShutdown()


class Processes:
    """The rank processes, one generation after the other. Each generation has an epoch, and leaves nothing behind.

    ``folder`` is where the ranks of a generation find each other, ``comfyui`` the ComfyUI whose networks they may run.
    They share the host's cores with the ranks of other groups, so many ``beside`` them. See `Launcher`.
    """

    room: int | None = None
    """As many ranks as devices, always."""
    sent: Progress | None = None
    """All read the same file."""

    def __init__(self, devices: list[str], folder: Path, comfyui: str | None = None, beside: int = 0) -> None:
        self.devices = devices
        self._comfyui = comfyui
        self._beside = beside
        self.ranks: list[LocalRank] = []
        self.arena: Arena | None = None
        """The memory that they share with the supervisor, as long as they run."""
        self._folder = folder
        self._epoch = ""
        """Part of the names of the ranks' files, so that one generation doesn't see what an earlier one left."""
        self._server: ForkServer | None = None
        self._devices: dict[int, str] = {}
        """Of this generation's ranks."""
        self._channels: dict[int, socket.socket] = {}
        """Those of the ranks that are not there yet."""

    @property
    def starter(self) -> str:
        """The process that ranks are forked from."""
        return f"the process that forks them (tacod.group.fork_server, pid {self._server.pid if self._server else 0})"

    @property
    def sources(self) -> list[int]:
        """File descriptors that become readable when ranks begin, report or end."""
        channels = [rank.channel.fileno() for rank in self.ranks if not rank.mute]
        server = self._server.sources if self._server is not None else []
        return [*channels, *(rank.process.fd for rank in self.ranks), *server]

    def spawn(self, settings: config.Group, fault: Fault | None = None, world: World | None = None) -> None:
        """Start a new epoch of ranks, with a ``fault`` on purpose; with a ``world``, those of it that this host has.

        `admit` takes them in as they begin; they report when they are ready.
        """
        assert not self.ranks
        self._check_server()
        if self._server is None:
            environment = _environment(settings.device, self.devices, "lo" if world is None else world.interface)
            self._server = ForkServer(settings.device, self._folder, environment)
        self._epoch = secrets.token_hex(8)
        self.arena = Arena()
        indexes = range(len(self.devices)) if world is None else world.indexes
        self._devices = dict(zip(indexes, self.devices, strict=True))
        listening = [] if world is None or world.listening is None else [world.listening]
        for index in indexes:
            self._channels[index], other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            for end in (self._channels[index], other):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * PACKET_BYTES)
            hosts = [0] * len(self.devices) if world is None else world.hosts
            arguments = [
                *("--rank", str(index), "--world-size", str(len(hosts)), "--device", settings.device),
                *("--rendezvous", str(self._rendezvous) if world is None else world.rendezvous),
                *("--stacks", str(self._stacks(index))),
                *(() if world is None else ("--hosts", ",".join(map(str, hosts)))),
                *(() if settings.cuda_graphs else ("--no-cuda-graphs",)),
                *(() if settings.peer_memory else ("--no-peer-memory",)),
                *(() if settings.warm_up else ("--no-warm-up",)),
                *("--prefix-bytes", str(settings.prefix_bytes)),
                *(() if not self._beside else ("--beside", str(self._beside), "--label", f"group {settings.name}, ")),
                *(() if self._comfyui is None else ("--comfyui", self._comfyui)),
                *(("--fault", json.dumps(fault.body())) if fault is not None else ()),
            ]
            with other:
                more = listening if index == 0 else []
                self._server.fork(index, arguments, other.fileno(), self.arena.fd, *more)
        log.info("starting %d ranks on %s", len(self.devices), ", ".join(self.devices))
        self.admit()

    def send(self, packet: bytes, command: Command | None, watched: bool, descriptors: Sequence[int] = ()) -> None:
        """See `Launcher.send`."""
        for rank in self.ranks:
            rank.send(packet, descriptors)

    def receive(self) -> Iterator[tuple[Rank, bytes]]:
        """See `Launcher.receive`."""
        self.admit()
        for rank in self.ranks:
            while (packet := rank.receive()) is not None:
                yield rank, packet

    def admit(self) -> None:
        """Take in the ranks that have begun."""
        for index, process in self._server.forked() if self._server is not None else ():
            rank = LocalRank(index, self._devices[index], process, channel=self._channels.pop(index))
            bisect.insort(self.ranks, rank, key=lambda each: each.index)

    def kill(self) -> None:
        """End all ranks at once and reap them; nothing of this epoch remains."""
        for rank in self.ranks:
            rank.process.kill()
        for rank in self.ranks:
            rank.process.wait()
            rank.channel.close()
        self.ranks.clear()
        if self._channels:
            # Some may have begun since the last look.
            self.close()
            for channel in self._channels.values():
                channel.close()
            self._channels.clear()
        for index in self._devices:
            self._stacks(index).unlink(missing_ok=True)
        if self.arena is not None:
            self.arena.close()
            self.arena = None
        self._rendezvous.unlink(missing_ok=True)
        self._epoch = ""

    def close(self) -> None:
        """End the fork server; the next ranks start another one."""
        if self._server is not None:
            self._server.stop()

    def check(self, ranks: Iterable[Rank]) -> None:
        """Raise `GroupLost` if one of these has ended, or the fork server before they were all there."""
        self._check_server()
        ended = [(rank, code) for rank in ranks if (code := rank.process.poll()) is not None]
        if ended:
            # Those that exit may have fallen over one that a signal ended.
            rank, code = min(ended, key=lambda each: each[1] >= 0)
            reason = f"rank {rank.index} ({rank.device}, pid {rank.process.pid}) {ending(code)}"
            raise GroupLost(reason, cause=cause(code))

    def _check_server(self) -> None:
        if self._server is None or (code := self._server.poll()) is None:
            return
        reason = f"the process that ranks are forked from (pid {self._server.pid}) {ending(code)}"
        if self._channels:
            raise GroupLost(reason, cause=cause(code))
        log.warning("%s; the next start of ranks takes longer", reason)

    def log_stacks(self, ranks: Iterable[Rank]) -> None:
        """Log where these ranks hang. Each writes to a file of its own, so that their lines don't mix."""
        for index, stacks in self.stacks([rank.index for rank in ranks]).items():
            log.error("rank %d: %s", index, stacks)

    def stacks(self, indexes: Iterable[int]) -> dict[int, str]:
        """Where these ranks hang, by index; takes `STACKS_S`."""
        hanging = [rank for rank in self.ranks if rank.index in {*indexes}]
        for rank in hanging:
            rank.process.send_signal(signal.SIGUSR1)
        time.sleep(STACKS_S)
        found = {}
        for rank in hanging:
            path = self._stacks(rank.index)
            stacks = path.read_text(errors="replace").rstrip() if path.exists() else ""
            found[rank.index] = stacks or "no stacks: it is stopped, or has not begun"
        return found

    def _stacks(self, index: int) -> Path:
        return self._folder / f"stacks-{self._epoch}-{index}"

    @property
    def _rendezvous(self) -> Path:
        return self._folder / f"rendezvous-{self._epoch}"


_NOT_INHERITED = {
    *("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_FDS", "LISTEN_PID"),
    *("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "CUDA_DEVICE_MAX_CONNECTIONS"),
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"),
}


def _environment(kind: str, devices: Sequence[str], interface: str = "lo") -> dict[str, str]:
    """A rank's environment: it has the devices of its host's ranks, and no settings meant for other programs.

    Each rank uses the device at its own place; it sees the others so that it can write into their memory.
    """
    env = {key: value for key, value in os.environ.items() if key not in _NOT_INHERITED}
    if kind == "cuda":
        env.update(ON_GPUS, CUDA_VISIBLE_DEVICES=",".join(devices))
    else:
        env.update(CUDA_VISIBLE_DEVICES="")
    # If all ranks are on this machine, its network's interfaces, or a lack of one, are no concern of theirs.
    for variable in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME") if interface else ():
        env.setdefault(variable, interface)
    return env


_FROM_OUTSIDE = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""Signals by which people and the kernel end a process that did nothing wrong."""


def cause(code: int) -> str:
    """The cause of a loss by such an exit code, if it would come again."""
    return "" if -code in _FROM_OUTSIDE else ending(code)


def ending(code: int) -> str:
    """In words, how a process with this exit code has ended; a signal's number is below zero."""
    if code >= 0:
        return f"exited with code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"

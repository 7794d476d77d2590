"""The supervisor's side of ranks on Ray: it talks to the bridge, and sees ranks as if they were children.

Messages to and from the bridge are packets on a unix socket: a letter for the kind, then JSON, or a rank's packet.
"""

from __future__ import annotations

import bisect
import json
import logging
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tacod import config
from tacod.group.arena import PACKET_BYTES, Arena
from tacod.group.descriptors import send_fds
from tacod.group.processes import cause, ending
from tacod.group.ranks import GroupLost, Rank
from tacod.group.work import Command, Fault, Load, Progress

__all__ = ["CONTROL", "LOAD", "MODULE", "PACKET", "RANK", "WATCHED", "RayLauncher"]

log = logging.getLogger(__name__)

MODULE = "tacod.group.ray.bridge"
CONTROL, PACKET, WATCHED, LOAD = b"c", b"p", b"w", b"l"
"""Kinds of messages: JSON; a rank's packet; one of a command whose forwards are watched; one of a load."""
RANK = struct.Struct("<H")
"""Before a packet from a rank, its number."""
MESSAGE_BYTES = 4 * PACKET_BYTES
STACKS_S = 5.0
"""How long the bridge has to say where ranks hang; on the hosts it takes a second."""
CLOSE_S = 5.0
"""How long the bridge has to end."""
_ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0", "RAY_COLOR_PREFIX": "0"}


class RemoteProcess:
    """A rank's process on another host, as the bridge tells of it."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.code: int | None = None

    def poll(self) -> int | None:
        """See `Process.poll`."""
        return self.code


class RayLauncher:
    """See `Launcher`. One bridge serves one generation after the other, and keeps the hosts' fork servers warm."""

    def __init__(self, settings: config.Group, folder: Path, comfyui: str | None = None, beside: int = 0) -> None:
        """``beside`` is how many ranks other groups have on the cluster."""
        self.devices = ["a device of the cluster"] * settings.ranks
        self.ranks: list[Rank] = []
        self.arena: Arena | None = None
        self.room: int | None = None
        self.sent: Progress | None = None
        self._command = [sys.executable, "-m", MODULE, settings.ray_address or "auto", str(folder)]
        self._comfyui = comfyui
        self._beside = beside
        self._asked = settings.ranks
        self._least = settings.min_ranks or settings.ranks
        """Fewer ranks are no group; at first all are asked for, and later what `Group.fewest_ranks` says."""
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._epoch = 0
        self._killed = 0
        """The last epoch that the bridge has ended."""
        self._hosts: list[str] = []
        self._stacks: dict[str, str] | None = None
        self._lost: Exception | None = None
        self._joined = True
        """Whether the bridge may be in the cluster; one that could not join it is of no more use."""
        self._has_run = False
        """Whether there were ranks before."""

    @property
    def starter(self) -> str:
        """See `Launcher.starter`."""
        return f"what starts them on Ray ({MODULE}, pid {self._process.pid if self._process else 0})"

    @property
    def sources(self) -> list[int]:
        """See `Launcher.sources`."""
        return [self._socket.fileno()] if self._socket is not None else []

    def spawn(self, settings: config.Group, fault: Fault | None = None) -> None:
        """See `Launcher.spawn`."""
        assert not self.ranks
        if self._socket is None:
            self._start_bridge()
        self._epoch += 1
        self._lost, self.room, self.sent = None, None, None
        self.devices, self._hosts = ["a device of the cluster"] * self._asked, []
        self.arena = Arena()
        request = {
            "verb": "start",
            "epoch": self._epoch,
            "least": settings.fewest_ranks if self._has_run else self._least,
            "settings": settings.model_dump(exclude_unset=True),
            "comfyui": self._comfyui,
            "beside": self._beside,
            "fault": fault.body() if fault is not None else None,
        }
        log.info("starting %d ranks on the Ray cluster %s", self._asked, settings.ray_address or "auto")
        self._tell(request, [self.arena.fd])

    def _start_bridge(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (self._socket, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8 * MESSAGE_BYTES)
        self._socket.setblocking(False)
        environment = {key: value for key, value in os.environ.items() if key not in ("NOTIFY_SOCKET", "WATCHDOG_PID")}
        with theirs:
            self._process = subprocess.Popen(
                self._command, env={**environment, **_ENVIRONMENT}, stdin=theirs.fileno(), start_new_session=True
            )
        self._killed, self._joined = self._epoch, True

    def _tell(self, request: dict[str, Any], descriptors: Sequence[int] = ()) -> None:
        self._send(CONTROL + json.dumps(request).encode(), descriptors)

    def _send(self, message: bytes, descriptors: Sequence[int] = ()) -> None:
        # If the bridge has died, `check` says so; one that doesn't read is told apart there too, by its deadline.
        with suppress(OSError):
            assert self._socket is not None
            send_fds(self._socket, message, descriptors, socket.MSG_DONTWAIT)

    def send(self, packet: bytes, command: Command | None, watched: bool, descriptors: Sequence[int] = ()) -> None:
        """See `Launcher.send`; descriptors stay on this machine, so there can be none."""
        assert not descriptors
        self.sent = None
        self._send((LOAD if isinstance(command, Load) else WATCHED if watched else PACKET) + packet)

    def receive(self) -> Iterator[tuple[Rank, bytes]]:
        """See `Launcher.receive`."""
        while (message := self._next()) is not None:
            kind, contents = message[:1], message[1:]
            if kind == CONTROL:
                self._take(json.loads(contents))
                continue
            (index,) = RANK.unpack_from(contents)
            rank = next((rank for rank in self.ranks if rank.index == index), None)
            if rank is not None:
                yield rank, contents[RANK.size :]

    def _next(self) -> bytes | None:
        if self._socket is None:
            return None
        with suppress(OSError):
            return self._socket.recv(MESSAGE_BYTES, socket.MSG_DONTWAIT) or None
        return None

    def _take(self, told: dict[str, Any]) -> None:
        """Take in what the bridge tells; of an earlier generation it may only tell that that has ended."""
        what = told["what"]
        if what == "killed":
            self._killed = max(self._killed, told["epoch"])
        if told["epoch"] != self._epoch or self.arena is None:
            return
        if what == "placed":
            self._note_placed(told["hosts"], told["devices"])
        elif what == "began":
            index = told["rank"]
            rank = Rank(index, self.devices[index], RemoteProcess(told["pid"]), self._hosts[index])
            bisect.insort(self.ranks, rank, key=lambda each: each.index)
            self._has_run = True
        elif what == "ended":
            for rank in self.ranks:
                if rank.index == told["rank"] and isinstance(rank.process, RemoteProcess):
                    rank.process.code = told["code"]
        elif what == "lost":
            self._joined = told.get("joined", True)
            # Not at a later start: then it is no fault of the configuration's, which has served before.
            wrong = told.get("configuration", False) and not self._has_run
            self._lost = (
                config.ConfigError(f"group: {told['reason']}")
                if wrong
                else GroupLost(told["reason"], cause=told["cause"])
            )
        elif what == "room":
            self.room = told["ranks"]
        elif what == "sent":
            self.sent = Progress(told["sent"], told["total"])
        elif what == "stacks":
            self._stacks = told["stacks"]

    def _note_placed(self, hosts: list[str], devices: list[str]) -> None:
        self._hosts, self.devices = hosts, devices
        by_host = [f"{host} ({', '.join(_of(host, hosts, devices))})" for host in dict.fromkeys(hosts)]
        text = "starting %d ranks on %s"
        if len(hosts) < self._asked:
            text = f"{text}: fewer than group.ranks = {self._asked}, until the cluster has room for more"
            log.warning(text, len(hosts), ", ".join(by_host))
        else:
            log.info(text, len(hosts), ", ".join(by_host))

    def check(self, ranks: Iterable[Rank]) -> None:
        """See `Launcher.check`. Raises `config.ConfigError` if the first ranks can't be, as the cluster is now."""
        if self._process is not None and (code := self._process.poll()) is not None:
            raise self._lost or GroupLost(f"{self.starter} {ending(code)}", cause=cause(code))
        ended = [(rank, code) for rank in ranks if (code := rank.process.poll()) is not None]
        if ended:
            rank, code = min(ended, key=lambda each: each[1] >= 0)
            where = f"{rank.device} of {rank.host}, pid {rank.process.pid}"
            raise GroupLost(f"rank {rank.index} ({where}) {ending(code)}", cause=cause(code))
        if self._lost is not None:
            raise self._lost

    def log_stacks(self, ranks: Iterable[Rank]) -> None:
        """See `Launcher.log_stacks`."""
        self._stacks = None
        self._tell({"verb": "stacks", "epoch": self._epoch, "ranks": [rank.index for rank in ranks]})
        until = time.monotonic() + STACKS_S
        while self._stacks is None and time.monotonic() < until:
            for _ in self.receive():
                pass  # it comes too late: these ranks are about to end
            time.sleep(0.01)
        found: dict[str, str] = self._stacks or {"?": "no stacks: the hosts don't answer"}
        for index, stacks in found.items():
            log.error("rank %s: %s", index, stacks)

    def kill(self) -> None:
        """See `Launcher.kill`. The hosts end the ranks meanwhile; new ones wait for that."""
        if self._socket is not None and self.arena is not None:
            for _ in self.receive():
                pass
            ended = self._process is not None and self._process.poll() is not None
            if self._killed < self._epoch - 1 or not self._joined or ended:
                # It doesn't even end the generation before, or has nothing to end. Ray ends the actors of a client
                # that is gone.
                self._end_bridge(0.0)
            else:
                self._tell({"verb": "kill", "epoch": self._epoch})
        self.ranks.clear()
        if self.arena is not None:
            self.arena.close()
            self.arena = None

    def close(self) -> None:
        """See `Launcher.close`."""
        self._end_bridge(CLOSE_S)

    def _end_bridge(self, patience_s: float) -> None:
        if self._process is None or self._socket is None:
            return
        self._socket.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(patience_s)
        self._process.kill()
        self._process.wait()
        self._process = self._socket = None


def _of(host: str, hosts: Sequence[str], devices: Sequence[str]) -> list[str]:
    return [device for each, device in zip(hosts, devices, strict=True) if each == host]

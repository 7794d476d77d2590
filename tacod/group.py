"""The rank group: one process per device, which live and die together.

The group is the unit of recovery. A rank that dies, hangs or disagrees takes the others with it: SIGKILL all, reap,
spawn anew. Each generation of ranks is an epoch, and what an earlier epoch says is not listened to.
"""

from __future__ import annotations

import enum
import json
import logging
import os
import secrets
import signal
import subprocess
import sys
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import zmq

from tacod import config
from tacod.faults import Faults
from tacod_client import wire
from tacod_client.errors import ProtocolError, TacodError
from tacod_client.frames import receive, send, widen
from tacod_client.wire import Message, Tensor

__all__ = ["Answer", "Rank", "RankGroup", "State", "devices"]

log = logging.getLogger(__name__)

STACKS_S = 0.3
"""How long a rank gets to write its stacks; one that is stopped never does."""
AGREE_S = 5.0
"""After one rank reports a failure, the others have this long to say the same; else they count as stuck."""


CACHE_TENSORS = 8192
"""Client tensors that each rank keeps, however small."""


class State(enum.Enum):
    """What the group is doing."""

    DOWN = "down"
    STARTING = "starting"
    IDLE = "idle"
    BUSY = "busy"


@dataclass
class Rank:
    """One process and what it last said."""

    index: int
    device: str
    process: subprocess.Popen[bytes]
    pidfd: int
    peer: bytes | None = None
    """Its address on the ranks' socket, once it is ready."""
    memory_used_bytes: int = 0
    progress: tuple[int, int] | None = None
    """Bytes done and bytes in all, of the load that it works on."""


@dataclass
class Answer:
    """What all ranks made of one work item: rank 0's body, or the error that they agree on."""

    body: dict[str, Any] = field(default_factory=dict)
    error: TacodError | None = None
    elapsed_s: float = 0.0


class GroupLost(Exception):
    """The ranks can't be trusted any more; says why."""

    def __init__(self, reason: str, error: TacodError | None = None) -> None:
        super().__init__(reason)
        self.error = error
        """What one of them gave as the reason, if the others didn't agree."""


def devices(group: config.Group) -> list[str]:
    """The ranks' devices: ``cpu:0`` …, or GPUs by the index or UUID that nvidia-smi shows.

    Raises `config.ConfigError` for a GPU that isn't there.
    """
    if group.device == "cpu":
        return [f"cpu:{index}" for index in range(group.ranks)]
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise config.ConfigError(
            f'group.device: no NVIDIA driver answers ({error}); on a machine without GPUs set group.device = "cpu"'
        ) from None
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        uuids = [pynvml.nvmlDeviceGetUUID(handle) for handle in handles]
    finally:
        pynvml.nvmlShutdown()
    wanted = group.gpus if group.gpus is not None else list(range(len(uuids)))
    for gpu in wanted:
        if gpu not in uuids and not (isinstance(gpu, int) and gpu < len(uuids)):
            raise config.ConfigError(f"group.gpus: no GPU {gpu!r}; nvidia-smi shows 0 to {len(uuids) - 1}")
    return [str(gpu) for gpu in wanted]


class RankGroup:
    """Spawns the ranks, hands each work item to all of them, collects one answer.

    The owner polls `socket` and the ranks' `pidfds`, calls `receive` and `check`, and acts on `GroupLost`.
    """

    def __init__(self, settings: config.Group, devices: list[str], context: zmq.Context[Any], folder: Path) -> None:
        self.settings = settings
        self.devices = devices
        self.folder = folder
        self.state = State.DOWN
        self.ranks: list[Rank] = []
        self.restarts = 0
        self.faults: Faults | None = None
        """What goes wrong on purpose."""
        self.deadline: float | None = None
        """When the ranks count as stuck, on the monotonic clock."""
        self._epoch = ""
        self._work = 0
        self._verb = ""
        self._started_s = 0.0
        self._answers: dict[int, Message] = {}
        self._resident: OrderedDict[bytes, int] = OrderedDict()
        self._forgotten: list[str] = []
        self._death_pipe: tuple[int, int] | None = None
        self.socket: zmq.Socket[bytes] = context.socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self.socket.setsockopt(zmq.SNDHWM, 0)
        self.address = f"ipc://{folder}/ranks.sock"
        self.socket.bind(self.address)

    @property
    def world_size(self) -> int:
        """How many ranks there are to be."""
        return len(self.devices)

    @property
    def pidfds(self) -> list[int]:
        """File descriptors that become readable when a rank ends."""
        return [rank.pidfd for rank in self.ranks]

    def spawn(self) -> None:
        """Start a new epoch of ranks; they report when they are ready."""
        assert self.state is State.DOWN
        self._epoch = secrets.token_hex(8)
        self._resident.clear()
        self._forgotten.clear()
        fault = self.faults.due("start") if self.faults is not None else None
        read, write = os.pipe()
        self._death_pipe = (read, write)
        for index, device in enumerate(self.devices):
            process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "tacod.rank"),
                    *("--rank", str(index), "--world-size", str(self.world_size), "--device", self.settings.device),
                    *("--address", self.address, "--epoch", self._epoch, "--death-fd", str(read)),
                    *("--rendezvous", f"file://{self.folder}/rendezvous-{self._epoch}"),
                    *("--stacks", str(self._stacks(index))),
                    *(() if self.settings.cuda_graphs else ("--no-cuda-graphs",)),
                    *(() if self.settings.peer_memory else ("--no-peer-memory",)),
                    *(("--fault", json.dumps(fault)) if fault is not None else ()),
                ],
                env=_environment(self.settings.device, self.devices),
                pass_fds=(read,),
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
            self.ranks.append(Rank(index, device, process, os.pidfd_open(process.pid)))
        self.state = State.STARTING
        self.deadline = time.monotonic() + self.settings.start_timeout_s
        log.info("starting %d ranks on %s", self.world_size, ", ".join(self.devices))

    def kill(self) -> None:
        """End all ranks at once and reap them; nothing of this epoch remains."""
        for rank in self.ranks:
            rank.process.kill()
        for rank in self.ranks:
            rank.process.wait()
            os.close(rank.pidfd)
            self._stacks(rank.index).unlink(missing_ok=True)
        self.ranks.clear()
        if self._death_pipe is not None:
            for fd in self._death_pipe:
                os.close(fd)
            self._death_pipe = None
        (self.folder / f"rendezvous-{self._epoch}").unlink(missing_ok=True)
        self._epoch = ""
        self.state = State.DOWN
        self.deadline = None

    def close(self) -> None:
        """Kill the ranks and give up the socket."""
        self.kill()
        self.socket.close()

    def check(self, now: float) -> None:
        """Raise `GroupLost` if a rank ended or is over its deadline."""
        self._check_ended(self.ranks)
        if self.deadline is not None and now > self.deadline:
            missing = [rank for rank in self.ranks if not self._has_answered(rank)]
            names = ", ".join(f"rank {rank.index} (pid {rank.process.pid})" for rank in missing)
            self._log_stacks(missing)
            if self.state is State.STARTING:
                raise GroupLost(f"{names} not ready after {self.settings.start_timeout_s:g} s (group.start_timeout_s)")
            error = self._error()
            said = f"; another rank said: {error.message}" if error is not None else ""
            waited_s = now - self._started_s
            raise GroupLost(f"{names} stuck: no answer to {self._verb} within {waited_s:.1f} s{said}", error)

    def _log_stacks(self, ranks: Iterable[Rank]) -> None:
        """Where the ranks hang. Each has a file for that: in one log their lines would be mixed."""
        for rank in ranks:
            rank.process.send_signal(signal.SIGUSR1)
        time.sleep(STACKS_S)
        for rank in ranks:
            stacks = self._stacks(rank.index).read_text(errors="replace") if self._stacks(rank.index).exists() else ""
            log.error("rank %d: %s", rank.index, stacks.rstrip() or "no stacks: it is stopped, or has not begun")

    def _stacks(self, index: int) -> Path:
        return self.folder / f"stacks-{self._epoch}-{index}"

    @staticmethod
    def _check_ended(ranks: Iterable[Rank]) -> None:
        ended = [(rank, code) for rank in ranks if (code := rank.process.poll()) is not None]
        if ended:
            # Those that exit may have fallen over one that a signal ended.
            rank, code = min(ended, key=lambda each: each[1] >= 0)
            raise GroupLost(f"rank {rank.index} ({rank.device}, pid {rank.process.pid}) {_ending(code)}")

    def _error(self) -> TacodError | None:
        """The error that a rank has answered with, if one has."""
        failed = (answer for _, answer in sorted(self._answers.items()) if answer.type == "failed")
        return next((TacodError.from_wire(answer.body["error"]) for answer in failed), None)

    def _has_answered(self, rank: Rank) -> bool:
        return rank.peer is not None if self.state is State.STARTING else rank.index in self._answers

    def run(self, verb: str, body: dict[str, Any], tensors: Iterable[Tensor], timeout_s: float) -> None:
        """Hand one work item to every rank. ``tensors`` are the stored ones that ``body`` may name by digest.

        Raises `GroupLost` if a rank is gone.
        """
        assert self.state is State.IDLE
        self._work += 1
        self._verb = verb
        self._answers.clear()
        body = {**body, "store": self._admit(tensors), "evict": self._evict(), "forget": self._forgotten}
        self._forgotten = []
        if self.faults is not None and (fault := self.faults.due(verb)) is not None:
            body["fault"] = fault
        frames = wire.encode(Message(verb, body, self._work))
        for rank in self.ranks:
            assert rank.peer is not None
            rank.progress = None
            try:
                send(self.socket, [rank.peer, *frames])
            except zmq.ZMQError as error:
                raise GroupLost(f"rank {rank.index} (pid {rank.process.pid}) is not reachable: {error}") from None
        self.state = State.BUSY
        self._started_s = time.monotonic()
        self.deadline = self._started_s + timeout_s

    def forget(self, job: str) -> None:
        """Have the ranks drop what they hold of a sampling run, with the next work item."""
        self._forgotten.append(job)

    def _admit(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """Those tensors that the ranks don't keep yet: they travel with their bytes, once."""
        fresh = []
        for tensor in tensors:
            assert tensor.digest is not None
            if tensor.digest not in self._resident:
                fresh.append(tensor)
            self._resident[tensor.digest] = tensor.nbytes
            self._resident.move_to_end(tensor.digest)
        return fresh

    def _evict(self) -> list[bytes]:
        """Digests that the ranks are to drop after this work item, least recently used first."""
        evicted = []
        while sum(self._resident.values()) > self.settings.cache_bytes or len(self._resident) > CACHE_TENSORS:
            evicted.append(self._resident.popitem(last=False)[0])
        return evicted

    def receive(self) -> Answer | None:
        """Take in what ranks have sent. Returns the answer when the last rank has answered.

        Raises `GroupLost` if they disagree, or if one says that it is broken.
        """
        while (received := receive(self.socket)) is not None:
            peer, *frames = received
            try:
                message = wire.decode([frame.buffer for frame in frames])
            except ProtocolError as error:
                raise GroupLost(f"a rank sent what can't be read ({error.message})") from None
            if message.type == "ready":
                widen(peer)
                self._greet(peer.bytes, message)
            elif message.id != self._work or self.state is not State.BUSY:
                continue
            elif message.type == "progress":
                self._note_progress(peer.bytes, message)
            else:
                answer = self._collect(peer.bytes, message)
                if answer is not None:
                    return answer
        return None

    def _greet(self, peer: bytes, message: Message) -> None:
        if message.body["epoch"] != self._epoch:
            return
        rank = self.ranks[message.body["rank"]]
        rank.peer = peer
        rank.memory_used_bytes = message.body["memory_used_bytes"]
        if all(rank.peer is not None for rank in self.ranks):
            self.state = State.IDLE
            self.deadline = None

    @property
    def progress(self) -> tuple[int, int] | None:
        """How far the slowest rank's load is; None if not all have said."""
        known = [rank.progress for rank in self.ranks if rank.progress is not None]
        return min(known) if known and len(known) == len(self.ranks) else None

    def _note_progress(self, peer: bytes, message: Message) -> None:
        for rank in self.ranks:
            if rank.peer == peer:
                rank.progress = (message.body["done"], message.body["total"])

    def _collect(self, peer: bytes, message: Message) -> Answer | None:
        rank = next((rank for rank in self.ranks if rank.peer == peer), None)
        if rank is None:
            return None
        self._answers[rank.index] = message
        if message.type == "broken":
            # A rank raises too when another one dies under it, and that is then the reason.
            self._check_ended(rank for rank in self.ranks if rank.index not in self._answers)
            raise GroupLost(f"rank {rank.index} ({rank.device}) raised:\n{message.body['traceback']}")
        rank.memory_used_bytes = message.body["memory_used_bytes"]
        if len(self._answers) < len(self.ranks):
            if message.type == "failed" and self.deadline is not None:
                self.deadline = min(self.deadline, time.monotonic() + AGREE_S)
            return None
        self.state = State.IDLE
        self.deadline = None
        return self._agree(time.monotonic() - self._started_s)

    def _agree(self, elapsed_s: float) -> Answer:
        first = self._answers[0]
        codes = {
            (answer.type, answer.body["error"]["code"] if answer.type == "failed" else "")
            for answer in self._answers.values()
        }
        if len(codes) > 1:
            told = "; ".join(f"rank {index}: {answer.type}" for index, answer in sorted(self._answers.items()))
            raise GroupLost(f"the ranks disagree about one work item ({told})", self._error())
        if first.type == "failed":
            return Answer(error=self._error(), elapsed_s=elapsed_s)
        return Answer(body=first.body, elapsed_s=elapsed_s)


def _environment(kind: str, devices: Sequence[str]) -> dict[str, str]:
    """A rank's environment: the group's devices alone, and no allocator settings meant for someone else's process.

    Each rank uses the one at its own index; it sees the others to write into their memory.
    """
    env = {key: value for key, value in os.environ.items() if key not in _NOT_INHERITED}
    if kind == "cuda":
        env.update(CUDA_DEVICE_ORDER="PCI_BUS_ID", CUDA_VISIBLE_DEVICES=",".join(devices))
        env.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    else:
        env.update(CUDA_VISIBLE_DEVICES="")
    # All ranks are on this machine; the name of its network interface, or a lack of one, is no concern of theirs.
    for variable in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        env.setdefault(variable, "lo")
    return env


_NOT_INHERITED = {
    *("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_FDS", "LISTEN_PID"),
    *(
        "PYTORCH_CUDA_ALLOC_CONF",
        "PYTORCH_ALLOC_CONF",
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "MASTER_ADDR",
        "MASTER_PORT",
    ),
}


def _ending(code: int) -> str:
    if code >= 0:
        return f"exited with code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"

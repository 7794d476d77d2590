"""A rank: join the group, prove that it computes, then do what the supervisor says until its end."""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import gc
import json
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from typing import Any

import torch

from tacod import logs
from tacod.group.arena import PACKET_BYTES, Arena
from tacod.heap import keep_freed_memory
from tacod.rank.comm import process_groups
from tacod.rank.comm.select import reach
from tacod.rank.cores import usable_cores
from tacod.rank.engine import Engine
from tacod.rank.failure import failure
from tacod.rank.fault import strike
from tacod.rank.parallel.topology import Topology
from tacod.rank.selftest import selftest
from tacod_client.errors import TacodError
from tacod_client.wire import Message

log = logging.getLogger("tacod.rank")

PR_SET_PDEATHSIG = 1
AWAKE_S = 0.02
"""How long a GPU's rank stays awake for the next work item."""


def main() -> None:
    """The process's life."""
    args = _parse()
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, file=args.stacks, all_threads=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    channel = socket.socket(fileno=args.channel)
    _die_with_the_supervisor(channel)
    keep_freed_memory()
    logs.configure(os.environ.get("TACOD_LOG_LEVEL", "info"), prefix=f"rank {args.rank}: ")
    if args.fault is not None:
        strike(args.fault, "before", args.rank)
    device = torch.device("cuda", args.rank) if args.device == "cuda" else torch.device("cpu")
    if device.type == "cpu":
        torch.set_num_threads(max(1, int(usable_cores() / args.world_size)))
    else:
        torch.cuda.set_device(device)
        # fp32 means fp32, in the one convolution too.
        torch.backends.cudnn.allow_tf32 = False
    make_group = process_groups.join(device, args.rank, args.world_size, args.rendezvous, device.index or 0)
    # What was imported stays; to look for garbage in it would take a tenth of a second at every load.
    gc.freeze()
    by = reach if device.type == "cuda" and not args.no_peer_memory else None
    topology = Topology(args.rank, args.world_size, make_group, by)
    engine = Engine(device, topology, graphs=not args.no_cuda_graphs, warm=not args.no_warm_up)
    selftest(engine)
    serve(engine, channel, Arena(args.arena))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tacod.rank", description="One rank of tacod; tacod starts it.")
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--world-size", type=int, required=True)
    parser.add_argument("--device", choices=["cuda", "cpu"], required=True)
    parser.add_argument("--channel", type=int, required=True, help="file descriptor by which the supervisor is heard")
    parser.add_argument("--rendezvous", required=True)
    parser.add_argument("--arena", type=int, required=True, help="file descriptor of the memory in common")
    parser.add_argument("--stacks", type=argparse.FileType("w"), required=True, help="where SIGUSR1 writes them")
    parser.add_argument("--no-cuda-graphs", action="store_true")
    parser.add_argument("--no-peer-memory", action="store_true")
    parser.add_argument("--no-warm-up", action="store_true")
    parser.add_argument("--fault", type=json.loads, help="what goes wrong on purpose, as JSON")
    return parser.parse_args()


def _die_with_the_supervisor(channel: socket.socket) -> None:
    """However the supervisor ends: the kernel kills its children, a stopped one too.

    It does so only for a supervisor that ends after this call. For the time before there is the channel, whose other
    end the supervisor holds open as long as it lives.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    def wait() -> None:
        hangup = select.poll()
        hangup.register(channel, 0)
        hangup.poll()
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def serve(engine: Engine, channel: socket.socket, arena: Arena) -> None:
    """Answer work items as long as the supervisor lives. Between two the rank waits here, never in a collective."""
    channel.send(arena.pack(Message("ready", {"memory_used_bytes": engine.memory_used_bytes})))
    # Where every rank may keep a core to itself, and as many are left.
    wakeful = engine.device.type == "cuda" and usable_cores() > 2 * engine.topology.world_size
    while True:
        packet = (wakeful and _look_out(channel)) or channel.recv(PACKET_BYTES)
        if not packet:
            return
        # What the supervisor sends is readable; if it isn't, this rank ends, and a new one starts with a clean slate.
        message = arena.unpack(packet)
        reporter = Reporter(channel, arena, message.id)
        engine.report, engine.forwards.begins = reporter, reporter.begin_forward
        kind, body = _answer(engine, message)
        channel.send(arena.pack(Message(kind, body, message.id), start=arena.end))
        if kind == "broken":
            sys.exit(1)


def _look_out(channel: socket.socket) -> bytes:
    """Look for a packet without sleeping, for a while: a core that has slept takes a millisecond to be itself again.

    A sampler's next step is mostly there within it.
    """
    until = time.monotonic() + AWAKE_S
    while time.monotonic() < until:
        with suppress(BlockingIOError):
            return channel.recv(PACKET_BYTES, socket.MSG_DONTWAIT)
    return b""


class Reporter:
    """Tells the supervisor how far a load is, ten times a second at most, and of each forward that begins."""

    EVERY_S = 0.1

    def __init__(self, channel: socket.socket, arena: Arena, work: int) -> None:
        self._channel = channel
        self._arena = arena
        self._work = work
        self._next_s = 0.0
        self._begun = False

    def __call__(self, done: int, total: int) -> None:
        """So many bytes of so many are loaded."""
        now = time.monotonic()
        if now >= self._next_s or done == total:
            self._next_s = now + self.EVERY_S
            self._tell("progress", {"done": done, "total": total})

    def begin_forward(self) -> None:
        """A forward begins. That of the first is in the time of the work item, and isn't told."""
        if self._begun:
            self._tell("begun", {})
        self._begun = True

    def _tell(self, kind: str, body: dict[str, int]) -> None:
        self._channel.send(self._arena.pack(Message(kind, body, self._work), start=self._arena.end))


def _answer(engine: Engine, message: Message) -> tuple[str, dict[str, Any]]:
    fault = message.body.pop("fault", None)
    rank, begun = engine.topology.rank, engine.topology.clock.begun
    try:
        if fault is not None:
            strike(fault, "before", rank, engine)
        body = engine.work(message.type, message.body)
        if fault is not None:
            strike(fault, "after", rank, engine)
        return "done", body
    except TacodError as error:
        return "failed", {"error": error.to_wire(), "memory_used_bytes": engine.memory_used_bytes}
    except Exception as error:
        log.exception("%s failed", message.type)
        return failure(engine, error, begun)


if __name__ == "__main__":
    main()

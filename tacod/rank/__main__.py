"""Entry point of a rank: join the process group, run the self-test, then do the supervisor's commands."""

from __future__ import annotations

import argparse
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
from collections.abc import Sequence
from contextlib import suppress
from functools import partial

import torch

from tacod import logs, prctl
from tacod.group.arena import PACKET_BYTES, Arena
from tacod.group.descriptors import recv_fds
from tacod.group.work import (
    Begun,
    Broken,
    Envelope,
    Failed,
    Fault,
    Final,
    Forward,
    Progress,
    Ready,
    read_envelope,
    report_message,
)
from tacod.heap import keep_freed_memory
from tacod.rank.comm import process_groups
from tacod.rank.comm.select import reach
from tacod.rank.completion import Completion
from tacod.rank.cores import usable_cores
from tacod.rank.engine import Engine
from tacod.rank.failure import failure
from tacod.rank.fault import inject
from tacod.rank.forward.watch import Watch
from tacod.rank.oom import clear_tracebacks
from tacod.rank.parallel.topology import Topology
from tacod.rank.selftest import selftest
from tacod_client.errors import TacodError

log = logging.getLogger("tacod.rank")

BUSY_POLL_S = 0.02
"""How long a GPU's rank polls for the next command without sleeping."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the rank until the supervisor ends; ``arguments`` are those of the command line."""
    args = _parse(arguments)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, file=args.stacks, all_threads=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    channel = socket.socket(fileno=args.channel)
    _die_with_the_supervisor(channel)
    keep_freed_memory()
    logs.configure(os.environ.get("TACOD_LOG_LEVEL", "info"), prefix=f"{args.label}rank {args.rank}: ")
    if args.fault is not None:
        inject(args.fault, "before", args.rank)
    # Of this host's ranks.
    place, neighbours = args.hosts[: args.rank].count(args.hosts[args.rank]), args.hosts.count(args.hosts[args.rank])
    device = torch.device("cuda", place) if args.device == "cuda" else torch.device("cpu")
    if device.type == "cpu":
        torch.set_num_threads(max(1, int(usable_cores() / (neighbours + args.beside))))
    else:
        torch.cuda.set_device(device)
        # fp32 means fp32, in the one convolution too.
        torch.backends.cudnn.allow_tf32 = False
    make_group = process_groups.join(
        device, args.rank, args.world_size, args.rendezvous, device.index or 0, args.listening
    )
    # What was imported stays; to look for garbage in it would take a tenth of a second at every load.
    gc.freeze()
    by = reach if device.type == "cuda" and not args.no_peer_memory else None
    topology = Topology(args.rank, args.world_size, make_group, by, args.hosts)
    engine = Engine(
        device, topology, not args.no_cuda_graphs, not args.no_warm_up, args.prefix_bytes, comfyui=args.comfyui
    )
    selftest(engine)
    # Where every rank of the host may keep a core to itself, and as many are left.
    busy_polls = device.type == "cuda" and usable_cores() > 2 * (neighbours + args.beside)
    serve(engine, channel, Arena(args.arena), busy_polls)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tacod.rank", description="One rank of tacod; tacod starts it.")
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--world-size", type=int, required=True)
    parser.add_argument("--device", choices=["cuda", "cpu"], required=True)
    parser.add_argument("--channel", type=int, required=True, help="file descriptor of the socket to the supervisor")
    parser.add_argument("--rendezvous", required=True, help="path of a file, or tcp://HOST:PORT of rank 0")
    parser.add_argument("--listening", type=int, help="of rank 0: descriptor of the socket that listens there")
    parser.add_argument("--hosts", type=_hosts, help="the number of each rank's host, such as 0,0,1; one by default")
    parser.add_argument("--arena", type=int, required=True, help="file descriptor of the shared memory")
    parser.add_argument("--stacks", type=argparse.FileType("w"), required=True, help="where SIGUSR1 writes them")
    parser.add_argument("--no-cuda-graphs", action="store_true")
    parser.add_argument("--no-peer-memory", action="store_true")
    parser.add_argument("--no-warm-up", action="store_true")
    parser.add_argument("--prefix-bytes", type=int, required=True, help="limit for the prefixes that are kept")
    parser.add_argument("--beside", type=int, default=0, help="how many ranks of other groups use this host's cores")
    parser.add_argument("--label", default="", help="what its log lines begin with, if there are several groups")
    parser.add_argument("--comfyui", help="folder of the ComfyUI whose networks may be run")
    parser.add_argument("--fault", type=lambda text: Fault(**json.loads(text)), help="a fault on purpose, as JSON")
    args = parser.parse_args(arguments)
    args.hosts = args.hosts or (0,) * args.world_size
    return args


def _hosts(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def _die_with_the_supervisor(channel: socket.socket) -> None:
    """Have this process end with the supervisor.

    If that ends before the kernel has been asked for it, the rank notices by the channel, which closes.
    """
    prctl.die_with_parent()

    def wait() -> None:
        hangup = select.poll()
        hangup.register(channel, 0)
        hangup.poll()
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def serve(engine: Engine, channel: socket.socket, arena: Arena, busy_polls: bool = False) -> None:
    """Do commands as long as the supervisor lives. Between two commands the rank waits here, never in a collective."""
    channel.send(arena.pack(report_message(Ready(engine.memory_used_bytes))))
    while True:
        packet, descriptors = (_busy_poll(channel) if busy_polls else None) or _receive(channel)
        if not packet:
            return
        # What the supervisor sends is readable; if it isn't, this rank ends, and a new one starts with a clean slate.
        envelope = read_envelope(arena.unpack(packet))
        for memory in envelope.unmapped:
            engine.memories.drop(memory)
        if envelope.mapped is not None:
            engine.memories.add(*envelope.mapped, *descriptors)
        reporter = Reporter(channel, arena, envelope.id)
        engine.report, engine.forwards.begins = reporter.report_bytes, reporter.begin_forward
        engine.forwards.watch = _watch(engine, envelope, arena) if envelope.watched else None
        engine.completion = _completion(engine, envelope, arena)
        report = _do(engine, envelope)
        reporter.send(report)
        if isinstance(report, Broken):
            sys.exit(1)


def _watch(engine: Engine, envelope: Envelope, arena: Arena) -> Watch:
    """What follows the forwards of a command, and has faults on purpose in their blocks."""
    fault, rank, world_size = envelope.fault, engine.topology.rank, engine.topology.world_size

    def before_block(block: int) -> None:
        if fault is not None and fault.block in (None, block):
            inject(fault, "block", rank, engine)

    return Watch(arena.board, envelope.id, rank, world_size, engine.device.type == "cuda", before_block)


def _completion(engine: Engine, envelope: Envelope, arena: Arena) -> Completion | None:
    """How the client hears of a command's completion from this rank; None if it doesn't."""
    command, fault = envelope.command, envelope.fault
    if engine.topology.rank != 0 or envelope.request is None or not isinstance(command, Forward):
        return None
    memory = engine.memories.get(command.memory)
    if memory is None or memory.channel is None:
        return None
    if fault is None:
        return Completion(arena.board, envelope, memory.channel)
    return Completion(arena.board, envelope, memory.channel, partial(inject, fault, rank=0, engine=engine))


def _receive(channel: socket.socket, flags: int = 0) -> tuple[bytes, list[int]]:
    """The next packet and the descriptors that came with it; an empty one when the supervisor has ended."""
    return recv_fds(channel, PACKET_BYTES, 2, flags)


def _busy_poll(channel: socket.socket) -> tuple[bytes, list[int]] | None:
    """Poll for a packet without sleeping, for `BUSY_POLL_S`: a core that slept takes a millisecond to reach full speed.

    A sampler's next step mostly comes within that time.
    """
    until = time.monotonic() + BUSY_POLL_S
    while time.monotonic() < until:
        with suppress(BlockingIOError):
            return _receive(channel, socket.MSG_DONTWAIT)
    return None


class Reporter:
    """Sends reports about one command: its progress, ten times a second at most, each forward that begins, its end."""

    EVERY_S = 0.1

    def __init__(self, channel: socket.socket, arena: Arena, envelope: int) -> None:
        self._channel = channel
        self._arena = arena
        self._envelope = envelope
        self._next_s = 0.0
        self._begun = False

    def report_bytes(self, done: int, total: int) -> None:
        """Report a load's progress in bytes."""
        now = time.monotonic()
        if now >= self._next_s or done == total:
            self._next_s = now + self.EVERY_S
            self.send(Progress(done, total))

    def begin_forward(self) -> None:
        """Report that a forward begins. The first one runs in the command's own time limit, and isn't reported."""
        if self._begun:
            self.send(Begun())
        self._begun = True

    def send(self, report: Progress | Begun | Final) -> None:
        """Send a report; its tensors are written after the command's."""
        self._channel.send(self._arena.pack(report_message(report, self._envelope), start=self._arena.end))


def _do(engine: Engine, envelope: Envelope) -> Final:
    fault, begun = envelope.fault, engine.topology.clock.begun
    try:
        if fault is None:
            return engine.work(envelope)
        return engine.work(envelope, partial(inject, fault, rank=engine.topology.rank, engine=engine))
    except TacodError as error:
        # The report lives until the next one, and with it would what a load had read of a file that it refused.
        clear_tracebacks(error)
        return Failed(engine.memory_used_bytes, error)
    except Exception as error:
        log.exception("%s failed", envelope.command.verb)
        return failure(engine, error, begun)


if __name__ == "__main__":
    main()

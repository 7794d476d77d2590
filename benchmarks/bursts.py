"""What clients make the supervisor hold, and how much of it is given back.

    PYTHONPATH=tests python benchmarks/bursts.py [--memory-mib N] [BURST ...]

A daemon is started for each kind of burst, with a tiny SD3 on one CPU rank. The table has the supervisor's own memory
in MiB (resident, less what it shares with the ranks): before, at the most, when the client went, and 10 s later. Exit
code 1 says that more than 100 MiB were left, or that the daemon didn't answer a good request at the end.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import zmq
from faults.bare import BarePeer
from helpers import SD3, Daemon, answered

from tacod_client.wire import Message, Tensor, encode

MIB = 1 << 20
LATER_S = 10.0
LEFT_MIB = 100.0
HEAD = b"TACO\x01"


def own_mib(pid: int) -> float:
    """The memory of a process that is its own."""
    _, resident, shared, *_ = map(int, Path(f"/proc/{pid}/statm").read_text().split())
    return (resident - shared) * 4096 / MIB


class Speaker:
    """A DEALER socket with a session."""

    def __init__(self, daemon: Daemon) -> None:
        self._context: zmq.Context[Any] = zmq.Context()
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.connect(daemon.endpoint)
        self.say("hello", {"client": "burst", "pid": 1, "version": "0"})
        self.session = b""
        self.session = answered(self.socket, 30).body["session"]

    def __enter__(self) -> Speaker:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()
        self._context.term()

    def say(self, kind: str, body: dict[str, Any]) -> None:
        """A request, whose answer isn't waited for."""
        session = self.session if kind != "hello" else b""
        self.socket.send_multipart(encode(Message(kind, body, 1, session)), copy=False)

    def junk(self, frames: int, nbytes: int, messages: int = 1, wait: bool = True) -> None:
        """Messages of frames that no message has, and the daemon's answers to them."""
        frame = bytes(nbytes)
        for _ in range(messages):
            self.socket.send_multipart([HEAD, *[frame] * frames], copy=False)
            if wait:
                answered(self.socket, 60)


def tensor(nbytes: int, value: int = 0) -> Tensor:
    """Bytes as a tensor, in the frames that it travels in."""
    contents = memoryview(bytes([value]) * nbytes)
    return Tensor("U8", (nbytes,), tuple(contents[at : at + 8 * MIB] for at in range(0, nbytes, 8 * MIB)))


def refused(frames: int, mib: int, messages: int = 1) -> Callable[[Daemon], None]:
    """Messages that are refused, one after the other."""

    def burst(daemon: Daemon) -> None:
        with Speaker(daemon) as speaker:
            speaker.junk(frames, mib * MIB, messages)

    return burst


def too_large(daemon: Daemon) -> None:
    """Good messages of more than limits.message_bytes."""
    with Speaker(daemon) as speaker:
        for _ in range(4):
            speaker.say("put", {"tensors": [tensor(300 * MIB)] * 2})
            answered(speaker.socket, 60)


def begun(mib: int, frames: int) -> Callable[[Daemon], None]:
    """A message that never ends, and stays."""

    def burst(daemon: Daemon) -> None:
        with BarePeer(str(daemon.socket)) as peer:
            frame = bytes(mib * MIB) if mib else bytes(16)
            for _ in range(frames // 1000 if not mib else frames):
                if not (peer.say(frame) if mib else peer.say(frame, times=1000)):
                    break
            time.sleep(2)

    return burst


def unread(daemon: Daemon) -> None:
    """Errors of many bytes for a client that reads none."""
    with Speaker(daemon) as speaker:
        for _ in range(300):
            speaker.say("ping", {})
        for _ in range(20):
            speaker.junk(1, 8 * MIB, wait=False)
        time.sleep(2)


def silent_connections(daemon: Daemon) -> None:
    """Five hundred connections that never say hello, and each begins a message."""
    with ExitStack() as stack:
        peers = [stack.enter_context(BarePeer(str(daemon.socket))) for _ in range(500)]
        for peer in peers:
            peer.say(bytes(MIB))
        time.sleep(2)


def headers(daemon: Daemon) -> None:
    """Headers that take many times their bytes as objects."""
    body: dict[str, Any] = {"a": [[{} for _ in range(1000)] for _ in range(1000)]}
    with Speaker(daemon) as speaker:
        for _ in range(10):
            speaker.say("put", body)
            answered(speaker.socket, 60)


def stored(daemon: Daemon) -> None:
    """Tensors for the store, more than it keeps; it is full by design, and here it may take 64 MiB."""
    with Speaker(daemon) as speaker:
        for value in range(16):
            speaker.say("put", {"tensors": [tensor(48 * MIB, value)]})
            answered(speaker.socket, 60)


def queued(daemon: Daemon) -> None:
    """Forwards with large arguments, more than the ranks can refuse at once."""
    with daemon.client() as client, Speaker(daemon) as speaker:
        model = client.load(SD3.file)
        large = Tensor("F32", (1, 16, 2048, 2048), tensor(256 * MIB).frames)
        for _ in range(24):
            arguments = {"x": large, "timestep": Tensor("F32", (1,), (bytes(4),)), "nonsense": large}
            speaker.say("forward", {"model": model.id, "plan": "auto", "arguments": arguments})
        time.sleep(10)


BURSTS: dict[str, Callable[[Daemon], None]] = {
    "6 messages with a frame of 64 MiB": refused(1, 64, 6),
    "30 messages with a frame of 64 MiB": refused(1, 64, 30),
    "one message of 20 frames of 64 MiB": refused(20, 64),
    "200 messages with a frame of 8 MiB": refused(1, 8, 200),
    "4 messages of 600 MiB": too_large,
    "a message that never ends, 100 frames of 64 MiB": begun(64, 100),
    "a message that never ends, 2,000,000 small frames": begun(0, 2_000_000),
    "answers that nobody reads": unread,
    "500 connections that say no hello": silent_connections,
    "headers of a million maps": headers,
    "tensors for a full store": stored,
    "queued forwards of 512 MiB": queued,
}


@contextmanager
def watched(pid: int, most: list[float]) -> Iterator[None]:
    """Within, see how much it holds at the most."""
    over = threading.Event()

    def work() -> None:
        while not over.wait(0.01):
            most[0] = max(most[0], own_mib(pid))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def main() -> int:
    """Run them; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory-mib", type=int, help="limits.memory_bytes, in MiB; by default the daemon's")
    parser.add_argument("burst", nargs="*", help="words of those to run; all if left out")
    args = parser.parse_args()
    settings: dict[str, Any] = {"heartbeat_s": 60.0, "limits.store_bytes": 64 * MIB}
    if args.memory_mib is not None:
        settings["limits.memory_bytes"] = args.memory_mib * MIB
    fine = True
    print("| burst | before | most | at its end | 10 s after | answers |\n| --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory(prefix="tacod-") as models:
        SD3.save(Path(models))
        for name, burst in BURSTS.items():
            if args.burst and not any(word in name for word in args.burst):
                continue
            with Daemon(1, [Path(models)], settings, cold=True) as daemon:
                with daemon.client() as client:
                    SD3.check(client.load(SD3.file))
                time.sleep(1)
                before, most = own_mib(daemon.pid), [0.0]
                with watched(daemon.pid, most):
                    burst(daemon)
                there = own_mib(daemon.pid)
                time.sleep(LATER_S)
                after = own_mib(daemon.pid)
                answers = "yes"
                try:
                    with daemon.client() as client:
                        SD3.check(client.load(SD3.file))
                except Exception as error:
                    answers = type(error).__name__
                fine &= answers == "yes" and after < before + LEFT_MIB
                cells = [f"{value:.0f}" for value in (before, most[0], there, after)]
                print(f"| {name} | {' | '.join(cells)} | {answers} |", flush=True)
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())

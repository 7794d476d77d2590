"""Messages that are none: each costs its sender an error that names the field; the daemon answers the next good one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import msgpack
import pytest
import zmq
from helpers import SOON_S, Daemon, answered, unharmed
from protocol.test_mutations import VALID, damage

from tacod_client import Client, TacodError, wire

from .stranger import Stranger

DAMAGED = 10_000


def packed(**changes: Any) -> bytes:
    """A message's header frame, with some fields changed; ``None`` takes a field away."""
    header = {"type": "ping", "id": 7, "session": b"", "tensors": [], "body": {}, **changes}
    return bytes(msgpack.packb({key: value for key, value in header.items() if value is not None}))


HEAD = b"TACO\x01"
TENSOR = {"dtype": "F32", "shape": [2]}
REF = msgpack.ExtType(1, bytes(4))
JUNK: dict[str, tuple[list[bytes], str]] = {
    "one frame": ([HEAD], "at least 2 frames"),
    "empty frames": ([b"", b""], "frame 0"),
    "fifty frames": ([HEAD, packed(), *[b"rest"] * 48], "48 left over"),
    "a thousand empty frames": ([b""] * 1000, "frame 0"),
    "an HTTP request": ([b"GET / HTTP/1.1\r\n", b"Host: x\r\n"], "frame 0"),
    "another version": ([b"TACO\x63", packed()], "protocol version 99"),
    "no msgpack": ([HEAD, b"\xc1\xff" * 50], "frame 1"),
    "truncated msgpack": ([HEAD, packed()[:-3]], "frame 1"),
    "deep msgpack": ([HEAD, b"\x91" * 100_000], "frame 1"),
    "no map": ([HEAD, msgpack.packb([1, 2])], "expected a msgpack map"),
    "a field missing": ([HEAD, packed(session=None)], "'session'"),
    "a field too many": ([HEAD, packed(extra=1)], "'extra'"),
    "a field of another type": ([HEAD, packed(body=[])], "body"),
    "an unknown type": ([HEAD, packed(type="format")], "'format'"),
    "a negative id": ([HEAD, packed(id=-1)], "id"),
    "a deep body": ([HEAD, packed(body={"a": [[[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]]]})], "nested"),
    "an unknown dtype": ([HEAD, packed(tensors=[{"dtype": "F33", "shape": [1]}])], "F33"),
    "a negative size": ([HEAD, packed(tensors=[{"dtype": "F32", "shape": [-1]}])], "shape"),
    "a huge size": ([HEAD, packed(tensors=[{"dtype": "F32", "shape": [1 << 40, 1 << 40]}])], "shape"),
    "too few bytes": ([HEAD, packed(tensors=[TENSOR], body={"x": REF}), bytes(7)], r"tensors\[0\]"),
    "no bytes": ([HEAD, packed(tensors=[TENSOR], body={"x": REF})], r"tensors\[0\]"),
    "a frame left over": ([HEAD, packed(), b"rest"], "left over"),
    "a tensor that nobody names": ([HEAD, packed(tensors=[TENSOR]), bytes(8)], "exactly once"),
    "a tensor named that isn't there": ([HEAD, packed(body={"x": REF})], "tensor 0"),
    "a bad digest": ([HEAD, packed(tensors=[{**TENSOR, "digest": b"short"}], body={"x": REF}), bytes(8)], "digest"),
}


@contextmanager
def raw_socket(daemon: Daemon) -> Iterator[Callable[[list[bytes]], wire.Message]]:
    """Send frames as they are, and get what the daemon answers."""
    context: zmq.Context[Any] = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.LINGER, 0)
    socket.connect(daemon.endpoint)

    def ask(frames: list[bytes]) -> wire.Message:
        socket.send_multipart(frames)
        return answered(socket, SOON_S)

    try:
        yield ask
    finally:
        socket.close()
        context.term()


@pytest.mark.parametrize("case", JUNK)
def test_junk(sturdy: Daemon, client: Client, case: str) -> None:
    frames, words = JUNK[case]
    with raw_socket(sturdy) as ask:
        with unharmed(client):
            answer = ask(frames)
        assert answer.type == "error"
        error = TacodError.from_wire(answer.body)
        assert type(error).__name__ == "ProtocolError"
        with pytest.raises(type(error), match=words):
            raise error


def test_a_session_belongs_to_its_connection(sturdy: Daemon, client: Client) -> None:
    with unharmed(client), raw_socket(sturdy) as ask, raw_socket(sturdy) as other:
        hello = {"client": "test", "pid": 1, "version": "0"}
        welcome = ask([HEAD, packed(type="hello", body=hello)])
        session = welcome.body["session"]
        assert ask([HEAD, packed(session=session)]).type == "done"
        assert other([HEAD, packed(session=session)]).type == "unknown_session"
        assert other([HEAD, packed(session=b"guess")]).type == "unknown_session"


def test_requests_with_bad_bodies(sturdy: Daemon, client: Client) -> None:
    with unharmed(client), raw_socket(sturdy) as ask:
        session = ask([HEAD, packed(type="hello", body={"client": "t", "pid": 1, "version": "0"})]).body["session"]
        for kind, body, argument in (
            ("ping", {"extra": 1}, "extra"),
            ("load", {"path": 5, "dtype": None, "patches": None, "plan": "auto"}, "path"),
            ("load", {"path": "x"}, "dtype"),
            ("cancel", {"job": 3, "request": None}, "job"),
            ("forward", {"model": "m", "plan": "auto", "arguments": []}, "arguments"),
            ("put", {"tensors": [1]}, "tensors.0"),
            ("hello", {"client": "x" * 5000, "pid": 1, "version": "0"}, "client"),
        ):
            answer = ask([HEAD, packed(type=kind, session=session, body=body)])
            assert (answer.type, answer.body["code"], answer.body["details"]["argument"]) == (
                "error",
                "ArgumentError",
                argument,
            )
        answer = ask([HEAD, packed(type="forward", session=session, body={"model": "m", "plan": 0, "arguments": {}})])
        assert answer.body["code"] == "ModelNotFound"


def test_a_put_without_bytes_is_refused(sturdy: Daemon, client: Client) -> None:
    with unharmed(client), raw_socket(sturdy) as ask:
        session = ask([HEAD, packed(type="hello", body={"client": "t", "pid": 1, "version": "0"})]).body["session"]
        bare = {**TENSOR, "digest": bytes(32), "bytes": False}
        answer = ask([HEAD, packed(type="put", session=session, tensors=[bare], body={"tensors": [REF]})])
        assert answer.body["code"] == "ArgumentError"


def test_damage_in_thousands(sturdy: Daemon, client: Client) -> None:
    random = Random(0)
    with Stranger(sturdy.endpoint) as stranger:
        for _ in range(DAMAGED):
            frames = random.choice(VALID)
            for _ in range(random.randint(1, 3)):
                frames = damage(frames, random.randbytes(4))
            stranger.say(frames)
        stranger.settle()
        assert stranger.by_channel > DAMAGED / 2
    with unharmed(client):
        pass


def test_a_fuzzer_that_looks_for_new_ways_through_the_decoder() -> None:
    """A short run of scripts/fuzz; what it found when it ran for long is in docs/operations.md."""
    pytest.importorskip("atheris", reason="atheris has no wheel for this Python")
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, root / "benchmarks" / "fuzz.py", "--messages", "2000"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr

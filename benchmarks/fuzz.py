"""Mutated messages for the decoder, chosen by the ways through it that they find; a living daemon hears each of them.

    scripts/fuzz [--messages N] [--seed N] [--corpus FOLDER]

atheris (libFuzzer) mutates sound messages, runs our codec and the requests' checks on them, and keeps those that reach
new code. Each message is said to a real daemon too, which is asked a good question after every 50. Exit code 1 says
that the codec raised something else than its error, that a tensor held what it doesn't say, or that the daemon was
gone, was another one, computed something wrong, or held more than before.
"""

from __future__ import annotations

import argparse
import os
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

MORE_BYTES = 8 << 20
"""A message that left 1 KiB behind would be 100 MiB after 100,000."""
WORDS = (
    *("type", "id", "session", "tensors", "body", "dtype", "shape", "digest", "bytes", "F32", "BF16", "hello", "put"),
    *("offset", "memory", "room", "share", "nbytes"),
)
LARGEST = 4096
INSTRUMENTED = ["msgpack", "tacod.serving.messages", "tacod_client.wire", "tacod_client.decoder"]


def join(frames: Sequence[bytes]) -> bytes:
    """Frames as one input of the fuzzer: each after its length."""
    return b"".join(struct.pack("<H", len(frame)) + frame for frame in frames)


def split(data: bytes) -> list[bytes]:
    """Frames from an input; a length that is too large takes what is there."""
    frames = []
    while len(data) >= 2:
        (size,) = struct.unpack_from("<H", data)
        frames.append(data[2 : 2 + size])
        data = data[2 + size :]
    return frames


def ask_for_memory(endpoint: str, packet: bytes) -> None:
    """Say it on the socket that hands out memory, too, and don't wait for the answer."""
    from tacod_client.wire import MEMORY_SOCKET, SHARE_BYTES

    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as asking, suppress(OSError):
        asking.setblocking(False)
        asking.connect(endpoint.removeprefix("ipc://") + MEMORY_SOCKET)
        asking.send(packet[:SHARE_BYTES])


def mutate(args: argparse.Namespace) -> None:
    """Be the fuzzer; its end is this process's."""
    # The compiled unpacker has no ways that could be seen.
    os.environ["MSGPACK_PUREPYTHON"] = "1"
    import atheris

    with atheris.instrument_imports(include=INSTRUMENTED):
        import msgpack.fallback  # noqa: F401

        import tacod.serving.messages
        import tacod_client.decoder
        import tacod_client.wire  # noqa: F401
    from faults.stranger import Stranger
    from protocol.test_mutations import VALID, check

    for number, frames in enumerate(VALID):
        (Path(args.corpus) / f"valid-{number}").write_bytes(join(frames))
    words = Path(args.corpus).with_suffix(".words")
    known = [*WORDS, *tacod.serving.messages.REQUESTS]
    words.write_text("".join(f'"{word}"\n' for word in known if word not in ("drain", "reload")))
    stranger = Stranger(args.endpoint)

    def hear(data: bytes) -> None:
        frames = split(data)
        check(frames)
        # These two, from root, would be obeyed.
        if not any(word in data for word in (b"drain", b"reload")):
            stranger.say(frames)
            ask_for_memory(args.endpoint, b"".join(frames))

    options = [f"-runs={args.messages}", f"-seed={args.seed}", f"-max_len={LARGEST}", f"-dict={words}"]
    atheris.Setup([sys.argv[0], *options, f"-artifact_prefix={args.corpus}/", args.corpus], hear)
    atheris.Fuzz()


@contextmanager
def folder(given: str | None) -> Iterator[str]:
    """The corpus's: one that was given, or one for this time."""
    if given is not None:
        Path(given).mkdir(parents=True, exist_ok=True)
        yield given
        return
    with tempfile.TemporaryDirectory(prefix="tacod-") as made:
        (Path(made) / "corpus").mkdir()
        yield str(Path(made) / "corpus")


def fewest_descriptors(process: psutil.Process) -> int:
    """Of one second: ZeroMQ closes a client's connection a moment after the client has gone."""
    end_s = time.monotonic() + 1
    fewest = process.num_fds()
    while time.monotonic() < end_s:
        time.sleep(0.05)
        fewest = min(fewest, process.num_fds())
    return fewest


def watch(args: argparse.Namespace) -> int:
    """Start a daemon and the fuzzer, and see what is left of both."""
    from helpers import FLUX, Daemon, eventually

    with tempfile.TemporaryDirectory(prefix="tacod-") as models, folder(args.corpus) as corpus:
        FLUX.save(Path(models))
        with Daemon(1, [Path(models)], cold=True) as daemon:
            supervisor = psutil.Process(daemon.pid)
            with daemon.client() as client:
                model = client.load(FLUX.file)
                FLUX.check(model)
                boot_id = client.boot_id

            def fuzz(messages: int) -> int:
                command = [sys.executable, __file__, "--endpoint", daemon.endpoint, "--corpus", corpus]
                command += ["--messages", str(messages), "--seed", str(args.seed)]
                code = subprocess.run(command, check=False).returncode
                with daemon.client() as client:
                    eventually(lambda: client.status()["clients"] == 1, 30, "the fuzzer is gone")
                return code

            # What a first thousand made the daemon's allocator take isn't counted as growth.
            code = fuzz(1000)
            before, began_s = (supervisor.memory_info().rss, fewest_descriptors(supervisor)), time.monotonic()
            code = code or fuzz(args.messages)
            took_s = time.monotonic() - began_s
            after = supervisor.memory_info().rss, fewest_descriptors(supervisor)
            alive = daemon.running
            if alive:
                with daemon.client() as client:
                    FLUX.check(client.load(FLUX.file))
                    alive = client.boot_id == boot_id
    grown = after[0] - before[0]
    print(f"\n{args.messages} messages in {took_s:.0f} s; the fuzzer ended with {code}")
    print(f"the daemon: {'the same, and right' if alive else 'GONE'}; {grown / 2**20:+.1f} MiB, ", end="")
    print(f"{after[1] - before[1]:+d} descriptors")
    return 0 if code == 0 and alive and grown < MORE_BYTES and after[1] <= before[1] else 1


def main() -> int:
    """Watch, or be the fuzzer if an endpoint is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--messages", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--corpus", metavar="FOLDER", help="kept, with what was found; a temporary one by default")
    parser.add_argument("--endpoint", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.endpoint is None:
        return watch(args)
    mutate(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())

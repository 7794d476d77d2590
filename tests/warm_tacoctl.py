"""``tacoctl`` in processes that have imported torch already, as that takes each of its own seconds.

Run as a script, this file is the process that they are forked from: what it imports, all of them have. Each is a
process as a shell's are, with its streams, its environment and its exit code; but it is started faster. So are the
daemon's programs that ``tacoctl plan`` and ``bench`` run, as ``python -m``.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import selectors
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NoReturn
from unittest import mock

from tacod_client.cli import main

FEW_BYTES = 64


class WarmTacoctl:
    """Starts the process that is forked from, and lets it run commands, one after the other."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                # Python makes its streams for what they are at the start, which for the commands are pipes.
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=[theirs.fileno()],
                env=environment,
            )

    def run(
        self,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        streams: Mapping[int, int] | None = None,
        timeout_s: float = 120,
    ) -> subprocess.CompletedProcess[str]:
        """Run it to its end; its stdout and stderr are pipes, or what ``streams`` has for 1 and 2."""
        with ExitStack() as ending:
            ours, theirs = zip(*(os.pipe() for _ in range(2)), strict=True)
            for number in ours:
                ending.callback(os.close, number)
            command = json.dumps({"arguments": arguments, "environment": dict(environment)}).encode()
            given = [(streams or {}).get(place, number) for place, number in zip((1, 2), theirs, strict=True)]
            socket.send_fds(self._socket, [command], given)
            for number in theirs:
                os.close(number)
            written = dict.fromkeys(ours, b"")
            selector = ending.enter_context(selectors.DefaultSelector())
            for number in (*ours, self._socket):
                selector.register(number, selectors.EVENT_READ)
            code = None
            while len(selector.get_map()):
                ready = selector.select(timeout_s)
                if not ready:
                    raise subprocess.TimeoutExpired(["tacoctl", *arguments], timeout_s)
                for key, _ in ready:
                    if key.fileobj is self._socket:
                        answer = self._socket.recv(FEW_BYTES)
                        assert answer, f"what tacoctl is forked from has ended: {self._process.communicate()[1]!r}"
                        code = int(answer)
                    elif part := os.read(key.fd, 1 << 16):
                        written[key.fd] += part
                        continue
                    selector.unregister(key.fileobj)
        assert code is not None
        out, error = (written[number].decode() for number in ours)
        return subprocess.CompletedProcess(["tacoctl", *arguments], code, out, error)

    def close(self) -> None:
        """End the process by closing its socket."""
        close_down(self._process, self._socket)


def close_down(process: subprocess.Popen[Any], channel: socket.socket) -> None:
    """End a process that ends when its socket closes, or kill it."""
    channel.close()
    with process:
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()


def serve(number: int) -> None:
    """Fork a process for each command that comes in."""
    import safetensors.torch  # noqa: F401

    import tacod.rank.forward.run  # noqa: F401
    from tacod.rank import families
    from tacod_client.cli import bench, sample  # noqa: F401

    families.families()
    # What isn't looked at isn't copied.
    gc.freeze()
    with socket.socket(fileno=number) as commands:
        while True:
            command, streams, _, _ = socket.recv_fds(commands, 1 << 20, 2)
            if not command:
                return
            pid = os.fork()
            if pid == 0:
                run(command, streams)
            for stream in streams:
                os.close(stream)
            _, status = os.waitpid(pid, 0)
            commands.send(str(os.waitstatus_to_exitcode(status)).encode())


def run(command: bytes, streams: Sequence[int]) -> NoReturn:
    """Be ``tacoctl``, with these as stdout and stderr."""
    for stream, place in zip(streams, (1, 2), strict=True):
        os.dup2(stream, place)
        os.close(stream)
    told = json.loads(command)
    os.environ.clear()
    os.environ.update(told["environment"])
    with mock.patch("subprocess.call", call), mock.patch("subprocess.run", run_captured):
        end(lambda: main(told["arguments"]))


def call(command: Sequence[str], streams: Sequence[int] = (1, 2)) -> int:
    """What `subprocess.call` does for ``python -m``, in a fork of this process."""
    python, option, module, *arguments = command
    assert (python, option) == (sys.executable, "-m")
    pid = os.fork()
    if pid == 0:
        for stream, place in zip(streams, (1, 2), strict=True):
            os.dup2(stream, place)
        sys.argv = [module, *arguments]
        # It ends with `sys.exit`.
        end(lambda: runpy.run_module(module, run_name="__main__", alter_sys=True))
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def run_captured(command: Sequence[str], **options: bool) -> subprocess.CompletedProcess[bytes]:
    """What `subprocess.run` does for ``python -m``, if it captures the output."""
    assert options == {"capture_output": True, "check": False}
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as error:
        code = call(command, (out.fileno(), error.fileno()))
        out.seek(0)
        error.seek(0)
        return subprocess.CompletedProcess(command, code, out.read(), error.read())


def end(program: Callable[[], Any]) -> NoReturn:
    """Run a program to its end, and this process with it."""
    code: Any = 70
    try:
        code = program()
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    # To take all of torch apart would take a second.
    os._exit(code)


if __name__ == "__main__":
    serve(int(sys.argv[1]))

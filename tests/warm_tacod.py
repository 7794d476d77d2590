"""``tacod`` in processes that have imported already what it and its ranks need, as that takes each of its own seconds.

Run as a script, this file is the process that they are forked from. A daemon is a process as a shell's are, with its
command line, its streams, its environment and its exit code. Its fork server is one of its children, which was forked
with it and waits until the daemon would start one; a second one starts as everywhere. In the daemon torch counts as
not imported.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import json
import os
import select
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn
from unittest import mock

from warm_tacoctl import close_down

from tacod import prctl
from tacod.group import fork_server

OF_RANKS = ("torch", "triton", "tacod.rank")
"""Packages that a daemon has not imported."""
MESSAGE_BYTES = 1 << 20
FEW_BYTES = 64
COMMAND_LINE_BYTES = 4096
"""The longest that a process can show."""
OF_NO_CONCERN = {"PYTEST_CURRENT_TEST"}
"""Environment variables that differ from test to test."""


class WarmTacod:
    """A daemon that was forked, in the manner of `subprocess.Popen`."""

    def __init__(self, pid: int, arguments: Sequence[str]) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._arguments = arguments
        self._child = fork_server.Child(pid)

    def poll(self) -> int | None:
        """Its exit code, or a signal's number below zero; None while it runs."""
        if self.returncode is None and self._child.poll() is not None:
            self.returncode = self._child.wait()
        return self.returncode

    def wait(self, timeout_s: float | None = None) -> int:
        """Wait for its end; returns what `poll` does. Raises `subprocess.TimeoutExpired`."""
        if self.returncode is None and not select.select([self._child.fd], [], [], timeout_s)[0]:
            raise subprocess.TimeoutExpired(self._arguments, timeout_s or 0)
        code = self.poll()
        assert code is not None
        return code

    def kill(self) -> None:
        """Send it SIGKILL, unless it has ended."""
        if self.poll() is None:
            self._child.kill()


class WarmTacods:
    """Starts the process that daemons are forked from, and asks it for them."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = known(environment)
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            # What a daemon's command line is written over is long enough for each.
            command = [sys.executable, __file__, str(theirs.fileno()), " " * COMMAND_LINE_BYTES]
            # As the environment that a daemon's ranks on CPUs get.
            environment = {**environment, "CUDA_VISIBLE_DEVICES": ""}
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()], env=environment
            )
        atexit.register(self.close)

    def serves(self, environment: Mapping[str, str]) -> bool:
        """Whether a daemon may have this environment: what was imported has seen the same."""
        return known(environment) == self._environment

    def start(self, arguments: Sequence[str], environment: Mapping[str, str], log: int, groups: int) -> WarmTacod:
        """Start ``tacod`` with these arguments, here; ``log`` is its stdout and its stderr.

        ``groups`` is the number of its groups of ranks, each of which has a fork server.
        """
        told = {"arguments": arguments, "environment": dict(environment), "folder": str(Path.cwd()), "groups": groups}
        # It becomes this process's child, as `fork_server` does it.
        prctl.adopt_orphans(True)
        try:
            socket.send_fds(self._socket, [json.dumps(told).encode()], [log])
            answer = self._socket.recv(FEW_BYTES)
        finally:
            prctl.adopt_orphans(False)
        assert answer, "what daemons are forked from has ended"
        return WarmTacod(int(answer), arguments)

    def close(self) -> None:
        """End the process by closing its socket."""
        close_down(self._process, self._socket)


@functools.cache
def warm_tacods() -> WarmTacods:
    """The one of this process, for the environment that it has when it first asks."""
    return WarmTacods(daemon_environment())


def daemon_environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """A daemon's environment."""
    # Threads that spin while they wait are slow where the machine has other work too.
    return {**os.environ, "OMP_WAIT_POLICY": "passive", **(more or {})}


def known(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name not in OF_NO_CONCERN}


# --- the process that daemons are forked from -------------------------------------------------------------------------


def serve(number: int) -> None:
    """Fork a daemon for each message that comes in."""
    import tacod.daemon  # noqa: F401

    fork_server.load("cpu")
    with socket.socket(fileno=number) as requests:
        while True:
            message, streams, _, _ = socket.recv_fds(requests, MESSAGE_BYTES, 1)
            if not message:
                return
            if (between := os.fork()) == 0:
                parent = os.getpid()
                if os.fork():
                    os._exit(0)
                while os.getppid() == parent:
                    select.select([], [], [], 0.0005)
                requests.send(str(os.getpid()).encode())
                requests.close()
                end(functools.partial(run, json.loads(message), *streams))
            for stream in streams:
                os.close(stream)
            os.waitpid(between, 0)


def run(told: Mapping[str, Any], log: int) -> int:
    """Be ``tacod``; returns the exit code."""
    from tacod import daemon

    for stream in (1, 2):
        os.dup2(log, stream)
    os.close(log)
    os.chdir(told["folder"])
    replace_environment(told["environment"])
    stand_bys: list[StandBy] = []
    for _ in range(told["groups"]):
        stand_bys.append(StandBy(stand_bys))
    show([sys.executable, "-m", "tacod.daemon", *told["arguments"]])
    # As `python -m` does.
    sys.path[0] = told["folder"]
    of_ranks = [name for name in sys.modules if any(f"{name}.".startswith(f"{each}.") for each in OF_RANKS)]
    hidden = [sys.modules.pop(name) for name in of_ranks]

    def start(command: list[str], **options: Any) -> Any:
        return stand_bys.pop().start(command, **options) if stand_bys else subprocess.Popen(command, **options)

    with mock.patch.object(fork_server, "subprocess", SimpleNamespace(Popen=start)):
        code = daemon.main(told["arguments"])
    # Until then.
    del hidden
    return code


class StandBy:
    """A child that becomes a fork server when it is started, in the manner of `subprocess.Popen`."""

    def __init__(self, others: Sequence[StandBy]) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self.pid = os.fork()
            if self.pid == 0:
                prctl.die_with_parent()
                for other in (self, *others):
                    other._socket.close()
                end(lambda: stand_by(theirs))

    def start(self, command: Sequence[str], env: Mapping[str, str], stdin: int, start_new_session: bool) -> StandBy:
        """Have it run this command, the fork server's."""
        assert command[:3] == [sys.executable, "-m", fork_server.MODULE]
        assert start_new_session
        told = {"command": command, "environment": dict(env), "folder": str(Path.cwd())}
        with self._socket:
            socket.send_fds(self._socket, [json.dumps(told).encode()], [stdin])
            # As the real one, it is back when the session has begun.
            self._socket.recv(FEW_BYTES)
        return self

    def wait(self) -> None:
        """Reap it when it has ended."""
        os.waitpid(self.pid, 0)


def stand_by(requests: socket.socket) -> None:
    """Wait for a command and run it; without one end with the daemon."""
    with requests:
        message, streams, _, _ = socket.recv_fds(requests, MESSAGE_BYTES, 1)
        if not message:
            return
        told = json.loads(message)
        os.setsid()
        os.dup2(streams[0], 0)
        os.close(streams[0])
        os.chdir(told["folder"])
        replace_environment(told["environment"])
        show(told["command"])
        sys.argv = told["command"][2:]
        requests.send(b"begun")
    fork_server.main()


def replace_environment(environment: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)


def show(command: Sequence[str]) -> None:
    """Have this process show this command line, in place of the one that it was started with."""
    # Its place in memory; proc_pid_stat(5), from the third field on.
    fields = Path("/proc/self/stat").read_bytes().rpartition(b")")[2].split()
    begin, end = map(int, fields[45:47])
    text = b"".join(os.fsencode(word) + b"\0" for word in command)
    assert len(text) <= end - begin
    ctypes.memmove(begin, text.ljust(end - begin, b"\0"), end - begin)


def end(program: Callable[[], Any]) -> NoReturn:
    """Run a program to its end as Python does, and this process with it."""
    code: Any = 1
    try:
        code = program() or 0
    except SystemExit as ended:
        code = ended.code or 0
    except BaseException:
        traceback.print_exc()
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    # To take all of torch apart would take a second.
    os._exit(code)


if __name__ == "__main__":
    serve(int(sys.argv[1]))

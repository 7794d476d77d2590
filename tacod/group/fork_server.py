"""The fork server: a process that has imported torch and the families once, and from which ranks are forked.

Importing them takes a core 2.5 s; a fork takes milliseconds. The supervisor imports no torch, so it can't fork ranks
itself. `ForkServer` is the supervisor's side. Run as a module, this file is the server.

The server forks twice and the process in between ends, so the kernel gives the rank to the supervisor (prctl(2),
PR_SET_CHILD_SUBREAPER). A rank is thus the supervisor's own child: the supervisor sees how it ends, and it lives on if
the server dies. Server and ranks are one process group.

CUDA doesn't survive a fork, and neither do threads: the server uses no device, and computes nothing.
"""

from __future__ import annotations

import ctypes
import gc
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import ClassVar

from tacod import prctl

__all__ = ["MODULE", "Child", "ForkServer", "load"]

log = logging.getLogger("tacod.rank")

MODULE = "tacod.group.fork_server"
"""This file, as it is on the server's command line."""
REQUEST_BYTES = 64 << 10
_DESCRIPTORS = ("--channel", "--arena", "--listening")
"""A rank's options for the descriptors that come with a request, in order."""
ANSWER_BYTES = 64


class Child:
    """A child of this process that another one has started, in the manner of `subprocess.Popen`."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.fd = os.pidfd_open(pid)
        """Readable when it has ended; open until `wait`."""
        self._code: int | None = None

    def poll(self) -> int | None:
        """Its exit code, or a signal's number below zero; None while it runs."""
        return self._wait(os.WNOHANG)

    def wait(self) -> int:
        """Wait for its end; returns what `poll` does."""
        code = self._wait(0)
        assert code is not None
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        return code

    def _wait(self, options: int) -> int | None:
        if self._code is None:
            ended = os.waitid(os.P_PID, self.pid, os.WEXITED | options)
            if ended is not None:
                self._code = _code(ended)
        return self._code

    def send_signal(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Send it SIGKILL, unless it has ended."""
        self.send_signal(signal.SIGKILL)


def _code(ended: os.waitid_result) -> int:
    return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status


class ForkServer:
    """Starts the server when it is first needed, and again after it has died; asks it for ranks.

    It and its ranks have this ``environment``, and show ``folder`` on their command lines. ``device`` is ``cuda`` or
    ``cpu``.
    """

    _forking: ClassVar[set[ForkServer]] = set()
    """All servers that were asked for ranks: as long as there is one, orphans are this process's."""

    def __init__(self, device: str, folder: Path, environment: Mapping[str, str]) -> None:
        self.pid = 0
        """The last one's."""
        self._command = [sys.executable, "-m", MODULE, device, str(folder)]
        self._environment = environment
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._asked: set[int] = set()

    @property
    def sources(self) -> list[int]:
        """The file descriptors that become readable when it has forked a rank or ends."""
        return [self._socket.fileno()] if self._socket is not None else []

    def fork(self, rank: int, arguments: Sequence[str], channel: int, arena: int, *more: int) -> None:
        """Ask for a rank with these arguments; the server has them followed by ``--channel`` and ``--arena``.

        With one descriptor ``more``, ``--listening`` follows too.
        """
        if self._socket is None:
            self._start()
        assert self._socket is not None
        # Before the process in between can end.
        self._adopt(True)
        self._asked.add(rank)
        # If it has died, `poll` says so.
        with suppress(OSError):
            socket.send_fds(self._socket, [json.dumps([rank, *arguments]).encode()], [channel, arena, *more])

    def _start(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.setblocking(False)
        with theirs:
            # Out of reach of a terminal's signals.
            self._process = subprocess.Popen(
                self._command, env=self._environment, stdin=theirs.fileno(), start_new_session=True
            )
        self.pid = self._process.pid

    def forked(self) -> list[tuple[int, Child]]:
        """The ranks that were forked since the last call."""
        found = []
        while self._socket is not None and self._asked:
            try:
                answer = self._socket.recv(ANSWER_BYTES)
            except OSError:
                break
            if not answer:
                break
            rank, pid = json.loads(answer)
            self._asked.discard(rank)
            found.append((rank, Child(pid)))
        if not self._asked:
            self._adopt(False)
        return found

    def poll(self) -> int | None:
        """If it has ended, its exit code, or a signal's number below zero; else None.

        One that was asked for ranks stays known until `stop`, which ends those that it has forked. Of another one
        nothing is left to do.
        """
        if self._process is None:
            return None
        # It isn't reaped before its process group is ended, so that no other one gets its number.
        ended = os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if ended is None:
            return None
        if not self._asked:
            self._process.wait()
            self._forget()
        return _code(ended)

    def stop(self) -> None:
        """End it, and the ranks that it has forked and `forked` has not returned; reap them all."""
        if self._process is None:
            return
        group = self._process.pid
        with suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
        self._process.wait()
        with suppress(ChildProcessError):
            while True:
                os.waitpid(-group, 0)
        self._asked.clear()
        self._adopt(False)
        self._forget()

    def _adopt(self, forking: bool) -> None:
        if forking:
            self._forking.add(self)
        elif self not in self._forking:
            return
        else:
            self._forking.remove(self)
        prctl.adopt_orphans(bool(self._forking))

    def _forget(self) -> None:
        assert self._socket is not None
        self._socket.close()
        self._process = self._socket = None


# --- the server -------------------------------------------------------------------------------------------------------


def main() -> None:
    """Be the server on the socket that is stdin, and in each process that it forks the rank."""
    prctl.die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    run = load(sys.argv[1])
    arguments = _serve()
    if arguments is not None:
        run(arguments)


def load(device: str) -> Callable[[list[str]], None]:
    """Import what a rank on a ``device`` (``cuda`` or ``cpu``) needs; returns what runs a rank.

    No GPU may be used here. xfuser looks at them when it is imported, so on GPUs each rank imports it.
    """
    gc.disable()
    import torch

    from tacod.rank import families
    from tacod.rank.__main__ import main as run
    from tacod.rank.comm import process_groups

    families.families()
    if device == "cpu":
        process_groups.why_not_xfuser(torch.device("cpu"))
    # Pages with objects that no collection visits stay shared.
    gc.freeze()
    gc.enable()

    def run_anew_if_need_be(arguments: list[str]) -> None:
        if torch.cuda._is_in_bad_fork():
            log.warning("something that was imported has used CUDA, which a fork can't; this rank imports it again")
            os.execv(sys.executable, [sys.executable, "-m", "tacod.rank", *arguments])
        run(arguments)

    return run_anew_if_need_be


def _serve() -> list[str] | None:
    """Fork ranks until the supervisor ends. Returns in each rank, with its arguments, and at the end with None."""
    with socket.socket(fileno=0) as requests:
        while True:
            request, fds, _, _ = socket.recv_fds(requests, REQUEST_BYTES, len(_DESCRIPTORS))
            if not request:
                return None
            if (between := os.fork()) == 0:
                parent = os.getpid()
                if os.fork():
                    os._exit(0)
                rank, *arguments = json.loads(request)
                _become(rank, parent, requests)
                for fd in fds:
                    os.set_inheritable(fd, True)
                given = zip(_DESCRIPTORS, map(str, fds), strict=False)
                return [*arguments, *(word for each in given for word in each)]
            for fd in fds:
                os.close(fd)
            _, status = os.waitpid(between, 0)
            if status:
                raise OSError("no process could be forked for a rank")


def _become(rank: int, parent: int, requests: socket.socket) -> None:
    """Have this process be a rank that was just forked by ``parent``, and tell the supervisor."""
    while os.getppid() == parent:
        time.sleep(0.0005)
    try:
        requests.send(json.dumps([rank, os.getpid()]).encode())
    except OSError:
        os._exit(0)  # the supervisor has ended
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, requests.detach())
    os.close(null)
    _show_as(f"tacod.rank --rank {rank}")
    prctl.name(f"tacod.rank {rank}")


def _show_as(title: str) -> None:
    """Show this title in place of the module's name on the command line of this process, in ``ps`` and such."""
    # Its place in memory; proc_pid_stat(5), from the third field on.
    fields = Path("/proc/self/stat").read_bytes().rpartition(b")")[2].split()
    begin, end = map(int, fields[45:47])
    at = ctypes.string_at(begin, end - begin).find(MODULE.encode())
    if at >= 0:
        ctypes.memmove(begin + at, title.encode().ljust(len(MODULE))[: len(MODULE)], len(MODULE))


if __name__ == "__main__":
    main()

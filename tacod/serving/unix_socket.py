"""A unix socket at a path, which never replaces what others made."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
import stat
import struct
from pathlib import Path

__all__ = ["MOVE_IT", "PathTaken", "UnixSocket", "kind_of", "stale"]

BACKLOG = 100
TABLE = Path("/proc/net/unix")
"""All unix sockets that processes have bound, and by which names."""
ROW = re.compile(rb"^[0-9a-f]+: [0-9A-F]+ [0-9A-F]+ ([0-9A-F]+) [0-9A-F]+ [0-9A-F]+ +\d+(?: |$)", re.MULTILINE)
"""A row of it up to the name: its flags."""
LISTENS = 0x10000
"""The flag of a socket that listens."""
MOVE_IT = "move it away, or name another path"


class PathTaken(Exception):
    """A path can't be taken; says why, and what is there."""


class UnixSocket:
    """A listening socket at a path, for its owner and their group.

    It replaces a socket that no process has any more, and nothing else. (ZeroMQ's own bind removes whatever is there.)
    Raises `PathTaken`.
    """

    def __init__(self, path: Path, kind: socket.SocketKind = socket.SOCK_STREAM) -> None:
        self.path = path
        self.socket = socket.socket(socket.AF_UNIX, kind)
        try:
            self._bind()
        except BaseException:
            self.socket.close()
            raise

    def _bind(self) -> None:
        try:
            left = stale(self.path, kind=self.socket.type)
            if left is not None and _identity(self.path.lstat()) == left:
                self.path.unlink(missing_ok=True)
            mask = os.umask(0o117)
            try:
                self.socket.bind(os.fspath(self.path))
            finally:
                os.umask(mask)
            self._made = _identity(self.path.lstat())
            try:
                self.socket.listen(BACKLOG)
            except BaseException:
                self.remove()
                raise
        except OSError as error:
            # Somebody may have been faster.
            there = f" by {kind_of(self.path)}" if error.errno == errno.EADDRINUSE else ""
            raise PathTaken(f"{self.path}: {error.strerror}{there}; name another path") from None

    def remove(self) -> None:
        """Remove it from its path, unless somebody else has put something there since."""
        with contextlib.suppress(OSError):
            if _identity(self.path.lstat()) == self._made:
                self.path.unlink()


def kind_of(path: Path) -> str:
    """What is at a path, in words."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return "nothing"
    if stat.S_ISLNK(mode):
        return f"a symbolic link to {path.readlink()}"
    kinds = {stat.S_IFREG: "a regular file", stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe"}
    return kinds.get(stat.S_IFMT(mode)) or ("a socket" if stat.S_ISSOCK(mode) else "a device")


def _identity(found: os.stat_result) -> tuple[int, int, int]:
    """Which file it is: numbers alone are given anew."""
    return found.st_dev, found.st_ino, found.st_mtime_ns


def stale(path: Path, holder: int | None = None, kind: int = socket.SOCK_STREAM) -> tuple[int, int, int] | None:
    """Which socket lies there that no process has, or None if there is nothing, or ``holder`` listens.

    Raises `PathTaken` if there is something else.
    """
    try:
        found = path.lstat()
    except FileNotFoundError:
        return None
    if not stat.S_ISSOCK(found.st_mode):
        raise PathTaken(f"{path} is no socket but {kind_of(path)}, and tacod replaces nothing of others; {MOVE_IT}")
    with socket.socket(socket.AF_UNIX, kind) as probe:
        # It need not answer, and its queue may be full.
        probe.setblocking(False)
        code = probe.connect_ex(os.fspath(path))
        if code == errno.ECONNREFUSED:
            if _is_bound(path, found):
                raise PathTaken(
                    f"{path}: Address already in use: another program has bound it, though it doesn't listen there; "
                    "end it, or name another path"
                )
            return _identity(found)
        if code == errno.ENOENT:
            return None
        if code == errno.EACCES:
            raise PermissionError(code, os.strerror(code), os.fspath(path))
        pid = 0
        if code == 0:
            pid, _, _ = struct.unpack("3i", probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    if pid and pid == holder:
        return None
    raise PathTaken(f"{path}: Address already in use: {_name_of(pid)} listens there; end it, or name another path")


def _is_bound(path: Path, found: os.stat_result) -> bool:
    """Whether a process has a socket there that refuses connections: it may listen later, or never."""
    try:
        _, *rows = ROW.split(TABLE.read_bytes())
    except OSError:
        return False
    bound: set[bytes] = set()
    listening: set[bytes] = set()
    for flags, name in zip(rows[::2], rows[1::2], strict=True):
        (listening if int(flags, 16) & LISTENS else bound).add(name.removesuffix(b"\n"))
    # A socket that listens under a name is not the one that refuses: it has the name in another container's files.
    return any(_may_be(name, path, found) for name in bound - listening)


def _may_be(name: bytes, path: Path, found: os.stat_result) -> bool:
    """Whether a name that somebody bound is the file ``found``; of a relative one nobody knows where it begins."""
    if name.startswith(b"/"):
        with contextlib.suppress(OSError, ValueError):
            return os.path.samestat(os.lstat(name), found)
        return False
    return name.rpartition(b"/")[2] == os.fsencode(path.name)


def _name_of(pid: int) -> str:
    with contextlib.suppress(OSError):
        return f"process {pid} ({Path(f'/proc/{pid}/comm').read_text(errors='replace').strip()})"
    return f"process {pid}" if pid else "another program"

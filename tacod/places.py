"""What tacod takes in the file system: sockets, a lock, a private folder. It removes nothing that others made."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import re
import socket
import stat
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

from tacod.config import Config, ConfigError

__all__ = ["PathTaken", "UnixSocket", "check", "hold", "kind_of"]

log = logging.getLogger(__name__)

BACKLOG = 100
LOCK = re.compile(rb"(\d{1,10}\n)?")
"""What a lock holds: its holder's pid, and nothing for a moment at first."""
PRIVATE = re.compile(r"(rendezvous|stacks)-[0-9a-f]+(-\d+)?")
"""Names of what ranks leave in the private folder if they are killed."""
MOVE_IT = "move it away, or name another path"


class PathTaken(Exception):
    """A path can't be taken; says why, and what is there."""


def check(file: str, config: Config) -> None:
    """See whether the paths that a configuration, whose file is ``file``, names can be taken; touches nothing.

    What a tacod that runs by the same endpoint holds is no fault, nor is what this user may not look at. Raises
    `ConfigError`, with a line for each path that is taken.
    """
    path, listen, uploads = config.socket_path, config.metrics.listen, config.models.uploads
    holder = _holder(_lock_of(path))
    looks: list[tuple[str, Callable[[], object]]] = [
        ("endpoint", lambda: _check_parents(path)),
        ("endpoint", lambda: _stale(path, holder)),
        ("endpoint", lambda: _check_lock(_lock_of(path))),
        ("endpoint", lambda: _own_files(_folder_of(path))),
    ]
    if listen is not None and listen.startswith("unix:"):
        metrics = Path(listen.removeprefix("unix:"))
        looks += [("metrics.listen", lambda: _check_parents(metrics))]
        looks += [("metrics.listen", lambda: _check_apart(metrics, path))]
        looks += [("metrics.listen", lambda: _stale(metrics, holder))]
    if uploads is not None:
        looks += [("models.uploads", lambda: _check_parents(Path(uploads)))]
        looks += [("models.uploads", lambda: _check_folder(Path(uploads)))]
    lines = []
    for key, look in looks:
        try:
            look()
        except PathTaken as error:
            lines.append(f"{file}:{key}: {error}")
        except PermissionError:
            pass
        except OSError as error:
            lines.append(f"{file}:{key}: {error.filename or path}: {error.strerror}; name another path")
    if lines:
        raise ConfigError("\n".join(lines))


@contextlib.contextmanager
def hold(path: Path) -> Iterator[Path]:
    """Hold an endpoint alone, and a private folder beside it; what a killed predecessor left there is removed.

    Raises `ConfigError`.
    """
    folder, lock_path = _folder_of(path), _lock_of(path)
    try:
        path.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
        lock = _take_lock(lock_path, path)
    except PathTaken as error:
        raise ConfigError(f"endpoint: {error}") from None
    except OSError as error:
        raise ConfigError(f"endpoint: {lock_path}: {error.strerror}; tacod must own the socket's folder") from None
    try:
        try:
            _remove_folder(folder)
            folder.mkdir(mode=0o700)
        except PathTaken as error:
            raise ConfigError(f"endpoint: {error}") from None
        except OSError as error:
            raise ConfigError(f"endpoint: {folder}: {error.strerror}; tacod must own it") from None
        try:
            yield folder
        finally:
            try:
                _remove_folder(folder)
            except (OSError, PathTaken) as error:
                log.warning("%s stays: %s", folder, error)
    finally:
        with contextlib.suppress(OSError):
            if os.path.samestat(lock_path.lstat(), os.fstat(lock)):
                lock_path.unlink()
        os.close(lock)


class UnixSocket:
    """A socket that listens at a path, for its owner and their group.

    A socket that nobody listens at any more is replaced, nothing else. (ZeroMQ's own bind removes whatever is there.)
    Raises `PathTaken`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.socket = socket.socket(socket.AF_UNIX)
        try:
            self._bind()
        except BaseException:
            self.socket.close()
            raise

    def _bind(self) -> None:
        try:
            stale = _stale(self.path)
            if stale is not None and _identity(self.path.lstat()) == stale:
                self.path.unlink(missing_ok=True)
            mask = os.umask(0o117)
            try:
                self.socket.bind(os.fspath(self.path))
            finally:
                os.umask(mask)
            self._made = _identity(self.path.lstat())
            self.socket.listen(BACKLOG)
        except OSError as error:
            # Somebody may have been faster.
            there = f" by {kind_of(self.path)}" if error.errno == errno.EADDRINUSE else ""
            raise PathTaken(f"{self.path}: {error.strerror}{there}; name another path") from None

    def remove(self) -> None:
        """Take it away from its path; what somebody else has put there since stays."""
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


# --- sockets ----------------------------------------------------------------------------------------------------------


def _identity(found: os.stat_result) -> tuple[int, int, int]:
    """Which file it is: numbers alone are given anew."""
    return found.st_dev, found.st_ino, found.st_mtime_ns


def _stale(path: Path, holder: int | None = None) -> tuple[int, int, int] | None:
    """Which socket lies there that nobody listens at, or None if there is nothing, or ``holder`` listens.

    Raises `PathTaken` if there is something else.
    """
    try:
        found = path.lstat()
    except FileNotFoundError:
        return None
    if not stat.S_ISSOCK(found.st_mode):
        raise PathTaken(f"{path} is no socket but {kind_of(path)}, and tacod replaces nothing of others; {MOVE_IT}")
    with socket.socket(socket.AF_UNIX) as probe:
        # It need not answer, and its queue may be full.
        probe.setblocking(False)
        code = probe.connect_ex(os.fspath(path))
        if code == errno.ECONNREFUSED:
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


def _name_of(pid: int) -> str:
    with contextlib.suppress(OSError):
        return f"process {pid} ({Path(f'/proc/{pid}/comm').read_text(errors='replace').strip()})"
    return f"process {pid}" if pid else "another program"


def _check_apart(metrics: Path, endpoint: Path) -> None:
    own = {os.path.realpath(path) for path in (endpoint, _lock_of(endpoint), _folder_of(endpoint))}
    if not own.isdisjoint((os.path.realpath(metrics), os.path.realpath(metrics.parent))):
        raise PathTaken(f"{metrics} is where endpoint has its own socket and files; name another path")


# --- the lock, and folders --------------------------------------------------------------------------------------------


def _lock_of(path: Path) -> Path:
    return path.with_name(path.name + ".lock")


def _folder_of(path: Path) -> Path:
    return path.with_name(path.name + ".d")


def _holder(path: Path) -> int | None:
    """Whose pid a lock tells, dead or alive."""
    with contextlib.suppress(OSError, PathTaken):
        content = _check_lock(path)
        return int(content) if content else None
    return None


def _check_lock(path: Path) -> bytes:
    """What a lock of tacod's holds; nothing if there is none. Raises `PathTaken` if something else is there."""
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise PathTaken(f"{path}, which is to be the lock, is {kind_of(path)}; {MOVE_IT}")
        lock = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return b""
    try:
        return _content(lock, path)
    finally:
        os.close(lock)


def _content(lock: int, path: Path) -> bytes:
    found, content = os.fstat(lock), os.pread(lock, 64, 0)
    # By a hard link it would be another file too that the pid is written to.
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1 or not LOCK.fullmatch(content):
        raise PathTaken(f"{path}, which is to be the lock, is a file that tacod didn't make; {MOVE_IT}")
    return content


def _take_lock(path: Path, endpoint: Path) -> int:
    while True:
        _check_lock(path)
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o640)
        try:
            if _lock(lock, path, endpoint):
                return lock
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)


def _lock(lock: int, path: Path, endpoint: Path) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = _content(lock, path).decode().strip()
        raise PathTaken(
            f"tacod with pid {holder} already serves {endpoint}; stop it first, or set another endpoint"
        ) from None
    # The holder before may have unlinked the file between our open and our lock.
    with contextlib.suppress(FileNotFoundError):
        if os.path.samestat(path.lstat(), os.fstat(lock)):
            _content(lock, path)
            os.ftruncate(lock, 0)
            os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
            return True
    return False


def _own_files(folder: Path) -> list[Path] | None:
    """What a killed tacod left in its private folder; None if there is no folder.

    Raises `PathTaken` if it is somebody else's, or holds something of somebody else's.
    """
    try:
        mode = folder.lstat().st_mode
    except FileNotFoundError:
        return None
    if not stat.S_ISDIR(mode):
        raise PathTaken(f"{folder}, which is to be tacod's private folder, is {kind_of(folder)}; {MOVE_IT}")
    files = sorted(folder.iterdir())
    for path in files:
        if not PRIVATE.fullmatch(path.name) or not stat.S_ISREG(path.lstat().st_mode):
            raise PathTaken(f"{path} is in what is to be tacod's private folder, and tacod didn't make it; {MOVE_IT}")
    if stat.S_IMODE(mode) & 0o777 != 0o700:
        raise PathTaken(f"{folder}, which is to be tacod's private folder, is one that tacod didn't make; {MOVE_IT}")
    return files


def _remove_folder(folder: Path) -> None:
    files = _own_files(folder)
    if files is not None:
        for path in files:
            path.unlink(missing_ok=True)
        folder.rmdir()


def _check_folder(folder: Path) -> None:
    try:
        if stat.S_ISDIR(folder.stat().st_mode):
            return
    except FileNotFoundError:
        if not folder.is_symlink():
            return
    raise PathTaken(f"{folder} is no folder but {kind_of(folder)}; {MOVE_IT}")


def _check_parents(path: Path) -> None:
    """See that the nearest folder of a path's that there is is one."""
    nearest = next(parent for parent in path.parents if os.path.lexists(parent))
    if not os.path.isdir(nearest):
        raise PathTaken(f"{nearest} is no folder but {kind_of(nearest)}; {MOVE_IT}")

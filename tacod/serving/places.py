"""The paths that tacod uses: sockets, a lock, a private folder. It removes nothing that others made."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from tacod import comfyui
from tacod.config import Config, ConfigError
from tacod.serving.memory_socket import memory_path
from tacod.serving.unix_socket import MOVE_IT, PathTaken, kind_of, stale

__all__ = ["check", "hold"]

log = logging.getLogger(__name__)

LOCK = re.compile(rb"(?:(\d{1,10})( in a file that was there)?\n)?")
"""What a lock holds: its holder's pid, and nothing for a moment at first. An empty file of others' will do."""
PRIVATE = re.compile(r"(rendezvous|stacks)-[0-9a-f]+(-\d+)?")
"""Names of what ranks leave in the private folder if they are killed."""


def check(file: str, config: Config) -> None:
    """Check that the paths in a configuration, whose file is ``file``, are free; changes nothing.

    Paths that a running tacod at the same endpoint holds are no fault, nor are those that this user may not look at.
    Raises `ConfigError`, with a line for each taken path, and one for a folder that is no ComfyUI.
    """
    path, listen, uploads = config.socket_path, config.metrics.listen, config.models.uploads
    holder = _holder(_lock_of(path))
    memory = memory_path(path)
    taken = {"endpoint": [path, _lock_of(path), _folder_of(path), *([memory] if memory is not None else [])]}
    looks: list[tuple[str, Callable[[], object]]] = [
        ("endpoint", lambda: _check_parents(path)),
        ("endpoint", lambda: stale(path, holder)),
        ("endpoint", lambda: memory and stale(memory, holder, socket.SOCK_SEQPACKET)),
        ("endpoint", lambda: _check_lock(_lock_of(path))),
        ("endpoint", lambda: _own_files(_folder_of(path))),
    ]
    if listen is not None and listen.startswith("unix:"):
        metrics = Path(listen.removeprefix("unix:"))
        looks += [("metrics.listen", lambda: _check_parents(metrics))]
        looks += [("metrics.listen", lambda: _check_apart(metrics, {"endpoint": taken["endpoint"]}))]
        looks += [("metrics.listen", lambda: stale(metrics, holder))]
        looks += [("endpoint", lambda: _check_apart(path.parent, {"metrics.listen": [metrics]}))]
        taken["metrics.listen"] = [metrics]
    if uploads is not None:
        looks += [("models.uploads", lambda: _check_parents(Path(uploads)))]
        looks += [("models.uploads", lambda: _check_apart(Path(uploads), taken))]
        looks += [("models.uploads", lambda: _check_folder(Path(uploads)))]
    lines = []
    if config.comfyui.path is not None and (reason := comfyui.fault(config.comfyui.path)) is not None:
        lines.append(f"{file}:comfyui.path: {reason}")
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
    """Hold an endpoint and a private folder beside it; what a killed predecessor left there is removed.

    Raises `ConfigError`.
    """
    folder, lock_path = _folder_of(path), _lock_of(path)
    try:
        path.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
        lock, is_ours = _take_lock(lock_path, path)
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
            if not is_ours:
                if LOCK.fullmatch(os.pread(lock, 64, 0)):
                    os.ftruncate(lock, 0)
            elif os.path.samestat(lock_path.lstat(), os.fstat(lock)):
                lock_path.unlink()
        os.close(lock)


# --- the lock, and folders --------------------------------------------------------------------------------------------


def _lock_of(path: Path) -> Path:
    return path.with_name(path.name + ".lock")


def _folder_of(path: Path) -> Path:
    return path.with_name(path.name + ".d")


def _holder(path: Path) -> int | None:
    """The pid in a lock, dead or alive."""
    with contextlib.suppress(OSError, PathTaken):
        return _pid_in(_check_lock(path))
    return None


def _pid_in(content: re.Match[bytes] | None) -> int | None:
    return int(content[1]) if content is not None and content[1] else None


def _check_lock(path: Path) -> re.Match[bytes] | None:
    """The contents of a lock; None if there is none. Raises `PathTaken` if the path holds something else."""
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise PathTaken(f"{path}, needed for the lock, is {kind_of(path)}; {MOVE_IT}")
        lock = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        return _content(lock, path)
    finally:
        os.close(lock)


def _content(lock: int, path: Path) -> re.Match[bytes]:
    found, content = os.fstat(lock), LOCK.fullmatch(os.pread(lock, 64, 0))
    # By a hard link it would be another file too that the pid is written to.
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1 or content is None:
        raise PathTaken(f"{path}, needed for the lock, is a file that tacod didn't make; {MOVE_IT}")
    return content


def _take_lock(path: Path, endpoint: Path) -> tuple[int, bool]:
    """Open and lock it; returns its descriptor, and whether tacod made it, and is to remove it."""
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    while True:
        made = False
        try:
            lock = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o640)
            made = True
        except FileExistsError:
            _check_lock(path)
            try:
                lock = os.open(path, flags)
            except FileNotFoundError:
                continue
        try:
            is_ours = _lock(lock, path, endpoint, made)
        except BaseException:
            os.close(lock)
            raise
        if is_ours is not None:
            return lock, is_ours
        os.close(lock)


def _lock(lock: int, path: Path, endpoint: Path, made: bool) -> bool | None:
    """Lock it, and write whose it is now; returns whether tacod made it, or None if it is gone."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise PathTaken(_held_by(_pid_in(_content(lock, path)), path, endpoint)) from None
    # The holder before may have unlinked the file between our open and our lock.
    with contextlib.suppress(FileNotFoundError):
        if os.path.samestat(path.lstat(), os.fstat(lock)):
            content = _content(lock, path)
            is_ours = made or (content[1] is not None and content[2] is None)
            mark = b"" if is_ours else b" in a file that was there"
            os.ftruncate(lock, 0)
            os.pwrite(lock, b"%d%b\n" % (os.getpid(), mark), 0)
            return is_ours
    return None


def _held_by(pid: int | None, path: Path, endpoint: Path) -> str:
    if pid is None:
        return f"another program holds {path}, needed for the lock; end it, or set another endpoint"
    return f"tacod with pid {pid} already serves {endpoint}; stop it first, or set another endpoint"


def _own_files(folder: Path) -> list[Path] | None:
    """What a killed tacod left in its private folder; None if there is no folder.

    Raises `PathTaken` if it is somebody else's, or holds something of somebody else's.
    """
    try:
        mode = folder.lstat().st_mode
    except FileNotFoundError:
        return None
    if not stat.S_ISDIR(mode):
        raise PathTaken(f"{folder}, needed for tacod's private folder, is {kind_of(folder)}; {MOVE_IT}")
    files = sorted(folder.iterdir())
    for path in files:
        if not PRIVATE.fullmatch(path.name) or not stat.S_ISREG(path.lstat().st_mode):
            raise PathTaken(f"{path} is in tacod's private folder, and tacod didn't make it; {MOVE_IT}")
    if stat.S_IMODE(mode) & 0o777 != 0o700:
        raise PathTaken(f"{folder}, needed for tacod's private folder, is one that tacod didn't make; {MOVE_IT}")
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
    """Check that the nearest existing parent of a path is a folder."""
    nearest = next(parent for parent in path.parents if os.path.lexists(parent))
    if not os.path.isdir(nearest):
        raise PathTaken(f"{nearest} is no folder but {kind_of(nearest)}; {MOVE_IT}")


def _check_apart(path: Path, others: dict[str, list[Path]]) -> None:
    """Check that a path is not that of another key's socket or files, nor within it."""
    real = Path(os.path.realpath(path))
    for key, taken in others.items():
        if not {real, *real.parents}.isdisjoint(Path(os.path.realpath(each)) for each in taken):
            raise PathTaken(f"{path} is where {key} has its own socket and files; name another path")

"""Folders of one process, in a place that several processes use: a lock says whether their owner still lives.

A pid would not: containers with pids of their own may share the place.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

__all__ = ["claim", "make_folder", "remove_leavings"]

_LOCK = ".lock"


def claim(folder: Path, shared: bool = False) -> int | None:
    """Lock a folder by a file in it, for others to see; the descriptor holds the lock until it is closed.

    None if another process has it, or if the folder is gone. Several processes may hold it as a ``shared`` one.
    """
    path = folder / _LOCK
    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError:
        return None
    with suppress(OSError):
        fcntl.flock(lock, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        # Who had the lock until now may have removed the folder.
        if os.path.samestat(os.fstat(lock), os.stat(path)):
            return lock
    os.close(lock)
    return None


def make_folder(parent: str | Path, prefix: str) -> tuple[Path, int]:
    """A new folder that is claimed, and the descriptor that holds it. Raises `OSError`."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        # `remove_leavings` of another process may see it before it is claimed.
        if (lock := claim(folder)) is not None:
            return folder, lock
        shutil.rmtree(folder, ignore_errors=True)


def remove_leavings(parent: str | Path, prefix: str) -> None:
    """Remove this user's folders that `make_folder` made, and whose owners are gone."""
    for folder in Path(parent).glob(f"{prefix}*"):
        with suppress(OSError):
            if folder.is_symlink() or folder.stat().st_uid != os.geteuid():
                continue
            if (lock := claim(folder)) is not None:
                shutil.rmtree(folder, ignore_errors=True)
                os.close(lock)

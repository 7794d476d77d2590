"""Model files that a host has from tacod's host, in a folder of limited size: the least recently used ones leave.

A model's files lie in ``KEY/model/``; they come there whole, or not at all. The key is its `Checkpoint.identity` on
tacod's host. `Checkpoint.contents` would not do: it is a hash of samples, and two files may differ elsewhere. Names of
clients are no part of a path. Several actors of a host may share the folder.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypedDict

from tacod.checkpoint import Checkpoint, read_checkpoint
from tacod.group.ray.claims import claim, make_folder, remove_leavings
from tacod_client import units
from tacod_client.errors import ModelError, ModelNotFound, ModelUnsupported
from tacod_client.wire import Buffer

__all__ = ["Copy", "ModelCache", "Piece"]

LOCK_S = 120.0
"""How long to wait for another process that makes room. It removes files, which takes seconds."""
LOOK_S = 0.05
"""How often to look whether it is done."""
_MODEL = "model"
_UNFINISHED = "unfinished-"
_ENTRY = re.compile(r"[0-9a-f]{64}")


class Piece(TypedDict):
    """One of the files that a model is made of."""

    name: str
    """In the model's folder; no path."""
    size: int


class Copy:
    """A model's files while they come. `ModelCache.add` puts them in place; else `discard` removes them."""

    def __init__(self, folder: Path, lock: int, key: str, contents: str) -> None:
        self.folder, self.key, self.contents, self._lock = folder, key, contents, lock
        self._files: list[int] = []
        self._one = threading.Lock()
        """Held while files are written or closed: threads do both."""

    def make(self, pieces: Sequence[Piece]) -> None:
        """Make the files in their full size. Raises `OSError`, on a full disk at once."""
        (self.folder / _MODEL).mkdir()
        for piece in pieces:
            path = self.folder / _MODEL / piece["name"]
            self._files.append(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
            if piece["size"]:
                os.posix_fallocate(self._files[-1], 0, piece["size"])

    def write(self, piece: int, start: int, contents: Buffer) -> None:
        """Write part of a file. Raises `OSError`."""
        room = memoryview(contents).cast("B")
        with self._one:
            while room and self._files:
                count = os.pwrite(self._files[piece], room, start)
                room, start = room[count:], start + count

    def finish(self) -> None:
        """Have the files on the disk. Raises `OSError`."""
        with self._one:
            for file in self._files:
                os.fsync(file)

    def close(self) -> None:
        """Close the files, and give up the claim; what is written from now on is lost."""
        with self._one:
            for file in self._files:
                os.close(file)
            self._files.clear()
            if self._lock >= 0:
                os.close(self._lock)
                self._lock = -1

    def discard(self) -> None:
        """Remove what has come."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.close()


class ModelCache:
    """A folder of models, as one process sees it."""

    def __init__(self, folder: str, limit_bytes: int) -> None:
        """``folder`` may begin with ``~``. With a limit of 0 bytes nothing is added."""
        self._folder = Path(folder)
        with suppress(RuntimeError):  # there is no home; `begin` says so
            self._folder = self._folder.expanduser()
        self._limit_bytes = limit_bytes
        self._held: list[int] = []

    def find(self, key: str, contents: str, main: str) -> Checkpoint | None:
        """The model with this key, or its file ``main``; None if there is none.

        It stays there until `release`. If its `Checkpoint.contents` are others, somebody has changed it: it is removed.
        """
        entry = self._entry(key)
        if not entry.is_dir() or not self._is_safe() or (lock := claim(entry, shared=True)) is None:
            return None
        try:
            checkpoint = read_checkpoint(str(entry / _MODEL / main))
            if checkpoint.contents == contents:
                os.utime(entry)
                self._held.append(lock)
                return checkpoint
        except (ModelError, OSError):
            pass
        os.close(lock)
        _remove(entry)
        return None

    def release(self) -> None:
        """Let go of all models that were found or added: they may make room for others."""
        while self._held:
            os.close(self._held.pop())

    def begin(self, key: str, contents: str, pieces: Sequence[Piece]) -> Copy:
        """Make room for a model with this key and these `Checkpoint.contents`, and its files in their full size.

        Raises `ModelNotFound` if there is no room, and `ModelUnsupported` for names that are no files' names.
        """
        for piece in pieces:
            if piece["name"] in ("", ".", "..") or "/" in piece["name"] or "\0" in piece["name"]:
                raise ModelUnsupported(f"{piece['name']!r:.80} is no file's name")
        size = sum(piece["size"] for piece in pieces)
        if not self._limit_bytes:
            raise ModelNotFound("sending files is turned off (group.model_cache_bytes = 0); raise that")
        if size > self._limit_bytes:
            raise ModelNotFound(
                f"its {units.size(size)} are more than group.model_cache_bytes = {self._limit_bytes} allow; raise that"
            )
        with self.explained(size):
            self._make_folder()
            lock = self._lock()
            try:
                remove_leavings(self._folder, _UNFINISHED)
                self._make_room(size)
                copy = Copy(*make_folder(self._folder, _UNFINISHED), key, contents)
                try:
                    copy.make(pieces)
                except BaseException:
                    copy.discard()
                    raise
                return copy
            finally:
                os.close(lock)

    def add(self, copy: Copy, main: str) -> Checkpoint:
        """Put a copy in place whose files have all come; returns the model, which stays there until `release`.

        Raises `ModelNotFound` if it isn't what was to come, or can't be put there; then it is discarded.
        """
        try:
            with self.explained():
                copy.finish()
                if read_checkpoint(str(copy.folder / _MODEL / main)).contents != copy.contents:
                    raise ModelNotFound("what has come is not what was to be sent; load it again")
                # Nobody may make room before it is held again.
                lock = self._lock()
                try:
                    with suppress(OSError):  # another actor of this host may have been faster
                        copy.folder.rename(self._entry(copy.key))
                        copy.close()
                    found = self.find(copy.key, copy.contents, main)
                finally:
                    os.close(lock)
            if found is None:
                raise ModelNotFound(f"it was removed from {self._folder} at once; load it again")
            return found
        finally:
            copy.discard()

    def _entry(self, key: str) -> Path:
        assert _ENTRY.fullmatch(key)
        return self._folder / key

    def _is_safe(self) -> bool:
        """Whether nobody but this process's user may write in the folder. Raises `OSError` if it is not there."""
        state = self._folder.stat()
        return state.st_uid == os.geteuid() and not state.st_mode & 0o022

    def _make_folder(self) -> None:
        if not self._folder.is_absolute():
            raise ModelNotFound(f"group.model_cache: {self._folder} needs a home folder; set an absolute path")
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not self._is_safe():
            raise ModelNotFound(
                f"group.model_cache: {self._folder} belongs to another user, or others may write there; use a folder "
                "of the user that Ray runs as"
            )

    def _lock(self) -> int:
        """Wait until no other process makes room. Raises `ModelNotFound` if that takes longer than `LOCK_S`."""
        lock = os.open(self._folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            until = time.monotonic() + LOCK_S
            while True:
                with suppress(BlockingIOError):
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return lock
                if time.monotonic() > until:
                    raise ModelNotFound(
                        f"another process has made room in {self._folder} (group.model_cache) for {LOCK_S:g} s: if it "
                        f"hangs, end it (`fuser {self._folder}/.lock` names it), and load the model again"
                    )
                time.sleep(LOOK_S)
        except BaseException:
            os.close(lock)
            raise

    def _make_room(self, size: int) -> None:
        """Remove the least recently used models that nobody reads, until there is room in limit and on the disk."""
        entries = [each for each in self._folder.iterdir() if _ENTRY.fullmatch(each.name)]
        used = sum(map(_size, self._folder.glob(f"*/{_MODEL}/*")))
        free = shutil.disk_usage(self._folder).free
        if size > free + used:
            # To remove any would be in vain.
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        for entry in sorted(entries, key=_used_at):
            if used + size <= self._limit_bytes and size <= free:
                return
            freed = sum(map(_size, entry.glob(f"{_MODEL}/*")))
            if _remove(entry):
                used, free = used - freed, shutil.disk_usage(self._folder).free
        if used + size > self._limit_bytes:
            raise ModelNotFound(
                f"its {units.size(size)} and the {units.size(used)} that are in use in {self._folder} are more than "
                f"group.model_cache_bytes = {self._limit_bytes} allow; raise that"
            )

    @contextmanager
    def explained(self, size: int = 0) -> Iterator[None]:
        """Within, errors of the file system become `ModelNotFound`."""
        try:
            yield
        except OSError as error:
            where = self._folder
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                free = (
                    f"{units.size(_free(where))} of the {units.size(size)} that it needs are free"
                    if size
                    else "nothing is free"
                )
                raise ModelNotFound(
                    f"the disk of {where} (group.model_cache) is full: {free}; make room, or set another folder"
                ) from None
            raise ModelNotFound(
                f"{error.filename or where} (group.model_cache): {error.strerror}; set another folder"
            ) from None


def _remove(entry: Path) -> bool:
    """Remove a model that nobody holds; returns whether it is gone."""
    if (lock := claim(entry)) is None:
        return False
    # Under another name first: its lock is a file in it, and once that file is gone somebody could claim what is left.
    leaving = entry.with_name(_UNFINISHED + secrets.token_hex(8))
    try:
        entry.rename(leaving)
        shutil.rmtree(leaving, ignore_errors=True)
    except OSError:
        return False
    finally:
        os.close(lock)
    return not leaving.exists()


def _used_at(entry: Path) -> int:
    try:
        return entry.stat().st_mtime_ns
    except OSError:  # it has just been removed
        return 0


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _free(folder: Path) -> int:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return 0

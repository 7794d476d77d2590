"""Model files that clients send because the daemon can't read theirs: by content, in pieces, resumable."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tacod.serving.upload_folder import OWN, PART, WHOLE, FileState, Keep, UploadFolder, state_of
from tacod_client.errors import ArgumentError, ModelNotAllowed, ModelNotFound, Unavailable
from tacod_client.upload import PIECE_BYTES, upload_id

__all__ = ["PART", "WHOLE", "Uploads"]

PENDING = 64
"""Most files under way at once. If one makes room for another, its client begins it again, and goes on where it was."""
CHECKED = 4
"""Pieces on the disk that one request compares; other clients wait meanwhile."""
UNDER_WAY_S = 30.0
"""How long a file under way stays after its last piece, though others want its room."""
TO_BE_LOADED_S = 600.0
"""How long a whole file stays for the client that sent it, before it is loaded."""
_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass
class Pending:
    """A file under way: which of its pieces are on the disk."""

    nbytes: int
    digests: Sequence[bytes]
    good: set[int] = field(default_factory=set)
    todo: list[int] = field(default_factory=list)
    """Pieces on the disk that were not compared yet, the first one last."""
    state: FileState | None = None
    """The part's, as it was left."""
    _first: int = 0

    @property
    def here(self) -> int:
        """How many bytes, from the beginning, are right."""
        while self._first in self.good:
            self._first += 1
        return min(self._first * PIECE_BYTES, self.nbytes)

    def check_against(self, state: FileState | None) -> None:
        """Take the part for what it is now: if it isn't as it was left, all that is there is to be compared."""
        if state != self.state:
            there = 0 if state is None else -(-state[1] // PIECE_BYTES)
            self.good.clear()
            self._first = 0
            self.todo = list(reversed(range(min(there, len(self.digests)))))
            self.state = state


class Uploads:
    """A folder of files named by their content, the least recently used deleted to stay within ``limit`` bytes.

    Each piece is checked against its digest as it comes. A file under way lies beside the others as ``ID.tacod.part``;
    who goes on with it gets what is there compared first, unless it is known that nobody else wrote to it. Files that
    ``in_use`` names stay, and so do, for a while, those of other clients that are under way or about to be loaded.
    Files that are somebody else's count, and stay.
    """

    def __init__(self, folder: str | None, limit: int, in_use: Callable[[], Iterable[str]] = tuple) -> None:
        self.folder = UploadFolder(folder) if folder is not None else None
        self.limit = limit
        self._in_use = in_use
        self._pending: OrderedDict[str, Pending] = OrderedDict()
        self._held: dict[tuple[str, bytes], float] = {}
        """Until when a file stays for a client."""

    def apply_config(self, folder: str | None, limit: int) -> None:
        """Apply another configuration; uploads that are under way go on, if the folder is the same."""
        self.limit = limit
        if folder != (str(self.folder.path) if self.folder is not None else None):
            self.folder = UploadFolder(folder) if folder is not None else None
            self._pending.clear()
            self._held.clear()

    def begin(self, nbytes: int, digests: Sequence[bytes], owner: bytes = b"") -> tuple[str, int]:
        """Announce a file by its size and its pieces' SHA-256; returns its id and how many bytes of it are here.

        Where a part is to be gone on with, each call compares a few of its pieces (see `unchecked`). Raises
        `ModelNotAllowed` if uploads are off or there can't be room, `ArgumentError` if pieces and size disagree,
        `Unavailable` if there is no room now or the folder can't be used.
        """
        folder = self._used_folder()
        if nbytes > self.limit:
            raise ModelNotAllowed(f"a file of {nbytes} bytes; models.upload_bytes is {self.limit}")
        if nbytes < 1 or len(digests) != -(-nbytes // PIECE_BYTES) or any(len(digest) != 32 for digest in digests):
            raise ArgumentError(f"digests: {nbytes} bytes take {-(-nbytes // PIECE_BYTES)} of 32", argument="digests")
        name = upload_id(nbytes, digests)
        try:
            folder.make()
            if folder.holds(name, nbytes):
                # Where nothing can be written, nothing has to make room either.
                with contextlib.suppress(OSError):
                    folder.note_use(name)
                self._hold(name, owner, TO_BE_LOADED_S)
                return name, nbytes
            pending = self._pending.get(name) or Pending(nbytes, digests)
            self._refresh(name, pending)
            self._compare(name, pending)
            if pending.here == nbytes:
                return name, self._finish(name, pending, owner)
            self._leavers(name, pending, owner)
        except OSError as error:
            raise Unavailable(f"{folder.path} (models.uploads) can't be used: {error.strerror}") from None
        if pending.state is not None:
            self._hold(name, owner, UNDER_WAY_S)
        self._pending[name] = pending
        self._pending.move_to_end(name)
        if len(self._pending) > PENDING:
            self._pending.popitem(last=False)
        return name, pending.here

    def unchecked(self, name: str) -> int:
        """How many bytes of a file under way are on the disk and not compared yet; `begin` goes on with it."""
        pending = self._pending.get(name)
        return len(pending.todo) * PIECE_BYTES if pending is not None else 0

    def add(self, name: str, offset: int, piece: bytes, owner: bytes = b"") -> int:
        """Keep the piece at ``offset``; returns how many bytes are here now, the whole file's if that was the last.

        Raises `ArgumentError` for an unknown file or a piece that isn't what was announced, `Unavailable` if it can't
        be written: then what was written of the file goes.
        """
        self._used_folder()
        pending = self._pending.get(name)
        if pending is None:
            raise ArgumentError(f"upload: {name!r:.80} was not announced; begin it again", argument="upload")
        self._pending.move_to_end(name)
        index, odd = divmod(offset, PIECE_BYTES)
        if odd or not 0 <= index < len(pending.digests):
            raise ArgumentError(f"offset: {offset} is where no piece begins", argument="offset")
        if hashlib.sha256(piece).digest() != pending.digests[index]:
            raise ArgumentError(
                f"data: the piece at {offset} is not what was announced; send it again", argument="data"
            )
        try:
            self._refresh(name, pending)
            if offset > pending.here:
                # What lay there went to make room, or somebody else has written to it.
                raise ArgumentError(
                    f"offset: {offset} is behind what is here; begin the upload again", argument="upload"
                )
            if index not in pending.good:
                self._write(name, pending, index, piece, owner)
            self._hold(name, owner, UNDER_WAY_S)
            return pending.here if pending.here < pending.nbytes else self._finish(name, pending, owner)
        except OSError as error:
            raise self._cannot_write(name, error) from None

    def path(self, name: str) -> Path:
        """Where a whole file lies."""
        return self._used_folder().whole(name)

    def release(self, owner: bytes) -> None:
        """A client is gone: its uploads stay no longer than others'."""
        for key in [key for key in self._held if key[1] == owner]:
            del self._held[key]

    def note_load(self, paths: Iterable[str]) -> None:
        """Files are being loaded, and are in use from now on."""
        if self.folder is None:
            return
        names = set(map(self._name_of, paths)) - {None}
        for key in [key for key in self._held if key[0] in names]:
            del self._held[key]
        for name in filter(None, names):
            with contextlib.suppress(OSError):
                self.folder.note_use(name)

    def check(self, path: str) -> None:
        """Raise `ModelNotFound` if a path that is to be loaded is an upload's, and that isn't there as it was sent."""
        name = self._name_of(path)
        if name is None:
            return
        intact = self._used_folder().intact(name)
        if intact is None and os.path.isabs(path):
            raise ModelNotFound(f"{path}: this upload is no longer there, it may have made room; upload it again")
        if intact is False:
            raise ModelNotFound(f"{path}: somebody has changed this file since it was sent; upload it again")

    def _name_of(self, path: str) -> str | None:
        """The upload that lies at a path, absolute or relative to the folder; None if none could."""
        found = OWN.fullmatch(os.path.basename(path))
        if found is None or found[2] != WHOLE or self.folder is None:
            return None
        folder = os.path.realpath(self.folder.path)
        return found[1] if os.path.realpath(os.path.join(folder, os.path.dirname(path))) == folder else None

    def _used_folder(self) -> UploadFolder:
        if self.folder is None:
            raise ModelNotAllowed(
                "uploads are off; set models.uploads to a folder in tacod's configuration, or put the file under one "
                "of models.roots"
            )
        return self.folder

    # --- parts ----------------------------------------------------------------------------------------------------

    def _refresh(self, name: str, pending: Pending) -> None:
        found = self._used_folder().look(name)
        pending.check_against(None if found is None else state_of(found))

    def _compare(self, name: str, pending: Pending) -> None:
        """Compare a few of the pieces that lie there with what was announced."""
        now = [pending.todo.pop() for _ in range(min(CHECKED, len(pending.todo)))]
        if now:
            with self._used_folder().open(name) as file:
                pending.good |= {index for index in now if _digest(file, index, pending) == pending.digests[index]}

    def _write(self, name: str, pending: Pending, index: int, piece: bytes, owner: bytes) -> None:
        folder = self._used_folder()
        try:
            for path in self._leavers(name, pending, owner):
                _remove(path)
            while not self._fits(name, pending, index, piece, owner):
                pass
        except (OSError, Unavailable, ModelNotAllowed):
            # The disk is not to stay full of what can't be finished.
            folder.discard(name)
            del self._pending[name]
            raise
        found = folder.look(name)
        pending.state = None if found is None else state_of(found)
        pending.good.add(index)
        with contextlib.suppress(ValueError):
            pending.todo.remove(index)

    def _fits(self, name: str, pending: Pending, index: int, piece: bytes, owner: bytes) -> bool:
        """Write a piece; False if another upload had to go, and it is to be tried again. Raises `OSError`."""
        try:
            with self._used_folder().open(name, make=True) as file:
                done, room = 0, memoryview(piece)
                while done < len(piece):
                    done += os.pwrite(file, room[done:], index * PIECE_BYTES + done)
                # Now, and not all of it at the end, when everybody would wait for the disk.
                os.fdatasync(file)
            return True
        except OSError as error:
            if error.errno not in _FULL or not self._give_way(name, pending, owner):
                raise
            return False

    def _finish(self, name: str, pending: Pending, owner: bytes) -> int:
        self._used_folder().finish(name, pending.nbytes)
        self._pending.pop(name, None)
        self._hold(name, owner, TO_BE_LOADED_S)
        return pending.nbytes

    def _cannot_write(self, name: str, error: OSError) -> Unavailable:
        assert self.folder is not None
        return Unavailable(
            f"the upload can't be written to {self.folder.path} (models.uploads): {error.strerror}; make room there, "
            "or have models.uploads name a folder on another disk"
        )

    # --- room -----------------------------------------------------------------------------------------------------

    def _hold(self, name: str, owner: bytes, seconds: float) -> None:
        now = time.monotonic()
        self._held = {key: until for key, until in self._held.items() if until > now}
        self._held[name, owner] = now + seconds

    def _leavers(self, name: str, pending: Pending, owner: bytes) -> list[Path]:
        return self._used_folder().leavers(name, pending.nbytes, self.limit, self._keeping(owner))

    def _keeping(self, owner: bytes) -> Callable[[str, bool], Keep]:
        """What is to be known of another upload while room is made for one of this client's."""
        used: Collection[str | None] = set(map(self._name_of, self._in_use()))
        now = time.monotonic()
        holders: dict[str, set[bytes]] = {}
        for (name, holder), until in self._held.items():
            if until > now:
                holders.setdefault(name, set()).add(holder)

        def keep(name: str, whole: bool) -> Keep:
            mine = holders.get(name, set())
            pending = None if whole or not mine else self._pending.get(name)
            return Keep(
                stays=(whole and name in used) or bool(mine - {owner}),
                last=owner in mine,
                nbytes=pending.nbytes if pending is not None else 0,
            )

        return keep

    def _give_way(self, name: str, pending: Pending, owner: bytes) -> bool:
        """Remove one more upload, because the disk or a quota is full; whether that can help."""
        leavers, taken = self._used_folder().candidates(name, self._keeping(owner))
        rest = pending.nbytes - len(pending.good) * PIECE_BYTES
        if not leavers or taken + PIECE_BYTES < rest:
            return False
        _remove(leavers[0])
        return True


def _remove(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        path.unlink()


def _digest(file: int, index: int, pending: Pending) -> bytes:
    """Of what lies at a piece's place."""
    hashed, at = hashlib.sha256(), index * PIECE_BYTES
    end = min(at + PIECE_BYTES, pending.nbytes)
    while at < end and (data := os.pread(file, end - at, at)):
        hashed.update(data)
        at += len(data)
    return hashed.digest()

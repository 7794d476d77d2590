"""Model files that clients send because the daemon can't read theirs: by content, in pieces, resumable."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import stat
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tacod.places import kind_of
from tacod_client.errors import ArgumentError, ModelNotAllowed, Unavailable
from tacod_client.upload import PIECE_BYTES, upload_id

__all__ = ["Uploads"]

WHOLE, PART = ".tacod.safetensors", ".tacod.part"
OWN = re.compile(rf"[0-9a-f]{{64}}({re.escape(WHOLE)}|{re.escape(PART)})")
"""Names of what tacod puts there. Others too name files by 64 digits, hub caches do, but not so."""

PENDING = 64
"""Files that may be under way at once. Who began the one that gives way to another begins it again, and goes on."""


@dataclass(frozen=True)
class Pending:
    """A file under way."""

    nbytes: int
    digests: Sequence[bytes]


class Uploads:
    """A folder of files named by their content, the least recently used deleted to stay within ``limit`` bytes.

    Each piece is checked against its digest as it comes, so what lies in the folder need not be read again. A file
    under way lies beside the others as ``ID.tacod.part``; its size says how far it is, to whoever goes on with it.
    Other files there are somebody else's: they count, and stay.
    """

    def __init__(self, folder: str | None, limit: int) -> None:
        self.folder = Path(folder) if folder is not None else None
        self.limit = limit
        self._pending: OrderedDict[str, Pending] = OrderedDict()

    def begin(self, nbytes: int, digests: Sequence[bytes]) -> tuple[str, int]:
        """Announce a file by its size and its pieces' SHA-256; returns its id and how many bytes of it are here.

        Raises `ModelNotAllowed` if uploads are off or there can't be room, `ArgumentError` if pieces and size disagree,
        `Unavailable` if the folder can't be used.
        """
        if self.folder is None:
            raise ModelNotAllowed(
                "uploads are off; set models.uploads to a folder in tacod's configuration, or put the file under one "
                "of models.roots"
            )
        if nbytes > self.limit:
            raise ModelNotAllowed(f"a file of {nbytes} bytes; models.upload_bytes is {self.limit}")
        if nbytes < 1 or len(digests) != -(-nbytes // PIECE_BYTES) or any(len(digest) != 32 for digest in digests):
            raise ArgumentError(f"digests: {nbytes} bytes take {-(-nbytes // PIECE_BYTES)} of 32", argument="digests")
        name = upload_id(nbytes, digests)
        try:
            done, part = self.path(name), self._part(name)
            if _size(done) is not None:
                os.utime(done)
                return name, nbytes
            here = (_size(part) or 0) // PIECE_BYTES * PIECE_BYTES
            self._leavers(nbytes, part)
        except OSError as error:
            raise Unavailable(f"{self.folder} (models.uploads) can't be used: {error.strerror}") from None
        self._pending[name] = Pending(nbytes, digests)
        self._pending.move_to_end(name)
        if len(self._pending) > PENDING:
            self._pending.popitem(last=False)
        return name, here

    def add(self, name: str, offset: int, piece: bytes) -> int:
        """Keep the piece at ``offset``; returns how many bytes are here now, the whole file's if that was the last.

        Raises `ArgumentError` for an unknown file or a piece that isn't what was announced, `Unavailable` if it can't
        be written.
        """
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
            return self._write(name, pending, offset, piece)
        except OSError as error:
            raise Unavailable(
                f"the upload can't be written to {self.folder}: {error.strerror}; make room there"
            ) from None

    def path(self, name: str) -> Path:
        """Where a whole file lies."""
        assert self.folder is not None
        return self.folder / f"{name}{WHOLE}"

    def _part(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{name}{PART}"

    def _write(self, name: str, pending: Pending, offset: int, piece: bytes) -> int:
        part = self._part(name)
        part.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if offset == 0:
            self._make_room(pending.nbytes, part)
        size = _size(part)
        if offset > (size or 0):
            # What lay there went to make room, or another client has begun it anew.
            raise ArgumentError(f"offset: {offset} is behind what is here; begin the upload again", argument="upload")
        with _open(part, new=size is None) as file:
            # Another client may have sent this piece meanwhile; the same bytes in the same place do no harm.
            file.seek(offset)
            file.write(piece)
        here = part.stat().st_size
        if here == pending.nbytes:
            _size(self.path(name))  # raises if it is no file that could give way
            part.rename(self.path(name))
            del self._pending[name]
        return here

    def _make_room(self, nbytes: int, keep: Path) -> None:
        for path in self._leavers(nbytes, keep):
            with contextlib.suppress(FileNotFoundError):
                path.unlink()

    def _leavers(self, nbytes: int, keep: Path) -> list[Path]:
        """Which uploads give way to a file of so many bytes. Raises `ModelNotAllowed` if that isn't enough."""
        assert self.folder is not None
        own, excess, others = [], nbytes - self.limit, 0
        with contextlib.suppress(FileNotFoundError), os.scandir(self.folder) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    if entry.name != keep.name and entry.is_file(follow_symlinks=False):
                        found = entry.stat(follow_symlinks=False)
                        excess += found.st_size
                        if OWN.fullmatch(entry.name):
                            own.append((found.st_mtime, found.st_size, entry.name))
                        else:
                            others += found.st_size
        if excess > sum(size for _, size, _ in own):
            raise ModelNotAllowed(
                f"a file of {nbytes} bytes; models.upload_bytes is {self.limit}, and files in {self.folder} that tacod "
                f"didn't put there take {others} of it; have models.uploads name a folder of its own, or raise it"
            )
        leavers = []
        for _, size, name in sorted(own):
            if excess <= 0:
                break
            excess -= size
            leavers.append(self.folder / name)
        return leavers


def _size(path: Path) -> int | None:
    """How much of a file is here; None if it isn't. Raises `Unavailable` if something else has its name."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(found.st_mode):
        raise Unavailable(f"{path} is {kind_of(path)}, which tacod didn't make; move it away")
    if found.st_nlink > 1 and path.name.endswith(PART):
        # To go on with it would be to write to a file of another name.
        raise Unavailable(f"{path} is a hard link, which tacod didn't make; move it away")
    return found.st_size


def _open(path: Path, new: bool) -> BinaryIO:
    """Open a part, and nothing that a link in its place leads to."""
    flags = os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    return open(os.open(path, flags | (os.O_CREAT | os.O_EXCL if new else 0), 0o666), "wb")

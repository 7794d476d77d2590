"""Model files that clients send because the daemon can't read theirs: by content, in pieces, resumable."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tacod_client.errors import ArgumentError, ModelNotAllowed, Unavailable
from tacod_client.upload import PIECE_BYTES, upload_id

__all__ = ["Uploads"]

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
    under way lies beside the others as ``ID.part``; its size says how far it is, to whoever goes on with it.
    """

    def __init__(self, folder: str | None, limit: int) -> None:
        self.folder = Path(folder) if folder is not None else None
        self.limit = limit
        self._pending: OrderedDict[str, Pending] = OrderedDict()

    def begin(self, nbytes: int, digests: Sequence[bytes]) -> tuple[str, int]:
        """Announce a file by its size and its pieces' SHA-256; returns its id and how many bytes of it are here.

        Raises `ModelNotAllowed` if uploads are off or it is too large, `ArgumentError` if pieces and size disagree,
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
            if done.exists():
                os.utime(done)
                return name, nbytes
            here = _size(part) // PIECE_BYTES * PIECE_BYTES
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
        return self.folder / f"{name}.safetensors"

    def _part(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{name}.part"

    def _write(self, name: str, pending: Pending, offset: int, piece: bytes) -> int:
        part = self._part(name)
        part.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if offset == 0:
            self._make_room(pending.nbytes, part)
        if offset > _size(part):
            # What lay there went to make room, or another client has begun it anew.
            raise ArgumentError(f"offset: {offset} is behind what is here; begin the upload again", argument="upload")
        with part.open("r+b" if part.exists() else "xb") as file:
            # Another client may have sent this piece meanwhile; the same bytes in the same place do no harm.
            file.seek(offset)
            file.write(piece)
        here = part.stat().st_size
        if here == pending.nbytes:
            part.rename(self.path(name))
            del self._pending[name]
        return here

    def _make_room(self, nbytes: int, keep: Path) -> None:
        assert self.folder is not None
        files = sorted((path for path in self.folder.iterdir() if path != keep), key=lambda path: path.stat().st_mtime)
        excess = sum(path.stat().st_size for path in files) + nbytes - self.limit
        for path in files:
            if excess <= 0:
                break
            excess -= path.stat().st_size
            with contextlib.suppress(FileNotFoundError):
                path.unlink()


def _size(path: Path) -> int:
    """How much of a file is here; nothing if it isn't."""
    return path.stat().st_size if path.exists() else 0

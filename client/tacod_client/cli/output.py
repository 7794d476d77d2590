"""What ``tacoctl`` writes: JSON documents and files."""

from __future__ import annotations

import json
import math
import os
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

from tacod_client.errors import RequestError, TacodError

__all__ = ["Output", "document", "stdout"]


@contextmanager
def stdout() -> Iterator[None]:
    """Within, stdout is written to; an error of the system's carries its name."""
    try:
        yield
        sys.stdout.flush()
    except OSError as error:
        error.filename = error.filename or "stdout"
        raise


def document(value: Any, indent: int | None = 2) -> None:
    """Write a JSON document to stdout, in UTF-8 whatever the locale is."""
    text = json.dumps(_finite(value), indent=indent, ensure_ascii=False) + "\n"
    # The escape of a lone surrogate is JSON's own.
    content = text.encode("utf-8", "backslashreplace")
    with stdout():
        sys.stdout.flush()
        if (buffer := getattr(sys.stdout, "buffer", None)) is not None:
            buffer.write(content)
        else:
            sys.stdout.write(content.decode())


def _finite(value: Any) -> Any:
    """A value with null for what JSON has no numbers for."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Output:
    """A file that will be written later; entering the block checks that it can be.

    An old file keeps its content until then. Leaving the block without `write` leaves no new file behind. Raises
    `RequestError` if the file can't be made.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.written = False
        try:
            # A link may lead to a file that isn't there yet.
            self._real = os.path.realpath(path)
            self._is_new = not os.path.lexists(self._real)
            self._file = _opened(path)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise RequestError(f"{path}: {reason}; name another file by --output") from None

    def __enter__(self) -> Output:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with suppress(OSError):
            if self._is_new and not self.written and not self._is_gone():
                Path(self._real).unlink()
        with suppress(OSError):
            self._file.close()

    def write(self, content: bytes) -> None:
        """Write the file. If that fails (a disk is full), write a temporary file instead; the `TacodError` names it."""
        try:
            self._put(content)
            if self._is_gone():
                # It was removed or moved since it was opened.
                self._file.close()
                self._file = _opened(self.path)
                self._put(content)
            self._file.close()
        except OSError as error:
            raise TacodError(f"{self.path}: {error.strerror}; {_kept(self.path, content)}") from None
        self.written = True

    def _put(self, content: bytes) -> None:
        left = memoryview(content)
        while left:
            left = left[self._file.write(left) or 0 :]
        # A pipe or a device has no length.
        with suppress(OSError):
            os.ftruncate(self._file.fileno(), len(content))

    def _is_gone(self) -> bool:
        """Whether the open file isn't what lies at the path any more."""
        try:
            found = os.fstat(self._file.fileno())
            return stat.S_ISREG(found.st_mode) and not os.path.samestat(os.stat(self.path), found)
        except (OSError, ValueError):
            return True


def _opened(path: str) -> FileIO:
    return FileIO(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666), "wb")


def _kept(path: str, content: bytes) -> str:
    """Write to a temporary file; returns what became of it, in words."""
    try:
        number, kept = tempfile.mkstemp(prefix="tacoctl-", suffix=Path(path).suffix)
        with open(number, "wb") as file:
            file.write(content)
    except OSError as error:
        return f"it could not be kept in {tempfile.gettempdir()} either ({error.strerror})"
    return f"it was kept as {kept}"

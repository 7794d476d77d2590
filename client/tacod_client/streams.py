"""The standard streams of a program, whatever it is started with and whatever becomes of them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

__all__ = ["complain", "hold", "mute", "stdout"]


def hold() -> None:
    """See that there are all three, and that stdout and stderr take any text: what they can't hold is escaped.

    Those that were closed at the start lead nowhere, for this process and those that it starts. Else the next files
    that are opened would take their numbers, and what prints would print there.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
            os.set_inheritable(number, True)
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if (reconfigure := getattr(stream, "reconfigure", None)) is not None:
            reconfigure(errors="backslashreplace")


@contextmanager
def stdout() -> Iterator[None]:
    """A context for writing to stdout; the system's errors in it name stdout."""
    try:
        yield
        sys.stdout.flush()
    except OSError as error:
        error.filename = error.filename or "stdout"
        raise


def complain(lines: str) -> None:
    """Print on stderr, if it takes it: whoever was to read it may be gone, and the exit code says it too."""
    try:
        print(lines, file=sys.stderr, flush=True)
    except OSError:
        mute(sys.stderr)


def mute(stream: TextIO) -> None:
    """Send nowhere what a stream holds still and what it will get: it can't be written to."""
    with suppress(OSError):
        null = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(null, stream.fileno())
        finally:
            os.close(null)

"""Log lines: for journald with priorities, for a terminal with times."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from types import TracebackType

__all__ = ["complain", "configure", "hold_streams"]

_PRIORITIES = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}


class _JournalFormatter(logging.Formatter):
    """Each line behind its syslog priority (sd-daemon(3)); journald adds the time."""

    def format(self, record: logging.LogRecord) -> str:
        priority = _PRIORITIES.get(record.levelno, 6)
        return "\n".join(f"<{priority}>{line}" for line in super().format(record).splitlines())


def hold_streams() -> None:
    """Have standard streams that were closed at the start lead nowhere, for this process and those that it starts.

    Else the next files that are opened would take their numbers, and what prints would print there.
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
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115


def configure(level: str, prefix: str = "") -> None:
    """Send the log to stderr, at ``level`` and above, each record behind ``prefix``; and what ends the process too."""
    handler = logging.StreamHandler(sys.stderr)
    if _to_journal():
        handler.setFormatter(_JournalFormatter(f"{prefix}%(message)s"))
    else:
        handler.setFormatter(
            logging.Formatter(f"%(asctime)s.%(msecs)03d %(levelname)-7s {prefix}%(message)s", datefmt="%H:%M:%S")
        )
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    sys.excepthook = _log_uncaught


def complain(text: object) -> None:
    """Print why there is no daemon, as it is; for journald each line is an error."""
    mark = f"<{_PRIORITIES[logging.ERROR]}>" if _to_journal() else ""
    # Whoever was to read it may be gone; the exit code says it too.
    with contextlib.suppress(OSError):
        for line in str(text).splitlines():
            print(f"{mark}{line}", file=sys.stderr, flush=True)


def _to_journal() -> bool:
    """Whether stderr is journald's. A terminal may have inherited the variable from the desktop, but not the stream."""
    with contextlib.suppress(OSError):
        stream = os.fstat(2)
        return os.environ.get("JOURNAL_STREAM") == f"{stream.st_dev}:{stream.st_ino}"
    return False


def _log_uncaught(kind: type[BaseException], error: BaseException, at: TracebackType | None) -> None:
    logging.getLogger().critical("ended by an error of its own", exc_info=(kind, error, at))

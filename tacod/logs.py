"""Log lines: for journald with priorities, for a terminal with times."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from types import TracebackType

from tacod_client import streams

__all__ = ["complain", "configure"]

_PRIORITIES = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}


class _JournalFormatter(logging.Formatter):
    """Each line behind its syslog priority (sd-daemon(3)); journald adds the time."""

    def format(self, record: logging.LogRecord) -> str:
        priority = _PRIORITIES.get(record.levelno, 6)
        return "\n".join(f"<{priority}>{line}" for line in super().format(record).splitlines())


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
    """Print why the daemon can't start; for journald each line is an error."""
    mark = f"<{_PRIORITIES[logging.ERROR]}>" if _to_journal() else ""
    streams.complain("\n".join(f"{mark}{line}" for line in str(text).splitlines()))


def _to_journal() -> bool:
    """Whether stderr is journald's. A terminal may have inherited the variable from the desktop, but not the stream."""
    with contextlib.suppress(OSError):
        stream = os.fstat(2)
        return os.environ.get("JOURNAL_STREAM") == f"{stream.st_dev}:{stream.st_ino}"
    return False


def _log_uncaught(kind: type[BaseException], error: BaseException, at: TracebackType | None) -> None:
    logging.getLogger().critical("ended by an error of its own", exc_info=(kind, error, at))

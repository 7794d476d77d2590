"""How ``tacoctl`` ends: its exit code, and one line on stderr if it failed; never a traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tacod_client import errors, streams
from tacod_client.streams import mute, stdout
from tacod_client.text import printable

__all__ = ["EXIT_CODES", "complain", "exit_code", "guarded", "mute"]

EXIT_CODES: tuple[tuple[type[errors.TacodError], int], ...] = (
    (errors.ConnectionFailed, 3),
    (errors.ConfigInvalid, 78),
    (errors.JobNotFound, 4),
    (errors.ModelNotFound, 4),
    (errors.Unavailable, 69),
    (errors.QueueFull, 75),
    (errors.NotAllowed, 77),
    (errors.ModelNotAllowed, 77),
    (errors.TacodError, 1),
)


def exit_code(error: errors.TacodError) -> int:
    """The exit code that stands for an error."""
    return next(code for kind, code in EXIT_CODES if isinstance(error, kind))


def guarded(program: Callable[[], int]) -> int:
    """Run a program to its exit code, whatever it is started with and whatever becomes of it."""
    streams.hold()
    try:
        code = program()
        # What can't be written shows here, and not when the interpreter ends.
        with stdout():
            return code
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0
        try:
            with stdout():
                pass
        except OSError as error:
            return _not_written(error)
        raise SystemExit(code) from None
    except errors.TacodError as error:
        # Tracebacks of ranks and lists of a configuration's faults have lines; in other messages names may have them.
        has_lines = isinstance(error, (errors.EngineError, errors.ConfigInvalid))
        complain(error.message if has_lines else printable(error.message))
        code = exit_code(error)
    except KeyboardInterrupt:
        code = 130
    except OSError as error:
        return _not_written(error)
    except MemoryError:
        complain("this machine's memory doesn't suffice; ask for less (a smaller size, batch or file)")
        code = 1
    except Exception as error:
        at = error.__traceback__
        while at is not None and at.tb_next is not None:
            at = at.tb_next
        where = f" ({Path(at.tb_frame.f_code.co_filename).name}:{at.tb_lineno})" if at is not None else ""
        reason = " ".join(str(error).split())
        complain(f"{type(error).__name__}: {reason}{where}; this is a fault of tacoctl's own, please report it")
        code = 1
    with suppress(OSError):
        sys.stdout.flush()
        return code
    mute(sys.stdout)
    return code


def _not_written(error: OSError) -> int:
    """Of the system's errors those that no verb has a word for: mostly stdout's."""
    # The reader of our output went away, as `head` does; nothing is left to say to it.
    if not isinstance(error, BrokenPipeError):
        reason = error.strerror or str(error)
        complain(f"{os.fsdecode(error.filename)}: {reason}" if isinstance(error.filename, (str, bytes)) else reason)
    mute(sys.stdout)
    return 1


def complain(text: str) -> None:
    """A line on stderr, if it takes one."""
    streams.complain("\n".join(printable(line) for line in f"tacoctl: {text}".split("\n")))

"""Files that come with the package beside its modules, and errors of the file system."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from tacod_client.errors import NotAllowed, TacodError

__all__ = ["file_errors", "shipped"]


def shipped(folder: str, file: str) -> Path:
    """A folder of files that come with the package, such as ``systemd``; ``file`` is one of those that lie in it.

    Raises `TacodError` if it isn't in this installation.
    """
    # In a wheel it lies in the package; in a checkout at its root.
    here = Path(__file__)
    for place in (here.parents[1] / folder, here.parents[3] / folder):
        if (place / file).is_file():
            return place
    raise TacodError(f"{folder}/{file} is not in this installation; install taco-dit again")


@contextlib.contextmanager
def file_errors() -> Iterator[None]:
    """Raise errors of the file system as `NotAllowed` or `TacodError` with the path; a broken pipe stays as it is."""
    try:
        yield
    except BrokenPipeError:
        raise
    except PermissionError as error:
        raise NotAllowed(f"{error.filename}: permission denied; run it with sudo") from None
    except OSError as error:
        raise TacodError(f"{error.filename}: {error.strerror or error}") from None

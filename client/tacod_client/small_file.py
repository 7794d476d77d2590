"""Small files that others made, such as keys: read whole, or refused at once."""

from __future__ import annotations

import errno
import os
import stat

from tacod_client.units import size

__all__ = ["read_small"]


def read_small(path: str | os.PathLike[str], most_bytes: int) -> bytes:
    """A regular file of so many bytes at most.

    A pipe that nobody writes to would keep whoever reads it for ever, and a device might never end. Raises `OSError`
    for these, for a larger file, and for what can't be read, each with the path.
    """
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        mode = os.fstat(file).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "Not a regular file", path)
        with os.fdopen(file, "rb", closefd=False) as reader:
            content = reader.read(most_bytes + 1)
    except OSError as error:
        error.filename = path
        raise
    finally:
        os.close(file)
    if len(content) > most_bytes:
        raise OSError(errno.EFBIG, f"Larger than {size(most_bytes)}", path)
    return content

"""The folder of uploads on its disk: its files, its free space, and which files may make room."""

from __future__ import annotations

import contextlib
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tacod.serving.unix_socket import kind_of
from tacod_client.errors import ModelNotAllowed, Unavailable

__all__ = ["OWN", "PART", "WHOLE", "FileState", "Keep", "UploadFolder", "state_of"]

WHOLE, PART = ".tacod.safetensors", ".tacod.part"
OWN = re.compile(rf"([0-9a-f]{{64}})({re.escape(WHOLE)}|{re.escape(PART)})")
"""Names of what tacod puts there. Others too name files by 64 digits, hub caches do, but not so."""

FileState = tuple[int, int, int, int]
"""Of a file: see `state_of`."""


@dataclass(frozen=True)
class Keep:
    """What is known of an upload while room is made for another one."""

    stays: bool = False
    """Somebody needs it."""
    last: bool = False
    """It goes after those that nobody asked for lately."""
    nbytes: int = 0
    """If it is under way, its final size."""


class UploadFolder:
    """Files by their content's names: whole ones, and those under way.

    A finished file has a modification time that is a function of its name. So it is known to be whole and untouched,
    and a model's id, which is made of that time too, is the same when the same content is sent again. The access time
    says when it was used last.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self._last_ns = 0

    def whole(self, name: str) -> Path:
        """The path of a whole file."""
        return self.path / f"{name}{WHOLE}"

    def part(self, name: str) -> Path:
        """The path of a file under way."""
        return self.path / f"{name}{PART}"

    def make(self) -> None:
        """Make the folder, readable by its owner alone, if it doesn't exist."""
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)

    # --- whole files ----------------------------------------------------------------------------------------------

    def holds(self, name: str, nbytes: int) -> bool:
        """Whether a file is here as it was finished.

        One that isn't becomes a part again, whose contents are to be compared. Raises `Unavailable` if something has
        its name that tacod didn't make.
        """
        whole, part = self.whole(name), self.part(name)
        found = _look(whole)
        if found is None:
            return False
        if (found.st_size, found.st_mtime_ns) == (nbytes, _stamp(name)):
            return True
        if found.st_nlink > 1 or _look(part) is not None:
            # What has another name too isn't written to.
            whole.unlink()
        else:
            whole.rename(part)
        return False

    def intact(self, name: str) -> bool | None:
        """Whether a file is unchanged since it was finished; None if there is none."""
        try:
            found = self.whole(name).lstat()
        except OSError:
            return None
        return found.st_mtime_ns == _stamp(name) or not stat.S_ISREG(found.st_mode)

    def note_use(self, name: str) -> None:
        """A whole file is used now. Raises `OSError`."""
        path = self.whole(name)
        os.utime(path, ns=(self._now(), path.stat().st_mtime_ns))

    def finish(self, name: str, nbytes: int) -> None:
        """Give a complete part its name, so that a crash of the machine leaves all of it there or none.

        Raises `OSError`, and `Unavailable` if something has the name that tacod didn't make.
        """
        _look(self.whole(name))
        with self.open(name) as file:
            if os.fstat(file).st_size > nbytes:
                os.ftruncate(file, nbytes)
            os.utime(file, ns=(self._now(), _stamp(name)))
            os.fsync(file)
        self.part(name).rename(self.whole(name))
        # Not every file system has this for folders.
        with contextlib.suppress(OSError):
            folder = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def _now(self) -> int:
        """The time, later at each call: the kernel's clock of files stands still for milliseconds."""
        self._last_ns = max(time.time_ns(), self._last_ns + 1)
        return self._last_ns

    # --- parts ----------------------------------------------------------------------------------------------------

    def look(self, name: str) -> os.stat_result | None:
        """The state of a file under way; None if it isn't here.

        Raises `Unavailable` if something has its name that tacod didn't make.
        """
        return _look(self.part(name))

    @contextlib.contextmanager
    def open(self, name: str, make: bool = False) -> Iterator[int]:
        """A file under way, and nothing that a link in its place leads to; ``make`` makes one. Raises `OSError`."""
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        file = os.open(self.part(name), flags | (os.O_CREAT if make else 0), 0o666)
        try:
            yield file
        finally:
            os.close(file)

    def discard(self, name: str) -> None:
        """Delete a file under way."""
        with contextlib.suppress(OSError, Unavailable):
            if self.look(name) is not None:
                self.part(name).unlink()

    # --- room -----------------------------------------------------------------------------------------------------

    def leavers(self, name: str, nbytes: int, limit: int, keep: Callable[[str, bool], Keep]) -> list[Path]:
        """Which uploads give way to the file ``name`` of so many bytes, in this order: those used least recently.

        ``keep`` tells, by its name and whether it is whole, what is to be known of another one. Raises
        `ModelNotAllowed` if files that tacod didn't put there leave no room, `Unavailable` if uploads that are needed
        don't, or the disk doesn't.
        """
        excess, lack, others = nbytes - limit, nbytes - self._free(), 0
        may_go: list[tuple[bool, int, int, int, Path]] = []
        needed = 0
        for entry, found in self._entries():
            own = OWN.fullmatch(entry.name)
            if own is not None and own[1] == name and own[2] == PART:
                lack -= _taken(found)
                continue
            if own is None:
                others += found.st_size
                excess += found.st_size
                continue
            known = keep(own[1], own[2] == WHOLE)
            size = max(found.st_size, known.nbytes)
            excess += size
            lack += max(0, known.nbytes - _taken(found))
            if known.stays:
                needed += size
            else:
                used = max(found.st_atime_ns, found.st_mtime_ns)
                # To remove one of two names gives nothing back to the disk; what it would have grown by it won't.
                freed = (0 if found.st_nlink > 1 else _taken(found)) + max(0, known.nbytes - _taken(found))
                may_go.append((known.last, used, size, freed, Path(entry.path)))
        leavers = []
        for _, _, size, freed, path in sorted(may_go):
            if excess > 0 or (lack > 0 and freed):
                excess, lack = excess - size, lack - freed
                leavers.append(path)
        if excess > needed:
            raise ModelNotAllowed(
                f"a file of {nbytes} bytes; models.upload_bytes is {limit}, and files in {self.path} that tacod "
                f"didn't put there take {others} of it; have models.uploads name a folder of its own, or raise it"
            )
        if excess > 0:
            raise Unavailable(
                f"there is no room for a file of {nbytes} bytes in {self.path} now: of models.upload_bytes ({limit}) "
                f"{needed} are taken by uploads that are under way, about to be loaded, or needed by loaded models; "
                "unload a model (`tacoctl unload`), upload again later, or raise models.upload_bytes"
            )
        if lack > 0:
            raise Unavailable(
                f"an upload of {nbytes} bytes can't be written to {self.path} (models.uploads): No space left on "
                f"device; make room there ({lack} bytes more), or have models.uploads name a folder on a larger disk"
            )
        return leavers

    def candidates(self, name: str, keep: Callable[[str, bool], Keep]) -> tuple[list[Path], int]:
        """All uploads that may give way to the file ``name``, least recently used first, and what they take."""
        found = []
        for entry, state in self._entries():
            own = OWN.fullmatch(entry.name)
            if own is not None and own[1] != name and state.st_nlink == 1:
                known = keep(own[1], own[2] == WHOLE)
                if not known.stays:
                    used = max(state.st_atime_ns, state.st_mtime_ns)
                    found.append((known.last, used, Path(entry.path), _taken(state)))
        return [path for _, _, path, _ in sorted(found)], sum(taken for _, _, _, taken in found)

    def _entries(self) -> Iterator[tuple[os.DirEntry[str], os.stat_result]]:
        """The regular files in the folder, without links."""
        with os.scandir(self.path) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    if entry.is_file(follow_symlinks=False):
                        yield entry, entry.stat(follow_symlinks=False)

    def _free(self) -> int:
        """Bytes that the disk has free for this user."""
        found = os.statvfs(self.path)
        # Some network file systems don't tell.
        return found.f_bavail * found.f_frsize if found.f_blocks else 1 << 62


def state_of(found: os.stat_result) -> FileState:
    """What changes whenever a file does, its owner's `os.utime` among that."""
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _taken(found: os.stat_result) -> int:
    return found.st_blocks * 512


def _stamp(name: str) -> int:
    """A finished file's modification time, in nanoseconds: between 2000 and 2017, in what any file system can keep."""
    return (946684800 + 2 * int(name[:7], 16)) * 10**9


def _look(path: Path) -> os.stat_result | None:
    """What a file is; None if there is none. Raises `Unavailable` if something else has its name."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(found.st_mode):
        raise Unavailable(f"{path} is {kind_of(path)}, which tacod didn't make; move it away")
    if found.st_nlink > 1 and path.name.endswith(PART):
        # To go on with it would be to write to a file of another name.
        raise Unavailable(f"{path} is a hard link, which tacod didn't make; move it away")
    return found

"""How much of the host's memory is left for weights: of the machine, and of the control groups that the rank is in."""

from __future__ import annotations

from pathlib import Path

import psutil

__all__ = ["free_bytes"]

_GROUPS = Path("/sys/fs/cgroup")
_V1 = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
_V2 = "memory.max", "memory.current", "inactive_file"


def free_bytes(groups: Path = _GROUPS, own: Path = Path("/proc/self/cgroup")) -> int:
    """Bytes that this process may still take: the kernel ends one that takes more than its group's limit.

    The limit is systemd's ``MemoryMax=`` or a container's ``--memory``. What a group has of files that nobody used
    lately counts as free.
    """
    free = psutil.virtual_memory().available
    for line in own.read_text().splitlines() if own.exists() else ():
        number, controllers, path = line.split(":", 2)
        if number == "0":
            root, names = groups, _V2
        elif "memory" in controllers.split(","):
            root, names = groups / "memory", _V1
        else:
            continue
        place = root / path.lstrip("/")
        # In a container the path is often that of the host, and its own group lies at the root.
        for folder in (place, *place.parents):
            if not folder.is_relative_to(root):
                break
            left = _left(folder, *names)
            free = free if left is None else min(free, left)
    return max(free, 0)


def _left(folder: Path, limit: str, used: str, reclaimable: str) -> int | None:
    """What a group may still take; None if it has no limit."""
    try:
        most, taken = int((folder / limit).read_text()), int((folder / used).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    return most - taken + int(stat.get(reclaimable, 0))

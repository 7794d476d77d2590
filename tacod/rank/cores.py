"""How many cores this process may keep busy: by its affinity, and by the limits of its control groups."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["usable_cores"]

_GROUPS = Path("/sys/fs/cgroup")


def usable_cores(groups: Path = _GROUPS, own: Path = Path("/proc/self/cgroup")) -> float:
    """Cores by affinity, or fewer if ``CPUQuota=`` or a container's ``--cpus`` says so (``cpu.max``, cgroup v2)."""
    return min([float(len(os.sched_getaffinity(0))), *_quotas(groups, own)])


def _quotas(groups: Path, own: Path) -> list[float]:
    """What this process's group and each one around it allow, in cores."""
    try:
        lines = own.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return []
    # Other lines are version 1's.
    path = next((line[3:] for line in lines if line.startswith("0::")), "/")
    group = groups / path.lstrip("/")
    quotas = []
    for place in (group, *group.parents):
        if not place.is_relative_to(groups):
            break
        try:
            quota, period = (place / "cpu.max").read_text().split()
            quotas.append(int(quota) / int(period))
        except (OSError, ValueError, ZeroDivisionError):
            continue  # no limit has "max" for a quota; the root has no such file
    return quotas

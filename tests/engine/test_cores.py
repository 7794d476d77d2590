"""How many cores a rank may keep busy."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tacod.rank.cores import usable_cores

MINE = float(len(os.sched_getaffinity(0)))


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({}, MINE),
        ({"a/b": "max 100000"}, MINE),
        ({"a/b": "50000 100000"}, 0.5),
        ({"a/b": "max 100000", "a": "25000 100000"}, 0.25),
        ({"a/b": "50000 100000", "a": "20000 10000"}, 0.5),
        ({"a/b": f"{10**9} 100000"}, MINE),
        ({"a/c": "10000 100000"}, MINE),
        ({"a/b": "", "a": "1 0"}, MINE),
    ],
    ids=["none", "max", "half", "around", "the least", "more than there are", "another group's", "nonsense"],
)
def test_a_quota_counts_as_cores(tmp_path: Path, limits: dict[str, str], expected: float) -> None:
    for group, limit in limits.items():
        (tmp_path / group).mkdir(parents=True, exist_ok=True)
        (tmp_path / group / "cpu.max").write_text(limit)
    own = tmp_path / "cgroup"
    own.write_text("1:cpu:/elsewhere\n0::/a/b\n")
    assert usable_cores(tmp_path, own) == expected


def test_without_control_groups_it_is_the_affinity(tmp_path: Path) -> None:
    assert usable_cores(tmp_path, tmp_path / "none") == MINE

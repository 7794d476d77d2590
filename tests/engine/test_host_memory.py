"""How much of the host's memory weights may take: a rank refuses what its control group would end it for."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import Mock

import psutil
import pytest
import torch
from helpers import FLUX

from tacod.checkpoint import read_checkpoint
from tacod.rank.engine import Engine
from tacod.rank.parallel.topology import Topology
from tacod.rank.weights.host_memory import free_bytes
from tacod_client.errors import OutOfMemory

GIB = 1 << 30
MACHINE = 64 * GIB


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", Mock(return_value=Mock(available=MACHINE)))


def limit(folder: Path, most: str, used: int, files: int = 0, v1: bool = False) -> None:
    """A control group's files."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if v1 else ("memory.max", "memory.current")
    for name, text in zip(names, (most, str(used)), strict=True):
        (folder / name).write_text(text)
    (folder / "memory.stat").write_text(f"anon 1\n{'total_' if v1 else ''}inactive_file {files}\n")


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({}, MACHINE),
        ({"a/b": ("max", GIB)}, MACHINE),
        ({"a/b": (str(8 * GIB), 3 * GIB)}, 5 * GIB),
        ({"a/b": (str(8 * GIB), 3 * GIB, 2 * GIB)}, 7 * GIB),
        ({"a/b": (str(8 * GIB), 3 * GIB), "a": (str(6 * GIB), 4 * GIB)}, 2 * GIB),
        ({"a/b": (str(2 * GIB), 3 * GIB)}, 0),
        ({"a/c": (str(GIB), 0)}, MACHINE),
        ({"": (str(4 * GIB), GIB)}, 3 * GIB),
    ],
    ids=["none", "max", "used", "files", "around", "over", "another group's", "a container's"],
)
def test_a_control_group_bounds_it(tmp_path: Path, limits: dict[str, tuple[str, int]], expected: int) -> None:
    own = tmp_path / "cgroup"
    own.write_text("1:cpu:/elsewhere\n0::/a/b\n")
    for group, given in limits.items():
        limit(tmp_path / group, *given)
    assert free_bytes(tmp_path, own) == expected


def test_version_1_bounds_it_too(tmp_path: Path) -> None:
    own = tmp_path / "cgroup"
    own.write_text("4:memory,hugetlb:/a\n0::/\n")
    limit(tmp_path / "memory" / "a", str(8 * GIB), 3 * GIB, GIB, v1=True)
    assert free_bytes(tmp_path, own) == 6 * GIB
    assert free_bytes(tmp_path, tmp_path / "none") == MACHINE


def test_weights_that_the_group_has_no_room_for_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, path = Engine(torch.device("cpu"), Topology()), FLUX.save(tmp_path)
    given = str(path), read_checkpoint(str(path)).identity, "fp32", None, None, []
    with monkeypatch.context() as patch:
        patch.setattr("tacod.rank.weights.depot.free_bytes", lambda: 1 << 10)
        with pytest.raises(OutOfMemory, match=r"no memory for .* KiB .*: .* KiB lack in the host, .*control groups"):
            engine.load("model", *given, weights="host")
    assert engine.models == {}
    engine.load("model", *given, weights="host")

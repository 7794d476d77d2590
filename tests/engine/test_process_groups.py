"""Groups of ranks with xfuser and without it compute the same bits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import START_S

from tacod.rank.comm import process_groups

RANKS = """
import hashlib, json, os, sys
from pathlib import Path
import torch
from tacod.plan import Layout, Plan, Shape
from tacod.rank.comm import process_groups
from tacod.rank.families.inputs import Inputs
from tacod.rank.forward.run import Call, run
from tacod.rank.parallel.topology import Topology
from helpers import SD3


def digest(rank, rendezvous):
    topology = Topology(rank, 2, process_groups.join(torch.device("cpu"), rank, 2, rendezvous))
    inputs = Inputs(SD3.inputs(batch=2, text=7), SD3.model.arguments())
    found = hashlib.sha256()
    with torch.inference_mode():
        for layout in (Layout(1, 2, 1), Layout(1, 1, 2), Layout(2, 1, 1), Layout(1, 1, 1)):
            plan = Plan(layout, 2, Shape(SD3.model.heads, SD3.model.width))
            out = run(Call(SD3.model, plan, inputs), topology)
            found.update(out.numpy().tobytes())
    # Each of gloo's groups has a thread that wakes 100 times a second: that of the start, and that which exchanges.
    threads = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    assert 1 <= threads.count("gloo_tcp_loop") <= 2, threads
    process_groups.leave()
    return found.hexdigest()


# Each rank in a process of its own, forked from one that has imported torch but no xfuser.
folder, missing, *paths = sys.argv[1:]
pids = []
for rank, path in enumerate(paths):
    if not (pid := os.fork()):
        said = os.open(f"{folder}/{rank}", os.O_WRONLY | os.O_CREAT)
        os.dup2(said, 2)
        os.dup2(2, 1)  # gloo reports its connections on stdout
        if path:
            sys.path.insert(0, path)
        if missing:
            sys.modules["xfuser"] = None
        with open(f"{folder}/{rank}.digest", "w") as file:
            file.write(digest(rank, f"{folder}/rendezvous"))
        os._exit(0)
    pids.append(pid)
sys.exit(any([os.waitpid(pid, 0)[1] for pid in pids]))
"""
WHY = """
import os, sys
import torch
from tacod.rank.comm import process_groups

# Each in a process of its own, forked from one that has imported torch.
for path in sys.argv[1:]:
    if not (pid := os.fork()):
        sys.path.insert(0, path)
        print(process_groups.why_not_xfuser(torch.device("cpu")), flush=True)
        os._exit(0)
    os.waitpid(pid, 0)
"""
WARNING = "torch's own process groups are in use"


def two_ranks(folder: Path, paths: tuple[Path | None, Path | None], missing: str = "") -> tuple[set[str], list[str]]:
    """The digests of two ranks' outputs, and what each said on stderr; each looks for xfuser first in its own path."""
    folder.mkdir()
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(each for each in sys.path if each)
    command = [sys.executable, "-c", RANKS, str(folder), missing, *(str(path or "") for path in paths)]
    code = subprocess.run(command, env=environment, timeout=START_S * 2, check=False).returncode
    said = [(folder / str(rank)).read_text() for rank in range(2)]
    assert code == 0, said
    return {(folder / f"{rank}.digest").read_text() for rank in range(2)}, said


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The digest with xfuser's groups."""
    digests, errors = two_ranks(tmp_path_factory.mktemp("xfuser") / "group", (None, None))
    assert len(digests) == 1
    assert not any(WARNING in error for error in errors)
    return digests


def broken(folder: Path, files: dict[str, str]) -> Path:
    """A folder with an xfuser of these files."""
    for name, text in files.items():
        path = folder / "xfuser" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


BROKEN = {
    "raises": ({"__init__.py": "", "envs.py": "raise RuntimeError('no such kernel')"}, "RuntimeError: no such kernel"),
    "moved": ({"__init__.py": "", "elsewhere/parallel_state.py": ""}, "No module named 'xfuser.envs'"),
    "another": (
        {
            "envs.py": "class PACKAGES_CHECKER:\n    packages_info = {}",
            "core/distributed/parallel_state.py": "def get_world_group(): ...",
        },
        "AttributeError: module 'xfuser.core.distributed.parallel_state' has no attribute 'GroupCoordinator'",
    ),
}


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What is said of each xfuser that is broken."""
    folder = tmp_path_factory.mktemp("broken")
    paths = [broken(folder / name, {"__init__.py": "", **files}) for name, (files, _) in BROKEN.items()]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(each for each in sys.path if each)}
    command = [sys.executable, "-c", WHY, *map(str, paths)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return dict(zip(BROKEN, done.stdout.splitlines(), strict=True))


@pytest.mark.parametrize("name", BROKEN)
def test_an_xfuser_that_is_broken_is_one_that_can_not_be_imported(name: str, told: dict[str, str]) -> None:
    assert BROKEN[name][1] in told[name]


def test_torchs_groups_compute_the_same_without_xfuser(expected: set[str], tmp_path: Path) -> None:
    digests, errors = two_ranks(tmp_path / "group", (None, None), "missing")
    assert digests == expected
    assert all(WARNING in error and "it is not installed" in error for error in errors)


def test_torchs_groups_compute_the_same_with_an_xfuser_of_another_api(expected: set[str], tmp_path: Path) -> None:
    files, reason = BROKEN["another"]
    path = broken(tmp_path / "broken", {"__init__.py": "", **files})
    digests, errors = two_ranks(tmp_path / "group", (path, path))
    assert digests == expected
    assert all(WARNING in error and reason in error for error in errors)


def test_one_rank_that_lacks_xfuser_decides_for_all(expected: set[str], tmp_path: Path) -> None:
    path = broken(tmp_path / "broken", BROKEN["raises"][0])
    digests, errors = two_ranks(tmp_path / "group", (None, path))
    assert digests == expected
    assert all(WARNING in error and "no such kernel" in error for error in errors)


def test_ranks_wait_for_each_other_before_an_unused_group_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a rank that still connects to it finds its sockets closed."""
    done: list[tuple[str, str]] = []
    for name in ("barrier", "destroy_process_group"):
        monkeypatch.setattr(process_groups.dist, name, lambda group, name=name: done.append((name, group)))
    coordinator = SimpleNamespace(cpu_group="gloo's", device_group="the device's")
    assert process_groups._device_group(coordinator) == "the device's"
    assert done == [("barrier", "gloo's"), ("destroy_process_group", "gloo's")]

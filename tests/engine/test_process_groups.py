"""Groups of ranks with xfuser and without it compute the same bits."""

from __future__ import annotations

import json
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


def wait_for(pids):
    return any([os.waitpid(pid, 0)[1] for pid in pids])


# Each rank in a process of its own, forked from one that has imported torch but no xfuser.
groups, broken = json.loads(sys.argv[1])
failed = []
for folder, missing, paths in groups:
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
    failed.append(wait_for(pids))
for path in broken:
    if not (pid := os.fork()):
        sys.path.insert(0, path)
        with open(f"{path}/why", "w") as file:
            file.write(process_groups.why_not_xfuser(torch.device("cpu")))
        os._exit(0)
    failed.append(wait_for([pid]))
print(failed)
"""
WARNING = "torch's own process groups are in use"


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


GROUPS: dict[str, tuple[str, tuple[str, str]]] = {
    "with xfuser": ("", ("", "")),
    "without": ("missing", ("", "")),
    "with another": ("", ("another", "another")),
    "one without": ("", ("", "raises")),
}
"""Of two ranks each: what hides xfuser, and the broken one that each finds first."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks of each group have left, and what is said of each xfuser that is broken; by one process."""
    folder = tmp_path_factory.mktemp("groups")
    paths = {name: str(broken(folder / name, {"__init__.py": "", **files})) for name, (files, _) in BROKEN.items()}
    groups = []
    for name, (missing, xfusers) in GROUPS.items():
        (folder / name).mkdir()
        groups.append((str(folder / name), missing, [paths.get(each, "") for each in xfusers]))
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(each for each in sys.path if each)
    command = [sys.executable, "-c", RANKS, json.dumps([groups, list(paths.values())])]
    done = subprocess.run(command, env=environment, timeout=2 * START_S, capture_output=True, text=True, check=False)
    said = {str(path): path.read_text() for path in folder.glob("*/[01]")}
    assert done.stdout == f"{[False] * (len(GROUPS) + len(BROKEN))}\n", (done, said)
    return folder


def digests(folder: Path, name: str) -> set[str]:
    """Of the outputs of a group's ranks."""
    return {(folder / name / f"{rank}.digest").read_text() for rank in range(2)}


def said(folder: Path, name: str) -> list[str]:
    """On stderr, by each of a group's ranks."""
    return [(folder / name / str(rank)).read_text() for rank in range(2)]


def test_xfusers_groups_compute_the_same_on_each_rank(folder: Path) -> None:
    assert len(digests(folder, "with xfuser")) == 1
    assert not any(WARNING in each for each in said(folder, "with xfuser"))


@pytest.mark.parametrize("name", BROKEN)
def test_an_xfuser_that_is_broken_is_one_that_can_not_be_imported(folder: Path, name: str) -> None:
    assert BROKEN[name][1] in (folder / name / "why").read_text()


@pytest.mark.parametrize(
    ("name", "reason"),
    [("without", "it is not installed"), ("with another", BROKEN["another"][1]), ("one without", BROKEN["raises"][1])],
)
def test_torchs_groups_compute_the_same_and_say_why(folder: Path, name: str, reason: str) -> None:
    """A rank that lacks xfuser decides for all."""
    assert digests(folder, name) == digests(folder, "with xfuser")
    assert all(WARNING in each and reason in each for each in said(folder, name))


def test_ranks_wait_for_each_other_before_an_unused_group_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a rank that still connects to it finds its sockets closed."""
    done: list[tuple[str, str]] = []
    for name in ("barrier", "destroy_process_group"):
        monkeypatch.setattr(process_groups.dist, name, lambda group, name=name: done.append((name, group)))
    coordinator = SimpleNamespace(cpu_group="gloo's", device_group="the device's")
    assert process_groups._device_group(coordinator) == "the device's"
    assert done == [("barrier", "gloo's"), ("destroy_process_group", "gloo's")]

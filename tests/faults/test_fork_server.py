"""What ranks are forked from dies or hangs: that costs the next ranks a slower start, and running ones nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from helpers import FLUX, START_S, Daemon, eventually, stopped

from tacod_client import Client

from .conftest import PROCESSES


@pytest.fixture
def server(sturdy: Daemon) -> psutil.Process:
    """The fork server of the sturdy daemon."""
    return running_server(sturdy)


def running_server(daemon: Daemon) -> psutil.Process:
    found: psutil.Process = eventually(daemon.fork_server, START_S, "a fork server runs")
    return found


def test_ranks_are_the_supervisors_children(sturdy: Daemon, server: psutil.Process) -> None:
    """They are shown as what they are, and hold nothing of the server's; the server has no threads, and one file."""
    for index, pid in enumerate(sturdy.rank_pids()):
        rank = psutil.Process(pid)
        assert rank.ppid() == sturdy.pid
        assert rank.name() == f"tacod.rank {index}"
        assert f"-m tacod.rank --rank {index} " in " ".join(rank.cmdline())
        assert Path(f"/proc/{pid}/fd/0").readlink() == Path(os.devnull)
    assert server.ppid() == sturdy.pid
    assert server.num_threads() == 1
    assert [each.name for each in Path(f"/proc/{server.pid}/fd").iterdir()] == ["0", "1", "2"]


def test_killed_while_ranks_run(sturdy: Daemon, client: Client, server: psutil.Process) -> None:
    model = client.load(FLUX.file)
    before = client.status()["group"]
    begin = len(sturdy.log)
    server.kill()
    eventually(lambda: not server.is_running(), 5, "it is reaped")
    FLUX.check(model)
    group = client.status()["group"]
    assert group["restarts"] == before["restarts"]
    assert [each["pid"] for each in group["ranks"]] == [each["pid"] for each in before["ranks"]]
    said = f"the process that ranks are forked from (pid {server.pid}) was killed by SIGKILL; the next start"
    assert said in sturdy.log[begin:]
    os.kill(sturdy.rank_pids()[0], signal.SIGKILL)
    FLUX.check(model, seed=1)
    assert client.status()["group"]["restarts"] == before["restarts"] + 1
    assert running_server(sturdy).pid != server.pid
    assert len(sturdy.processes()) == PROCESSES


def test_killed_while_ranks_are_to_be_replaced(sturdy: Daemon, client: Client, server: psutil.Process) -> None:
    model = client.load(FLUX.file)
    restarts = client.status()["group"]["restarts"]
    begin = len(sturdy.log)
    with stopped(server.pid):
        os.kill(sturdy.rank_pids()[1], signal.SIGKILL)
        eventually(lambda: "starting 2 ranks" in sturdy.log[begin:], 10, "it is asked for ranks")
        server.kill()
    FLUX.check(model)
    assert client.status()["group"]["restarts"] == restarts + 2
    assert f"forked from (pid {server.pid}) was killed by SIGKILL; ending all ranks" in sturdy.log[begin:]


def test_stopped(sturdy: Daemon, client: Client, server: psutil.Process) -> None:
    """It is ended at the ranks' deadline, and another one started."""
    model = client.load(FLUX.file)
    begin = len(sturdy.log)
    with stopped(server.pid):
        with sturdy.changed({"group.start_timeout_s": 1.0}):
            os.kill(sturdy.rank_pids()[0], signal.SIGKILL)
            eventually(lambda: "starting 2 ranks" in sturdy.log[begin:], 10, "it is asked for ranks")
        eventually(lambda: "2 ranks not ready after" in sturdy.log[begin:], 10, "the deadline passes")
        assert f"fork_server, pid {server.pid}) has not done so" in sturdy.log[begin:]
        eventually(lambda: not server.is_running(), 5, "it is reaped")
    FLUX.check(model)


def test_ends_with_the_supervisor(models: Path) -> None:
    """Also one that is stopped while it imports; and by SIGTERM."""
    with Daemon(1, [models], wait=False, cold=True) as daemon:
        server = running_server(daemon)
        eventually(lambda: server.memory_info().rss > 64 << 20, START_S, "it imports")
        with stopped(server.pid):
            daemon.signal(signal.SIGKILL)
            daemon.wait()
            eventually(lambda: not daemon.processes(), 10, "none survives")
        daemon.start(wait=False)
        running_server(daemon)
        eventually(daemon.socket.exists, START_S, "it listens")
        daemon.stop()


@pytest.fixture
def imports_that_use_cuda(tmp_path: Path) -> Iterator[Path]:
    """A folder for PYTHONPATH, by which in a fork server CUDA counts as used."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "if 'tacod.group.fork_server' in sys.orig_argv:\n"
        "    import torch\n"
        "    torch.cuda._is_in_bad_fork = lambda: True\n"
    )
    return tmp_path


def test_a_rank_that_cannot_be_forked_starts_anew(models: Path, imports_that_use_cuda: Path) -> None:
    path = os.pathsep.join(filter(None, (str(imports_that_use_cuda), *sys.path)))
    with Daemon(1, [models], environment={"PYTHONPATH": path}) as daemon, daemon.client() as client:
        (pid,) = daemon.rank_pids()
        assert psutil.Process(pid).cmdline()[1:5] == ["-m", "tacod.rank", "--rank", "0"]
        assert psutil.Process(pid).ppid() == daemon.pid
        FLUX.check(client.load(FLUX.file))
        assert "has used CUDA" in daemon.log


def test_imports_use_no_gpu() -> None:
    """A GPU's rank can't be forked from a process that has asked for one."""
    code = """
import torch
from torch import cuda

def refuse(*args, **options):
    raise AssertionError("a GPU is asked for")

for name in ("is_available", "device_count", "init", "_lazy_init", "current_device", "get_device_properties"):
    assert callable(getattr(cuda, name))
    setattr(cuda, name, refuse)

from tacod.group.fork_server import load

load("cuda")
from triton.runtime import driver

assert driver._active is None
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

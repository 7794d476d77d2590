"""SIGTERM drains: what runs is finished, new work is refused; a second one aborts."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import FLUX, SD3, START_S, Daemon, eventually, stopped

from tacod_client import Unavailable


def test_running_and_queued_work_is_finished(models: Path) -> None:
    steps = 20
    with Daemon(1, [models]) as daemon, daemon.client() as client, daemon.client(reconnect_s=0) as other:
        model = client.load(SD3.file)
        undisturbed = SD3.sample(model, steps).result()
        running, queued = SD3.sample(model, steps), SD3.sample(model, steps)
        next(iter(running))
        # The rank stands still while we look, so that draining takes as long as that.
        with stopped(daemon.rank_pids()[0]):
            daemon.signal(signal.SIGTERM)
            eventually(lambda: other.status()["state"] == "draining", 2, "it drains")
            with pytest.raises(Unavailable, match="draining"):
                other.load(FLUX.file)
            again = other.load(SD3.file)
            with pytest.raises(Unavailable, match="draining"):
                SD3.check(again)
            command = [sys.executable, "-c", "import sys; from tacod_client.cli import main; sys.exit(main())"]
            arguments = ["--endpoint", daemon.endpoint, "load", FLUX.file]
            assert subprocess.run([*command, *arguments], capture_output=True, check=False).returncode == 69
        assert torch.equal(running.result(), undisturbed)
        assert torch.equal(queued.result(), undisturbed)
        assert daemon.wait() == 0
        daemon.check_leavings()


def test_a_second_one_aborts(models: Path) -> None:
    with Daemon(1, [models]) as daemon, daemon.client(reconnect_s=0) as client:
        job = SD3.sample(client.load(SD3.file), 20000)
        next(iter(job))
        daemon.signal(signal.SIGTERM)
        eventually(lambda: client.status()["state"] == "draining", 2, "it drains")
        daemon.signal(signal.SIGTERM)
        with pytest.raises(Unavailable, match="safe to ask again"):
            job.result()
        assert daemon.wait(5) == 0
        daemon.check_leavings()


def test_draining_ends_in_time(models: Path) -> None:
    with Daemon(1, [models], {"drain_timeout_s": 1.0}) as daemon, daemon.client(reconnect_s=0) as client:
        job = SD3.sample(client.load(SD3.file), 20000)
        next(iter(job))
        started = time.monotonic()
        daemon.signal(signal.SIGTERM)
        with pytest.raises(Unavailable):
            job.result()
        assert daemon.wait(5) == 0
        assert 1 <= time.monotonic() - started < 4
        daemon.check_leavings()


def test_while_the_ranks_start(models: Path) -> None:
    # So that they take their time.
    with Daemon(2, [models], wait=False, cold=True) as daemon:
        eventually(lambda: "starting 2 ranks" in daemon.log, START_S, "its ranks start")
        daemon.signal(signal.SIGTERM)
        assert daemon.wait(5) == 0
        daemon.check_leavings()

"""Ranks that keep dying: the job fails after its retries, and tacod gives up after `group.max_restarts`."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers import SD3, START_S, Daemon, eventually, stopped

from tacod_client import RankFailed, Unavailable

from .conftest import on_purpose


def kill_a_rank_under_a_forward(daemon: Daemon, expected: type[Exception], words: str) -> None:
    victim = daemon.rank_pids()[0]
    with daemon.client() as client, daemon.client() as watcher, ThreadPoolExecutor(1) as pool:
        model = client.load(SD3.file)
        SD3.check(model)  # new ranks may still be loading it
        with stopped(victim):
            forward = pool.submit(SD3.check, model)
            eventually(lambda: watcher.status()["queue"]["running"], START_S, "the forward runs")
            os.kill(victim, signal.SIGKILL)
        with pytest.raises(expected, match=words):
            forward.result(START_S)


@pytest.fixture(scope="module")
def daemon(models: Path) -> Iterator[Daemon]:
    """One restart is allowed."""
    with Daemon(1, [models], {"group.max_restarts": 1}) as daemon:
        yield daemon


def test_jobs_that_end_the_ranks_each_time_end_no_daemon(daemon: Daemon) -> None:
    """Four restarts are needed: they are the jobs' fault, and not the ranks'."""
    fault = on_purpose(kind="segfault", rank=0, always=True)
    with daemon.changed({}, sections=fault), daemon.client() as client:
        model = client.load(SD3.file)
        for _ in range(2):
            with pytest.raises(RankFailed, match="forward failed 2 times"):
                SD3.check(model)
        eventually(lambda: client.status()["state"] == "ready", START_S, "the ranks are back")
        assert client.status()["group"]["restarts"] == 4


def test_fails_the_job_and_then_gives_up(daemon: Daemon) -> None:
    """The last test of this daemon."""
    with daemon.changed({"group.retries": 0}):
        kill_a_rank_under_a_forward(daemon, RankFailed, "was killed by SIGKILL")
        with daemon.client() as client:
            eventually(lambda: client.status()["state"] == "ready", START_S, "the ranks are back")
            SD3.check(client.load(SD3.file))
        kill_a_rank_under_a_forward(daemon, RankFailed, "was killed by SIGKILL")
        assert daemon.wait(5) == 1
        assert r"group.max_restarts" in daemon.log
        daemon.check_leavings()


def test_gives_up_at_once_without_restarts(models: Path) -> None:
    with Daemon(1, [models], {"group.max_restarts": 0}) as daemon:
        kill_a_rank_under_a_forward(daemon, Unavailable, r"group\.max_restarts.*SIGKILL")
        assert daemon.wait(5) == 1
        daemon.check_leavings()

"""A main loop that is stuck falls silent, so that systemd ends it; its last words are where it was."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import SD3, Daemon, eventually, stopped

from .manager import Manager

WATCHDOG_S = 2.0
STUCK = """
import pathlib, sys, time

now = pathlib.Path(__file__).with_name("now")

def hook(event, arguments):
    if event == "open" and str(arguments[0]).endswith("/config.toml") and now.exists():
        time.sleep(600)

sys.addaudithook(hook)
"""
"""Who opens the configuration waits, as on a file server that is gone."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the daemon's modules; it is stuck once there is ``now`` in it."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "sitecustomize.py").write_text(STUCK)
    return folder


@pytest.fixture(scope="module")
def watched(models: Path, site: Path) -> Iterator[tuple[Daemon, Manager]]:
    """A daemon, and who watches it."""
    with Manager() as manager:
        path = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**manager.environment(WATCHDOG_S), "PYTHONPATH": path}
        with Daemon(1, [models], environment=environment) as daemon:
            yield daemon, manager


def test_a_stuck_rank_does_not_silence_it(watched: tuple[Daemon, Manager]) -> None:
    daemon, manager = watched
    with daemon.client() as client:
        job = SD3.sample(client.load(SD3.file), 20)
        next(iter(job))
        with stopped(daemon.rank_pids()[0]):
            manager.hears_more_pats(4, 4 * WATCHDOG_S)
        job.result()


def test_a_stuck_loop_falls_silent_and_says_where_it_was(watched: tuple[Daemon, Manager], site: Path) -> None:
    daemon, manager = watched
    (site / "now").touch()
    manager.hears_more_pats(2, 2 * WATCHDOG_S)
    daemon.signal(signal.SIGHUP)
    eventually(lambda: manager.silent_s > WATCHDOG_S, 10, "systemd would end it")
    daemon.signal(signal.SIGABRT)
    assert daemon.wait(5) == -signal.SIGABRT
    last_words = daemon.log.partition("Fatal Python error: Aborted")[2]
    for place in ("in load_config", "in reload", "in main"):
        assert place in last_words
    eventually(lambda: not daemon.processes(), 10, "no rank outlives it")
    (site / "now").unlink()
    with daemon.start().client() as client:
        SD3.check(client.load(SD3.file))

"""Ranks that don't come up: the error names one, starts are spaced out, and after the last tacod exits."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest
from helpers import SD3, START_S, Daemon, eventually

from .conftest import on_purpose


@pytest.mark.parametrize(
    ("kind", "words"), [("exit", "exited with code 3"), ("raise", "exited with code 1")], ids=["exits", "raises"]
)
def test_each_time(models: Path, kind: str, words: str) -> None:
    restarts = 1 if kind == "exit" else 0
    settings = {"group.max_restarts": restarts}
    with Daemon(1, [models], settings, sections=on_purpose(kind=kind, at="start", always=True), wait=False) as daemon:
        gives_up(daemon, words, restarts)


def test_never_ends(models: Path) -> None:
    with (
        Daemon(1, [models], {"group.max_restarts": 1}, sections=on_purpose(kind="sleep", at="start", skip=1)) as daemon,
        daemon.changed({"group.start_timeout_s": 2.0}),
    ):
        os.kill(daemon.rank_pids()[0], signal.SIGKILL)
        gives_up(daemon, "not ready after 2 s (group.start_timeout_s)", 1)


def gives_up(daemon: Daemon, words: str, restarts: int) -> None:
    """It ends, and says which rank did what at its last start."""
    assert daemon.wait(START_S) == 1, daemon.log
    assert re.search(rf"rank 0 \(.*pid \d+\) {re.escape(words)}; ending all ranks", daemon.log), daemon.log
    assert f"failed more than {restarts} times" in daemon.log
    assert daemon.log.count("starting 1 ranks") == restarts + 1
    daemon.check_leavings()


def test_once(models: Path) -> None:
    """The next start succeeds, and a client who asked meanwhile is served."""
    with Daemon(1, [models], sections=on_purpose(kind="exit", at="start"), wait=False) as daemon:
        eventually(daemon.socket.exists, START_S, "it listens")
        with daemon.client() as client:
            SD3.check(client.load(SD3.file))
            assert client.status()["group"]["restarts"] == 1

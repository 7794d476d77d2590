"""Ranks that don't come up: the error names one, starts are spaced out, and after the last tacod exits."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from helpers import SD3, START_S, Daemon, eventually

from .conftest import on_purpose


@pytest.mark.parametrize(
    ("fault", "settings", "words"),
    [
        ({"kind": "exit"}, {}, "exited with code 3"),
        ({"kind": "raise"}, {}, "exited with code 1"),
        ({"kind": "sleep"}, {"group.start_timeout_s": 3.0}, "not ready after 3 s (group.start_timeout_s)"),
    ],
    ids=["exits", "raises", "never ends"],
)
def test_each_time(models: Path, fault: dict[str, Any], settings: dict[str, Any], words: str) -> None:
    restarts = 1 if fault["kind"] == "exit" else 0
    settings = {**settings, "group.max_restarts": restarts}
    with Daemon(1, [models], settings, sections=on_purpose(**fault, at="start", always=True), wait=False) as daemon:
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

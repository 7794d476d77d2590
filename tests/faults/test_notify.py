"""systemd hears what goes on, and can't hold tacod up."""

from __future__ import annotations

import socket
import time
from contextlib import suppress
from pathlib import Path

import pytest
from helpers import SD3, Daemon

from tacod.notify import notify

from .manager import MORE_TIME, Manager


def test_it_is_told(models: Path) -> None:
    """Also of a SIGTERM while it is idle, which ends it at once."""
    with Manager() as manager:
        with Daemon(1, [models], environment=manager.environment(watchdog_s=4)) as daemon:
            manager.hears_more_pats(2, 4)
            with daemon.client() as client:
                SD3.check(client.load(SD3.file))
            started = time.monotonic()
            daemon.stop()
            assert time.monotonic() - started < 5
        phases = manager.texts
        everything = [text for _, text in manager.told]
    assert phases[:3] == ["STATUS=starting 1 rank", "READY=1", "STATUS=ready: 0 models on 1 rank; idle"]
    assert "STOPPING=1\nSTATUS=draining" in phases[3:]
    ready, stopping = everything.index("READY=1"), everything.index("STOPPING=1\nSTATUS=draining")
    assert MORE_TIME in everything[:ready], "a start may take its time"
    assert MORE_TIME not in everything[ready:stopping]
    assert MORE_TIME in everything[stopping:], "and so may a stop"


def test_why_it_gave_up() -> None:
    settings = {"group.start_timeout_s": 0.1, "group.max_restarts": 0}
    with Manager() as manager:
        with Daemon(1, (), settings, manager.environment(watchdog_s=4), wait=False) as daemon:
            assert daemon.wait() == 1
            daemon.check_leavings()
        assert manager.texts[-1].startswith("STATUS=gave up: ")
        assert "READY=1" not in manager.texts


def test_one_that_does_not_read_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address = str(tmp_path / "notify")
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    sender = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager, sender:
        manager.bind(address)
        with suppress(BlockingIOError):
            while True:
                sender.sendto(b"x", address)
        started = time.monotonic()
        notify("WATCHDOG=1")
        assert time.monotonic() - started < 3

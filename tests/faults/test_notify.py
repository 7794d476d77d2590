"""systemd hears what goes on, and can't hold tacod up."""

from __future__ import annotations

import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from helpers import Daemon, eventually

from tacod.notify import notify


@pytest.fixture
def manager() -> Iterator[socket.socket]:
    """A service manager's socket; its path is the socket's name."""
    manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    with tempfile.TemporaryDirectory(prefix="tacod-") as folder, manager:
        manager.bind(str(Path(folder, "notify")))
        manager.settimeout(0.1)
        yield manager


def test_it_is_told(manager: socket.socket) -> None:
    told: list[str] = []
    done = threading.Event()

    def listen() -> None:
        while not done.is_set():
            try:
                told.append(manager.recv(4096).decode())
            except TimeoutError:
                continue

    listener = threading.Thread(target=listen)
    listener.start()
    environment = {"NOTIFY_SOCKET": manager.getsockname(), "WATCHDOG_USEC": "4000000"}
    try:
        with Daemon(1, environment=environment) as daemon:
            pats = told.count("WATCHDOG=1")
            eventually(lambda: told.count("WATCHDOG=1") >= pats + 2, 4, "the watchdog is fed")
            daemon.stop()
    finally:
        done.set()
        listener.join()
    phases = [text for text in told if text != "WATCHDOG=1"]
    assert phases[:3] == ["STATUS=starting 1 rank", "READY=1", "STATUS=ready: 0 models on 1 rank; idle"]
    assert "STOPPING=1\nSTATUS=draining" in phases[3:]


def test_one_that_does_not_read_holds_nobody_up(manager: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", manager.getsockname())
    sender = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    with sender, suppress(BlockingIOError):
        while True:
            sender.sendto(b"x", manager.getsockname())
    started = time.monotonic()
    notify("WATCHDOG=1")
    assert time.monotonic() - started < 3

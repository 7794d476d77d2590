"""Where a client looks for the daemon, and what it says if nobody is there."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tacod_client import Client, ConnectionFailed, ProtocolError
from tacod_client.endpoint import DEFAULT_ENDPOINT, find_endpoint


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TACOD_ENDPOINT", "XDG_RUNTIME_DIR"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The endpoint of the user's own daemon, whose socket exists."""
    (tmp_path / "tacod").mkdir()
    (tmp_path / "tacod" / "tacod.sock").touch()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return f"ipc://{tmp_path}/tacod/tacod.sock"


def test_argument_comes_first(own: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TACOD_ENDPOINT", "ipc:///environment")
    assert find_endpoint("ipc:///argument") == "ipc:///argument"


def test_environment_comes_second(own: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TACOD_ENDPOINT", "ipc:///environment")
    assert find_endpoint() == "ipc:///environment"


def test_users_own_daemon_comes_third(own: str) -> None:
    assert find_endpoint() == own


def test_systems_daemon_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_endpoint() == DEFAULT_ENDPOINT == "ipc:///run/tacod/tacod.sock"
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert find_endpoint() == DEFAULT_ENDPOINT, "the user's own counts only if its socket exists"


def test_empty_values_count_as_none(own: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TACOD_ENDPOINT", "")
    assert find_endpoint("") == own


def test_nobody_there_is_told_at_once_and_says_what_to_run(tmp_path: Path) -> None:
    started = time.monotonic()
    with Client(f"ipc://{tmp_path}/none") as client, pytest.raises(ConnectionFailed, match="systemctl start tacod"):
        client.status()
    assert time.monotonic() - started < 1


def test_socket_that_nobody_listens_at_is_told_at_once(tmp_path: Path) -> None:
    os.mknod(tmp_path / "file")
    with Client(f"ipc://{tmp_path}/file") as client, pytest.raises(ConnectionFailed, match="Connection refused"):
        client.status()


def test_other_transports_are_refused_by_name() -> None:
    for endpoint in ("udp://127.0.0.1:5555", "/run/tacod/tacod.sock", "tcp://127.0.0.1", "tcp://:5555", "tcp://host:x"):
        with Client(endpoint) as client, pytest.raises(ProtocolError, match=r"expected ipc://.* or tcp://host:port"):
            client.status()


def test_closed_client_says_so(tmp_path: Path) -> None:
    client = Client(f"ipc://{tmp_path}/none")
    client.close()
    client.close()
    with pytest.raises(ConnectionFailed, match="closed"):
        client.status()

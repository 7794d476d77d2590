"""Where a client looks for the daemon, and what it says if nobody is there."""

from __future__ import annotations

import os
import socket
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import zmq

from tacod_client import Client, ConnectionFailed, ProtocolError, TacodError
from tacod_client.endpoint import DEFAULT_ENDPOINT, Endpoint, find_endpoint

MANY = 20_000
"""More messages than a socket takes by default, and the kernel beside it."""
ODD_NAMES = [
    b"#",
    b"?a=b",
    b"%23",
    b"a b",
    b" ",
    b"ab;c",
    b"\n",
    "ä語".encode(),
    b"caf\xe9",
    b"[::1]",
    b"*",
    b"-",
    b"@",
    b"'\"\\",
]


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
    def wait() -> None:
        pytest.fail("it waits for somebody")

    client = Client(f"ipc://{tmp_path}/none", on_wait=wait)
    with client, pytest.raises(ConnectionFailed, match="systemctl start tacod"):
        client.status()


def test_socket_that_nobody_listens_at_is_told_at_once(tmp_path: Path) -> None:
    os.mknod(tmp_path / "file")
    with Client(f"ipc://{tmp_path}/file") as client, pytest.raises(ConnectionFailed, match="Connection refused"):
        client.status()


def test_a_runtime_folder_of_somebody_else_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after `su`, which keeps the variable: what may not be looked at isn't there."""

    def deny(path: object, **more: object) -> os.stat_result:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(os, "stat", deny)
    assert find_endpoint() == DEFAULT_ENDPOINT


@pytest.mark.parametrize("name", ODD_NAMES)
def test_any_path_leads_to_its_socket(name: bytes) -> None:
    """What a shell gives in TACOD_ENDPOINT need not be UTF-8, and reaches us as Python makes text of it."""
    with tempfile.TemporaryDirectory(prefix="tacod-") as folder:
        path = os.path.join(os.fsencode(folder), name)
        endpoint = f"ipc://{os.fsdecode(path)}"
        with (
            Client(endpoint, timeout_s=0.5) as client,
            pytest.raises(ConnectionFailed, match="no tacod listens at") as no,
        ):
            client.status()
        assert no.value.message.encode(), "it can be printed"
        with socket.socket(socket.AF_UNIX) as theirs:
            theirs.bind(path)
            theirs.listen()
            with Client(endpoint, timeout_s=0.5) as client, pytest.raises(TacodError, match="does not answer"):
                client.status()
            theirs.settimeout(5)
            theirs.accept()[0].close()  # the knock
            with theirs.accept()[0] as peer:
                peer.settimeout(5)
                assert peer.recv(10)[:1] == b"\xff", "and this is ZeroMQ's greeting"


def test_a_client_that_does_not_look_takes_in_what_comes(tmp_path: Path) -> None:
    """The steps of a long run whose job nobody iterates. Else the daemon couldn't see whether it is there."""
    endpoint = f"ipc://{tmp_path}/s"
    with zmq.Context() as context, context.socket(zmq.ROUTER) as daemon:
        daemon.setsockopt(zmq.ROUTER_MANDATORY, 1)
        daemon.linger, daemon.sndhwm, daemon.sndtimeo, daemon.rcvtimeo = 0, 16, 10_000, 10_000
        daemon.bind(endpoint)
        with Endpoint(endpoint, None, None).open(context, 1.0) as client:
            client.send(b"here")
            address, _ = daemon.recv_multipart()
            for _ in range(MANY):
                daemon.send_multipart([address, bytes(200)])
            client.rcvtimeo = 10_000
            assert client.recv() == bytes(200)


def test_a_path_of_107_bytes_is_the_longest() -> None:
    with tempfile.TemporaryDirectory(prefix="tacod-") as folder:
        path = f"{folder}/".ljust(107, "x")
        with Client(f"ipc://{path}") as client, pytest.raises(ConnectionFailed, match="No such file"):
            client.status()
        with Client(f"ipc://{path}x") as client, pytest.raises(ProtocolError, match="107 bytes at most"):
            client.status()


@pytest.mark.parametrize("path", ["", "@abstract", "/a\0b", "/\ud800", "@"])
def test_what_can_be_no_path_is_told(path: str) -> None:
    with Client(f"ipc://{path}") as client, pytest.raises(ProtocolError, match="endpoint 'ipc://"):
        client.status()


def test_one_whose_queue_is_full_is_waited_for_no_longer_than_others(tmp_path: Path) -> None:
    """A stopped daemon takes no connections: a connect that blocks would wait for ever."""
    with socket.socket(socket.AF_UNIX) as theirs, ExitStack() as stack:
        theirs.bind(str(tmp_path / "s"))
        theirs.listen(0)
        for _ in range(3):
            waiting = stack.enter_context(socket.socket(socket.AF_UNIX))
            waiting.setblocking(False)
            waiting.connect_ex(str(tmp_path / "s"))
        started = time.monotonic()
        with Client(f"ipc://{tmp_path}/s", timeout_s=0.5) as client, pytest.raises(TacodError, match="does not answer"):
            client.status()
        assert time.monotonic() - started < 10


def test_a_host_that_can_be_none_is_told(tmp_path: Path) -> None:
    for host in ("ä..b", "x" * 70 + "ä", "\udce4"):
        with Client(f"tcp://{host}:5555") as client, pytest.raises(TacodError):
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

"""TCP is for clients whose keys the daemon knows; loopback stands in for a network."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import zmq
from helpers import FLUX, SD3, Daemon, answered, eventually

from tacod_client import Client, ConfigInvalid, ConnectionFailed, NotAllowed
from tacod_client.curve import make_keys, read_public_key, read_secret_key
from tacod_client.wire import Message, encode

HEARTBEAT_S = 1.0


@dataclass
class Remote:
    """A daemon that serves TCP, and the keys of all concerned: the folder's and the allow-list's."""

    daemon: Daemon
    endpoint: str
    keys: Path
    clients: Path

    def key(self, name: str) -> Path:
        """Somebody's secret key, made when first asked for."""
        path = self.keys / f"{name}.key_secret"
        return path if path.exists() else make_keys(self.keys, name)[0]

    def allow(self, name: str) -> None:
        """Put somebody on the list."""
        public = self.key(name).with_suffix(".key")
        (self.clients / public.name).write_bytes(public.read_bytes())

    def client(self, name: str, **options: Any) -> Client:
        """Somebody's client."""
        return Client(self.endpoint, key=self.key(name), server_key=self.keys / "tacod.key", **options)


def free_port() -> int:
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        return int(server.getsockname()[1])


@pytest.fixture(scope="module")
def remote(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Remote]:
    keys = tmp_path_factory.mktemp("keys")
    clients = keys / "clients"
    clients.mkdir()
    for name in ("alice", "bob", "carol"):
        _, public = make_keys(keys, name)
        (clients / public.name).write_bytes(public.read_bytes())
    endpoint = f"tcp://127.0.0.1:{free_port()}"
    section = {
        "listen": endpoint,
        "secret_key": str(make_keys(keys, "tacod")[0]),
        "clients": str(clients),
        "admins": ["carol"],
    }
    sections = "[curve]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in section.items())
    settings = {"heartbeat_s": HEARTBEAT_S, "limits.message_bytes": 1 << 20}
    with Daemon(1, [models], settings, sections=sections) as daemon:
        yield Remote(daemon, endpoint, keys, clients)


def test_who_is_on_the_list_works_as_on_the_unix_socket(remote: Remote) -> None:
    with remote.client("alice") as client, remote.daemon.client() as local:
        model = client.load(FLUX.file)
        FLUX.check(model)
        assert SD3.sample(client.load(SD3.file), 3).result().isfinite().all()
        assert local.status()["clients"] == 2
        assert model.id in [told["id"] for told in local.models()]
        assert "key alice) is here" in remote.daemon.log


def test_tacoctl_takes_its_keys_from_the_environment(remote: Remote) -> None:
    keys = {"TACOD_CURVE_KEY": str(remote.key("alice")), "TACOD_CURVE_SERVER_KEY": str(remote.keys / "tacod.key")}
    tacoctl = Path(sys.executable).with_name("tacoctl")

    def run(verb: str, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [tacoctl, "--endpoint", remote.endpoint, verb]
        return subprocess.run(
            command, env={**os.environ, **environment}, capture_output=True, text=True, check=False, timeout=60
        )

    assert (done := run("status", **keys)).returncode == 0, done.stderr
    assert (done := run("drain", **keys)).returncode == 77
    assert "key alice may not drain" in done.stderr
    done = run("status", **{**keys, "TACOD_CURVE_KEY": str(remote.key("mallory"))})
    assert done.returncode == 77
    assert read_public_key(remote.key("mallory")).decode() in done.stderr
    done = run("status", XDG_CONFIG_HOME=str(remote.keys / "none"))
    assert done.returncode == 3
    assert "tacoctl keygen" in done.stderr


def test_a_key_that_is_not_on_the_list_is_turned_down(remote: Remote) -> None:
    with remote.client("mallory") as client, pytest.raises(NotAllowed, match=r"doesn't know the key in .*mallory"):
        client.status()
    eventually(lambda: "refused 127.0.0.1: curve.clients lacks its key" in remote.daemon.log, 5, "it is logged")


def test_a_daemon_with_another_key_is_not_believed(remote: Remote) -> None:
    other = remote.key("other").with_suffix(".key")
    with (
        Client(remote.endpoint, key=remote.key("alice"), server_key=other) as client,
        pytest.raises(ConnectionFailed, match=r"no tacod with the key in .*other\.key answers"),
    ):
        client.status()


@pytest.mark.parametrize("mechanism", ["none", "plain"])
def test_without_a_key_nothing_is_heard(remote: Remote, mechanism: str) -> None:
    """Neither what comes without security, nor a password in clear."""
    hello = Message("hello", {"client": "intruder", "pid": 1, "version": "0"}, 1)
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.linger = 0
        if mechanism == "plain":
            dealer.plain_username, dealer.plain_password = b"root", b"root"
        dealer.connect(remote.endpoint)
        dealer.send_multipart(encode(hello))
        assert not dealer.poll(1000)
    assert "intruder" not in remote.daemon.log


def test_one_who_says_nothing_is_disconnected(remote: Remote) -> None:
    """Bytes that are no ZMTP, and none at all."""
    address = ("127.0.0.1", int(remote.endpoint.rpartition(":")[2]))
    for words in (b"", b"GET / HTTP/1.0\r\n\r\n", b"\xff" * 9 + b"\x7f\x03"):
        with closing(socket.create_connection(address, 10)) as stranger:
            stranger.sendall(words)
            stranger.settimeout(30)
            with suppress(ConnectionResetError):
                while stranger.recv(4096):
                    pass
    with remote.client("alice") as client:
        client.ping()


def test_limits_hold_over_tcp_too(remote: Remote) -> None:
    with remote.client("alice") as client:
        model = client.load(FLUX.file)
        with pytest.raises(Exception, match=r"limits\.message_bytes"):
            model.forward(**FLUX.inputs(batch=4000))
        FLUX.check(model)


def test_what_concerns_others_is_for_admins(remote: Remote) -> None:
    with remote.client("alice") as alice, remote.client("bob") as bob, remote.client("carol") as carol:
        job = SD3.sample(alice.load(SD3.file), 400)
        next(iter(job))
        (running,) = bob.jobs()
        assert "key alice" in running["client"]
        for ask in (bob.reload, bob.drain, lambda: bob.cancel(running["job"])):
            with pytest.raises(NotAllowed, match=r"key bob may not .*curve\.admins lacks this key"):
                ask()
        assert carol.reload() == []
        assert carol.cancel(running["job"]) in ("cancelled", "cancelling")


def test_who_is_taken_off_the_list_is_out(remote: Remote) -> None:
    """His sessions end, what he has queued too, on the connection that he still has and on a new one; others stay."""
    remote.allow("dave")
    with remote.client("bob") as bob, remote.daemon.client() as operator:
        assert operator.reload() == ["curve.clients"]
        with remote.client("dave") as dave, closing(hello_of(remote, "dave")) as raw:
            job = SD3.sample(dave.load(SD3.file), 2000)
            next(iter(job))
            (remote.clients / "dave.key").unlink()
            assert operator.reload() == ["curve.clients"]
            with pytest.raises(NotAllowed, match="doesn't know the key"):
                job.result()
            eventually(lambda: operator.jobs() == [], 10, "his job is gone")
            raw.send_multipart(encode(Message("hello", {"client": "raw", "pid": 1, "version": "0"}, 2)))
            assert answered(raw, 10).body["code"] == "NotAllowed"
        bob.ping()
        assert "dave) is allowed no more" in remote.daemon.log


def hello_of(remote: Remote, name: str) -> zmq.Socket[bytes]:
    """A connection of somebody's that has said hello, and doesn't come again by itself."""
    context: zmq.Context[Any] = zmq.Context.instance()
    socket = context.socket(zmq.DEALER)
    socket.linger = 0
    public, secret = read_secret_key(remote.key(name))
    assert secret is not None
    socket.curve_publickey, socket.curve_secretkey = public, secret
    socket.curve_serverkey = read_public_key(remote.keys / "tacod.key")
    socket.connect(remote.endpoint)
    socket.send_multipart(encode(Message("hello", {"client": "raw", "pid": 1, "version": "0"}, 1)))
    assert answered(socket, 10).type == "welcome"
    return socket


def test_a_list_that_cannot_be_read_changes_nothing(remote: Remote) -> None:
    with remote.daemon.client() as operator, remote.client("alice") as alice:
        for name, text, said in (
            ("broken.key", "no key", "curve.clients: .*broken.key holds no CURVE public key"),
            ("twin.key", (remote.keys / "bob.key").read_text(), "holds the same key as bob.key"),
        ):
            (remote.clients / name).write_text(text)
            with pytest.raises(ConfigInvalid, match=said):
                operator.reload()
            (remote.clients / name).unlink()
        os.mkfifo(remote.clients / "pipe.key")
        with pytest.raises(ConfigInvalid, match=r"curve\.clients: .*pipe\.key: Not a regular file"):
            operator.reload()
        (remote.clients / "pipe.key").unlink()
        (remote.clients / "carol.key").rename(remote.keys / "away")
        with pytest.raises(ConfigInvalid, match=r"curve\.admins: no carol\.key"):
            operator.reload()
        (remote.keys / "away").rename(remote.clients / "carol.key")
        alice.ping()
        assert operator.reload() == []


def test_a_new_key_of_the_daemons_is_the_one_that_counts(remote: Remote) -> None:
    """Clients with the new public key come back by themselves; a job that ran under the old one is asked again."""
    old = {suffix: (remote.keys / f"tacod{suffix}").read_bytes() for suffix in (".key", ".key_secret")}
    with remote.daemon.client() as operator, remote.client("alice", timeout_s=1.0, reconnect_s=60) as alice:
        model = alice.load(SD3.file)
        expected = SD3.sample(model, 120).result()
        job = SD3.sample(model, 120)
        next(iter(job))
        for suffix in old:
            (remote.keys / f"tacod{suffix}").unlink()
        make_keys(remote.keys, "tacod")
        assert operator.reload() == ["curve.secret_key"]
        assert job.result().equal(expected)
        (remote.keys / "old.key").write_bytes(old[".key"])
        with (
            Client(remote.endpoint, key=remote.key("alice"), server_key=remote.keys / "old.key") as late,
            pytest.raises(ConnectionFailed, match="no tacod with the key"),
        ):
            late.ping()


def test_sighup_takes_the_list_anew(remote: Remote) -> None:
    remote.allow("erin")
    remote.daemon.signal(signal.SIGHUP)

    def known() -> bool:
        with remote.client("erin") as erin:
            try:
                return erin.ping() > 0
            except NotAllowed:
                return False

    eventually(known, 10, "erin may come in")
    (remote.clients / "erin.key").unlink()
    with remote.daemon.client() as operator:
        assert operator.reload() == ["curve.clients"]


def test_listen_stays_until_a_restart(remote: Remote) -> None:
    text = remote.daemon.config.read_text()
    with remote.daemon.client() as operator:
        for other in (text.replace(remote.endpoint, "tcp://127.0.0.1:1"), text[: text.index("[curve]")]):
            remote.daemon.config.write_text(other)
            with pytest.raises(ConfigInvalid, match=r"curve\.listen: can't change while tacod runs"):
                operator.reload()
        remote.daemon.config.write_text(text)
        assert operator.reload() == []


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda keys: (keys / "tacod.key_secret").unlink(), "curve.secret_key: {keys}/tacod.key_secret: No such file"),
        (lambda keys: (keys / "tacod.key_secret").chmod(0o644), "curve.secret_key: {keys}/tacod.key_secret is open to"),
        (lambda keys: (keys / "clients").rmdir(), "curve.clients: {keys}/clients: No such file"),
        (lambda keys: (keys / "clients" / "x.key").touch(), "curve.clients: {keys}/clients/x.key holds no CURVE"),
        (lambda keys: os.mkfifo(keys / "clients" / "x.key"), "curve.clients: {keys}/clients/x.key: Not a regular file"),
        (lambda keys: (keys / "clients" / "x.key").symlink_to("/dev/zero"), "curve.clients: {keys}/clients/x.key: Not"),
        (lambda keys: None, "curve.admins: no carol.key is among"),
    ],
)
def test_keys_that_cannot_be_used_are_exit_78(tmp_path: Path, break_it: Any, said: str) -> None:
    make_keys(tmp_path, "tacod")
    (tmp_path / "clients").mkdir()
    config = tmp_path / "config.toml"
    config.write_text(
        f'endpoint = "ipc://{tmp_path}/s"\n[group]\ndevice = "cpu"\n[curve]\nlisten = "tcp://127.0.0.1:{free_port()}"\n'
        f'secret_key = "{tmp_path}/tacod.key_secret"\nclients = "{tmp_path}/clients"\nadmins = ["carol"]\n'
    )
    break_it(tmp_path)
    for option in ([], ["--check-config"]):
        command = [sys.executable, "-m", "tacod.daemon", "--config", str(config), *option]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == os.EX_CONFIG
        assert f"{config}:{said.format(keys=tmp_path)}" in done.stderr


def test_a_port_that_is_taken_is_exit_78(tmp_path: Path) -> None:
    make_keys(tmp_path, "tacod")
    (tmp_path / "clients").mkdir()
    config = tmp_path / "config.toml"
    with closing(socket.create_server(("127.0.0.1", 0))) as holder:
        config.write_text(
            f'endpoint = "ipc://{tmp_path}/s"\nmetrics.listen = "unix:{tmp_path}/m"\n[group]\ndevice = "cpu"\n[curve]\n'
            f'listen = "tcp://127.0.0.1:{holder.getsockname()[1]}"\n'
            f'secret_key = "{tmp_path}/tacod.key_secret"\nclients = "{tmp_path}/clients"\n'
        )
        command = [sys.executable, "-m", "tacod.daemon", "--config", str(config)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == os.EX_CONFIG
    assert f"{config}:curve.listen: tcp://127.0.0.1:" in done.stderr
    assert "Address already in use" in done.stderr
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["clients", "config.toml", "tacod.key", "tacod.key_secret"], "no socket is"

"""Keys for TCP: made once, kept to their owner, and found where the user says."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest
import zmq
import zmq.auth

from tacod.config import ConfigUnreadable, Curve
from tacod.serving.access import Keys
from tacod_client import Client, ConnectionFailed
from tacod_client.cli.main import main
from tacod_client.curve import find_keys, make_keys, read_public_key, read_secret_key


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("TACOD_CURVE_KEY", "TACOD_CURVE_SERVER_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path / "config" / "tacod"


def test_keygen_makes_a_pair_that_zeromq_takes(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mask = os.umask(0o777)
    try:
        assert main(["keygen", "--json"]) == 0
    finally:
        os.umask(mask)
    told = json.loads(capsys.readouterr().out)
    assert told["secret"] == str(home / "client.key_secret")
    assert told["public"] == str(home / "client.key")
    assert (home / "client.key_secret").stat().st_mode & 0o777 == 0o600
    assert (home / "client.key").stat().st_mode & 0o777 == 0o644
    public, secret = read_secret_key(told["secret"])
    assert zmq.auth.load_certificate(told["secret"]) == (public, secret)
    assert zmq.auth.load_certificate(told["public"]) == (public, None)
    assert zmq.curve_public(secret) == public == read_public_key(told["public"]) == told["public_key"].encode()
    assert secret.decode() not in (home / "client.key").read_text()


@pytest.mark.parametrize("there", ["alice.key", "alice.key_secret"])
def test_keygen_overwrites_nothing(home: Path, tmp_path: Path, there: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "keys"
    folder.mkdir()
    (folder / there).symlink_to(tmp_path / "elsewhere")
    assert main(["keygen", "alice", "--folder", str(folder)]) == 1
    assert f"{folder / there} is there already" in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == [there]
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "a b", "a\nb", "a\0"])
def test_keygen_refuses_names_that_are_no_file_names(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keygen", name]) == 1
    assert "a key's name is of letters" in capsys.readouterr().err


def test_keygen_says_where_it_may_not_write(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main(["keygen", "--folder", str(tmp_path / "file" / "keys")]) == 1
    assert "Not a directory" in capsys.readouterr().err


def test_keys_by_argument_then_environment_then_home(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = {folder: make_keys(tmp_path / folder, "k") for folder in ("argument", "environment")}
    own = make_keys(home, "client")
    make_keys(home, "server")
    assert find_keys(None, None).path == own[0]
    assert find_keys(None, None).server == read_public_key(home / "server.key")
    monkeypatch.setenv("TACOD_CURVE_KEY", str(made["environment"][0]))
    monkeypatch.setenv("TACOD_CURVE_SERVER_KEY", str(made["environment"][1]))
    found = find_keys(None, None)
    assert (found.path, found.server_path) == made["environment"]
    found = find_keys(made["argument"][0], str(made["argument"][1]))
    assert (found.path, found.server_path) == made["argument"]


@pytest.mark.parametrize("mode", [0o604, 0o620, 0o602, 0o666])
def test_secret_that_others_can_reach_is_refused(tmp_path: Path, mode: int) -> None:
    secret, _ = make_keys(tmp_path, "k")
    secret.chmod(mode)
    with pytest.raises(ValueError, match=f"{mode:04o}.*chmod 600"):
        read_secret_key(secret)
    secret.chmod(0o640)
    read_secret_key(secret)


@pytest.mark.parametrize(
    "text",
    ["", "curve\n", 'public-key = ""', 'public-key = "short"', f'public-key = "{"~" * 40}"', "\0" * 40, "ä" * 30],
)
def test_files_that_hold_no_key_are_refused_by_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "k.key"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"k\.key holds no CURVE public key"):
        read_public_key(path)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("pipe", "Not a regular file"),
        ("/dev/zero", "Not a regular file"),
        ("socket", "No such device"),
        ("folder", "Is a directory"),
        ("large", "Larger than 64.0 KiB"),
        ("none", "No such file"),
    ],
)
@pytest.mark.timeout(30)
def test_what_is_no_small_file_is_refused_at_once(home: Path, tmp_path: Path, name: str, reason: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "large").write_bytes(b"#" * ((64 << 10) + 1))
    path = tmp_path / name
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        for read in (read_public_key, read_secret_key):
            with pytest.raises(OSError, match=reason) as caught:
                read(path)
            assert str(caught.value.filename) == str(path)
        with pytest.raises(ConnectionFailed, match=f"{path}: {reason}"):
            find_keys(path, None)


@pytest.mark.parametrize("line", ["public-key", "secret-key", "public-key =", "public-key = '' # none"])
def test_a_line_without_its_key_is_no_crash(tmp_path: Path, line: str) -> None:
    path = tmp_path / "k.key_secret"
    path.write_text(f"curve\n    {line}\n")
    with pytest.raises(ValueError, match=r"k\.key_secret holds no CURVE public key"):
        read_secret_key(path)


def test_halves_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    one, _ = make_keys(tmp_path, "one")
    _, other = make_keys(tmp_path, "other")
    text = one.read_text().replace(read_public_key(one).decode(), read_public_key(other).decode())
    one.write_text(text)
    with pytest.raises(ValueError, match="doesn't belong"):
        read_secret_key(one)
    with pytest.raises(ValueError, match="holds no secret key"):
        read_secret_key(other)


def test_client_without_keys_says_which_it_lacks(home: Path) -> None:
    with Client("tcp://127.0.0.1:1") as client, pytest.raises(ConnectionFailed, match="tacoctl keygen"):
        client.ping()
    make_keys(home, "client")
    with (
        Client("tcp://127.0.0.1:1") as client,
        pytest.raises(ConnectionFailed, match=r"server\.key.*the daemon's public key"),
    ):
        client.ping()
    (home / "server.key").write_text("nothing")
    with Client("tcp://127.0.0.1:1") as client, pytest.raises(ConnectionFailed, match="holds no CURVE public key"):
        client.ping()


def test_nobody_at_a_port_is_told_at_once(home: Path) -> None:
    make_keys(home, "client")
    make_keys(home, "server")
    with Client("tcp://127.0.0.1:1") as client, pytest.raises(ConnectionFailed, match="Connection refused"):
        client.ping()


def test_a_folder_of_clients_that_cannot_be_read_is_not_taken_for_an_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret, _ = make_keys(tmp_path, "tacod")
    curve = Curve(listen="tcp://127.0.0.1:5555", secret_key=str(secret), clients=str(tmp_path))
    keys = Keys.read("c", curve)
    assert keys is not None
    assert [*keys.clients.values()] == ["tacod"]

    def shut(path: object) -> list[str]:
        raise PermissionError(13, "Permission denied", str(path))

    for name in ("listdir", "scandir"):
        monkeypatch.setattr(os, name, shut)
    with pytest.raises(ConfigUnreadable, match=rf"^c:curve\.clients: {tmp_path}: Permission denied$"):
        Keys.read("c", curve)

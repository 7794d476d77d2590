"""Who may do what: the kernel says whose process a client is. Tests run as root; children play plain users."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import FLUX, SD3, Daemon, eventually, stopped

from tacod_client import ConfigInvalid

NOBODY = 65534
CHILD = """
import json, os, sys
from tacod_client import Client, TacodError
os.setgid(int(sys.argv[1])); os.setuid(int(sys.argv[2]))
with Client(sys.argv[3]) as client:
    for verb, *arguments in json.loads(sys.argv[4]):
        try:
            print(json.dumps(["done", getattr(client, verb)(*arguments)]), flush=True)
        except TacodError as error:
            print(json.dumps([type(error).__name__, error.message]), flush=True)
"""
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can play other users")


def as_user(daemon: Daemon, uid: int, *calls: list[Any], gid: int = NOBODY) -> list[list[Any]]:
    """What a user hears who makes these calls."""
    command = [sys.executable, "-c", CHILD, str(gid), str(uid), daemon.endpoint, json.dumps(calls)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def daemon(models: Path) -> Iterator[Daemon]:
    """One with nothing but the defaults."""
    with Daemon(1, [models]) as daemon:
        yield daemon


@pytest.fixture
def own(daemon: Daemon) -> Iterator[Daemon]:
    """The same; after the test it has its configuration back."""
    text = daemon.config.read_text()
    yield daemon
    daemon.config.write_text(text)
    if daemon.running:
        with daemon.client() as client:
            client.reload()


@pytest.fixture
def open_daemon(own: Daemon) -> Iterator[Daemon]:
    """The same, while anyone may reach its socket."""
    modes = {path: path.stat().st_mode for path in (own.folder, own.socket)}
    own.folder.chmod(0o755)
    own.socket.chmod(0o777)
    with own.changed({"limits.queue_per_user": 1, "limits.clients_per_user": 3}):
        yield own
    for path, mode in modes.items():
        path.chmod(mode)


def test_the_socket_is_for_its_group(own: Daemon) -> None:
    assert own.socket.stat().st_mode & 0o777 == 0o660
    assert own.folder.stat().st_mode & 0o077 == 0
    refused = as_user(own, NOBODY, ["status"])
    assert refused[0][0] == "ConnectionFailed"
    assert "permission denied" in refused[0][1]


def test_what_concerns_others_is_for_admins(open_daemon: Daemon) -> None:
    with open_daemon.client() as client:
        job = SD3.sample(client.load(SD3.file), 400)
        next(iter(job))
        (running,) = client.jobs()
        answers = as_user(open_daemon, NOBODY, ["reload"], ["drain"], ["cancel", running["job"]], ["ping"])
        assert [answer[0] for answer in answers] == ["NotAllowed", "NotAllowed", "NotAllowed", "done"]
        for answer in answers[:3]:
            assert answer[1].startswith("uid 65534 may not ")
            assert "sudo" in answer[1]
        assert f"uid {os.geteuid()}" in running["client"]
        assert client.cancel(running["job"]) in ("cancelled", "cancelling")
        assert client.status()["state"] == "ready"


def test_a_users_own_jobs_are_his_to_cancel(open_daemon: Daemon) -> None:
    """From another of his processes: here another connection."""
    script = f"""
import os, sys, numpy as np
from tacod_client import Client
os.setgid({NOBODY}); os.setuid({NOBODY})
with Client(sys.argv[1]) as client, Client(sys.argv[1]) as other:
    latent = np.zeros((1, 4, 9, 14), np.float32)
    condition = {{"context": np.zeros((1, 5, 8), np.float32), "y": np.zeros((1, 6), np.float32)}}
    levels = np.linspace(1, 0, 401, dtype=np.float32)
    job = client.load({SD3.file!r}).sample(noise=latent, latent=latent, sigmas=levels, positive=condition)
    next(iter(job))
    print(other.cancel(other.jobs()[0]["job"]))
"""
    command = [sys.executable, "-c", script, open_daemon.endpoint]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout.strip() in ("cancelled", "cancelling"), done.stderr


def test_one_users_jobs_and_clients_leave_room_for_others(open_daemon: Daemon) -> None:
    with open_daemon.client() as client:
        job = SD3.sample(client.load(SD3.file), 400)
        next(iter(job))
        with open_daemon.client() as second:
            with pytest.raises(Exception, match=r"limits\.queue_per_user"):
                FLUX.check(second.load(FLUX.file))
            with open_daemon.client() as third, open_daemon.client() as fourth:
                third.ping()
                with pytest.raises(Exception, match=r"limits\.clients_per_user"):
                    fourth.ping()
                # Another user is not concerned.
                assert as_user(open_daemon, NOBODY, ["ping"])[0][0] == "done"
        job.cancel()


def rewrite(daemon: Daemon, **values: Any) -> None:
    """Other values in the configuration."""
    lines = [line for line in daemon.config.read_text().splitlines() if line.split(" = ")[0] not in values]
    lines += [f"{key} = {json.dumps(value)}" for key, value in values.items()]
    daemon.config.write_text("\n".join(lines) + "\n")


def test_reload(own: Daemon, tmp_path: Path) -> None:
    """What can change does, at once; what can't, or is wrong, changes nothing and says why."""
    with own.client() as client:
        assert client.reload() == []
        with pytest.raises(Exception, match="outside"):
            client.load(str(SD3.save(tmp_path)))
        values = {
            "models.roots": [str(tmp_path)],
            "limits.queue": 3,
            "group.step_timeout_s": 77.0,
            "log_level": "debug",
        }
        rewrite(own, **values)
        assert set(client.reload()) == set(values)
        SD3.check(client.load(SD3.file))
        for wrong, said in (
            ({"group.ranks": 2}, "group.ranks: can't change while tacod runs"),
            ({"endpoint": "ipc:///tmp/elsewhere.sock"}, "endpoint: can't change while tacod runs"),
            ({"limits.queue": -1}, "limits.queue: "),
            ({"limits.qeue": 1}, "limits.qeue: unknown key"),
            ({"models.preload": ["nowhere.safetensors"]}, "models.preload: "),
        ):
            before = own.config.read_text()
            rewrite(own, **wrong, **{"limits.store_bytes": 1})
            with pytest.raises(ConfigInvalid) as caught:
                client.reload()
            assert said in caught.value.message
            own.config.write_text(before)
            SD3.check(client.load(SD3.file))
        rewrite(own, **{"models.preload": [SD3.file]})
        client.unload(client.load(SD3.file).id)
        assert client.reload() == ["models.preload"]
        eventually(lambda: [model["name"] for model in client.models()] == [SD3.file], 20, "the preload is there")


def test_sighup_reloads_too(own: Daemon) -> None:
    begin = len(own.log)
    rewrite(own, **{"limits.queue": 5})
    os.kill(own.pid, signal.SIGHUP)
    eventually(lambda: "reloaded" in own.log[begin:], 5, "it was reloaded")
    assert "limits.queue" in own.log[begin:]
    text = own.config.read_text()
    for wrong, why in (
        ('limits.queue = "many"', "limits.queue"),
        (f"limits.queue = {'9' * 5000}", "4300 digits"),
        (f"limits.queue = {'[' * 100_000}", "nested too deep"),
    ):
        begin = len(own.log)
        own.config.write_text(f"{wrong}\n")
        os.kill(own.pid, signal.SIGHUP)
        eventually(lambda begin=begin, why=why: re.search(f"not reloaded: .*{why}", own.log[begin:]), 5, "it said why")
    own.config.write_text(text)
    with own.client() as client:
        assert client.status()["state"] == "ready"


def test_drain_ends_what_runs_and_stops(own: Daemon) -> None:
    """The last test of this daemon."""
    with own.client() as client, own.client() as other:
        model = client.load(SD3.file)
        expected = SD3.sample(model, 40).result()
        (rank,) = own.rank_pids()
        job = SD3.sample(model, 40)
        next(iter(job))
        command = [Path(sys.executable).with_name("tacoctl"), "--endpoint", own.endpoint, "drain", "--wait"]
        done = threading.Thread(target=subprocess.run, args=(command,), kwargs={"check": True})
        # The rank stands still while we look, so that draining takes as long as that.
        with stopped(rank):
            done.start()
            eventually(lambda: other.status()["state"] == "draining", 10, "it drains")
            with pytest.raises(Exception, match="draining"):
                FLUX.check(other.load(FLUX.file))
        assert job.result().equal(expected)
    done.join(30)
    assert not done.is_alive()
    eventually(lambda: not own.running, 10, "it has stopped")
    assert own.code == 0

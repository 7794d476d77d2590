"""The service under a systemd of its own: installed, started, reloaded, killed, stuck, stopped, taken away.

These tests install into the running system. scripts/systemd boots one for them and runs them there, in their order.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import eventually

from tacod import embedded
from tacod_client import Client, ConnectionFailed, Job

pytestmark = [
    pytest.mark.systemd,
    pytest.mark.skipif("TACOD_SYSTEMD" not in os.environ, reason="needs a systemd of its own: scripts/systemd TREE"),
]

TACOCTL = Path(sys.executable).parent / "tacoctl"
CONFIG = Path("/etc/tacod/config.toml")
DROP_IN = Path("/etc/systemd/system/tacod.service.d/test.conf")
RANKS = 2


@pytest.fixture(scope="module", autouse=True)
def service() -> Iterator[None]:
    """The service as it is installed, but for CPU ranks and the embedded model; and two users, one in its group."""
    print(succeed(TACOCTL, "install-service"))
    text = CONFIG.read_text()
    text = text.replace('device = "cuda"', f'device = "cpu"\nranks = {RANKS}')
    CONFIG.write_text(text.replace("roots = []", f"roots = [{json.dumps(str(Path(embedded.__file__).parent))}]"))
    succeed("useradd", "--groups", "tacod", "member")
    succeed("useradd", "stranger")
    yield
    DROP_IN.unlink(missing_ok=True)
    print(said := succeed(TACOCTL, "install-service", "--uninstall"))
    assert f"kept     {CONFIG} (edited)" in said
    assert not Path("/etc/systemd/system/tacod.service").exists()
    assert run("systemctl", "status", "tacod").returncode == 4, "there is no such unit"


@pytest.fixture
def started() -> None:
    """It runs, and has not been restarted too often lately."""
    run("systemctl", "reset-failed", "tacod")
    succeed("systemctl", "start", "tacod")


# --- what the tests do ------------------------------------------------------------------------------------------------


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)


def succeed(*command: str | Path) -> str:
    done = run(*command)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def show(name: str) -> str:
    return succeed("systemctl", "show", "--property", name, "--value", "tacod").strip()


def pid() -> int:
    return int(show("MainPID"))


def status() -> dict[str, Any]:
    with Client() as client:
        return client.status()


def back(before: int) -> bool:
    """Whether another process than before is ready."""
    return pid() not in (0, before) and show("ActiveState") == "active"


@contextmanager
def journal() -> Iterator[Callable[[str], list[dict[str, Any]]]]:
    """Within, find the entries about the service since then whose message has some words in it."""
    cursor = succeed("journalctl", "--show-cursor", "--lines", "0").partition("cursor: ")[2].strip()

    def find(words: str) -> list[dict[str, Any]]:
        succeed("journalctl", "--sync")
        lines = succeed("journalctl", "--unit", "tacod", "--output", "json", "--after-cursor", cursor).splitlines()
        return [entry for entry in map(json.loads, lines) if words in str(entry["MESSAGE"])]

    yield find


@contextmanager
def drop_in(*lines: str) -> Iterator[None]:
    """Within, the service has other settings; those of a running one change at its next start."""
    DROP_IN.parent.mkdir(exist_ok=True)
    DROP_IN.write_text("\n".join(["[Service]", *lines, ""]))
    succeed("systemctl", "daemon-reload")
    try:
        yield
    finally:
        DROP_IN.unlink()
        succeed("systemctl", "daemon-reload")


@contextmanager
def configured(old: str, new: str) -> Iterator[None]:
    """Within, the configuration reads otherwise."""
    text = CONFIG.read_text()
    assert text.count(old) == 1
    CONFIG.write_text(text.replace(old, new))
    try:
        yield
    finally:
        CONFIG.write_text(text)


def sample(client: Client, steps: int) -> Job:
    """A run of the embedded model, begun."""
    context, y = embedded.encode("a red circle")
    noise = np.random.default_rng(0).standard_normal((1, 16, 64, 64), np.float32)
    sigmas = np.linspace(1, 0, steps + 1, dtype=np.float32)
    positive = {"context": context, "y": y}
    job = client.load("shapes.safetensors").sample(noise=noise, latent=noise * 0, sigmas=sigmas, positive=positive)
    next(iter(job))
    return job


# --- the service ------------------------------------------------------------------------------------------------------


def test_ready_means_ready() -> None:
    begin = time.monotonic()
    succeed("systemctl", "start", "tacod")
    took_s = time.monotonic() - begin
    assert status()["state"] == "ready"
    assert show("StatusText") == f"ready: 0 models on {RANKS} ranks; idle"
    print(f"ready {took_s:.1f} s after systemctl start")


@pytest.mark.usefixtures("started")
def test_it_runs_as_its_user_and_owns_its_folders() -> None:
    for process in (pid(), *(rank["pid"] for rank in status()["group"]["ranks"])):
        assert Path(f"/proc/{process}").owner() == "tacod"
    for folder in ("/run/tacod", "/var/lib/tacod", "/var/lib/tacod/uploads", "/var/cache/tacod"):
        path = Path(folder)
        assert (path.owner(), path.group(), f"{path.stat().st_mode & 0o777:o}") == ("tacod", "tacod", "750"), folder
    assert Path("/etc/tacod").owner() == "root"
    environment = Path(f"/proc/{pid()}/environ").read_text().split("\0")
    assert "TORCHINDUCTOR_CACHE_DIR=/var/cache/tacod/inductor" in environment


@pytest.mark.usefixtures("started")
@pytest.mark.parametrize(
    ("user", "verb", "code", "words"),
    [
        ("member", "status", 0, "ready"),
        ("stranger", "status", 3, "permission denied; add yourself to the group"),
        ("member", "drain", 77, "that is for root and for tacod's own user"),
        ("member", "reload", 77, "that is for root and for tacod's own user"),
        ("tacod", "reload", 0, "nothing"),
    ],
)
def test_who_may_do_what(user: str, verb: str, code: int, words: str) -> None:
    done = run("runuser", "-u", user, "--", TACOCTL, verb)
    print(f"{user}: tacoctl {verb}: exit {done.returncode}: {(done.stdout + done.stderr).splitlines()[0]}")
    assert done.returncode == code
    assert words in done.stdout + done.stderr


@pytest.mark.usefixtures("started")
def test_a_reload_is_told_to_the_journal() -> None:
    with journal() as find, configured("drain_timeout_s = 30", "drain_timeout_s = 40"):
        succeed("systemctl", "reload", "tacod")
        assert [entry["PRIORITY"] for entry in eventually(lambda: find("reloaded"), 5, "it says so")] == ["6"]
    with journal() as find, configured("drain_timeout_s", "drain_timeout"):
        succeed("systemctl", "reload", "tacod")
        (entry,) = eventually(lambda: find("not reloaded"), 5, "it says so")
        print(f"PRIORITY={entry['PRIORITY']} {entry['MESSAGE']}")
        assert entry["PRIORITY"] == "3"
        assert f"{CONFIG}:drain_timeout: unknown key" in entry["MESSAGE"]
        assert status()["state"] == "ready"
    succeed("systemctl", "reload", "tacod")


@pytest.mark.usefixtures("started")
def test_killed_and_back() -> None:
    before, ranks = pid(), [rank["pid"] for rank in status()["group"]["ranks"]]
    begin = time.monotonic()
    os.kill(before, signal.SIGKILL)
    eventually(lambda: back(before), 60, "it is ready again")
    print(f"ready again {time.monotonic() - begin:.1f} s after SIGKILL, RestartSec included")
    assert status()["state"] == "ready"
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)


def stand_still(daemon: int) -> None:
    """As a process does that a debugger holds."""
    os.kill(daemon, signal.SIGSTOP)


def hang(daemon: int) -> None:
    """As a loop does that reads from a file server which is gone: a pipe that nobody writes to is such a file."""
    aside = CONFIG.rename(CONFIG.with_name("aside"))
    os.mkfifo(CONFIG, 0o644)
    succeed("systemctl", "reload", "tacod")
    eventually(lambda: not answers(), 10, "it hangs")
    aside.replace(CONFIG)


def answers() -> bool:
    try:
        with Client(timeout_s=1.0) as client:
            client.status()
    except ConnectionFailed:
        return False
    return True


@pytest.mark.parametrize("stick", [stand_still, hang])
def test_a_stuck_loop_is_ended(stick: Callable[[int], None], request: pytest.FixtureRequest) -> None:
    succeed("systemctl", "stop", "tacod")
    with journal() as find, drop_in("WatchdogSec=4"):
        request.getfixturevalue("started")
        before = pid()
        begin = time.monotonic()
        stick(before)
        eventually(lambda: back(before), 60, "it is ready again")
        print(f"ready again {time.monotonic() - begin:.1f} s later, 4 s of watchdog and RestartSec included")
        assert find("Watchdog timeout")
        assert find("Fatal Python error: Aborted")
        for entry in find(", line "):
            print(entry["MESSAGE"])
        # After SIGCONT, any thread may be the one that takes the signal.
        assert stick is stand_still or (find("in load_config") and find("in main"))
    succeed("systemctl", "restart", "tacod")


def test_a_stop_lets_work_end_however_long_that_takes(request: pytest.FixtureRequest) -> None:
    """The unit's limit is put off again and again; a machine that is busy meanwhile is not to meet the daemon's own."""
    succeed("systemctl", "stop", "tacod")
    with configured("drain_timeout_s = 30 ", "drain_timeout_s = 300 "), drop_in("TimeoutStopSec=2"):
        request.getfixturevalue("started")
        with Client() as client, Client() as other:
            job = sample(client, 100)
            begin = time.monotonic()
            succeed("systemctl", "stop", "--no-block", "tacod")
            eventually(lambda: other.status()["state"] == "draining", 5, "it drains")
            doing = "draining: 1 model on 2 ranks; sample, step "
            eventually(lambda: show("StatusText").startswith(doing), 5, "it says what it waits for")
            assert np.isfinite(np.asarray(job.result())).all()
        eventually(lambda: show("ActiveState") == "inactive", 30, "it stops")
        took_s = time.monotonic() - begin
        print(f"stopped after {took_s:.1f} s, once the 100 steps of a job were done")
        assert took_s > 2, "so the limit of the unit was passed"
    assert (show("ActiveState"), show("Result"), show("ExecMainStatus")) == ("inactive", "success", "0")
    assert not Path("/run/tacod").exists()
    assert run("pgrep", "-f", "tacod[.](rank|group)").returncode == 1, "no rank is left, nor what they are forked from"


def test_a_bad_configuration_is_not_tried_again() -> None:
    succeed("systemctl", "stop", "tacod")
    with journal() as find, configured("\n[group]\n", "\nnonsense = 1\n[group]\n"):
        assert run("systemctl", "start", "tacod").returncode == 1
        time.sleep(5)
        assert (show("ActiveState"), show("ExecMainStatus"), show("NRestarts")) == ("failed", "78", "0")
        (entry,) = find("nonsense: unknown key")
        print(f"PRIORITY={entry['PRIORITY']} {entry['MESSAGE']}")
        assert entry["PRIORITY"] == "3"


def test_ranks_that_never_start_end_in_failure_and_say_why() -> None:
    settings = "\n[group]\nstart_timeout_s = 0.1\nmax_restarts = 0\n"
    with journal() as find, configured("\n[group]\n", settings), drop_in("RestartSec=100ms"):
        run("systemctl", "reset-failed", "tacod")
        assert run("systemctl", "start", "tacod").returncode == 1
        eventually(lambda: show("ActiveState") == "failed", 60, "systemd gives up too")
        assert show("Result") == "exit-code"
        assert find("Start request repeated too quickly")
        assert show("StatusText").startswith("gave up: ")
        print(show("StatusText"))
        assert {entry["PRIORITY"] for entry in find("failed more than 0 times")} == {"2"}


@pytest.mark.usefixtures("started")
def test_installing_again_keeps_what_was_edited() -> None:
    before = CONFIG.read_text()
    said = succeed(TACOCTL, "install-service")
    assert CONFIG.read_text() == before
    assert f"kept     {CONFIG} (edited); the new one goes beside it" in said
    assert "systemctl restart tacod" in said
    succeed("systemctl", "restart", "tacod")


@pytest.mark.usefixtures("started")
def test_it_is_exposed_to_little() -> None:
    said = succeed("systemd-analyze", "security", "--no-pager", "tacod")
    level = said.partition("Overall exposure level for tacod.service: ")[2].split()[0]
    print(f"systemd {succeed('systemctl', '--version').split()[1]}: exposure {level}")
    assert float(level) <= 2.0

"""The daemon serves from any folder, in any folder, with or without standard streams, and beside what others left.

Thought of: # ? % and a line's end in the socket's path, spaces, quotes, letters beyond ASCII, 107 bytes of it; each of
stdin, stdout and stderr closed (all combinations in tests/unit/test_logs.py); a start folder that goes later, that was
gone at the start, and a configuration named relative to it; sockets that a killed daemon left.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from helpers import FLUX, SD3, Daemon, eventually

ODD = "a #1?b=%23;'\"\n語"
"""A folder's name."""


def restored(daemon: Daemon) -> None:
    """After a lost rank the next forward is right."""
    with daemon.client() as client:
        model = client.load(FLUX.file)
        FLUX.check(model)
        os.kill(daemon.rank_pids()[0], signal.SIGKILL)
        FLUX.check(model, seed=1)
        assert client.status()["group"]["restarts"] == 1


def listen_at(daemon: Daemon, socket: Path) -> None:
    daemon.config.write_text(
        daemon.config.read_text().replace(json.dumps(daemon.endpoint), json.dumps(f"ipc://{socket}"))
    )
    daemon.socket, daemon.endpoint = socket, f"ipc://{socket}"


def test_a_socket_in_a_folder_of_any_name(models: Path) -> None:
    daemon = Daemon(2, [models], cold=True)
    folder = daemon.folder / ODD
    socket = os.fsencode(folder / "s")
    listen_at(daemon, Path(os.fsdecode(socket.ljust(107, b"x"))))
    with daemon:
        restored(daemon)
        command = [sys.executable, "-c", "import sys; from tacod_client.cli import main; sys.exit(main())", "ping"]
        environment = {**os.environ, "TACOD_ENDPOINT": daemon.endpoint}
        assert subprocess.run(command, env=environment, check=False, capture_output=True, timeout=60).returncode == 0
        assert sorted(path.name for path in daemon.folder.iterdir()) == [ODD, "config.toml", "log"]
        daemon.signal(signal.SIGTERM)
        assert daemon.wait() == 0
        assert list(folder.iterdir()) == []
        folder.rmdir()


@pytest.mark.parametrize(("closed", "ranks"), [("2>&-", 1), ("0<&- 1>&- 2>&-", 2)])
def test_without_streams(models: Path, closed: str, ranks: int) -> None:
    daemon = Daemon(ranks, [models])
    daemon.wrapper = ["sh", "-c", f'exec "$0" "$@" {closed}']
    with daemon:
        restored(daemon)
        for pid in (daemon.pid, *daemon.rank_pids()):
            assert Path(f"/proc/{pid}/fd/2").readlink() == Path(os.devnull)


def test_a_start_folder_that_goes(models: Path, tmp_path: Path) -> None:
    """What was named relative to it is known still."""
    daemon = Daemon(1, [models])
    here = daemon.start_folder = tmp_path / "checkout"
    here.mkdir()
    real, daemon.config = daemon.config, Path(os.path.relpath(daemon.config, here))
    with daemon:
        shutil.rmtree(here)
        restored(daemon)
        with daemon.client() as client:
            assert client.reload() == []
        assert all(psutil.Process(pid).cwd() == "/" for pid in (daemon.pid, *daemon.rank_pids()))
        daemon.config = real


def test_a_start_folder_that_is_gone(models: Path, tmp_path: Path) -> None:
    daemon = Daemon(1, [models])
    here = daemon.start_folder = tmp_path / "gone"
    here.mkdir()
    daemon.wrapper = ["sh", "-c", f'rmdir {here}; exec "$0" "$@"']
    with daemon:
        restored(daemon)


def test_sockets_that_a_killed_daemon_left_make_way(models: Path) -> None:
    """Those that one has which runs are no fault of its configuration, either; those of others are."""
    daemon = Daemon(1, [models])
    metrics = daemon.folder / "m.sock"
    daemon.config.write_text(daemon.config.read_text() + f"metrics.listen = {json.dumps(f'unix:{metrics}')}\n")

    def check() -> str:
        command = [sys.executable, "-m", "tacod.daemon", "--check-config", "--config", str(daemon.config)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == (os.EX_CONFIG if done.stderr else 0)
        return done.stderr or done.stdout

    with daemon:
        assert check() == f"{daemon.config}: ok\n"
        daemon.signal(signal.SIGKILL)
        daemon.wait()
        eventually(lambda: not daemon.processes(), 10, "no rank survives")
        assert metrics.is_socket()
        assert daemon.socket.is_socket()
        assert check() == f"{daemon.config}: ok\n"
        daemon.start()
        with daemon.client() as client:
            SD3.check(client.load(SD3.file))
        text = daemon.config.read_text()
        daemon.config.write_text(text.replace(daemon.endpoint, f"{daemon.endpoint}-2"))
        told = check()
        assert f"metrics.listen: {metrics}: Address already in use: process {daemon.pid}" in told
        daemon.config.write_text(text)

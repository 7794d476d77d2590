"""A configuration that can't be used: exit 78, and ``file:key: reason`` for each fault."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from tacod.config import load_config


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("not toml", "not TOML"),
        ("colour = 'red'", "colour: unknown key"),
        ("[group]\nranks = 0\ndevice = 'cpu'", "group.ranks: "),
        ("[group]\ndevice = 'tpu'\n[limits]\nqueue = -1", "limits.queue: "),
        ("endpoint = 'tcp://0.0.0.0:5555'", "endpoint: TCP needs CURVE"),
        ("[models]\nroots = ['models']", "absolute path"),
        ("endpoint = 'ipc://{folder}/s'\n[group]\ndevice = 'cpu'\n[models]\npreload = ['x']", "models.preload: "),
        ("endpoint = 'ipc:///proc/tacod/s'\n[group]\ndevice = 'cpu'", "endpoint: /proc/tacod"),
        ("endpoint = 'ipc://{folder}/s'\n[group]\ngpus = ['none']", "group."),
        (
            "endpoint = 'ipc://{folder}/s'\n[group]\ndevice = 'cpu'\n[metrics]\nlisten = '127.0.0.1:{port}'\n",
            "metrics.listen: 127.0.0.1:{port}: Address already in use",
        ),
    ],
)
def test_exit_78_and_why(tmp_path: Path, text: str, words: str) -> None:
    config = tmp_path / "c"
    with closing(socket.create_server(("127.0.0.1", 0))) as holder:
        port = str(holder.getsockname()[1])
        config.write_text(text.replace("{folder}", str(tmp_path)).replace("{port}", port))
        done = subprocess.run(
            [sys.executable, "-m", "tacod.daemon", "--config", str(config)],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
    assert done.returncode == os.EX_CONFIG, done.stderr
    told = [line for line in done.stderr.splitlines() if words.replace("{port}", port) in line]
    assert told
    assert all(line.startswith(f"{config}:") for line in told)
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize("files", [8, 12, 16, 24, 75])
def test_too_few_files_are_told_with_what_to_raise(tmp_path: Path, files: int) -> None:
    config = tmp_path / "c"
    config.write_text(f"endpoint = 'ipc://{tmp_path}/s'\n[group]\ndevice = 'cpu'\nranks = 3\n")
    command = f'ulimit -n {files}; exec "$0" -m tacod.daemon --config "$1"'
    done = subprocess.run(
        ["bash", "-c", command, sys.executable, str(config)], capture_output=True, text=True, timeout=60, check=False
    )
    cure = "`ulimit -Hn 65536` as root, or LimitNOFILE= of its unit"
    told = f"the limit of open files is {files}, and tacod needs 76: {cure}\n"
    assert (done.returncode, done.stderr) == (os.EX_CONFIG, told)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_no_file(tmp_path: Path) -> None:
    missing = tmp_path / "nowhere.toml"
    command = [sys.executable, "-m", "tacod.daemon", "--config", str(missing)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, str(missing) in done.stderr) == (os.EX_CONFIG, True)


@pytest.mark.parametrize(
    ("streams", "code", "told"),
    [
        (">/dev/full", 1, b"stdout: No space left on device\n"),
        ("| true", 1, b""),
        (">&-", 0, b""),
        (">/dev/full 2>/dev/full", 1, b""),
        (">/dev/full 2>&-", 1, b""),
    ],
)
@pytest.mark.parametrize("option", ["--check-config", "--print-config", "--help", "--version"])
def test_what_cannot_be_written_is_told(tmp_path: Path, option: str, streams: str, code: int, told: bytes) -> None:
    (tmp_path / "c").write_text("[group]\ndevice = 'cpu'\n")
    command = f'set -o pipefail; "$0" -m tacod.daemon --config "$1" {option} {streams}'
    done = subprocess.run(
        ["bash", "-c", command, sys.executable, str(tmp_path / "c")],
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (code, told)


@pytest.mark.parametrize("streams", ["2>/dev/full", "2>&-", ">&- 2>&-", ""])
def test_bad_usage_ends_with_2_for_whoever_reads_it(streams: str) -> None:
    command = ["bash", "-c", f'exec "$0" -m tacod.daemon --colour {streams}', sys.executable]
    done = subprocess.run(command, capture_output=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(b"" if streams else b"usage: tacod")
    assert done.stderr.endswith(b"" if streams else b"unrecognized arguments: --colour\n")


@pytest.mark.parametrize("streams", ["", "2>&-", "2>/dev/full"])
@pytest.mark.parametrize("name", ["nope", "模", "\udcff"])
def test_a_name_of_any_bytes_ends_with_78(name: str, streams: str) -> None:
    command = f'exec "$0" -m tacod.daemon --config "$1" --check-config {streams}'
    done = subprocess.run(
        ["sh", "-c", command, sys.executable, name],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == os.EX_CONFIG
    assert (b"pass --config FILE" in done.stderr) == (not streams)
    assert b"Traceback" not in done.stderr


def test_a_printed_one_is_read_again_in_any_locale(tmp_path: Path) -> None:
    config, printed = tmp_path / "c", tmp_path / "printed"
    config.write_text(f"[group]\ndevice = 'cpu'\n[models]\nroots = ['{tmp_path}/模型 é']\n", encoding="utf-8")
    command = [sys.executable, "-m", "tacod.daemon", "--print-config", "--config"]
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    done = subprocess.run([*command, str(config)], env=environment, capture_output=True, timeout=30, check=True)
    printed.write_bytes(done.stdout)
    assert load_config(printed) == load_config(config)


@pytest.mark.parametrize("option", ["--check-config", "--print-config"])
def test_a_good_one_is_checked_and_printed(tmp_path: Path, option: str) -> None:
    config = tmp_path / "c"
    config.write_text("[group]\ndevice = 'cpu'\nranks = 3\n[models]\nroots = ['/models']\n")
    command = [sys.executable, "-m", "tacod.daemon", "--config", str(config), option]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout == f"{config}: ok\n" if option == "--check-config" else "ranks = 3\n" in done.stdout

"""A configuration that can't be used: exit 78, and ``file:key: reason`` for each fault."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


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
        ("endpoint = 'ipc:///proc/tacod/s'\n[group]\ndevice = 'cpu'", "/proc/tacod"),
    ],
)
def test_exit_78_and_why(tmp_path: Path, text: str, words: str) -> None:
    config = tmp_path / "c"
    config.write_text(text.replace("{folder}", str(tmp_path)))
    done = subprocess.run(
        [sys.executable, "-m", "tacod.daemon", "--config", str(config)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == os.EX_CONFIG, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_no_file(tmp_path: Path) -> None:
    missing = tmp_path / "nowhere.toml"
    command = [sys.executable, "-m", "tacod.daemon", "--config", str(missing)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, str(missing) in done.stderr) == (os.EX_CONFIG, True)


@pytest.mark.parametrize("option", ["--check-config", "--print-config"])
def test_a_good_one_is_checked_and_printed(tmp_path: Path, option: str) -> None:
    config = tmp_path / "c"
    config.write_text("[group]\ndevice = 'cpu'\nranks = 3\n[models]\nroots = ['/models']\n")
    command = [sys.executable, "-m", "tacod.daemon", "--config", str(config), option]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout == f"{config}: ok\n" if option == "--check-config" else "ranks = 3\n" in done.stdout

"""``tacoctl demo``, as far as it goes without ranks."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from tacod.tools import demo
from tacod_client import ConnectionFailed


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("raise SystemExit(78)", "tacod exited with code 78 before it was ready; what it logged stands above"),
        ("import os; os.kill(os.getpid(), 9)", "tacod was killed by SIGKILL before it was ready; "),
    ],
)
def test_a_daemon_that_ends_is_told_at_once_and_how(code: str, said: str) -> None:
    process = subprocess.Popen([sys.executable, "-c", code])
    begun = time.monotonic()
    with pytest.raises(ConnectionFailed, match=f"^{said}"):
        demo._wait_until_ready("ipc:///nowhere/tacod.sock", process)
    assert time.monotonic() - begun < 60


def test_one_that_is_never_ready_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "START_S", 0.2)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        with pytest.raises(ConnectionFailed, match="did not become ready within"):
            demo._wait_until_ready("ipc:///nowhere/tacod.sock", process)
        process.kill()

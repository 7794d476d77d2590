"""Forwards by two clients while ranks are killed and stopped: a short soak; scripts/soak is the long one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(600)
def test_results_are_equal_and_nothing_grows(tmp_path: Path) -> None:
    plot = tmp_path / "soak.png"
    command = [sys.executable, ROOT / "benchmarks" / "soak.py", "--forwards", "60", "--kills", "1", "--stops", "1"]
    done = subprocess.run(
        [*command, "--plot", plot],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "60 of 60 forwards" in done.stdout
    assert plot.read_bytes().startswith(b"\x89PNG")

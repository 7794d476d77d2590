"""``tacoctl bench`` beside a real ComfyUI."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import Daemon

from tacod import embedded

COMFYUI = os.environ.get("COMFYUI_PATH", "")
STUBS = sorted((Path(__file__).parent / "stub").iterdir())

pytestmark = [
    pytest.mark.comfyui,
    pytest.mark.skipif(not COMFYUI, reason="COMFYUI_PATH names no ComfyUI checkout"),
]


def test_its_network_computes_the_same(tmp_path: Path) -> None:
    """From the same file; its interpreter here needs stand-ins for packages that no network uses."""
    python = tmp_path / "python"
    own = os.environ.get("COMFYUI_PYTHON") or sys.executable
    python.write_text(f'#!/bin/sh\nPYTHONPATH={":".join(map(str, STUBS))} exec {own} "$@"\n')
    python.chmod(0o755)
    with Daemon(roots=[embedded.PATH.parent]) as daemon:
        done = subprocess.run(
            [
                *(sys.executable, "-c", "import sys; from tacod_client.cli import main; sys.exit(main())"),
                *("bench", "--endpoint", daemon.endpoint, embedded.PATH.name, "--size", "128x128", "--rounds", "1"),
                "--json",
            ],
            env={**os.environ, "COMFYUI_PYTHON": str(python), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=True,
        )
    told = json.loads(done.stdout)
    assert (told["comfyui"]["device"], told["comfyui"]["dtype"]) == ("CPU", "float32")
    assert "error" not in told["comfyui"]
    (row,) = told["sizes"]
    assert row["comfyui_error"] <= 2e-6
    assert row["comfyui_ratio"] == row["comfyui_s"]["p50"] / row["all_s"]["p50"]

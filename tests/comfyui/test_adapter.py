"""Anima's text adapter, which runs here: equal to ComfyUI's own to the bit."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from conftest import PATH, PYTHON

ROOT = Path(__file__).resolve().parents[2]


def test_the_adapter_gives_what_the_network_does() -> None:
    if not (Path(PATH) / "comfy" / "ldm" / "anima").is_dir():
        pytest.skip("this version of ComfyUI has no Anima")
    here = Path(__file__).parent
    path = os.pathsep.join(map(str, (PATH, ROOT, ROOT / "client", here / "pack", *(here / "stub").iterdir())))
    case = here / "adapter_case.py"
    run = subprocess.run(
        [PYTHON, str(case)], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    told = json.loads(run.stdout.splitlines()[-1])
    for dtype in ("torch.float32", "torch.bfloat16"):
        assert told[f"{dtype} plain"]
        assert told[f"{dtype} lora"]
        assert told[f"{dtype} moved"] > 0.01

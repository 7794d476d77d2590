"""A ComfyUI that gets the nodes from the wheel by `tacoctl install-nodes`, and nothing from this checkout."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
from comfyui_server import PATH, PYTHON, START_S, stand_ins
from helpers import eventually

ROOT = Path(__file__).parents[2]
IDS = {"TACODiTModelLoader", "TACODiTUNETLoader", "TACODiTKSampler", "TACODiTInfoDisplay", "TACODiTStatsDisplay"}
TACOCTL = "import sys; from tacod_client.cli import main; sys.exit(main())"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A ComfyUI of its own: a copy, for the nodes are linked into its folder."""
    folder = tmp_path / "ComfyUI"
    shutil.copytree(PATH, folder, ignore=shutil.ignore_patterns(".venv", "__pycache__", "*.db"), symlinks=True)
    (tmp_path / "page").mkdir()
    (tmp_path / "page" / "index.html").write_text("tests need no page")
    return folder


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """ComfyUI's Python with the wheel in it, in front of whatever client it has."""
    pytest.importorskip("hatchling", reason="hatchling builds the wheel; `pip install -e .[dev]` brings it")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    ZipFile(wheel).extractall(tmp_path / "site")
    paths = [str(tmp_path / "site"), *stand_ins(PYTHON)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "COMFYUI_PYTHON": PYTHON}


def test_the_wheels_nodes_are_in_object_info(tree: Path, environment: dict[str, str], tmp_path: Path) -> None:
    install = [PYTHON, "-c", TACOCTL, "install-nodes", str(tree)]
    done = subprocess.run(install, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tree / "custom_nodes" / "taco_dit").readlink() == tmp_path / "site" / "tacod_client" / "comfy_nodes"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [PYTHON, "main.py", "--cpu", "--disable-api-nodes", "--port", str(port)]
    command += ["--front-end-root", str(tmp_path / "page"), "--database-url", f"sqlite:///{tmp_path / 'comfyui.db'}"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=tree, env=environment, stdout=log, stderr=log)
    try:

        def get(path: str) -> Any:
            assert process.poll() is None, (tmp_path / "log").read_text(errors="replace")
            with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=30) as reply:
                return json.load(reply)

        nodes = eventually(lambda: get("/object_info"), START_S, "ComfyUI answers")
        templates = get("/workflow_templates")
    finally:
        process.kill()
        process.wait()
    assert set(nodes) >= IDS, (tmp_path / "log").read_text(errors="replace")
    assert "flux1_basic" in templates["taco_dit"]
    assert subprocess.run([*install, "--uninstall"], cwd=tmp_path, env=environment, check=False).returncode == 0
    assert not os.path.lexists(tree / "custom_nodes" / "taco_dit")

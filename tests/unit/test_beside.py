"""ComfyUI's network beside the daemon's, with a made-up ComfyUI: its times and outputs, and what stands in the way."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tacod_client.cli import bench, beside, show

GROUP = {"device": "cpu", "ranks": [{"device": "cpu:0"}]}
CASES = [
    {
        "x": np.ones((1, 4, 2, 2), np.float32),
        "timestep": np.ones(1, np.float32),
        "context": np.ones((1, 7, 3), np.float32),
    },
    {
        "x": [np.ones((1, 4, 2), np.float32)] * 2,
        "timestep": np.ones(1, np.float32),
        "context": np.ones((1, 5, 3), np.float32),
    },
]
SD = """
import torch
from comfy import cli_args

class Network(torch.nn.Module):
    def forward(self, x, timestep, context, num_tokens, transformer_options={{}}, **rest):
        assert cli_args.args.cpu and timestep.dtype == torch.float32 and context.dtype == torch.bfloat16
        assert num_tokens == context.shape[1] and not rest
        {body}

class Model:
    def __init__(self):
        self.diffusion_model = Network()
    def get_dtype_inference(self):
        return torch.bfloat16

class Patcher:
    def __init__(self):
        self.model, self.load_device = Model(), torch.device("cpu")

def load_diffusion_model(path, model_options):
    assert model_options == {{"dtype": torch.bfloat16}} and open(path).read() == "weights"
    print("words of its own")
    return Patcher()
"""
DOUBLES = "return [2 * each for each in x] if isinstance(x, list) else 2 * x"


def made_up(folder: Path, body: str = DOUBLES, sd: str | None = None) -> dict[str, Any]:
    """A folder that looks like ComfyUI; its interpreter is this one."""
    (folder / "comfy").mkdir()
    (folder / "comfyui_version.py").write_text('__version__ = "0.99.1"\n')
    (folder / "comfy" / "cli_args.py").write_text("class args:\n    cpu = False\n")
    (folder / "comfy" / "model_management.py").write_text("def load_models_gpu(models, force_full_load=False): pass\n")
    (folder / "comfy" / "sd.py").write_text(SD.format(body=body) if sd is None else sd)
    found = beside.find({"COMFYUI_PATH": str(folder), "COMFYUI_PYTHON": sys.executable})
    assert found == {"path": str(folder), "version": "0.99.1", "python": sys.executable}
    return found


def measured(tmp_path: Path, **how: Any) -> dict[str, Any]:
    comfyui = tmp_path / "ComfyUI"
    comfyui.mkdir()
    found = made_up(comfyui, **how)
    file = tmp_path / "model.safetensors"
    file.write_text("weights")
    model = SimpleNamespace(path=str(file), dtype="bf16", quantization={})
    return beside.measure(found, model, CASES, GROUP, 1, 3)


def test_without_a_path_there_is_nothing_to_compare_with() -> None:
    assert beside.find({}) is None
    assert beside.find({"COMFYUI_PATH": "", "COMFYUI_PYTHON": sys.executable}) is None


def test_what_is_wrong_with_the_paths_is_told(tmp_path: Path) -> None:
    def error(**environment: str) -> str:
        found = beside.find(environment)
        assert found is not None
        return str(found["error"])

    assert "is no ComfyUI (no comfy/sd.py); name the folder with main.py" in error(COMFYUI_PATH=str(tmp_path))
    (tmp_path / "comfy").mkdir()
    (tmp_path / "comfy" / "sd.py").touch()
    assert error(COMFYUI_PATH=str(tmp_path)).endswith("set COMFYUI_PYTHON to the Python that runs ComfyUI")
    gone = str(tmp_path / "python")
    assert f"COMFYUI_PYTHON={gone} is no program" in error(COMFYUI_PATH=str(tmp_path), COMFYUI_PYTHON=gone)
    own = tmp_path / ".venv" / "bin" / "python"
    own.parent.mkdir(parents=True)
    own.symlink_to(sys.executable)
    assert beside.find({"COMFYUI_PATH": str(tmp_path)}) == {
        "path": str(tmp_path),
        "version": "unknown",
        "python": str(own),
    }


def test_times_and_outputs_of_each_size(tmp_path: Path) -> None:
    told = measured(tmp_path)
    assert (told["device"], told["dtype"], told["version"]) == ("CPU", "bfloat16", "0.99.1")
    assert [len(case["seconds"]) for case in told["cases"]] == [3, 3]
    assert [[tuple(out.shape) for out in case["outputs"]] for case in told["cases"]] == [
        [(1, 4, 2, 2)],
        [(1, 4, 2)] * 2,
    ]
    assert all(bool((out == 2).all()) for case in told["cases"] for out in case["outputs"])
    row = {"all_s": {"p50": 0.5}}
    for out, case in zip((2 * CASES[0]["x"], [2 * each for each in CASES[1]["x"]]), told["cases"], strict=True):
        more = bench._beside(row, out, case)
        assert more["comfyui_error"] == 0.0
        assert more["comfyui_ratio"] == more["comfyui_s"]["p50"] / 0.5
        assert show._beside({**row, **more})[2] == "0.0e+00"
    assert bench._beside(row, np.ones(3), told["cases"][0])["comfyui_error"] is None, "of another shape"


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (
            {"body": "raise torch.OutOfMemoryError('CUDA out of memory. Tried')"},
            "`tacoctl unload` them and name the file",
        ),
        ({"body": "raise TypeError('missing 1 required argument')"}, "TypeError: missing 1 required argument"),
        ({"body": "import os; os._exit(3)"}, "its process ended by exit 3"),
        ({"body": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"}, "its process ended by signal 9"),
        ({"sd": ""}, "it is too old to compare with"),
        ({"sd": "import no_such_module"}, "No module named 'no_such_module'"),
    ],
)
def test_what_stands_in_the_way_is_told(tmp_path: Path, how: dict[str, str], words: str) -> None:
    told = measured(tmp_path, **how)
    assert words in told["error"]
    assert not told.get("cases")


def test_folders_and_other_machines_files_are_told(tmp_path: Path) -> None:
    for path, words in ((tmp_path, "ComfyUI loads single files"), (tmp_path / "gone", "no file of this machine")):
        model = SimpleNamespace(path=str(path), dtype="bf16", quantization={})
        assert words in beside.measure({}, model, CASES, GROUP, 1, 1)["error"]


@pytest.mark.parametrize(
    ("environment", "device", "expected"),
    [({}, "3", "3"), ({}, "GPU-abc", "GPU-abc"), ({"CUDA_VISIBLE_DEVICES": "5"}, "3", "5")],
)
def test_it_runs_on_the_first_ranks_gpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, environment: dict[str, str], device: str, expected: str
) -> None:
    seen = {}

    def run(command: list[str], env: dict[str, str], **rest: Any) -> Any:
        seen.update(env)
        return subprocess.CompletedProcess(command, 1, "", "")

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(subprocess, "run", run)
    model = SimpleNamespace(path=str(Path(__file__)), dtype="bf16", quantization={})
    found = {"path": str(tmp_path), "python": sys.executable}
    told = beside.measure(found, model, CASES, {"device": "cuda", "ranks": [{"device": device}]}, 1, 1)
    assert seen["CUDA_VISIBLE_DEVICES"] == expected
    assert "PYTHONPATH" not in seen
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == environment.get("CUDA_VISIBLE_DEVICES")
    assert "ended by exit 1: no word" in told["error"]


def test_the_table_has_it_beside_or_says_why_not() -> None:
    import io

    from rich.console import Console

    times = {"p10": 0.09, "p50": 0.1, "p90": 0.11}
    split = {f"{part}_s": 0.1 for part in show.PARTS}
    row = {"size": "64x64", "plan": "p", "one_s": times, "all_s": times, "speedup": 1.0, "error": 0.0, "split": split}
    row |= {"bound": "computing", "comfyui_s": {**times, "p50": 0.3}, "comfyui_ratio": 3.0, "comfyui_error": 2e-7}
    told: dict[str, Any] = {
        "model": {"name": "m", "family": "flux", "dtype": "bf16"},
        "batch": 1,
        "text": 1,
        "ranks": 1,
    }
    told |= {"rounds": 1, "sizes": [row]}

    def shown(comfyui: dict[str, Any]) -> str:
        output = io.StringIO()
        Console(file=output, width=200).print(show.bench({**told, "comfyui": comfyui}))
        return output.getvalue()

    whole = shown({"version": "0.33.0", "device": "CPU", "dtype": "float32"})
    assert all(word in whole for word in ("0.33.0, its own network on one CPU, float32", "300.0 ms", "3.00", "2.0e-07"))
    why = shown({"path": "/c", "error": "no interpreter"})
    assert "not compared: no interpreter" in why
    assert "300.0 ms" not in why

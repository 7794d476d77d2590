"""ComfyUI's own network beside the daemon, for ``tacoctl bench``: what a user would have without tacod.

It runs on one GPU (or the CPU) in a process of ComfyUI's interpreter, with the same file, sizes and compute dtype.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tacod_client.cli import stock_network
from tacod_client.dtypes import of_numbers

__all__ = ["Case", "find", "measure"]

TORCH_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
PYTHONS = ("venv/bin/python", ".venv/bin/python")
"""Where a ComfyUI's interpreter usually is, as `scripts/start_comfyui_gpu345.sh` looks for it."""

Case = Mapping[str, Any]
"""The arguments of a forward: numpy arrays, or lists of them."""


def find(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """The ComfyUI to compare with: ``path``, ``version`` and ``python``, or an ``error`` that says what to do.

    None if COMFYUI_PATH isn't set.
    """
    path = environment.get("COMFYUI_PATH", "")
    if not path:
        return None
    folder = Path(path).expanduser()
    found: dict[str, Any] = {"path": str(folder)}
    if not (folder / "comfy" / "sd.py").is_file():
        return found | {"error": f"COMFYUI_PATH={path} is no ComfyUI (no comfy/sd.py); name the folder with main.py"}
    asked = environment.get("COMFYUI_PYTHON", "")
    pythons = [Path(asked).expanduser()] if asked else [folder / each for each in PYTHONS]
    python = next((each for each in pythons if os.access(each, os.X_OK) and each.is_file()), None)
    if python is None:
        where = f"COMFYUI_PYTHON={asked} is no program" if asked else f"no interpreter in {folder}/venv or .venv"
        return found | {"error": f"{where}; set COMFYUI_PYTHON to the Python that runs ComfyUI"}
    version = folder / "comfyui_version.py"
    told = re.search(r'__version__ = "([^"]+)"', version.read_text(errors="replace")) if version.is_file() else None
    return found | {"version": told[1] if told else "unknown", "python": str(python)}


def measure(
    comfyui: Mapping[str, str], model: Any, cases: Sequence[Case], group: Mapping[str, Any], warm_ups: int, rounds: int
) -> dict[str, Any]:
    """Time ComfyUI's network with the model's file, one case after the other, on the GPU of the first rank.

    ``group`` is that of the daemon's status. The answer is ``comfyui`` with ``device`` and ``dtype``, and ``cases``,
    each of ``seconds`` and ``outputs`` (torch's tensors); or with an ``error`` that says what to do.
    """
    from safetensors.numpy import save_file

    if not Path(model.path).is_file():
        reason = (
            "is a folder; ComfyUI loads single files" if Path(model.path).is_dir() else "is no file of this machine"
        )
        return {**comfyui, "error": f"{model.path} {reason}"}
    cpu = group["device"] == "cpu"
    environment = dict(os.environ)
    # The paths of this interpreter's packages are not for another one.
    environment.pop("PYTHONPATH", None)
    environment.pop("PYTHONHOME", None)
    if not cpu and "CUDA_VISIBLE_DEVICES" not in environment:
        environment |= {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": _gpu(group)}
    with tempfile.TemporaryDirectory(prefix="tacoctl-bench-") as name:
        folder = Path(name)
        for number, case in enumerate(cases):
            save_file(_by_name(case), folder / f"{number}.safetensors")
        request = {
            "comfyui": comfyui["path"],
            "file": model.path,
            "folder": name,
            "cpu": cpu,
            # Of packed layers ComfyUI chooses what it computes in.
            "dtype": TORCH_NAMES[of_numbers(model.dtype)] if not getattr(model, "quantization", None) else None,
            "cases": [{"inputs": f"{number}.safetensors"} for number in range(len(cases))],
            "warm_ups": warm_ups,
            "rounds": rounds,
        }
        command = [comfyui["python"], stock_network.__file__]
        try:
            done = subprocess.run(
                command, input=json.dumps(request), capture_output=True, text=True, check=False, env=environment
            )
        except OSError as error:
            return {**comfyui, "error": f"{comfyui['python']}: {error.strerror}; set COMFYUI_PYTHON"}
        return _answer(comfyui, folder, done)


def _answer(comfyui: Mapping[str, str], folder: Path, done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    from safetensors.torch import load_file

    file = folder / "answer.json"
    if not file.exists():
        last = (done.stderr.strip().splitlines() or ["no word"])[-1]
        how = f"signal {-done.returncode}" if done.returncode < 0 else f"exit {done.returncode}"
        return {**comfyui, "error": f"its process ended by {how}: {last}"}
    answer: dict[str, Any] = {**comfyui, **json.loads(file.read_text())}
    if answer.pop("kind", None) == "memory":
        answer["error"] += (
            "; the daemon's models take this GPU's memory too: `tacoctl unload` them and name the file to bench, name "
            "another GPU by CUDA_VISIBLE_DEVICES, or ask for a smaller --size"
        )
    for number, case in enumerate(answer.get("cases", ())):
        outputs = load_file(folder / f"{number}.safetensors.out")
        case["outputs"] = [outputs[str(each)] for each in range(len(outputs))]
    return answer


def _gpu(group: Mapping[str, Any]) -> str:
    """The GPU of the first rank, by its index or UUID."""
    return str(group["ranks"][0]["device"]) if group["ranks"] else "0"


def _by_name(case: Case) -> dict[str, Any]:
    """The arrays by their names; of a list each by its place too, as in ``x.0``."""
    lists = {key: value for key, value in case.items() if isinstance(value, list)}
    named = {f"{key}.{place}": each for key, some in lists.items() for place, each in enumerate(some)}
    return {**{key: value for key, value in case.items() if key not in lists}, **named}

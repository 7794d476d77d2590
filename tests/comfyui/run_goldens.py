"""Runs goldens of our own families by ComfyUI's networks, as a rank does; prints JSON: each one's error, or why not.

PYTHONPATH must have what ComfyUI's networks import. ComfyUI's folder is the first argument, goldens are the others.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from helpers import read_golden, relative_error

from tacod.checkpoint import read_checkpoint
from tacod.rank.comfyui.installation import Installation
from tacod.rank.comfyui.loading import find_network, load_network
from tacod.rank.families.inputs import Inputs
from tacod.rank.parallel.sequence import SequenceParallel

CPU = torch.device("cpu")


def error(installation: Installation, name: str) -> Any:
    """How far ComfyUI's network in a rank is from what ComfyUI computed; text if it doesn't run."""
    golden = read_golden(name)
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "golden.safetensors"))
        golden.save(Path(path))
        try:
            found = find_network(installation, read_checkpoint(path), "", CPU, lambda total: None, lambda *done: None)
            network = load_network(installation, found, path, torch.float32, CPU)
            with torch.inference_mode():
                out = network.run(SequenceParallel(), Inputs(golden.inputs, network.specs_for(golden.inputs)))
        except Exception as reason:  # whatever a network raises
            return f"{type(reason).__name__}: {reason}"[:400]
    return relative_error(out, golden.out)


if __name__ == "__main__":
    comfyui = Installation(sys.argv[1], CPU)
    print(json.dumps({name: error(comfyui, name) for name in sys.argv[2:]}))

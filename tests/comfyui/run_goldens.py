"""Runs goldens of our own families by ComfyUI's networks, as a rank does; prints JSON: what each gave, or why not.

PYTHONPATH must have what ComfyUI's networks import. ComfyUI's folder is the first argument, goldens are the others.

Of each: its ``error``; whether weights that are ``fetched`` give the same bits; and whether ``patched`` ones do.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from helpers import Golden, read_golden, relative_error

from tacod.checkpoint import read_checkpoint
from tacod.rank.comfyui.installation import Installation
from tacod.rank.comfyui.loading import load_network
from tacod.rank.comfyui.network import Network
from tacod.rank.comm.group import Group
from tacod.rank.families.base import Output
from tacod.rank.families.inputs import Inputs
from tacod.rank.forward.run import equal
from tacod.rank.parallel.sequence import SequenceParallel
from tacod.rank.weights.load import get_weight, set_weight, share
from tacod.rank.weights.streaming import Streaming

CPU = torch.device("cpu")


def report(installation: Installation, name: str) -> Any:
    """See above; text if it doesn't run."""
    golden = read_golden(name)
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "golden.safetensors"))
        golden.save(Path(path))
        try:
            whole, patched = outputs(installation, golden, path, "replicated")
            fetched, both = outputs(installation, golden, path, "host")
        except Exception as reason:  # whatever a network raises
            return f"{type(reason).__name__}: {reason}"[:400]
    changed = not equal(whole, patched)
    return {
        "error": relative_error(whole, golden.out),
        "fetched": equal(fetched, whole),
        "patched": changed and equal(both, patched),
    }


def outputs(installation: Installation, golden: Golden, path: str, weights: str) -> tuple[Output, Output]:
    """The second forward of a model with weights that lie there, and that of a patched one."""
    streaming = Streaming(Group(), CPU, weights, [None], False, smallest=0)
    with torch.inference_mode(), streaming:
        network = load_network(
            installation, read_checkpoint(path), "", torch.float32, CPU, streaming, lambda done, total: None
        )
    if weights == "host":
        assert streaming.streamed_bytes(network)[0] > 0.5 * streaming.placement.device_bytes[0]
    run(network, golden)
    before = run(network, golden)
    patched = share(network)
    with torch.inference_mode(), streaming:
        keys = [key for key, each in network.named_weights().items() if each.ndim == 2][::3]
        for some in streaming.in_turn(network, patched, keys):
            for key in some:
                set_weight(patched, key, 1.1 * get_weight(network, key))
    after = run(patched, golden)
    assert equal(run(network, golden), before)
    return before, after


def run(network: Network, golden: Golden) -> Output:
    """A forward of the golden's arguments."""
    with torch.inference_mode():
        return network.run(SequenceParallel(), Inputs(golden.inputs, network.specs_for(golden.inputs)))


if __name__ == "__main__":
    comfyui = Installation(sys.argv[1], CPU)
    print(json.dumps({name: report(comfyui, name) for name in sys.argv[2:]}))

"""What a ControlNet's residuals cost on their way to the ranks, at the size of Flux.1's at 1024².

    python benchmarks/controlnet.py [--rounds N]

The daemon is the real one; its ranks are `echo_rank.py`, which take what a rank takes of the residuals and answer with
x. ``in`` is the way from the client to the supervisor and back, ``out`` from the supervisor to all ranks and back,
``read`` what rank 0 does with its part.
"""

from __future__ import annotations

import argparse
import json
import statistics
import struct
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import wire as harness

from tacod_client import Model
from tacod_client.stats import ModelStats

TOKENS, WIDTH = 4096, 3072
RANKS = (1, 2, 3)
STAGES = ("whole", "in", "out", "read")


class Stages(ModelStats):
    """The last forward's parts, in seconds."""

    def add(self, answer: Mapping[str, Any], elapsed_s: float) -> None:
        """Keep an answer's times."""
        timing = answer["timing"]
        told = timing["wire_s"], timing["compute_s"]
        self.stages = dict(zip(STAGES, (elapsed_s, elapsed_s - sum(timing.values()), *told), strict=True))


def make(counts: tuple[int, int]) -> dict[str, list[torch.Tensor]]:
    """Residuals for 19 and 38 blocks, of which so many differ, as ComfyUI repeats them."""
    made = {}
    for name, blocks, count in zip(("input", "output"), (19, 38), counts, strict=True):
        if count:
            each = [torch.randn(1, TOKENS, WIDTH).bfloat16() for _ in range(count)]
            made[name] = [each[i // -(-blocks // count)] for i in range(blocks)]
    return made


def measure(model: Model, rounds: int, **more: Any) -> dict[str, float]:
    """Median milliseconds of each stage of a forward, and of the whole."""
    inputs = {"x": torch.randn(1, 16, 128, 128).bfloat16(), "timestep": torch.ones(1), **more}
    times: dict[str, list[float]] = {name: [] for name in STAGES}
    model.stats = stages = Stages()
    for turn in range(rounds + 1):
        model.forward(**inputs)
        model.settle()
        for name, seconds in stages.stages.items() if turn else ():
            times[name].append(1000 * seconds)
    return {name: statistics.median(each) for name, each in times.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    kinds = {"none": (0, 0), "1 + 1": (1, 1), "5 + 10": (5, 10)}
    print(f"{'ranks':6}{'residuals':12}{'MiB':>6}" + "".join(f"{name:>10}" for name in STAGES))
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tacod-")))
        (folder / "m").mkdir()
        header = json.dumps({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode()
        (folder / "m" / "echo.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0")
        command = (str(harness.HERE / "wire.py"), "--daemon")
        for ranks in RANKS:
            with harness.tacod(folder / str(ranks), ranks, folder / "m", *command) as client:
                model = client.load("echo.safetensors")
                for name, counts in kinds.items():
                    more = {"control": make(counts)} if any(counts) else {}
                    times = measure(model, args.rounds, **more)
                    mib = sum(counts) * TOKENS * WIDTH * 2 / 2**20
                    print(
                        f"{ranks:<6}{name:12}{mib:6.0f}" + "".join(f"{ms:10.1f}" for ms in times.values()), flush=True
                    )


if __name__ == "__main__":
    main()

"""A step of a sampler through the nodes and a daemon of one rank, beside the same step of ComfyUI by itself, on CPUs.

    COMFYUI_PATH=… COMFYUI_PYTHON=… PYTHONPATH=tests:tests/comfyui python benchmarks/nodes.py [--rounds N] [--steps N]

Both run in one ComfyUI, in turn, on a tiny Flux.1 in fp32. A step's time is that between two of the progress messages
that the page gets. ``more`` is what the nodes add; the other columns are what they tell of a forward.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from comfyui_graphs import FLUX, Pair, save
from comfyui_server import ComfyUI, Outcome
from helpers import Daemon

SIZES = ((1, 2, 2), (1, 32, 32), (1, 64, 64), (1, 128, 128), (4, 64, 64))
"""Batch, height and width of the latent. The first is almost no work."""


@contextmanager
def started(*options: str) -> Iterator[tuple[ComfyUI, Daemon]]:
    """The ComfyUI in COMFYUI_PATH with these options, and a daemon of one rank; both have a tiny Flux.1."""
    path, python = os.environ["COMFYUI_PATH"], os.environ.get("COMFYUI_PYTHON", sys.executable)
    with tempfile.TemporaryDirectory(prefix="tacod-") as name:
        models = Path(name)
        (models / "diffusion_models").mkdir()
        save(FLUX, models / "diffusion_models")
        with (
            Daemon(1, [models], cold=True) as daemon,
            ComfyUI(path, python, daemon.endpoint, models, *options) as comfyui,
        ):
            yield comfyui, daemon


def steps(
    comfyui: ComfyUI, size: tuple[int, int, int], branch: str, count: int, seed: int, endpoint: str
) -> tuple[list[tuple[float, float]], Outcome]:
    """Begin and end of each of a run's steps but the first, in seconds, and the run."""
    pair = Pair(FLUX, endpoint=endpoint)
    pair.nodes["latent"]["inputs"] |= dict(zip(("batch", "height", "width"), size, strict=True))
    pair.load()
    pair.sample(steps=count, seed=seed, cfg=1.0, sampler_name="euler", scheduler="simple", denoise=1.0)
    pair.nodes["sampler_taco"]["class_type"] = "TACODiTKSampler"
    pair.nodes["sampler_taco"]["inputs"]["enable_taco_dit"] = True
    pair.add("stats", "TACODiTStatsDisplay", stats="@sampler_taco#1")
    other = "stock" if branch == "taco" else "taco"
    gone = [f"sampler_{other}", f"save_{other}", *(["loader", "stats"] if other == "taco" else [])]
    graph = {name: node for name, node in pair.nodes.items() if name not in gone}
    ended: list[float] = []

    def hear(event: dict[str, Any]) -> None:
        if event["type"] == "progress" and event["data"]["node"] == f"sampler_{branch}":
            ended.append(time.perf_counter())

    outcome = comfyui.run(graph, hear)
    assert outcome.kind == "success", outcome.error
    return list(itertools.pairwise(ended)), outcome


def median_ms(steps: list[tuple[float, float]]) -> float:
    """Of steps."""
    return 1e3 * statistics.median(after - before for before, after in steps)


def told_ms(outcome: Outcome, part: str) -> float:
    """A part of a forward's time, by the text of TACO-DiT Stats Display."""
    text = outcome.texts["stats"]
    ((value, unit),) = re.findall(rf"{part} ([\d.]+) (ms|s)\b", text)
    (forwards,) = re.findall(r"Forwards: (\d+)", text)
    return float(value) * (1 if unit == "ms" else 1e3) / int(forwards)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    # The attention that the ranks have too: ComfyUI's own for CPUs is many times slower on long sequences.
    with started("--use-pytorch-cross-attention") as (comfyui, daemon):
        version = comfyui.get("/system_stats")["system"]["comfyui_version"]
        print(f"ComfyUI {version}, medians of {args.rounds} rounds of {args.steps} steps\n")
        print(
            "| latent | ComfyUI ms | through the nodes ms | more ms | compute | wire | client | queue |\n| --- |"
            + " --- |" * 7
        )
        for size in SIZES:
            rows = []
            for turn in range(args.rounds + 1):
                given = (args.steps, 100 + turn, daemon.endpoint)
                stock = median_ms(steps(comfyui, size, "stock", *given)[0])
                ended, outcome = steps(comfyui, size, "taco", *given)
                ours = median_ms(ended)
                parts = [told_ms(outcome, part) for part in ("compute", "wire", "client", "queue")]
                if turn:
                    rows.append((stock, ours, ours - stock, *parts))
            cells = [f"{statistics.median(column):.2f}" for column in zip(*rows, strict=True)]
            print(f"| {size[0]} × {size[1]} × {size[2]} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()

"""A sampler's step through the nodes while browsers poll for the sidebar's tab, beside the same step without, on CPUs.

    COMFYUI_PATH=… COMFYUI_PYTHON=… PYTHONPATH=tests:tests/comfyui python benchmarks/sidebar.py [--browsers N]

Both run in one ComfyUI with one daemon of one rank, in turn, on a tiny Flux.1 in fp32. A step's time is that between
two of the progress messages that the page gets; each round has the median of its steps and their mean, in which
single slow steps count. Each browser asks every two seconds, as the tab does.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from comfyui_graphs import FLUX, save
from comfyui_server import ComfyUI
from helpers import Daemon
from nodes import steps_ms

SIZES = ((1, 2, 2), (1, 64, 64), (1, 128, 128))
"""Batch, height and width of the latent. The first is almost no work."""
PERIOD_S = 2.0


@contextmanager
def polled(comfyui: ComfyUI, browsers: int) -> Iterator[list[int]]:
    """Within, so many browsers have the tab open; the list gets how often the server has answered."""
    over = threading.Event()
    answers: list[int] = []

    def poll() -> None:
        while not over.wait(PERIOD_S / browsers):
            assert comfyui.get("/taco_dit/status")["status"]["state"] == "ready"
            answers.append(1)

    thread = threading.Thread(target=poll)
    thread.start()
    try:
        yield answers
    finally:
        over.set()
        thread.join()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--browsers", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args()
    path, python = os.environ["COMFYUI_PATH"], os.environ.get("COMFYUI_PYTHON", sys.executable)
    with tempfile.TemporaryDirectory(prefix="tacod-") as name:
        models = Path(name)
        (models / "diffusion_models").mkdir()
        save(FLUX, models / "diffusion_models")
        with Daemon(1, [models]) as daemon, ComfyUI(path, python, daemon.endpoint, models) as comfyui:
            print(
                f"{args.browsers} browsers; {args.rounds} rounds of {args.steps} steps: their median, least and most\n"
            )
            print(
                "| latent | of steps | without ms | polled ms | ratio | polls |\n| --- | --- | --- | --- | --- | --- |"
            )
            for size in SIZES:
                alone, beside, polls = [], [], 0
                for turn in range(args.rounds + 1):
                    quiet, _ = steps_ms(comfyui, size, "taco", args.steps, 2 * turn, daemon.endpoint)
                    with polled(comfyui, args.browsers) as answers:
                        busy, _ = steps_ms(comfyui, size, "taco", args.steps, 2 * turn + 1, daemon.endpoint)
                    if turn:
                        alone.append(quiet)
                        beside.append(busy)
                        polls += len(answers)
                for name, of in (("median", statistics.median), ("mean", statistics.fmean)):
                    rounds = [[of(steps) for steps in each] for each in (alone, beside)]
                    middles = [statistics.median(each) for each in rounds]
                    cells = [
                        f"{middle:.2f} ({min(each):.2f} to {max(each):.2f})"
                        for middle, each in zip(middles, rounds, strict=True)
                    ]
                    shown = (" × ".join(map(str, size)), name, *cells, f"{middles[1] / middles[0]:.3f}", str(polls))
                    print(f"| {' | '.join(shown)} |", flush=True)


if __name__ == "__main__":
    main()

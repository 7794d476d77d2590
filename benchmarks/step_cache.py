"""What the step cache skips, saves and costs: the embedded model's pictures at several thresholds, beside exact ones.

Every scene is drawn with every seed, with guidance, by Euler's method, in this process; all thresholds take turns on
each. On a CPU one thread computes, and its own seconds count, whatever else the machine does; on a GPU, wall time. The
judge of the model's training looks at the pictures.

    PYTHONPATH=. python benchmarks/step_cache.py [--scenes 16] [--seeds 2] [--steps 28] [--thresholds 0.02 0.05 0.1 0.2]
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tacod import embedded
from tacod.checkpoint import read_checkpoint
from tacod.plan import Request
from tacod.rank.families.base import DiT
from tacod.rank.forward.graphs import Forwards
from tacod.rank.parallel.topology import Topology
from tacod.rank.sampling.sampling import SampleRequest, begin
from tacod.rank.weights.load import load_model
from tacod.tools.demo import CFG, PIXELS, SHIFT
from tacod_client.tensors import to_wire
from training.measure import verdict
from training.shapes_data import draw_scenes


@dataclass
class Row:
    """What one threshold came to, a number for each picture."""

    skipped: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    right: list[bool] = field(default_factory=list)
    shapes: list[bool] = field(default_factory=list)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.02, 0.05, 0.1, 0.2])
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    model = load_model(read_checkpoint(str(embedded.PATH)), torch.float32, device)
    scenes = draw_scenes(args.scenes, torch.Generator().manual_seed(7), held_out=True)
    rows = {threshold: Row() for threshold in (0.0, *args.thresholds)}
    run(model, scenes.prompts()[0], 0, args.steps, 0.0)
    for i, prompt in enumerate(scenes.prompts()):
        for seed in range(args.seeds):
            exact: Tensor | None = None
            for threshold, row in rows.items():
                latent, skipped, seconds = run(model, prompt, seed, args.steps, threshold)
                exact = latent if exact is None else exact
                right, shapes = verdict(embedded.decode(latent)[0], scenes[i : i + 1])
                row.skipped.append(skipped)
                row.seconds.append(seconds)
                row.errors.append(float((latent - exact).norm() / exact.norm()))
                row.right.append(right)
                row.shapes.append(shapes)
    where = torch.cuda.get_device_name() if device.type == "cuda" else "one CPU thread"
    print(f"{args.scenes} scenes × {args.seeds} seeds, {args.steps} steps of euler, cfg {CFG:g}, {PIXELS}²; {where}\n")
    print("| threshold | forwards skipped | s | time | error, median | error, worst | right | with their shapes |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for threshold, row in rows.items():
        print(
            f"| {threshold:g} | {100 * statistics.fmean(row.skipped):.0f} % | {statistics.median(row.seconds):.2f} "
            f"| {statistics.median(row.seconds) / statistics.median(rows[0.0].seconds):.2f} "
            f"| {statistics.median(row.errors):.1e} | {max(row.errors):.1e} "
            f"| {sum(row.right)} of {len(row.right)} | {sum(row.shapes)} |"
        )


def run(model: DiT, prompt: str, seed: int, steps: int, threshold: float) -> tuple[Tensor, float, float]:
    """A picture's latent, the share of its forwards that were skipped, and the seconds that it took."""
    noise = torch.randn(1, 16, PIXELS // 8, PIXELS // 8, generator=torch.Generator().manual_seed(seed))
    even = torch.linspace(1, 0, steps + 1)
    request = SampleRequest(
        sampler="euler",
        seed=seed,
        cfg=CFG,
        noise=to_wire(noise, "noise"),
        latent=to_wire(torch.zeros_like(noise), "latent"),
        sigmas=to_wire(SHIFT * even / (1 + (SHIFT - 1) * even), "sigmas"),
        positive=_conditioning(prompt),
        negative=_conditioning(""),
    )
    forwards = Forwards(Topology())
    device = next(model.parameters()).device
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    with torch.inference_mode():
        sampling = begin(request, model, Request(step_cache=threshold), forwards, device)
        started = clock()
        *_, last = sampling.steps
        latent = sampling.finish(last)
        assert isinstance(latent, Tensor)
        latent = latent.cpu()
    seconds = clock() - started
    return latent, forwards.skipped / sampling.denoise.forwards, seconds


def _conditioning(prompt: str) -> dict[str, Any]:
    context, y = embedded.encode(prompt)
    return {"context": to_wire(context, "context"), "y": to_wire(y, "y")}


if __name__ == "__main__":
    main()

"""What the step cache skips, saves and costs: the embedded model's pictures at several thresholds, beside exact ones.

Every scene is drawn with every seed, with guidance, by Euler's method, in this process; all thresholds take turns on
each. On a CPU one thread computes, and its own seconds count, whatever else the machine does; on a GPU, wall time. The
judge of the model's training looks at the pictures.

With ``--models`` a second table has published models with random weights at their usual sizes, whose pictures would say
nothing: ms of a step that is computed and of one that is skipped, as they come and as CUDA graphs, and without a step
cache; and, from these, how many times as fast a run is of which half is skipped. On a CPU they are cut to a block or
two, and 64 pixels wide.

    PYTHONPATH=. python benchmarks/step_cache.py [--scenes 16] [--seeds 2] [--steps 28] [--thresholds 0.02 0.05 0.1 0.2]
                                                 [--models flux,z_image,qwen_image,wan_14b] [--rounds 8]
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from published import PUBLISHED, Size, build, make_inputs
from torch import Tensor

from tacod import embedded
from tacod.checkpoint import read_checkpoint
from tacod.plan import Layout, Plan, Request, Shape
from tacod.rank.families.base import DiT
from tacod.rank.families.inputs import Inputs
from tacod.rank.forward.graphs import Forwards
from tacod.rank.forward.run import Call
from tacod.rank.forward.step_cache import MOST_IN_A_ROW
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
    parser.add_argument("--models", default="", help="published models whose steps are timed, with commas")
    parser.add_argument("--rounds", type=int, default=8, help="computed steps that are timed of each")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    if args.scenes:
        pictures(args, device)
    names = [name for name in args.models.split(",") if name]
    if names:
        steps_of(names, device, args.rounds)


def pictures(args: argparse.Namespace, device: torch.device) -> None:
    """The table of the embedded model's pictures."""
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


def steps_of(names: list[str], device: torch.device, rounds: int) -> None:
    """The table of published models' steps."""
    where = torch.cuda.get_device_name() if device.type == "cuda" else "one CPU thread"
    print(f"\nms of a step, medians of {rounds}; {where}, torch {torch.__version__}\n")
    kinds = ("computed", "skipped", "computed, graphs", "skipped, graphs", "no cache, graph")
    print(f"| model | size | {' | '.join(kinds)} | half skipped, without graphs | half skipped |")
    print("|" + " --- |" * (len(kinds) + 4))
    for name in names:
        size = PUBLISHED[name].sizes[0] if device.type == "cuda" else Size(64, 64)
        model = build(name, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
        with torch.inference_mode():
            inputs = model.prepare(make_inputs(name, model, size, device))
            plain = times_of(model, inputs, Forwards(Topology(), graphs=False), rounds)
            graphed = times_of(model, inputs, Forwards(Topology()), rounds)
        ((computed, skipped, off), (with_graph, skipped_graph, graph)) = plain, graphed
        gains = 2 * off / (computed + skipped), 2 * graph / (with_graph + skipped_graph)
        figures = (computed, skipped, with_graph, skipped_graph, graph)
        cells = [*(f"{each:.2f}" for each in figures), *(f"{each:.2f}×" for each in gains)]
        print(f"| {name} | {size} | {' | '.join(cells)} |", flush=True)
        del model, inputs
        if device.type == "cuda":
            torch.cuda.empty_cache()


def times_of(model: DiT, inputs: Inputs, forwards: Forwards, rounds: int) -> tuple[float, float, float]:
    """What a computed step, a skipped one and one without a cache take, in ms. Steps are alike, so they are skipped."""
    shape = Shape(model.heads, model.width, inputs.batch, model.lengths(inputs))
    cached = Call(model, Plan(Layout(1, 1, 1), 1, shape, step_cache=1e9), inputs, ("run",))
    plain = Call(model, Plan(Layout(1, 1, 1), 1, shape), inputs)
    took: dict[bool, list[float]] = {True: [], False: []}
    # Two runs come as they are and are captured; of each later one a step is computed and some are skipped.
    for number in range((rounds + 2) * (MOST_IN_A_ROW + 1)):
        before = forwards.skipped
        ms = timed(forwards, cached)
        if number >= 2 * (MOST_IN_A_ROW + 1):
            took[forwards.skipped > before].append(ms)
    times = [timed(forwards, plain) for _ in range(rounds + 3)][3:]
    return statistics.median(took[False]), statistics.median(took[True]), statistics.median(times)


def timed(forwards: Forwards, call: Call) -> float:
    """One forward, in ms."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    forwards(call)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - started) * 1000


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

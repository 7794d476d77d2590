"""Attention kernels beside exact attention, on one GPU: time and error of each, alone and in whole forwards.

    python benchmarks/attention.py [--models embedded,flux,z_image] [--kernels sage,int8,fa3] [--rounds 9]

The first table has single attentions in bf16 on random numbers: µs in a CUDA graph of 20, and the error of the first
512 queries relative to fp32. The second has whole forwards, by CUDA graphs where the kernel allows that: ms, gain, and
how far the output is from fp32's of the same weights (of the embedded model, which is trained, and of models with room
for that), or else from exact attention's in bf16. Weights of the other models are random: their errors say how much
attention's errors grow in the blocks, and nothing of pictures. What a card or a package lacks is said below the tables.
On a CPU there is exact attention alone, at a few tokens, which is only for trying it.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from families import joined, times_of
from published import PUBLISHED, Size, build, make_inputs
from split_kv import draw, took_us
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from tacod import embedded
from tacod.checkpoint import read_checkpoint
from tacod.plan import AttentionPolicy, Layout, Plan, Shape
from tacod.rank.families.base import DiT, Output
from tacod.rank.families.inputs import Inputs
from tacod.rank.forward.graphs import Forwards
from tacod.rank.forward.run import FAST, Call
from tacod.rank.ops.attention_kernels import KERNELS, Obstacle
from tacod.rank.ops.sdpa import attend, attend_part
from tacod.rank.parallel.sequence import SequenceParallel
from tacod.rank.parallel.topology import Topology
from tacod.rank.weights.load import load_model
from tacod_client.errors import ArgumentError

SHAPES = {
    "Flux.1 1024²": (24, 4608, 128),
    "Flux.1 1024², one of 3": (8, 4608, 128),
    "Flux.1 2048²": (24, 16896, 128),
    "Z-Image 1024²": (30, 4192, 128),
    "SD3.5-large 1024²": (38, 4250, 64),
    "Wan 14B 832×480×81": (40, 32760, 128),
    "Wan 14B 832×480×81, one of 3": (14, 32760, 128),
}
"""Heads, tokens, and the width of a head."""
CHECKED = 512
"""Queries whose error is measured."""
ROOM = 0.6
"""The part of a GPU's memory that fp32 weights may take."""


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="embedded,flux,z_image,wan_14b")
    parser.add_argument("--kernels", default=",".join(KERNELS))
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    names = args.kernels.split(",")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{where}, torch {torch.__version__}\n", flush=True)
    missing: dict[str, None] = {}
    with torch.inference_mode():
        attentions(device, names, missing)
        print()
        forwards(args.models.split(","), device, names, args.rounds, missing)
    for each in missing:
        print(f"\n{each}")


def attentions(device: torch.device, names: list[str], missing: dict[str, None]) -> None:
    """The table of single attentions."""
    print("| shape | heads | tokens | width | exact, µs | exact, error | " + columns(names, "µs, gain"))
    print("|" + " --- |" * (6 + 2 * len(names)))
    for title, (heads, tokens, width) in SHAPES.items():
        q, k, v = draw(heads, tokens if device.type == "cuda" else 64, width, device)
        expected, _ = attend_part(*(each.float() for each in (q[:, :, :CHECKED], k, v)))

        def error(way: Callable[[], Tensor], expected: Tensor = expected) -> float:
            out = way()[:, :, :CHECKED].float()
            return float((out - expected).norm() / expected.norm())

        with sdpa_kernel(FAST, set_priority=True):
            exact = functools.partial(attend, q, k, v)
            (base,) = took_us([exact])
            row = [title, heads, q.shape[2], width, f"{base:.0f}", f"{error(exact):.1e}"]
            for name in names:
                kernel, cells = KERNELS[name], ["–", "–"]
                obstacle = kernel.obstacle(device, q.dtype, width)
                if obstacle == Obstacle.NONE:
                    way = functools.partial(kernel.attend, q, k, v)
                    try:
                        cells = [f"{(us := took_us([way])[0]):.0f}, {base / us:.2f}×", f"{error(way):.1e}"]
                    except RuntimeError as problem:
                        missing[f"{name}, {title}: {str(problem).splitlines()[0]}"] = None
                else:
                    missing[f"{name} ({kernel.title}), heads of {width}: {kernel.advice(obstacle)}"] = None
                row += cells
        print(f"| {' | '.join(map(str, row))} |", flush=True)


def columns(names: list[str], figures: str) -> str:
    """Heads of two columns for each kernel."""
    return " | ".join(f"{name}, {each}" for name in names for each in (figures, "error")) + " |"


def forwards(models: list[str], device: torch.device, names: list[str], rounds: int, missing: dict[str, None]) -> None:
    """The table of whole forwards."""
    print("| model | size | relative to | exact, ms | exact, error | " + columns(names, "ms, gain"))
    print("|" + " --- |" * (5 + 2 * len(names)))
    low = torch.bfloat16
    for name in models:
        for size, model, inputs, exact in cases(name, device, low):
            shape = Shape(model.heads, model.width, inputs.batch, model.lengths(inputs))
            call = Call(model, Plan(Layout(1, 1, 1), 1, shape), inputs)
            run = Forwards(Topology())
            base = times_of(functools.partial(run, call), rounds)
            out = joined(run(call)).float().cpu()
            expected = out if exact is None else joined(exact).float().cpu()
            row = [name, size, "exact" if exact is None else "fp32", f"{base:.2f}", error_of(out, expected)]
            for kernel in names:
                asked = replace(call, plan=replace(call.plan, attention=AttentionPolicy(kernel=kernel)))
                try:
                    ms = times_of(functools.partial(run, asked), rounds)
                    row += [f"{ms:.2f}, {base / ms:.2f}×", error_of(joined(run(asked)).float().cpu(), expected)]
                except ArgumentError as refused:
                    missing[f"{name}: {refused}"] = None
                    row += ["–", "–"]
            print(f"| {' | '.join(map(str, row))} |", flush=True)
            run.clear()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def error_of(out: Tensor, expected: Tensor) -> str:
    """Of an output relative to the expected one."""
    return f"{float((out - expected).norm() / expected.norm()):.1e}"


def cases(name: str, device: torch.device, low: torch.dtype) -> Iterator[tuple[str, DiT, Inputs, Output | None]]:
    """A model's forwards: the size, the model in ``low``, its inputs, and the output in fp32 if that has room."""
    if name == "embedded":
        model = load_model(read_checkpoint(str(embedded.PATH)), torch.float32, device)
        context, y = embedded.encode(embedded.PROMPTS[0])
        x = torch.randn(1, 16, 32, 32, generator=torch.Generator().manual_seed(0))
        level = model.timestep(torch.full((1,), 0.7)).float()
        drawn = Inputs({"x": x, "timestep": level, "context": context, "y": y}, model.arguments())
        drawn = drawn.map(lambda each: each.to(device))
        exact = model.run(SequenceParallel(), drawn)
        rounded = drawn.map(lambda each: each.to(low) if each.ndim > 1 else each)
        yield "256x256", load_model(read_checkpoint(str(embedded.PATH)), low, device), rounded, exact
        return
    sizes = PUBLISHED[name].sizes[:1] if device.type == "cuda" else [Size(64, 64)]
    model = build(name, device, low)
    parameters = sum(each.numel() for each in model.parameters())
    room = torch.cuda.mem_get_info()[1] * ROOM if device.type == "cuda" else float("inf")
    for size in sizes:
        inputs = model.prepare(make_inputs(name, model, size, device))
        reference: Output | None = None
        if size.frames == 1 and 6 * parameters < room:
            whole = build(name, device, low).float()
            reference = whole.run(SequenceParallel(), whole.prepare(inputs.map(torch.Tensor.float)))
            del whole
        yield str(size), model, inputs, reference


if __name__ == "__main__":
    main()

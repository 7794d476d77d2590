"""Every layout of the ranks, side by side in one run: times, errors, and what the planner says.

    python benchmarks/plans.py [--ranks N] [--models flux,sd35_large,pixart] [--sizes 1024,2048] [--rounds 5] [--json]

Models have the shapes of the published ones and random weights, in bf16 on GPUs. On a CPU they are cut to a
few blocks.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import torch
from published import PUBLISHED
from torch import Tensor, multiprocessing

from tacod.group.processes import ON_GPUS
from tacod.plan import AUTO, Layout, Plan, Shape, cost, make_plan
from tacod.rank.comm import process_groups
from tacod.rank.comm.select import reach
from tacod.rank.families.base import DiT
from tacod.rank.families.flux import Flux
from tacod.rank.families.inputs import Argument, Inputs
from tacod.rank.families.pixart import PixArt
from tacod.rank.families.sd3 import SD3
from tacod.rank.forward.run import Call, run
from tacod.rank.parallel.topology import Topology

FLUX = PUBLISHED["flux"].config
SD35_LARGE = {
    "image_model": "sd3",
    "in_channels": 16,
    "depth": 38,
    "adm_in_channels": 2048,
    "pos_embed_max_size": 192,
    "context_embedder_config": {"params": {"in_features": 4096, "out_features": 2432}},
    "qk_norm": "rms",
}
PIXART = {
    "image_model": "pixart_sigma",
    "input_size": 128,
    "in_channels": 4,
    "hidden_size": 1152,
    "depth": 28,
    "num_heads": 16,
    "caption_channels": 4096,
    "pred_sigma": True,
    "micro_condition": False,
    "pe_interpolation": 2,
}
MODELS: dict[str, tuple[type[DiT], Mapping[str, Any], int, int, dict[str, Any]]] = {
    "flux": (Flux, FLUX, 1, 512, dict(PUBLISHED["flux"].cut)),
    "sd35_large": (
        SD3,
        SD35_LARGE,
        2,
        154,
        {"depth": 6, "context_embedder_config": {"params": {"in_features": 4096, "out_features": 384}}},
    ),
    "pixart": (PixArt, PIXART, 2, 300, {"depth": 2}),
}
"""Family, configuration, batch, text tokens, and what a CPU's is cut to."""


def configuration(name: str, device: torch.device) -> dict[str, Any]:
    """A model's configuration, cut down on a CPU."""
    _, config, _, _, cut = MODELS[name]
    return {**config, **(cut if device.type == "cpu" else {})}


def build(name: str, device: torch.device, dtype: torch.dtype | None = None) -> DiT:
    """A model with random, well-conditioned weights, the same on every rank; bf16 on GPUs if not told otherwise."""
    family = MODELS[name][0]
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    with torch.device("meta"):
        model = family(configuration(name, device)).to(dtype)
    model = model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for key, parameter in (*model.named_parameters(), *model.named_buffers()):
        scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.02
        # The norms of queries and keys, without which all tokens would attend to all alike.
        mean = 1.0 if ".norm." in key or ".ln_" in key else 0.0
        parameter.data.normal_(mean, scale, generator=generator)
    return model.eval().requires_grad_(False)


def make_inputs(
    name: str, model: DiT, pixels: int, device: torch.device, dtype: torch.dtype | None = None
) -> dict[str, Any]:
    """A forward's arguments at this size, in the model's dtype if not told otherwise."""
    _, _, batch, text, _ = MODELS[name]
    generator = torch.Generator(device).manual_seed(1)
    sizes = {"B": batch, "H": pixels // 8, "W": pixels // 8, "L": text}
    inputs: dict[str, Any] = {}
    for key, spec in model.arguments().items():
        if isinstance(spec, Argument) and spec.shape is not None and (spec.required or key == "y"):
            shape = [sizes[size] if isinstance(size, str) else size for size in spec.shape]
            inputs[key] = torch.randn(shape, generator=generator, device=device, dtype=dtype or model.dtype)
    inputs["timestep"] = model.timestep(torch.full((batch,), 0.7, device=device)).float()
    if "guidance" in inputs:
        inputs["guidance"] = torch.full((batch,), 3.5, device=device)
    return inputs


def measure(
    model: DiT, layout: Layout, topology: Topology, inputs: dict[str, Any], rounds: int
) -> tuple[Tensor, list[float]]:
    """The output and the milliseconds of each round."""
    plan = Plan(layout, topology.world_size, Shape(model.heads, model.width))
    call = Call(model, plan, Inputs(inputs, model.arguments()))
    times = []
    for number in range(rounds + 2):
        if inputs["x"].is_cuda:
            torch.cuda.synchronize()
        started = time.perf_counter()
        out = run(call, topology)
        if inputs["x"].is_cuda:
            torch.cuda.synchronize()
        if number >= 2:
            times.append((time.perf_counter() - started) * 1000)
    assert isinstance(out, Tensor)
    return out, times


def rank_main(rank: int, args: argparse.Namespace, rendezvous: str) -> None:
    """One rank's life; rank 0 prints."""
    cuda = torch.cuda.is_available()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // args.ranks))
    topology = Topology(
        rank,
        args.ranks,
        process_groups.join(device, rank, args.ranks, rendezvous, local_rank=rank if cuda else 0),
        reach if cuda else None,
    )
    rows = []
    with torch.inference_mode():
        for name in args.models.split(","):
            model = build(name, device)
            for pixels in map(int, args.sizes.split(",")):
                rows += rows_of(name, model, pixels, topology, make_inputs(name, model, pixels, device), args.rounds)
                if rank == 0 and not args.json:
                    show(rows[-1]["case"], [row for row in rows if row["case"] == rows[-1]["case"]])
            del model
            torch.cuda.empty_cache() if cuda else None
    if rank == 0 and args.json:
        machine = torch.cuda.get_device_name() if cuda else "CPU"
        print(json.dumps({"device": machine, "ranks": args.ranks, "torch": torch.__version__, "rows": rows}, indent=2))
    process_groups.leave()


def rows_of(
    name: str, model: DiT, pixels: int, topology: Topology, inputs: dict[str, Any], rounds: int
) -> list[dict[str, Any]]:
    """All layouts of one case that leave no rank idle, beside one rank alone."""
    batch = len(inputs["x"])
    shape = Shape(model.heads, model.width, batch, model.lengths(inputs))
    world = topology.world_size
    layouts = [Layout(1, 1, 1)] + [
        Layout(groups, ulysses, world // groups // ulysses)
        for groups in range(1, min(batch, world) + 1)
        if world % groups == 0
        for ulysses in range(1, world // groups + 1)
        if world // groups % ulysses == 0
    ]
    chosen = make_plan(AUTO, world, shape).layout
    rows: list[dict[str, Any]] = []
    alone: Tensor | None = None
    for layout in dict.fromkeys(layouts):
        out, times = measure(model, layout, topology, inputs, rounds)
        alone = out if alone is None else alone
        rows.append(
            {
                "case": f"{name} {pixels}² batch {batch}",
                "layout": str(layout),
                "ms": statistics.median(times),
                "spread_ms": max(times) - min(times),
                "speedup": rows[0]["ms"] / statistics.median(times) if rows else 1.0,
                "predicted": cost(Layout(1, 1, 1), shape) / cost(layout, shape),
                "error": float((out.float() - alone.float()).norm() / alone.float().norm()),
                "chosen": layout == chosen,
            }
        )
    return rows


def show(case: str, rows: list[dict[str, Any]]) -> None:
    """One case as a table."""
    print(f"\n{case}\n{'layout':44s} {'ms':>9s} {'±':>7s} {'speedup':>8s} {'predicted':>9s} {'error':>8s}")
    for row in rows:
        mark = "  ← planned" if row["chosen"] else ""
        print(
            f"{row['layout']:44s} {row['ms']:9.1f} {row['spread_ms']:7.1f} {row['speedup']:8.2f} "
            f"{row['predicted']:9.2f} {row['error']:8.1e}{mark}",
            flush=True,
        )


def main() -> None:
    """Start the ranks and wait for them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=torch.cuda.device_count() or 2)
    parser.add_argument("--models", default="flux,sd35_large,pixart")
    parser.add_argument("--sizes", default="1024,2048")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    os.environ.update(ON_GPUS)
    with tempfile.TemporaryDirectory() as folder:
        rendezvous = f"{folder}/rendezvous"
        multiprocessing.spawn(rank_main, (args, rendezvous), args.ranks)  # type: ignore[attr-defined,no-untyped-call]


if __name__ == "__main__":
    main()

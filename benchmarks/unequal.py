"""Unequal ranks: forwards with even shares and with measured ones beside each other, while one rank is slowed.

    python benchmarks/unequal.py [--ranks 2] [--model flux] [--size 1024] [--slow 1] [--load 0.5] [--rounds 9]

Processes of their own multiply matrices on the slowed rank's GPU: --load 0.5 is one for half of the time, --load 2.5
are three, --load 0 none. Then the ranks load the model, with random weights, and measure their paces as at a load in
the daemon. The table has the fastest rank alone, even shares, the measured shares on all ranks, and what the planner
takes, all in turn in one run. Errors are relative to the rank alone. On a CPU the model is cut to a block or two, each
rank has a core of its own, and the processes compute on that of the slowed rank: nothing else may run there.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from published import PUBLISHED, Size, build, make_inputs
from torch import multiprocessing

from tacod.group.processes import ON_GPUS
from tacod.plan import AUTO, Plan, Request, Shape, make_plan
from tacod.rank.comm import process_groups
from tacod.rank.comm.select import reach
from tacod.rank.forward.graphs import Forwards
from tacod.rank.forward.run import Call, relative_difference
from tacod.rank.forward.warmup import warm_up
from tacod.rank.parallel.topology import Topology
from tacod.shares import EQUAL

WARM_UPS = 3
"""Forwards of each kind before one is measured: as they come, captured, and replayed."""
SIDE = {"cuda": 8192, "cpu": 512}
"""Of the matrices that the load multiplies."""
PERIOD_S = 0.02
"""For such a time, times its part, the load computes without a rest."""
MOST_LOAD = 8


def main() -> None:
    """Start the load and the ranks, and wait for them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=torch.cuda.device_count() or 2)
    parser.add_argument("--model", default="flux", choices=sorted(PUBLISHED))
    parser.add_argument("--size", type=Size.parse, default=None, help="by default 1024, on a CPU 256")
    parser.add_argument("--slow", type=int, default=1, help="which rank is slowed")
    parser.add_argument("--load", type=float, default=0.5, help="how many processes' worth")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--as-load", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not 0 <= args.slow < args.ranks or not 0 <= args.load <= MOST_LOAD:
        parser.error(f"--slow is one of 0 to {args.ranks - 1}, and --load from 0 to {MOST_LOAD}")
    if args.as_load:
        load(device_of(args.slow), args.load / math.ceil(args.load))
    os.environ.update(ON_GPUS)
    args.size = args.size or Size.parse("1024" if torch.cuda.is_available() else "256")
    with tempfile.TemporaryDirectory() as folder, loaded(args):
        rendezvous = f"{folder}/rendezvous"
        multiprocessing.spawn(rank_main, (args, rendezvous), args.ranks)  # type: ignore[attr-defined,no-untyped-call]


def device_of(rank: int) -> torch.device:
    """A rank's GPU, or a core of the CPU to which this process keeps from then on."""
    if torch.cuda.is_available():
        torch.cuda.set_device(rank)
        return torch.device("cuda", rank)
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    torch.set_num_threads(1)
    return torch.device("cpu")


@contextmanager
def loaded(args: argparse.Namespace) -> Iterator[None]:
    """Within, other processes slow one rank."""
    command = [sys.executable, *sys.argv, "--as-load"]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(math.ceil(args.load))]
    try:
        for process in processes:
            assert process.stdout is not None
            process.stdout.readline()
        yield
    finally:
        for process in processes:
            process.terminate()
            process.wait()


def load(device: torch.device, part: float) -> None:
    """Multiply matrices for a part of the time, until the process is ended."""
    side = SIDE[device.type]
    matrix = torch.randn(side, side, device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    product = matrix @ matrix
    print("loaded", flush=True)
    while True:
        began = time.perf_counter()
        while time.perf_counter() - began < part * PERIOD_S:
            torch.mm(matrix, matrix, out=product)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        # However long the last product took.
        took = time.perf_counter() - began
        time.sleep(took * (1 - part) / part)


def rank_main(rank: int, args: argparse.Namespace, rendezvous: str) -> None:
    """One rank's life; rank 0 prints."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    device = device_of(rank)
    cuda = device.type == "cuda"
    make_group = process_groups.join(device, rank, args.ranks, rendezvous, local_rank=rank if cuda else 0)
    forwards = Forwards(Topology(rank, args.ranks, make_group, reach if cuda else None))
    with torch.inference_mode():
        model = build(args.model, device, torch.bfloat16 if cuda else torch.float32)
        if not cuda:
            # A usual forward is of 1024 pixels.
            sides = [side for side in model.canvas[2:] if isinstance(side, str)]
            vars(model)["usual"] = {**model.usual, **{side: model.usual[side] // 4 for side in sides}}
        rates, shares = warm_up(model, forwards, device)
        inputs = model.prepare(make_inputs(args.model, model, args.size, device))
        shape = Shape(model.heads, model.width, inputs.batch, model.lengths(inputs))
        plans = {
            "one rank alone": make_plan(Request(sequence_parallel_degree=1), args.ranks, shape, None, shares),
            "even shares": make_plan(AUTO, args.ranks, shape),
            "measured shares": make_plan(AUTO, args.ranks, shape, None, shares),
            "as planned": make_plan(AUTO, args.ranks, shape, rates, shares),
        }
        calls = {name: Call(model, plan, inputs) for name, plan in plans.items()}
        took: dict[str, list[float]] = {name: [] for name in plans}
        outs = {}
        for number in range(WARM_UPS + args.rounds):
            for name, call in calls.items():
                if cuda:
                    torch.cuda.synchronize()
                # All begin at the same time.
                forwards.topology.everyone.agree(True)
                started = time.perf_counter()
                outs[name] = forwards(call)
                if cuda:
                    torch.cuda.synchronize()
                if number >= WARM_UPS:
                    took[name].append((time.perf_counter() - started) * 1000)
    if rank == 0:
        print(f"{args.model} {args.size}, rank {args.slow} of {args.ranks} slowed by a load of {args.load:g}")
        found = str(shares) or "all are as fast"
        print(f"{found if shares != EQUAL else 'not measured: one rank alone has no room for a forward'}\n")
        errors = {name: relative_difference(out, outs["one rank alone"]) for name, out in outs.items()}
        show(plans, took, errors)
    process_groups.leave()


def show(plans: dict[str, Plan], took: dict[str, list[float]], errors: dict[str, float]) -> None:
    """The plans as a table."""
    print(f"{'':16s} {'ms':>9s} {'±':>7s} {'speedup':>8s} {'error':>8s}  plan")
    even = statistics.median(took["even shares"])
    for name, plan in plans.items():
        ms = statistics.median(took[name])
        spread = (max(took[name]) - min(took[name])) / 2
        print(f"{name:16s} {ms:9.1f} {spread:7.1f} {even / ms:8.2f} {errors[name]:8.1e}  {plan}")


if __name__ == "__main__":
    main()

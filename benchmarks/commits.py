"""Forwards of two checkouts of TACO-DiT, turn by turn in one run on the same devices. Both must be 1f5d86f or later.

    python benchmarks/commits.py OLD NEW [--ranks 2] [--models flux,sd35_large,pixart] [--sizes 1024,2048] [--rounds 15]

Each checkout has processes of its own, one for each device, which import that checkout. Both hold the model on every
device at once, with the same random weights, and run it as the daemon does: by CUDA graphs, in the planner's layout.
Only one checkout computes at a time. The models are those of plans.py; on a CPU they are cut to a few blocks. The last
column is the relative difference of the outputs.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

WARM_UPS = 4
"""Forwards before the first one that is measured. A CUDA graph is captured and checked among them."""


def main() -> None:
    """Start both, and print a row for each model and size."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("trees", nargs=2, metavar="TREE", help="the old checkout, and the new one")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--models", default="flux,sd35_large,pixart")
    parser.add_argument("--sizes", default="1024,2048")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank is not None:
        work(args)
        return
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{args.ranks} × {device}, torch {torch.__version__}; ms of a forward, medians of {args.rounds}\n")
    print("model        size   old ms   new ms   new/old   difference")
    with tempfile.TemporaryDirectory() as folder:
        sides = [Side(args, number, tree, folder) for number, tree in enumerate(args.trees)]
        try:
            for model in args.models.split(","):
                for size in args.sizes.split(","):
                    compare(sides, model, size, args.rounds, folder)
        finally:
            for side in sides:
                side.close()


def compare(sides: list[Side], model: str, size: str, rounds: int, folder: str) -> None:
    """Print one row."""
    for side in sides:
        side.ask(f"load {model} {size}")
    took: list[list[float]] = [[], []]
    for number in range(rounds):
        # Each goes first as often as the other.
        for index in (0, 1) if number % 2 else (1, 0):
            took[index].append(sides[index].ask("forward"))
    for side in sides:
        side.ask("save")
    one, other = (torch.load(Path(folder, f"{number}.pt")).float() for number in (0, 1))
    old, new = map(statistics.median, took)
    difference = float((one - other).norm() / one.norm())
    print(f"{model:<12} {size:>4} {old:8.2f} {new:8.2f} {new / old:9.4f} {difference:12.1e}", flush=True)


class Side:
    """The ranks of one checkout."""

    def __init__(self, args: argparse.Namespace, number: int, tree: str, folder: str) -> None:
        paths = [tree, f"{tree}/client", f"{tree}/benchmarks"]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")])}
        command = [sys.executable, __file__, *args.trees, "--ranks", str(args.ranks)]
        command += ["--folder", f"{folder}/{number}", "--rank"]
        self.ranks = [
            subprocess.Popen(
                [*command, str(rank)], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            for rank in range(args.ranks)
        ]

    def ask(self, what: str) -> float:
        """Send all ranks a command; returns the longest time that one of them took, in ms."""
        for rank in self.ranks:
            assert rank.stdin is not None
            rank.stdin.write(what + "\n")
            rank.stdin.flush()
        return max(float(rank.stdout.readline()) for rank in self.ranks if rank.stdout is not None)

    def close(self) -> None:
        """End the ranks by closing their input."""
        for rank in self.ranks:
            assert rank.stdin is not None
            rank.stdin.close()
        for rank in self.ranks:
            rank.wait()


def work(args: argparse.Namespace) -> None:
    """One rank's life."""
    sys.path.remove(str(Path(__file__).resolve().parent))
    import plans

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    cuda = torch.cuda.is_available()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    device = torch.device("cuda", args.rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // args.ranks))
    forwards = make_forwards(args, device)
    model: Any = None
    loaded = ""
    with torch.inference_mode():
        for line in sys.stdin:
            verb, *names = line.split()
            started = time.perf_counter()
            if verb == "load":
                if names[0] != loaded:
                    model, loaded = None, names[0]
                    if cuda:
                        forwards.clear()
                        torch.cuda.empty_cache()
                    model = fill(plans.build(loaded, device), device)
                inputs = plans.make_inputs(loaded, model, int(names[1]), device)
                for _ in range(WARM_UPS):
                    out = forward(forwards, model, inputs)
            elif verb == "forward":
                out = forward(forwards, model, inputs)
            elif args.rank == 0:
                torch.save(out.cpu(), args.folder + ".pt")
            if cuda:
                torch.cuda.synchronize()
            print((time.perf_counter() - started) * 1000, file=answers, flush=True)
    os._exit(0)


def fill(model: Any, device: torch.device) -> Any:
    """The same random weights in both checkouts, whatever the order of their parameters."""
    generator = torch.Generator(device).manual_seed(0)
    for key, parameter in sorted(model.named_parameters()):
        scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.02
        # The norms of queries and keys, without which all tokens would attend to all alike.
        mean = 1.0 if ".norm." in key or ".ln_" in key else 0.0
        parameter.data.normal_(mean, scale, generator=generator)
    return model


def make_forwards(args: argparse.Namespace, device: torch.device) -> Any:
    """What runs forwards, of the checkout that this process imports."""
    from tacod.rank.comm import process_groups
    from tacod.rank.comm.select import reach
    from tacod.rank.forward.graphs import Forwards
    from tacod.rank.parallel.topology import Topology

    cuda = device.type == "cuda"
    make_group = process_groups.join(device, args.rank, args.ranks, args.folder, local_rank=args.rank if cuda else 0)
    return Forwards(Topology(args.rank, args.ranks, make_group, reach if cuda else None))


def forward(forwards: Any, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """One forward by the plan that the planner has for it."""
    from tacod.plan import AUTO, Shape, make_plan
    from tacod.rank.families.inputs import Inputs
    from tacod.rank.forward.run import Call

    world = forwards.topology.world_size
    plan = make_plan(AUTO, world, Shape(model.heads, model.width, len(inputs["x"]), model.lengths(inputs)))
    out: torch.Tensor = forwards(Call(model, plan, Inputs(inputs, model.arguments())))
    return out


if __name__ == "__main__":
    main()

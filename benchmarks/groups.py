"""Two groups of ranks beside one group of all: how many forwards a second clients get that all ask at once.

    python benchmarks/groups.py [--ranks 2] [--clients 2] [--model flux] [--size 1024] [--seconds 30]

Random weights, and conditioning of its own for each client. A daemon with one group of all ranks and one with two
groups of half of them each serve the same clients, which ask for one forward after the other. The error is that of each
client's result beside the other daemon's. On CPUs the model is cut to a block or two. TMPDIR holds the model's file.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from published import PUBLISHED, Size, build, make_inputs
from served import daemon, write_model
from torch import Tensor

from tacod.group.processes import ON_GPUS
from tacod_client import Client

LOAD_S = 900.0
"""A client that isn't ready by then has failed."""
WARM_UPS = 3
"""Forwards before the first that counts: as they come, captured as a CUDA graph, and replayed."""


def main() -> int:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=torch.cuda.device_count() or 2)
    parser.add_argument("--clients", type=int, default=2)
    parser.add_argument("--model", default="flux", choices=sorted(PUBLISHED))
    parser.add_argument("--size", default="1024" if torch.cuda.is_available() else "256")
    parser.add_argument("--seconds", type=float, default=30.0)
    args = parser.parse_args()
    if args.ranks < 2 or args.clients < 1:
        parser.error("two groups need two --ranks, and there must be a client")
    os.environ.update(ON_GPUS)
    cuda = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder:
        model = build(args.model, torch.device("cuda" if cuda else "cpu"), torch.bfloat16 if cuda else torch.float32)
        config = {**PUBLISHED[args.model].config, **({} if cuda else PUBLISHED[args.model].cut)}
        write_model(Path(folder, "model.safetensors"), model.state_dict(), config)
        size, host = Size.parse(args.size), torch.device("cpu")
        inputs = [dict(make_inputs(args.model, model, size, host).items()) for _ in range(args.clients)]
        for index, each in enumerate(inputs):
            each["context"] = each["context"] * (1 + index)
        del model
        if cuda:
            torch.cuda.empty_cache()
        print(f"{args.model} {args.size}, {args.clients} clients, {args.ranks} {'GPUs' if cuda else 'CPU ranks'}\n")
        print("| groups of ranks | forwards a second | a forward, p50 | error |\n| --- | --- | --- | --- |")
        wanted: list[Tensor] = []
        rates = []
        for ranks in ([args.ranks], [(args.ranks + 1) // 2, args.ranks // 2]):
            gpus = list(map(str, range(args.ranks))) if cuda else []
            with daemon(gpus, ranks, folder) as endpoint:
                outs, seconds = measure(endpoint, inputs, args.seconds)
            wanted = wanted or outs
            error = max(float((a - b).norm() / b.norm()) for a, b in zip(outs, wanted, strict=True))
            rates.append(sum(map(len, seconds)) / args.seconds)
            p50 = statistics.median(each for of_client in seconds for each in of_client)
            print(f"| {' + '.join(map(str, ranks))} | {rates[-1]:.2f} | {1e3 * p50:.1f} ms | {error:.1e} |", flush=True)
        print(f"\ntwo groups do {rates[1] / rates[0]:.2f} times as many")
    return 0


def measure(endpoint: str, inputs: Sequence[dict[str, Any]], seconds: float) -> tuple[list[Tensor], list[list[float]]]:
    """Each client's result, and how long its forwards took that ended within so many seconds."""
    outs: list[Tensor] = [torch.empty(0)] * len(inputs)
    took: list[list[float]] = [[] for _ in inputs]
    begin = threading.Barrier(len(inputs), timeout=LOAD_S)

    def ask(index: int) -> None:
        with Client(endpoint) as client:
            model = client.load("model.safetensors")
            # By then all clients have loaded it: those that come later could not know of them.
            begin.wait()
            for _ in range(WARM_UPS):
                outs[index] = model.forward(**inputs[index]).float()
            begin.wait()
            until = time.monotonic() + seconds
            while (at_s := time.monotonic()) < until:
                model.forward(**inputs[index])
                if time.monotonic() <= until:
                    took[index].append(time.monotonic() - at_s)

    clients = [threading.Thread(target=ask, args=(index,)) for index in range(len(inputs))]
    for each in clients:
        each.start()
    for each in clients:
        each.join()
    if any(not each for each in took):
        raise SystemExit("a client has no forward that ended in time; give more --seconds, or see the error above")
    return outs, took


if __name__ == "__main__":
    sys.exit(main())

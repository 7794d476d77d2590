"""How fast ranks read a model, all at once: a bf16 file in the page cache, GB/s for each rank.

A Flux-shaped file of random weights is written to a folder, which keeps it in the page cache. Then one process for each
rank does this, all at the same moment, one thing after the other and each twice:

* read: preadv into one buffer in host memory, which goes nowhere; by one thread, and by several
* safetensors: `safetensors.torch.load_file` to the device
* ours: what a rank does at load

The first time takes what a fresh process takes (pinned buffers, the allocator's first blocks), the second one doesn't.

    python benchmarks/model_load.py [--gib 1.0] [--ranks N] [--device cpu|cuda] [--folder /dev/shm]
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import memory
import torch
from safetensors.torch import load_file

from tacod.checkpoint import read_checkpoint
from tacod.rank.weights.load import load_model

PIECE = 16 << 20


def main() -> None:
    """Print the table."""
    cards = torch.cuda.device_count()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=1.0, help="size of the file")
    parser.add_argument("--ranks", type=int, default=max(cards, 1))
    parser.add_argument("--device", default="cuda" if cards else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--folder", help="where the file is written for the while; by default where temporary files go")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--path", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.path is not None:
        work(args.path, torch.device(f"cuda:{args.rank}" if args.device == "cuda" else "cpu"))
        return
    with tempfile.TemporaryDirectory(prefix="tacod-", dir=args.folder) as name:
        path, size = memory.write(Path(name), "bf16", args.gib)
        rounds = race(path, args.ranks, args.device)
    name = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {os.cpu_count()} cores"
    print(f"{size / 1e9:.2f} GB in bf16, {args.ranks} ranks at once, {name}, torch {torch.__version__}")
    for what, seconds in rounds:
        rates = [size / 1e9 / each for each in seconds]
        print(
            f"{what:28s} {statistics.median(rates):7.2f} GB/s a rank ({min(rates):.2f} to {max(rates):.2f})"
            f"   {max(seconds):7.2f} s until the last"
        )


def race(path: Path, ranks: int, device: str) -> list[tuple[str, list[float]]]:
    """What was done, and the seconds that each rank took; everywhere all ranks start together."""
    command = [sys.executable, __file__, "--device", device, "--path", str(path)]
    workers = [
        subprocess.Popen([*command, "--rank", str(rank)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for rank in range(ranks)
    ]
    rounds = []
    while True:
        # A worker tells what it will do, waits for a line, and tells how long it took.
        names = {told(worker) for worker in workers}
        if names == {""}:
            break
        (name,) = names
        for worker in workers:
            assert worker.stdin is not None
            worker.stdin.write("\n")
            worker.stdin.flush()
        rounds.append((json.loads(name), [float(told(worker)) for worker in workers]))
    assert not any(worker.wait() for worker in workers)
    return rounds


def told(worker: subprocess.Popen[str]) -> str:
    """The next line of a worker, empty at its end."""
    assert worker.stdout is not None
    return worker.stdout.readline()


def work(path: str, device: torch.device) -> None:
    """What one rank does, at the words of the one who started it."""
    ways: dict[str, Callable[[], object]] = {
        "read, 1 thread": lambda: read(path, 1),
        "read, 4 threads": lambda: read(path, 4),
        "safetensors": lambda: in_memory(load_file(path, device=str(device))),
        "ours": lambda: load_model(read_checkpoint(path), torch.bfloat16, device),
    }
    torch.zeros(1, device=device)
    for name, way in ways.items():
        for turn in ("first", "second"):
            print(json.dumps(f"{name}, {turn}"), flush=True)
            sys.stdin.readline()
            started = time.perf_counter()
            kept = way()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds = time.perf_counter() - started
            del kept
            gc.collect()
            print(seconds, flush=True)
        if device.type == "cuda":
            # The next way begins as a fresh process would.
            torch.cuda.empty_cache()


def in_memory(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """On a CPU, copies: there the tensors are the mapped file, of which nothing has been read yet."""
    return {name: tensor.clone() if tensor.device.type == "cpu" else tensor for name, tensor in tensors.items()}


def read(path: str, threads: int) -> None:
    """Every byte into a buffer, one for each thread, that is overwritten by the next."""
    size, count = os.stat(path).st_size, threads
    file = os.open(path, os.O_RDONLY)

    def run(thread: int) -> None:
        buffer = bytearray(PIECE)
        for at in range(thread * PIECE, size, count * PIECE):
            assert os.preadv(file, [buffer], at) == min(PIECE, size - at)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(run, range(threads)))
    os.close(file)


if __name__ == "__main__":
    main()

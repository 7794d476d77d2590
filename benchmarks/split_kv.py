"""Attention on one GPU: what a few more queries cost, and what ranks save by split keys (`tacod.rank.ops.split_kv`).

Queries, keys and values are random, in bf16, and lie as a rank receives them; µs in a CUDA graph of 20, medians. On a
CPU it has a few queries and wall times, which mean nothing: that is only for trying it.

    python benchmarks/split_kv.py
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from tacod.rank.forward.run import FAST
from tacod.rank.ops.sdpa import attend, attend_pieces
from tacod.rank.ops.split_kv import whole_waves

TILES = (1, 11, 12, 22, 23, 33, 34, 36)
WIDTHS = (128, 64, 72)
CASES = (
    (12, 4608, 128),
    (8, 4608, 128),
    (12, 4464, 128),
    (12, 4352, 128),
    (8, 8704, 128),
    (13, 4250, 64),
    (6, 4096, 72),
)
"""Heads, tokens and the width of a head."""
TILE = 128
REPEATS, ROUNDS = 20, 15


def main() -> None:
    """Print the tables."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    processors = torch.cuda.get_device_properties(device).multi_processor_count if on_gpu else 132
    name = torch.cuda.get_device_name() if on_gpu else "CPU"
    print(f"{name}, {processors} multiprocessors, torch {torch.__version__}\n")
    shrink = 1 if on_gpu else 16
    with torch.inference_mode(), sdpa_kernel(FAST, set_priority=True):
        print(f"us for 12 heads and {4608 // shrink} keys, by tiles of {TILE // shrink} queries")
        print("tiles  waves " + "".join(f"{f'width {width}':>12}" for width in WIDTHS))
        drawn = {width: draw(12, 4608 // shrink, width, device) for width in WIDTHS}
        for tiles in TILES:
            rows = tiles * TILE // shrink
            times = [took_us([functools.partial(attend, q[:, :, :rows], k, v)])[0] for q, k, v in drawn.values()]
            print(f"{tiles:5d}  {tiles * 12 / processors:5.2f} " + "".join(f"{each:12.1f}" for each in times))
        print("\nheads tokens width  waves  shares  us at once  in waves")
        for heads, tokens, width in CASES:
            q, k, v = draw(heads, tokens // shrink, width, device)
            ways = functools.partial(attend, q, k, v), lambda q=q, k=k, v=v: list(attend_pieces(q, k, v, split_kv=True))
            once, waves = took_us(ways)
            tiles = heads * math.ceil(tokens / TILE)
            # What would be on Hopper.
            shares = whole_waves(tokens, tokens, heads, processors)[1]
            print(f"{heads:5d} {tokens:6d} {width:5d} {tiles / processors:6.2f} {shares:7d} {once:11.1f} {waves:9.1f}")


def draw(heads: int, tokens: int, width: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [1, H, S, D]."""
    together = torch.randn(tokens, 1, 3, heads, width, device=device, dtype=torch.bfloat16)
    q, k, v = together.permute(2, 1, 3, 0, 4)
    return q, k, v


def took_us(ways: Sequence[Callable[[], object]]) -> list[float]:
    """Median µs of each way, in turns."""
    replays = [repeated(way) for way in ways]
    times: list[list[float]] = [[] for _ in ways]
    for _ in range(ROUNDS):
        for each, replay in zip(times, replays, strict=True):
            each.append(replay() / REPEATS * 1e6)
    return [statistics.median(each) for each in times]


def repeated(way: Callable[[], object]) -> Callable[[], float]:
    """What does it `REPEATS` times and says in how many seconds."""
    way()
    if not torch.cuda.is_available():

        def run() -> float:
            begin = time.perf_counter()
            for _ in range(REPEATS):
                way()
            return time.perf_counter() - begin

        return run
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(REPEATS):
            way()

    def replay() -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3

    return replay


if __name__ == "__main__":
    main()

"""Client processes that ask for one forward after the other and tell of each: what `soak.py` and `stress.py` share."""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from helpers import FLUX, FP32, relative_error

from tacod.rank.parallel.sequence import SequenceParallel
from tacod_client import Client, latents

SIZES = ((9, 14), (16, 16), (5, 7), (32, 24))
"""Height and width of the latents, in turn: one has no even split, two have odd sides."""
INPUTS = 8


@dataclass(frozen=True)
class Call:
    """One answered forward."""

    at_s: float
    """When it was asked, on the monotonic clock."""
    seconds: float
    wire_s: float
    attempts: int
    bitwise: bool
    """Whether the result is the undisturbed one to the bit."""
    error: float
    """Relative to the undisturbed one."""


class ClientProcess:
    """A client in a process of its own, and what it has told so far."""

    def __init__(self, endpoint: str, seed: int, *limit: str) -> None:
        self.calls: list[Call] = []
        self.process = subprocess.Popen(
            [sys.executable, __file__, endpoint, "--seed", str(seed), *limit],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)

    def wait_ready(self) -> None:
        """Wait until it has its undisturbed results."""
        assert self.process.stdout is not None
        if self.process.stdout.readline().strip() != "ready":
            raise RuntimeError(f"client {self.process.pid} could not begin: exit code {self.process.wait()}")

    def begin(self) -> None:
        """Have it ask."""
        assert self.process.stdin is not None
        print("begin", file=self.process.stdin, flush=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.calls.append(Call(**json.loads(line)))

    @property
    def running(self) -> bool:
        """Whether it has more to ask."""
        return self.process.poll() is None

    def end(self) -> int:
        """Wait for its end; returns its exit code, 0 if every forward that it asked was answered."""
        code = self.process.wait()
        self._reader.join()
        return code


@contextmanager
def clients(endpoint: str, limits: Sequence[Sequence[str]]) -> Iterator[list[ClientProcess]]:
    """A client process for each of ``limits``, ready to begin; none outlives the block."""
    started = [ClientProcess(endpoint, seed, *limit) for seed, limit in enumerate(limits)]
    try:
        for client in started:
            client.wait_ready()
        yield started
    finally:
        for client in started:
            client.process.kill()
            client.process.wait()


def quantile(values: Sequence[float], share: float) -> float:
    """The value that this share of them doesn't exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def lora(seed: int) -> list[dict[str, Any]]:
    """A LoRA of rank 4 on every matrix of the blocks, as ComfyUI's nodes send it."""
    drawn = torch.Generator().manual_seed(seed)
    patches = []
    for key, weight in FLUX.model.state_dict().items():
        if "blocks." in key and weight.ndim == 2:
            rows, columns = weight.shape
            up, down = torch.randn(rows, 4, generator=drawn), torch.randn(4, columns, generator=drawn)
            patches.append({"key": key, "kind": "lora", "up": 0.05 * up, "down": 0.05 * down, "strength": 1.0})
    return patches


def forwards(seed: int | None) -> Callable[[dict[str, Any]], torch.Tensor]:
    """A forward in this process, with that LoRA merged by hand if there is a seed."""
    model = copy.deepcopy(FLUX.model)
    weights = model.state_dict()
    for patch in [] if seed is None else lora(seed):
        weights[patch["key"]] += patch["up"] @ patch["down"]
    with torch.inference_mode():
        return lambda inputs: model(SequenceParallel(), **inputs)


def main() -> int:
    """Be such a client."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("endpoint")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--forwards", type=int)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--lora", action="store_true", help="with a LoRA of its own, by the seed")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.seed % 2 == 0:
        # Every other client has all of its latents in memory that it shares with the ranks.
        latents.LEAST_BYTES = 0
    with Client(args.endpoint) as client:
        model = client.load(FLUX.file, patches=lora(args.seed) if args.lora else None)
        inputs = [
            FLUX.inputs(INPUTS * args.seed + n, batch=1 + n % 2, size=SIZES[n % len(SIZES)]) for n in range(INPUTS)
        ]
        forward = forwards(args.seed if args.lora else None)
        undisturbed = [model.forward(**each) for each in inputs]
        for each, out in zip(inputs, undisturbed, strict=True):
            error = relative_error(out, forward(each))
            assert error <= FP32, f"an undisturbed forward is {error:g} from that of one process"
        print("ready", flush=True)
        sys.stdin.readline()
        until = time.monotonic() + args.seconds if args.seconds else float("inf")
        asked = 0
        while time.monotonic() < until and asked != args.forwards:
            which = asked % INPUTS
            asked += 1
            at_s = time.monotonic()
            out = model.forward(**inputs[which])
            seconds = time.monotonic() - at_s
            told = model.stats.last
            assert told is not None
            expected = undisturbed[which]
            error = relative_error(out, expected)
            call = Call(at_s, seconds, told.wire_s + told.client_s, told.attempts, torch.equal(out, expected), error)
            print(json.dumps(asdict(call)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

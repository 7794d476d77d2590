"""A cancel and a killed rank in the middle of a long forward, such as one of a video.

    python benchmarks/long_forwards.py [--model wan_14b] [--size 832x480x81] [--ranks 2]

Random weights. Prints how long a forward takes; from a cancel in its middle until the client knows and until ranks
rest; and how long a forward takes whose last rank is killed in its middle. Results are compared with the undisturbed
one to the bit. TMPDIR holds the model's file. Forwards below half a second tell nothing of their blocks.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from published import PUBLISHED, Size, build, make_inputs
from served import daemon, write_model
from torch import Tensor

from tacod.group.processes import ON_GPUS
from tacod_client import Cancelled, Client

WARM_UPS = 3
"""After these the daemon knows how long such a forward takes."""


def main() -> int:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="wan_14b", choices=sorted(PUBLISHED))
    parser.add_argument("--size", default="832x480x81")
    parser.add_argument("--ranks", type=int, default=2)
    args = parser.parse_args()
    os.environ.update(ON_GPUS)
    cuda = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder:
        device = torch.device("cuda" if cuda else "cpu")
        model = build(args.model, device, torch.bfloat16 if cuda else torch.float32)
        config = {**PUBLISHED[args.model].config, **({} if cuda else PUBLISHED[args.model].cut)}
        write_model(Path(folder, "model.safetensors"), model.state_dict(), config)
        inputs = dict(make_inputs(args.model, model, Size.parse(args.size), torch.device("cpu")).items())
        del model
        if cuda:
            torch.cuda.empty_cache()
        gpus = list(map(str, range(args.ranks))) if cuda else []
        with daemon(gpus, args.ranks, folder) as endpoint:
            measure(args, endpoint, inputs)
    return 0


def measure(args: argparse.Namespace, endpoint: str, inputs: dict[str, Any]) -> None:
    """All of it with one daemon."""
    with Client(endpoint) as client, Client(endpoint) as other:
        model = client.load("model.safetensors")
        for _ in range(WARM_UPS):
            expected, whole_s = timed(lambda: model.forward(**inputs))
        print(f"{args.model} {args.size} on {args.ranks}: a forward takes {whole_s:.2f} s", flush=True)

        told: list[float] = []

        def cancel() -> None:
            told.append(time.perf_counter())
            other.cancel(other.jobs()[0]["job"])

        cancelled = False
        with AtHalf(model, cancel) as blocks:
            try:
                model.forward(**inputs)
            except Cancelled:
                cancelled = True
        if not cancelled:
            print("it ended before it could be cancelled: choose a larger size")
            return
        known_s = time.perf_counter() - told[0]
        while other.status()["queue"]["running"]:
            time.sleep(0.002)
        rest_s = time.perf_counter() - told[0]
        after, after_s = timed(lambda: model.forward(**inputs))
        print(
            f"cancelled at block {blocks}: known after {known_s:.3f} s, ranks rest after {rest_s:.3f} s; "
            f"the next forward takes {after_s:.2f} s, {compared(after, expected)}",
            flush=True,
        )

        def kill() -> None:
            os.kill(other.status()["group"]["ranks"][-1]["pid"], signal.SIGKILL)

        with AtHalf(model, kill) as blocks:
            survived, survived_s = timed(lambda: model.forward(**inputs))
        print(
            f"the last rank is killed at block {blocks}: the forward takes {survived_s:.2f} s, "
            f"{compared(survived, expected)}",
            flush=True,
        )


class AtHalf:
    """Do something once, when half of a forward's blocks are done; ``str`` says which block that was."""

    def __init__(self, model: Any, action: Callable[[], None]) -> None:
        self._model, self._action = model, action
        self._thread: threading.Thread | None = None
        self._seen = "none"

    def __str__(self) -> str:
        return self._seen

    def __enter__(self) -> AtHalf:
        self._model.on_blocks = self._heard
        return self

    def __exit__(self, *_: object) -> None:
        self._model.on_blocks = None
        if self._thread is not None:
            self._thread.join()

    def _heard(self, block: int, blocks: int) -> None:
        if 2 * block >= blocks and self._thread is None:
            self._seen = f"{block} of {blocks}"
            self._thread = threading.Thread(target=self._action)
            self._thread.start()


def timed(forward: Callable[[], Any]) -> tuple[Any, float]:
    """A result, and the seconds that it took."""
    began_s = time.perf_counter()
    return forward(), time.perf_counter() - began_s


def compared(out: Any, expected: Any) -> str:
    """How two outputs differ, in words."""
    outs, others = (list(each) if isinstance(each, list) else [each] for each in (out, expected))
    same = all(isinstance(one, Tensor) and one.equal(two) for one, two in zip(outs, others, strict=True))
    return "equal to the bit" if same else "DIFFERENT"


if __name__ == "__main__":
    sys.exit(main())

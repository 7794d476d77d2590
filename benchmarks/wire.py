"""What the wire costs: a forward's message there and back, its share of a step, and the client's import time.

    python benchmarks/wire.py [--json] [--rounds N]

The daemon is the real one; its ranks are `echo_rank.py`, which read a forward's tensors as a rank does and answer with
x. So what is measured is all that a forward takes besides the model: packing, both sockets, the supervisor, unpacking.
Beside it stands the floor: the same codec between this process and one other, without a supervisor. All variants take
turns within each round, so that a busy machine slows them alike; the first round is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import zmq

from tacod_client import Client, ConnectionFailed, wire
from tacod_client.tensors import from_wire, to_wire

MIB = 1 << 20
SIZES = {"0.5 MiB": MIB // 2, "4 MiB": 4 * MIB, "64 MiB": 64 * MIB}
RANKS = (1, 3)
TEXT_BYTES = 4 * MIB
GPU_STEP_S = 0.072
"""A Flux.1-dev step at 1024² on two H100s in bf16."""
HERE = Path(__file__).parent


# --- the two ends ----------------------------------------------------------------------------------------------------


def serve_echo_daemon(config: str) -> int:
    """Run tacod itself, with echo ranks."""
    from tacod import daemon
    from tacod.group.fork_server import MODULE

    start = subprocess.Popen

    def popen(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        head, rest = command[:3], command[3:]
        assert head[1:] == ["-m", MODULE]
        return start([head[0], str(HERE / "echo_rank.py"), *rest], **options)

    with mock.patch("tacod.group.fork_server.subprocess.Popen", popen):
        return daemon.main(["--config", config])


def serve_pair(endpoint: str) -> int:
    """The floor: answer each message with its tensor, decoded into an array and encoded again."""
    context: zmq.Context[Any] = zmq.Context()
    socket = context.socket(zmq.ROUTER)
    socket.bind(endpoint)
    while True:
        peer, *frames = socket.recv_multipart(copy=False)
        message = wire.decode([frame.buffer for frame in frames])
        x = from_wire(message.body["x"], "numpy")
        socket.send_multipart([peer, *wire.encode(wire.Message("done", {"out": to_wire(x, "out")}))], copy=False)


@contextmanager
def process(*arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    started = subprocess.Popen([sys.executable, *arguments])
    try:
        yield started
    finally:
        started.send_signal(signal.SIGTERM)
        started.wait(30)


@contextmanager
def tacod(folder: Path, ranks: int, root: Path, *command: str) -> Iterator[Client]:
    """A daemon of our own with so many CPU ranks, and a client of it."""
    folder.mkdir()
    endpoint = f"ipc://{folder}/s"
    config = folder / "c"
    config.write_text(
        f'endpoint = "{endpoint}"\nlog_level = "warning"\n[group]\ndevice = "cpu"\nranks = {ranks}\n'
        f'[models]\nroots = ["{root}"]\n'
    )
    with process(*command, str(config)) as started:
        deadline = time.monotonic() + 120
        while not is_ready(endpoint):
            if started.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"tacod did not become ready; its exit code is {started.poll()}")
            time.sleep(0.1)
        with Client(endpoint) as client:
            yield client


def is_ready(endpoint: str) -> bool:
    try:
        with Client(endpoint, timeout_s=1) as client:
            return bool(client.status()["state"] == "ready")
    except ConnectionFailed:
        return False


def save_echo(folder: Path) -> Path:
    """A file that echo ranks load."""
    path = folder / "m" / "echo.safetensors"
    path.parent.mkdir()
    header = json.dumps({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0")
    return path


# --- measuring -------------------------------------------------------------------------------------------------------


def seconds_of(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def summary(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    return {
        "median_s": statistics.median(ordered),
        "p10_s": ordered[len(ordered) // 10],
        "p90_s": ordered[-1 - len(ordered) // 10],
        "count": len(ordered),
    }


def measure_in_turns(variants: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, dict[str, float]]:
    """Each variant once a round, in turns."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds + 1):
        for name, work in variants.items():
            elapsed = seconds_of(work)
            if turn:
                times[name].append(elapsed)
    return {name: summary(seconds) for name, seconds in times.items()}


def measure_wire(rounds: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tacod-")))
        models = save_echo(folder).parent
        endpoint = f"ipc://{folder}/pair"
        stack.enter_context(process(__file__, "--pair", endpoint))
        echoes = {
            ranks: stack.enter_context(tacod(folder / str(ranks), ranks, models, __file__, "--daemon"))
            for ranks in RANKS
        }
        loaded = {ranks: client.load("echo.safetensors") for ranks, client in echoes.items()}
        context = stack.enter_context(zmq.Context())
        socket = stack.enter_context(context.socket(zmq.DEALER))
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(endpoint)
        timestep = np.ones(1, np.float32)

        def pair(x: np.ndarray[Any, Any]) -> Any:
            socket.send_multipart(wire.encode(wire.Message("echo", {"x": to_wire(x, "x")})), copy=False)
            frames = socket.recv_multipart(copy=False)
            return from_wire(wire.decode([frame.buffer for frame in frames]).body["out"], "numpy")

        def forward(ranks: int, x: np.ndarray[Any, Any], **more: Any) -> Any:
            return loaded[ranks].forward(x=x, timestep=timestep, **more)

        results: dict[str, Any] = {}
        for name, size in SIZES.items():
            x = rng.integers(0, 255, size, np.uint8).view(np.float32)
            variants: dict[str, Callable[[], Any]] = {"pair": partial(pair, x)}
            for ranks in RANKS:
                variants[f"{ranks} rank{'s'[: ranks > 1]}"] = partial(forward, ranks, x)
            assert all(np.array_equal(work().view(np.uint8), x.view(np.uint8)) for work in variants.values())
            results[name] = measure_in_turns(variants, rounds if size < 64 * MIB else max(5, rounds // 5))

        x = rng.standard_normal(MIB // 8, np.float32)
        known = rng.standard_normal(TEXT_BYTES // 4, np.float32)
        text_rounds = max(5, rounds // 2)
        new = iter([rng.permutation(known) for _ in range(text_rounds + 1)])
        last = max(RANKS)
        results["0.5 MiB with 4 MiB of text"] = measure_in_turns(
            {
                "text is new": lambda: forward(last, x, context=next(new)),
                "text is known": lambda: forward(last, x, context=known),
                "no text": lambda: forward(last, x),
            },
            text_rounds,
        )
        results["nothing"] = measure_in_turns({f"ping, {ranks}": echoes[ranks].ping for ranks in RANKS}, rounds)
    return results


def measure_cpu_step(ranks: int = 3) -> dict[str, float]:
    """A real step on this machine: the embedded model, and where its time goes as the daemon tells it."""
    import torch

    from tacod import embedded

    context, y = embedded.encode(embedded.PROMPTS[0])
    x = torch.randn(1, 16, 32, 32, generator=torch.Generator().manual_seed(0))
    inputs = {"x": x, "timestep": torch.tensor([500.0]), "context": context, "y": y}
    with tempfile.TemporaryDirectory(prefix="tacod-") as folder:
        arguments = ("-m", "tacod.daemon", "--config")
        with tacod(Path(folder, "d"), ranks, embedded.PATH.parent, *arguments) as client:
            model = client.load(str(embedded.PATH))
            model.forward(**inputs)
            model.stats = type(model.stats)()
            steps = [seconds_of(lambda: model.forward(**inputs)) for _ in range(30)]
            stats = model.stats
    return {"ranks": ranks, **summary(steps), "wire_share": (stats.wire_s + stats.client_s) / stats.seconds}


def measure_imports(rounds: int) -> dict[str, dict[str, float]]:
    def run(code: str) -> Callable[[], object]:
        return lambda: subprocess.run([sys.executable, "-c", code], check=True)

    return measure_in_turns(
        {
            "python": run("pass"),
            "numpy": run("import numpy"),
            "zmq, msgpack and numpy": run("import zmq, msgpack, numpy"),
            "tacod_client": run("import tacod_client"),
        },
        rounds,
    )


# --- telling ---------------------------------------------------------------------------------------------------------


def show(told: dict[str, Any]) -> None:
    def row(*cells: object) -> None:
        print("  ".join(f"{cell!s:<{width}}" for cell, width in zip(cells, (28, 24, 11, 18, 12, 14), strict=False)))

    print(f"{told['machine']}\n")
    row("message, both ways", "through", "median ms", "p10 to p90", "ratio", "of 72 ms")
    for size, variants in told["wire"].items():
        first = next(iter(variants.values()))["median_s"]
        for name, told_of in variants.items():
            median, low, high = (1000 * told_of[key] for key in ("median_s", "p10_s", "p90_s"))
            share = f"{100 * told_of['median_s'] / GPU_STEP_S:.1f} %"
            row(size, name, f"{median:.2f}", f"{low:.2f} to {high:.2f}", f"{median / 1000 / first:.2f}", share)
    step = told["cpu_step"]
    print(
        f"\na step of the embedded model on {step['ranks']} CPU ranks: median {1000 * step['median_s']:.1f} ms, "
        f"of which the wire is {100 * step['wire_share']:.1f} %\n"
    )
    row("a new process that imports", "", "median ms", "p10 to p90", "over python")
    bare = told["imports"]["python"]["median_s"]
    for name, told_of in told["imports"].items():
        median, low, high = (1000 * told_of[key] for key in ("median_s", "p10_s", "p90_s"))
        row(name, "", f"{median:.0f}", f"{low:.0f} to {high:.0f}", f"+{median - 1000 * bare:.0f}")


def main() -> int:
    parser = argparse.ArgumentParser(description="What the wire costs.")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--rounds", type=int, default=50, help="how often each thing is measured (default 50)")
    parser.add_argument("--daemon", metavar="CONFIG", help=argparse.SUPPRESS)
    parser.add_argument("--pair", metavar="ENDPOINT", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.daemon:
        return serve_echo_daemon(args.daemon)
    if args.pair:
        return serve_pair(args.pair)
    told = {
        "machine": f"{os.cpu_count()} cores ({platform.machine()}), Python {platform.python_version()}, "
        f"libzmq {zmq.zmq_version()}, numpy {np.__version__}",
        "wire": measure_wire(args.rounds),
        "cpu_step": measure_cpu_step(),
        "imports": measure_imports(max(10, args.rounds // 5)),
    }
    if args.json:
        print(json.dumps(told, indent=2))
    else:
        show(told)
    return 0


if __name__ == "__main__":
    sys.exit(main())

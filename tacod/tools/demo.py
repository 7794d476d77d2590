"""``tacoctl demo``: a throw-away tacod draws a picture with the embedded model, on three ranks and on one."""

from __future__ import annotations

import argparse
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from tacod import embedded
from tacod.group.processes import ending
from tacod_client import Client, ConnectionFailed, Model
from tacod_client.cli import show
from tacod_client.cli.ending import complain, guarded
from tacod_client.cli.output import Output, document
from tacod_client.errors import RequestError

__all__ = ["main"]

STEPS = 28
SHIFT = 3.0
CFG = 4.0
PIXELS = 256
START_S = 120.0


def main(argv: Sequence[str] | None = None) -> int:
    """Draw the picture; returns the exit code."""
    return guarded(lambda: _demo(argv))


def _demo(argv: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(prog="tacoctl demo", description=__doc__)
    parser.add_argument("prompt", nargs="?", default=embedded.PROMPTS[0])
    parser.add_argument("--ranks", type=int, default=3, help="how many ranks (default 3)")
    parser.add_argument("--output", default="demo.png", help="where the picture goes (default demo.png)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON document, and the rest on stderr")
    args = parser.parse_args(argv)
    try:
        inputs = _inputs(args.prompt, args.seed)
    except ValueError as error:
        complain(str(error))
        return 2
    picture = Image.registered_extensions().get(Path(args.output).suffix.lower())
    if picture not in Image.SAVE:
        raise RequestError(f"{args.output}: pictures are known by the ends of their names; use .png")
    with Output(args.output) as output:
        with (
            redirect_stdout(sys.stderr) if args.json else nullcontext(),
            _daemon(args.ranks) as endpoint,
            Client(endpoint) as client,
        ):
            report = _draw(client, args.prompt, inputs, output, picture)
        if args.json:
            document(report)
    return 0


def _inputs(prompt: str, seed: int) -> dict[str, Any]:
    """What `Model.sample` takes for a prompt."""
    context, y = embedded.encode(prompt)
    no_context, no_y = embedded.encode("")
    even = torch.linspace(1, 0, STEPS + 1)
    noise = torch.randn(1, 16, PIXELS // 8, PIXELS // 8, generator=torch.Generator().manual_seed(seed))
    return {
        "noise": noise,
        "latent": torch.zeros_like(noise),
        "sigmas": SHIFT * even / (1 + (SHIFT - 1) * even),
        "positive": {"context": context, "y": y},
        "negative": {"context": no_context, "y": no_y},
        "cfg": CFG,
        "seed": seed,
    }


def _draw(client: Client, prompt: str, inputs: dict[str, Any], output: Output, picture: str) -> dict[str, Any]:
    model = client.load(str(embedded.PATH))
    group = client.status()["group"]
    _print_info(model, group)
    print(f"\ndrawing: {prompt}")
    job = model.sample(**inputs)
    show.progress(job)
    latent = job.result()
    content = io.BytesIO()
    Image.fromarray(embedded.decode(latent)[0].numpy()).save(content, picture)
    output.write(content.getvalue())
    show.out(f"wrote {output.path}\n")
    _print_stats(model)
    alone = (
        client.load(str(embedded.PATH), plan={"sequence_parallel_degree": 1, "cfg_parallel": False})
        .sample(**inputs)
        .result()
    )
    error = ((latent - alone).norm() / alone.norm()).item()
    print(f"\n{group['world_size']} ranks against 1: the latents differ by {error:.1e} (relative)")
    return {
        "output": output.path,
        "prompt": prompt,
        "ranks": group["world_size"],
        "steps": model.stats.steps,
        "seconds": model.stats.seconds,
        "error": error,
    }


def _print_info(model: Model, group: dict[str, Any]) -> None:
    parallel = group["world_size"] > 1
    print("TACO-DiT model loaded successfully:")
    print(f"  - Parallel enabled: {parallel}")
    print(f"  - Model type: {model.family}")
    print(f"  - xDit wrapper: {parallel}")
    print(f"  - Model: {model.name}, {model.parameters / 1e6:.1f} M parameters, {model.dtype}")
    print(f"  - Devices: {', '.join(rank['device'] for rank in group['ranks'])}")
    print(f"  - Plan: {model.plan}")


def _print_stats(model: Model) -> None:
    stats = model.stats
    print("TACO-DiT stats:")
    print(f"  - Parallel executions: {stats.parallel_steps} of {stats.steps} steps, {stats.retries} retries")
    print(f"  - Total time: {stats.seconds:.2f} s, mean per step: {1000 * stats.seconds / stats.steps:.1f} ms")
    parts = {name: getattr(stats, f"{name}_s") for name in ("queue", "wire", "compute", "collective")}
    print("  - Of that: " + ", ".join(f"{name} {100 * part / stats.seconds:.1f} %" for name, part in parts.items()))
    print(f"  - Plan: {stats.plan}")


@contextmanager
def _daemon(ranks: int) -> Iterator[str]:
    """A tacod of our own, gone when the block ends."""
    gpus = min(ranks, torch.cuda.device_count())
    with tempfile.TemporaryDirectory(prefix="tacod-") as folder:
        endpoint = f"ipc://{folder}/tacod.sock"
        group = f'device = "cuda"\ngpus = {list(range(gpus))}' if gpus else f'device = "cpu"\nranks = {ranks}'
        config = Path(folder, "config.toml")
        config.write_text(
            f'endpoint = {json.dumps(endpoint, ensure_ascii=False)}\nlog_level = "warning"\n\n[group]\n{group}\n\n'
            f"[models]\nroots = [{json.dumps(str(embedded.PATH.parent), ensure_ascii=False)}]\n",
            encoding="utf-8",
        )
        print(f"starting tacod with {gpus or ranks} ranks on {'GPUs' if gpus else 'the CPU'} …", flush=True)
        # What it logs is no part of what is printed.
        process = subprocess.Popen(
            [sys.executable, "-m", "tacod.daemon", "--config", str(config)], stdout=sys.stderr.fileno()
        )
        try:
            _wait_until_ready(endpoint, process)
            yield endpoint
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=START_S)


def _wait_until_ready(endpoint: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if (code := process.poll()) is not None:
            raise ConnectionFailed(f"tacod {ending(code)} before it was ready; what it logged stands above")
        if os.path.exists(endpoint.removeprefix("ipc://")):
            try:
                with Client(endpoint, timeout_s=2.0) as client:
                    if client.status()["state"] == "ready":
                        return
            except ConnectionFailed:
                pass
        time.sleep(0.05)
    raise ConnectionFailed(f"tacod did not become ready within {START_S:g} s; what it logged stands above")


if __name__ == "__main__":
    sys.exit(main())

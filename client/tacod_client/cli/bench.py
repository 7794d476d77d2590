"""``tacoctl bench``: one forward of a model on one rank and on all, and what bounds it.

The daemon remembers what one rank took, and compares later forwards of these shapes with it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tacod_client.cli import show
from tacod_client.client import Client, Loading, Model
from tacod_client.errors import ModelNotFound, RequestError
from tacod_client.stats import Call

__all__ = ["TEXT", "bound", "run"]

TEXT = {"flux": 512, "sd3": 154, "pixart": 300}
"""The text tokens that ComfyUI's encoders give."""
SIGMA = 0.7
GUIDANCE = 3.5
ONE_RANK = {"sequence_parallel_degree": 1, "cfg_parallel": False}
WARM_UPS = 2
PARTS = ("queue", "wire", "compute", "collective")
LARGE = 0.15
"""From this share of a step on a part besides the computing counts as what bounds it."""

Shapes = Mapping[str, Mapping[str, Any]]
"""What ``tacoctl plan --json`` tells of a model's arguments."""


def run(args: argparse.Namespace) -> int:
    """Measure, and print the table."""
    quiet = "json" in args
    with Client(getattr(args, "endpoint", None)) as client:
        world_size = client.status()["group"]["world_size"]
        told = _find(client, args.model, quiet)
        text = args.text or TEXT.get(told["family"], 512)
        sizes = args.size or [(1024, 1024)]
        shapes = _shapes(told["path"], world_size, sizes[0], args.batch, text)
        rows = []
        with show.counting(len(sizes) * (1 + (world_size > 1)), quiet) as count:
            for width, height in sizes:
                given = _inputs(shapes, told, {"B": args.batch, "H": height // 8, "W": width // 8, "L": text})
                alone, expected = _measure(client, told, ONE_RANK, given, args.rounds)
                count()
                together, out = alone, expected
                if world_size > 1:
                    together, out = _measure(client, told, "auto", given, args.rounds)
                    count()
                rows.append(_row(f"{width}x{height}", alone, together, _error(out, expected)))
    known = {key: told[key] for key in ("id", "name", "family", "dtype")}
    answer = {"model": known, "batch": args.batch, "text": text, "ranks": world_size, "rounds": args.rounds}
    answer["sizes"] = rows
    if quiet:
        print(json.dumps(answer, indent=2, ensure_ascii=False))
    else:
        show.out(show.bench(answer))
    return 0


def _find(client: Client, name: str | None, quiet: bool) -> dict[str, Any]:
    """What the daemon tells of a model: by the start of its id, by its file, or of the one that was used last."""
    loaded = client.models()
    if name is None and not loaded:
        raise ModelNotFound("no model is loaded; name a file, or load one by `tacoctl load`")
    found = loaded if name is None else [told for told in loaded if told["id"].startswith(name)]
    if not found:
        with show.loading(quiet) as progress:
            model = client.load(str(name), progress=progress)
        found = [told for told in client.models() if told["id"] == model.id]
    return found[-1]


def _shapes(path: str, ranks: int, size: tuple[int, int], batch: int, text: int) -> Shapes:
    """The shapes of the model's arguments, which its file tells to a program that comes with the daemon."""
    width, height = size
    options = ["--ranks", ranks, "--size", f"{width}x{height}", "--batch", batch, "--text", text, "--json"]
    command = [sys.executable, "-m", "tacod.planner", path, *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no word"])[-1].removeprefix("tacoctl: ")
        raise RequestError(f"{reason} (bench reads the model's file for the shapes of its inputs)")
    shapes: Shapes = json.loads(done.stdout)["arguments"]
    return shapes


def _inputs(shapes: Shapes, told: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, Any]:
    """A forward's arguments, of as many bytes as ComfyUI's: numpy has no bf16, but fp16."""
    rng = np.random.default_rng(0)
    inputs: dict[str, Any] = {}
    for name, spec in shapes.items():
        # A pooled text is always there in ComfyUI, if the model takes one.
        if spec["required"] or name == "y":
            shape = [sizes[size] if isinstance(size, str) else size for size in spec["shape"]]
            noise = rng.standard_normal(shape, np.float32)
            inputs[name] = noise if told["dtype"] == "fp32" else noise.astype(np.float16)
    batch = np.ones(sizes["B"], np.float32)
    inputs["timestep"] = batch * (SIGMA if told["family"] == "flux" else 1000 * SIGMA)
    if "guidance" in inputs:
        inputs["guidance"] = batch * GUIDANCE
    return inputs


def _measure(
    client: Client, told: dict[str, Any], plan: Any, given: dict[str, Any], rounds: int
) -> tuple[list[Call], Any]:
    """The calls of so many rounds, and what came out."""
    # By what is told, not by a load: that could mean another dtype, and so another copy.
    model = Model(client._connection, Loading(told["path"], None, None, plan, {}), told)
    calls = []
    for _ in range(WARM_UPS + rounds):
        out = model.forward(**given)
        assert model.stats.last is not None
        calls.append(model.stats.last)
    return calls[WARM_UPS:], out


def _row(size: str, alone: Sequence[Call], together: Sequence[Call], error: float) -> dict[str, Any]:
    """One size: both times, and where that of the planned layout went."""
    one, every = _times(alone), _times(together)
    # The call that took the median time: its parts add up.
    call = sorted(together, key=lambda call: call.seconds)[len(together) // 2]
    split = {f"{part}_s": getattr(call, f"{part}_s") for part in PARTS}
    speedup = one["p50"] / every["p50"]
    return {
        "size": size,
        "plan": call.plan,
        "ranks": call.ranks,
        "one_s": one,
        "all_s": every,
        "speedup": speedup,
        "error": error,
        "split": split,
        "bound": bound(split, speedup, call.ranks),
    }


def _times(calls: Sequence[Call]) -> dict[str, float]:
    low, middle, high = np.percentile([call.seconds for call in calls], (10, 50, 90))
    return {"p10": float(low), "p50": float(middle), "p90": float(high)}


def _error(out: Any, expected: Any) -> float:
    """||out - expected|| / ||expected||."""
    out, expected = out.astype(np.float32), expected.astype(np.float32)
    return float(np.linalg.norm(out - expected) / np.linalg.norm(expected))


def bound(split: Mapping[str, float], speedup: float, ranks: int) -> str:
    """What bounds a forward on so many ranks, from its split and its speed-up over one."""
    whole = sum(split.values()) or 1.0
    shares = {part: split[f"{part}_s"] / whole for part in PARTS}
    part = max(("queue", "wire", "collective"), key=lambda part: shares[part])
    if shares[part] < LARGE:
        part = "compute"
    said = {
        "queue": "other clients",
        "wire": "the way between client and ranks",
        "compute": "computing",
        "collective": "the exchange between ranks",
    }[part]
    if ranks > 1 and speedup < 1:
        return f"{said}; one rank is faster here"
    return said

"""``tacoctl bench``: one forward of a model on one rank and on all, and its bottleneck.

The daemon remembers the time on one rank, and compares later forwards of these shapes with it. Another attention than
the exact one is measured on all ranks; one rank stays exact, so the error is that of the kernel. If COMFYUI_PATH is
set, ComfyUI's own network is measured beside it (`tacod_client.cli.beside`), once the daemon is at rest.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tacod_client.cli import beside, loaded, show
from tacod_client.cli.output import document
from tacod_client.client import Client
from tacod_client.dtypes import of_numbers
from tacod_client.errors import ArgumentError, ModelNotFound, RequestError
from tacod_client.model import Model
from tacod_client.stats import PARTS, Call

__all__ = ["bound", "run"]

ONE_RANK = {"sequence_parallel_degree": 1, "cfg_parallel": False}
WARM_UPS = 3
"""The first call may be slow, so the second may still be watched as a long one; the third becomes a CUDA graph."""
LARGE = 0.15
"""A part of a step other than computing that takes at least this share counts as the bottleneck."""

Arguments = Mapping[str, Mapping[str, Any]]
"""A model's arguments, as ``tacoctl plan --json`` gives them."""
Shapes = Mapping[str, Sequence[Sequence[int]]]
"""The shape of each argument's tensor, or of each in its list."""


def run(args: argparse.Namespace) -> int:
    """Measure, and print the table."""
    quiet = "json" in args
    with Client(getattr(args, "endpoint", None)) as client:
        comfyui = beside.find(os.environ)
        model = _find(client, args.model, quiet)
        group = model.group_in(client.status())
        world_size = group["world_size"]
        sizes = args.size or [(1024, 1024)]
        family = _family(model.path, world_size, sizes[0], args.batch, args.text)
        text, downscale = family["text"], family["downscale"]
        rows, cases = [], []
        planned: Any = "auto" if args.attention == "exact" else {"attention": args.attention}
        both = world_size > 1 or planned != "auto"
        compares = comfyui is not None and "error" not in comfyui
        with show.counting(len(sizes) * (1 + both) + compares, quiet) as count:
            for width, height in sizes:
                sides = {"H": height // downscale, "W": width // downscale}
                shapes = _shapes(family["arguments"], {**family["usual"], "B": args.batch, **sides, "L": text})
                loaded.check_size(client, [shape for each in shapes.values() for shape in each])
                given = _inputs(family["arguments"], shapes, model.dtype)
                alone, expected = _measure(model.with_plan(ONE_RANK), given, args.rounds)
                count()
                together, out = alone, expected
                if both:
                    together, out = _measure(model.with_plan(planned), given, args.rounds)
                    count()
                rows.append(_row(f"{width}x{height}", alone, together, _error(out, expected)))
                cases.append((given, out))
            if comfyui is not None and compares:
                given_only = [given for given, _ in cases]
                comfyui = beside.measure(comfyui, model, given_only, group, WARM_UPS, args.rounds)
                count()
    known = {key: getattr(model, key) for key in ("id", "name", "family", "dtype")}
    answer = {"model": known, "batch": args.batch, "text": text, "ranks": world_size, "rounds": args.rounds}
    answer["sizes"] = rows
    if comfyui is not None:
        for row, (_, out), case in zip(rows, cases, comfyui.pop("cases", ()), strict=False):
            row |= _beside(row, out, case)
        answer["comfyui"] = comfyui
    if quiet:
        document(answer)
    else:
        show.out(show.bench(answer))
    return 0


def _find(client: Client, name: str | None, quiet: bool) -> Model:
    """A model by the start of its id, by its file, or the one that was used last.

    Raises `ArgumentError` where several groups hold models, as none says which of all was used last.
    """
    if name is not None:
        return loaded.find_or_load(client, name, quiet)
    models = client.models()
    if not models:
        raise ModelNotFound("no model is loaded; name a file, or load one by `tacoctl load`")
    if len(models) > 1 and "groups" in models[0]:
        # Each group's are in the order of their use, one group's after another's.
        known = ", ".join(f"{each['id']} ({each['name']})" for each in models)
        raise ArgumentError(f"several groups hold models; name the one to measure: {known}", argument="model")
    return client.model(models[-1]["id"])


def _family(path: str, ranks: int, size: tuple[int, int], batch: int, text: int | None) -> dict[str, Any]:
    """The arguments of the forwards of the model's family, as ``tacoctl plan`` reads them from the model's file."""
    width, height = size
    options = ["--ranks", ranks, "--size", f"{width}x{height}", "--batch", batch, "--json"]
    options += [] if text is None else ["--text", text]
    command = [sys.executable, "-m", "tacod.tools.plan", *map(str, options), "--", path]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or ["no word"]
        raise RequestError(
            f"{lines[-1].removeprefix('tacoctl: ')} (bench reads the model's file for the shapes of its inputs)"
        )
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def _shapes(arguments: Arguments, lengths: Mapping[str, int]) -> Shapes:
    """The shapes of what a usual forward takes; of a list of tensors, such as several latents, those of all."""
    return {
        name: [
            [lengths[size] if isinstance(size, str) else size for size in shape]
            for shape in spec.get("shapes") or [spec["shape"]]
        ]
        for name, spec in arguments.items()
        if spec["usual"]
    }


def _inputs(arguments: Arguments, shapes: Shapes, dtype: str) -> dict[str, Any]:
    """A forward's arguments, of as many bytes as ComfyUI's: numpy has no bf16, but fp16."""
    rng = np.random.default_rng(0)

    def made(name: str, shape: Sequence[int]) -> Any:
        value = arguments[name].get("value")
        if value is not None:
            return np.full(shape, value, np.float32)
        noise = rng.standard_normal(shape, np.float32)
        return noise if of_numbers(dtype) == "fp32" else noise.astype(np.float16)

    several = {name: [made(name, shape) for shape in each] for name, each in shapes.items()}
    return {name: each if arguments[name].get("shapes") else each[0] for name, each in several.items()}


def _measure(model: Model, given: dict[str, Any], rounds: int) -> tuple[list[Call], Any]:
    """The calls of so many rounds, and the output."""
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


def _beside(row: Mapping[str, Any], out: Any, case: Mapping[str, Any]) -> dict[str, Any]:
    """ComfyUI's times of one size, how many times as fast the daemon is, and how far its output is from ComfyUI's."""
    times = _percentiles(case["seconds"])
    theirs = [each.numpy() for each in case["outputs"]]
    ours = out if isinstance(out, list) else [out]
    error = _error(ours, theirs) if [each.shape for each in ours] == [each.shape for each in theirs] else None
    return {"comfyui_s": times, "comfyui_ratio": times["p50"] / row["all_s"]["p50"], "comfyui_error": error}


def _times(calls: Sequence[Call]) -> dict[str, float]:
    return _percentiles([call.seconds for call in calls])


def _percentiles(seconds: Sequence[float]) -> dict[str, float]:
    low, middle, high = np.percentile(seconds, (10, 50, 90))
    return {"p10": float(low), "p50": float(middle), "p90": float(high)}


def _error(out: Any, expected: Any) -> float:
    """||out - expected|| / ||expected||; of several outputs the largest."""
    if isinstance(out, list):
        return max(map(_error, out, expected))
    out, expected = out.astype(np.float32), expected.astype(np.float32)
    return float(np.linalg.norm(out - expected) / (np.linalg.norm(expected) or 1.0))


def bound(split: Mapping[str, float], speedup: float, ranks: int) -> str:
    """The bottleneck of a forward on so many ranks, from the split of its time and its speed-up over one."""
    whole = sum(split.values()) or 1.0
    shares = {part: split[f"{part}_s"] / whole for part in PARTS}
    part = max((part for part in PARTS if part != "compute"), key=lambda part: shares[part])
    if shares[part] < LARGE:
        part = "compute"
    said = {
        "queue": "other clients",
        "wire": "the way between daemon and ranks",
        "client": "the client and its way to the daemon",
        "compute": "computing",
        "collective": "the exchange between ranks",
    }[part]
    if ranks > 1 and speedup < 1:
        return f"{said}; one rank is faster here"
    return said

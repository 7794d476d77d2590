"""What rivals.py has measured, as cases with speed-ups and errors, and as tables."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import hops
import numpy as np
import plans
import torch
from safetensors.torch import load_file
from torch import Tensor

__all__ = ["LABELS", "OURS", "Step", "make_case", "show_about", "show_case"]

LABELS = {
    "plain": "ours, one GPU, by PyTorch's operations",
    "one": "ours, one GPU",
    "planned": "ours, as planned",
    "sequence": "ours, all ranks share the sequence",
    "batch": "ours, two groups share the batch",
    "int8": "ours, as planned, exchange in int8",
    "fp8-one": "ours, one GPU, matrices in fp8",
    "fp8": "ours, as planned, matrices in fp8",
    "diffusers": "diffusers, one GPU",
    "compiled": "diffusers, one GPU, blocks compiled",
    "context": "diffusers, context parallel",
    "xfuser": "xfuser, Ulysses",
    "xfuser-batch": "xfuser, CFG parallel",
    "daemon-one": "ours, daemon and client, one GPU",
    "daemon": "ours, daemon and client, as planned",
}
OURS = ("plain", "one", "planned", "sequence", "batch", "int8", "fp8-one", "fp8")

Step = tuple[int, str]
"""A size in pixels and a row, or ``reference`` or ``save``."""


def make_case(
    name: str,
    pixels: int,
    rows: Sequence[str],
    results: Mapping[Step, Mapping[str, Any]],
    folder: Path,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """What was measured at one size, with speed-ups and errors."""
    # A row that was cut short may have left half a file.
    done = (row for row in (*rows, "reference") if "reason" not in results.get((pixels, row), {"reason": ""}))
    kept = {row: _out(folder / f"{pixels}-{row}.safetensors") for row in done}
    told = []
    one_ms = _median(results.get((pixels, "one"), {}))
    for row in rows:
        if (result := results.get((pixels, row))) is None:
            continue
        found = {"row": row, "label": LABELS[row], **result}
        if (ms := _median(result)) is not None:
            low, high = np.percentile(result["times_ms"], (10, 90))
            found |= {
                "ms": ms,
                "p10_ms": float(low),
                "p90_ms": float(high),
                "speedup": one_ms and one_ms / ms,
                "error": _error(kept.get(row), kept.get("one")) if row != "one" else None,
                "error_fp32": _error(kept.get(row), kept.get("reference")),
            }
        told.append(found)
    _, _, batch, text, _ = plans.MODELS[name]
    dtype = options.dtype or ("bf16" if torch.cuda.is_available() else "fp32")
    return {"model": name, "pixels": pixels, "batch": batch, "text": text, "dtype": dtype, "rows": told}


def _median(result: Mapping[str, Any]) -> float | None:
    return float(np.median(result["times_ms"])) if "times_ms" in result else None


def _out(path: Path) -> Tensor | None:
    return load_file(path)["out"] if path.exists() else None


def _error(out: Tensor | None, other: Tensor | None) -> float | None:
    """||out - other|| / ||other||."""
    return None if out is None or other is None else float((out - other).norm() / other.norm())


def show_about(about: Mapping[str, Any]) -> None:
    """The machine, and what ran on it."""
    for rank, device in enumerate(about["devices"]):
        where = f"GPU {device['gpu']}, " if device["gpu"] is not None else ""
        reach = f", reaches ranks {device['peers']}" if device["peers"] else ""
        print(f"rank {rank}: {where}{device['name']}{reach}")
    rest = {key: value for key, value in about.items() if key != "devices"}
    print(", ".join(f"{key} {value}" for key, value in rest.items()))


def show_case(case: Mapping[str, Any]) -> None:
    """One case as a table."""
    print(f"\n{case['model']} {case['pixels']}², batch {case['batch']}, {case['text']} text tokens, {case['dtype']}")
    heads = ("ms", "p10–p90", "× one", "error", "to fp32", "GiB a rank", "first s")
    print(f"{'':38}" + "".join(f"{head:>{width}}" for head, width in zip(heads, WIDTHS, strict=True)))
    for row in case["rows"]:
        if "ms" not in row:
            print(f"{row['label']:38}  {row['reason']}")
            continue
        cells = (
            f"{row['ms']:.1f}",
            f"{row['p10_ms']:.1f}–{row['p90_ms']:.1f}",
            f"{row['speedup']:.2f}" if row["speedup"] else "",
            f"{row['error']:.1e}" if row["error"] is not None else "",
            f"{row['error_fp32']:.1e}" if row["error_fp32"] is not None else "",
            f"{max(row['peak_bytes']) / 2**30:.1f}",
            f"{row['first_ms'] / 1000:.1f}",
        )
        line = "".join(f"{cell:>{width}}" for cell, width in zip(cells, WIDTHS, strict=True))
        plan = row["plan"] if row["row"] in OURS else ""
        print(f"{row['label']:38}{line}  {plan}".rstrip(), flush=True)
    by_name = {row["row"]: row for row in case["rows"] if "ms" in row}
    for served, alone in (("daemon-one", "one"), ("daemon", "planned")):
        if served in by_name:
            show_split(by_name[served], by_name.get(alone))


WIDTHS = (9, 16, 8, 10, 10, 12, 9)


def show_split(row: Mapping[str, Any], alone: Mapping[str, Any] | None) -> None:
    """Where the time of a served forward went, and what it adds to the same in the rank."""
    split = row["split_ms"]
    whole = sum(split.values())
    parts = " + ".join(f"{name} {ms:.2f}" for name, ms in split.items())
    print(f"  {row['label']}: {parts} = {whole:.2f} of {row['split_of_ms']:.2f} ms", end="")
    if alone is not None:
        print(f"; {100 * (row['ms'] / alone['ms'] - 1):+.1f} % over the rank alone", end="")
    print(f"; loaded in {row['load_s']:.1f} s, {row['load_bytes_per_s'] / 1e9:.1f} GB/s a rank", end="")
    print(f"; first answer {row['cold_s']:.1f} s after tacod's start" if "cold_s" in row else "")
    hops.show(row["hops_ms"])

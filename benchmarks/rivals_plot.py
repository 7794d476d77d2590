"""Ours beside the rivals as a picture: a panel for each case, a bar for each row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def plot(path: Path, told: dict[str, Any]) -> None:
    """Write it as PNG."""
    cases, about = told["cases"], told["about"]
    columns = min(2, len(cases))
    lines = -(-len(cases) // columns)
    figure, axes = plt.subplots(lines, columns, squeeze=False, figsize=(7 * columns, 3.2 * lines), layout="constrained")
    for axis, case in zip(axes.flat, cases, strict=False):
        rows = [row for row in reversed(case["rows"]) if "ms" in row]
        spread = [[row["ms"] - row["p10_ms"] for row in rows], [row["p90_ms"] - row["ms"] for row in rows]]
        colours = ["tab:blue" if row["label"].startswith("ours") else "tab:gray" for row in rows]
        bars = axis.barh([row["label"] for row in rows], [row["ms"] for row in rows], xerr=spread, color=colours)
        axis.bar_label(bars, [f"{row['ms']:.1f}" for row in rows], padding=3, fontsize="small")
        axis.margins(x=0.12)
        axis.set_xlabel("a forward, ms (median, 10th to 90th percentile)", fontsize="small")
        axis.set_title(f"{case['model']} {case['pixels']}², batch {case['batch']}, {case['dtype']}", fontsize="medium")
        axis.tick_params(labelsize="small")
    for axis in list(axes.flat)[len(cases) :]:
        axis.axis("off")
    devices = about.get("devices", [])
    names = ", ".join(sorted({device["name"] for device in devices}))
    without = " without peer access" if about.get("NCCL_P2P_DISABLE", "0") not in ("", "0") else ""
    figure.suptitle(f"{len(devices)} × {names}{without}, torch {about.get('torch')}, {about['commit']}")
    figure.savefig(path, dpi=90)

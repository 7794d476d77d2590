"""How many times as fast as ComfyUI's own network on one GPU: a picture of the tables in docs/performance.md.

    python benchmarks/speedups_plot.py docs/performance.md docs/speedups.png

It takes each row of a table that has a column ``ComfyUI`` and columns ``1 GPU``, ``2 GPUs``, …, where the first number
in a cell's brackets is the ratio. It needs matplotlib.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle

COLOURS = {1: "#9db8d9", 2: "#5b8fc7", 3: "#2b62a3", 4: "#153a6b"}
RATIO = re.compile(r"\(([\d.]+)×")
GPUS = re.compile(r"(\d) GPUs?")


@dataclass(frozen=True)
class Row:
    """One model at one size."""

    label: str
    ratios: dict[int, float]
    """By the number of GPUs."""


def rows(text: str) -> Iterator[Row]:
    """The rows of all tables that compare with ComfyUI."""
    columns: list[str] = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if not cells:
            columns = []
        elif not columns:
            columns = cells
        elif "ComfyUI" in columns and not cells[0].startswith("---"):
            found = {
                int(count[1]): float(ratio[1])
                for name, cell in zip(columns, cells, strict=True)
                if (count := GPUS.fullmatch(name)) and (ratio := RATIO.search(cell))
            }
            if found:
                yield Row(f"{cells[0].split(',')[0]}\n{cells[1]}", found)


def plot(found: list[Row], path: Path) -> None:
    """Write the picture as PNG."""
    figure, axis = plt.subplots(figsize=(9, 0.62 * len(found) + 1.2), layout="constrained")
    height = 0.8 / len(COLOURS)
    for place, row in enumerate(found):
        for number, (count, ratio) in enumerate(sorted(row.ratios.items())):
            at = place + (number - (len(row.ratios) - 1) / 2) * height
            axis.barh(at, ratio, height, color=COLOURS[count])
            axis.text(ratio + 0.04, at, f"{ratio:.2f}", va="center", fontsize=7)
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set_yticks(range(len(found)), [row.label for row in found], fontsize=8)
    axis.set_ylim(len(found) - 0.4, -0.6)
    axis.set_xlabel("times as fast as ComfyUI's own network on one GPU (the line at 1)")
    bars = [Rectangle((0, 0), 1, 1, color=colour) for colour in COLOURS.values()]
    axis.legend(bars, [f"{count} GPU{'s' * (count > 1)}" for count in COLOURS], loc="lower right", fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    plot(list(rows(Path(sys.argv[1]).read_text(encoding="utf-8"))), Path(sys.argv[2]))

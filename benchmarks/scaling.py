"""One forward at several numbers of GPUs: a table and a picture of runs that `rivals.py` wrote down.

Each point is as many times as fast as ours on one GPU in the same run, in which both were measured side by side.

    for n in 2 3 4; do python benchmarks/rivals.py --ranks $n --json $n.json; done
    python benchmarks/scaling.py 2.json 3.json 4.json [--plot scaling.png]

For three of four GPUs, `--gpus 1,2,3` shows that any will do.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rivals_report import LABELS

ROWS = ("planned", "daemon", "context", "xfuser", "xfuser-batch")
"""What is there for several GPUs."""
ALONE = {"one": "planned", "daemon-one": "daemon"}
"""What stands for them at one GPU."""

Points = dict[tuple[str, int], dict[str, dict[int, dict[str, Any]]]]
"""By model and pixels, row, and GPUs: a row of `rivals.py`."""


def main() -> None:
    """Print the table, and draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="FILE", help="what rivals.py --json wrote, one for each number")
    parser.add_argument("--plot", metavar="FILE", help="a picture, as PNG; needs matplotlib")
    options = parser.parse_args()
    runs, counts = [], []
    for name in options.runs:
        try:
            runs.append(json.loads(Path(name).read_text()))
            counts.append(runs[-1]["about"]["ranks"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            parser.error(f"{name} is nothing that rivals.py --json wrote ({error!r}); run that first")
    if len(set(counts)) < len(counts):
        parser.error(f"two runs have as many ranks: {', '.join(map(str, sorted(counts)))}")
    points = gather(runs)
    for run in sorted(runs, key=lambda run: run["about"]["ranks"]):
        about = run["about"]
        devices = ", ".join(f"{device['name']} {device['gpu'] or ''}".strip() for device in about.get("devices", []))
        print(f"{about['ranks']} ranks: {devices}; commit {about['commit']}, torch {about['torch']}")
    show(points, sorted({1, *counts}))
    if options.plot:
        draw(Path(options.plot), points, runs)


def gather(runs: list[dict[str, Any]]) -> Points:
    """Those rows of all runs that were measured; what one GPU does is taken from the first."""
    points: Points = {}
    for run in runs:
        for case in run["cases"]:
            rows = [row for row in case["rows"] if "speedup" in row]
            if not rows:
                continue
            place = points.setdefault((case["model"], case["pixels"]), {})
            for row in rows:
                if row["row"] in ALONE:
                    place.setdefault(ALONE[row["row"]], {}).setdefault(1, row)
                elif row["row"] in ROWS:
                    place.setdefault(row["row"], {})[run["about"]["ranks"]] = row
    return points


def show(points: Points, counts: list[int]) -> None:
    """Times and ratios."""
    for (model, pixels), rows in points.items():
        print(
            f"\n{model} {pixels}²".ljust(38) + "".join(f"{f'{count} rank' + 's' * (count > 1):>20}" for count in counts)
        )
        for name in ROWS:
            if name in rows:
                cells = (rows[name].get(count) for count in counts)
                told = ("" if each is None else f"{each['ms']:.1f} ms, {each['speedup']:.2f} ×" for each in cells)
                print(LABELS[name].ljust(37) + "".join(f"{cell:>20}" for cell in told))


def draw(path: Path, points: Points, runs: list[dict[str, Any]]) -> None:
    """A panel for each case: how many times as fast as one rank, by how many there are."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(2, len(points))
    lines = -(-len(points) // columns)
    size = (5.5 * columns, 3.8 * lines)
    figure, axes = plt.subplots(lines, columns, squeeze=False, figsize=size, layout="constrained")
    most = max(run["about"]["ranks"] for run in runs)
    for axis, ((model, pixels), rows) in zip(axes.flat, points.items(), strict=False):
        axis.plot([1, most], [1, most], color="lightgray", linestyle="--", label="as many times as ranks")
        for name, by_count in rows.items():
            counts = sorted(by_count)
            style = "o-" if LABELS[name].startswith("ours") else "s:"
            axis.plot(counts, [by_count[count]["speedup"] for count in counts], style, label=LABELS[name])
        axis.set_xticks(range(1, most + 1))
        axis.set_xlabel("ranks", fontsize="small")
        axis.set_ylabel("× ours on one", fontsize="small")
        axis.set_title(f"{model} {pixels}²", fontsize="medium")
        axis.legend(fontsize="small")
        axis.grid(alpha=0.3)
    for axis in list(axes.flat)[len(points) :]:
        axis.axis("off")
    names = sorted({device["name"] for run in runs for device in run["about"].get("devices", [])})
    commits = sorted({run["about"]["commit"] for run in runs})
    figure.suptitle(f"{', '.join(names) or 'CPU'}; {', '.join(commits)}")
    figure.savefig(path, dpi=90)


if __name__ == "__main__":
    main()

"""The soak as a picture: memory, descriptors, threads and latency over time, with the faults marked."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.lines import Line2D

if TYPE_CHECKING:
    from clients import ClientProcess
    from soak import Course

COLOURS = {"SIGKILL": "tab:red", "SIGSTOP": "tab:purple"}


def plot(path: Path, course: Course, asking: list[ClientProcess]) -> None:
    """Write it as PNG."""
    figure, axes = plt.subplots(4, sharex=True, figsize=(10, 9), layout="constrained")
    times = [sample.at_s - course.began_s for sample in course.samples]
    units = {"memory": ("memory, MiB", 2**20), "descriptors": ("descriptors", 1), "threads": ("threads", 1)}
    for axis, (what, (label, unit)) in zip(axes, units.items(), strict=False):
        for who, colour in (("supervisor", "tab:blue"), ("rank", "tab:gray")):
            values = [getattr(sample, who)[what] / unit for sample in course.samples]
            axis.plot(times, values, color=colour, linewidth=1, label="largest rank" if who == "rank" else who)
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
    for number, client in enumerate(asking):
        ended = [call.at_s + call.seconds - course.began_s for call in client.calls]
        seconds = [call.seconds for call in client.calls]
        axes[3].semilogy(ended, seconds, ".", markersize=3, label=f"client {number}")
    axes[3].set_ylabel("a forward, s")
    axes[3].set_xlabel("s")
    for axis in axes:
        for at_s, kind in course.faults:
            axis.axvline(at_s - course.began_s, color=COLOURS[kind], linewidth=0.6, alpha=0.6)
        axis.legend(loc="upper left", fontsize="small")
    marks = [Line2D([], [], color=colour, label=kind) for kind, colour in COLOURS.items()]
    figure.legend(handles=marks, loc="outside upper right", ncols=2, fontsize="small")
    figure.suptitle("A rank is killed or stopped at random moments", fontsize="medium")
    figure.savefig(path, dpi=90)

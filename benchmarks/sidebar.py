"""A sampler's steps through the nodes while browsers poll for the sidebar's tab, and while they do not, on CPUs.

    COMFYUI_PATH=… COMFYUI_PYTHON=… PYTHONPATH=tests:tests/comfyui python benchmarks/sidebar.py

One ComfyUI runs workflows on a tiny Flux.1 in fp32, with one daemon of one rank. In turn for two seconds each, the
browsers have the tab open or not; each asks every two seconds, as the tab does. A step's time is that between two
progress messages to the page. Where other work keeps the cores busy, these times say little; the processor time that
polls take, of ComfyUI and of the supervisor while neither has anything else to do, is measured first.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import threading
import time

import psutil
from comfyui_server import ComfyUI
from helpers import Daemon
from nodes import started, steps

SIZES = ((1, 2, 2), (1, 64, 64), (1, 128, 128))
"""Batch, height and width of the latent. The first is almost no work."""
PERIOD_S = 2.0
STEPS = 50
"""Of a run."""


class Browsers:
    """So many that have the tab open in every other period, while the block lasts."""

    def __init__(self, comfyui: ComfyUI, count: int) -> None:
        self.polls = 0
        self._comfyui, self._count = comfyui, count
        self._turns = [time.perf_counter()]
        """When they closed the tab, opened it, closed it, …"""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._browse)

    def __enter__(self) -> Browsers:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _browse(self) -> None:
        while not self._over.wait(PERIOD_S):
            self._turns.append(time.perf_counter())
            for _ in range(self._count):
                assert self._comfyui.get("/taco_dit/status")["status"]["state"] == "ready"
                self.polls += 1
                self._over.wait(PERIOD_S / self._count)
            self._turns.append(time.perf_counter())

    def had_open(self, begin: float, end: float) -> bool | None:
        """Whether they had the tab open from one time to another; None if they opened or closed it in between."""
        before, after = (sum(turn <= at for turn in self._turns) for at in (begin, end))
        return before % 2 == 0 if before == after else None


def busy_ms(comfyui: ComfyUI, daemon: Daemon) -> list[float]:
    """Processor time that ComfyUI and the supervisor have used so far."""
    assert comfyui.process is not None
    times = (psutil.Process(pid).cpu_times() for pid in (comfyui.process.pid, daemon.pid))
    return [1e3 * (each.user + each.system) for each in times]


def print_idle(comfyui: ComfyUI, daemon: Daemon, browsers: int, seconds: float) -> None:
    """What polls take where nothing else is done."""
    used: dict[bool, list[float]] = {False: [0.0, 0.0], True: [0.0, 0.0]}
    polls, took = 0, {False: 0.0, True: 0.0}
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        for polled in (False, True):
            before, began = busy_ms(comfyui, daemon), time.perf_counter()
            for _ in range(browsers):
                if polled:
                    comfyui.get("/taco_dit/status")
                    polls += 1
                time.sleep(PERIOD_S / browsers)
            took[polled] += time.perf_counter() - began
            after = busy_ms(comfyui, daemon)
            used[polled] = [sum(each) for each in zip(used[polled], map(float.__sub__, after, before), strict=True)]
    rates = {polled: [each / took[polled] for each in used[polled]] for polled in used}
    print(
        "processor time, ms a second; without polls, and with\n\n| ComfyUI | supervisor | polls |\n| --- | --- | --- |"
    )
    shown = [f"{without:.1f}, {beside:.1f}" for without, beside in zip(rates[False], rates[True], strict=True)]
    print(f"| {' | '.join(shown)} | {polls} |\n", flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--browsers", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=60.0)
    args = parser.parse_args()
    seeds = itertools.count()
    with started() as (comfyui, daemon):
        comfyui.get("/taco_dit/status")
        print_idle(comfyui, daemon, args.browsers, args.seconds)
        print(f"{args.browsers} browsers, {args.seconds:g} s; without polls, and with\n")
        print("| latent | steps | median ms | ratio | mean ms | ratio | polls |\n| --- |" + " --- |" * 6, flush=True)
        for size in SIZES:
            steps(comfyui, size, "taco", STEPS, next(seeds), daemon.endpoint)
            times: dict[bool | None, list[float]] = {False: [], True: [], None: []}
            with Browsers(comfyui, args.browsers) as browsers:
                until = time.perf_counter() + args.seconds
                while time.perf_counter() < until:
                    for begin, end in steps(comfyui, size, "taco", STEPS, next(seeds), daemon.endpoint)[0]:
                        times[browsers.had_open(begin, end)].append(1e3 * (end - begin))
            shown = [" × ".join(map(str, size)), f"{len(times[False])}, {len(times[True])}"]
            for of in (statistics.median, statistics.fmean):
                without, beside = of(times[False]), of(times[True])
                shown += [f"{without:.2f}, {beside:.2f}", f"{beside / without:.3f}"]
            print(f"| {' | '.join(shown)} | {browsers.polls} |", flush=True)


if __name__ == "__main__":
    main()

"""Forwards by several clients while ranks are killed and stopped: results stay equal, and nothing grows.

    scripts/soak [--forwards N] [--kills N] [--stops N] [--clients N] [--ranks N] [--seed N] [--plot FILE]

The daemon is a real one, with a tiny Flux.1 in fp32 on CPU ranks. Each client first keeps undisturbed results; every
later one is held against them. Faults hit a random rank at random moments: SIGKILL, or SIGSTOP, which tacod notices
when the step takes longer than `group.step_timeout_s`. Exit code 1 says that a result differed by more than 2e-6, that
a forward got no result, or that something grew. What may grow is in the table that is printed at the end: between two
quiet moments with the same models, ranks of one generation and no client, descriptors and threads not at all, and the
memory of the supervisor and of a rank by `MORE_BYTES`.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from clients import ClientProcess, clients, quantile
from helpers import FLUX, FP32, START_S, Daemon, eventually
from soak_plot import plot

SAMPLE_S = 0.5
STEP_TIMEOUT_S = 2.0
MORE_BYTES = {"supervisor": 8 << 20, "rank": 16 << 20}
"""A forward that leaked 4 KiB would be 8 MiB after 2,000; a rank's allocator keeps what its sizes made it take."""


@dataclass(frozen=True)
class Holdings:
    """What the supervisor and the largest of its ranks hold."""

    at_s: float
    supervisor: dict[str, int]
    rank: dict[str, int]


@dataclass
class Course:
    """What happened, with times on the monotonic clock."""

    began_s: float = 0.0
    samples: list[Holdings] = field(default_factory=list)
    faults: list[tuple[float, str]] = field(default_factory=list)


def holdings(process: psutil.Process) -> dict[str, int]:
    """Memory, descriptors and threads of a process."""
    with process.oneshot():
        return {
            "memory": process.memory_info().rss,
            "descriptors": process.num_fds(),
            "threads": process.num_threads(),
        }


def look(supervisor: psutil.Process) -> Holdings:
    """What is held now; a rank that is just ending counts as none."""
    rank = {"memory": 0, "descriptors": 0, "threads": 0}
    for process in supervisor.children():
        with suppress(psutil.Error):
            if not process.name().startswith("tacod.rank"):
                continue  # what they are forked from
            rank = {what: max(rank[what], value) for what, value in holdings(process).items()}
    return Holdings(time.monotonic(), holdings(supervisor), rank)


@contextmanager
def watch(daemon: Daemon, samples: list[Holdings]) -> Iterator[None]:
    """Within, look every half second."""
    supervisor, over = psutil.Process(daemon.pid), threading.Event()

    def work() -> None:
        while not over.wait(SAMPLE_S):
            samples.append(look(supervisor))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def quiet(daemon: Daemon) -> Holdings:
    """What is held when nobody asks for anything, after the same few forwards each time."""
    with daemon.client() as client:
        eventually(lambda: client.status()["state"] == "ready", START_S, "the ranks are there")
        model = client.load(FLUX.file)
        for seed in range(32):
            FLUX.check(model, seed % 4)
        eventually(lambda: client.status()["clients"] == 1, 10, "other clients are gone")
    time.sleep(3 * SAMPLE_S)
    return look(psutil.Process(daemon.pid))


def disturb(daemon: Daemon, asking: list[ClientProcess], course: Course, plan: list[tuple[int, str, float]]) -> None:
    """Once so many forwards are done, and a moment later, send a random rank a signal."""
    with daemon.client() as admin:
        for after, kind, delay_s in plan:
            while sum(len(client.calls) for client in asking) < after:
                if not any(client.running for client in asking):
                    return
                time.sleep(0.002)
            time.sleep(delay_s)
            victims: list[int] = []
            while not victims:  # ranks that are being replaced have no process for a moment
                victims = [rank["pid"] for rank in admin.status()["group"]["ranks"]]
            with suppress(ProcessLookupError):
                os.kill(random.choice(victims), signal.Signals[kind])
                course.faults.append((time.monotonic(), kind))


def planned(args: argparse.Namespace) -> list[tuple[int, str, float]]:
    """Faults in their order: after how many forwards, which signal, how many seconds later."""
    kinds = ["SIGKILL"] * args.kills + ["SIGSTOP"] * args.stops
    random.shuffle(kinds)
    moments = sorted(random.sample(range(args.forwards // 20, args.forwards * 19 // 20), len(kinds)))
    return [(after, kind, random.uniform(0, 0.05)) for after, kind in zip(moments, kinds, strict=True)]


def soak(args: argparse.Namespace) -> bool:
    """Run it and print what came of it; returns whether all is well."""
    random.seed(args.seed)
    course = Course()
    shares = [args.forwards // args.clients + (n < args.forwards % args.clients) for n in range(args.clients)]
    settings = {
        "group.step_timeout_s": STEP_TIMEOUT_S,
        "group.load_timeout_s": 30.0,
        "group.start_timeout_s": 60.0,
        "group.max_restarts": 10 * (args.kills + args.stops) + 10,
        # Restarts that follow each other soon are spaced out more and more; here each is the first of its window.
        "group.restart_window_s": 0.001,
    }
    with tempfile.TemporaryDirectory(prefix="tacod-") as models:
        FLUX.save(Path(models))
        with Daemon(args.ranks, [Path(models)], settings, cold=True) as daemon:
            before = quiet(daemon)
            course.began_s = time.monotonic()
            limits = [("--forwards", str(share)) for share in shares]
            with watch(daemon, course.samples), clients(daemon.endpoint, limits) as asking:
                for client in asking:
                    client.begin()
                disturb(daemon, asking, course, planned(args))
                codes = [client.end() for client in asking]
            after = quiet(daemon)
            with daemon.client() as admin:
                stats = admin.stats()
    tell(args, course, asking, stats)
    kept = tell_growth(before, course.samples, after)
    plot(Path(args.plot), course, asking)
    print(f"\nplot: {args.plot}")
    calls = [call for client in asking for call in client.calls]
    answered = len(calls) == args.forwards and not any(codes)
    struck = len(course.faults) == args.kills + args.stops
    return answered and struck and kept and all(call.error <= FP32 for call in calls)


def tell(args: argparse.Namespace, course: Course, asking: list[ClientProcess], stats: dict[str, Any]) -> None:
    """Results and times."""
    calls = [call for client in asking for call in client.calls]
    kinds = [kind for _, kind in course.faults]
    seconds = [call.seconds for call in calls]
    took_s = time.monotonic() - course.began_s
    print(
        f"{len(calls)} of {args.forwards} forwards by {args.clients} clients on {args.ranks} CPU ranks, {took_s:.0f} s"
    )
    print(f"faults: {kinds.count('SIGKILL')} SIGKILL, {kinds.count('SIGSTOP')} SIGSTOP (of {args.kills}, {args.stops})")
    print(f"restarts of the ranks: {stats['group_restarts']}, forwards run again: {stats['retried_forwards']}")
    if calls:
        worst = max(call.error for call in calls)
        print(f"equal to the bit: {sum(call.bitwise for call in calls)}; largest relative error: {worst:.2g}")
        p50, p99 = (1e3 * quantile(seconds, share) for share in (0.5, 0.99))
        print(f"a forward: p50 {p50:.1f} ms, p99 {p99:.0f} ms, longest {max(seconds):.2f} s\n")


def tell_growth(before: Holdings, samples: list[Holdings], after: Holdings) -> bool:
    """The table of what is held; returns whether nothing has grown more than it may."""
    fine = True
    print("| held by | what | before | most | after | may be | |\n| --- | --- | --- | --- | --- | --- | --- |")
    for who, more in MORE_BYTES.items():
        for what in ("memory", "descriptors", "threads"):
            first, last = getattr(before, who)[what], getattr(after, who)[what]
            most = max((getattr(sample, who)[what] for sample in samples), default=last)
            allowed = first + (more if what == "memory" else 0)
            shown = [
                f"{value / 2**20:.1f} MiB" if what == "memory" else value for value in (first, most, last, allowed)
            ]
            fine &= last <= allowed
            cells = " | ".join(map(str, shown))
            print(f"| {who} | {what} | {cells} | {'ok' if last <= allowed else 'GREW'} |")
    return fine


def main() -> int:
    """Soak a daemon."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forwards", type=int, default=2000)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--stops", type=int, default=5)
    parser.add_argument("--clients", type=int, default=2)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of the faults' moments")
    parser.add_argument("--plot", metavar="FILE", default="soak.png")
    args = parser.parse_args()
    if args.forwards * 9 // 10 < args.kills + args.stops:
        parser.error("more faults than forwards that they could come after")
    return 0 if soak(args) else 1


if __name__ == "__main__":
    sys.exit(main())

"""How ``tacoctl`` shows things: tables on a terminal, plain columns in a pipe."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from tacod_client.job import Job

__all__ = [
    "bench",
    "counting",
    "duration",
    "facts",
    "jobs",
    "live",
    "loading",
    "models",
    "ms",
    "out",
    "progress",
    "size",
    "stats",
    "status",
]

_PIPE_WIDTH = 400


def out(text: Any) -> None:
    """Print a string or something of rich's to stdout."""
    if isinstance(text, str):
        print(text)
        return
    width = None if sys.stdout.isatty() else _PIPE_WIDTH
    Console(width=width, highlight=False).print(text)


def live(make: Callable[[], Any], every_s: float) -> None:
    """Show something and refresh it until ctrl-C."""
    with Live(make(), console=Console(highlight=False), auto_refresh=False) as display:
        while True:
            time.sleep(every_s)
            display.update(make(), refresh=True)


def progress(job: Job, quiet: bool = False) -> None:
    """Follow a sampling run to its end with a bar on stderr."""
    console = Console(stderr=True, quiet=quiet)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("sigma {task.fields[sigma]:.3f}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("sampling", total=job.total, sigma=1.0)
        for event in job:
            bar.update(task, completed=event.step, sigma=event.sigma)


@contextmanager
def loading(quiet: bool = False) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal's stderr, and what tells it how many bytes of how many are loaded."""
    columns = (TextColumn("loading"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    console = Console(stderr=True, quiet=quiet or not sys.stderr.isatty())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("loading", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def counting(total: int, quiet: bool = False) -> Iterator[Callable[[], None]]:
    """A bar on a terminal's stderr, and what tells it that one more of so many is done."""
    columns = (TextColumn("measuring"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True, quiet=quiet or not sys.stderr.isatty())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("measuring", total=total)
        yield lambda: bar.advance(task)


def status(told: dict[str, Any]) -> Any:
    """``tacoctl status``."""
    group, queue = told["group"], told["queue"]
    lines = [
        ("tacod", f"{told['state']}, version {told['version']}, pid {told['pid']}, up {duration(told['uptime_s'])}"),
        ("endpoint", told["endpoint"]),
        ("group", f"{group['world_size']} ranks on {group['device']}, {group['restarts']} restarts"),
        ("queue", f"{queue['running']} running, {queue['queued']} queued"),
        ("clients", str(told["clients"])),
    ]
    ranks = _table(
        ("rank", "pid", "device", "memory"),
        ((rank["rank"], rank["pid"], rank["device"], size(rank["memory_used_bytes"])) for rank in group["ranks"]),
    )
    return Group(facts(lines), ranks, models(told["models"]))


def models(told: list[dict[str, Any]]) -> Any:
    """``tacoctl models``."""
    if not told:
        return "no model is loaded"
    return _table(
        ("model", "name", "family", "parameters", "memory", "patches", "dtype", "loaded in", "plan"),
        (
            (
                model["id"],
                model["name"],
                model["family"],
                _count(model["parameters"]),
                size(model["weight_bytes"]),
                model["patches"],
                model["dtype"],
                f"{model['loaded_s']:.1f} s",
                model["plan"],
            )
            for model in told
        ),
    )


def jobs(told: list[dict[str, Any]]) -> Any:
    """``tacoctl ps``."""
    if not told:
        return "nothing is running or queued"
    return _table(
        ("job", "verb", "state", "step", "model", "client", "age"),
        (
            (
                job["job"],
                job["verb"],
                job["state"],
                f"{job['step']}/{job['total']}",
                job["model"] or "",
                job["client"] or "gone",
                duration(job["age_s"]),
            )
            for job in told
        ),
    )


def stats(told: dict[str, Any]) -> Any:
    """``tacoctl stats``."""
    step, outcomes = told["step_s"], told["jobs_total"]
    lines = [
        (
            "forwards",
            f"{told['forwards_total']}, {told['parallel_forwards_total']} of them on several ranks"
            + (f", {skipped} mostly skipped" if (skipped := told.get("skipped_forwards_total")) else ""),
        ),
        ("jobs", ", ".join(f"{count} {outcome}" for outcome, count in outcomes.items())),
        ("retried", f"{told['retried_forwards']} forwards, {told['group_restarts']} group restarts"),
        ("traffic", f"{size(told['rx_bytes'])} in, {size(told['tx_bytes'])} out"),
        ("store", f"{size(told['store']['bytes'])}, {told['store']['hits']} hits, {told['store']['misses']} misses"),
        ("step", f"mean {ms(step['mean'])}, p50 {ms(step['p50'])}, p95 {ms(step['p95'])} over {step['count']}"),
    ]
    parts = [(name.removesuffix("_s"), told[name]) for name in ("queue_s", "wire_s", "compute_s", "collective_s")]
    whole = sum(seconds for _, seconds in parts) or 1.0
    split = _table(
        ("of a step", "mean", "share"),
        ((name, ms(seconds), f"{100 * seconds / whole:.1f} %") for name, seconds in parts),
    )
    return Group(facts(lines), split)


def bench(told: dict[str, Any]) -> Any:
    """``tacoctl bench``."""
    model, parts = told["model"], ("queue", "wire", "compute", "collective")
    lines = [
        ("model", f"{model['name']}, {model['family']}, {model['dtype']}"),
        ("forward", f"batch {told['batch']}, {told['text']} text tokens, median of {told['rounds']}"),
        *((row["size"], row["plan"]) for row in told["sizes"]),
    ]
    table = _table(
        ("size", "one rank", f"{told['ranks']} ranks", "speed-up", "error", *parts, "bound by"),
        (
            (
                row["size"],
                ms(row["one_s"]["p50"]),
                ms(row["all_s"]["p50"]),
                f"{row['speedup']:.2f}",
                f"{row['error']:.1e}",
                *(ms(row["split"][f"{part}_s"]) for part in parts),
                row["bound"],
            )
            for row in told["sizes"]
        ),
    )
    return Group(facts(lines), table)


def facts(told: Iterable[tuple[str, str]]) -> Table:
    """Names and values, one a line."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in told:
        table.add_row(name, value)
    return table


def _table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> Table:
    table = Table(box=SIMPLE_HEAD if sys.stdout.isatty() else None, pad_edge=False)
    for head in heads:
        # The last one is the longest, and may take several lines.
        table.add_column(head, overflow="fold", no_wrap=head != heads[-1])
    for row in rows:
        table.add_row(*map(str, row))
    return table


def ms(seconds: float) -> str:
    """Milliseconds, as text."""
    return f"{seconds * 1000:.1f} ms"


def size(count: float) -> str:
    """Bytes, as text in binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


def _count(count: float) -> str:
    for unit in ("", " k", " M", " B"):
        if count < 1000 or unit == " B":
            return f"{count:.0f}" if not unit else f"{count:.1f}{unit}"
        count /= 1000
    raise AssertionError


def duration(seconds: float) -> str:
    """The two largest units that matter."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [f"{value} {unit}" for value, unit in ((days, "d"), (hours, "h"), (minutes, "min")) if value]
    return " ".join([*parts[:2], *([f"{seconds} s"] if not days and not hours else [])])

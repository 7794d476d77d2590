"""How ``tacoctl`` shows things: tables on a terminal, plain columns in a pipe."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TextIO, cast

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
from rich.text import Text

from tacod_client.cli.ending import mute
from tacod_client.cli.tables import LEAST_WIDTH, Columns, Facts
from tacod_client.job import Job
from tacod_client.stats import PARTS
from tacod_client.streams import stdout
from tacod_client.text import printable
from tacod_client.units import duration, ms, short, size

__all__ = [
    "bench",
    "console",
    "counting",
    "groups",
    "heads",
    "jobs",
    "live",
    "loading",
    "models",
    "name",
    "of_groups",
    "out",
    "progress",
    "stats",
    "status",
]

SHOWN_PARTS = ("queue_s", "compute_s", "collective_s")
"""Parts of a step that are shown for each group."""
_PIPE_WIDTH = 100_000


# --- where it goes ----------------------------------------------------------------------------------------------------


def console() -> Console:
    """Stdout: as wide as the terminal, in a pipe as wide as needed. Everything is shown as text, never as markup."""
    width = None if sys.stdout.isatty() else _PIPE_WIDTH
    made = Console(width=width, highlight=False, markup=False, emoji=False)
    if made.width < LEAST_WIDTH:
        made.width = LEAST_WIDTH
    return made


def out(shown: Any) -> None:
    """Print a string or something of rich's to stdout."""
    with stdout():
        if isinstance(shown, str):
            print("\n".join(map(printable, shown.split("\n"))))
        else:
            console().print(shown)


class _Aside:
    """Stderr for progress bars: if it can't be written, the work goes on without them."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, shown: str) -> int:
        try:
            return self._file.write(shown)
        except OSError:
            mute(self._file)
            return len(shown)

    def flush(self) -> None:
        try:
            self._file.flush()
        except OSError:
            mute(self._file)


def _aside(quiet: bool) -> Console:
    return Console(file=cast(TextIO, _Aside(sys.stderr)), quiet=quiet)


def live(make: Callable[[], Any], every_s: float) -> None:
    """Show something and refresh it until ctrl-C."""
    with stdout(), Live(make(), console=console(), auto_refresh=False) as display:
        while True:
            time.sleep(every_s)
            display.update(make(), refresh=True)


def progress(job: Job, quiet: bool = False) -> None:
    """Follow a sampling run to its end with a bar on stderr.

    If stderr is no terminal, the bar is written once, when the run has succeeded.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[level]}"),
        TimeElapsedColumn(),
    )
    console = _aside(quiet)
    bar = Progress(*columns, console=console)
    task = bar.add_task("sampling", total=job.total, level="")
    with bar if console.is_terminal else nullcontext():
        for event in job:
            bar.update(task, completed=event.step, level=f"sigma {event.sigma:.3f}")
    if not console.is_terminal:
        console.print(bar)


@contextmanager
def loading(quiet: bool = False) -> Iterator[Callable[[int, int], None]]:
    """A progress bar of loaded bytes on a terminal's stderr, and the function that updates it."""
    columns = (TextColumn("loading"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=_aside(quiet or not sys.stderr.isatty()), transient=True) as bar:
        task = bar.add_task("loading", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def counting(total: int, quiet: bool = False) -> Iterator[Callable[[], None]]:
    """A progress bar of a count on a terminal's stderr, and the function that adds one to it."""
    columns = (TextColumn("measuring"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=_aside(quiet or not sys.stderr.isatty()), transient=True) as bar:
        task = bar.add_task("measuring", total=total)
        yield lambda: bar.advance(task)


def status(reply: dict[str, Any]) -> Any:
    """``tacoctl status``."""
    group, queue, several = reply["group"], reply["queue"], groups(reply)
    lines = [
        (
            "tacod",
            f"{reply['state']}, version {reply['version']}, pid {reply['pid']}, up {duration(reply['uptime_s'])}",
        ),
        ("endpoint", reply["endpoint"]),
        (
            "groups" if several else "group",
            (f"{len(several)}, with " if several else "")
            + f"{_ranks(group)} on {group['device']}, {group['restarts']} restarts",
        ),
        ("queue", f"{queue['running']} running, {queue['queued']} queued"),
        ("clients", str(reply["clients"])),
    ]
    hosts = [str(rank.get("host", "")) for rank in group["ranks"]]
    spread = len(set(hosts)) > 1
    ranks = Columns(
        (*heads(several), "rank", *(["host"] if spread else []), "pid", "device", "memory"),
        (
            (
                *name(rank, several),
                rank["rank"],
                *([printable(host)] if spread else []),
                rank["pid"],
                rank["device"],
                _memory(rank),
            )
            for rank, host in zip(group["ranks"], hosts, strict=True)
        ),
    )
    if not several:
        return Group(Facts(lines), Text(), ranks, Text(), models(reply["models"]))
    loaded = [{**model, "groups": [each["name"]]} for each in several for model in each["models"]]
    return Group(Facts(lines), Text(), of_groups(several), Text(), ranks, Text(), models(loaded))


def groups(reply: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The groups in the reply to ``status``, if there are several; none otherwise, and from an older daemon."""
    found: list[dict[str, Any]] = reply.get("groups") or []
    return found if len(found) > 1 else []


def of_groups(several: Sequence[dict[str, Any]]) -> Any:
    """A table with a line for each group."""
    return Columns(
        ("group", "state", "ranks", "running", "queued", "restarts"),
        (
            (
                each["name"],
                each["state"],
                f"{len(each['ranks'])} of {each['world_size']}",
                each["queue"]["running"],
                each["queue"]["queued"],
                each["restarts"],
            )
            for each in several
        ),
    )


def heads(shown: object) -> tuple[str, ...]:
    """The head of a column of groups, if it is shown."""
    return ("group",) if shown else ()


def name(row: Mapping[str, Any], shown: object) -> tuple[str, ...]:
    """The name of what a row is of, for a column of groups, if that is shown."""
    return (", ".join(row.get("groups") or [str(row.get("group", ""))]),) if shown else ()


def _ranks(group: dict[str, Any]) -> str:
    """How many ranks there are; if hosts of a cluster are lost, of how many."""
    there, asked = group["world_size"], group.get("asked_ranks", group["world_size"])
    return f"{there} ranks" if there == asked else f"{there} of {asked} ranks"


def _memory(rank: dict[str, Any]) -> str:
    """What a rank uses, and what prefixes have of it."""
    prefixes = rank.get("prefix_bytes")
    return size(rank["memory_used_bytes"]) + (f", {size(prefixes)} for prefixes" if prefixes else "")


def loaded(reply: dict[str, Any], elapsed_s: float) -> str:
    """``tacoctl load``."""
    lines = [f"{reply['id']}  {reply['name']}: {reply['family']}, ready in {elapsed_s:.1f} s"]
    return "\n".join([*lines, *(f"a patch was left out: {printable(note)}" for note in reply.get("notes", ()))])


def computed_in(model: dict[str, Any]) -> str:
    """The compute dtype, and the format of most of its layers if the model is quantized."""
    formats: dict[str, int] = model.get("quantization") or {}
    usual = max(formats, key=lambda name: formats[name], default="")
    return f"{model['dtype']}, {usual}" if usual else str(model["dtype"])


def held(model: dict[str, Any]) -> str:
    """What a model takes of a GPU, and what that fetches in a forward; of each GPU where they differ."""
    held, fetched = (list(map(size, model.get(key) or ())) for key in ("resident_bytes", "streamed_bytes"))
    if not any(model.get("streamed_bytes") or ()):
        return size(model["weight_bytes"])
    took = max(model.get("fetch_s") or [0])
    return f"{_by_rank(held)}, {_by_rank(fetched)} fetched" + (f" in {took * 1e3:.0f} ms" if took else "")


def _by_rank(texts: Sequence[str]) -> str:
    """One text for all ranks, or one for each."""
    return texts[0] if len(set(texts)) == 1 else " / ".join(texts)


def models(reply: list[dict[str, Any]]) -> Any:
    """``tacoctl models``."""
    if not reply:
        return Text("no model is loaded")
    grouped = any("groups" in model for model in reply)
    return Columns(
        (*heads(grouped), "model", "name", "family", "parameters", "memory", "patches", "dtype", "loaded in", "plan"),
        (
            (
                *name(model, grouped),
                model["id"],
                model["name"],
                model["family"],
                short(model["parameters"]),
                held(model),
                model["patches"],
                computed_in(model),
                f"{model['loaded_s']:.1f} s",
                model["plan"],
            )
            for model in reply
        ),
        long=("name", "plan"),
    )


def steps(job: Mapping[str, Any]) -> str:
    """How far a job is: its steps, and of a long one under way the blocks."""
    done = f"{job['step']}/{job['total']}"
    return f"{done}, block {job['block']}/{job['blocks']}" if job.get("blocks") else done


def jobs(reply: list[dict[str, Any]]) -> Any:
    """``tacoctl ps``."""
    if not reply:
        return Text("nothing is running or queued")
    grouped = any("group" in job for job in reply)
    return Columns(
        (*heads(grouped), "job", "verb", "state", "step", "model", "client", "age"),
        (
            (
                *name(job, grouped),
                job["job"],
                job["verb"],
                job["state"],
                steps(job),
                job["model"] or "",
                job["client"] or "gone",
                duration(job["age_s"]),
            )
            for job in reply
        ),
        long=("client",),
    )


def stats(reply: dict[str, Any]) -> Any:
    """``tacoctl stats``."""
    step, outcomes = reply["step_s"], reply["jobs_total"]
    lines = [
        (
            "forwards",
            f"{reply['forwards_total']}, {reply['parallel_forwards_total']} of them on several ranks"
            + (f", {skipped} mostly skipped" if (skipped := reply.get("skipped_forwards_total")) else ""),
        ),
        *(
            [("prefixes", f"computed for {prefix['misses']} forwards, kept for {prefix['hits']} others")]
            if (prefix := reply.get("prefix")) and any(prefix.values())
            else []
        ),
        ("jobs", ", ".join(f"{count} {outcome}" for outcome, count in outcomes.items())),
        ("retried", f"{reply['retried_forwards']} forwards, {reply['group_restarts']} group restarts"),
        ("traffic", f"{size(reply['rx_bytes'])} in, {size(reply['tx_bytes'])} out"),
        ("store", f"{size(reply['store']['bytes'])}, {reply['store']['hits']} hits, {reply['store']['misses']} misses"),
        ("step", f"mean {ms(step['mean'])}, p50 {ms(step['p50'])}, p95 {ms(step['p95'])} over {step['count']}"),
    ]
    parts = [(name.removesuffix("_s"), reply[name]) for name in ("queue_s", "wire_s", "compute_s", "collective_s")]
    whole = sum(seconds for _, seconds in parts) or 1.0
    split = Columns(
        ("of a step", "mean", "share"),
        ((name, ms(seconds), f"{100 * seconds / whole:.1f} %") for name, seconds in parts),
    )
    several = groups(reply)
    if not several:
        return Group(Facts(lines), Text(), split)
    each_group = Columns(
        ("group", "forwards", "step", "queue", "compute", "collective", "restarts"),
        (
            (
                each["name"],
                each["forwards_total"],
                *(ms(seconds) for seconds in (each["step_s"]["mean"], *map(each.get, SHOWN_PARTS))),
                each["group_restarts"],
            )
            for each in several
        ),
    )
    return Group(Facts(lines), Text(), split, Text(), each_group)


def _beside(row: dict[str, Any]) -> tuple[str, str, str]:
    """ComfyUI's time of a size, how many times as fast the daemon is, and how far apart the outputs are."""
    error = row["comfyui_error"]
    return ms(row["comfyui_s"]["p50"]), f"{row['comfyui_ratio']:.2f}", "–" if error is None else f"{error:.1e}"


def bench(reply: dict[str, Any]) -> Any:
    """``tacoctl bench``."""
    model, parts = reply["model"], PARTS
    lines = [
        ("model", f"{model['name']}, {model['family']}, {model['dtype']}"),
        ("forward", f"batch {reply['batch']}, {reply['text']} text tokens, median of {reply['rounds']}"),
        *((row["size"], row["plan"]) for row in reply["sizes"]),
    ]
    comfyui = reply.get("comfyui")
    if comfyui is not None:
        what = f"{comfyui.get('version', '')}, its own network on one {comfyui.get('device')}, {comfyui.get('dtype')}"
        lines.append(("ComfyUI", f"not compared: {comfyui['error']}" if "error" in comfyui else what))
    compared = comfyui is not None and "error" not in comfyui
    theirs = ("ComfyUI", "beside it", "error beside it") if compared else ()
    table = Columns(
        ("size", "one rank", f"{reply['ranks']} ranks", "speed-up", "error", *theirs, *parts, "bound by"),
        (
            (
                row["size"],
                ms(row["one_s"]["p50"]),
                ms(row["all_s"]["p50"]),
                f"{row['speedup']:.2f}",
                f"{row['error']:.1e}",
                *(_beside(row) if compared else ()),
                *(ms(row["split"][f"{part}_s"]) for part in parts),
                row["bound"],
            )
            for row in reply["sizes"]
        ),
        long=("bound by",),
    )
    return Group(Facts(lines), Text(), table)

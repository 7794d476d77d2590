"""``tacoctl top``: the daemon at a glance, refreshed again and again, also across restarts."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

from rich.console import Group
from rich.live import Live
from rich.text import Text

from tacod_client import units
from tacod_client.cli import show, tables
from tacod_client.cli.output import document
from tacod_client.client import Client
from tacod_client.endpoint import find_endpoint
from tacod_client.errors import ConnectionFailed, TacodError
from tacod_client.streams import stdout

__all__ = ["frame", "run"]

PATIENCE_S = 2.0
"""How long one refresh may take before the daemon counts as not reachable."""
PARTS = (("queue_s", "yellow"), ("wire_s", "magenta"), ("compute_s", "green"), ("collective_s", "blue"))
STATES = {"ready": "bold green", "degraded": "bold red"}
BAR = 12
SPLIT = 64


def run(args: argparse.Namespace) -> int:
    """Show frames until ctrl-C, or one with ``--once``; returns the exit code, 3 if that one found no daemon."""
    endpoint = find_endpoint(getattr(args, "endpoint", None))
    looks = _looks(endpoint)
    if args.once:
        look = next(looks)
        if look["error"] is not None:
            raise ConnectionFailed(look["error"])
        _print(args, look)
        return 0
    with suppress(KeyboardInterrupt):
        if "json" in args or not sys.stdout.isatty():
            for look in looks:
                _print(args, look)
                time.sleep(args.interval)
        screen = Live(console=show.console(), screen=True, auto_refresh=False, vertical_overflow="ellipsis")
        with stdout(), screen as display:
            for look in looks:
                display.update(Group(frame(look), Text("\nCtrl-C ends this", "dim")), refresh=True)
                time.sleep(args.interval)
    return 0


def _print(args: argparse.Namespace, look: dict[str, Any]) -> None:
    if "json" in args:
        document(look, indent=2 if args.once else None)
    else:
        show.out(frame(look))


def _looks(endpoint: str) -> Iterator[dict[str, Any]]:
    """The daemon's report each time; if it can't be reached, the reason."""
    client: Client | None = None
    before: dict[str, Any] | None = None
    while True:
        look: dict[str, Any] = {"time": time.time(), "endpoint": endpoint, "error": None, "rates": None}
        try:
            if client is None:
                client = Client(endpoint, timeout_s=PATIENCE_S, reconnect_s=PATIENCE_S)
            look.update(status=client.status(), stats=client.stats(), jobs=client.jobs())
            look["rates"] = _rates(before, look)
            before = look
        except TacodError as error:
            look = {"time": look["time"], "endpoint": endpoint, "error": error.message}
            before = None
            if client is not None:
                client.close()
                client = None
        yield look


def _rates(before: dict[str, Any] | None, now: dict[str, Any]) -> dict[str, float] | None:
    """Forwards and bytes a second since the last look at the same run of the daemon."""
    if before is None or before["status"]["boot_id"] != now["status"]["boot_id"]:
        return None
    elapsed_s = now["status"]["uptime_s"] - before["status"]["uptime_s"]
    if elapsed_s <= 0:
        return None
    keys = {"forwards_per_s": "forwards_total", "rx_bytes_per_s": "rx_bytes", "tx_bytes_per_s": "tx_bytes"}
    return {rate: (now["stats"][key] - before["stats"][key]) / elapsed_s for rate, key in keys.items()}


def frame(look: dict[str, Any]) -> Any:
    """One refresh as text."""
    clock = time.strftime("%H:%M:%S", time.localtime(look["time"]))
    if look["error"] is not None:
        head = Text.assemble(("tacod", "bold"), "  ", ("not reachable, trying", "bold red"), f"  {clock}")
        return Group(head, tables.text(look["error"]))
    status, stats = look["status"], look["stats"]
    several = show.groups(status)
    parts = [_head(status, clock), Text()]
    if several:
        parts += [show.of_groups(several), Text()]
    parts += [_ranks(status["group"], several), Text(), *_work(status, stats, look["rates"])]
    if look["jobs"]:
        parts += [Text(), _jobs(look["jobs"], several)]
    if status["models"]:
        parts += [Text(), _models(status["models"], several)]
    return Group(*parts)


def _head(status: dict[str, Any], clock: str) -> Text:
    state, group = status["state"], status["group"]
    return Text.assemble(
        ("tacod", "bold"),
        f" {status['version']}  ",
        (state, STATES.get(state, "bold yellow")),
        f"  pid {status['pid']}, up {units.duration(status['uptime_s'])}, ",
        f"{group['restarts']} group restarts  {clock}\n",
        (tables.text(status["endpoint"]).plain, "dim"),
    )


def _ranks(group: dict[str, Any], several: Sequence[Any]) -> Any:
    if not group["ranks"]:
        return Text(f"no rank is running; {group['world_size']} are configured", style="red")
    heads = (*show.heads(several), "rank", "pid", "device", "tensors", "device memory", "", "busy", "")
    rows = []
    for rank in group["ranks"]:
        used, total = rank.get("device_memory_used_bytes"), rank.get("memory_total_bytes")
        busy = rank.get("utilization")
        name = rank.get("device_name")
        row = (
            *show.name(rank, several),
            rank["rank"],
            rank["pid"],
            rank["device"] if name in (None, "cpu") else f"{rank['device']} {name}",
            units.size(rank["memory_used_bytes"]),
            f"{units.size(used)} of {units.size(total)}" if used is not None and total else "not known",
            _bar(used / total if used is not None and total else None),
            f"{100 * busy:.0f} %" if busy is not None else "not known",
            _bar(busy),
        )
        rows.append(row)
    return tables.Columns(heads, rows, long=("device",))


def _work(status: dict[str, Any], stats: dict[str, Any], rates: dict[str, float] | None) -> Iterator[Any]:
    queue, step, ended = status["queue"], stats["step_s"], stats["jobs_total"]
    outcomes = ", ".join(f"{count} {outcome}" for outcome, count in ended.items())
    facts = [
        ("queue", f"{queue['running']} running, {queue['queued']} queued, {status['clients']} clients"),
        ("jobs", f"{outcomes}; {stats['retried_forwards']} forwards retried"),
        ("forwards", f"{stats['forwards_total']}, {stats['parallel_forwards_total']} of them on several ranks"),
    ]
    if rates is not None:
        now = f"{rates['forwards_per_s']:.1f} forwards/s"
        traffic = f"{units.size(rates['rx_bytes_per_s'])}/s in, {units.size(rates['tx_bytes_per_s'])}/s out"
        facts.append(("now", f"{now}, {traffic}"))
    times = ", ".join(f"{name} {units.ms(step[name])}" for name in ("mean", "p50", "p95"))
    facts.append(("step", f"{times}, {step['count']} in all"))
    yield tables.Facts(facts)
    if step["count"]:
        yield _split(stats)


def _split(stats: dict[str, Any]) -> Any:
    """Where a step's time goes: on a terminal a bar of four colours with its legend."""
    whole = sum(stats[part] for part, _ in PARTS) or 1.0
    bar, legend = Text(no_wrap=True, overflow="crop"), Text()
    end = 0.0
    for part, colour in PARTS:
        end += stats[part] / whole
        bar.append(tables.glyph("█", "#") * (round(end * SPLIT) - len(bar)), style=colour)
        legend.append(", " if legend else "")
        legend.append(part.removesuffix("_s"), style=colour)
        legend.append(f" {units.ms(stats[part])} ({100 * stats[part] / whole:.0f} %)")
    return Group(bar, tables.Wrapped(legend)) if sys.stdout.isatty() else tables.Wrapped(legend)


def _jobs(jobs: list[dict[str, Any]], several: Sequence[Any]) -> Any:
    rows = []
    for job in jobs:
        progress = show.steps(job)
        within = job["block"] / job["blocks"] if job.get("blocks") else 0.0
        share = (job["step"] + within) / job["total"] if job["total"] else None
        client = job["client"] or "gone"
        row = (job["job"], job["verb"], job["state"], progress, _bar(share), client, units.duration(job["age_s"]))
        rows.append((*show.name(job, several), *row))
    return tables.Columns(
        (*show.heads(several), "job", "verb", "state", "step", "", "client", "age"), rows, long=("client",)
    )


def _models(models: list[dict[str, Any]], several: Sequence[Any]) -> Any:
    rows = []
    for model in models:
        weights = show.held(model)
        patched = f" + {model['patches']} patches" if model["patches"] else ""
        row = (model["name"] + patched, model["family"], weights, show.computed_in(model), model["plan"])
        rows.append((*show.name(model, several), *row))
    return tables.Columns(
        (*show.heads(several), "model", "family", "memory", "dtype", "plan"), rows, long=("model", "plan")
    )


def _bar(share: float | None) -> Text:
    """A bar on a terminal; in a pipe the number beside it says as much."""
    if share is None or not sys.stdout.isatty():
        return Text()
    done = round(min(max(share, 0.0), 1.0) * BAR)
    return Text.assemble(
        (tables.glyph("━", "=") * done, "green"), (tables.glyph("━", "-") * (BAR - done), "bright_black")
    )

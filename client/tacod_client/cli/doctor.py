"""``tacoctl doctor``: checks what could keep tacod from working; a line for each check, with advice.

The client alone makes some checks. Those that need the daemon's packages are made by ``python -m tacod.tools.doctor``,
in a process of its own that may not take longer than `PATIENCE_S`.
"""

from __future__ import annotations

import argparse
import getpass
import grp
import importlib.util
import json
import os
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rich.console import Group
from rich.table import Table
from rich.text import Text

from tacod_client import units
from tacod_client.cli import show, tables
from tacod_client.cli.output import document
from tacod_client.client import Client
from tacod_client.endpoint import find_endpoint
from tacod_client.errors import TacodError

__all__ = ["Finding", "fail", "ok", "run", "warn"]

PATIENCE_S = 150.0
STYLES = {"ok": "green", "warn": "bold yellow", "fail": "bold red"}
OPEN_FILES = 1024
SHM_BYTES = 1 << 30


class Finding(NamedTuple):
    """One line of the doctor: what was checked, its state, and advice."""

    check: str
    state: Literal["ok", "warn", "fail"]
    message: str
    advice: str = ""


def ok(check: str, message: str) -> Finding:
    """A finding that needs no action."""
    return Finding(check, "ok", message)


def warn(check: str, message: str, advice: str) -> Finding:
    """A finding that works, but not as well as it could, or that could not be checked."""
    return Finding(check, "warn", message, advice)


def fail(check: str, message: str, advice: str) -> Finding:
    """A finding that doesn't work."""
    return Finding(check, "fail", message, advice)


def run(args: argparse.Namespace) -> int:
    """Make all checks; returns 1 if one fails, else 0."""
    endpoint, findings = _engine(args)
    endpoint = getattr(args, "endpoint", None) or endpoint or find_endpoint()
    findings += _socket(endpoint)
    reply = None
    try:
        with Client(endpoint, timeout_s=3.0, reconnect_s=3.0) as client:
            reply, stats = client.status(), client.stats()
        findings += _daemon(reply, stats)
    except TacodError as error:
        message, _, advice = error.message.partition("; ")
        findings.append(fail("daemon", message, advice or "see its log: `journalctl -u tacod`"))
    findings += _system(reply["pid"] if reply else None)
    states = [finding.state for finding in findings]
    if "json" in args:
        worst = next(state for state in ("fail", "warn", "ok") if state in states)
        document({"state": worst, "findings": [found._asdict() for found in findings]})
    else:
        show.out(_lines(findings))
    return int("fail" in states)


def _lines(findings: list[Finding]) -> Any:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column()
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for found in findings:
        text = tables.text(found.message)
        if found.advice:
            text.append("\n" if sys.stdout.isatty() else " ")
            text.append(f"{tables.glyph('→', '->')} {tables.text(found.advice).plain}", style="cyan")
        table.add_row(Text(found.state, style=STYLES[found.state]), found.check, text)
    counts = ", ".join(f"{sum(found.state == state for found in findings)} {state}" for state in STYLES)
    return Group(table, Text(counts))


# --- what the daemon's own packages are needed for --------------------------------------------------------------------


def _engine(args: argparse.Namespace) -> tuple[str | None, list[Finding]]:
    """What ``python -m tacod.tools.doctor`` finds, and the endpoint of a configuration that was named."""
    missing = [name for name in ("tacod", "pydantic", "psutil") if importlib.util.find_spec(name) is None]
    if missing:
        message = f"no {', '.join(missing)} in this environment, so GPUs, models and the configuration were not checked"
        advice = "run tacoctl from the daemon's environment, or `pip install 'taco-dit[daemon]'` here"
        return None, [warn("engine", message, advice)]
    options = [*(["--config", args.config] if args.config else []), *(["--no-bandwidth"] if args.no_bandwidth else [])]
    command = [sys.executable, "-m", "tacod.tools.doctor", *options]
    if endpoint := getattr(args, "endpoint", None):
        command += ["--endpoint", endpoint]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=PATIENCE_S, check=False
        )
        reply = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        advice = "a GPU or its driver may be stuck: see `nvidia-smi` and `dmesg`"
        return None, [fail("engine", f"the check of GPUs and packages did not end within {PATIENCE_S:g} s", advice)]
    except ValueError:
        last = (done.stderr.strip().splitlines() or ["no word"])[-1]
        advice = "run `python -m tacod.tools.doctor` to see all of it"
        return None, [fail("engine", f"the check of GPUs and packages ended with {done.returncode}: {last}", advice)]
    return reply["endpoint"] if args.config else None, [Finding(**found) for found in reply["findings"]]


# --- the daemon -------------------------------------------------------------------------------------------------------


def _socket(endpoint: str) -> Iterator[Finding]:
    """Whether this user may talk to the daemon."""
    if not endpoint.startswith("ipc://"):
        return
    path, user = Path(endpoint.removeprefix("ipc://")), _user()
    try:
        found = path.stat()
    except PermissionError:
        yield fail("socket", f"{user} may not enter {path.parent}", _join_group(path.parent))
        return
    except OSError as error:
        yield fail("socket", f"{path}: {error.strerror}", "start tacod, or name its endpoint in TACOD_ENDPOINT")
        return
    mode = stat.filemode(found.st_mode)
    if not stat.S_ISSOCK(found.st_mode):
        yield fail("socket", f"{path} is no socket", "name the daemon's endpoint in TACOD_ENDPOINT")
    elif not os.access(path, os.R_OK | os.W_OK):
        yield fail("socket", f"{user} may not use {path} ({mode})", _join_group(path))
    elif found.st_mode & stat.S_IWOTH:
        advice = f"`chmod o-rwx {path}`, and see who changed it: tacod makes it for its group alone"
        yield warn("socket", f"every user of this machine may use {path} ({mode})", advice)
    else:
        yield ok("socket", f"{path} ({mode}), {user} may use it")


def _join_group(path: Path) -> str:
    group = "tacod"
    with suppress(OSError, KeyError):
        group = grp.getgrgid(path.stat().st_gid).gr_name
    return f"`sudo usermod -aG {group} {_user()}`, then log in again"


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"


def _daemon(status: dict[str, Any], stats: dict[str, Any]) -> Iterator[Finding]:
    """What a running daemon reports about itself."""
    group, state = status["group"], status["state"]
    message = f"{state}, version {status['version']}, pid {status['pid']}, up {units.duration(status['uptime_s'])}"
    advice = {
        "starting": "wait; a load of large files takes its time, and the log says what it is doing",
        "draining": "it ends its work and takes no more; start it again after that",
        "degraded": "its ranks are being replaced or were given up; the log says which rank failed and why",
    }
    if state in advice:
        yield warn("daemon", message, advice[state])
    else:
        yield ok("daemon", message)
    ranks = f"{len(group['ranks'])} of {group['world_size']} ranks live, {group['restarts']} restarts"
    if len(group["ranks"]) < group["world_size"]:
        yield warn("ranks", ranks, "see the log for why they ended")
    elif group["restarts"]:
        yield warn("ranks", ranks, "see the log for why they were replaced")
    else:
        yield ok("ranks", ranks)
    done, parallel = stats["forwards_total"], stats["parallel_forwards_total"]
    message = f"{parallel} of {done} forwards ran on several ranks"
    if done and not parallel and any(each["world_size"] > 1 for each in status.get("groups") or [group]):
        yield warn("parallel", message, "clients ask for one rank, or images are small: `tacoctl plan FILE` says why")
    elif done:
        yield ok("parallel", message)


# --- the machine ------------------------------------------------------------------------------------------------------


def _system(pid: int | None) -> Iterator[Finding]:
    """Limits that the daemon runs under, or this shell's if it doesn't run; shared memory; the clock."""
    whose, limits = ("the daemon's", _limits(pid)) if pid is not None and _limits(pid) else ("this shell's", _limits())
    files = limits.get("Max open files")
    if files is not None and files < OPEN_FILES:
        yield warn(
            "open files", f"{whose} limit is {files:g}", "set LimitNOFILE=65536 in the unit, or `ulimit -n 65536`"
        )
    elif files is not None:
        yield ok("open files", f"{whose} limit is {files:g}")
    if any(Path("/sys/class").glob("infiniband/*")):
        locked = limits.get("Max locked memory", float("inf"))
        if locked < float("inf"):
            advice = "set LimitMEMLOCK=infinity in the unit: InfiniBand pins memory"
            yield warn("locked memory", f"{whose} limit is {units.size(locked)}", advice)
    yield from _shared_memory()
    built = Path(__file__).stat().st_mtime
    now = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    if time.time() < built - 86400:
        advice = "set it (`timedatectl set-ntp true`): changed model files are known by their times"
        yield warn("clock", f"it says {now}, which is before this program was installed", advice)
    else:
        yield ok("clock", now)


def _limits(pid: int | None = None) -> dict[str, float]:
    """The soft limits of a process, by the kernel's names; empty if it may not be looked at."""
    limits = {}
    with suppress(OSError):
        for line in Path("/proc", str(pid or "self"), "limits").read_text().splitlines()[1:]:
            name, soft = line[:26].strip(), line[26:47].strip()
            limits[name] = float("inf") if soft == "unlimited" else float(soft)
    return limits


def _shared_memory() -> Iterator[Finding]:
    try:
        found = os.statvfs("/dev/shm")
    except OSError as error:
        yield warn("/dev/shm", f"{error.strerror}", "mount a tmpfs there: NCCL and gloo may need it between ranks")
        return
    free = found.f_bavail * found.f_frsize
    if free < SHM_BYTES:
        advice = "give it 1 GiB or more (in a container: --shm-size=8g): without peer access NCCL goes through it"
        yield warn("/dev/shm", f"{units.size(free)} free", advice)
    else:
        yield ok("/dev/shm", f"{units.size(free)} free")

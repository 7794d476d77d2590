"""What a fault costs: from a rank's death to the retried result, from the daemon's to ready, from cancel to free.

    PYTHONPATH=tests python benchmarks/recovery.py [--rounds N] [--ranks N]

The daemon is a real one on CPU ranks, with a tiny Flux.1 and a tiny SD3 loaded. Each round is one fault; the table has
the median and the longest. What a rank's death costs is mostly the start of new ranks: the process group, the self-test
and the models.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from helpers import FLUX, SD3, START_S, Daemon, eventually, stopped

from tacod_client import Cancelled, Client

STEP_TIMEOUT_S = 4.0
HEARTBEAT_S = 1.0


def under_a_forward(daemon: Daemon, client: Client, number: int) -> float:
    """Send a rank a signal while a forward runs; seconds until the forward's result."""
    model = client.load(FLUX.file)
    victim = daemon.rank_pids()[-1]
    with ThreadPoolExecutor(1) as pool, daemon.client() as watcher:
        with stopped(victim):
            forward = pool.submit(FLUX.check, model)
            eventually(lambda: watcher.status()["queue"]["running"], 10, "the forward runs")
            began_s = time.monotonic()
            if number == signal.SIGKILL:
                os.kill(victim, number)
            forward.result(START_S)
        return time.monotonic() - began_s


def rank_killed(daemon: Daemon, client: Client) -> float:
    """SIGKILL."""
    return under_a_forward(daemon, client, signal.SIGKILL)


def rank_stopped(daemon: Daemon, client: Client) -> float:
    """SIGSTOP, which nothing but the deadline tells."""
    return under_a_forward(daemon, client, signal.SIGSTOP)


def noticed(daemon: Daemon, client: Client) -> float:
    """Seconds until the daemon says that its ranks are not all there."""
    with suppress(ProcessLookupError):
        os.kill(daemon.rank_pids()[0], signal.SIGKILL)
    began_s = time.monotonic()
    while client.status()["state"] != "degraded":
        pass
    took_s = time.monotonic() - began_s
    eventually(lambda: client.status()["state"] == "ready", START_S, "the ranks are back")
    return took_s


def daemon_killed(daemon: Daemon, client: Client) -> float:
    """SIGKILL, and at once the next start; seconds until it is ready, and no rank of the old one is left."""
    began_s = time.monotonic()
    daemon.signal(signal.SIGKILL)
    daemon.wait()
    daemon.start()
    took_s = time.monotonic() - began_s
    # The supervisor, the fork server and the ranks.
    assert len(daemon.processes()) == 2 + len(daemon.rank_pids())
    return took_s


def ranks_gone(daemon: Daemon, client: Client) -> float:
    """SIGKILL of the daemon; seconds until no rank is left."""
    began_s = time.monotonic()
    daemon.signal(signal.SIGKILL)
    daemon.wait()
    eventually(lambda: not daemon.processes(), 10, "no rank is left")
    took_s = time.monotonic() - began_s
    daemon.start()
    return took_s


def cancelled(daemon: Daemon, client: Client) -> float:
    """Cancel a run of SD3; seconds until the next forward, of Flux.1, is done."""
    model, other = client.load(SD3.file), client.load(FLUX.file)
    job = SD3.sample(model, 20000)
    next(iter(job))
    inputs = FLUX.inputs()
    began_s = time.monotonic()
    job.cancel()
    with suppress(Cancelled):
        job.result()
    other.forward(**inputs)
    return time.monotonic() - began_s


def client_killed(daemon: Daemon, client: Client) -> float:
    """A client that is gone without a word; seconds until its job is."""
    script = (
        "import sys, time; from helpers import SD3; from tacod_client import Client\n"
        "client = Client(sys.argv[1]); job = SD3.sample(client.load(SD3.file), 20000); next(iter(job))\n"
        "print('begun', flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", script, daemon.endpoint], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "begun\n"
        began_s = time.monotonic()
        other.kill()
        eventually(lambda: not client.jobs(), 30, "its job is gone")
        return time.monotonic() - began_s


ROWS: dict[str, Callable[[Daemon, Client], float]] = {
    "a rank is killed, until that is known": noticed,
    "a rank is killed under a forward, until the same result": rank_killed,
    f"a rank stands still under a forward (`group.step_timeout_s` = {STEP_TIMEOUT_S:g})": rank_stopped,
    "the daemon is killed, until no rank is left": ranks_gone,
    "the daemon is killed and started, until it is ready": daemon_killed,
    "a run is cancelled, until the next forward's result": cancelled,
    f"a client is killed, until its run is gone (`heartbeat_s` = {HEARTBEAT_S:g})": client_killed,
}


def main() -> int:
    """Have all of them, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ranks", type=int, default=2)
    args = parser.parse_args()
    settings = {
        "heartbeat_s": HEARTBEAT_S,
        "group.step_timeout_s": STEP_TIMEOUT_S,
        "group.max_restarts": 1000,
        # Restarts that follow each other soon are spaced out more and more; here each is the first of its window.
        "group.restart_window_s": 0.001,
    }
    with tempfile.TemporaryDirectory(prefix="tacod-") as models:
        for tiny in (FLUX, SD3):
            tiny.save(Path(models))
        with Daemon(args.ranks, [Path(models)], settings, cold=True) as daemon, daemon.client() as client:
            print(f"{args.ranks} CPU ranks, {os.cpu_count()} cores, {args.rounds} rounds\n")
            print("| from … | median | longest |\n| --- | --- | --- |")
            for name, measure in ROWS.items():
                taken = []
                for _ in range(args.rounds):
                    FLUX.check(client.load(FLUX.file))
                    taken.append(measure(daemon, client))
                print(f"| {name} | {shown(statistics.median(taken))} | {shown(max(taken))} |", flush=True)
    return 0


def shown(seconds: float) -> str:
    """A time, in a unit that fits."""
    return f"{1e3 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


if __name__ == "__main__":
    sys.exit(main())

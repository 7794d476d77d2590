"""When a forward is where, on its way from a client through the daemon to the ranks and back.

    python benchmarks/hops.py [--ranks N] [--calls N] [--idle MS]

This runs the embedded model on CPU ranks, to show what the daemon does. ``--idle 60`` sends what Flux.1 gets at 1024²
to ranks that compute nothing (`idle_rank.py`): they sleep for so long, and meanwhile the cores' caches are swept, as
other work would sweep them. ``rivals.py --hops`` does the same for its daemon rows, on GPUs. In the client, the
supervisor and rank 0, the functions that a forward passes are wrapped to note the time, on the one clock that all
processes of a machine share. That costs some microseconds for each. Under the hops stands how long each process runs
for a call, which other work on the machine changes less.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

NOTES = "TACOD_HOPS"
"""The environment variable that names the folder in which each process notes its times."""

IDLE = "TACOD_HOPS_IDLE"
"""The environment variable that has ranks sleep: for so many seconds a forward, and the pipe to write to meanwhile."""

SWEPT_BYTES = 8 << 20
"""What is copied on each core to sweep its caches."""

HOPS: dict[str, tuple[str, str, str]] = {
    "called": ("client", "before", "tacod_client.model:Model.forward"),
    "sent": ("client", "after", "tacod_client.connection:Connection.start"),
    "taken in": ("supervisor", "before", "tacod.serving.server:Server._on_message"),
    "checked and queued": ("supervisor", "after", "tacod.serving.server:Server._on_message"),
    "with the ranks": ("supervisor", "after", "tacod.group.group:RankGroup.run"),
    "read": ("rank 0", "after", "tacod.group.arena:Arena.unpack"),
    "on the device": ("rank 0", "after", "tacod.rank.engine:load_arguments"),
    "launched": ("rank 0", "after", "tacod.rank.forward.graphs:Forwards.__call__"),
    "completed": ("rank 0", "before", "tacod.rank.completion:Completion.send"),
    "back": ("client", "after", "tacod_client.shared:Shared.receive"),
    "computed, on the host": ("rank 0", "after", "tacod.rank.comm.clock:Clock.take_s"),
    "timed": ("rank 0", "after", "tacod.rank.engine:Engine._timed"),
    "answered": ("rank 0", "after", "tacod.group.arena:Arena.pack"),
    "answered by all ranks": ("supervisor", "before", "tacod.group.group:RankGroup._agree"),
    "noted": ("supervisor", "before", "tacod.serving.sessions:Sessions.send"),
    "answer back": ("client", "after", "tacod_client.frames:receive"),
    "returned": ("client", "after", "tacod_client.model:Model.forward"),
}
"""What has happened, in which process, and the function before or after which it has.

A completion is noted before it is sent: behind that its client may be quicker than the rank.
"""

ANSWER = ("computed, on the host", "timed", "answered", "answered by all ranks", "noted")
"""The way of the answer, which is beside the way of a forward whose client hears of a completion."""


# --- in each process --------------------------------------------------------------------------------------------------


def note(process: str) -> None:
    """Wrap the functions that a forward passes in this process."""
    path = Path(os.environ[NOTES], f"{os.getpid()}")
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    targets: dict[str, dict[str, int]] = {}
    for number, (where, moment, target) in enumerate(HOPS.values()):
        if where == process:
            targets.setdefault(target, {})[moment] = number
    for target, moments in targets.items():
        module, _, path_in_it = target.partition(":")
        owner: Any = importlib.import_module(module)
        *outer, name = path_in_it.split(".")
        for each in outer:
            owner = getattr(owner, each)
        setattr(owner, name, _noting(getattr(owner, name), file, moments))


def _noting(function: Callable[..., Any], file: int, moments: Mapping[str, int]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if "before" in moments:
            os.write(file, b"%d %d\n" % (time.monotonic_ns(), moments["before"]))
        result = function(*args, **kwargs)
        # To look for a message in vain is no hop.
        if "after" in moments and (result is not None or function.__name__ != "receive"):
            os.write(file, b"%d %d\n" % (time.monotonic_ns(), moments["after"]))
        return result

    return wrapper


def serve_daemon(config: str) -> int:
    """Run tacod itself, and its ranks by this file."""
    note("supervisor")
    from tacod import daemon
    from tacod.group.fork_server import MODULE

    start = subprocess.Popen

    def popen(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        assert command[1:3] == ["-m", MODULE]
        return start([command[0], __file__, *command[3:]], **options)

    with mock.patch("tacod.group.fork_server.subprocess.Popen", popen):
        return daemon.main(["--config", config])


def serve_ranks() -> None:
    """Be the fork server; the first rank notes its times."""
    from tacod.group import fork_server

    load = fork_server.load

    def load_noting(device: str) -> Callable[[list[str]], None]:
        run = load(device)
        if IDLE in os.environ:
            import idle_rank

            seconds, _, pipe = os.environ[IDLE].partition(" ")
            run = functools.partial(idle_rank.run, sleep_s=float(seconds), pipe=pipe)

        def run_noting(arguments: list[str]) -> None:
            if arguments[arguments.index("--rank") + 1] == "0":
                note("rank 0")
            run(arguments)

        return run_noting

    with mock.patch.object(fork_server, "load", load_noting):
        fork_server.main()


# --- the client's side ------------------------------------------------------------------------------------------------


@contextmanager
def noting() -> Iterator[Path]:
    """Within, daemons that this process starts by this file note their times, and so does it."""
    with tempfile.TemporaryDirectory(prefix="tacod-hops-") as folder, mock.patch.dict(os.environ, {NOTES: folder}):
        note("client")
        yield Path(folder)


def read(folder: Path, since_ns: int, until_ns: int) -> dict[str, float]:
    """Milliseconds from each call's begin to each hop, medians over the calls that began in that time."""
    lines = [line.split() for each in folder.iterdir() for line in each.read_text().splitlines()]
    notes = sorted((int(at), int(number)) for at, number in lines)
    begins = [at for at, number in notes if number == 0 and since_ns <= at < until_ns]
    reached: dict[int, list[float]] = {}
    ends = [*begins[1:], until_ns]
    places = {name: number for number, name in enumerate(HOPS)}
    answer = [places[name] for name in ANSWER]
    beside = {*answer, places["answer back"]}
    for begin, end in zip(begins, ends, strict=True):
        noted = [each for each in notes if begin <= each[0] < end]
        course = _course([each for each in noted if each[1] not in beside])
        if (completed := course.get(places["completed"])) is not None:
            # The answer may be under way when the next call begins, and that of the call before was when this one did.
            behind = [each for each in notes if each[0] > completed]
            for number in answer:
                times = [at for at, each in behind if each == number]
                course |= {number: times[0]} if times else {}
        else:
            course = _course(noted)
        for number, at in course.items():
            reached.setdefault(number, []).append((at - begin) / 1e6)
    return {name: statistics.median(reached[number]) for number, name in enumerate(HOPS) if number in reached}


def _course(notes: list[tuple[int, int]]) -> dict[int, int]:
    """When a call came to each hop, by the hop's number.

    What happens more than once, such as a forward that is captured too, counts when it has happened for the last time
    before the same process's next hop, and before the call's end. So a message beside the call, such as a client's ping
    while it waits, counts for nothing.
    """
    course: dict[int, int] = {}
    end = max((at for at, each in notes if each == len(HOPS) - 1), default=None)
    until: dict[str, int | None] = {}
    for number, (process, _, _) in reversed(list(enumerate(HOPS.values()))):
        limit = until.get(process, end)
        times = [at for at, each in notes if each == number and (limit is None or at <= limit)]
        if times:
            until[process] = course[number] = max(times)
    return course


def show(hops: Mapping[str, float]) -> None:
    """Print where a forward is when, and how long each hop took; nothing if none was noted.

    Behind a completion the answer has a way of its own, which stands below.
    """
    if not hops:
        return
    print(f"  {'':12}{'':24}{'at ms':>9}{'took ms':>9}")
    beside = ANSWER if "completed" in hops else ()
    for names in ([name for name in hops if name not in beside], [name for name in hops if name in beside]):
        before = hops["completed"] if names and names[0] in beside else 0.0
        for name in names:
            print(f"  {HOPS[name][0]:12}{name:24}{hops[name]:9.3f}{hops[name] - before:9.3f}")
            before = hops[name]


def cpu_ms(pid: int) -> float:
    """Milliseconds that the threads of a process have run."""
    files = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(each.read_text().split()[0]) for each in files) / 1e6


def embedded_inputs() -> tuple[Path, dict[str, Any]]:
    """The embedded model and a forward's arguments."""
    import torch

    from tacod import embedded

    context, y = embedded.encode(embedded.PROMPTS[0])
    x = torch.randn(1, 16, 32, 32, generator=torch.Generator().manual_seed(0))
    return embedded.PATH, {"x": x, "timestep": torch.tensor([500.0]), "context": context, "y": y}


def flux_inputs() -> dict[str, Any]:
    """What Flux.1 gets at 1024²."""
    import torch

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()

    small = {"timestep": torch.tensor([0.5]), "guidance": torch.tensor([3.5])}
    return {"x": randn(1, 16, 128, 128), "context": randn(1, 512, 4096), "y": randn(1, 768), **small}


@contextmanager
def idle_ranks(folder: Path, sleep_s: float) -> Iterator[None]:
    """Within, daemons that this process starts by this file have ranks that sleep, and the caches are swept then."""
    pipe = str(folder / "sweep")
    os.mkfifo(pipe)
    with mock.patch.dict(os.environ, {IDLE: f"{sleep_s} {pipe}"}):
        sweeper = subprocess.Popen([sys.executable, __file__, "--sweep", pipe])
        try:
            yield
        finally:
            sweeper.kill()
            sweeper.wait()


def sweep(pipe: str) -> None:
    """For each byte that comes, fill the caches of all cores with something else."""
    import numpy as np

    def copy(core: int) -> None:
        os.sched_setaffinity(threading.get_native_id(), {core})
        here, there = np.ones(SWEPT_BYTES, np.uint8), np.ones(SWEPT_BYTES, np.uint8)
        while True:
            asked[core].acquire()
            here[:] = there

    asked = {core: threading.Semaphore(0) for core in os.sched_getaffinity(0)}
    for core in asked:
        threading.Thread(target=copy, args=(core,), daemon=True).start()
    # Open for writing too, the pipe has no end when a lost rank's end of it closes: the next one writes on.
    with open(pipe, "r+b", buffering=0) as file:
        while file.read(1):
            for each in asked.values():
                each.release()


def main() -> None:
    """Measure on CPU ranks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--calls", type=int, default=40)
    parser.add_argument("--idle", type=float, metavar="MS", help="ranks that sleep, and Flux.1's tensors at 1024²")
    options = parser.parse_args()
    import wire

    with ExitStack() as stack:
        notes = stack.enter_context(noting())
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="tacod-"))
        if options.idle is not None:
            stack.enter_context(idle_ranks(Path(folder), options.idle / 1000))
            path, inputs = wire.save_echo(Path(folder)), flux_inputs()
        else:
            path, inputs = embedded_inputs()
        command = (__file__, "--daemon")
        client = stack.enter_context(wire.tacod(Path(folder, "d"), options.ranks, path.parent, *command))
        model = client.load(str(path))
        for _ in range(5):
            model.forward(**inputs)
        status = client.status()
        pids = {"client": os.getpid(), "supervisor": status["pid"], "rank 0": status["group"]["ranks"][0]["pid"]}
        before = {name: cpu_ms(pid) for name, pid in pids.items()}
        since_ns = time.monotonic_ns()
        for _ in range(options.calls):
            model.forward(**inputs)
        ended_ns = time.monotonic_ns()
        after = {name: cpu_ms(pid) for name, pid in pids.items()}
        show(read(notes, since_ns, ended_ns))
        for name in pids:
            print(f"  {name:12}{'computes for a call, ms':33}{(after[name] - before[name]) / options.calls:9.3f}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--daemon"]:
        sys.exit(serve_daemon(sys.argv[-1]))
    elif sys.argv[1:2] == ["--sweep"]:
        sweep(sys.argv[2])
    elif sys.argv[1:2] in (["cpu"], ["cuda"]):
        serve_ranks()
    else:
        main()

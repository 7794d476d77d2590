"""Ours beside diffusers and xfuser: one forward, the same weights, side by side in one process group and one run.

    python benchmarks/rivals.py [--models flux,sd35_large,pixart] [--sizes 1024,2048] [--ranks N | --gpus 1,2,3]
                               [--rows one,planned,…] [--without compiled] [--rounds 7] [--reference]
                               [--json FILE] [--plot FILE]

Models have the shapes of the published ones and random weights, in bf16 on GPUs; on a CPU they are cut to a few narrow
blocks. First the ranks measure what runs in them, one model and one row at a time; when they have ended, a daemon of
our own loads the same weights from a file, and a client measures it. A row that can't run says why, and the others go
on. The errors are relative: against ours on one GPU, and with --reference against the same weights in fp32.
NCCL_P2P_DISABLE=1 gives the table for cards without peer access.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import os
import platform
import queue as queues
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import hops
import numpy as np
import plans
import theirs
import torch
import torch.distributed as dist
from rivals_report import LABELS, OURS, Step, make_case, show_about, show_case
from safetensors.torch import load_file, save_file
from served import daemon, write_model
from torch import Tensor, multiprocessing

from tacod import __version__
from tacod.group.processes import ON_GPUS
from tacod.plan import AUTO, AttentionPolicy, Layout, Plan, Shape, make_plan
from tacod.rank.comm import int8, process_groups
from tacod.rank.comm.select import reach
from tacod.rank.families.base import DiT
from tacod.rank.families.inputs import Inputs
from tacod.rank.forward.graphs import Forwards
from tacod.rank.forward.run import Call
from tacod.rank.ops import fused, linear, qkv, quantize_rows
from tacod.rank.parallel.topology import Topology
from tacod.rank.weights.fp8 import quantize_blocks
from tacod.rank.weights.load import share
from tacod_client import Client
from tacod_client.stats import PARTS, ModelStats

HERE = Path(__file__).parent
WARM_UPS = 3
"""The first makes what is made once, the second a CUDA graph."""
PATIENCE_S = 300.0
"""How long one row, with its compilation, may take before its ranks are ended."""
GRACE_S = 20.0
"""How long the others may go on with a row that a rank has failed in; they may wait for it in a collective."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ONE_RANK = {"sequence_parallel_degree": 1, "cfg_parallel": False}

PEERS = ("diffusers", "compiled", "context", "xfuser", "xfuser-batch")
SERVED = ("daemon-one", "daemon")
ALONE = ("plain", "one", "fp8-one", "diffusers", "compiled")
"""Rows that rank 0 runs while the others wait."""
HALVES = ("batch", "xfuser-batch")
"""Rows for a batch of two on an even number of ranks."""


# --- in the ranks -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """What one group of ranks is to do."""

    model: str
    sizes: tuple[int, ...]
    steps: tuple[Step, ...]
    ranks: int
    rounds: int
    dtype: str | None
    folder: str
    tensors_on: str
    """The device of the client's tensors."""


class Bench:
    """One rank's model, inputs and groups."""

    def __init__(self, job: Job, rank: int, device: torch.device, topology: Topology) -> None:
        self.job, self.rank, self.device, self.topology = job, rank, device, topology
        self.dtype = DTYPES[job.dtype] if job.dtype else None
        self.config = plans.configuration(job.model, device)
        self.forwards, self.alone = Forwards(topology), Forwards(Topology())

    @cached_property
    def dit(self) -> DiT:
        """The model whose weights all rows share."""
        self.__dict__.pop("exact", None)
        self.tidy()
        return plans.build(self.job.model, self.device, self.dtype)

    @cached_property
    def exact(self) -> DiT:
        """The same in fp32, for as long as `dit` isn't there."""
        return plans.build(self.job.model, self.device, self.dtype).float()

    @cached_property
    def fp8(self) -> DiT:
        """The same with its matrices in fp8."""
        twin = share(self.dit)
        quantize_blocks(twin)
        return twin

    def inputs(self, pixels: int) -> dict[str, Any]:
        """A forward's arguments at this size."""
        return plans.make_inputs(self.job.model, self.dit, pixels, self.device)

    def tidy(self) -> None:
        """Give back what the last row held."""
        self.forwards.clear()
        self.alone.clear()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def wait(self) -> None:
        """Until the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    @property
    def peak_bytes(self) -> int:
        """Of device memory in this row, the weights included; on a CPU, of the process so far."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    # --- rows -----------------------------------------------------------------------------------------------------

    def forward(self, pixels: int, row: str) -> tuple[Callable[[], Tensor], str] | None:
        """A row's forward and what it is like; None if it is the same as the planned one."""
        inputs = self.inputs(pixels)
        world = self.topology.world_size
        if row in PEERS:
            given = (self.dit, self.config, inputs)
            make: dict[str, Callable[[], Callable[[], Tensor]]] = {
                "diffusers": lambda: theirs.eager(*given),
                "compiled": lambda: theirs.compiled(*given),
                "context": lambda: theirs.context_parallel(*given, world),
                "xfuser": lambda: theirs.xfuser(*given, world, False),
                "xfuser-batch": lambda: theirs.xfuser(*given, world, True),
            }
            return make[row](), ""
        shape = Shape(self.dit.heads, self.dit.width, len(inputs["x"]), self.dit.lengths(inputs))
        planned = make_plan(AUTO, world, shape)
        dit = self.fp8 if row.startswith("fp8") else self.dit
        alone = Plan(Layout(1, 1, 1), 1, shape)
        if row == "plain":
            return plainly(ours(dit, alone, Forwards(Topology(), graphs=False), inputs)), ""
        if row in ("one", "fp8-one"):
            return ours(dit, alone, self.alone, inputs), ""
        layout = {"sequence": Layout(1, world, 1), "batch": Layout(2, world // 2, 1)}.get(row, planned.layout)
        if (row in ("sequence", "batch") and layout == planned.layout) or (row == "int8" and layout.ulysses == 1):
            return None
        policy = AttentionPolicy(exchange="int8") if row == "int8" else AttentionPolicy()
        return ours(dit, Plan(layout, world, shape, policy), self.forwards, inputs), str(layout)

    def measure(self, pixels: int, row: str) -> dict[str, Any] | None:
        """The milliseconds of each round, and of the first call with all its compiling; None to leave it out."""
        self.dit  # noqa: B018  before the peak is counted
        if not row.startswith("fp8"):
            self.__dict__.pop("narrow", None)
        self.tidy()
        found = self.forward(pixels, row)
        if found is None:
            return None
        forward, plan = found
        times = []
        for _ in range(WARM_UPS + self.job.rounds):
            self.wait()
            started = time.perf_counter()
            out = forward()
            self.wait()
            times.append((time.perf_counter() - started) * 1000)
        if self.rank == 0:
            self.keep(f"{pixels}-{row}", {"out": out.float()})
        return {"first_ms": times[0], "times_ms": times[WARM_UPS:], "plan": plan}

    def refer(self, pixels: int) -> None:
        """The forward that all others round: the same weights and inputs in fp32."""
        low = self.dtype or (torch.bfloat16 if self.device.type == "cuda" else torch.float32)
        inputs = plans.make_inputs(self.job.model, self.exact, pixels, self.device, low)
        plan = Plan(Layout(1, 1, 1), 1, Shape(self.exact.heads, self.exact.width))
        given = {key: value.float() for key, value in inputs.items()}
        self.keep(f"{pixels}-reference", {"out": ours(self.exact, plan, self.alone, given)()})

    def save(self) -> None:
        """Weights as a file that describes itself, and the inputs of each size."""
        for pixels in self.job.sizes:
            self.keep(f"{pixels}-inputs", self.inputs(pixels))
        write_model(Path(self.job.folder, "model.safetensors"), self.dit.state_dict(), self.config)

    def keep(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Tensors as a file, for the one that compares them."""
        kept = {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}
        save_file(kept, Path(self.job.folder, f"{name}.safetensors"))


def ours(dit: DiT, plan: Plan, forwards: Forwards, inputs: Mapping[str, Any]) -> Callable[[], Tensor]:
    """Our forward by a plan."""
    call = Call(dit, plan, Inputs(inputs, dit.arguments()))

    def forward() -> Tensor:
        out = forwards(call)
        assert isinstance(out, Tensor)
        return out

    return forward


def plainly(forward: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """A forward without any kernel of ours."""

    def plain() -> Tensor:
        with ExitStack() as stack:
            for module in (fused, int8, linear, qkv, quantize_rows):
                stack.enter_context(mock.patch.object(module, "has_kernels", _none_has))
            return forward()

    return plain


def _none_has(x: Tensor) -> bool:
    # No mock, which would remember, and so keep, every tensor.
    return False


def rank_main(rank: int, job: Job, tell: Any) -> None:
    """One rank's life. It tells how each step went, and waits for the others before the next."""
    warnings.filterwarnings("ignore")
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // job.ranks))
    rendezvous, patience = f"file://{job.folder}/rendezvous", timedelta(seconds=PATIENCE_S)
    dist.init_process_group(
        "nccl" if cuda else "gloo", init_method=rendezvous, world_size=job.ranks, rank=rank, timeout=patience
    )
    topology = Topology(
        rank,
        job.ranks,
        process_groups.join(device, rank, job.ranks, rendezvous, local_rank=rank if cuda else 0),
        reach if cuda else None,
    )
    talk = dist.new_group(backend="gloo", timeout=patience)

    def gather(value: Any) -> list[Any]:
        each: list[Any] = [None] * job.ranks
        dist.all_gather_object(each, value, group=talk)
        return each

    bench = Bench(job, rank, device, topology)
    devices = gather(_device(device))
    if rank == 0:
        tell.put(("about", _about(devices)))
    with torch.inference_mode():
        for step in job.steps:
            pixels, row = step
            if rank == 0:
                tell.put(("begin", step))
            told: dict[str, Any] | None = None
            problem = None
            try:
                if rank == 0 and row == "reference":
                    bench.refer(pixels)
                    told = {}  # done, though no row
                elif rank == 0 and row == "save":
                    bench.save()
                elif row in LABELS and (rank == 0 or row not in ALONE):
                    told = bench.measure(pixels, row)
            except Exception as error:
                problem = _words(error)
                tell.put(("failed", step, f"{problem} (rank {rank})" if rank else problem))
            problems = [each for each in gather(problem) if each is not None]
            peaks = gather(bench.peak_bytes)
            bench.tidy()
            if rank == 0 and not problems:
                peaks = peaks[:1] if row in ALONE else peaks
                tell.put(("done", step, told and {**told, "peak_bytes": peaks}))
            elif rank == 0:
                tell.put(("done", step, {"reason": problems[0]}))
    gather(None)
    process_groups.leave()


def _words(error: Exception) -> str:
    text = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {text[:120]}"


def _device(device: torch.device) -> dict[str, Any]:
    if device.type == "cpu":
        return {"name": platform.processor() or platform.machine(), "gpu": None, "peers": []}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpu = visible.split(",")[device.index] if visible else str(device.index)
    others = [index for index in range(torch.cuda.device_count()) if index != device.index]
    peers = [index for index in others if torch.cuda.can_device_access_peer(device.index, index)]
    return {"name": torch.cuda.get_device_name(device), "gpu": gpu, "peers": peers}


def _about(devices: list[dict[str, Any]]) -> dict[str, Any]:
    versions = {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "xfuser")}
    about: dict[str, Any] = {"tacod": __version__, "python": platform.python_version(), **versions, "devices": devices}
    if torch.cuda.is_available():
        import pynvml

        pynvml.nvmlInit()
        about["driver"] = pynvml.nvmlSystemGetDriverVersion()
        about["cuda"], about["nccl"] = torch.version.cuda, ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
        pynvml.nvmlShutdown()
    else:
        about["cores"] = os.cpu_count()
    about["NCCL_P2P_DISABLE"] = os.environ.get("NCCL_P2P_DISABLE", "0")
    return about


# --- the ranks, from outside ------------------------------------------------------------------------------------------


def run_ranks(job: Job, results: dict[Step, dict[str, Any]], about: dict[str, Any]) -> None:
    """Do all steps; a group that is lost is started again for those that are left. Also tells what the ranks are."""
    steps = job.steps
    while steps:
        left = run_group(Job(**{**vars(job), "steps": steps}), results, about)
        if len(left) == len(steps):
            for step in left:
                results[step] = {"reason": "the ranks did not start"}
            break
        steps = left


def run_group(job: Job, results: dict[Step, dict[str, Any]], about: dict[str, Any]) -> tuple[Step, ...]:
    """One group's life; returns the steps that it left."""
    Path(job.folder, "rendezvous").unlink(missing_ok=True)
    tell: Any = multiprocessing.get_context("spawn").Queue()
    group = multiprocessing.spawn(rank_main, (job, tell), job.ranks, join=False)  # type: ignore[attr-defined,no-untyped-call]
    steps = list(job.steps)
    try:
        _follow(group, tell, job, steps, results, about)
    finally:
        for process in group.processes:
            process.kill()
            process.join()
    return tuple(steps)


def _follow(
    group: Any, tell: Any, job: Job, steps: list[Step], results: dict[Step, dict[str, Any]], about: dict[str, Any]
) -> None:
    """Take down what the ranks tell, and those of the steps that are done."""
    deadline, ended = time.monotonic() + PATIENCE_S, None
    current: Step | None = None
    failed: str | None = None
    while steps and ended is None:
        try:
            kind, *rest = tell.get(timeout=0.5)
        except queues.Empty:
            ended = _ended(group) or (f"stuck after {PATIENCE_S:g} s" if time.monotonic() > deadline else None)
            continue
        if kind == "about":
            about.update(rest[0])
        elif kind == "begin":
            current, failed, deadline = rest[0], None, time.monotonic() + PATIENCE_S
        elif kind == "failed":
            failed, deadline = rest[1], min(deadline, time.monotonic() + GRACE_S)
        else:
            step, result = rest
            steps.remove(step)
            current, deadline = None, time.monotonic() + PATIENCE_S
            if result is not None:
                results[step] = result
            report(job.model, step, result or {})
    if ended is not None and current is not None:
        steps.remove(current)
        results[current] = {"reason": failed or ended}
        report(job.model, current, results[current])
    elif ended is None:
        deadline = time.monotonic() + GRACE_S
        while any(process.is_alive() for process in group.processes) and time.monotonic() < deadline:
            time.sleep(0.1)


def _ended(group: Any) -> str | None:
    """How a rank ended before its time."""
    try:
        return "the ranks ended" if group.join(timeout=0) else None
    except Exception as error:
        return f"a rank ended: {str(error).strip().splitlines()[-1][:120]}"


def report(model: str, step: Step, result: Mapping[str, Any]) -> None:
    """A line on stderr, so that one sees it go on."""
    pixels, row = step
    times = result.get("times_ms")
    said = result.get("reason") or (f"{np.median(times):.1f} ms" if times else "done, or as planned")
    print(f"  {time.strftime('%H:%M:%S')} {model} {pixels}² {row}: {said}", file=sys.stderr, flush=True)


# --- through the daemon -----------------------------------------------------------------------------------------------


class Split(ModelStats):
    """The parts of the last call's time, in milliseconds."""

    def add(self, answer: Mapping[str, Any], elapsed_s: float) -> None:
        """Keep them."""
        super().add(answer, elapsed_s)
        self.parts = {part: 1000 * getattr(self.last, f"{part}_s") for part in PARTS}


def run_daemon(
    job: Job, gpus: Sequence[str], steps: Sequence[Step], results: dict[Step, dict[str, Any]], hop_by_hop: bool
) -> None:
    """The served rows, one call after another as a client has them."""
    try:
        with ExitStack() as stack:
            notes = stack.enter_context(hops.noting()) if hop_by_hop else None
            command = (hops.__file__, "--daemon") if hop_by_hop else ("-m", "tacod.daemon", "--config")
            started_s: float | None = time.monotonic()
            client = stack.enter_context(Client(stack.enter_context(daemon(gpus, job.ranks, job.folder, command))))
            for step in steps:
                try:
                    results[step] = serve(client, job, step, notes, started_s)
                except Exception as error:
                    results[step] = {"reason": _words(error)}
                started_s = None
                report(job.model, step, results[step])
    except Exception as error:
        for step in steps:
            results.setdefault(step, {"reason": _words(error)})
            report(job.model, step, results[step])


def serve(client: Client, job: Job, step: Step, notes: Path | None, started_s: float | None) -> dict[str, Any]:
    """One served row; with ``notes`` of every hop, where a call is when, with ``started_s`` of the start too."""
    pixels, row = step
    inputs = load_file(Path(job.folder, f"{pixels}-inputs.safetensors"), device=job.tensors_on)
    plan = ONE_RANK if row == "daemon-one" else "auto"
    restarts = client.status()["group"]["restarts"]
    model = client.load("model.safetensors", plan=plan, dtype=job.dtype)
    model.stats = stats = Split()
    calls = []
    since_ns, answered_s = 0, 0.0
    for call in range(WARM_UPS + job.rounds):
        if call == WARM_UPS:
            since_ns = time.monotonic_ns()
        started = time.perf_counter()
        out = model.forward(**inputs)
        ms = (time.perf_counter() - started) * 1000
        model.settle()
        calls.append((ms, stats.parts))
        answered_s = answered_s or time.monotonic()
    ended_ns = time.monotonic_ns()
    group = client.status()["group"]
    if group["restarts"] != restarts:
        raise RuntimeError("the daemon lost its ranks and began anew; its errors stand at the end")
    times = [ms for ms, _ in calls]
    # The split of the call that took the median time adds up, as medians of parts need not.
    middle = sorted(calls[WARM_UPS:], key=lambda call: call[0])[job.rounds // 2]
    save_file({"out": out.cpu().float().contiguous()}, Path(job.folder, f"{pixels}-{row}.safetensors"))
    told = next(told for told in client.models() if told["id"] == model.id)
    return {
        **({"cold_s": answered_s - started_s} if started_s is not None else {}),
        "first_ms": times[0],
        "times_ms": times[WARM_UPS:],
        "plan": stats.plan,
        "peak_bytes": [rank["memory_used_bytes"] for rank in group["ranks"]],
        "load_s": told["loaded_s"],
        "load_bytes_per_s": told["weight_bytes"] / max(told["loaded_s"], 1e-9),
        "split_ms": middle[1],
        "split_of_ms": middle[0],
        "hops_ms": hops.read(notes, since_ns, ended_ns) if notes is not None else {},
    }


# --- the command ------------------------------------------------------------------------------------------------------


def run_model(name: str, options: argparse.Namespace, gpus: Sequence[str]) -> tuple[dict[str, Any], list[Any], bool]:
    """All rows of a model; returns what the machine is, a case for each size, and whether it was let end."""
    sizes = [int(size) for size in options.sizes.split(",")]
    batch = plans.MODELS[name][2]
    rows = [row for row in options.rows if _fits(row, batch, options.ranks)]
    served = [row for row in rows if row in SERVED]
    steps = [(pixels, "reference") for pixels in sizes if options.reference]
    # Ours at all sizes first: what we compile serves all of them, and a rival's compiling throws it away.
    for some in (OURS, PEERS):
        steps += [(pixels, row) for pixels in sizes for row in rows if row in some]
    steps += [(sizes[0], "save")] if served else []
    results: dict[Step, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="rivals-", dir=_room(name, options)) as folder:
        job = Job(
            name, tuple(sizes), tuple(steps), options.ranks, options.rounds, options.dtype, folder, options.tensors_on
        )
        about: dict[str, Any] = {}
        whole = False
        with suppress(KeyboardInterrupt):
            run_ranks(job, results, about)
            if served:
                run_daemon(job, gpus, [(pixels, row) for pixels in sizes for row in served], results, options.hops)
            whole = True
        return about, [make_case(name, pixels, rows, results, Path(folder), options) for pixels in sizes], whole


def _fits(row: str, batch: int, ranks: int) -> bool:
    if row in HALVES:
        return batch > 1 and ranks % 2 == 0
    return ranks > 1 or row not in ("planned", "sequence", "int8", "fp8", "context", "xfuser", "daemon")


def _room(name: str, options: argparse.Namespace) -> str:
    """A folder for the weights, in memory if there is room."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with torch.device("meta"):
        model = plans.MODELS[name][0](plans.configuration(name, device))
    width = 4 if options.dtype == "fp32" or device.type == "cpu" else 2
    need = width * sum(weight.numel() for weight in model.state_dict().values()) + (1 << 28)
    folders = [options.folder] if options.folder else ["/dev/shm", tempfile.gettempdir()]
    for folder in folders:
        if shutil.disk_usage(folder).free > need:
            return str(folder)
    raise SystemExit(f"rivals: none of {', '.join(folders)} has {need / 2**30:.1f} GiB free; name one by --folder")


def _commit() -> str:
    command = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--exclude=*"]
    with suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return "unknown"


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    devices = parser.add_mutually_exclusive_group()
    devices.add_argument("--ranks", type=int, help="how many (default: every GPU, or 2 on a CPU)")
    devices.add_argument("--gpus", metavar="1,2,3", help="one rank on each, as nvidia-smi numbers them")
    parser.add_argument("--models", default=",".join(plans.MODELS))
    parser.add_argument("--sizes", default="1024,2048", help="in pixels, square")
    parser.add_argument("--rows", default=",".join(LABELS), help=f"of {', '.join(LABELS)}")
    parser.add_argument("--without", default="", metavar="ROWS", help="leave these out")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--reference", action="store_true", help="errors against fp32 too; Flux takes 48 GB for it")
    parser.add_argument(
        "--tensors-on",
        default="cpu",
        metavar="cuda:0",
        help="the device of the client's tensors, as ComfyUI's have one",
    )
    parser.add_argument("--hops", action="store_true", help="where a served call is when, process by process")
    parser.add_argument("--dtype", choices=DTYPES, help="default bf16 on GPUs, fp32 on a CPU")
    parser.add_argument("--folder", help="for the weights' file (default /dev/shm, or a temporary one)")
    parser.add_argument("--commit", default=_commit(), help=argparse.SUPPRESS)
    parser.add_argument("--json", metavar="FILE", help="write all of it there, too")
    parser.add_argument("--plot", metavar="FILE", help="and a picture of it, as PNG; needs matplotlib")
    options = parser.parse_args()
    rows, without = options.rows.split(","), options.without.split(",") if options.without else []
    for what, names, known in (("model", options.models.split(","), plans.MODELS), ("row", rows + without, LABELS)):
        for name in names:
            if name not in known:
                parser.error(f"no {what} {name!r}; there are {', '.join(known)}")
    options.rows = [row for row in LABELS if row in rows and row not in without]
    return options


def main() -> None:
    """Measure each model, and tell."""
    options = _parse()
    # Whoever ends it gets what there is, and no daemon stays behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if options.plot:
        from rivals_plot import plot
    # Threads that spin while they wait are slow where ranks share cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    # As the daemon's ranks have it.
    os.environ.update(ON_GPUS)
    if options.gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = options.gpus
    gpus: list[str] = []
    if torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = visible.split(",") if visible else [str(index) for index in range(torch.cuda.device_count())]
    options.ranks = options.ranks or len(gpus) or 2
    gpus = gpus[: options.ranks]
    told: dict[str, Any] = {"about": {"commit": options.commit, "ranks": options.ranks}, "cases": []}
    for number, name in enumerate(options.models.split(",")):
        about, cases, whole = run_model(name, options, gpus)
        told["about"] |= about
        told["cases"] += cases
        if number == 0 and about:
            show_about(told["about"])
        for case in cases:
            show_case(case)
        if options.json:
            Path(options.json).write_text(json.dumps(told, indent=2))
        if not whole:
            sys.exit("ended before all was measured")
    if options.plot:
        plot(Path(options.plot), told)


if __name__ == "__main__":
    main()

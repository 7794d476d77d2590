"""Published models on one GPU by ComfyUI's own network, and by ours on one to all, in one run.

    [COMFYUI_PATH=…] python benchmarks/families.py [--ranks 1,2,3,4] [--models flux,z_image] [--rounds 7] [--served 1,3]
                                                   [--sizes 1024] [--long] [--folder DIR]

Each has random bf16 weights, the same for all. Ours runs as in the daemon, by CUDA graphs and with the planner's
layout; with --served through a daemon and a client as well, on so many GPUs. TMPDIR then holds the models' files.
Errors are relative to our forward on one GPU in fp32, where that has room. ``--long`` is for videos: there are no CUDA
graphs, as a daemon has none for forwards of half a second and more, one forward warms up, and errors are relative to
our bf16 on one GPU, as fp32 takes minutes. With ``--folder`` what is found stays in a folder that exists, and later
runs add to it: several models can be measured at once, a GPU each, and then on two GPUs. On a CPU the models are cut to
a block or two, and ComfyUI's network is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from published import PUBLISHED, Published, Size, build, fill, make_inputs
from served import daemon, write_model
from torch import Tensor, multiprocessing

from tacod.group.processes import ON_GPUS
from tacod.plan import AUTO, Shape, make_plan
from tacod.rank.comm import process_groups
from tacod.rank.comm.select import reach
from tacod.rank.families import detect
from tacod.rank.families.base import DiT, Output
from tacod.rank.families.inputs import Inputs
from tacod.rank.forward.graphs import Forwards
from tacod.rank.forward.run import Call
from tacod.rank.parallel.sequence import SequenceParallel
from tacod.rank.parallel.topology import Topology
from tacod_client import Client

WARM_UPS = 4
"""Forwards before one is measured: as they come, captured, and replayed."""
ROOM = 0.6
"""The part of a GPU's memory that fp32 weights may take."""


def main() -> None:
    """Run ComfyUI's networks, then ours on each number of ranks, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", default=",".join(str(n + 1) for n in range(torch.cuda.device_count() or 2)))
    parser.add_argument("--models", default=",".join(PUBLISHED))
    parser.add_argument("--sizes", default="", help="1024 or 832x480x81, …; by default each model's own")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--long", action="store_true", help="forwards of seconds")
    parser.add_argument("--served", default="", help="numbers of GPUs that a daemon has, such as 1,3")
    parser.add_argument("--folder", help="keep what is found here, and add it to what earlier runs found")
    parser.add_argument("--comfyui", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.comfyui:
        comfyui(args)
        return
    os.environ.update(ON_GPUS)
    counts = list(map(int, args.ranks.split(",")))
    served = [int(count) for count in args.served.split(",") if count]
    if served and counts[0] != 1 and not args.folder:
        parser.error("--served takes its inputs from one rank: let --ranks begin with 1")
    with nullcontext(args.folder) if args.folder else tempfile.TemporaryDirectory() as folder:
        args.folder = folder
        for count in counts:
            rendezvous = f"{folder}/rendezvous{count}-{os.getpid()}"
            multiprocessing.spawn(rank_main, (args, count, rendezvous), count)  # type: ignore[attr-defined,no-untyped-call]
            if count == 1 and "COMFYUI_PATH" in os.environ and torch.cuda.is_available():
                for name in (name for name in args.models.split(",") if PUBLISHED[name].comfyui):
                    sys.stdout.flush()
                    subprocess.run([sys.executable, *sys.argv, "--folder", folder, "--comfyui", name], check=False)
        for count in served:
            serve(args, count)
        show(args, Path(folder))


def sizes_of(args: argparse.Namespace, name: str) -> Sequence[Size]:
    """The sizes that were asked for, or the model's own."""
    return list(map(Size.parse, args.sizes.split(","))) if args.sizes else PUBLISHED[name].sizes


def warm_ups(args: argparse.Namespace) -> int:
    """How many forwards come before the measured ones."""
    return 1 if args.long else WARM_UPS


def times_of(forward: Callable[[], Any], rounds: int, before: int = WARM_UPS) -> float:
    """The median of so many forwards, in ms."""
    took = []
    for number in range(before + rounds):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        started = time.perf_counter()
        forward()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if number >= before:
            took.append((time.perf_counter() - started) * 1000)
    return statistics.median(took)


def note(folder: str, name: str, size: Size, kind: str, **values: Any) -> None:
    """Keep what was found of one case."""
    Path(folder, f"{name}.{size}.{kind}.json").write_text(json.dumps(values))


def joined(out: Output) -> Tensor:
    """An output, or several as one row of all their numbers."""
    return torch.cat([each.flatten() for each in out]) if isinstance(out, list) else out


def exact_file(folder: str, name: str, size: Size) -> Path:
    """Where the output is that errors are relative to."""
    return Path(folder, f"{name}.{size}.exact.pt")


def error_of(folder: str, name: str, size: Size, output: Output) -> float | None:
    """How far an output is from the one that errors are relative to, if there is one."""
    out = joined(output)
    file = exact_file(folder, name, size)
    if not file.exists():
        return None
    exact = torch.load(file)
    return float((out.float().cpu() - exact).norm() / exact.norm())


def rank_main(rank: int, args: argparse.Namespace, count: int, rendezvous: str) -> None:
    """One rank's life; rank 0 keeps what is found."""
    cuda = torch.cuda.is_available()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // count))
    make_group = process_groups.join(device, rank, count, rendezvous, local_rank=rank if cuda else 0)
    forwards = Forwards(Topology(rank, count, make_group, reach if cuda else None), graphs=not args.long)
    with torch.inference_mode():
        for name in args.models.split(","):
            if count == 1:
                keep_exact(args, name, device)
            model = build(name, device, torch.bfloat16 if cuda else torch.float32)
            if (args.served or args.folder) and count == 1:
                config = {**PUBLISHED[name].config, **({} if cuda else PUBLISHED[name].cut)}
                write_model(Path(args.folder, f"{name}.safetensors"), model.state_dict(), config)
            for size in sizes_of(args, name):
                inputs = model.prepare(make_inputs(name, model, size, device))
                shape = Shape(model.heads, model.width, inputs.batch, model.lengths(inputs))
                call = Call(model, make_plan(AUTO, count, shape), inputs)
                if cuda:
                    torch.cuda.reset_peak_memory_stats()
                ms = times_of(lambda call=call: forwards(call), args.rounds, warm_ups(args))  # type: ignore[misc]
                if rank == 0:
                    out = forwards(call)
                    if count == 1 and args.long:
                        torch.save(joined(out).float().cpu(), exact_file(args.folder, name, size))
                    error = error_of(args.folder, name, size, out)
                    plan = str(call.plan)
                    note(args.folder, name, size, str(count), ms=ms, error=error, plan=plan)
                    print(f"{name} {size} on {count}: {ms:.1f} ms, {plan}", flush=True)
                else:
                    forwards(call)
                if cuda:
                    peak = f"{torch.cuda.max_memory_allocated() / 2**30:.1f}"
                    Path(args.folder, f"{name}.{size}.{count}.peak{rank}").write_text(peak)
                forwards.clear()
            del model, call, inputs
            if cuda:
                torch.cuda.empty_cache()
    process_groups.leave()


def keep_exact(args: argparse.Namespace, name: str, device: torch.device) -> None:
    """Keep the inputs in the compute dtype, and the output in fp32 if that is asked for and has room."""
    low = torch.bfloat16 if device.type == "cuda" else torch.float32
    parameters = sum(value.numel() for value in _shaped(PUBLISHED[name], device).values())
    fits = device.type == "cpu" or 4 * parameters < ROOM * torch.cuda.mem_get_info()[1]
    fits = fits and not args.long
    model = build(name, device if fits else torch.device("meta"), low)
    if fits:
        # The same rounded weights, computed with in fp32.
        model = model.float()
    for size in sizes_of(args, name):
        # A model on the meta device has arguments and sizes.
        inputs = make_inputs(name, model, size, device).map(lambda each: each.to(low) if each.ndim > 1 else each)
        torch.save(dict(inputs.map(torch.Tensor.cpu)), f"{args.folder}/{name}.{size}.inputs.pt")
        if fits:
            exact = model.run(SequenceParallel(), model.prepare(inputs.map(torch.Tensor.float)))
            torch.save(joined(exact).float().cpu(), exact_file(args.folder, name, size))
    del model
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _shaped(model: Published, device: torch.device) -> dict[str, Tensor]:
    family, config = detect({}, {**model.config, **(model.cut if device.type == "cpu" else {})})
    with torch.device("meta"):
        return family(config).state_dict()


def stock(name: str, device: torch.device) -> Any:
    """ComfyUI's own model, a ``comfy.model_base.BaseModel`` with the same weights as ours; takes the command line."""
    sys.argv = sys.argv[:1]
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    from comfy import supported_models

    model = PUBLISHED[name]
    assert model.comfyui is not None
    config = getattr(supported_models, model.comfyui)(dict(model.config))
    config.set_inference_dtype(torch.bfloat16, None)
    base = config.get_model({}, "", device=device).eval().requires_grad_(False).to(device)
    family: type[DiT] = detect({}, dict(model.config))[0]
    weights = base.diffusion_model.state_dict(keep_vars=True)
    fill({family.canonical(key): value.data for key, value in weights.items()})
    return base


def comfyui(args: argparse.Namespace) -> None:
    """ComfyUI's network of one model, in a process of its own."""
    name, device = args.comfyui, torch.device("cuda")
    model = PUBLISHED[name]
    network = stock(name, device).diffusion_model
    with torch.inference_mode():
        for size in sizes_of(args, name):
            given = torch.load(f"{args.folder}/{name}.{size}.inputs.pt")
            given = dict(Inputs(given, {}).map(lambda each: each.to(device)))
            x, timestep, rest = given.pop("x"), given.pop("timestep"), {**given, **model.extra}

            def forward(x: Any = x, timestep: Any = timestep, rest: dict[str, Any] = rest) -> Output:
                # Some networks change the list that they get.
                latents = list(x) if isinstance(x, list) else x
                out: Output = network(latents, timestep, **rest, transformer_options={})
                return out

            torch.cuda.reset_peak_memory_stats()
            ms = times_of(forward, args.rounds, warm_ups(args))
            note(args.folder, name, size, "comfyui", ms=ms, error=error_of(args.folder, name, size, forward()))
            peak = f"{torch.cuda.max_memory_allocated() / 2**30:.1f}"
            Path(args.folder, f"{name}.{size}.comfyui.peak").write_text(peak)
            print(f"{name} {size} by ComfyUI's network: {ms:.1f} ms", flush=True)


def serve(args: argparse.Namespace, count: int) -> None:
    """Each case through a daemon on so many GPUs, as a client sees it: its tensors are on the CPU."""
    cuda = torch.cuda.is_available()
    with (
        daemon(list(map(str, range(count))) if cuda else [], count, args.folder) as endpoint,
        Client(endpoint) as client,
    ):
        for name in args.models.split(","):
            model = client.load(f"{name}.safetensors")
            for size in sizes_of(args, name):
                inputs = torch.load(f"{args.folder}/{name}.{size}.inputs.pt")
                ms = times_of(lambda model=model, inputs=inputs: model.forward(**inputs), args.rounds, warm_ups(args))  # type: ignore[misc]
                error = error_of(args.folder, name, size, model.forward(**inputs))
                note(args.folder, name, size, f"served{count}", ms=ms, error=error)
                print(f"{name} {size} through a daemon with {count}: {ms:.1f} ms", flush=True)
            client.unload(model.id)


def show(args: argparse.Namespace, folder: Path) -> None:
    """Print a row for each case: times, their ratios to ComfyUI's and to one rank's, memory and errors."""
    files = {file.name.removesuffix(".json"): json.loads(file.read_text()) for file in folder.glob("*.json")}
    kinds = {name.rpartition(".")[2] for name in files}
    counts = sorted(int(kind) for kind in kinds if kind.isdigit())
    served = sorted(int(kind.removeprefix("served")) for kind in kinds if kind.startswith("served"))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"\n{max(counts)} × {device}, torch {torch.__version__}; ms of a forward, medians of {args.rounds}\n")
    ours = {str(count): f"{count} GPU{'s' * (count > 1)}" for count in counts}
    ours |= {f"served{count}": f"{count} GPU{'s' * (count > 1)}, served" for count in served}
    columns = {"comfyui": "ComfyUI", **ours}
    heads = ["model", "size", *columns.values(), *(f"error, {each}" for each in columns.values())]
    heads += ["peak GiB, ComfyUI", *(f"peak GiB, {each}" for each in map(ours.get, map(str, counts)))]
    print(f"| {' | '.join(heads)} |\n|{' --- |' * len(heads)}")
    for case in sorted({name.rpartition(".")[0] for name in files}):
        found = {kind: files.get(f"{case}.{kind}", {"ms": None, "error": None}) for kind in columns}
        stock, alone = found["comfyui"]["ms"], found.get("1", {"ms": None})["ms"]
        row = [*case.rsplit(".", 1), "–" if stock is None else f"{stock:.1f}"]
        for kind in ours:
            ms = found[kind]["ms"]
            ratios = [f"{base / ms:.2f}×" for base in (stock, alone if kind != "1" else None) if base and ms]
            row.append("–" if ms is None else f"{ms:.1f} ({', '.join(ratios)})" if ratios else f"{ms:.1f}")
        row += ["–" if each["error"] is None else f"{each['error']:.1e}" for each in found.values()]
        for kind in ("comfyui", *map(str, counts)):
            row.append(", ".join(file.read_text() for file in sorted(folder.glob(f"{case}.{kind}.peak*"))) or "–")
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()

"""Forwards of a model whose weights don't stay whole on each GPU, beside those of the whole model, in one run.

    [COMFYUI_PATH=…] python benchmarks/residency.py [--models flux,qwen_image] [--ranks 1,3] [--sizes 1024,2048]
        [--gib 12,8] [--kinds replicated,sharded,host,auto,comfyui] [--no-peers] [--rounds 7]

Weights are random. Each model is loaded by a daemon on so many GPUs: whole, shared out among the GPUs, in the host's
memory, and with ``auto`` for each of ``--gib`` of weights on each GPU. Beside what the daemon says that weights take on
a GPU stands by how much the driver's own figure grew while they were loaded, the most of all GPUs, and by how much it
had grown after the forwards; and by how much the host's available memory shrank. Times are followed by how many times
the whole model's they are, if ``replicated`` was measured before. With ``comfyui`` ComfyUI's network runs on one GPU as
well, offloaded by its own ModelPatcher to the same GiB; its figures are PyTorch's, of the weights and at most. TMPDIR
holds the models' files. On CPUs the models are cut to a block or two.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from families import sizes_of, stock, times_of, warm_ups
from published import PUBLISHED, build, make_inputs
from served import daemon, write_model

from tacod.group.processes import ON_GPUS
from tacod.rank.comm.peers import DISABLED
from tacod_client import Client
from tacod_client.errors import TacodError

KINDS = ("replicated", "sharded", "host", "auto")


def main() -> None:
    """Write each model, load it in each way on each number of GPUs, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="flux")
    parser.add_argument("--ranks", default="1,3")
    parser.add_argument("--sizes", default="", help="1024 or 832x480x81, …; by default each model's own")
    parser.add_argument("--gib", default="12", help="GiB of weights on each GPU, for auto")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--long", action="store_true", help="forwards of seconds: one warms up")
    parser.add_argument("--no-peers", action="store_true", help="as if the GPUs didn't reach each other's memory")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--comfyui", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.comfyui:
        offloaded(args)
        return
    cuda = torch.cuda.is_available()
    with_comfyui = "comfyui" in args.kinds.split(",")
    if with_comfyui and not (cuda and "COMFYUI_PATH" in os.environ):
        parser.error("comfyui needs a GPU and COMFYUI_PATH, the folder of a ComfyUI")
    os.environ.update(ON_GPUS)
    if args.no_peers:
        os.environ[DISABLED] = "1"
    device = torch.cuda.get_device_name() if cuda else "CPU"
    rows: list[list[str]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in args.models.split(","):
            inputs = write(name, args, Path(folder))
            for count in map(int, args.ranks.split(",")):
                rows += measure(name, args, count, folder, inputs)
            if with_comfyui and PUBLISHED[name].comfyui:
                sys.stdout.flush()
                command = [sys.executable, *sys.argv, "--comfyui", name]
                subprocess.run(command, check=True, env={**os.environ, "FOLDER": folder})
                rows += json.loads(Path(folder, "comfyui.json").read_text())
            Path(folder, f"{name}.safetensors").unlink()
    print(
        f"\n{device}, torch {torch.__version__}; ms of a forward through daemon and client, medians of {args.rounds}\n"
    )
    heads = ["model", "GPUs", "weights", "GiB on a GPU", "GiB fetched", "load s"]
    heads += ["GiB on a GPU, loaded", "GiB on a GPU, after", "GiB of the host", "ms (times the whole model's)"]
    print(f"| {' | '.join(heads)} |\n|{' --- |' * len(heads)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def offloaded(args: argparse.Namespace) -> None:
    """ComfyUI's network with so many GiB for weights on its GPU, in a process of its own; keeps a row for each."""
    name, device = args.comfyui, torch.device("cuda")
    base = stock(name, device)
    from comfy.model_patcher import ModelPatcher

    base.to("cpu")
    torch.cuda.empty_cache()
    rows = []
    for gib in map(float, args.gib.split(",")):
        patcher = ModelPatcher(base, device, torch.device("cpu"))
        torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        patcher.load(device, lowvram_model_memory=int(gib * 2**30))
        took_s = time.perf_counter() - started
        loaded, times = torch.cuda.memory_allocated() / 2**30, []
        for size in sizes_of(args, name):
            given = make_inputs(name, build(name, torch.device("meta"), torch.bfloat16), size, device)
            values = {**given, **PUBLISHED[name].extra}
            x, timestep = values.pop("x"), values.pop("timestep")

            def forward(x: Any = x, timestep: Any = timestep, rest: dict[str, Any] = values) -> Any:
                with torch.inference_mode():
                    return base.diffusion_model(x, timestep, **rest, transformer_options={})

            times.append(f"{size}: {times_of(forward, args.rounds, warm_ups(args)):.1f}")
        peak = torch.cuda.max_memory_allocated() / 2**30
        rows.append([name, "1", f"ComfyUI ({gib:g} GiB)", f"{loaded:.2f}", "–", f"{took_s:.1f}", "–", f"{peak:.2f}"])
        rows[-1] += ["–", ", ".join(times)]
        print(" ".join(rows[-1]), flush=True)
        patcher.unpatch_model(torch.device("cpu"))
    Path(os.environ["FOLDER"], "comfyui.json").write_text(json.dumps(rows))


def used(gpus: int) -> list[int]:
    """Bytes in use: of the host, then of each GPU by its driver."""
    memory = psutil.virtual_memory()
    free = [torch.cuda.mem_get_info(gpu) for gpu in range(gpus)]
    return [memory.total - memory.available, *(total - left for left, total in free)]


def write(name: str, args: argparse.Namespace, folder: Path) -> dict[str, dict[str, Any]]:
    """Write a model's file; returns the inputs of a forward of each size."""
    cuda = torch.cuda.is_available()
    device, dtype = torch.device("cuda" if cuda else "cpu"), torch.bfloat16 if cuda else torch.float32
    model = build(name, device, dtype)
    config = {**PUBLISHED[name].config, **({} if cuda else PUBLISHED[name].cut)}
    write_model(folder / f"{name}.safetensors", model.state_dict(), config)
    inputs = {
        str(size): dict(make_inputs(name, model, size, torch.device("cpu")).items()) for size in sizes_of(args, name)
    }
    del model
    if cuda:
        torch.cuda.empty_cache()
    return inputs


def measure(
    name: str, args: argparse.Namespace, count: int, folder: str, inputs: dict[str, dict[str, Any]]
) -> list[list[str]]:
    """A row for each way to load the model on so many GPUs."""
    rows: list[list[str]] = []
    whole: dict[str, float] = {}
    gpus = list(map(str, range(count))) if torch.cuda.is_available() else []
    kinds: list[tuple[str, float | None]] = [
        (kind, None) for kind in args.kinds.split(",") if kind not in ("auto", "comfyui")
    ]
    kinds += [("auto", float(gib)) for gib in args.gib.split(",") if "auto" in args.kinds.split(",")]
    for kind, gib in kinds:
        limit = None if gib is None else int(gib * 2**30)
        with daemon(gpus, count, folder, memory_bytes=limit) as endpoint, Client(endpoint) as client:
            before = used(len(gpus))
            try:
                model = client.load(f"{name}.safetensors", weights=kind)
            except TacodError as error:
                rows.append([name, str(count), kind, error.message])
                continue
            loaded, told = used(len(gpus)), client.models()[0]
            row = [name, str(count), told["weights"] + (f" ({gib:g} GiB)" if gib else "")]
            row += [f"{max(told[key]) / 2**30:.2f}" for key in ("resident_bytes", "streamed_bytes")]
            times = []
            for size, given in inputs.items():
                ms = times_of(lambda model=model, given=given: model.forward(**given), args.rounds, warm_ups(args))  # type: ignore[misc]
                if told["weights"] == "replicated":
                    whole.setdefault(size, ms)
                ratio = f" ({ms / whole[size]:.2f}×)" if size in whole else ""
                times.append(f"{size}: {ms:.1f}{ratio}")
            grown = [[now - then for now, then in zip(each, before, strict=True)] for each in (loaded, used(len(gpus)))]
            row += [f"{told['loaded_s']:.1f}"]
            row += [f"{max(each[1:], default=0) / 2**30:.2f}" for each in grown]
            row += [f"{grown[0][0] / 2**30:.2f}", ", ".join(times)]
            rows.append(row)
            print(" ".join(row), flush=True)
    return rows


if __name__ == "__main__":
    main()

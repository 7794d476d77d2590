"""What it takes to put a LoRA on a model and to change its strength, beside loading the whole model.

A Flux-shaped model of random weights and a LoRA file on all of its matrices, through daemon and client.

    python benchmarks/patches.py [--gib 1.0] [--ranks N] [--rank 16] [--share 1.0]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import memory
import torch
from safetensors.torch import save_file
from served import daemon

from tacod.checkpoint import read_checkpoint
from tacod_client import Client


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=1.0, help="size of the model's file, bf16")
    parser.add_argument("--ranks", type=int, default=max(torch.cuda.device_count(), 1))
    parser.add_argument("--rank", type=int, default=16, help="of the LoRA")
    parser.add_argument("--share", type=float, default=1.0, help="of the matrices that the LoRA patches")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tacod-") as name:
        folder = Path(name)
        path, size = memory.write(folder, "bf16", args.gib)
        patched = write_lora(path, folder / "lora.safetensors", args.rank, args.share)
        gpus = list(map(str, range(args.ranks))) if torch.cuda.is_available() else []
        with daemon(gpus, args.ranks, name) as endpoint, Client(endpoint) as client:
            rows = measure(client, path.name)
    print(f"{size / 2**30:.2f} GiB in bf16, {args.ranks} ranks, a LoRA of rank {args.rank} on {patched} matrices")
    whole = rows[0][1]
    for what, seconds, held in rows:
        print(f"{what:36s} {seconds:7.2f} s {seconds / whole:6.2f} of a full load {held / 2**20:8.0f} MiB on each rank")


def write_lora(model: Path, path: Path, rank: int, share: float) -> int:
    """A LoRA on a share of the model's matrices; returns how many."""
    generator = torch.Generator().manual_seed(0)
    matrices = [(key, info.shape) for key, info in read_checkpoint(str(model)).tensors.items() if len(info.shape) == 2]
    chosen = matrices[: round(len(matrices) * share)]
    tensors: dict[str, torch.Tensor] = {}
    for key, (rows, columns) in chosen:
        module = key.removesuffix(".weight")
        tensors[f"diffusion_model.{module}.lora_A.weight"] = torch.randn(rank, columns, generator=generator).bfloat16()
        tensors[f"diffusion_model.{module}.lora_B.weight"] = torch.randn(rows, rank, generator=generator).bfloat16()
    save_file(tensors, path)
    return len(chosen)


def measure(client: Client, file: str) -> list[tuple[str, float, int]]:
    """Seconds of each load, and the memory that it added."""
    rows = []
    for what, strength in (
        ("full load", None),
        ("the LoRA put on", 0.8),
        ("its strength changed", 0.5),
        ("and back", 0.8),
    ):
        patches: list[Any] | None = None if strength is None else [{"path": "lora.safetensors", "strength": strength}]
        started = time.perf_counter()
        model = client.load(file, dtype="bf16", patches=patches)
        seconds = time.perf_counter() - started
        held = next(told["weight_bytes"] for told in client.models() if told["id"] == model.id)
        rows.append((what, seconds, held))
    return rows


if __name__ == "__main__":
    main()

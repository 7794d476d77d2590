"""What loading a model takes of host memory and time, for each kind of file.

A Flux-shaped model of random weights is written to a temporary folder and loaded by a fresh process, which watches its
own memory meanwhile. Anonymous memory is the process's own; file-backed memory is pages that the kernel can drop.

    python benchmarks/memory.py [--gib 1.0] [--device cpu|cuda] [--kinds fp32 folder bf16 fp8 Q8_0 Q4_K]
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MIB = 1 << 20
KINDS = ("fp32", "folder", "bf16", "fp8", "Q8_0", "Q4_K")
WIDTH = 2048
CONFIG = {
    "_class_name": "FluxTransformer2DModel",
    "num_attention_heads": 16,
    "attention_head_dim": 128,
    "num_layers": 1,
    "guidance_embeds": True,
}
SHARDS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=1.0, help="size of each file")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--kinds", nargs="*", default=KINDS, choices=KINDS)
    parser.add_argument("--load", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load:
        print(json.dumps(measure(args.load, args.device)))
        return
    columns = ("kind", "file MiB", "weights MiB", "anon peak", "over", "file-backed", "pinned/GPU", "load s")
    print("".join(f"{name:>13}" for name in columns))
    for kind in args.kinds:
        with tempfile.TemporaryDirectory() as folder:
            path, size = write(Path(folder), kind, args.gib)
            command = [sys.executable, __file__, "--load", str(path), "--device", args.device]
            told = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        expected = told["weights"] if args.device == "cpu" else 0
        over = (told["anon"] - expected) / size
        row = (size, told["weights"], told["anon"])
        print(
            f"{kind:>13}" + "".join(f"{value / MIB:13.0f}" for value in row) + f"{over:13.1%}"
            f"{told['file'] / MIB:13.0f}{told['device'] / MIB:13.0f}{told['seconds']:13.2f}"
        )


# --- one load, watched ------------------------------------------------------------------------------------------------


def measure(path: str, device: str) -> dict[str, float]:
    """Load a model and tell the most memory that was taken over what was taken before."""
    import torch

    from tacod.checkpoint import read_checkpoint
    from tacod.rank.weights.load import DTYPES, choose_dtype, load_model, weight_bytes

    torch.zeros(1, device=device)
    before, most = memory(), {"anon": 0, "file": 0}
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            for name, value in memory().items():
                most[name] = max(most[name], value - before[name])

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    checkpoint = read_checkpoint(path)
    kind = torch.device(device)
    model = load_model(checkpoint, DTYPES[choose_dtype(checkpoint, dtype_of(path), kind)], kind)
    if kind.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    done.set()
    watcher.join()
    used = torch.cuda.max_memory_allocated() if kind.type == "cuda" else 0
    return {**most, "weights": weight_bytes(model), "device": used, "seconds": seconds}


def dtype_of(path: str) -> str | None:
    """The file's own for plain files, so that weights and file are of one size."""
    return {"bf16.safetensors": "bf16", "fp32.safetensors": "fp32"}.get(Path(path).name)


def memory() -> dict[str, int]:
    """Resident anonymous and file-backed bytes of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return {name: int(fields[key].split()[0]) << 10 for name, key in (("anon", "RssAnon"), ("file", "RssFile"))}


# --- files ------------------------------------------------------------------------------------------------------------


def write(folder: Path, kind: str, gib: float) -> tuple[Path, int]:
    """Write a model of about this size; returns its path and its bytes."""
    from published import PUBLISHED

    from tacod.checkpoint.header import BLOCKS

    bytes_each = {"fp32": 4, "folder": 4, "bf16": 2, "fp8": 1}.get(kind) or BLOCKS[kind][1] / BLOCKS[kind][0]
    block = 15 * WIDTH**2 * bytes_each
    single = max(1, round((gib * (1 << 30) - 3 * block) / block))
    sizes = {"hidden_size": WIDTH, "num_heads": WIDTH // 128, "depth": 1, "depth_single_blocks": single}
    described = {**PUBLISHED["flux"].config, **sizes}
    if kind == "folder":
        path = folder / "folder"
        write_folder(path, {**CONFIG, "num_single_layers": single}, described)
    elif kind in BLOCKS:
        path = folder / f"{kind}.gguf"
        write_gguf(path, kind, described)
    else:
        path = folder / f"{kind}.safetensors"
        write_safetensors(path, kind, weights(described), {"tacod.config": json.dumps(described)})
    files = path.iterdir() if path.is_dir() else [path]
    return path, sum(file.stat().st_size for file in files)


def weights(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the single file."""
    import torch

    from tacod.rank.families import detect

    family, config = detect({}, config)
    with torch.device("meta"):
        for name, tensor in family(config).state_dict().items():
            yield name, tuple(tensor.shape)


def write_safetensors(
    path: Path, kind: str, shapes: Iterator[tuple[str, tuple[int, ...]]], metadata: dict[str, str]
) -> None:
    """Tensor by tensor, so that this process stays small."""
    dtypes = {"fp32": ("F32", 4), "bf16": ("BF16", 2), "fp8": ("F8_E4M3", 1)}
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, shape in shapes:
        dtype, size = dtypes[kind] if len(shape) > 1 or kind != "fp8" else dtypes["bf16"]
        start, end = end, end + size * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    raw = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        write_noise(file, end)


def write_noise(file: Any, size: int) -> None:
    """Bytes that are small numbers in every dtype."""
    piece = bytes(range(48, 56)) * (MIB // 8)
    for _ in range(size // MIB):
        file.write(piece)
    file.write(piece[: size % MIB])


def write_folder(path: Path, config: dict[str, Any], described: dict[str, Any]) -> None:
    from tacod.rank.families import detect

    family, described = detect({}, described)
    shapes = dict(weights(described))
    layout = family.diffusers_layout(described)
    theirs = {
        name: shapes[place.key] if place.rows is None else (place.rows[1], *shapes[place.key][1:])
        for name, place in layout.items()
    }
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    weight_map: dict[str, str] = {}
    for shard in range(SHARDS):
        name = f"diffusion_pytorch_model-{shard + 1:05}-of-{SHARDS:05}.safetensors"
        mine = list(theirs.items())[shard::SHARDS]
        write_safetensors(path / name, "fp32", iter(mine), {})
        weight_map |= {key: name for key, _ in mine}
    index = {"metadata": {}, "weight_map": weight_map}
    (path / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


def write_gguf(path: Path, kind: str, described: dict[str, Any]) -> None:
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(path, "flux")
    writer.add_string("tacod.config", json.dumps(described))
    shapes = list(weights(described))
    qtype = gguf.GGMLQuantizationType[kind]
    numbers, size = gguf.GGML_QUANT_SIZES[qtype]
    for name, shape in shapes:
        row = (*shape[:-1], shape[-1] // numbers * size)
        if is_matrix(shape, numbers):
            writer.add_tensor_info(name, row, np.dtype(np.uint8), math.prod(row), raw_dtype=qtype)
        else:
            writer.add_tensor_info(name, shape, np.dtype(np.float32), 4 * math.prod(shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, shape in shapes:
        row = (*shape[:-1], shape[-1] // numbers * size if is_matrix(shape, numbers) else 4 * shape[-1])
        writer.write_tensor_data(np.full(row, 48, dtype=np.uint8))
    writer.close()


def is_matrix(shape: tuple[int, ...], numbers: int) -> bool:
    """Whether a tensor is of whole blocks, as tools quantize it."""
    return len(shape) > 1 and shape[-1] % numbers == 0


if __name__ == "__main__":
    main()

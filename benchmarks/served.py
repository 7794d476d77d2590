"""A daemon of a benchmark's own, and the model files that it loads, for other benchmarks."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tacod_client import Client, ConnectionFailed

__all__ = ["daemon", "write_model"]

START_S = 180.0
NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@contextmanager
def daemon(
    gpus: Sequence[str],
    ranks: int | Sequence[int],
    root: str,
    command: Sequence[str] = ("-m", "tacod.daemon", "--config"),
    memory_bytes: int | None = None,
    more: str = "",
    ray_address: str = "",
) -> Iterator[str]:
    """A tacod on these GPUs, or on so many CPU ranks if there are none; gives its endpoint.

    Several numbers of ``ranks`` are of as many groups, which take the GPUs in their order.
    ``more`` is what else its configuration says. With a ``ray_address`` there are as many ranks on that cluster, which
    chooses the GPUs.
    """
    with tempfile.TemporaryDirectory(prefix="tacod-") as folder:
        endpoint, config, log = f"ipc://{folder}/s", Path(folder, "c.toml"), Path(folder, "log")
        named = iter(int(gpu) if gpu.isdigit() else gpu for gpu in gpus)
        groups = ""
        for count in (len(gpus) or ranks,) if isinstance(ranks, int) else ranks:
            of_group = json.dumps(list(itertools.islice(named, count)))
            groups += f'[[group]]\ndevice = "{"cuda" if gpus else "cpu"}"\n'
            groups += f"gpus = {of_group}\n" if gpus and not ray_address else f"ranks = {count}\n"
            groups += f'launcher = "ray"\nray_address = "{ray_address}"\n' if ray_address else ""
        limit = "" if memory_bytes is None else f"memory_bytes = {memory_bytes}\n"
        config.write_text(f'endpoint = "{endpoint}"\n{groups}[models]\nroots = ["{root}"]\n{limit}{more}')
        with log.open("wb") as output:
            process = subprocess.Popen([sys.executable, *command, str(config)], stderr=output)
        try:
            deadline = time.monotonic() + START_S
            while not _is_ready(endpoint):
                if process.poll() is not None or time.monotonic() > deadline:
                    last = (log.read_text(errors="replace").strip().splitlines() or ["nothing"])[-1]
                    raise ConnectionFailed(f"tacod did not become ready; its last word was: {last}")
                time.sleep(0.1)
            yield endpoint
        finally:
            process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(60)
            process.kill()
            # What it was unhappy with, such as GPUs that don't reach each other.
            print(*re.findall(r".*(?:warning|error).*\n", log.read_text(errors="replace"), re.I), file=sys.stderr)


def log_of(endpoint: str) -> str:
    """What a `daemon` has logged so far."""
    return Path(endpoint.removeprefix("ipc://")).with_name("log").read_text(errors="replace")


def _is_ready(endpoint: str) -> bool:
    if not os.path.exists(endpoint.removeprefix("ipc://")):
        return False
    try:
        with Client(endpoint, timeout_s=1.0) as client:
            return bool(client.status()["state"] == "ready")
    except ConnectionFailed:
        return False


def write_model(path: Path, weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Weights on any device as a safetensors file that says its configuration."""
    header: dict[str, Any] = {"__metadata__": {"tacod.config": json.dumps(config)}}
    end = 0
    for key, weight in weights.items():
        start, end = end, end + weight.nbytes
        header[key] = {"dtype": NAMES[weight.dtype], "shape": list(weight.shape), "data_offsets": [start, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        # Through pinned memory, which a GPU fills many times as fast.
        staging = torch.empty(1 << 26, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        for weight in weights.values():
            for part in torch.split(weight.contiguous().view(-1).view(torch.uint8), len(staging)):
                staged = staging[: len(part)].copy_(part)
                file.write(staged.numpy().data)

"""The GPU lines of ``tacoctl doctor``: the driver, the devices, the links between them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tacod.config import ConfigError, Group
from tacod.group.processes import devices
from tacod_client.cli.doctor import Finding, fail, ok, warn
from tacod_client.units import size

__all__ = ["Gpu", "look"]

LINKS_S = 60.0
"""How long the measurement between GPUs may take."""
SLOW_LINK = 8e9
"""Bytes a second; PCIe 3.0 x16 gives about 12e9."""
SLOWED_BY = {
    "NCCL_P2P_DISABLE": "GPUs reach each other through host memory",
    "NCCL_SHM_DISABLE": "what ranks without peer access leave to NCCL uses the network",
    "NCCL_DEBUG": "NCCL writes to the log",
    "CUDA_LAUNCH_BLOCKING": "every kernel waits for the one before",
}


@dataclass(frozen=True)
class Gpu:
    """One GPU and its memory, in bytes."""

    device: str
    name: str
    free: int
    total: int
    capability: tuple[int, int]


def look(groups: Sequence[Group], status: Mapping[str, Any] | None, measure: bool) -> Iterator[Finding]:
    """Driver and CUDA, the GPUs that are there and configured, their memory, and the links between those of a group.

    ``status`` is a running daemon's: its memory is no fault, and its work is not disturbed.
    """
    try:
        of_groups = devices(groups)
    except ConfigError as error:
        yield fail("gpus", str(error), "`nvidia-smi` shows the GPUs that there are; group.gpus names those to use")
        return
    wanted = [gpu for of_group in of_groups for gpu in of_group]
    yield from _driver()
    gpus = _find(wanted)
    yield ok("gpus", f"{_count()} seen, {len(wanted)} wanted: {', '.join(wanted)}")
    for gpu in gpus:
        message = f"{gpu.name}, {size(gpu.free)} of {size(gpu.total)} free"
        if gpu.total < 8 << 30:
            yield warn(
                f"gpu {gpu.device}", message, "large models want 8 GiB and more on each: use 8-bit weights (fp8, GGUF)"
            )
        elif status is None and gpu.free < gpu.total / 2:
            yield warn(f"gpu {gpu.device}", message, "something else holds it: `nvidia-smi` says what")
        else:
            yield ok(f"gpu {gpu.device}", message)
    yield _int8(gpus)
    for name, effect in SLOWED_BY.items():
        if os.environ.get(name, "0") not in ("", "0"):
            yield warn(name, f"is set: {effect}", "unset it where tacod starts, unless it is meant")
    linked = [of_group for of_group in of_groups if len(of_group) > 1]
    if not linked:
        return
    if not measure:
        yield ok("links", "not measured")
    elif status is not None and status["queue"]["running"]:
        yield warn("links", "not measured, because the daemon is at work", "run this again when it is idle")
    elif any(gpu.free < 2 << 30 for gpu in gpus):
        yield warn(
            "links", "not measured: a GPU has less than 2 GiB free", "`tacoctl unload` a model, and run this again"
        )
    else:
        for of_group in linked:
            yield from _links(of_group)


def _int8(gpus: list[Gpu]) -> Finding:
    """What multiplies int8 models' layers."""
    from tacod.rank.ops.packed import kitchen

    others = [gpu.capability for gpu in gpus if kitchen.needed(gpu.capability)]
    if not others:
        return ok("int8", "int8 models are multiplied by the daemon's own kernels")
    if all(map(kitchen.serves, others)):
        return ok("int8", "int8 models are multiplied by comfy-kitchen's kernels")
    message = "int8 models are multiplied by PyTorch's operations, which are slower than bf16"
    advice = "`pip install 'taco-dit[daemon,quantised]'` adds comfy-kitchen's kernels; they need PyTorch for CUDA 13"
    return warn("int8", message, advice)


def _driver() -> Iterator[Finding]:
    import pynvml
    import torch

    pynvml.nvmlInit()
    driver = pynvml.nvmlSystemGetDriverVersion()
    code = pynvml.nvmlSystemGetCudaDriverVersion_v2()
    pynvml.nvmlShutdown()
    newest = (code // 1000, code % 1000 // 10)
    built = torch.version.cuda
    message = f"{driver}, for CUDA up to {newest[0]}.{newest[1]}; torch is built for {built or 'no CUDA'}"
    if built is None:
        yield fail("driver", message, "install a CUDA build of torch in the daemon's environment")
    elif int(built.split(".")[0]) > newest[0]:
        yield fail("driver", message, f"update the driver, or install torch for CUDA {newest[0]}")
    else:
        yield ok("driver", message)


def _count() -> int:
    import pynvml

    pynvml.nvmlInit()
    try:
        return int(pynvml.nvmlDeviceGetCount())
    finally:
        pynvml.nvmlShutdown()


def _find(wanted: list[str]) -> list[Gpu]:
    import pynvml

    pynvml.nvmlInit()
    try:
        found = []
        for device in wanted:
            by_index = device.isdigit()
            find = pynvml.nvmlDeviceGetHandleByIndex if by_index else pynvml.nvmlDeviceGetHandleByUUID
            handle = find(int(device) if by_index else device)
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
            major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
            name = str(pynvml.nvmlDeviceGetName(handle))
            found.append(Gpu(device, name, int(memory.free), int(memory.total), (int(major), int(minor))))
        return found
    finally:
        pynvml.nvmlShutdown()


def _links(wanted: list[str]) -> Iterator[Finding]:
    """What `tacod.tools.bandwidth` measures, in a process that can be ended if the driver hangs."""
    env = {**os.environ, "CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": ",".join(wanted)}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "tacod.tools.bandwidth"],
            env=env,
            capture_output=True,
            text=True,
            timeout=LINKS_S,
            check=True,
        )
    except subprocess.TimeoutExpired:
        advice = (
            "copies between GPUs hang: see `dmesg`; NCCL_P2P_DISABLE=1 or the BIOS's ACS and IOMMU settings may help"
        )
        yield fail("links", f"the measurement did not end within {LINKS_S:g} s", advice)
        return
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or ["no word"])[-1]
        yield fail("links", f"the measurement failed: {last}", "`nvidia-smi` and `dmesg` say more")
        return
    for link in json.loads(done.stdout):
        name = f"link {wanted[link['from']]} to {wanted[link['to']]}"
        message = f"{link['bytes_per_s'] / 1e9:.1f} GB/s, {'peer access' if link['peer'] else 'through host memory'}"
        if not link["intact"]:
            advice = (
                "set NCCL_P2P_DISABLE=1 for tacod: this machine's peer access loses data (IOMMU or ACS in the BIOS)"
            )
            yield fail(name, f"{message}, and what arrives is not what was sent", advice)
        elif not link["peer"]:
            yield warn(name, message, "nothing is wrong, but more GPUs pay off less; see docs/performance.md")
        elif link["bytes_per_s"] < SLOW_LINK:
            yield warn(name, message, "slow: see `nvidia-smi topo -m`, and whether each card has all of its PCIe lanes")
        else:
            yield ok(name, message)

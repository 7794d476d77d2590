"""The part of ``tacoctl doctor`` that needs the daemon's packages: configuration, packages, GPUs, models, memory.

Prints one JSON document: the configured endpoint and the findings.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from packaging.requirements import Requirement

from tacod.config import Config, ConfigError, load_config
from tacod.group import devices
from tacod.manifest import Manifest
from tacod_client import Client
from tacod_client.cli.doctor import Finding, fail, ok, warn
from tacod_client.cli.show import size
from tacod_client.connection import find_endpoint
from tacod_client.errors import TacodError

__all__ = ["main"]

DEFAULT_CONFIG = "/etc/tacod/config.toml"
ENGINE = ("torch", "xfuser", "diffusers")
"""Packages that get a line of their own."""
LINKS_S = 60.0
"""How long the measurement between GPUs may take."""
SPARE_BYTES = 4 << 30
SLOW_LINK = 8e9
"""Bytes a second; PCIe 3.0 x16 gives about 12e9."""
SLOWED_BY = {
    "NCCL_P2P_DISABLE": "GPUs reach each other through host memory",
    "NCCL_SHM_DISABLE": "ranks without peer access use the network",
    "NCCL_DEBUG": "NCCL writes to the log",
    "CUDA_LAUNCH_BLOCKING": "every kernel waits for the one before",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Print the findings; returns 0, whatever they are."""
    parser = argparse.ArgumentParser(prog="python -m tacod.doctor", description=__doc__)
    parser.add_argument("--config")
    parser.add_argument("--endpoint")
    parser.add_argument("--no-bandwidth", action="store_true")
    args = parser.parse_args(argv)
    config, known, findings = _configuration(args.config, args.endpoint)
    findings += _packages()
    findings += _groups()
    if config.group.device == "cuda":
        findings += _gpus(config, args.endpoint or config.endpoint, not args.no_bandwidth)
    if known:
        findings += _models(config)
    findings += _memory(config)
    findings += _caches(os.environ)
    print(json.dumps({"endpoint": config.endpoint, "findings": [found._asdict() for found in findings]}))
    return 0


def _configuration(path: str | None, endpoint: str | None) -> tuple[Config, bool, list[Finding]]:
    """The configuration and whether it is the daemon's; if not, as much as a running daemon tells of its own."""
    if path is None and not os.path.exists(DEFAULT_CONFIG):
        told = _status(endpoint or find_endpoint())
        found = warn("config", f"no {DEFAULT_CONFIG}; looked with the defaults", "pass --config FILE")
        if told is None:
            return Config.model_validate({}), False, [found]
        group = told["group"]
        values: dict[str, Any] = {"device": group["device"]}
        if group["device"] == "cpu":
            values["ranks"] = group["world_size"]
        else:
            names = [rank["device"] for rank in group["ranks"]]
            values["gpus"] = [int(name) if name.isdigit() else name for name in names] or None
        config = Config.model_validate({"endpoint": told["endpoint"], "group": values})
        message = f"no {DEFAULT_CONFIG}; looked with the running daemon's devices"
        return config, False, [found._replace(message=message)]
    path = path or DEFAULT_CONFIG
    try:
        config = load_config(path)
    except ConfigError as error:
        lines = str(error).splitlines()
        advice = (
            f"mend it; `tacod --config {path} --check-config` looks again. The rest was looked at with the defaults"
        )
        return Config.model_validate({}), False, [fail("config", line, advice) for line in lines]
    group = config.group
    what = f"gpus {group.gpus or 'all'}" if group.device == "cuda" else f"{group.ranks} ranks"
    return config, True, [ok("config", f"{path}: {group.device}, {what}")]


def _status(endpoint: str) -> dict[str, Any] | None:
    with suppress(TacodError), Client(endpoint, timeout_s=2.0, reconnect_s=2.0) as client:
        return client.status()
    return None


# --- packages ---------------------------------------------------------------------------------------------------------


def _packages() -> Iterator[Finding]:
    """Whether what the daemon needs is there, in a version that it works with."""
    try:
        requirements = importlib.metadata.requires("taco-dit") or []
    except importlib.metadata.PackageNotFoundError:
        message = "taco-dit runs from a folder and isn't installed, so versions were not checked"
        yield warn("packages", message, "`pip install 'taco-dit[daemon]'` in the daemon's environment")
        return
    others = 0
    for text in requirements:
        needed = Requirement(text)
        if needed.marker is not None and not needed.marker.evaluate({"extra": "daemon"}):
            continue
        advice = "`pip install -U 'taco-dit[daemon]'` in the daemon's environment"
        try:
            version = importlib.metadata.version(needed.name)
        except importlib.metadata.PackageNotFoundError:
            yield fail(needed.name, "not installed", advice)
            continue
        if not needed.specifier.contains(version, prereleases=True):
            yield fail(needed.name, f"{version}, but {needed.specifier} is needed", advice)
        elif needed.name in ENGINE:
            yield ok(needed.name, version)
        else:
            others += 1
    yield ok("packages", f"{others} others as needed, Python {sys.version.split()[0]}")


def _groups() -> Iterator[Finding]:
    """Whether xfuser's process groups really work here: a group of one, over gloo."""
    try:
        import torch

        from tacod.rank import xdit

        with tempfile.TemporaryDirectory(prefix="tacod-") as folder:
            xdit.join(torch.device("cpu"), 0, 1, f"file://{folder}/rendezvous")
            xdit.leave()
    except Exception as error:
        advice = "`pip install -U 'taco-dit[daemon]'`; if it stays, the versions above don't fit each other"
        yield fail("groups", f"xfuser's process groups don't start: {type(error).__name__}: {error}", advice)
    else:
        yield ok("groups", "xfuser's process groups work (a group of one, over gloo)")


# --- GPUs -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Gpu:
    device: str
    name: str
    free: int
    total: int


def _gpus(config: Config, endpoint: str, measure: bool) -> Iterator[Finding]:
    """Driver and CUDA, the GPUs seen and wanted, their memory, and the links between them."""
    try:
        wanted = devices(config.group)
    except ConfigError as error:
        yield fail("gpus", str(error), "`nvidia-smi` shows the GPUs that there are; group.gpus names those to use")
        return
    yield from _driver()
    status = _status(endpoint)
    gpus = _look(wanted)
    yield ok("gpus", f"{_count()} seen, {len(wanted)} wanted: {', '.join(wanted)}")
    for gpu in gpus:
        message = f"{gpu.name}, {size(gpu.free)} of {size(gpu.total)} free"
        if gpu.total < 8 << 30:
            yield warn(
                f"gpu {gpu.device}", message, "Flux.1 wants 8 GiB and more on each: use 8-bit weights (fp8, GGUF)"
            )
        elif status is None and gpu.free < gpu.total / 2:
            yield warn(f"gpu {gpu.device}", message, "something else holds it: `nvidia-smi` says what")
        else:
            yield ok(f"gpu {gpu.device}", message)
    for name, effect in SLOWED_BY.items():
        if os.environ.get(name, "0") not in ("", "0"):
            yield warn(name, f"is set: {effect}", "unset it where tacod starts, unless it is meant")
    if len(wanted) < 2:
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
        yield from _links(wanted)


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


def _look(wanted: list[str]) -> list[_Gpu]:
    import pynvml

    pynvml.nvmlInit()
    try:
        found = []
        for device in wanted:
            by_index = device.isdigit()
            find = pynvml.nvmlDeviceGetHandleByIndex if by_index else pynvml.nvmlDeviceGetHandleByUUID
            handle = find(int(device) if by_index else device)
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
            found.append(_Gpu(device, str(pynvml.nvmlDeviceGetName(handle)), int(memory.free), int(memory.total)))
        return found
    finally:
        pynvml.nvmlShutdown()


def _links(wanted: list[str]) -> Iterator[Finding]:
    """What `tacod.links` measures, in a process that can be ended if the driver hangs."""
    env = {**os.environ, "CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": ",".join(wanted)}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "tacod.links"], env=env, capture_output=True, text=True, timeout=LINKS_S, check=True
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


# --- files and memory -------------------------------------------------------------------------------------------------


def _models(config: Config) -> Iterator[Finding]:
    """Whether the model folders can be read, the preloaded models used, and uploads kept."""
    settings = config.models
    if not settings.readable:
        yield warn("models", "no folder is configured, so nothing can be loaded", "name folders in models.roots")
    for root in settings.roots:
        if not os.path.isdir(root):
            yield fail("models", f"{root} is no folder", "mend models.roots")
        elif not os.access(root, os.R_OK | os.X_OK):
            yield fail(
                "models", f"{root} can't be read by this user", "let tacod's user read it (`chmod o+rx`, or a group)"
            )
        else:
            yield ok("models", f"{root} can be read")
    manifest = Manifest(settings.readable, config.group.device)
    for path in settings.preload:
        try:
            manifest.describe(path, None, None, "auto", 1)
        except TacodError as error:
            yield fail("preload", error.message, "mend models.preload: tacod doesn't start with it")
        else:
            yield ok("preload", path)
    if settings.uploads is not None:
        yield from _disk("uploads", Path(settings.uploads), SPARE_BYTES)


def _disk(check: str, folder: Path, least: int) -> Iterator[Finding]:
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free
    if not os.access(there, os.W_OK):
        yield warn(check, f"{folder} can't be written by this user", "let tacod's user write it")
    elif free < least:
        yield warn(check, f"{folder}: {size(free)} free on its disk", "make room, or name another folder")
    else:
        yield ok(check, f"{folder}: {size(free)} free on its disk")


def _memory(config: Config) -> Iterator[Finding]:
    """Host memory for the store and the tensor that is on its way from a file."""
    memory = psutil.virtual_memory()
    message = f"{size(memory.available)} of {size(memory.total)} available"
    if memory.available < config.limits.store_bytes + SPARE_BYTES:
        advice = f"lower limits.store_bytes ({size(config.limits.store_bytes)}), or close other programs"
        yield warn("host memory", message, advice)
    else:
        yield ok("host memory", message)


def _caches(environment: Mapping[str, str]) -> Iterator[Finding]:
    """Where torch and triton keep what they compile."""
    home = Path(environment.get("HOME") or "/")
    yield from _disk("compiler cache", Path(environment.get("TRITON_CACHE_DIR") or home / ".triton" / "cache"), 1 << 30)
    inductor = environment.get("TORCHINDUCTOR_CACHE_DIR")
    yield from _disk("compiler cache", Path(inductor or tempfile.gettempdir()), 1 << 30)


if __name__ == "__main__":
    sys.exit(main())

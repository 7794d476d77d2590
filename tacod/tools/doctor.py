"""The part of ``tacoctl doctor`` that needs the daemon's packages: configuration, packages, GPUs, models, memory.

Prints one JSON document: the configured endpoint and the findings.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from packaging.requirements import Requirement

from tacod import comfyui
from tacod.checkpoint import read_checkpoint
from tacod.config import Config, ConfigError, ConfigUnreadable, load_config
from tacod.execution.manifest import Manifest
from tacod.group.ray.version import check_installed
from tacod.serving import checks
from tacod.tools import doctor_gpus
from tacod.tools.contents import contents
from tacod_client import Client
from tacod_client.cli.doctor import Finding, fail, ok, warn
from tacod_client.endpoint import find_endpoint
from tacod_client.errors import TacodError
from tacod_client.units import size

__all__ = ["main"]

DEFAULT_CONFIG = "/etc/tacod/config.toml"
ENGINE = ("torch", "xfuser", "diffusers")
"""Packages that get a line of their own."""
SPARE_BYTES = 4 << 30
CONNECT_S = 5.0
"""How long a cluster's head has to take a connection."""


def main(argv: Sequence[str] | None = None) -> int:
    """Print the findings; returns 0, whatever they are."""
    parser = argparse.ArgumentParser(prog="python -m tacod.tools.doctor", description=__doc__)
    parser.add_argument("--config")
    parser.add_argument("--endpoint")
    parser.add_argument("--no-bandwidth", action="store_true")
    args = parser.parse_args(argv)
    config, known, findings = _configuration(args.config, args.endpoint)
    findings += _packages()
    findings += _groups()
    findings += _comfyui(config)
    if config.launcher == "ray":
        findings += _ray({group.ray_address or "auto" for group in config.groups})
    elif config.device == "cuda":
        findings += doctor_gpus.look(config.groups, _status(args.endpoint or config.endpoint), not args.no_bandwidth)
    if known:
        findings += _models(config)
    findings += _memory(config)
    findings += _caches(os.environ)
    print(json.dumps({"endpoint": config.endpoint, "findings": [found._asdict() for found in findings]}))
    return 0


def _configuration(path: str | None, endpoint: str | None) -> tuple[Config, bool, list[Finding]]:
    """The configuration and whether it is the daemon's; if not, as much as a running daemon tells of its own."""
    if path is None and not os.path.exists(DEFAULT_CONFIG):
        status = _status(endpoint or find_endpoint())
        found = warn("config", f"no {DEFAULT_CONFIG}; checked with the defaults", "pass --config FILE")
        if status is None:
            return Config.model_validate({}), False, [found]
        told = status.get("groups") or [status["group"]]
        # Of ranks that are being replaced nobody knows the GPUs.
        groups = [_as_configured(group) for group in [each for each in told if each["ranks"]] or told[:1]]
        config = Config.model_validate({"endpoint": status["endpoint"], "group": groups})
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
    each = [
        f"gpus {group.gpus or 'all'}"
        if group.device == "cuda" and group.launcher == "local"
        else f"{group.ranks} ranks" + (" on Ray" if group.launcher == "ray" else "")
        for group in config.groups
    ]
    if len(each) > 1:
        each = [f"group {group.name}: {what}" for group, what in zip(config.groups, each, strict=True)]
    faults = list(_named(path, config))
    return config, True, faults or [ok("config", f"{path}: {config.device}, {'; '.join(each)}")]


def _named(path: str, config: Config) -> Iterator[Finding]:
    """What is wrong with the keys and the paths that a configuration names."""
    for fault in checks.faults(path, config):
        if isinstance(fault, ConfigUnreadable):
            yield warn("config", str(fault), "run this as tacod's own user, who is to be able to read it")
            continue
        for line in str(fault).splitlines():
            yield fail("config", line, f"mend it; `tacod --config {path} --check-config` looks again")


def _as_configured(group: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a group as far as its status tells it."""
    values: dict[str, Any] = {key: group[key] for key in ("name", "device") if key in group}
    here = socket.gethostname()
    if any(rank.get("host", here) != here for rank in group["ranks"]):
        return {**values, "launcher": "ray", "ranks": group["world_size"]}
    if group["device"] == "cpu":
        return {**values, "ranks": group["world_size"]}
    names = [rank["device"] for rank in group["ranks"]]
    return {**values, "gpus": [int(name) if name.isdigit() else name for name in names] or None}


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
        # Without it torch's own process groups serve.
        lacks = warn if needed.name == "xfuser" else fail
        try:
            version = importlib.metadata.version(needed.name)
        except importlib.metadata.PackageNotFoundError:
            yield lacks(needed.name, "not installed", advice)
            continue
        if not needed.specifier.contains(version, prereleases=True):
            yield lacks(needed.name, f"{version}, but {needed.specifier} is needed", advice)
        elif needed.name in ENGINE:
            yield ok(needed.name, version)
        else:
            others += 1
    yield ok("packages", f"{others} others as needed, Python {sys.version.split()[0]}")


def _groups() -> Iterator[Finding]:
    """Whether process groups really work here, and whose are in use: a group of one, over gloo."""
    advice = "`pip install -U 'taco-dit[daemon]'`; if it stays, the versions above don't fit each other"
    try:
        import torch

        from tacod.rank.comm import process_groups

        cpu = torch.device("cpu")
        reason = process_groups.why_not_xfuser(torch.device("cuda") if torch.cuda.is_available() else cpu)
        whose = "torch's own" if reason else "xfuser's"
        with tempfile.TemporaryDirectory(prefix="tacod-") as folder:
            process_groups.join(cpu, 0, 1, f"{folder}/rendezvous")
            process_groups.leave()
    except Exception as error:
        yield fail("groups", f"process groups don't start: {type(error).__name__}: {error}", advice)
        return
    message = f"{whose} process groups work (a group of one, over gloo)"
    if reason:
        yield warn("groups", f"{message}; xfuser's can't be imported: {reason}", advice)
    else:
        yield ok("groups", message)


def _ray(addresses: Collection[str]) -> Iterator[Finding]:
    """Whether there is a Ray that fits, and whether clusters answer; their hosts have the GPUs, not this machine."""
    try:
        version = check_installed()
    except ConfigError as error:
        reason, _, advice = str(error).partition("; ")
        yield fail("ray", reason, advice)
        return
    for address in sorted(addresses):
        if address == "auto":
            yield ok("ray", f"{version}; GPUs are those of the cluster that this machine is in (`ray status`)")
            continue
        host, _, port = address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
        except OSError as error:
            reason = f"no Ray cluster answers at {address}: {error.strerror or error}"
            yield fail("ray", reason, "start it there (`ray start --head`), or correct group.ray_address")
        else:
            yield ok("ray", f"{version}; {address} answers, and GPUs are those of its cluster's hosts")


def _comfyui(config: Config) -> Iterator[Finding]:
    """Whether ranks can run the networks of the ComfyUI that is configured."""
    path = config.comfyui.path
    if path is None:
        return
    if (reason := comfyui.fault(path)) is not None:
        yield fail("comfyui", reason, "correct comfyui.path")
    elif packages := comfyui.lacking(path):
        message = f"{path}: its networks need {', '.join(packages)}, which the daemon's Python lacks"
        install = " ".join(map(repr, packages))
        yield fail("comfyui", message, f"`{sys.executable} -m pip install {install}`, then restart tacod")
    else:
        yield ok("comfyui", f"{path}: version {comfyui.version(path)}")


# --- files and memory -------------------------------------------------------------------------------------------------


def _models(config: Config) -> Iterator[Finding]:
    """Whether the model folders can be read, the preloaded models used, and uploads kept."""
    settings = config.models
    if not settings.readable:
        yield warn("models", "no folder is configured, so nothing can be loaded", "name folders in models.roots")
    for root in settings.roots:
        if not os.path.isdir(root):
            yield fail("models", f"{root} is no folder", "correct models.roots")
        elif not os.access(root, os.R_OK | os.X_OK):
            yield fail(
                "models", f"{root} can't be read by this user", "let tacod's user read it (`chmod o+rx`, or a group)"
            )
        else:
            yield ok("models", f"{root} can be read")
    manifest = Manifest(settings.readable, config.device)
    for path in settings.preload:
        try:
            model = manifest.describe(path, None, None, "auto", 1)
            held = contents(read_checkpoint(model.path))
        except TacodError as error:
            yield fail("preload", error.message, "correct models.preload: tacod doesn't start with it")
        else:
            yield ok("preload", f"{path}: {held}")
    if settings.uploads is not None:
        yield from _disk("uploads", Path(settings.uploads), SPARE_BYTES)


def _disk(check: str, folder: Path, least: int) -> Iterator[Finding]:
    there = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    free = shutil.disk_usage(there).free
    if not there.is_dir():
        yield fail(check, f"{there} is no folder", "move it away, or name another folder")
    elif not os.access(there, os.W_OK):
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

"""xfuser's process groups, on GPUs over NCCL and on CPUs over gloo; torch's own where xfuser can't be imported.

xfuser 0.7 imports its pipelines, diffusers and triton at `import xfuser` and refuses to run without an accelerator.
A rank needs its `parallel_state` alone, so that module is imported under bare parent packages: two seconds instead
of seven, and no kernels on a CPU. Both kinds are `torch.distributed` groups of the same ranks and the same backend.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import logging
import os
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from tacod.rank.comm.group import MakeGroup

__all__ = ["join", "leave", "why_not_xfuser"]

_log = logging.getLogger(__name__)

JOIN_TIMEOUT = timedelta(minutes=30)
"""How long ranks wait for each other before they give up."""
_USED = ("GroupCoordinator", "get_world_group", "init_distributed_environment")
"""The names that are used of xfuser's module; without one of them it counts as not importable."""


def join(
    device: torch.device,
    rank: int,
    world_size: int,
    rendezvous: str,
    local_rank: int = 0,
    listening: int | None = None,
) -> MakeGroup:
    """Join the group as ``rank`` of ``world_size``; returns what makes further groups of its ranks.

    ``rendezvous`` is where they find each other: the path of a file, as with torch's ``file://`` URLs a # would end it,
    or ``tcp://HOST:PORT`` of rank 0, which has the descriptor of a socket that is ``listening`` there. ``local_rank``
    is the device's index among those that the process sees. Blocks until all ranks have joined.
    """
    backend = "nccl" if device.type == "cuda" else "gloo"
    # A transfer that is to hide behind a matrix product must not wait for the product's last block.
    os.environ.setdefault("TORCH_NCCL_HIGH_PRIORITY", "1")
    reason = why_not_xfuser(device)
    if not dist.is_initialized():
        store = _store(rendezvous, rank, world_size, listening)
        dist.init_process_group(backend, store=store, world_size=world_size, rank=rank)
        # Groups are made in the same order by all ranks, so that all of them have xfuser's or none.
        store.set(f"why not xfuser/{rank}", reason)
        reasons = [store.get(f"why not xfuser/{each}").decode() for each in range(world_size)]
        reason = next(filter(None, reasons), "")
    if reason:
        _log.warning("torch's own process groups are in use, as xfuser's can't be imported: %s", reason)
        if device.type == "cuda":
            torch.cuda.set_device(local_rank)
        return _torch_groups(rank, world_size, backend)
    return _xfuser_groups(_parallel_state(device.type == "cuda"), rank, world_size, backend, local_rank)


def _store(rendezvous: str, rank: int, world_size: int, listening: int | None) -> Any:
    address = rendezvous.removeprefix("tcp://")
    if address != rendezvous:
        host, _, port = address.rpartition(":")
        return dist.TCPStore(  # type: ignore[attr-defined]
            host.strip("[]"), int(port), world_size, rank == 0, JOIN_TIMEOUT, False, master_listen_fd=listening
        )
    store = dist.FileStore(os.fsencode(rendezvous), world_size)  # type: ignore[attr-defined, arg-type]
    store.set_timeout(JOIN_TIMEOUT)
    return store


def why_not_xfuser(device: torch.device) -> str:
    """Why xfuser's process groups can't be imported; empty if they can."""
    try:
        _parallel_state(device.type == "cuda")
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _torch_groups(rank: int, world_size: int, backend: str) -> MakeGroup:
    def make_group(parts: list[list[int]]) -> dist.ProcessGroup:
        if parts == [list(range(world_size))]:
            assert dist.group.WORLD is not None
            return dist.group.WORLD
        groups = [dist.new_group(ranks, backend=backend) for ranks in parts]
        mine: dist.ProcessGroup = next(group for group, ranks in zip(groups, parts, strict=True) if rank in ranks)
        return mine

    return make_group


def _xfuser_groups(state: Any, rank: int, world_size: int, backend: str, local_rank: int) -> MakeGroup:
    # xfuser makes its groups of what is there.
    state.init_distributed_environment(
        world_size=world_size, rank=rank, distributed_init_method="", local_rank=local_rank, backend=backend
    )
    whole = _device_group(state.get_world_group())

    def make_group(parts: list[list[int]]) -> dist.ProcessGroup:
        if parts == [list(range(world_size))]:
            return whole
        return _device_group(state.GroupCoordinator(parts, local_rank, backend))

    return make_group


def _device_group(coordinator: Any) -> dist.ProcessGroup:
    """A coordinator's group on the device.

    Its second group, gloo's between the CPUs, is ended: nothing uses it, and its thread wakes 100 times a second.
    """
    # Its sockets must not close under a rank that still connects: to make a group waits for no other rank.
    dist.barrier(group=coordinator.cpu_group)
    dist.destroy_process_group(coordinator.cpu_group)
    # The thread ends with the last reference.
    coordinator.cpu_group = None
    group: dist.ProcessGroup = coordinator.device_group
    return group


def leave() -> None:
    """Leave the group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _parallel_state(on_gpu: bool) -> Any:
    with _bare("xfuser", "xfuser.core", "xfuser.core.distributed"), _named_only("diffusers"):
        # xfuser's loggers read this at import; by default they print at debug level.
        os.environ.setdefault("LOG_LEVEL", "warning")
        envs: Any = importlib.import_module("xfuser.envs")
        if not on_gpu:
            envs.get_device = lambda local_rank: torch.device("cpu")
            envs.get_device_name = lambda: "cpu"
            envs.get_device_version = lambda: None
            envs.get_torch_distributed_backend = lambda: "gloo"
            envs._is_cuda = lambda: False
        # The Ulysses and ring groups come from yunchang, which is installed with xfuser but only looked for on GPUs.
        envs.PACKAGES_CHECKER.packages_info["has_long_ctx_attn"] = True
        state: Any = importlib.import_module("xfuser.core.distributed.parallel_state")
    for name in _USED:
        getattr(state, name)
    return state


@contextmanager
def _bare(*names: str) -> Iterator[None]:
    """A context in which these packages have a path but no code; afterwards they are as if never imported."""
    root = importlib.util.find_spec(names[0])
    if root is None or not root.submodule_search_locations:
        raise ModuleNotFoundError("it is not installed; `pip install 'taco-dit[daemon]'` installs it")
    base = root.submodule_search_locations[0]
    for name in names:
        package = types.ModuleType(name)
        package.__path__ = [os.path.join(base, *name.split(".")[1:])]
        sys.modules[name] = package
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


@contextmanager
def _named_only(name: str) -> Iterator[None]:
    """A context in which importing ``name`` gives a module with a version and nothing else."""
    if name in sys.modules:
        yield
        return
    module = types.ModuleType(name)
    module.__dict__["__version__"] = importlib.metadata.version(name)
    sys.modules[name] = module
    try:
        yield
    finally:
        del sys.modules[name]

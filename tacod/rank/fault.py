"""A fault on purpose, as the ``[testing]`` section of the configuration asks for it."""

from __future__ import annotations

import ctypes
import os
import time

import torch

from tacod.group.work import Fault
from tacod.rank.engine import Engine

__all__ = ["inject"]

EXIT_CODE = 3


def inject(fault: Fault, when: str, rank: int, engine: Engine | None = None) -> None:
    """Inject the fault, if it is for this rank and moment. At the start there is no engine yet."""
    if fault.when != when or fault.rank not in (None, rank):
        return
    kind = fault.kind
    if kind == "raise":
        # That of all ranks is the same on each of them.
        raise RuntimeError("a fault on purpose" + (f" in rank {rank}" if fault.rank is not None else ""))
    if kind == "out_of_memory":
        assert engine is not None
        # More than any machine has, so that what is raised is what a device raises.
        with engine.memory_errors():
            torch.empty(1 << 60, dtype=torch.uint8, device=engine.device)
    elif kind == "exit":
        os._exit(EXIT_CODE)
    elif kind == "segfault":
        ctypes.string_at(0)
    elif kind == "slow":
        time.sleep(fault.seconds)
    elif kind == "sleep":
        while True:
            time.sleep(3600)
    elif kind == "collective":
        assert engine is not None
        # From another rank, which sends nothing.
        topology = engine.topology
        topology.everyone.broadcast(torch.zeros(1, device=engine.device), (rank + 1) % topology.world_size)

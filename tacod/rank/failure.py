"""Reports of unexpected errors, and whether a rank can go on if all ranks met the same one."""

from __future__ import annotations

import traceback
from contextlib import suppress
from pathlib import Path

import torch

from tacod.group.work import Broken, Raised
from tacod.rank.comm import collective, group, peers, staging
from tacod.rank.engine import Engine
from tacod_client.text import encodable, shortened

__all__ = ["failure"]

TRACEBACK_CHARACTERS = 6000
"""How much of a traceback's end is reported, so that it fits in a packet."""
_EXCHANGES = {module.__file__ for module in (collective, group, peers, staging)}


def failure(engine: Engine, error: Exception, begun: int) -> Raised | Broken:
    """The report of a command that raised ``error``; ``begun`` is the clock's count when the command came.

    `Raised` means that this rank can go on if all others raised the same error at the same place, after as many
    exchanges: then none waits for another. `Broken` means that it ends.
    """
    text = encodable("".join(traceback.format_exception(error, limit=-8)))[-TRACEBACK_CHARACTERS:]
    exchanges = engine.topology.clock.begun - begun
    what = shortened(encodable(f"{type(error).__name__}: {error}"), TRACEBACK_CHARACTERS // 3)
    if not _can_go_on(engine, error, exchanges):
        return Broken(text, what)
    frames = traceback.extract_tb(error.__traceback__)
    place = " ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames)[-TRACEBACK_CHARACTERS // 3 :]
    return Raised(engine.memory_used_bytes, text, what, place, exchanges)


def _can_go_on(engine: Engine, error: Exception, exchanges: int) -> bool:
    files = {frame.filename for frame in traceback.extract_tb(error.__traceback__)}
    if files & _EXCHANGES or any("/torch/distributed/" in file for file in files):
        # The connections between ranks may be at fault.
        return False
    if engine.device.type == "cpu":
        return True
    # A GPU's own faults stay with its process, and what it has begun to exchange may be on its way.
    if exchanges or "CUDA" in str(error) or isinstance(error, torch.AcceleratorError):
        return False
    with suppress(Exception):
        torch.cuda.synchronize(engine.device)
        return True
    return False

"""Ranks that do all that a rank does for a forward but compute, for hops.py: in the place of a CUDA graph they sleep.

The model is Flux.1 as published, without weights. What a GPU's rank keeps on its device, these keep in memory.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections import OrderedDict
from collections.abc import Hashable
from typing import Any, ClassVar

import torch
from published import PUBLISHED

from tacod.group.arena import Arena
from tacod.group.work import Facts, Loaded
from tacod.heap import keep_freed_memory
from tacod.rank.__main__ import _die_with_the_supervisor, _parse, serve
from tacod.rank.engine import Engine
from tacod.rank.families.base import DiT, Output
from tacod.rank.families.flux import Flux
from tacod.rank.forward.captured import Graph
from tacod.rank.forward.graphs import Forwards
from tacod.rank.forward.run import Call, clone
from tacod.rank.loader import Resident
from tacod.rank.parallel.topology import Topology


class IdleGraph(Graph):
    """A graph of nothing."""

    sleep_s: ClassVar[float]
    pipe: ClassVar[int | None] = None

    def __init__(self, call: Call) -> None:
        super(Graph, self).__init__(call, None)

    def replay(self, call: Call) -> Output:
        """The latents, as they came."""
        self._load(call)
        until = time.monotonic() + self.sleep_s
        if self.pipe is not None:
            os.write(self.pipe, b".")
        time.sleep(max(until - time.monotonic(), 0.0))
        return clone(self._inputs["x"])


class IdleForwards(Forwards):
    """Finds its graphs as on a GPU."""

    def _may_be_captured(self, call: Call) -> bool:
        return True

    def _run(self, call: Call, cache: Any = None) -> Output:
        return clone(call.inputs["x"])

    def _came(self, call: Call, kind: Hashable, capture: Any) -> None:
        self._kinds.setdefault(call.dit, OrderedDict())[kind] = IdleGraph(call)


class IdleEngine(Engine):
    """All of `Engine` but what a GPU does."""

    def __init__(self, rank: int, world_size: int) -> None:
        # Nothing is exchanged, so there are no groups.
        topology = Topology()
        topology.rank, topology.world_size = rank, world_size
        super().__init__(torch.device("cpu"), topology)
        self.forwards = IdleForwards(topology)
        self.keeps_arguments = True

    def load(self, model: str, *args: Any, **work: Any) -> Loaded:
        """Make the model, which has no weights."""
        with torch.device("meta"):
            dit: DiT = Flux(PUBLISHED["flux"].config).bfloat16()
        facts = Facts("flux", 0, 0, "bf16", dit.heads, dit.width, sampling={})
        self.models[model] = Resident(dit, {}, {}, facts, None)  # type: ignore[arg-type]
        return Loaded(facts, facts)


def run(arguments: list[str], sleep_s: float, pipe: str) -> None:
    """Be such a rank, which sleeps for ``sleep_s`` a forward, until the supervisor ends.

    Rank 0 writes a byte to ``pipe`` each time.
    """
    args = _parse(arguments)
    channel = socket.socket(fileno=args.channel)
    _die_with_the_supervisor(channel)
    keep_freed_memory()
    torch.set_num_threads(1)
    IdleGraph.sleep_s = sleep_s
    if args.rank == 0:
        IdleGraph.pipe = os.open(pipe, os.O_WRONLY)
    serve(IdleEngine(args.rank, args.world_size), channel, Arena(args.arena))
    sys.exit(1)

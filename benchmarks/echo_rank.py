"""Ranks without a model, for wire.py: they read a forward's tensors as a rank does, and answer with x.

Run as a program, this file is a fork server for such ranks.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Sequence
from typing import Any
from unittest import mock

import torch

from tacod.group import fork_server
from tacod.group.arena import Arena
from tacod.group.work import Facts, Loaded, Stepped
from tacod.heap import keep_freed_memory
from tacod.rank.__main__ import _die_with_the_supervisor, _parse, serve
from tacod.rank.arguments import load_arguments
from tacod.rank.comm.group import Group
from tacod.rank.engine import Engine
from tacod.rank.families.control import Control
from tacod.rank.families.inputs import Argument, Residuals
from tacod.rank.parallel.sequence import SequenceParallel
from tacod.rank.parallel.topology import Topology
from tacod_client.tensors import to_wire
from tacod_client.wire import Form, map_tensors


class EchoEngine(Engine):
    """All of `Engine` but the models: the store, the checks on memory and the answers are the real ones."""

    def __init__(self, rank: int, world_size: int) -> None:
        super().__init__(torch.device("cpu"), Topology())
        self.rank = rank
        self.world_size = world_size
        # It says which tokens are this rank's; nothing is exchanged.
        whole = Group()
        whole.rank, whole.size = rank, world_size
        self.sequence = SequenceParallel(whole, whole)

    def load(self, *args: Any, **work: Any) -> Loaded:
        """Nothing to load."""
        facts = Facts("echo", 0, 0, "fp32", 1, 1, sampling={})
        return Loaded(facts, facts)

    def forward(
        self,
        model: str,
        plan: Any,
        arguments: dict[str, Any],
        session: bytes,
        memory: int | None = None,
        room: Sequence[int] | None = None,
        form: Form | None = None,
    ) -> Stepped:
        """The arguments as torch tensors, of residuals this rank's tokens, and x back."""
        specs = {name: Residuals(0, {}) if name == "control" else Argument(()) for name in arguments}
        shared = self.memories.get(memory)
        values = load_arguments(map_tensors(arguments, self._kept), specs, torch.float32, self.device, memory=shared)
        control = values.get("control", Control({}))
        for name, each in control.residuals.items():
            for block, residual in enumerate(each):
                if residual is not None and (block == 0 or residual is not each[block - 1]):
                    _, n, width = residual.shape
                    tokens = torch.zeros(1, self.sequence.sizes(n)[self.rank], width, dtype=torch.bfloat16)
                    control.add(name, block, self.sequence, tokens, n)
        out = None
        if self.rank == 0:
            placed = shared.write([values["x"]], room) if shared is not None and room is not None else None
            out = placed[0] if placed is not None else to_wire(values["x"], "out")
        return Stepped("echo", self.world_size, forwards=1, skipped=0, out=out)


def run(arguments: list[str]) -> None:
    """Be such a rank until the supervisor ends."""
    args = _parse(arguments)
    channel = socket.socket(fileno=args.channel)
    _die_with_the_supervisor(channel)
    keep_freed_memory()
    torch.set_num_threads(1)
    serve(EchoEngine(args.rank, args.world_size), channel, Arena(args.arena))
    sys.exit(1)


if __name__ == "__main__":
    with mock.patch.object(fork_server, "load", return_value=run):
        fork_server.main()

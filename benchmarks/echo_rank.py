"""A rank without a model, for wire.py: it reads a forward's tensors as a rank does, and answers with x."""

from __future__ import annotations

import sys
import threading
from typing import Any

import torch

from tacod.rank.__main__ import _die_with_the_supervisor, _parse, serve
from tacod.rank.engine import Engine
from tacod_client.tensors import from_wire, to_wire


class EchoEngine(Engine):
    """All of `Engine` but the models: the store, the checks on memory and the answers are the real ones."""

    def __init__(self, rank: int, world_size: int) -> None:
        super().__init__(torch.device("cpu"), None)
        self.rank = rank
        self.world_size = world_size

    def load(self, model: str, path: str, identity: str, dtype: str | None) -> dict[str, Any]:
        """Nothing to load."""
        return {"model": {"family": "echo", "parameters": 0, "dtype": "fp32", "heads": 1}}

    def forward(self, model: str, plan: Any, arguments: dict[str, Any]) -> dict[str, Any]:
        """The arguments as torch tensors, and x back."""
        values = {name: from_wire(value, "torch") for name, value in arguments.items()}
        out = to_wire(values["x"], "out") if self.rank == 0 else None
        return {"out": out, "plan": "echo", "ranks": self.world_size, "forwards": 1}


if __name__ == "__main__":
    args = _parse()
    threading.Thread(target=_die_with_the_supervisor, args=(args.death_fd,), daemon=True).start()
    torch.set_num_threads(1)
    serve(EchoEngine(args.rank, args.world_size), args.rank, args.epoch, args.address)
    sys.exit(1)

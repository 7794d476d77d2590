"""Whether all ranks can attend by the kernel that a plan asks for; they ask each other once for each kind of heads."""

from __future__ import annotations

import torch

from tacod.rank.forward.run import Call
from tacod.rank.ops.attention_kernels import Kernel, Obstacle, find_kernel
from tacod.rank.parallel.topology import Topology
from tacod_client.errors import ArgumentError

__all__ = ["KernelCheck"]


class KernelCheck:
    """What ranks have told each other of kernels. Every rank makes the same calls in the same order."""

    def __init__(self, topology: Topology) -> None:
        self._topology = topology
        self._known: dict[tuple[str, torch.dtype, int], str] = {}

    def __call__(self, call: Call) -> None:
        """Raise `ArgumentError` if any rank can't attend as the plan says: the same error on all ranks.

        Also for ranks that the plan leaves idle: others of the same request may need them.
        """
        kernel = find_kernel(call.plan.attention.kernel)
        if kernel is None:
            return
        dtype, width = call.dit.dtype, call.dit.width // call.dit.heads
        kernel.check(dtype, width)
        key = kernel.name, dtype, width
        if key not in self._known:
            self._known[key] = self._ask(kernel, dtype, width, call.inputs.latents[0].device)
        if self._known[key]:
            raise ArgumentError(
                f"plan: attention {kernel.name!r} ({kernel.title}): {self._known[key]}; or ask for 'exact'",
                argument="plan",
            )

    def _ask(self, kernel: Kernel, dtype: torch.dtype, width: int, device: torch.device) -> str:
        """What keeps ranks from using it; empty if nothing does."""
        found = list(map(Obstacle, self._topology.everyone.numbers(int(kernel.obstacle(device, dtype, width)))))
        said = []
        for obstacle in sorted(set(found) - {Obstacle.NONE}):
            ranks = [rank for rank, each in enumerate(found) if each == obstacle]
            where = f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}: " if len(found) > 1 else ""
            said.append(f"{where}{kernel.advice(obstacle)}")
        return "; ".join(said)

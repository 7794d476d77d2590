"""One forward on all ranks: plan it, take this rank's part, run it, put the parts together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tacod.plan import Plan, Request, Shape, chunks, make_plan
from tacod.rank.families.base import Control, DiT
from tacod.rank.topology import Topology

__all__ = ["plan_for", "run"]

FAST = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""The attention kernels in the order in which those that can are taken: cuDNN's is the fastest on Hopper."""
PLAIN = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""The attention kernels that run without flash attention."""


def plan_for(dit: DiT, asked: Request, world_size: int, arguments: Mapping[str, Any]) -> Plan:
    """The plan of a forward with these arguments, of which only the shapes matter.

    Raises `ArgumentError` if there is none, or if the model can't take this size.
    """
    shape = Shape(dit.heads, dit.width, arguments["x"].shape[0], dit.lengths(arguments))
    return make_plan(asked, world_size, shape, dit.pace)


def run(
    dit: DiT,
    plan: Plan,
    topology: Topology,
    x: Tensor,
    timestep: Tensor,
    arguments: Mapping[str, Any],
    in_waves: bool = False,
) -> Tensor:
    """One forward; every rank passes the whole input and gets the whole output, one that the plan leaves idle too.

    ``in_waves`` is for what becomes a CUDA graph (see `SequenceParallel`).
    """
    layout = plan.layout
    seat = topology.seat(layout)
    out: Tensor | None = None
    if seat is not None:
        sizes = chunks(len(x), layout.batch)
        start = sum(sizes[: seat.batch.rank])
        mine = slice(start, start + sizes[seat.batch.rank])
        sequence = seat.sequence.planned(plan.narrow, in_waves)
        try:
            with sdpa_kernel(FAST, set_priority=True) if plan.flash_attention else sdpa_kernel(PLAIN):
                out = dit(sequence, x[mine], timestep[mine], **_images(arguments, mine))
        except BaseException:
            if sequence.peers is not None:
                sequence.peers.release()
            raise
        out = seat.batch.gather(out, sizes, dim=0)
    if layout.ranks < topology.world_size:
        shape = (len(x), dit.out_channels, *x.shape[2:])
        out = topology.everyone.broadcast(out if out is not None else x.new_empty(shape), source=0)
    assert out is not None
    return out


def _images(arguments: Mapping[str, Any], mine: slice) -> dict[str, Any]:
    """These images' share of every argument."""

    def take(value: Any) -> Any:
        if isinstance(value, list):
            return [take(item) for item in value]
        if isinstance(value, Control):
            return Control(value.residuals, mine)
        # What is there once is for all images.
        return value[mine] if isinstance(value, torch.Tensor) and len(value) > 1 else value

    return {name: take(value) for name, value in arguments.items()}

"""One forward on all ranks: plan it, take this rank's part, run it, put the parts together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tacod.plan import Plan, Request, Shape, chunks, make_plan
from tacod.rank.families.base import Argument, Control, DiT, Spec
from tacod.rank.parallel.topology import Topology

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
) -> Tensor:
    """One forward; every rank passes the whole input and gets the whole output, one that the plan leaves idle too."""
    layout, specs = plan.layout, dit.arguments()
    seat = topology.seat(layout)
    out: Tensor | None = None
    if seat is not None:
        sizes = chunks(len(x), layout.batch)
        start = sum(sizes[: seat.batch.rank])
        mine = slice(start, start + sizes[seat.batch.rank])
        sequence = seat.sequence(plan.attention)
        try:
            with sdpa_kernel(FAST, set_priority=True) if plan.attention.flash else sdpa_kernel(PLAIN):
                given = {"x": x, "timestep": timestep, **arguments}
                out = dit(sequence, **{name: _images(specs.get(name), value, mine) for name, value in given.items()})
        except BaseException:
            sequence.transport.abort()
            raise
        out = seat.batch.gather(out, sizes, dim=0)
    if layout.ranks < topology.world_size:
        shape = (len(x), dit.out_channels, *x.shape[2:])
        out = topology.everyone.broadcast(out if out is not None else x.new_empty(shape), source=0)
    assert out is not None
    return out


def _images(spec: Spec | None, value: Any, mine: slice) -> Any:
    """These images' share of an argument; what has no spec is the engine's own (a step cache), for all of them."""
    if isinstance(value, Control):
        return Control(value.residuals, mine)
    return spec.images(value, mine) if isinstance(spec, Argument) else value

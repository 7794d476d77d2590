"""One forward on all ranks: plan it, take this rank's part, run it, put the parts together."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import msgpack
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tacod.plan import Plan, Request, Shape, make_plan
from tacod.rank.families.base import DiT, Output
from tacod.rank.families.inputs import Inputs
from tacod.rank.families.trunk import BlockCache
from tacod.rank.forward.prefixes import Prefix
from tacod.rank.forward.watch import Watch
from tacod.rank.parallel.sequence import SequenceParallel
from tacod.rank.parallel.topology import Seat, Topology
from tacod_client.errors import TacodError

__all__ = [
    "Call",
    "StepForward",
    "clone",
    "compute_prefix",
    "equal",
    "on_seat",
    "plan_for",
    "relative_difference",
    "run",
]

FAST = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Attention kernels in order of preference; on Hopper, cuDNN's is the fastest."""
T = TypeVar("T")

PLAIN = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""The attention kernels that are used without flash attention."""


@dataclass(frozen=True, eq=False)
class Call:
    """One forward to run: a model, a plan and inputs."""

    dit: DiT
    plan: Plan
    inputs: Inputs
    run_key: tuple[Hashable, ...] = ()
    """For the step cache: identifies the run that this forward is a step of. Its first element is the session or job.
    """
    conditioning: Hashable = None
    """A digest of all arguments but those that change from step to step; None if the prefix isn't kept for others."""
    prefix: Prefix | None = None
    """What `compute_prefix` has given for a family with a prefix."""


class StepForward(Protocol):
    """A rank's part of a forward with a step cache, captured (`tacod.rank.forward.step_graph`)."""

    def replay(self, call: Call, cache: BlockCache, sequence: SequenceParallel) -> Output:
        """The output of this rank's images, of which the cache may skip all blocks but the first."""


def plan_for(dit: DiT, asked: Request, world_size: int, arguments: Mapping[str, Any]) -> Plan:
    """The plan of a forward with these arguments; only their shapes matter.

    Raises `ArgumentError` if there is none, or if the model can't take this size.
    """
    x = arguments["x"]
    images = (x[0] if isinstance(x, list) else x).shape[0]
    asked = dit.limited(asked, arguments)
    shape = Shape(dit.heads, dit.width, images, dit.lengths(arguments))
    return make_plan(asked, world_size, shape, dit.rates, dit.shares, dit.hosts)


def run(
    call: Call,
    topology: Topology,
    cache: BlockCache | None = None,
    watch: Watch | None = None,
    captured: StepForward | None = None,
    listens: bool = False,
) -> Output:
    """One forward. Every rank passes all inputs and gets the whole output, also one that the plan leaves idle.

    With a ``watch`` it may stop before a block: all ranks raise `Cancelled` then. What was ``captured`` computes with
    the ``cache`` in place of the model. With ``listens`` ranks hear of errors that they don't meet themselves: of what
    an attention kernel refuses while the plan leaves them idle, and of what a network that isn't ours raises.
    """
    if watch is not None:
        watch.begin()
    inputs, layout = call.inputs, call.plan.layout
    seat = topology.seat(layout)
    outs: list[Tensor] | None = None
    # Errors that not all ranks meet: some may have nothing to compute, or other images.
    refuses = call.plan.attention.kernel != "exact" and layout.ranks < topology.world_size
    fails = not call.dit.is_ours and layout.sequence == 1 and topology.world_size > 1
    listens = listens and (refuses or fails)
    refused: TacodError | None = None
    out: Output | None = None
    if seat is not None:
        tensors = None if call.prefix is None else call.prefix.tensors
        # With a step cache, each batch group decides by itself whether it skips blocks.

        def compute(sequence: SequenceParallel, mine: Inputs) -> Output:
            if captured is not None and cache is not None:
                return captured.replay(call, cache, sequence)
            out = call.dit.run(sequence, mine, cache, tensors, watch)
            if watch is not None:
                watch.end()
            return out

        try:
            out = on_seat(call, seat, cache is None, compute)
        except Exception as error:
            refused = call.dit.refusal(error) if listens else None
            if refused is None:
                raise
    if watch is not None and (seat is None or refused is not None):
        watch.end()
    if listens:
        _refuse_alike(topology, refused)
    if seat is not None:
        assert out is not None
        sizes = layout.images(inputs.batch)
        outs = [seat.batch.gather(each, sizes, dim=0) for each in (out if isinstance(out, list) else [out])]
    if layout.ranks < topology.world_size and not call.dit.shares_output:
        outs = outs or inputs.latents
    elif layout.ranks < topology.world_size:
        latents = inputs.latents
        shapes = call.dit.output_shapes([tuple(each.shape) for each in latents])
        outs = outs or [latents[0].new_empty(shape) for shape in shapes]
        outs = [topology.everyone.broadcast(each, source=layout.members[0]) for each in outs]
    assert outs is not None
    return outs if isinstance(inputs["x"], list) else outs[0]


def _refuse_alike(topology: Topology, refused: TacodError | None) -> None:
    """Raise on all ranks what one of them has refused; those that know nothing of it would wait for an output."""
    if topology.everyone.agree(refused is None):
        return
    said = topology.everyone.tell(b"" if refused is None else msgpack.packb(refused.to_wire()))
    raise TacodError.from_wire(msgpack.unpackb(next(filter(None, said)))) from refused


def compute_prefix(call: Call, topology: Topology) -> Prefix:
    """The prefix of a forward. Every rank makes the call; one that the plan leaves idle holds nothing of it."""
    seat = topology.seat(call.plan.layout)
    tensors = () if seat is None else on_seat(call, seat, True, call.dit.compute_prefix)
    mine = sum(each.nbytes for each in tensors)
    most = topology.everyone.maximum(torch.tensor([mine], dtype=torch.float32, device=call.inputs.latents[0].device))
    return Prefix(tensors, int(most.item()))


def on_seat(call: Call, seat: Seat, in_step: bool, compute: Callable[[SequenceParallel, Inputs], T]) -> T:
    """``compute`` with this rank's sequence and its part of the images; see `Seat.sequence` for ``in_step``."""
    plan, rank = call.plan, seat.batch.rank
    sizes = plan.layout.images(call.inputs.batch)
    start = sum(sizes[:rank])
    mine = call.inputs.images(slice(start, start + sizes[rank]))
    sequence = seat.sequence(plan.attention, in_step)
    try:
        with sdpa_kernel(FAST, set_priority=True) if plan.attention.flash else sdpa_kernel(PLAIN):
            return compute(sequence, mine)
    except BaseException:
        sequence.transport.abort()
        raise


def clone(out: Output) -> Output:
    """A copy of a forward's output."""
    return [each.clone() for each in out] if isinstance(out, list) else out.clone()


def equal(one: Output, other: Output) -> bool:
    """Whether two outputs are equal to the bit."""
    return all(map(torch.equal, _list(one), _list(other)))


def relative_difference(one: Output, other: Output) -> float:
    """The largest relative difference of two outputs, in the norm."""
    pairs = zip(_list(one), _list(other), strict=True)
    return max((float((a - b).norm() / b.norm()) for a, b in pairs), default=0.0)


def _list(out: Output) -> list[Tensor]:
    return out if isinstance(out, list) else [out]

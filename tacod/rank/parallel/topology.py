"""A rank's place: the groups that each layout of the ranks needs, made once and kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from tacod.plan import DEFAULT_POLICY, AttentionPolicy, Layout
from tacod.rank.comm.clock import Clock
from tacod.rank.comm.group import Group, MakeGroup
from tacod.rank.comm.peers import reach_peers
from tacod.rank.comm.transport import Transport
from tacod.rank.parallel.sequence import SequenceParallel

__all__ = ["Seat", "Topology"]


@dataclass(frozen=True)
class Seat:
    """A rank's place in a layout."""

    batch: Group
    """The ranks at the same place in all batch groups; this rank's number in it is that of its batch group."""
    whole: Group
    ulysses: Group
    ring: Group
    transport: Transport | None
    """The transport between Ulysses' ranks; None for the default."""
    shares: tuple[int, ...]
    """Those of the ranks of ``whole``."""

    def sequence(self, policy: AttentionPolicy = DEFAULT_POLICY, in_step: bool = True) -> SequenceParallel:
        """The ranks that share a sequence, and how they attend.

        ``in_step`` says that the other batch groups run every layer that this one does.
        """
        images = self.batch if in_step else None
        return SequenceParallel(self.whole, self.ulysses, self.ring, policy, self.transport, images, self.shares)


class Topology:
    """All ranks, and their seats in any layout.

    Groups are made when a layout is first used. All ranks plan alike, so they use it at the same time. Several layouts
    exist side by side, such as 2 × 2 for a batch of two and 4 for one image.
    """

    def __init__(
        self,
        rank: int = 0,
        world_size: int = 1,
        make_group: MakeGroup | None = None,
        reach: Callable[[Group], Transport] | None = None,
        hosts: Sequence[int] = (),
    ) -> None:
        """Make it of all ranks.

        ``reach`` finds the transport of a Ulysses group within a host; without it, and across hosts, that is
        collectives. ``hosts`` has the number of each rank's host, by default one for all.
        """
        self.rank = rank
        self.world_size = world_size
        self.hosts = tuple(hosts) or (0,) * world_size
        self.clock = Clock()
        self._make_group = make_group
        self._groups: dict[tuple[tuple[int, ...], ...], Group] = {}
        self._seats: dict[Layout, Seat | None] = {}
        self.reach = reach
        self._transports: dict[Group, Transport] = {}
        self.everyone = self._group([range(world_size)])

    def seat(self, layout: Layout) -> Seat | None:
        """This rank's place in ``layout``; None if the layout leaves it idle."""
        if layout not in self._seats:
            self._seats[layout] = self._make_seat(layout)
        return self._seats[layout]

    def settle(self) -> None:
        """Wait until this rank's GPU has done what was begun, and forget how long it waited for others."""
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()
            self.clock.wait()
        # Its waits are no later step's.
        self.clock.take_s()

    @property
    def spans_hosts(self) -> bool:
        """Whether the ranks are on several hosts."""
        return len(set(self.hosts)) > 1

    @cached_property
    def neighbours(self) -> Group:
        """The ranks of this rank's host, in their order. All ranks ask at once."""
        if not self.spans_hosts:
            return self.everyone
        of_each = [[rank for rank, each in enumerate(self.hosts) if each == host] for host in dict.fromkeys(self.hosts)]
        # A single rank is no group, and `_group` looks at the first one.
        return self._group(sorted(of_each, key=len, reverse=True))

    @cached_property
    def reaches(self) -> bool:
        """Whether the ranks of each host reach each other's memory, and may. All of them ask at once."""
        if self.world_size == 1:
            return False
        if self.reach is None:
            # Ranks on CPUs share the host's memory; those on GPUs are told to use collectives alone.
            return not self.everyone.on_gpu
        near = self.neighbours
        return self.everyone.agree(near.size == 1 or reach_peers(near) is not None)

    def begin_anew(self) -> None:
        """After a failed forward, keep the next one from seeing what it left in shared memory.

        Every graph must be gone.
        """
        self.settle()
        for transport in self._transports.values():
            transport.reset()

    def _make_seat(self, layout: Layout) -> Seat | None:
        sequence, members = layout.sequence, layout.members
        wholes = [members[start : start + sequence] for start in range(0, layout.ranks, sequence)]
        runs = [whole[i : i + layout.ulysses] for whole in wholes for i in range(0, sequence, layout.ulysses)]
        rings = [whole[i :: layout.ulysses] for whole in wholes for i in range(layout.ulysses)]
        across = [members[i::sequence] for i in range(sequence)]
        whole, ulysses, ring, batch = (self._group(parts) for parts in (wholes, runs, rings, across))
        if self.rank not in members:
            return None
        run = next(run for run in runs if self.rank in run)
        near = len({self.hosts[rank] for rank in run}) == 1
        if self.reach is not None and near and ulysses.size > 1 and ulysses not in self._transports:
            self._transports[ulysses] = self.reach(ulysses)
        return Seat(batch, whole, ulysses, ring, self._transports.get(ulysses), layout.group_shares(batch.rank))

    def _group(self, parts: Sequence[Sequence[int]]) -> Group:
        """Of ``parts``, the group with this rank; if there is none, or no other rank in it, a group of one."""
        if len(parts[0]) == 1:
            return Group(clock=self.clock)
        idle = sorted({*range(self.world_size)}.difference(*parts))
        split = tuple(tuple(part) for part in (*parts, *([rank] for rank in idle)))
        if split not in self._groups:
            assert self._make_group is not None
            self.clock.begun += 1
            self._groups[split] = Group(self._make_group([list(part) for part in split]), self.clock)
        return self._groups[split]

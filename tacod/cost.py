"""How long a forward takes in a layout: a model of it, and what is measured for it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tacod.layout import Layout, Shape, fastest_alone, tokens_of
from tacod.shares import EQUAL, Shares, apportion, in_lowest_terms

__all__ = ["USUAL", "DeviceRates", "cost", "measured_rates"]

RING_COLLECTIVES = 4
"""How many collectives a turn of a ring counts as, its merge included."""
RING_SLOWDOWN = 1.6
"""How many times as long attention takes in parts that are merged in fp32."""
BYTES = 2
"""Bytes of a number in an exchange, in bf16."""


@dataclass(frozen=True)
class DeviceRates:
    """How fast devices compute and exchange, by default as GPUs with fast links, in bf16.

    Measured rates count only the part of a transfer that computation doesn't hide.
    """

    flops: float = 400e12
    """Of one device, in FLOP/s; of the slowest one, if they are unequal."""
    bytes: float = 150e9
    """What one device exchanges, in bytes/s of waiting."""
    collective_s: float = 2e-4
    """Seconds of a collective beside those of its bytes."""
    network_bytes: float = 12.5e9
    """What one host sends to others, in bytes/s of waiting: by default as over 100 Gb/s."""


USUAL = DeviceRates()
"""For plans before anything was measured."""


def cost(
    layout: Layout,
    shape: Shape,
    rates: DeviceRates = USUAL,
    exchange: str = "exact",
    shares: Shares = EQUAL,
    hosts: Sequence[int] = (),
) -> float:
    """Seconds of one block of one forward in the slowest batch group, on ranks that are as fast as their ``shares``.

    ``hosts`` has the number of each rank's host, none for one host. The ranks of a host share its network.

    A rank's matrices multiply its tokens; its attention has its heads and all keys. Ranks wait for each other between
    the two, so each takes as long as on the rank that is the last. A ring attends in parts, which takes longer, and
    hides its transfers behind half of the attention.
    """
    lengths = shape.lengths or (4096,)
    slowest = min(shares.each, default=1)
    images = layout.images(shape.batch)

    def of_group(group: int) -> float:
        members = layout.members[group * layout.sequence : (group + 1) * layout.sequence]
        have = tokens_of(lengths, layout.group_shares(group))
        places = in_lowest_terms(layout.head_shares(group))
        heads = apportion(shape.heads, places)
        runs = [sum(have[start : start + layout.ulysses]) for start in range(0, len(have), layout.ulysses)]
        places_of = [hosts[rank] if hosts else 0 for rank in members]
        leaving, passing = [0.0] * (max(places_of) + 1), [0.0] * (max(places_of) + 1)
        matrices_s, attention_s, exchanged_s, passed_s = [], [], [], []
        for seat, (rank, mine) in enumerate(zip(members, have, strict=True)):
            flops = rates.flops * (shares.each[rank] / slowest if shares.each else 1)
            run, part = runs[seat // layout.ulysses], heads[seat % layout.ulysses] / shape.heads
            matrices_s.append(images[group] * 24 * mine * shape.width**2 / flops)
            attends_s = images[group] * 4 * run * sum(lengths) * shape.width * part / flops
            attention_s.append(attends_s * (RING_SLOWDOWN if layout.ring > 1 else 1))
            here, first = places_of[seat], seat - seat % layout.ulysses
            far = sum(share for at, share in enumerate(places) if places_of[first + at] != here)
            near = sum(places) - places[seat % layout.ulysses] - far
            sent, size = images[group] * 4 * mine * shape.width, 1 if exchange == "int8" else BYTES
            exchanged_s.append(sent * near / sum(places) * size / rates.bytes)
            leaving[here] += sent * far / sum(places) * size
            passed = images[group] * 2 * run * shape.width * part * (layout.ring - 1) * BYTES
            leaves = places_of[(seat + layout.ulysses) % len(members)] != here
            passing[here] += passed if leaves else 0
            passed_s.append(0 if leaves else passed / rates.bytes)
        waiting_s = [
            near_s + leaving[here] / rates.network_bytes + max(0.0, by_s + passing[here] / rates.network_bytes - half_s)
            for here, near_s, by_s, half_s in zip(
                places_of, exchanged_s, passed_s, (each / 2 for each in attention_s), strict=True
            )
        ]
        return max(matrices_s) + max(attention_s) + max(waiting_s)

    collectives = 2 * (layout.ulysses > 1) + RING_COLLECTIVES * (layout.ring - 1)
    return max(map(of_group, range(layout.batch))) + collectives * rates.collective_s


def measured_rates(
    alone_s: float,
    layout: Layout,
    together_s: float,
    shape: Shape,
    shares: Shares = EQUAL,
    hosts: Sequence[int] = (),
) -> DeviceRates:
    """The rates for which `cost` gives ``alone_s`` on the fastest rank, and a time near ``together_s`` in ``layout``.

    Links have one unknown: how many times as slow as `USUAL` they are, for bytes, for collectives and between hosts
    alike.
    """
    flops = USUAL.flops * cost(fastest_alone(shares), shape, shares=shares) / alone_s

    def rates(slowness: float) -> DeviceRates:
        return DeviceRates(flops, USUAL.bytes / slowness, USUAL.collective_s * slowness, USUAL.network_bytes / slowness)

    fast, slow = 1e-6, 1e6
    for _ in range(100):
        between = math.sqrt(fast * slow)
        if cost(layout, shape, rates(between), shares=shares, hosts=hosts) < together_s:
            fast = between
        else:
            slow = between
    return rates(fast)

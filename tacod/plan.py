"""How one forward is split over the ranks: a value that can explain itself.

There are two axes. Batch: whole images go to different ranks, which exchange nothing until the end (CFG's two halves
are a batch of two). Sequence: ranks share every image's tokens, by Ulysses, by a ring, or by both. Who takes how much
is in `tacod.layout`, how long that takes in `tacod.cost`; users of plans find both here.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from tacod.cost import USUAL, DeviceRates, cost, measured_rates
from tacod.layout import Layout, Shape, fastest_alone, layouts, tokens_of
from tacod.shares import EQUAL, Shares, apportion, in_lowest_terms
from tacod_client.dtypes import ATTENTIONS
from tacod_client.errors import ArgumentError

__all__ = [
    "AUTO",
    "DEFAULT_POLICY",
    "AttentionPolicy",
    "DeviceRates",
    "Layout",
    "Plan",
    "Request",
    "Shape",
    "check_fits",
    "cost",
    "fastest_alone",
    "make_plan",
    "measured_rates",
    "parse_request",
]


IN_PARTS = ("exact", "sage", "fa3")
"""The attentions whose parts can be merged, as a ring does: they tell the log-sum-exp of the scores."""


@dataclass(frozen=True)
class Request:
    """What a client asked for; None leaves the choice to the planner."""

    sequence_parallel_degree: int | None = None
    cfg_parallel: bool | None = None
    ulysses: int | None = None
    ring: int | None = None
    flash_attention: bool | None = None
    """False keeps to the plain attention kernels."""
    attention: str | None = None
    """Another attention kernel than the exact ones: one of `ATTENTIONS` (`tacod.rank.ops.attention_kernels`)."""
    exchange: str | None = None
    """``"int8"`` halves the bytes of Ulysses' exchange, which helps GPUs without peer access."""
    step_cache: float | None = None
    """Relative change of the first block's residual below which a step skips the other blocks; 0 is exact."""

    def allows(self, layout: Layout, batch: int) -> bool:
        """Whether a layout does what was asked for. A batch of one is never split."""
        wanted = (
            (self.sequence_parallel_degree, layout.sequence),
            (self.ulysses, layout.ulysses),
            (self.ring, layout.ring),
        )
        if any(asked is not None and asked != got for asked, got in wanted):
            return False
        return self.cfg_parallel is None or (layout.batch > 1) == (self.cfg_parallel and batch > 1)

    def without_ring(self, needs: str) -> Request:
        """The same request without a ring, which ``needs`` something. Raises `ArgumentError` if it asks for one."""
        if self.ring is not None and self.ring > 1:
            raise _refused(f"ring {self.ring} needs {needs}; ask for ulysses, or auto")
        return replace(self, ring=1)


AUTO = Request()


@dataclass(frozen=True)
class AttentionPolicy:
    """How attention is computed and exchanged."""

    flash: bool = True
    """Whether the fastest attention kernel may run, or only the plain ones."""
    exchange: Literal["exact", "int8"] = "exact"
    """``"int8"`` sends queries, keys, values and outputs in 8 bits between Ulysses' ranks; a ring stays exact."""
    kernel: str = "exact"
    """The kernel of the blocks' attention: ``"exact"`` or another of `ATTENTIONS`."""
    split_kv: bool = False
    """Whether Ulysses' ranks split the keys for the queries of the last, partial wave (`tacod.rank.ops.split_kv`). The
    engine sets it for forwards that may become a CUDA graph; clients can't ask for it."""


DEFAULT_POLICY = AttentionPolicy()


@dataclass(frozen=True)
class Plan:
    """A layout for one forward, and each rank's share."""

    layout: Layout
    world_size: int
    shape: Shape
    attention: AttentionPolicy = DEFAULT_POLICY
    slowdown: float | None = None
    """If ranks are left idle because they would not help: how many times as long all of them would take."""
    step_cache: float = 0.0
    """The threshold of the step cache; 0 turns it off."""
    shares: Shares = EQUAL
    """Of all ranks, also those that are left idle."""

    @property
    def tokens(self) -> list[int]:
        """The tokens of each image that each rank of the first batch group holds, over all streams."""
        return self._tokens_of(0)

    def _tokens_of(self, group: int) -> list[int]:
        return tokens_of(self.shape.lengths, self.layout.group_shares(group))

    @property
    def _all_the_same(self) -> str:
        """What is said of unequal ranks that take equal shares."""
        paces = in_lowest_terms([self.shares.each[rank] for rank in self.layout.members])
        taken = in_lowest_terms([share for share in self.layout.shares if share] or [1] * self.layout.ranks)
        return "" if paces == taken else "; equal shares exchange less"

    @functools.cached_property
    def reason(self) -> str:
        """Each rank's share, and why."""
        layout, shape = self.layout, self.shape
        said = [f"{self.shares}{self._all_the_same}"] if self.shares.each else []
        if layout.batch > 1:
            said.append(f"{shape.batch} images over {layout.batch} groups: {_each(layout.images(shape.batch))}")
        if layout.ulysses > 1:
            heads = [apportion(shape.heads, layout.head_shares(group)) for group in range(layout.batch)]
            empty = max(each.count(0) for each in heads)
            idle = f", {empty} without a head to attend" if empty else ""
            said.append(f"{shape.heads} heads over {layout.ulysses} ranks: {_by_group(heads)}{idle}")
        if shape.lengths and layout.sequence > 1:
            tokens = list(map(self._tokens_of, range(layout.batch)))
            said.append(f"{sum(shape.lengths)} tokens: {_by_group(tokens)}")
        if layout.ranks < self.world_size:
            idle = f"{self.world_size - layout.ranks} of {self.world_size} ranks idle"
            if layout.shares:
                idle += f" ({', '.join(f'rank {rank}' for rank, share in enumerate(layout.shares) if not share)})"
            said.append(
                idle if self.slowdown is None else f"{idle}: with all it would take {self.slowdown:.2f} times as long"
            )
        said = said or [f"{shape.heads} heads on one rank"]
        if not self.attention.flash:
            said.append("no flash attention")
        if self.attention.kernel != "exact":
            said.append(f"attention {self.attention.kernel}")
        if self.attention.exchange == "int8" and layout.ulysses > 1:
            said.append("exchanged in 8 bits")
        if self.step_cache:
            said.append(f"step cache {self.step_cache:g}")
        return "; ".join(said)

    def __str__(self) -> str:
        """For example ``sequence 3 (ulysses; 24 heads over 3 ranks: 8 each; 4608 tokens: 1537 + 1536 + 1535)``."""
        text = str(self.layout)
        return f"{text[:-1]}; {self.reason})" if text.endswith(")") else f"{text} ({self.reason})"


def _each(sizes: Sequence[int]) -> str:
    return f"{sizes[0]} each" if len(set(sizes)) == 1 else " + ".join(map(str, sizes))


def _by_group(sizes: Sequence[Sequence[int]]) -> str:
    """The same for each batch group; once, if it is the same for all."""
    return " and ".join(dict.fromkeys(map(_each, sizes)))


_SWITCHES = ("cfg_parallel", "flash_attention")
_CHOICES = {"exchange": ("exact", "int8"), "attention": ATTENTIONS}


def parse_request(request: Any, world_size: int) -> Request:
    """Read ``"auto"`` or a map of `Request`'s fields, and check that this number of ranks can do it.

    Raises `ArgumentError`, which says why not and what would fit.
    """
    if request == "auto":
        return AUTO
    if not isinstance(request, Mapping) or not request:
        raise _refused(f'expected "auto" or a map of {", ".join(vars(AUTO))}; got {request!r:.80}')
    for key, value in request.items():
        if key not in vars(AUTO):
            raise _refused(f"unknown key {key!r:.40}; the keys are {', '.join(vars(AUTO))}")
        if key in _SWITCHES and type(value) is not bool:
            raise _refused(f"{key}: expected true or false, got {value!r:.40}")
        if key in _CHOICES and value not in _CHOICES[key]:
            raise _refused(f"{key}: expected {' or '.join(map(repr, _CHOICES[key]))}, got {value!r:.40}")
        if key == "step_cache" and not (type(value) in (int, float) and 0 <= value < math.inf):
            raise _refused(f"step_cache: expected a number from 0 (off) up, such as 0.1; got {value!r:.40}")
        if key not in (*_SWITCHES, *_CHOICES, "step_cache") and (type(value) is not int or value < 1):
            raise _refused(f"{key}: expected a number of ranks from 1 up, got {value!r:.40}")
    asked = Request(**request)
    if asked.flash_attention is False:
        if asked.attention not in (None, "exact"):
            raise _refused(
                f"attention {asked.attention!r} and flash_attention false exclude each other; leave one of them out"
            )
        # A ring merges parts by their log-sum-exp, which the plain kernels don't tell.
        asked = asked.without_ring("flash attention")
    if asked.attention not in (None, *IN_PARTS):
        asked = asked.without_ring(f"another attention than {asked.attention!r}, which can't be merged from parts")
    check_fits(asked, world_size)
    return asked


def check_fits(asked: Request, world_size: int) -> None:
    """Raise `ArgumentError` if this number of ranks can't do what is asked."""
    product = (asked.ulysses or 1) * (asked.ring or 1)
    degree = asked.sequence_parallel_degree or product
    if degree % product or (asked.ulysses and asked.ring and degree != product):
        raise _refused(
            f"ulysses {asked.ulysses or 'any'} × ring {asked.ring or 'any'} can't make "
            f"sequence_parallel_degree {degree}; leave one of the three out"
        )
    groups = 2 if asked.cfg_parallel else 1
    if degree * groups > world_size:
        what = f"sequence {degree}" + (" × batch 2 (cfg_parallel)" if groups == 2 else "")
        fits = [f'{{"sequence_parallel_degree": {world_size}}}']
        if world_size >= 2 * groups:
            fits.append(f'{{"sequence_parallel_degree": {world_size // 2}, "cfg_parallel": true}}')
        what += f" takes {degree * groups} ranks, and there are {world_size}"
        raise _refused(f"{what}; what fits: {' or '.join(fits)}")


def _refused(reason: str) -> ArgumentError:
    return ArgumentError(f"plan: {reason}", argument="plan")


@functools.lru_cache(maxsize=64)
def make_plan(
    asked: Request,
    world_size: int,
    shape: Shape,
    rates: DeviceRates | None = None,
    shares: Shares = EQUAL,
    hosts: tuple[int, ...] = (),
) -> Plan:
    """The cheapest layout that does what was asked, in which the ranks have these ``shares``, on these ``hosts``.

    With measured ``rates`` it may leave ranks idle, the slowest ones, if that is faster; without them, it leaves as few
    idle as possible. With both measured, unequal ranks may take equal shares, as one with more tokens exchanges more.
    Raises `ArgumentError` if no layout does what was asked.
    """
    every = layouts(world_size, shape.batch, shares.each, free=shares.measured and rates is not None)
    allowed = [layout for layout in every if asked.allows(layout, shape.batch)]
    if not allowed:
        raise _refused(f"no layout of {world_size} ranks does {asked}; ask for less, or for auto")
    exchange: Literal["exact", "int8"] = "int8" if asked.exchange == "int8" else "exact"
    policy = AttentionPolicy(asked.flash_attention is not False, exchange, asked.attention or "exact")

    def price(layout: Layout) -> float:
        return cost(layout, shape, rates or USUAL, policy.exchange, shares, hosts)

    best = busiest = min(allowed, key=lambda layout: (-layout.ranks, price(layout), layout.ring))
    slowdown = None
    if rates is not None:
        best = min(allowed, key=lambda layout: (price(layout), -layout.ranks, layout.ring))
        slowdown = price(busiest) / price(best) if best.ranks < busiest.ranks else None
    return Plan(best, world_size, shape, policy, slowdown, asked.step_cache or 0.0, shares)

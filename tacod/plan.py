"""How one forward is spread over the ranks: a value that can explain itself.

Two axes. The batch: whole images (CFG's two halves are a batch of two) go to different ranks, which exchange nothing
until the end. The sequence: ranks share every image's tokens, by Ulysses, by a ring, or by both.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tacod_client.errors import ArgumentError

__all__ = ["AUTO", "Layout", "Plan", "Request", "Shape", "chunks", "make_plan", "parse_request"]

FLOPS_PER_BYTE = 2700
"""What a device computes while a byte crosses a link: 400 TFLOP/s (bf16, measured over whole models) and 150 GB/s."""
FLOPS_PER_COLLECTIVE = 80e9
"""The same for what one collective takes whatever its size, with its packing: 0.2 ms."""
RING_COLLECTIVES = 4
"""What a turn of a ring, with its merge, counts for."""
RING_SLOWDOWN = 1.6
"""Of attention in parts that are merged in fp32, against attention in one."""
BYTES = 2
"""Of a number on the wire, in bf16."""


def chunks(n: int, parts: int) -> list[int]:
    """Split ``n`` into uneven chunks: n // parts each, and one more for the first n % parts."""
    return [n // parts + (part < n % parts) for part in range(parts)]


@dataclass(frozen=True)
class Layout:
    """So many groups along the batch, each of ``ulysses`` × ``ring`` ranks that share a sequence."""

    batch: int
    ulysses: int
    ring: int

    @property
    def sequence(self) -> int:
        """Ranks that share one sequence."""
        return self.ulysses * self.ring

    @property
    def ranks(self) -> int:
        """Ranks that have something to do."""
        return self.batch * self.sequence

    def __str__(self) -> str:
        parts = [f"batch {self.batch}"] if self.batch > 1 else []
        if self.ring == 1 or self.ulysses == 1:
            kind = "ring" if self.ring > 1 else "ulysses"
            return " × ".join([*parts, f"sequence {self.sequence} ({kind})" if self.sequence > 1 else "sequence 1"])
        return " × ".join([*parts, f"sequence {self.sequence} (ulysses {self.ulysses} × ring {self.ring})"])


@dataclass(frozen=True)
class Shape:
    """What a forward looks like to the planner."""

    heads: int
    width: int
    batch: int = 1
    lengths: tuple[int, ...] = ()
    """Tokens of each stream (text, image); empty before there is a forward to plan."""


@dataclass(frozen=True)
class Request:
    """What was asked for; None leaves it to the planner."""

    sequence_parallel_degree: int | None = None
    cfg_parallel: bool | None = None
    ulysses: int | None = None
    ring: int | None = None
    flash_attention: bool | None = None
    """False keeps to the plain attention kernels."""

    def allows(self, layout: Layout, batch: int) -> bool:
        """Whether a layout is what was asked for. A batch of one can't be split, whatever was asked."""
        wanted = (
            (self.sequence_parallel_degree, layout.sequence),
            (self.ulysses, layout.ulysses),
            (self.ring, layout.ring),
        )
        if any(asked is not None and asked != got for asked, got in wanted):
            return False
        return self.cfg_parallel is None or (layout.batch > 1) == (self.cfg_parallel and batch > 1)

    def without_ring(self) -> Request:
        """The same without a ring. Raises `ArgumentError` if one was asked for."""
        if self.ring is not None and self.ring > 1:
            raise _refused(f"ring {self.ring} can't be without flash attention; ask for ulysses, or auto")
        return replace(self, ring=1)


AUTO = Request()


@dataclass(frozen=True)
class Plan:
    """A layout for one forward, and what each rank gets by it."""

    layout: Layout
    world_size: int
    shape: Shape
    flash_attention: bool = True
    """Whether the fastest attention kernel may run, or only the plain ones."""

    @property
    def tokens(self) -> list[int]:
        """The tokens of each image that each rank of a sequence group holds, over all streams."""
        streams = (chunks(length, self.layout.sequence) for length in self.shape.lengths)
        return [sum(part) for part in zip(*streams, strict=True)]

    @property
    def reason(self) -> str:
        """What each rank gets."""
        layout, shape = self.layout, self.shape
        said = []
        if layout.batch > 1:
            said.append(f"{shape.batch} images over {layout.batch} groups: {_each(chunks(shape.batch, layout.batch))}")
        if layout.ulysses > 1:
            heads = chunks(shape.heads, layout.ulysses)
            idle = f", {heads.count(0)} without a head to attend" if 0 in heads else ""
            said.append(f"{shape.heads} heads over {layout.ulysses} ranks: {_each(heads)}{idle}")
        if shape.lengths and layout.sequence > 1:
            said.append(f"{sum(shape.lengths)} tokens: {_each(self.tokens)}")
        if layout.ranks < self.world_size:
            said.append(f"{self.world_size - layout.ranks} of {self.world_size} ranks idle")
        said = said or [f"{shape.heads} heads on one rank"]
        if not self.flash_attention:
            said.append("no flash attention")
        return "; ".join(said)

    def __str__(self) -> str:
        """For example ``sequence 3 (ulysses; 24 heads over 3 ranks: 8 each; 4608 tokens: 1537 + 1536 + 1535)``."""
        text = str(self.layout)
        return f"{text[:-1]}; {self.reason})" if text.endswith(")") else f"{text} ({self.reason})"


def _each(sizes: Sequence[int]) -> str:
    return f"{sizes[0]} each" if len(set(sizes)) == 1 else " + ".join(map(str, sizes))


_SWITCHES = ("cfg_parallel", "flash_attention")


def parse_request(request: Any, world_size: int) -> Request:
    """Read ``"auto"`` or a map of `Request`'s fields, and see that so many ranks can do it.

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
        if key not in _SWITCHES and (type(value) is not int or value < 1):
            raise _refused(f"{key}: expected a number of ranks from 1 up, got {value!r:.40}")
    asked = Request(**request)
    if asked.flash_attention is False:
        # A ring merges parts by their log-sum-exp, which the plain kernels don't tell.
        asked = asked.without_ring()
    _check_fits(asked, world_size)
    return asked


def _check_fits(asked: Request, world_size: int) -> None:
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


def make_plan(asked: Request, world_size: int, shape: Shape) -> Plan:
    """Of the layouts that do what was asked and leave the fewest ranks idle, the cheapest.

    Raises `ArgumentError` if there is none.
    """
    layouts = [layout for layout in _layouts(world_size, shape.batch) if asked.allows(layout, shape.batch)]
    if not layouts:
        raise _refused(f"nothing on {world_size} ranks is like {asked}; ask for less, or for auto")
    best = min(layouts, key=lambda layout: (-layout.ranks, cost(layout, shape), layout.ring))
    return Plan(best, world_size, shape, asked.flash_attention is not False)


def _layouts(world_size: int, batch: int) -> Iterator[Layout]:
    for groups in range(1, min(batch, world_size) + 1):
        for ulysses in range(1, world_size // groups + 1):
            for ring in range(1, world_size // groups // ulysses + 1):
                yield Layout(groups, ulysses, ring)


def cost(layout: Layout, shape: Shape) -> float:
    """One block of one forward on the busiest rank, in floating-point operations.

    The matrices see its tokens, the attention its heads and all keys; a byte or a collective costs what the device
    could have computed meanwhile. A ring attends in parts, which takes longer, and hides its transfers behind that as
    far as half of it lasts.
    """
    tokens = sum(shape.lengths) or 4096
    images = math.ceil(shape.batch / layout.batch)
    mine = sum(math.ceil(length / layout.sequence) for length in shape.lengths) or math.ceil(tokens / layout.sequence)
    run = mine * layout.ulysses
    heads = math.ceil(shape.heads / layout.ulysses) / shape.heads
    matrices = 24 * mine * shape.width**2
    attention = 4 * run * tokens * shape.width * heads * (RING_SLOWDOWN if layout.ring > 1 else 1)
    exchanged = 4 * mine * shape.width * (layout.ulysses - 1) / layout.ulysses * BYTES
    passed = 2 * run * shape.width * heads * (layout.ring - 1) * BYTES
    collectives = 2 * (layout.ulysses > 1) + RING_COLLECTIVES * (layout.ring - 1)
    exposed = max(0.0, images * passed * FLOPS_PER_BYTE - images * attention / 2)
    exchange = images * exchanged * FLOPS_PER_BYTE + exposed + collectives * FLOPS_PER_COLLECTIVE
    return images * (matrices + attention) + exchange

"""Where a model's weights lie: whole on each rank, shared out among the ranks, or in the host's memory.

A pure function of sizes, so all ranks place alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tacod.rank.parallel.modulation import owners
from tacod_client.errors import ArgumentError, OutOfMemory

__all__ = ["Placement", "Sizes", "choose"]


@dataclass(frozen=True)
class Sizes:
    """Bytes of a model's weights on a device, of those that may be stored apart and of the others."""

    blocks: Mapping[str, int]
    """Of each block of the trunk, by its path, in the order of their use."""
    modulations: Mapping[str, int] = field(default_factory=dict)
    """Of each layer that ranks share out in any case."""
    others: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.blocks.values()) + sum(self.modulations.values()) + self.others


@dataclass(frozen=True)
class Placement:
    """Where weights lie."""

    kind: str
    """``replicated``, ``sharded`` or ``host``."""
    resident: frozenset[str]
    """The paths of the blocks and modulations that every rank holds whole."""
    device_bytes: int
    """What each rank takes on its device, at most."""
    streamed_bytes: int = 0
    """What each rank fetches in a forward."""

    @property
    def streams(self) -> bool:
        """Whether a rank lacks any."""
        return self.kind != "replicated"

    def describe(self, sizes: Sizes, ranks: int) -> str:
        """In words."""
        if not self.streams:
            return f"weights: {_size(self.device_bytes)}, whole on each of {ranks} ranks"
        whole = len(self.resident & sizes.blocks.keys())
        where = f"shared out among {ranks} ranks" if self.kind == "sharded" else "in the host's memory"
        return (
            f"weights: {_size(self.device_bytes)} on each rank; {whole} of {len(sizes.blocks)} blocks are whole there, "
            f"the others {where}, of which a rank fetches {_size(self.streamed_bytes)} in a forward"
        )


def choose(asked: str, sizes: Sizes, ranks: int, budget: int | None, reaches: bool) -> Placement:
    """The placement that was asked for.

    Args:
        asked: ``replicated``, ``sharded`` or ``host``: every block is; or ``auto``: each rank holds as many blocks
            whole as its budget allows, and the others are shared out among the ranks if they reach each other's memory.
        sizes: The weights'.
        ranks: How many ranks there are.
        budget: Bytes for weights on each device; None for no limit.
        reaches: Whether the ranks reach each other's memory.

    Raises `OutOfMemory` if ``auto`` finds no placement within the budget, `ArgumentError` if ranks are to share that
    don't reach each other's memory.
    """
    everything = Placement("replicated", frozenset((*sizes.blocks, *sizes.modulations)), sizes.total)
    shares = ranks > 1 and reaches
    if asked == "replicated" or (asked == "sharded" and ranks == 1):
        return everything
    if asked == "sharded" and not reaches:
        raise ArgumentError(
            "weights: these ranks don't reach each other's memory, so none can hold a share for the others; use "
            '"host" or "auto"',
            argument="weights",
        )
    if asked in ("sharded", "host"):
        return _placed(asked, sizes, ranks, 0)
    if budget is None or sizes.total <= budget:
        return everything
    for kind in ("sharded", "host") if shares else ("host",):
        most = len(sizes.blocks) + (len(sizes.modulations) if kind == "host" else 0)
        fitting = [each for n in range(most + 1) if (each := _placed(kind, sizes, ranks, n)).device_bytes <= budget]
        if fitting:
            return fitting[-1]
    least = _placed("host", sizes, ranks, 0).device_bytes
    raise OutOfMemory(
        f"these weights take {_size(sizes.total)}, and at least {_size(least)} on each device if the host holds all "
        f"blocks; {_size(budget)} are allowed: raise models.memory_bytes, or load a smaller file"
    )


def _placed(kind: str, sizes: Sizes, ranks: int, count: int) -> Placement:
    """A placement with so many units resident.

    In the host's memory modulations are resident first, for nothing is computed while they come. Among ranks each has
    its owner, who computes it.
    """
    first = list(sizes.modulations) if kind == "host" else []
    resident = {*first[:count], *_spread(list(sizes.blocks), count - len(first))}
    units = {**sizes.modulations, **sizes.blocks}
    lacking = [size for path, size in units.items() if path not in resident]
    held = sizes.others + sum(size for path, size in units.items() if path in resident)
    blocks = sum(size for path, size in sizes.blocks.items() if path not in resident)
    if kind == "sharded":
        held += -(-blocks // ranks) + _most_owned(sizes.modulations, ranks)
        streamed = blocks - blocks // ranks
    else:
        streamed = blocks + (sum(lacking) - blocks) // ranks
    return Placement(kind, frozenset(resident), held + 2 * max(lacking, default=0), streamed)


def _most_owned(modulations: Mapping[str, int], ranks: int) -> int:
    """The bytes of those that the rank with the most of them owns; their outputs are as their bytes."""
    owned = [0] * ranks
    for size, owner in zip(modulations.values(), owners(list(modulations.values()), ranks), strict=True):
        owned[owner] += size
    return max(owned)


def _size(count: int) -> str:
    """Bytes in words."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _spread(paths: list[str], count: int) -> list[str]:
    """So many of the paths, evenly among the others: while these compute, others come."""
    count = min(max(count, 0), len(paths))
    return [path for i, path in enumerate(paths) if (i + 1) * count // len(paths) > i * count // len(paths)]

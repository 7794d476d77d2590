"""Where a model's weights lie: whole on each rank, shared out among the ranks, or in the host's memory.

A pure function of sizes and of every rank's budget, so all ranks place alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from tacod.rank.parallel.modulation import owners
from tacod_client.errors import ArgumentError, OutOfMemory
from tacod_client.units import size as in_words

__all__ = ["Links", "Placement", "Sizes", "alternatives", "choose", "holders"]


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

    @cached_property
    def units(self) -> Mapping[str, int]:
        """Modulations and blocks."""
        return {**self.modulations, **self.blocks}

    @property
    def largest(self) -> int:
        """Of the largest unit."""
        return max(self.units.values(), default=0)

    @property
    def least(self) -> int:
        """What a device takes if the host has every unit: two buffers for the largest ones, and the others."""
        return self.others + 2 * self.largest


@dataclass(frozen=True)
class Links:
    """How fast each rank fetches weights while all others do too; by default as H100s did, over NVLink and PCIe 5."""

    peer_bytes_s: float = 120e9
    """From another rank's memory, in bytes/s."""
    host_bytes_s: float = 40e9
    """From the host's memory, in bytes/s."""
    measured: bool = False
    """Whether they were measured here."""

    def seconds(self, placement: Placement) -> list[float]:
        """How long each rank fetches in a forward."""
        rate = self.peer_bytes_s if placement.kind == "sharded" else self.host_bytes_s
        return [size / rate for size in placement.streamed_bytes]


USUAL_LINKS = Links()


@dataclass(frozen=True)
class Placement:
    """Where weights lie."""

    kind: str
    """``replicated``, ``sharded`` or ``host``."""
    resident: tuple[frozenset[str], ...]
    """For each rank, the paths of the blocks and modulations that it holds whole; some rank's are all other ranks'."""
    device_bytes: tuple[int, ...]
    """What each rank takes on its device."""
    streamed_bytes: tuple[int, ...]
    """What each rank fetches in a forward of all ranks."""
    can_shrink: bool = False
    """Whether ranks may give up blocks: nobody asked where the weights lie, and they take more than they have to."""

    @property
    def streams(self) -> bool:
        """Whether a rank lacks any."""
        return self.kind != "replicated"

    @property
    def everywhere(self) -> frozenset[str]:
        """What every rank holds whole."""
        return frozenset.intersection(*self.resident)

    def describe(self, sizes: Sizes, links: Links = USUAL_LINKS, compute_s: float | None = None) -> str:
        """In words, for ranks that have the same together; ``compute_s`` is what a forward's blocks are to take."""
        ranks = len(self.resident)
        if not self.streams:
            return f"weights: {in_words(self.device_bytes[0])}, whole on each of {ranks} ranks"
        where = f"shared out among {ranks} ranks" if self.kind == "sharded" else "in the host's memory"
        whole = [len(each & sizes.blocks.keys()) for each in self.resident]
        shares = list(zip(self.device_bytes, whole, self.streamed_bytes, strict=True))
        lines = []
        for share in dict.fromkeys(shares):
            held, count, fetched = share
            who = [str(rank) for rank, each in enumerate(shares) if each == share]
            on = "each rank" if len(who) == ranks else f"rank{'s' * (len(who) > 1)} {', '.join(who)}"
            lines.append(
                f"{in_words(held)} on {on}; {count} of {len(sizes.blocks)} blocks are whole there, the others {where}, "
                f"of which it fetches {in_words(fetched)} in a forward"
            )
        fetch_s = max(links.seconds(self))
        rate = links.peer_bytes_s if self.kind == "sharded" else links.host_bytes_s
        known = "measured" if links.measured else "assumed"
        cost = f"fetching takes {in_ms(fetch_s)} at {rate / 1e9:.0f} GB/s ({known})"
        if compute_s is not None:
            longer = fetch_s - compute_s
            cost += f", beside {in_ms(compute_s)} of computing (estimated): "
            cost += f"a forward is about {in_ms(longer)} longer" if longer > 0 else "it is hidden"
        return "weights: " + "\n         ".join([*lines, cost])


def choose(
    asked: str,
    sizes: Sizes,
    budgets: Sequence[int | None],
    reaches: bool,
    fewer: int = 0,
    links: Links = USUAL_LINKS,
    hosts: Sequence[int] = (),
) -> Placement:
    """The placement that was asked for.

    Args:
        asked: ``replicated``, ``sharded`` or ``host``: every block is; or ``auto``: each rank holds as many blocks
            whole as its own budget allows. The others are shared out among the ranks if these reach each other's
            memory, each has room for an even share, and that is fetched sooner; otherwise the host has them. On several
            hosts, the ranks of each share out among themselves, and each host has all of what isn't whole everywhere.
        sizes: The weights'.
        budgets: Bytes for weights on each rank's device; None for no limit.
        reaches: Whether the ranks of a host reach each other's memory.
        fewer: For ``auto``, by how many of the largest block every rank stays below what it would hold.
        links: How fast weights are fetched.
        hosts: The number of each rank's host; empty for one host.

    Raises `OutOfMemory` if ``auto`` finds no placement within the budgets, `ArgumentError` if ranks are to share that
    don't reach each other's memory.
    """
    ranks = len(budgets)
    hosts = tuple(hosts) or (0,) * ranks
    everything = Placement("replicated", (frozenset(sizes.units),) * ranks, (sizes.total,) * ranks, (0,) * ranks)
    if asked == "replicated" or (asked == "sharded" and len({*hosts}) == ranks):
        return everything
    if asked == "sharded" and not reaches:
        raise ArgumentError(
            "weights: these ranks don't reach each other's memory, so none can hold a share for the others; use "
            '"host" or "auto"',
            argument="weights",
        )
    if asked in ("sharded", "host"):
        return _placed(asked, sizes, [frozenset()] * ranks, hosts)
    limits = [sizes.total if budget is None else budget for budget in budgets]
    chosen = everything if min(limits) >= sizes.total else _filled(sizes, limits, reaches, links, hosts)
    if fewer and max(chosen.device_bytes) > sizes.least:
        lowered = [max(sizes.least, held - fewer * sizes.largest) for held in chosen.device_bytes]
        chosen = _filled(sizes, lowered, reaches, links, hosts)
    return replace(chosen, can_shrink=max(chosen.device_bytes) > sizes.least)


def alternatives(asked: str, sizes: Sizes, ranks: int, reaches: bool) -> str:
    """In words, what would take less of each device than weights that lie as asked; empty if nothing would."""
    found = []
    if asked == "replicated" and ranks > 1 and reaches:
        found.append(f'weights="sharded" takes {in_words(_shared(sizes, ranks))}')
    if asked == "sharded" and ranks > 1:
        found.append(f"{2 * ranks} ranks take {in_words(_shared(sizes, 2 * ranks))} each")
    if asked in ("replicated", "sharded") and sizes.least < sizes.total:
        found.append(f'weights="host" takes {in_words(sizes.least)} on each device, and "auto" what there is room for')
    return ", ".join([*found, "a file of fewer bits takes less"])


def _shared(sizes: Sizes, ranks: int) -> int:
    """What the rank with the most takes if no block is whole anywhere."""
    return max(_placed("sharded", sizes, [frozenset()] * ranks, (0,) * ranks).device_bytes)


def _filled(sizes: Sizes, budgets: Sequence[int], reaches: bool, links: Links, hosts: Sequence[int]) -> Placement:
    """The placement in which each rank's budget is full and the slowest rank fetches for the shortest time.

    Raises `OutOfMemory` if a budget is too little.
    """
    kinds = ("sharded", "host") if len({*hosts}) < len(budgets) and reaches else ("host",)
    found = [placed for kind in kinds if (placed := _fill(kind, sizes, budgets, hosts)) is not None]
    if found:
        return min(found, key=lambda each: max(links.seconds(each)))
    rank, budget = min(enumerate(budgets), key=lambda each: each[1])
    where = "" if len(set(budgets)) == 1 else f" on rank {rank}"
    raise OutOfMemory(
        f"these weights take {in_words(sizes.total)}, and at least {in_words(sizes.least)} on each device if the host "
        f"holds all blocks; {in_words(budget)} are allowed{where}, so {in_words(sizes.least - budget)} lack: raise "
        "models.memory_bytes, unload other models, or load a file of fewer bits"
    )


def _fill(kind: str, sizes: Sizes, budgets: Sequence[int], hosts: Sequence[int]) -> Placement | None:
    """Fill the budgets with whole units; None if one is too little for none.

    A rank with more room holds what those with less do, and more: what all hold needs no share. In the host's memory
    modulations are resident first, for nothing is computed while they come. Among ranks each has its owner, who
    computes it.
    """
    first, blocks = (list(sizes.modulations) if kind == "host" else []), list(sizes.blocks)

    def units(known: frozenset[str], count: int) -> frozenset[str]:
        """So many more than those that are known."""
        more = [path for path in first if path not in known][:count]
        return known | {*more, *_spread([path for path in blocks if path not in known], count - len(more))}

    def fits(resident: Sequence[frozenset[str]], ranks: Sequence[int]) -> bool:
        held = _placed(kind, sizes, resident, hosts).device_bytes
        return all(held[rank] <= budgets[rank] for rank in ranks)

    ranks, most = range(len(budgets)), len(first) + len(blocks)
    alike = [each for n in range(most + 1) if fits([each := units(frozenset(), n)] * len(ranks), ranks)]
    if not alike:
        return None
    known = alike[-1]
    resident = [known] * len(ranks)
    # A rank that computes modulations for the others has less left of an equal budget.
    owned = _owned(sizes.modulations, hosts) if kind == "sharded" else [0] * len(ranks)
    for rank in sorted(ranks, key=lambda rank: budgets[rank] - owned[rank]):
        more = [units(known, n) for n in range(most - len(known) + 1)]
        known = [each for each in more if fits([*resident[:rank], each, *resident[rank + 1 :]], [rank])][-1]
        resident[rank] = known
    return _placed(kind, sizes, resident, hosts)


def _placed(kind: str, sizes: Sizes, resident: Sequence[frozenset[str]], hosts: Sequence[int]) -> Placement:
    """A placement in which each rank holds these units whole."""
    ranks = len(resident)
    everywhere = frozenset.intersection(*resident)
    shared = sum(size for path, size in sizes.blocks.items() if path not in everywhere)
    owned = _owned(sizes.modulations, hosts)
    held, streamed = [], []
    for rank, whole in enumerate(resident):
        lacking = {path: size for path, size in sizes.units.items() if path not in whole}
        blocks = sum(size for path, size in lacking.items() if path in sizes.blocks)
        taken = sizes.total - sum(lacking.values()) + 2 * max(lacking.values(), default=0)
        if kind == "sharded":
            near = hosts.count(hosts[rank])
            held.append(taken + -(-shared // near) + owned[rank])
            streamed.append(blocks - blocks // near)
        else:
            held.append(taken)
            streamed.append(blocks + (sum(lacking.values()) - blocks) // ranks)
    return Placement(kind, tuple(resident), tuple(held), tuple(streamed))


def _owned(modulations: Mapping[str, int], hosts: Sequence[int]) -> list[int]:
    """The bytes of those that each rank holds; their outputs are as their bytes."""
    sizes = list(modulations.values())
    owned = [0] * len(hosts)
    for host in {*hosts}:
        for size, rank in zip(sizes, holders(sizes, hosts, host), strict=True):
            owned[rank] += size
    return owned


def holders(sizes: Sequence[int], hosts: Sequence[int], host: int) -> list[int]:
    """Which of a host's ranks holds each modulation, for their numbers of outputs.

    It is the rank that computes it in a forward of all ranks. What ranks of other hosts compute then, which others may
    compute in another layout, goes to the rank that holds least.
    """
    whose = owners(sizes, len(hosts))
    held = {rank: 0 for rank, each in enumerate(hosts) if each == host}
    for size, rank in zip(sizes, whose, strict=True):
        if rank in held:
            held[rank] += size
    found = []
    for size, rank in zip(sizes, whose, strict=True):
        if rank not in held:
            rank = min(held, key=held.__getitem__)
            held[rank] += size
        found.append(rank)
    return found


def in_ms(seconds: float) -> str:
    """Seconds in words."""
    return f"{seconds * 1e3:.1f} ms" if seconds < 10 else f"{seconds:.0f} s"


def _spread(paths: list[str], count: int) -> list[str]:
    """So many of the paths, evenly among the others: while these compute, others come."""
    count = min(max(count, 0), len(paths))
    return [path for i, path in enumerate(paths) if (i + 1) * count // len(paths) > i * count // len(paths)]

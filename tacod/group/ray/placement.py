"""On which hosts of a cluster the ranks run: few hosts, and evenly, so that they exchange little between them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["Node", "describe", "place"]


@dataclass(frozen=True)
class Node:
    """A host of the cluster, as Ray knows it."""

    id: str
    name: str
    free: int
    """Devices that nothing else has."""
    total: int


def place(ranks: int, nodes: Iterable[Node], here: str = "") -> dict[str, int]:
    """How many of so many ranks each node has, by id, in the order of ranks; empty if there is no room.

    One node if one has room, the fullest that has; else the fewest, with as many on each as there can be. Among equals
    the node with the id ``here`` comes first, whose results have the shortest way.
    """
    order = sorted(nodes, key=lambda node: (-node.free, node.id != here, node.id))
    alone = [node for node in order if node.free >= ranks]
    if alone:
        return {min(alone, key=lambda node: (node.free, node.id != here, node.id)).id: ranks}
    chosen: list[Node] = []
    for node in order:
        chosen.append(node)
        if sum(each.free for each in chosen) >= ranks:
            return _evenly(ranks, chosen)
    return {}


def _evenly(ranks: int, nodes: list[Node]) -> dict[str, int]:
    """Deal ranks out in turns; nodes with more room come first and have no fewer."""
    counts = dict.fromkeys((node.id for node in nodes), 0)
    while ranks:
        for node in nodes:
            if ranks and counts[node.id] < node.free:
                counts[node.id] += 1
                ranks -= 1
    return counts


def describe(nodes: Iterable[Node], what: str) -> str:
    """In words, what there is, such as ``3 of 4 GPUs free (gpu-a: 1 of 2, gpu-b: 2 of 2)``."""
    having = [node for node in nodes if node.total]
    each = ", ".join(f"{node.name}: {node.free} of {node.total}" for node in having)
    free, total = sum(node.free for node in having), sum(node.total for node in having)
    return f"{free} of {total} {what} free" + (f" ({each})" if each else "")

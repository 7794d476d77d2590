"""Which modules of a network are stored and fetched each by itself, where its weights don't lie whole on each rank."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from tacod.rank.weights.parts import parts_of
from tacod.rank.weights.placement import Sizes
from tacod.rank.weights.sizes import SMALLEST

__all__ = ["find_units", "sizes_of_units"]

_LARGEST = 1 / 8
"""Which part of all weights a unit may take, if it has modules that can be units themselves."""
_LEAST = 1 / 1000
"""Which part of all weights a unit has to take; smaller modules stay whole on each rank."""


def find_units(network: nn.Module) -> list[str]:
    """The paths of modules that together have most of a network's weights, in the order of the network.

    Nothing is known of the network: a unit is the largest module that is a small part of it, such as a block in a list
    of many, or a layer of a block in a list of a few. No unit shares a module with another one.
    """
    sizes = {module: _bytes(module) for module in network.modules()}
    total = sizes[network]
    taken: set[nn.Module] = set()

    def within(path: str, module: nn.Module) -> Iterator[str]:
        for name, child in module.named_children():
            where = f"{path}.{name}" if path else name
            if sizes[child] < total * _LEAST or not taken.isdisjoint(child.modules()):
                continue
            if sizes[child] <= total * _LARGEST or not any(map(sizes.get, child.children())):
                taken.update(child.modules())
                yield where
            else:
                yield from within(where, child)

    units = {path: sizes[network.get_submodule(path)] for path in within("", network)}
    largest = sorted(units, key=units.__getitem__, reverse=True)
    for path, next_one in zip(largest, [*largest[1:], None], strict=True):
        if next_one is not None and units[path] <= 2 * units[next_one]:
            break
        # The two buffers would have to be so much larger that it takes less if it lies whole on each rank.
        del units[path]
    return list(units)


def sizes_of_units(network: nn.Module, units: list[str], smallest: int = SMALLEST) -> Sizes:
    """The bytes of a network's weights and buffers, of units and of what is in none.

    Tensors of fewer bytes than ``smallest`` count as others.
    """
    blocks = {path: _bytes(network.get_submodule(path), smallest) for path in units}
    return Sizes(blocks, others=_bytes(network) - sum(blocks.values()))


def _bytes(module: nn.Module, smallest: int = 0) -> int:
    return sum(_own_bytes(each, smallest) for each in module.modules())


def _own_bytes(module: nn.Module, smallest: int = 0) -> int:
    return sum(
        part.nbytes
        for tensor in (*module._parameters.values(), *module._buffers.values())
        if tensor is not None
        for _, part in parts_of(tensor)
        if part.nbytes >= smallest
    )

"""The weights that a rank lacks, fetched one block ahead into two buffers.

The parameters of such a block are views into one of the buffers, which never move: layers of any kind and CUDA graphs
see ordinary tensors, and results are the same to the bit. While a block computes, copy engines fill the other buffer
with the next block's weights.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from tacod.rank.weights.depot import ALIGNED, Stored

__all__ = ["Buffers", "Stage", "Unit", "aligned", "assign", "owner_of"]

T = TypeVar("T")

BUFFERS = 2
"""One is in use while the other is filled."""


@dataclass(frozen=True, eq=False)
class Unit:
    """The stored tensors of one module: a block without its modulations, or one layer of these."""

    path: str
    tensors: Mapping[str, Stored]
    """By the names of the module's parameters and buffers, with the module's own path before them."""
    modulates: bool = False
    """Whether the ranks share its computation out with that of others."""

    def lacking(self, rank: int) -> dict[str, Stored]:
        """Those that a rank doesn't hold on its device, and fetches."""
        return {path: each for path, each in self.tensors.items() if each.whole(rank) is None}


class Fetcher(Protocol):
    """Fills two buffers beside what is computed."""

    def fetch(self, number: int, parts: Sequence[tuple[Stored, Tensor]]) -> None:
        """Begin to fill parts of the buffer ``number``, once all that was asked for before is computed."""

    def wait(self, number: int) -> None:
        """Have later work see what was fetched into this buffer."""


class OnCPU:
    """A `Fetcher` that copies at once."""

    def fetch(self, number: int, parts: Sequence[tuple[Stored, Tensor]]) -> None:
        """See `Fetcher.fetch`."""
        for stored, target in parts:
            stored.fetch(target)

    def wait(self, number: int) -> None:
        """See `Fetcher.wait`."""


class OnGPU:
    """A `Fetcher` on the current GPU, by a stream beside the current one."""

    def __init__(self) -> None:
        self._carrier = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._filled = [torch.cuda.Event() for _ in range(BUFFERS)]  # type: ignore[no-untyped-call]

    def fetch(self, number: int, parts: Sequence[tuple[Stored, Tensor]]) -> None:
        """See `Fetcher.fetch`."""
        self._carrier.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._carrier):
            for stored, target in parts:
                stored.fetch(target)
            self._filled[number].record()

    def wait(self, number: int) -> None:
        """See `Fetcher.wait`."""
        torch.cuda.current_stream().wait_event(self._filled[number])


@dataclass(eq=False)
class Buffers:
    """What the weights are fetched into."""

    memory: Sequence[Tensor]
    fetcher: Fetcher
    loop: object = None
    """Which loop over modules has filled them last."""

    @classmethod
    def of(cls, size: int, device: torch.device) -> Buffers:
        """Two of so many bytes."""
        memory = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(BUFFERS)]
        return cls(memory, OnGPU() if device.type == "cuda" else OnCPU())

    @property
    def size(self) -> int:
        """The bytes of each."""
        return len(self.memory[0])


@dataclass(frozen=True, eq=False)
class _Staged:
    """A unit in its buffer."""

    number: int
    parts: Sequence[tuple[Stored, Tensor]]
    places: Sequence[tuple[Any, str]]
    """For each part the module that has it, and its name there."""


class Stage:
    """The stored units of a model, and the buffers that this rank fetches what it lacks into.

    From then on the model's parameters are what this rank holds, or views into the buffers; what a view shows is a
    unit's only while `over` has its module. Raises `torch.OutOfMemoryError` if there is no room for the buffers.

    Args:
        model: Has the units' modules, by their paths.
        units: In the order of their use.
        resident: For each rank, the paths of the units that it holds whole besides; they are in the model.
        rank: This rank.
        device: The model's.
        buffers: Those of a model that this one shares weights with, which are used if they are large enough.
    """

    def __init__(
        self,
        model: nn.Module,
        units: Sequence[Unit],
        resident: Sequence[Collection[str]],
        rank: int,
        device: torch.device,
        buffers: Buffers | None = None,
    ) -> None:
        self.units = units
        self._resident, self._rank = resident, rank
        units = [unit for unit in units if unit.path not in resident[rank]]
        lacking = [unit.lacking(rank) for unit in units]
        largest = max((_room(each) for each in lacking), default=0)
        self.buffers = Buffers.of(largest, device) if buffers is None or buffers.size < largest else buffers
        self._staged: dict[int, _Staged] = {}
        for unit, missing in zip(units, lacking, strict=True):
            number, at, parts, places = len(self._staged) % BUFFERS, 0, [], []
            for path, stored in unit.tensors.items():
                tensor = stored.whole(rank)
                owner, leaf = owner_of(model, path)
                if tensor is None:
                    flat = self.buffers.memory[number][at : at + stored.nbytes]
                    at += aligned(stored.nbytes)
                    parts.append((stored, flat))
                    places.append((owner, leaf))
                    tensor = flat.view(stored.dtype).view(stored.shape)
                assign(owner, leaf, tensor)
            if missing:
                self._staged[id(model.get_submodule(unit.path))] = _Staged(number, parts, places)

    def over(self, modules: Iterable[T]) -> Iterator[T]:
        """The modules one by one, each with its weights in place until the next is asked for.

        What a module computes must be done, or asked of the GPU, before that. Those of the next ones are on their way.
        Raises `RuntimeError` if another loop has used the buffers meanwhile.
        """
        modules = list(modules)
        coming = deque(staged for each in modules if (staged := self._staged.get(id(each))) is not None)
        used: set[int] = set()
        loop = object()

        def fetch() -> None:
            while coming and coming[0].number not in used:
                staged = coming.popleft()
                used.add(staged.number)
                self.buffers.loop = loop
                self.buffers.fetcher.fetch(staged.number, staged.parts)

        try:
            fetch()
            for module in modules:
                staged = self._staged.get(id(module))
                if staged is not None:
                    self.buffers.fetcher.wait(staged.number)
                yield module
                if used and self.buffers.loop is not loop:
                    raise RuntimeError("another loop over blocks has taken the weights of this one")
                if staged is not None:
                    used.remove(staged.number)
                    fetch()
        finally:
            # Where it breaks off, nothing comes later.
            for number in used:
                self.buffers.fetcher.wait(number)

    @contextmanager
    def beside(self, module: T) -> Iterator[T]:
        """A module with its weights in place, also within a loop of `over`.

        What this rank lacks is fetched at once, into memory of its own, which is free again afterwards.
        """
        staged = self._staged.get(id(module))
        if staged is None:
            yield module
            return
        views = [getattr(owner, leaf) for owner, leaf in staged.places]
        try:
            for (owner, leaf), (stored, flat) in zip(staged.places, staged.parts, strict=True):
                assign(owner, leaf, stored.read(flat.device))
            yield module
        finally:
            for (owner, leaf), view in zip(staged.places, views, strict=True):
                assign(owner, leaf, view)

    @property
    def held(self) -> list[Tensor]:
        """The device's memory that is kept for this model: buffers, and what this rank holds for all."""
        slabs = {id(stored.slab): stored.slab for unit in self.units for stored in unit.tensors.values()}
        return [*self.buffers.memory, *(each.segments[self._rank] for each in slabs.values() if each.on_device)]

    def streamed_bytes(self, rank: int) -> int:
        """What a rank fetches of others' memory in a forward of all ranks."""
        return sum(
            each.fetched(rank) // (len(self._resident) if unit.modulates else 1)
            for unit in self.units
            if unit.path not in self._resident[rank]
            for each in unit.tensors.values()
            if not (unit.modulates and each.slab.on_device)
        )


def aligned(size: int) -> int:
    """Bytes, with those before the next tensor."""
    return -(-size // ALIGNED) * ALIGNED


def _room(tensors: Mapping[str, Stored]) -> int:
    """What tensors take in a buffer."""
    return sum(aligned(each.nbytes) for each in tensors.values())


def owner_of(model: nn.Module, path: str) -> tuple[Any, str]:
    """The module that has a parameter or a buffer, and its name there."""
    module, _, leaf = path.rpartition(".")
    return model.get_submodule(module), leaf


def assign(owner: Any, leaf: str, tensor: Tensor) -> None:
    """Make a tensor a module's parameter, or its buffer if it has such a one."""
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[leaf] = tensor

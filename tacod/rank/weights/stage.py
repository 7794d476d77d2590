"""The weights that a rank lacks, fetched one block ahead into two buffers.

The parameters of such a block are views into one of the buffers, which never move: layers of any kind and CUDA graphs
see ordinary tensors, and results are the same to the bit. While a block computes, copy engines fill the other buffer
with the next block's weights.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from tacod.rank.weights.depot import Stored, aligned, copy_bytes
from tacod.rank.weights.parts import assign

__all__ = ["BUFFERS", "Buffers", "Stage", "Staged", "Unit", "owner_of"]

T = TypeVar("T")

Copies = Sequence[tuple[Tensor, Tensor]]
"""Flat bytes to copy, each with where they go."""
BUFFERS = 2
"""One is in use while the other is filled."""


@dataclass(frozen=True, eq=False)
class Unit:
    """The stored tensors of one module: a block without its modulations, or one layer of these."""

    path: str
    tensors: Mapping[str, Stored]
    """By the names of the module's parameters and buffers, or of their parts, with the module's own path before."""
    modulates: bool = False
    """Whether the ranks share its computation out with that of others."""

    def lacking(self, rank: int) -> dict[str, Stored]:
        """Those that a rank doesn't hold on its device, and fetches."""
        return {path: each for path, each in self.tensors.items() if each.whole(rank) is None}


class Fetcher(Protocol):
    """Fills two buffers beside what is computed."""

    def fetch(self, number: int, copies: Copies) -> None:
        """Begin to fill parts of the buffer ``number``, once all that was asked for before is computed."""

    def wait(self, number: int) -> None:
        """Have later work see what was fetched into this buffer."""


class OnCPU:
    """A `Fetcher` that copies at once."""

    def fetch(self, number: int, copies: Copies) -> None:
        """See `Fetcher.fetch`."""
        for source, target in copies:
            copy_bytes(source, target)

    def wait(self, number: int) -> None:
        """See `Fetcher.wait`."""


class OnGPU:
    """A `Fetcher` on the current GPU, by a stream beside the current one."""

    def __init__(self) -> None:
        self._carrier = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._filled = [torch.cuda.Event() for _ in range(BUFFERS)]  # type: ignore[no-untyped-call]

    def fetch(self, number: int, copies: Copies) -> None:
        """See `Fetcher.fetch`."""
        self._carrier.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._carrier):
            for source, target in copies:
                copy_bytes(source, target)
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
class Staged:
    """A unit in its buffer."""

    number: int
    """The buffer's."""
    copies: Copies
    """What fills it."""
    lacking: Sequence[tuple[Any, str, Stored]]
    """What is fetched, each with the module that has it, and its name there."""


@dataclass(eq=False)
class _Loop:
    """A loop over modules."""

    modules: Sequence[Any]
    coming: deque[Staged]
    """Those of them that are still to be fetched."""
    used: set[int] = field(default_factory=set)
    """The buffers that have a module's weights, or get them."""


class Stage:
    """The stored units of a model, and the buffers that this rank fetches what it lacks into.

    From then on the model's parameters are what this rank holds, or views into the buffers; what a view shows is a
    unit's only while `over` has its module. Raises `torch.OutOfMemoryError` if there is no room for the buffers.

    Args:
        model: Has the units' modules, by their paths.
        units: In the order of their use.
        resident: For each rank that holds the units too, those of this host, the paths of the units that it holds whole
            besides; they are in the model.
        rank: This one of these ranks.
        device: The model's.
        buffers: Those of a model that this one shares weights with, which are used if they are large enough.
        sharing: How many ranks share the modulations' computation; those that hold the units, by default.
    """

    def __init__(
        self,
        model: nn.Module,
        units: Sequence[Unit],
        resident: Sequence[Collection[str]],
        rank: int,
        device: torch.device,
        buffers: Buffers | None = None,
        sharing: int = 0,
    ) -> None:
        self.units = units
        self._sharing = sharing or len(resident)
        self._resident, self._rank = resident, rank
        units = [unit for unit in units if unit.path not in resident[rank]]
        lacking = [unit.lacking(rank) for unit in units]
        # Room for all of a block, also for what this rank holds of it: then it is enough for patched models too.
        largest = max((_room(unit.tensors) for unit in units), default=0)
        self.buffers = Buffers.of(largest, device) if buffers is None or buffers.size < largest else buffers
        self._begun: _Loop | None = None
        """What `ahead` has begun, until it is looped over."""
        self._modulates = any(unit.modulates and missing for unit, missing in zip(units, lacking, strict=True))
        """Whether it fetches modulations too, which are needed before any block."""
        self._staged: dict[int, Staged] = {}
        self.staged: dict[str, Staged] = {}
        """The units that this rank fetches, by their paths, in the order of their use."""
        for unit, missing in zip(units, lacking, strict=True):
            number, at, copies, fetched = len(self._staged) % BUFFERS, 0, [], []
            for path, stored in unit.tensors.items():
                tensor = stored.whole(rank)
                owner, leaf = owner_of(model, path)
                if tensor is None:
                    flat = self.buffers.memory[number][at : at + stored.nbytes]
                    at += aligned(stored.nbytes)
                    copies += stored.copies(flat)
                    fetched.append((owner, leaf, stored))
                    tensor = flat.view(stored.dtype).view(stored.shape)
                assign(owner, leaf, tensor)
            if missing:
                # Each rank begins with the next one's pieces, so that not all read from the same rank at once.
                copies.sort(key=lambda each: (each[0] - rank - 1) % len(resident))
                ordered = [(source, target) for _, source, target in copies]
                self.staged[unit.path] = Staged(number, ordered, fetched)
                self._staged[id(model.get_submodule(unit.path))] = self.staged[unit.path]

    @contextmanager
    def ahead(self, modules: Iterable[Any]) -> Iterator[None]:
        """A context that begins to fetch the weights of the first of these modules, which are looped over in it.

        It doesn't where the modulations need the buffers first. Another loop that takes them has these fetched again.
        """
        if self._modulates:
            yield
            return
        self._begun = loop = self._loop(list(modules))
        self._fetch(loop)
        try:
            yield
        finally:
            self._begun = None
            self._wait(loop)

    def over(self, modules: Iterable[T]) -> Iterator[T]:
        """The modules one by one, each with its weights in place until the next is asked for.

        What a module computes must be done, or asked of the GPU, before that. Those of the next ones are on their way.
        Raises `RuntimeError` if another loop has used the buffers meanwhile.
        """
        modules = list(modules)
        loop = self._begun
        if loop is None or self.buffers.loop is not loop or list(map(id, modules)) != list(map(id, loop.modules)):
            loop = self._loop(modules)
        else:
            self._begun = None
        try:
            self._fetch(loop)
            for module in modules:
                staged = self._staged.get(id(module))
                if staged is not None:
                    self.buffers.fetcher.wait(staged.number)
                yield module
                if loop.used and self.buffers.loop is not loop:
                    raise RuntimeError("another loop over blocks has taken the weights of this one")
                if staged is not None:
                    loop.used.remove(staged.number)
                    self._fetch(loop)
        finally:
            self._wait(loop)

    def _loop(self, modules: Sequence[Any]) -> _Loop:
        staged = (self._staged.get(id(each)) for each in modules)
        return _Loop(modules, deque(each for each in staged if each is not None))

    def _fetch(self, loop: _Loop) -> None:
        """Begin to fetch what there is room for."""
        while loop.coming and loop.coming[0].number not in loop.used:
            staged = loop.coming.popleft()
            loop.used.add(staged.number)
            self.buffers.loop = loop
            self.buffers.fetcher.fetch(staged.number, staged.copies)

    def _wait(self, loop: _Loop) -> None:
        """Where a loop breaks off, nothing comes later."""
        for number in loop.used:
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
        views = [getattr(owner, leaf) for owner, leaf, _ in staged.lacking]
        try:
            for owner, leaf, stored in staged.lacking:
                assign(owner, leaf, stored.read(self.buffers.memory[0].device))
            yield module
        finally:
            for (owner, leaf, _), view in zip(staged.lacking, views, strict=True):
                assign(owner, leaf, view)

    @property
    def held(self) -> list[Tensor]:
        """The device's memory that is kept for this model: buffers, and what this rank holds for all."""
        slabs = {id(stored.slab): stored.slab for unit in self.units for stored in unit.tensors.values()}
        return [*self.buffers.memory, *(each.segments[self._rank] for each in slabs.values() if each.on_device)]

    def streamed_bytes(self, rank: int) -> int:
        """What a rank fetches of others' memory in a forward of all ranks."""
        return sum(
            each.fetched(rank) // (self._sharing if unit.modulates else 1)
            for unit in self.units
            if unit.path not in self._resident[rank]
            for each in unit.tensors.values()
            if not (unit.modulates and each.slab.on_device)
        )


def _room(tensors: Mapping[str, Stored]) -> int:
    """What tensors take in a buffer."""
    return sum(aligned(each.nbytes) for each in tensors.values())


def owner_of(model: nn.Module, path: str) -> tuple[Any, str]:
    """The module that has a parameter or a buffer, and its name there."""
    module, _, leaf = path.rpartition(".")
    return model.get_submodule(module), leaf

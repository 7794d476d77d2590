"""Weights that are fetched for a network that calls its blocks itself, in whatever order.

A hook on each module of a unit puts the unit's weights in place when one of its modules is called, and begins to fetch
those of the unit that followed it in the forward before. Meanwhile all other units have `Absent` weights: a network
that uses one of these without calling its module gets the right numbers too, only more slowly.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from tacod.rank.weights.depot import Stored
from tacod.rank.weights.parts import SEPARATOR, replaced
from tacod.rank.weights.stage import BUFFERS, Stage, Staged

__all__ = ["Absent", "Called", "hook_units"]


class Absent(Tensor):
    """A tensor of which this rank has nothing but its shape, its dtype and where its bytes are stored.

    Whatever computes with it reads it first, into memory of its own that is free again afterwards. Raises
    `RuntimeError` for what would change it.
    """

    stored: Stored
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __new__(cls, stored: Stored, device: torch.device) -> Absent:
        """One on a device."""
        made: Absent = torch.Tensor._make_wrapper_subclass(cls, stored.shape, dtype=stored.dtype, device=device)
        made.stored = stored
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """What PyTorch calls with one in the arguments."""
        kwargs = kwargs or {}
        if func is torch.ops.aten.to.dtype and args[1] == args[0].dtype and not (kwargs.get("copy") or any(args[3:4])):
            # As of any tensor, nothing has to be cast.
            return args[0]
        for place, argument in enumerate(func._schema.arguments):
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written and any(isinstance(each, Absent) for each in tree_leaves(value)):
                raise RuntimeError("a forward changes weights of its network, and these are read only")
        read = tree_map_only(Absent, lambda each: each.stored.read(each.device), (args, kwargs))
        return func(*read[0], **read[1])

    def __dlpack__(self, **options: Any) -> Any:
        """Its numbers for a kernel outside of PyTorch."""
        return self.stored.read(self.device).__dlpack__(**options)

    def data_ptr(self) -> int:
        """There is none. Raises `RuntimeError`."""
        raise RuntimeError('a kernel asks where a weight lies that is not in place; load with weights="replicated"')


@dataclass(frozen=True, eq=False)
class _Weight:
    """A parameter or a buffer of a unit."""

    table: dict[str, Any]
    """The module's."""
    name: str
    present: Any
    """Views into the unit's buffer."""
    absent: Any


class Called:
    """The weights that a rank lacks of such a network.

    Args:
        stage: Has the network's units, whose modules have the hooks of `hook_units`.
    """

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self._weights = {path: _weights(staged) for path, staged in stage.staged.items()}
        self._after: dict[str | None, str] = dict(zip([None, *stage.staged], stage.staged, strict=False))
        """The unit that was called after each, in the forward before; at first as they lie in the network."""
        self._last: str | None = None
        """The unit that was called last."""
        self._calls: list[str | None] = []
        """The units whose modules are being called, each within the one before; None for one that isn't fetched."""
        self._present: str | None = None
        """The unit that has its weights in place: only while a module of it is being called."""
        self._filled: list[str | None] = [None] * BUFFERS
        """Whose weights each buffer has, or gets."""
        self._addresses = {_address(each) for each in stage.buffers.memory if len(each)}

    @contextmanager
    def forward(self) -> Iterator[None]:
        """A context in which the network runs once. Afterwards the weights are the views of its `Stage` again."""
        self._last, self._calls, self._present, self._filled = None, [], None, [None] * BUFFERS
        for weights in self._weights.values():
            _put(weights, present=False)
        _running.append(self)
        try:
            self._fetch_after(None)
            yield
        finally:
            _running.pop()
            for number, path in enumerate(self._filled):
                if path is not None:
                    self.stage.buffers.fetcher.wait(number)
            for weights in self._weights.values():
                _put(weights, present=True)

    def enter(self, path: str) -> None:
        """A module of a unit is called: put its weights in place, and begin to fetch those of the next one."""
        self._calls.append(path if path in self._weights else None)
        self._show(self._calls[-1])

    def leave(self, out: Any) -> Any:
        """The call is over. Returns what it gave, without views into a buffer, which will have other weights."""
        left = self._calls.pop()
        if self._calls and self._calls[-1] == left:
            return out
        self._show(self._calls[-1] if self._calls else None)
        return tree_map_only(Tensor, lambda each: each.clone() if _address(each) in self._addresses else each, out)

    def _show(self, path: str | None) -> None:
        """Have this unit's weights in place, and no others."""
        if path == self._present:
            return
        if self._present is not None:
            _put(self._weights[self._present], present=False)
        self._present = None
        if path is None or self._is_taken(path):
            return
        self._fetch(path)
        self.stage.buffers.fetcher.wait(self._number(path))
        _put(self._weights[path], present=True)
        self._present = path
        if path != self._last:
            self._after[self._last], self._last = path, path
            if len({*self._calls}) == 1:
                self._fetch_after(path)

    def _is_taken(self, path: str) -> bool:
        """Whether a unit that is being called may use what the buffer of this one has."""
        return any(
            each is not None and each != path and self._number(each) == self._number(path) for each in self._calls
        )

    def _fetch_after(self, path: str | None) -> None:
        """Begin to fetch the unit that came after another one, if that one's buffer isn't its own."""
        coming = self._after.get(path)
        if coming is not None and (path is None or self._number(coming) != self._number(path)):
            self._fetch(coming)

    def _fetch(self, path: str) -> None:
        staged = self.stage.staged[path]
        if self._filled[staged.number] != path:
            self._filled[staged.number] = path
            self.stage.buffers.fetcher.fetch(staged.number, staged.copies)

    def _number(self, path: str) -> int:
        return self.stage.staged[path].number


_running: list[Called] = []
"""Those of the forward that runs."""


def hook_units(model: nn.Module, paths: Iterable[str]) -> None:
    """Have every module of these units, in copies of the model too, put its unit's weights in place when called."""
    for path in paths:
        for module in model.get_submodule(path).modules():
            # The first of all: where another one raises, `_behind` is called, and ends what this has begun.
            module.register_forward_pre_hook(_before(path), prepend=True)
            module.register_forward_hook(_behind, always_call=True)


# Plain functions, so that copies share them.
def _before(path: str) -> Any:
    def before(module: nn.Module, args: Any) -> None:
        if _running:
            _running[-1].enter(path)

    return before


def _behind(module: nn.Module, args: Any, out: Any) -> Any:
    return _running[-1].leave(out) if _running else None


def _weights(staged: Staged) -> Sequence[_Weight]:
    """The weights of a unit that this rank fetches, or parts of."""
    found: dict[tuple[int, str], _Weight] = {}
    for owner, leaf, stored in staged.lacking:
        name, _, behind = leaf.partition(SEPARATOR)
        table: dict[str, Any] = owner._parameters if name in owner._parameters else owner._buffers
        known = found.get((id(owner), name))
        absent = Absent(stored, table[name].device)
        whole = replaced(table[name] if known is None else known.absent, behind and SEPARATOR + behind, absent)
        # Making a parameter of it would read it.
        whole._is_param = table is owner._parameters
        found[id(owner), name] = _Weight(table, name, table[name], whole)
    return list(found.values())


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else 0


def _put(weights: Sequence[_Weight], *, present: bool) -> None:
    for each in weights:
        each.table[each.name] = each.present if present else each.absent

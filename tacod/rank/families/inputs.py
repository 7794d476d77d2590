"""The arguments of a forward: a spec for each, and the values of one forward as one immutable `Inputs`."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from tacod.rank.families.control import Control

__all__ = ["Anything", "Argument", "Inputs", "Number", "Numbers", "Places", "Record", "Residuals", "Spec", "Unread"]


@dataclass(frozen=True)
class Argument:
    """The spec of a forward's argument.

    ``shape`` has an int for a fixed size and a name for a free one; the same name means the same size in every argument
    of one forward. ``"B"`` is the batch: ranks get images along it, and a tensor without it is whole on every rank.
    ``"G*H*W"`` is the product of these sizes. ``None`` is for values that are not tensors.
    """

    shape: tuple[int | str, ...] | None
    required: bool = True
    many: bool = False
    """A list of such tensors; free sizes other than ``"B"`` may differ between its members."""
    others: tuple[tuple[int | str, ...], ...] = ()
    """With ``many``: the list has exactly one tensor of ``shape``, then one of each of these, such as video and sound.
    Each has ``"B"`` where ``shape`` has it. Names in ``per`` are each tensor's own."""
    fewest: int = 0
    """With ``others``: how many of these tensors must be there, the first ones; 0 means all."""
    choices: tuple[str | bool, ...] = ()
    """For ``shape=None``: the allowed strings, or true and false."""
    also: Mapping[str, str] = field(default_factory=dict)
    """Other allowed strings, each with the choice that it means."""
    mask: bool = False
    """Added to scores; it may be boolean too, then false hides a key."""
    keys: bool = False
    """A key mask: whether each token counts. It becomes boolean: integers are true if not 0, and floats if they are 0,
    because these are added to scores."""
    fp32: bool = False
    """It stays in fp32 whatever the compute dtype is, such as timesteps and guidance."""
    shared: bool = False
    """Its batch may also be 1, which broadcasts."""
    rows: int = 0
    """Its values are row numbers of a table with this many rows, and become int64; 0 for other arguments."""
    per: str | tuple[int | str, ...] = ()
    """Sizes that ``shape`` may have at its end, or one free size: a timestep for each frame instead of one for all."""
    widths: tuple[int, ...] = ()
    """Other sizes that its last dimension may have, such as that of a text before the network has refined it."""

    @property
    def longer(self) -> tuple[int | str, ...]:
        """``shape`` with ``per`` at its end."""
        return (*(self.shape or ()), *([self.per] if isinstance(self.per, str) and self.per else self.per))

    def shape_for(self, dims: int) -> tuple[int | str, ...] | None:
        """``shape``, with ``per`` at its end for a tensor with that many dimensions."""
        return self.longer if self.shape is not None and dims == len(self.longer) else self.shape

    @property
    def batch_axis(self) -> int | None:
        """The dimension that counts images; None if there is none."""
        return self.shape.index("B") if self.shape is not None and "B" in self.shape else None

    @property
    def members(self) -> list[Argument] | None:
        """The specs of a list's tensors; None if the list may have any number of tensors of one shape."""
        if not self.others:
            return None
        return [replace(self, shape=shape, many=False, others=(), fewest=0) for shape in (self.shape, *self.others)]

    def images(self, value: Any, part: slice) -> Any:
        """Some images of a tensor, or of each in a list; a batch of 1 that broadcasts stays whole."""
        if isinstance(value, list):
            return [self.images(each, part) for each in value]
        axis = self.batch_axis
        if axis is None or not isinstance(value, Tensor) or (self.shared and value.shape[axis] == 1):
            return value
        return value[(slice(None),) * axis + (part,)]


@dataclass(frozen=True)
class Numbers:
    """An argument that is a map of numbers with these names; each may be left out."""

    names: tuple[str, ...]
    required: bool = False


@dataclass(frozen=True)
class Number:
    """An argument that is one number within bounds, or a list of such, the same for all images of a forward."""

    least: float
    most: float
    required: bool = False
    many: bool = False
    """A list of them."""


@dataclass(frozen=True)
class Record:
    """An argument that is a map: each of its fields has a spec. With ``many`` it is a list of such maps.

    Its tensors are the same for all images of a forward, and their free sizes are nobody else's.
    """

    fields: Mapping[str, Spec]
    many: bool = False
    required: bool = False


@dataclass(frozen=True)
class Residuals:
    """What a ControlNet adds to the image's tokens after each block, as in ComfyUI's ``control``.

    It is a map of lists of [B or 1, N, width] tensors or None, one for each block; a longer list's end is ignored.
    """

    width: int
    blocks: Mapping[str, int]
    """How many blocks each list is for."""
    whole: bool = False
    """Whether each must be for all of the image's tokens; otherwise it may be for the first ones."""
    required: bool = False


@dataclass(frozen=True)
class Places:
    """An argument that is a list of places in a sequence: non-decreasing whole numbers from 0 to its length.

    They are the same for all images of a forward.
    """

    length: str
    """The free size that is the length, by its name in other arguments' shapes."""
    required: bool = False


@dataclass(frozen=True)
class Unread:
    """An argument that ComfyUI passes and the network ignores: its value is dropped."""

    required: bool = False


@dataclass(frozen=True)
class Anything:
    """An argument whose meaning its network alone knows: a tensor, number, string, or lists and maps of these.

    Tensors keep their dtype, but for floating-point ones of the dtype of ``x``, which come in the compute dtype. Those
    with as many rows as there are images are shared out along these.
    """

    required: bool = False
    tensor: bool = False
    """Whether it must be a tensor, or a list of tensors."""

    def images(self, value: Any, part: slice, batch: int) -> Any:
        """Some images of a value for a batch of this many."""
        return _map(value, lambda each: each[part] if each.ndim and len(each) == batch else each)


Spec = Anything | Argument | Number | Numbers | Places | Record | Residuals | Unread
"""The spec of one argument of a forward."""


class Inputs(Mapping[str, Any]):
    """The arguments of one forward on this rank's device, by name; None and `Unread` values are left out.

    Values are tensors, numbers, strings, lists and maps of these, and a `Control`.
    """

    def __init__(self, values: Mapping[str, Any], specs: Mapping[str, Spec]) -> None:
        self._values = {
            name: value
            for name, value in values.items()
            if value is not None and not isinstance(specs.get(name), Unread)
        }
        self.specs = specs

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    @property
    def latents(self) -> list[Tensor]:
        """The noisy latents: ``x``, or each of them where there are several."""
        return _tensors(self._values["x"])

    @property
    def timesteps(self) -> list[Tensor]:
        """The timestep, or each of them where latents have timesteps of their own."""
        return _tensors(self._values["timestep"])

    @property
    def batch(self) -> int:
        """Images of this forward."""
        return len(self.latents[0])

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor, those of lists too, in one order."""
        return [tensor for value in self._values.values() for tensor in _tensors(value)]

    @property
    def control(self) -> Control | None:
        """A ControlNet's residuals, if there are any."""
        return next((value for value in self._values.values() if isinstance(value, Control)), None)

    @property
    def key(self) -> Hashable:
        """What a CUDA graph depends on: shapes and dtypes of tensors, and all other values."""
        return tuple((name, _key(value)) for name, value in sorted(self._values.items()))

    def clone(self) -> Inputs:
        """The same values, with tensors of their own."""
        return Inputs(_map(self._values, torch.clone), self.specs)

    def replace(self, /, **values: Any) -> Inputs:
        """The same with other values; None removes one."""
        return Inputs({**self._values, **values}, self.specs)

    def map(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        """The same with every tensor changed."""
        return Inputs({name: _map(value, change) for name, value in self._values.items()}, self.specs)

    def images(self, part: slice) -> Inputs:
        """The inputs of some images."""
        values = {}
        for name, value in self._values.items():
            spec = self.specs.get(name)
            if isinstance(value, Control):
                value = Control(value.residuals, part)
            if isinstance(spec, Anything):
                values[name] = spec.images(value, part, self.batch)
            else:
                values[name] = spec.images(value, part) if isinstance(spec, Argument) else value
        return Inputs(values, self.specs)

    def copy_(self, other: Inputs) -> None:
        """Copy another one's tensors into this one's; both have the same `key`."""
        for mine, theirs in zip(self.tensors, (each for name in self for each in _tensors(other[name])), strict=True):
            mine.copy_(theirs)

    @staticmethod
    def stack(several: Sequence[Inputs], images: int) -> Inputs | None:
        """Several inputs, each with this many images, as one batch; None if names, shapes or shared values differ."""
        first = several[0]
        if any(set(each) != set(first) for each in several):
            return None
        if any(_key(each[name]) != _key(first[name]) for each in several for name in first):
            return None
        joint: dict[str, Any] = {}
        for name, value in first.items():
            axis = getattr(first.specs.get(name), "batch_axis", None)
            columns = list(zip(*(_tensors(each[name]) for each in several), strict=True))
            if axis is None:
                # There is no place for two of them in one forward.
                if not all(torch.equal(one, column[0]) for column in columns for one in column):
                    return None
                joint[name] = value
                continue
            tensors = [_concatenate(column, axis, images) for column in columns]
            joint[name] = tensors if isinstance(value, list) else tensors[0]
        return Inputs(joint, first.specs)


def _concatenate(tensors: Sequence[Tensor], axis: int, images: int) -> Tensor:
    """Along the batch; one of a batch of 1 broadcasts to ``images`` first."""
    sizes = [-1] * tensors[0].ndim
    sizes[axis] = images
    return torch.cat([tensor.expand(sizes) for tensor in tensors], dim=axis)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Mapping):
        value = [each for _, each in sorted(value.items())]
    if isinstance(value, list):
        return [tensor for each in value for tensor in _tensors(each)]
    return [value] if isinstance(value, Tensor) else []


def _map(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, list):
        return [_map(each, change) for each in value]
    if isinstance(value, Mapping):
        return {name: _map(each, change) for name, each in value.items()}
    return change(value) if isinstance(value, Tensor) else value


def _key(value: Any) -> Hashable:
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype
    if isinstance(value, Mapping):
        # In its order, which is that of a network's loop over it.
        return tuple((name, _key(each)) for name, each in value.items())
    if isinstance(value, list):
        return tuple(map(_key, value))
    # To Python 1 == 1.0 == True and 0.0 == -0.0, but not to a network.
    return type(value).__name__, repr(value)

"""Weight patches: a change and how it is applied; merging them, or adding them beside a packed weight.

A patch has a strength, a factor for the weight before it, perhaps a slice of the weight, and whether the change's
halves are swapped. Rounding and order of a merge are ComfyUI's, so that a merged weight has the same bits as ComfyUI's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from tacod.rank.weights.changes import Change, Diff, LoRA, Set
from tacod_client.errors import ArgumentError, ModelUnsupported

__all__ = ["SWAP", "Patch", "apply", "factors"]

SWAP = "swap_scale_shift"
"""The one function that a patch may name: exchange the first half of a change's rows with the second."""


@dataclass(frozen=True, eq=False)
class Patch:
    """A change and how it is applied to a weight.

    Raises `ArgumentError` for numbers out of range, `ModelUnsupported` for an unknown function.
    """

    change: Change
    strength: float = 1.0
    strength_model: float = 1.0
    """Factor of the weight before the patch."""
    offset: tuple[int, int, int] | None = None
    """Dimension, first index and length of the patched slice; None for the whole weight."""
    function: str | None = None
    """What is done to the change first: nothing, or `SWAP`."""

    def __post_init__(self) -> None:
        for name in ("strength", "strength_model"):
            if not math.isfinite(getattr(self, name)):
                raise ArgumentError(f"{name}: {getattr(self, name)} is not finite", argument=name)
        if self.offset is not None and (min(self.offset) < 0 or self.offset[2] == 0):
            raise ArgumentError(f"offset: {list(self.offset)} is no dimension, start and length", argument="offset")
        if self.function not in (None, SWAP):
            raise ModelUnsupported(f"function {self.function!r:.60} isn't known; this version applies {SWAP!r} only")

    @property
    def idle(self) -> bool:
        """Whether it leaves every weight unchanged."""
        always = isinstance(self.change, Set) or (isinstance(self.change, Diff) and self.change.pad_weight)
        return (self.strength == 0 or self.change.idle) and self.strength_model == 1 and not always

    def check(self, shape: Sequence[int], key: str) -> None:
        """Raise `ArgumentError`, naming ``key`` and both shapes, unless it fits a weight of this shape."""
        sizes = list(shape)
        if self.offset is not None:
            dim, start, length = self.offset
            if dim >= len(sizes) or start + length > sizes[dim]:
                raise ArgumentError(
                    f"{key}: the patch's slice (dimension {dim}, {length} from {start} on) lies outside {sizes}",
                    argument="patches",
                    key=key,
                )
            sizes[dim] = length
        self.change.check(sizes, key)
        if self.function == SWAP and sizes[0] % 2 and not isinstance(self.change, Set):
            raise ArgumentError(f"{key}: {SWAP} halves rows, and {sizes} has {sizes[0]}", argument="patches", key=key)

    def merge(self, weight: Tensor, key: str) -> Tensor:
        """The patched weight; it is changed in place unless it has to grow."""
        if isinstance(self.change, Diff) and self.change.pad_weight and self.offset is None:
            weight = self.change.pad(weight, key)
        self.check(weight.shape, key)
        part = weight if self.offset is None else weight.narrow(*self.offset)
        if self.strength_model != 1:
            part *= self.strength_model
        self.change.merge(part, self.strength, _swap if self.function == SWAP else _as_it_is)
        return weight


def _swap(change: Tensor) -> Tensor:
    return torch.cat(change.chunk(2)[::-1])


def _as_it_is(change: Tensor) -> Tensor:
    return change


def factors(patches: Sequence[Patch], shape: Sequence[int], key: str) -> tuple[Tensor, Tensor] | None:
    """The patches as one product of low rank: up [rows, r] and down [r, columns] in fp32.

    None if they are no such product, if they change nothing, or if it has more numbers than the weight of this
    ``shape``. Raises `ArgumentError` as `apply` does.
    """
    ups, downs = [], []
    for patch in patches:
        if patch.idle:
            continue
        patch.check(shape, key)
        change = patch.change
        plain = isinstance(change, LoRA) and change.mid is None and change.dora_scale is None
        if not isinstance(change, LoRA) or not plain or patch.strength_model != 1:
            return None
        up, down = change.up.float().flatten(1), change.down.float().flatten(1)
        if patch.function == SWAP:
            up = _swap(up)
        scale = patch.strength if change.alpha is None else patch.strength * change.alpha / change.rank
        sides = [(0, shape[0]), (0, shape[1])]
        if patch.offset is not None:
            sides[patch.offset[0]] = patch.offset[1:]
        (row, _), (column, _) = sides
        ups.append(functional.pad(scale * up, (0, 0, row, shape[0] - row - len(up))))
        downs.append(functional.pad(down, (column, shape[1] - column - down.shape[1])))
    if not ups or sum(map(len, downs)) * sum(shape) > math.prod(shape):
        return None
    return torch.cat(ups, dim=1), torch.cat(downs)


def apply(weight: Tensor, patches: Sequence[Patch], key: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """A weight with its patches merged into it, in their order; the caller casts it to the dtype that he wants.

    Args:
        weight: Of any floating dtype and shape; it stays as it is.
        patches: In the order in which they are put on.
        key: The weight's name, for messages.
        dtype: What is summed in, and the dtype of what is returned. Differences are computed in fp32 in any case.
            ComfyUI sums in fp32 on a CPU, and in fp16 on NVIDIA GPUs.

    Returns:
        ``weight`` itself, if no patch changes anything.

    Raises:
        ArgumentError: A patch doesn't fit; the message names ``key`` and both shapes.
    """
    working = [patch for patch in patches if not patch.idle]
    if not working:
        return weight
    merged = weight.detach().to(dtype, copy=True)
    with torch.no_grad():
        for patch in working:
            merged = patch.merge(merged, key)
    return merged

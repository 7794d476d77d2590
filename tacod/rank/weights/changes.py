"""What a weight patch changes (LoRA and its kin), in the terms of ComfyUI's patcher.

====  ==============================================================================================================
lora  up · down, low rank: Hu et al., 2021, arXiv:2106.09685; for a convolution with Tucker's core between the two
loha  (w1_a · w1_b) ∘ (w2_a · w2_b), Hadamard's product: Yeh et al., 2023, arXiv:2309.14859
lokr  w1 ⊗ w2, Kronecker's product, each factor whole or of low rank: the same paper
diff  the difference itself
set   another weight in the place of this one
====  ==============================================================================================================

The first three may come with the magnitudes of DoRA (Liu et al., 2024, arXiv:2402.09353).
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from tacod.rank.weights.misfit import Misfit, misfit
from tacod_client.errors import ArgumentError

__all__ = ["Change", "Diff", "Function", "LoHa", "LoKr", "LoRA", "Set"]

Function = Callable[[Tensor], Tensor]
"""Applied to a change before it is added."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Change(abc.ABC):
    """What a patch does to a weight. Integer tensors are cast.

    Raises `ArgumentError` for complex tensors, and for tensors that don't go together.
    """

    kind: ClassVar[str]
    """Its name on the wire."""
    may_be_empty: ClassVar[bool] = True
    """Whether its tensors may be empty: a product of rank 0 is zero."""

    def __post_init__(self) -> None:
        for name, value in self.contents().items():
            if isinstance(value, Tensor):
                if value.is_complex():
                    raise ArgumentError(f"{name}: expected real numbers, got {value.dtype}", argument=name)
                if not value.numel() and not self.may_be_empty:
                    raise ArgumentError(f"{name}: a tensor of shape {list(value.shape)} is empty", argument=name)
            elif isinstance(value, float) and not math.isfinite(value):
                raise ArgumentError(f"{name}: {value} is not finite", argument=name)

    def contents(self) -> dict[str, Any]:
        """Its tensors and numbers by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of the change; of a factored one, rows and columns."""

    @property
    def idle(self) -> bool:
        """Whether it changes nothing at any strength."""
        return False

    @abc.abstractmethod
    def check(self, shape: Sequence[int], key: str) -> None:
        """Raise `ArgumentError`, naming ``key`` and both shapes, unless a weight of this shape can be changed."""

    @abc.abstractmethod
    def merge(self, weight: Tensor, strength: float, function: Function) -> None:
        """Change ``weight`` in place. The shapes have been checked."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Factored(Change):
    """A difference that is a product of smaller tensors, with DoRA's magnitudes or without."""

    alpha: float | None = None
    """The difference is scaled by alpha / rank; None for no scaling."""
    dora_scale: Tensor | None = None
    """DoRA's magnitudes: of rows, [rows, 1, …] or [rows]; or of columns, [1, columns, 1, …]."""

    @property
    def idle(self) -> bool:
        """See `Change.idle`: of rank 0 the product is zero, but magnitudes scale the weight all the same."""
        return self.rank == 0 and self.dora_scale is None

    @property
    @abc.abstractmethod
    def rank(self) -> int | None:
        """What ``alpha`` is divided by; None if nothing in it has low rank, so that alpha has no meaning."""

    @abc.abstractmethod
    def product(self, device: torch.device) -> Tensor:
        """The product, in fp32."""

    def check(self, shape: Sequence[int], key: str) -> None:
        """See `Change.check`; dimensions beyond the second count as columns."""
        if not shape or self.shape != (shape[0], math.prod(shape[1:])):
            raise misfit(self.kind, self.shape, shape, key)
        if self.dora_scale is not None:
            ones = [1] * (len(shape) - 1)
            fitting = [[shape[0]], [shape[0], *ones]]
            if len(shape) > 1:
                fitting.append([1, shape[1], *ones[1:]])
            if list(self.dora_scale.shape) not in fitting:
                left_out = not _broadcasts(self.dora_scale.shape, shape)
                raise misfit("dora_scale", self.dora_scale.shape, shape, key, left_out=left_out)

    def merge(self, weight: Tensor, strength: float, function: Function) -> None:
        """See `Change.merge`."""
        scale = self.alpha / self.rank if self.alpha is not None and self.rank else 1.0
        difference = self.product(weight.device).reshape(weight.shape)
        if self.dora_scale is None:
            weight += function((strength * scale * difference).to(weight.dtype))
            return
        magnitude = _fp32(self.dora_scale, weight.device)
        if magnitude.ndim < weight.ndim:
            magnitude = magnitude.reshape(-1, *[1] * (weight.ndim - 1))
        renormed = _renorm(weight, function(scale * difference).to(weight.dtype), magnitude)
        if strength == 1:
            weight.copy_(renormed)
        else:
            weight += strength * (renormed - weight)


def _renorm(weight: Tensor, difference: Tensor, magnitude: Tensor) -> Tensor:
    """The changed weight, with its rows or columns scaled to the trained magnitudes (DoRA).

    The paper takes the norms of the changed weight. ComfyUI does so for columns; for rows it takes those from before
    the change.
    """
    changed = weight + difference
    if len(magnitude) == len(weight):
        norm = weight.reshape(len(weight), -1).norm(dim=1).reshape(-1, *[1] * (weight.ndim - 1))
    else:
        norm = changed.transpose(0, 1).flatten(1).norm(dim=1).reshape(1, -1, *[1] * (weight.ndim - 2))
    factor: Tensor = magnitude / (norm + torch.finfo(weight.dtype).eps)
    return changed * factor.to(weight.dtype)


@dataclass(frozen=True, eq=False, kw_only=True)
class LoRA(Factored):
    """up · down: [rows, r] and [r, columns, …].

    With a core ``mid`` [r, r, height, width] between them, ``down`` is [r, inputs, 1, 1], and there are
    inputs · height · width columns.
    """

    kind: ClassVar[str] = "lora"
    up: Tensor
    down: Tensor
    mid: Tensor | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        fits = min(self.up.ndim, self.down.ndim) >= 2 and math.prod(self.up.shape[1:]) == len(self.down)
        if fits and self.mid is not None:
            fits = self.mid.shape[:2] == (len(self.down),) * 2 and self.mid.ndim == 4
            fits = fits and math.prod(self.down.shape[2:]) == 1
        if not fits:
            # ComfyUI multiplies by a core before it looks out for errors.
            raise _mismatch(Misfit if self.mid is None else ArgumentError, up=self.up, mid=self.mid, down=self.down)

    @property
    def rank(self) -> int:
        """See `Factored.rank`."""
        return len(self.down)

    @property
    def shape(self) -> tuple[int, int]:
        """See `Change.shape`."""
        core = 1 if self.mid is None else math.prod(self.mid.shape[2:])
        return len(self.up), math.prod(self.down.shape[1:]) * core

    def product(self, device: torch.device) -> Tensor:
        """See `Factored.product`."""
        down = _fp32(self.down, device).flatten(1)
        if self.mid is not None:
            # The core takes ``down`` in first: rank · rank · columns, not rank · rows · columns, in memory.
            down = torch.tensordot(down, _fp32(self.mid, device), dims=([0], [1])).transpose(0, 1).flatten(1)
        return _fp32(self.up, device).flatten(1) @ down


@dataclass(frozen=True, eq=False, kw_only=True)
class LoHa(Factored):
    """(w1_a · w1_b) ∘ (w2_a · w2_b): [rows, r] and [r, columns], twice.

    With cores ``t1`` and ``t2`` [r, r, height, width] between them, w1_a and w2_a are [r, rows], and there are
    columns · height · width columns.
    """

    kind: ClassVar[str] = "loha"
    w1_a: Tensor
    w1_b: Tensor
    w2_a: Tensor
    w2_b: Tensor
    t1: Tensor | None = None
    t2: Tensor | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        first = _low_rank_shape(a=self.w1_a, b=self.w1_b, core=self.t1)
        second = _low_rank_shape(a=self.w2_a, b=self.w2_b, core=self.t2)
        if first is None or first != second:
            # ComfyUI leaves out what can't be multiplied. What spreads over the other product it merges.
            apart = first is not None and second is not None and not _spread(first, second)
            raise _mismatch(Misfit if apart else ArgumentError, **self.contents())

    @property
    def rank(self) -> int:
        """See `Factored.rank`."""
        return len(self.w1_b)

    @property
    def shape(self) -> tuple[int, int]:
        """See `Change.shape`."""
        rows, *columns = _low_rank_shape(a=self.w1_a, b=self.w1_b, core=self.t1) or (0, 0)
        return rows, math.prod(columns)

    def product(self, device: torch.device) -> Tensor:
        """See `Factored.product`."""
        first = _low_rank(device, a=self.w1_a, b=self.w1_b, core=self.t1)
        return first * _low_rank(device, a=self.w2_a, b=self.w2_b, core=self.t2)


@dataclass(frozen=True, eq=False, kw_only=True)
class LoKr(Factored):
    """w1 ⊗ w2: [a, b] and [c, d, …] make [a · c, b · d, …].

    Either factor may itself be a product of low rank, w1_a · w1_b or w2_a · w2_b, the latter with a core ``t2``.
    """

    kind: ClassVar[str] = "lokr"
    w1: Tensor | None = None
    w1_a: Tensor | None = None
    w1_b: Tensor | None = None
    w2: Tensor | None = None
    w2_a: Tensor | None = None
    w2_b: Tensor | None = None
    t2: Tensor | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        first = _factor_shape(self.w1, self.w1_a, self.w1_b, None)
        second = _factor_shape(self.w2, self.w2_a, self.w2_b, self.t2)
        if first is None or second is None or len(first) != 2 or len(second) not in (2, 4):
            raise _mismatch(**self.contents())

    @property
    def rank(self) -> int | None:
        """See `Factored.rank`: of the second factor, or else of the first."""
        low = self.w2_b if self.w2_b is not None else self.w1_b
        return None if low is None else len(low)

    @property
    def shape(self) -> tuple[int, int]:
        """See `Change.shape`."""
        first = _factor_shape(self.w1, self.w1_a, self.w1_b, None) or (0, 0)
        second = _factor_shape(self.w2, self.w2_a, self.w2_b, self.t2) or (0, 0)
        return first[0] * second[0], first[1] * math.prod(second[1:])

    def product(self, device: torch.device) -> Tensor:
        """See `Factored.product`."""
        first = _factor(device, self.w1, self.w1_a, self.w1_b, None)
        second = _factor(device, self.w2, self.w2_a, self.w2_b, self.t2)
        # torch.kron refuses the strides that a core leaves; ComfyUI then logs its error and merges nothing.
        return torch.kron(first.reshape(*first.shape, *[1] * (second.ndim - 2)), second.contiguous())


@dataclass(frozen=True, eq=False, kw_only=True)
class Diff(Change):
    """A difference of the weight's own shape.

    With ``pad_weight`` it may be larger: the weight is padded with zeros to its size, at any strength.
    """

    kind: ClassVar[str] = "diff"
    diff: Tensor
    pad_weight: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """See `Change.shape`."""
        return tuple(self.diff.shape)

    def check(self, shape: Sequence[int], key: str) -> None:
        """See `Change.check`."""
        if self.shape != tuple(shape):
            raise misfit(self.kind, self.shape, shape, key, left_out=True)

    def pad(self, weight: Tensor, key: str) -> Tensor:
        """The weight, grown if it has to be."""
        missing = [wanted - size for wanted, size in zip(self.shape, weight.shape, strict=False)]
        if weight.ndim != self.diff.ndim or any(size < 0 for size in missing):
            raise misfit(self.kind, self.shape, weight.shape, key, left_out=False)
        return torch.nn.functional.pad(weight, [size for each in reversed(missing) for size in (0, each)])

    def merge(self, weight: Tensor, strength: float, function: Function) -> None:
        """See `Change.merge`."""
        if strength != 0:
            weight += function(strength * self.diff.to(weight))


@dataclass(frozen=True, eq=False, kw_only=True)
class Set(Change):
    """Another weight in the place of this one, at any strength and with any function, as in ComfyUI."""

    kind: ClassVar[str] = "set"
    may_be_empty: ClassVar[bool] = False
    value: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """See `Change.shape`."""
        return tuple(self.value.shape)

    def check(self, shape: Sequence[int], key: str) -> None:
        """See `Change.check`."""
        if self.shape != tuple(shape):
            raise misfit(self.kind, self.shape, shape, key, left_out=False)

    def merge(self, weight: Tensor, strength: float, function: Function) -> None:
        """See `Change.merge`."""
        weight.copy_(self.value)


def _fp32(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.to(device, torch.float32)


def _low_rank_shape(a: Tensor, b: Tensor, core: Tensor | None) -> tuple[int, ...] | None:
    """Shape of a product of low rank; None if the tensors don't go together."""
    if a.ndim != 2 or b.ndim != 2:
        return None
    if core is None:
        return (a.shape[0], b.shape[1]) if a.shape[1] == b.shape[0] else None
    fits = core.ndim == 4 and core.shape[:2] == (a.shape[0], b.shape[0])
    return (a.shape[1], b.shape[1], *core.shape[2:]) if fits else None


def _low_rank(device: torch.device, a: Tensor, b: Tensor, core: Tensor | None) -> Tensor:
    """The product a · b; or Tucker's decomposition of a convolution, with a core."""
    if core is None:
        return _fp32(a, device) @ _fp32(b, device)
    return torch.einsum("rskl,si,ro->oikl", _fp32(core, device), _fp32(b, device), _fp32(a, device))


def _factor_shape(
    whole: Tensor | None, a: Tensor | None, b: Tensor | None, core: Tensor | None
) -> tuple[int, ...] | None:
    """Shape of a factor that is given whole or of low rank; None if it is neither, or both."""
    if whole is not None:
        return tuple(whole.shape) if a is None and b is None and core is None else None
    return None if a is None or b is None else _low_rank_shape(a, b, core)


def _factor(
    device: torch.device, whole: Tensor | None, a: Tensor | None, b: Tensor | None, core: Tensor | None
) -> Tensor:
    if whole is not None:
        return _fp32(whole, device)
    assert a is not None
    assert b is not None
    return _low_rank(device, a, b, core)


def _broadcasts(shape: Sequence[int], weight: Sequence[int]) -> bool:
    pairs = zip(reversed(shape), reversed(weight), strict=False)
    return len(shape) <= len(weight) and all(size in (1, whole) for size, whole in pairs)


def _spread(first: Sequence[int], second: Sequence[int]) -> bool:
    """Whether tensors of these shapes can be multiplied, sizes of one spread over the other's."""
    pairs = zip(reversed(first), reversed(second), strict=False)
    return all(one == other or 1 in (one, other) for one, other in pairs)


def _mismatch(kind: type[ArgumentError] = ArgumentError, **tensors: Any) -> ArgumentError:
    shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in tensors.items() if isinstance(value, Tensor))
    return kind(f"{shapes or 'no tensors'}: these don't make a whole change", argument="patches")

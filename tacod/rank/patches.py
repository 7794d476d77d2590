"""Weight patches (LoRA and its kin), in the form in which ComfyUI's patcher holds them, and merging them.

A patch is a change and how it is put on a weight: a strength, a factor for what was there before, a slice of the
weight, and whether the change's halves are swapped. The changes:

====  ==============================================================================================================
lora  up · down, low rank: Hu et al., 2021, arXiv:2106.09685; for a convolution with Tucker's core between the two
loha  (w1_a · w1_b) ∘ (w2_a · w2_b), Hadamard's product: Yeh et al., 2023, arXiv:2309.14859
lokr  w1 ⊗ w2, Kronecker's product, each factor whole or of low rank: the same paper
diff  the difference itself
set   another weight in the place of this one
====  ==============================================================================================================

The first three may come with the magnitudes of DoRA (Liu et al., 2024, arXiv:2402.09353). What a merge rounds, and in
which order, is ComfyUI's, so that a merged weight has the bits that ComfyUI's has.
"""

from __future__ import annotations

import abc
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from tacod_client.errors import ArgumentError, ModelUnsupported
from tacod_client.tensors import to_wire

__all__ = ["Change", "Diff", "LoHa", "LoKr", "LoRA", "Patch", "Set", "apply", "fingerprint", "parse_patches"]

SWAP = "swap_scale_shift"
"""The one function that a patch may name: exchange the first half of a change's rows with the second."""

_PREFIX = "diffusion_model."
_TEXT_LENGTH = 4096

Function = Callable[[Tensor], Tensor]


# --- changes ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, kw_only=True)
class Change(abc.ABC):
    """What is done to a weight. Raises `ArgumentError` for tensors that are not floating-point or don't go together."""

    kind: ClassVar[str]
    """Its name on the wire."""

    def __post_init__(self) -> None:
        for name, value in self.contents().items():
            if isinstance(value, Tensor):
                if not value.is_floating_point():
                    raise ArgumentError(f"{name}: expected a floating-point tensor, got {value.dtype}", argument=name)
                if not value.numel():
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
    @abc.abstractmethod
    def rank(self) -> int | None:
        """What ``alpha`` is divided by; None if nothing in it is of low rank, and alpha has no meaning."""

    @abc.abstractmethod
    def product(self, device: torch.device) -> Tensor:
        """The product, in fp32."""

    def check(self, shape: Sequence[int], key: str) -> None:
        """See `Change.check`; dimensions beyond the second count as columns."""
        if not shape or self.shape != (shape[0], math.prod(shape[1:])):
            raise _misfit(self.kind, self.shape, shape, key)
        if self.dora_scale is not None:
            ones = [1] * (len(shape) - 1)
            fitting = [[shape[0]], [shape[0], *ones]]
            if len(shape) > 1:
                fitting.append([1, shape[1], *ones[1:]])
            if list(self.dora_scale.shape) not in fitting:
                raise _misfit("dora_scale", self.dora_scale.shape, shape, key)

    def merge(self, weight: Tensor, strength: float, function: Function) -> None:
        """See `Change.merge`."""
        scale = 1.0 if self.alpha is None or self.rank is None else self.alpha / self.rank
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
    """The changed weight, its rows or columns brought to the magnitudes that were trained (DoRA).

    The paper norms the changed weight. ComfyUI does so for columns; for rows it takes the norms from before the change.
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
        fits = min(self.up.ndim, self.down.ndim) >= 2 and self.up[0].numel() == len(self.down)
        if fits and self.mid is not None:
            fits = self.mid.shape[:2] == (len(self.down),) * 2 and self.mid.ndim == 4
            fits = fits and self.down[0].numel() == self.down.shape[1]
        if not fits:
            raise _mismatch(up=self.up, mid=self.mid, down=self.down)

    @property
    def rank(self) -> int:
        """See `Factored.rank`."""
        return len(self.down)

    @property
    def shape(self) -> tuple[int, int]:
        """See `Change.shape`."""
        core = 1 if self.mid is None else math.prod(self.mid.shape[2:])
        return len(self.up), self.down[0].numel() * core

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
            raise _mismatch(**self.contents())

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

    With ``pad_weight`` it may be larger: the weight grows to it, by zeros, at whatever strength.
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
            raise _misfit(self.kind, self.shape, shape, key)

    def pad(self, weight: Tensor, key: str) -> Tensor:
        """The weight, grown if it has to be."""
        missing = [wanted - size for wanted, size in zip(self.shape, weight.shape, strict=False)]
        if weight.ndim != self.diff.ndim or any(size < 0 for size in missing):
            raise _misfit(self.kind, self.shape, weight.shape, key)
        return torch.nn.functional.pad(weight, [size for each in reversed(missing) for size in (0, each)])

    def merge(self, weight: Tensor, strength: float, function: Function) -> None:
        """See `Change.merge`."""
        if strength != 0:
            weight += function(strength * self.diff.to(weight))


@dataclass(frozen=True, eq=False, kw_only=True)
class Set(Change):
    """Another weight in the place of this one: at whatever strength and with whatever function, as in ComfyUI."""

    kind: ClassVar[str] = "set"
    value: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """See `Change.shape`."""
        return tuple(self.value.shape)

    def check(self, shape: Sequence[int], key: str) -> None:
        """See `Change.check`."""
        if self.shape != tuple(shape):
            raise _misfit(self.kind, self.shape, shape, key)

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


def _mismatch(**tensors: Any) -> ArgumentError:
    shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in tensors.items() if isinstance(value, Tensor))
    return ArgumentError(f"{shapes or 'no tensors'}: these don't make a whole change", argument="patches")


def _misfit(what: str, shape: Sequence[int], weight: Sequence[int], key: str) -> ArgumentError:
    return ArgumentError(
        f"{key}: the patch's {what} has shape {list(shape)}, and what it patches {list(weight)}; "
        "it was made for another model",
        argument="patches",
        key=key,
    )


# --- patches ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Patch:
    """A change and how it is put on a weight.

    Raises `ArgumentError` for numbers out of range, `ModelUnsupported` for an unknown function.
    """

    change: Change
    strength: float = 1.0
    strength_model: float = 1.0
    """What is there before is multiplied by this."""
    offset: tuple[int, int, int] | None = None
    """Dimension, first index and length of the slice that is patched; None for all of the weight."""
    function: str | None = None
    """What is done to the change: nothing, or `SWAP`."""

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
        """Whether it leaves every weight as it is."""
        always = isinstance(self.change, Set) or (isinstance(self.change, Diff) and self.change.pad_weight)
        return self.strength == 0 and self.strength_model == 1 and not always

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
        """The weight, changed in place unless it has to grow."""
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


def fingerprint(patches: Mapping[str, Sequence[Patch]]) -> str:
    """A name for what patches do: equal for equal contents, strengths and order within a key; empty for nothing at all.

    It is a hash over the tensors' digests on the wire: who has those need not touch a byte. From tensors it costs one
    pass of SHA-256 over their bytes, whatever their device.
    """
    said = {key: [_describe(patch) for patch in each if not patch.idle] for key, each in sorted(patches.items())}
    said = {key: each for key, each in said.items() if each}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest() if said else ""


def _describe(patch: Patch) -> dict[str, Any]:
    contents = {
        name: _digest(value) if isinstance(value, Tensor) else value for name, value in patch.change.contents().items()
    }
    return {
        "kind": patch.change.kind,
        "strength": patch.strength,
        "strength_model": patch.strength_model,
        "offset": patch.offset,
        "function": patch.function,
        **{name: value for name, value in contents.items() if value is not None},
    }


def _digest(tensor: Tensor) -> str:
    digest = to_wire(tensor, "patches").with_digest().digest
    assert digest is not None
    return digest.hex()


# --- from the wire ----------------------------------------------------------------------------------------------------

_KINDS: dict[str, type[Change]] = {change.kind: change for change in (LoRA, LoHa, LoKr, Diff, Set)}
_COMMON = ("key", "kind", "strength", "strength_model", "offset", "function", "reshape")

Files = Callable[[str, float], Mapping[str, Sequence[Patch]]]
"""What the file at a path makes at a strength."""


def parse_patches(
    body: Any, files: Files | None = None, shapes: Mapping[str, Sequence[int]] | None = None
) -> dict[str, list[Patch]]:
    """Patches by the single file's key (without ``diffusion_model.``), in their order, from a request's list of maps.

    An entry is either one patch: ``key``, ``kind``, the tensors and numbers of its `Change` by their names, and
    optionally ``strength``, ``strength_model``, ``offset`` and ``function``; or a file: ``path`` and ``strength``.

    Args:
        body: A list of maps in which tensors are torch's; None for no patches.
        files: Reads the files that entries name; without it they are refused.
        shapes: The model's keys and shapes: what patches another key, or doesn't fit, is refused.

    Raises:
        ArgumentError: An entry is malformed or doesn't fit; the message names its index and the field.
        ModelUnsupported: An entry asks for what this version doesn't do; the message names key and kind.
    """
    if body is None:
        return {}
    if not isinstance(body, list):
        raise _bad("patches", f"expected a list of maps, got {type(body).__name__}")
    found: dict[str, list[Patch]] = {}
    for index, entry in enumerate(body):
        where = f"patches[{index}]"
        if not isinstance(entry, Mapping):
            raise _bad(where, f"expected a map, got {type(entry).__name__}")
        for key, made in _parse_entry(entry, where, files):
            if shapes is not None:
                if key not in shapes:
                    raise _bad(f"{where}.key", f"the model has no weight {key!r}; the patch was made for another one")
                for patch in made:
                    _check(patch, shapes[key], key, where)
            found.setdefault(key, []).extend(made)
    return found


def _parse_entry(entry: Mapping[str, Any], where: str, files: Files | None) -> Sequence[tuple[str, Sequence[Patch]]]:
    if "path" not in entry:
        key = _text(entry, "key", where).removeprefix(_PREFIX)
        return [(key, [_parse_patch(entry, key, where)])]
    _only(entry, ("path", "strength"), where)
    path, strength = _text(entry, "path", where), _number(entry, "strength", where)
    if files is None:
        raise _bad(f"{where}.path", "files of patches can't be read here; send the tensors")
    return list(files(path, strength).items())


def _parse_patch(entry: Mapping[str, Any], key: str, where: str) -> Patch:
    kind = _text(entry, "kind", where)
    if kind not in _KINDS or entry.get("reshape") is not None:
        what = f"kind {kind!r}" + (" that reshapes its weight" if kind in _KINDS else "")
        raise ModelUnsupported(
            f"{where}: {key} has a patch of {what}; this version applies {', '.join(_KINDS)}. "
            "Save the patched model to a file with ComfyUI and load that, or take the patch off",
            key=key,
            kind=kind,
        )
    change = _KINDS[kind]
    _only(entry, (*_COMMON, *(field.name for field in fields(change))), where)
    strength, strength_model = _number(entry, "strength", where), _number(entry, "strength_model", where)
    offset, function = _offset(entry, where), entry.get("function")
    values = {field.name: _value(entry, field.name, field.default is MISSING, where) for field in fields(change)}
    try:
        return Patch(change(**values), strength, strength_model, offset, function)
    except ArgumentError as error:
        raise _bad(where, f"{key} ({kind}): {error.message}") from None
    except ModelUnsupported as error:
        raise ModelUnsupported(f"{where}: {key} ({kind}): {error.message}", key=key, kind=kind) from None


def _value(entry: Mapping[str, Any], name: str, required: bool, where: str) -> Any:
    """A field of a change, by its name: a number, a truth value or a tensor."""
    value = entry.get(name)
    if name == "alpha":
        return None if value is None else _number(entry, name, where)
    if name == "pad_weight":
        if not isinstance(value, bool | None):
            raise _bad(f"{where}.{name}", f"expected true or false, got {type(value).__name__}")
        return bool(value)
    if not isinstance(value, Tensor) and (required or value is not None):
        raise _bad(f"{where}.{name}", f"expected a tensor, got {type(value).__name__}")
    return value


def _offset(entry: Mapping[str, Any], where: str) -> tuple[int, int, int] | None:
    value = entry.get("offset")
    if value is None:
        return None
    if not isinstance(value, list | tuple) or len(value) != 3 or any(type(size) is not int for size in value):
        raise _bad(f"{where}.offset", f"{value!r:.60} is not [dimension, start, length]")
    return value[0], value[1], value[2]


def _number(entry: Mapping[str, Any], name: str, where: str) -> float:
    value = entry.get(name, 1.0)
    try:
        if not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value):
            return float(value)
    except OverflowError:
        pass
    raise _bad(f"{where}.{name}", f"{value!r:.60} is not a finite number")


def _text(entry: Mapping[str, Any], name: str, where: str) -> str:
    value = entry.get(name)
    if not isinstance(value, str) or not 0 < len(value) <= _TEXT_LENGTH:
        raise _bad(f"{where}.{name}", f"expected a string, got {value!r:.60}")
    return value


def _only(entry: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for name in entry:
        if name not in known:
            raise _bad(f"{where}.{name!s:.60}", f"no such field; there are {', '.join(known)}")


def _check(patch: Patch, shape: Sequence[int], key: str, where: str) -> None:
    if isinstance(patch.change, Diff) and patch.change.pad_weight:
        return
    try:
        patch.check(shape, key)
    except ArgumentError as error:
        raise _bad(where, error.message) from None


def _bad(where: str, why: str) -> ArgumentError:
    return ArgumentError(f"{where}: {why}", argument="patches")

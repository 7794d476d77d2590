"""A request's weight patches: a list of maps, checked, as `Patch` objects by the weights' names."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any

from torch import Tensor

from tacod.rank.weights.changes import Change, Diff, LoHa, LoKr, LoRA, Set
from tacod.rank.weights.misfit import Misfit
from tacod.rank.weights.patches import Patch
from tacod_client.errors import ArgumentError, ModelUnsupported

__all__ = ["Files", "parse_patches"]

_PREFIX = "diffusion_model."
_TEXT_LENGTH = 4096
_KINDS: dict[str, type[Change]] = {change.kind: change for change in (LoRA, LoHa, LoKr, Diff, Set)}
_COMMON = ("key", "kind", "strength", "strength_model", "offset", "function", "reshape")

Files = Callable[[str, float], Mapping[str, Sequence[Patch]]]
"""The patches that the file at a path gives at a strength."""


def parse_patches(
    body: Any,
    files: Files | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
    canonical: Callable[[str], str] = str,
    notes: list[str] | None = None,
) -> dict[str, list[Patch]]:
    """Patches by the single file's key (without ``diffusion_model.``), in their order, from a request's list of maps.

    An entry is either one patch: ``key``, ``kind``, the tensors and numbers of its `Change` by their names, and
    optionally ``strength``, ``strength_model``, ``offset`` and ``function``; or a file: ``path`` and ``strength``.
    Patches of another shape than their weight are left out, if others fit: ComfyUI draws with the rest, and says so.

    Args:
        body: A list of maps in which tensors are torch's; None for no patches.
        files: Reads the files that entries name; without it they are refused.
        shapes: The model's keys and shapes: what patches another key is refused, and what doesn't fit is left out.
        canonical: The single file's key for one that an entry names, as `DiT.canonical` gives it.
        notes: Takes a line for each patch that is left out.

    Raises:
        ArgumentError: An entry is malformed, or none of them fits; the message names its index and the field.
        ModelUnsupported: An entry asks for what this version doesn't do; the message names key and kind.
    """
    if body is None:
        return {}
    if not isinstance(body, list):
        raise _bad("patches", f"expected a list of maps, got {type(body).__name__}")
    found: dict[str, list[Patch]] = {}
    left_out: list[Misfit] = []
    for index, entry in enumerate(body):
        where = f"patches[{index}]"
        if not isinstance(entry, Mapping):
            raise _bad(where, f"expected a map, got {type(entry).__name__}")
        try:
            for named, made in _parse_entry(entry, where, files):
                key = canonical(named)
                if shapes is not None:
                    if key not in shapes:
                        why = f"the model has no weight {named!r}; the patch was made for another one"
                        raise _bad(f"{where}.key", why)
                    for patch in made:
                        _check(patch, shapes[key], key, where)
                found.setdefault(key, []).extend(made)
        except Misfit as misfit:
            if entry.get("strength_model", 1.0) != 1:
                # ComfyUI scales the weight all the same.
                raise
            left_out.append(misfit)
    if left_out and not found:
        raise left_out[0]
    if notes is not None:
        notes += [error.message for error in left_out]
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
        raise _bad(where, f"{key} ({kind}): {error.message}", type(error)) from None
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
        raise _bad(where, error.message, type(error)) from None


def _bad(where: str, why: str, kind: type[ArgumentError] = ArgumentError) -> ArgumentError:
    return kind(f"{where}: {why}", argument="patches")

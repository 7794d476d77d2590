"""Compares a call's arguments with those of a small forward, by which a table was checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tacod.rank.comfyui.tables.base import Shapes
from tacod.rank.families.control import Control

__all__ = ["Mismatch", "mismatch", "of_other_images", "shapes_of"]


@dataclass(frozen=True)
class Mismatch:
    """How a call differs from a small forward."""

    others: tuple[str, ...]
    """Arguments that only the call has."""
    lacking: tuple[str, ...]
    """Those that only the small forward has."""
    odd: tuple[str, ...]
    """Those with other dimensions, or another word or flag."""

    @property
    def count(self) -> int:
        """Of how many arguments they differ in."""
        return len(self.others) + len(self.lacking) + len(self.odd)

    @property
    def unknown(self) -> bool:
        """Whether the call lacks what tells how many tokens there are."""
        return bool(self.lacking or self.odd)

    @property
    def reason(self) -> str:
        """In words, why the table says nothing of this call."""
        if self.others:
            return f"that was checked without {', '.join(self.others)}"
        if self.lacking:
            return f"that was checked with {', '.join(self.lacking)}"
        return f"that was checked with other dimensions of {', '.join(self.odd)}"


def mismatch(probe: Mapping[str, Any], arguments: Mapping[str, Any]) -> Mismatch:
    """How these arguments differ from a small forward's. None and empty maps and lists count as left out."""
    given = {name: kind for name, value in arguments.items() if (kind := _kind(value)) is not None}
    known = {name: _kind(value) for name, value in {"timestep": (1,), **probe}.items()}
    return Mismatch(
        tuple(name for name in given if name not in known),
        tuple(name for name in known if name not in given),
        tuple(name for name, kind in known.items() if given.get(name, kind) != kind),
    )


def shapes_of(arguments: Mapping[str, Any]) -> Shapes:
    """The shapes of tensors, and of those in lists."""

    def shape(value: Any) -> Any:
        return [shape(each) for each in value] if isinstance(value, list) else tuple(value.shape)

    return {
        name: shape(value)
        for name, value in arguments.items()
        if hasattr(value, "shape") or (isinstance(value, list) and all(hasattr(each, "shape") for each in value))
    }


def of_other_images(arguments: Mapping[str, Any]) -> tuple[str, ...]:
    """The tensors, or lists of such, that are neither for as many images as ``x`` nor for all of them alike."""

    def counts(value: Any) -> set[int]:
        if isinstance(value, list):
            return set().union(*map(counts, value))
        return {value.shape[0]} if len(getattr(value, "shape", ())) else set()

    known = {1, *counts(arguments["x"])}
    return tuple(name for name, value in arguments.items() if not counts(value) <= known)


def _kind(value: Any) -> Any:
    """What must be alike in a call and in a small forward: dimensions, words and flags, but not sizes or numbers."""
    if hasattr(value, "shape"):
        value = tuple(value.shape)
    if isinstance(value, tuple):
        return f"{len(value)} dimensions"
    if isinstance(value, list):
        return tuple(sorted({str(_kind(each)) for each in value})) or None
    if isinstance(value, Mapping | Control):
        return "a map" if value else None
    return "a number" if isinstance(value, int | float) and not isinstance(value, bool) else value

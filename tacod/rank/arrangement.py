"""A checkpoint under the names of its family's single file, where it has others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from tacod.checkpoint import Checkpoint, TensorInfo
from tacod.checkpoint.header import Part
from tacod.rank.families.base import Place
from tacod_client.errors import ModelCorrupt, ModelUnsupported

__all__ = ["arrange", "rename"]


def arrange(checkpoint: Checkpoint, layout: Mapping[str, Place]) -> Checkpoint:
    """The same checkpoint under the names of the single file; what that fuses or swaps becomes bytes in that order.

    A tensor without a place keeps its name. Raises `ModelCorrupt` if tensors lack, `ModelUnsupported` if such as are to
    be fused differ in dtype.
    """
    absent = [name for name in layout if name not in checkpoint.tensors]
    if absent:
        more = f" and {len(absent) - 5} more" if len(absent) > 5 else ""
        raise ModelCorrupt(f"{checkpoint.path} lacks {', '.join(absent[:5])}{more}; download the folder again")
    pieces: dict[str, list[str]] = {}
    for name, place in sorted(layout.items(), key=lambda item: item[1].rows or (0, 0)):
        pieces.setdefault(place.key, []).append(name)
    tensors, parts = {}, {}
    for key, names in pieces.items():
        tensors[key] = _fuse(checkpoint, key, {name: layout[name] for name in names})
        parts[key] = tuple(part for name in names for part in _order(checkpoint, name, layout[name]))
    for name in checkpoint.tensors:
        if name not in layout:
            tensors[name], parts[name] = checkpoint.tensors[name], checkpoint.parts[name]
    return replace(checkpoint, tensors=tensors, parts=parts, diffusers=False)


def rename(checkpoint: Checkpoint, canonical: Callable[[str], str]) -> Checkpoint:
    """The same checkpoint under the names that ``canonical`` gives; the names of other tools among them.

    Raises `ModelCorrupt` if it holds one tensor under two names.
    """
    names = {name: canonical(name) for name in checkpoint.tensors}
    if all(name == ours for name, ours in names.items()):
        return checkpoint
    first: dict[str, str] = {}
    for name, ours in names.items():
        if first.setdefault(ours, name) != name:
            raise ModelCorrupt(f"{checkpoint.path} has both {first[ours]} and {name}, which are the same weight")
    return replace(
        checkpoint,
        tensors={ours: checkpoint.tensors[name] for name, ours in names.items()},
        parts={ours: checkpoint.parts[name] for name, ours in names.items()},
    )


def _fuse(checkpoint: Checkpoint, key: str, places: Mapping[str, Place]) -> TensorInfo:
    infos = [checkpoint.tensors[name] for name in places]
    if len(infos) == 1 and next(iter(places.values())).rows is None:
        return infos[0]
    row = 0
    for (name, place), info in zip(places.items(), infos, strict=True):
        assert place.rows is not None
        if place.rows[0] != row or info.shape[:1] != place.rows[1:] or info.shape[1:] != infos[0].shape[1:]:
            raise ModelCorrupt(f"{checkpoint.path}: {name} is {list(info.shape)}, which is no part of {key}")
        if info.dtype != infos[0].dtype:
            raise ModelUnsupported(f"{checkpoint.path}: {' and '.join(places)} are not of one dtype")
        row += place.rows[1]
    return TensorInfo(infos[0].dtype, (row, *infos[0].shape[1:]))


def _order(checkpoint: Checkpoint, name: str, place: Place) -> tuple[Part, ...]:
    parts = checkpoint.parts[name]
    if not place.swap:
        return parts
    (whole,) = parts
    if checkpoint.tensors[name].shape[0] % 2:
        raise ModelCorrupt(f"{checkpoint.path}: {name} has an odd number of rows, which are no scale and shift")
    middle = (whole.start + whole.stop) // 2
    return Part(whole.file, middle, whole.stop), Part(whole.file, whole.start, middle)

"""A checkpoint under the names of its family's single file, if it has others."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from tacod.checkpoint import Checkpoint, TensorInfo, read_checkpoint
from tacod.checkpoint.checkpoint import FEW
from tacod.checkpoint.header import FLOAT8, Part
from tacod.checkpoint.json_text import parse_json
from tacod.checkpoint.quantization import INPUT_SCALE, Quantization, beside
from tacod.rank.families import detect, diffusers_layout, from_diffusers, is_known
from tacod.rank.families.base import DiT
from tacod.rank.families.names import FUSED_NAMES, Place
from tacod_client.errors import ModelCorrupt, ModelUnsupported

__all__ = ["arrange", "identify", "rename", "some"]

_DEPTH = 4
"""How many names of a prefix are tried, as in ``base_model.model.transformer.``."""
_TRIED = 32
"""How many prefixes are tried, those of the most tensors: all families are asked about each."""


def identify(checkpoint: Checkpoint) -> tuple[type[DiT], dict[str, Any], Checkpoint]:
    """A checkpoint's family and configuration, and the same checkpoint under the names of the family's single file.

    A file may have diffusers' names or ComfyUI's, and hold the model behind any prefix. The result may be identified
    again, with the same result.

    Raises `ModelUnsupported` if no family knows it, or if it holds several models, and what `arrange` and `rename`
    raise.
    """
    if checkpoint.diffusers:
        family, config = detect({}, from_diffusers(checkpoint.path, checkpoint.config or {}, checkpoint.tensors))
        return family, config, replace(arrange(checkpoint, family.diffusers_layout(config)), config=config)
    if not is_known(checkpoint.tensors):
        checkpoint = _look_deeper(checkpoint)
    layout = diffusers_layout(checkpoint.tensors, checkpoint.config)
    if layout is not None:
        checkpoint = arrange(checkpoint, layout)
    family, config = detect(checkpoint.tensors, checkpoint.config)
    if family.notes:
        config = {**config, **_read_notes(checkpoint), **(checkpoint.config or {})}
    return family, config, rename(checkpoint, family.canonical)


def _read_notes(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """What a file's metadata says of the network, for some families. Raises `ModelCorrupt` if it can't be read."""
    try:
        notes = parse_json(checkpoint.notes or "{}")
        found = notes.get("transformer", {})
    except (ValueError, AttributeError, RecursionError) as error:
        raise ModelCorrupt(f"{checkpoint.path}: the metadata's config is no JSON object ({error})") from None
    if not isinstance(found, dict):
        raise ModelCorrupt(f"{checkpoint.path}: the metadata's config has {found!r:.80} for transformer, and no object")
    return found


def _look_deeper(checkpoint: Checkpoint) -> Checkpoint:
    """The same file without the one prefix behind which a family knows its tensors; unchanged if there is none.

    Only those of the most tensors are tried. Behind a model's lie all that lie behind its blocks'.
    """
    whole = read_checkpoint(checkpoint.path, prefix="", whole=True)
    if whole.identity != checkpoint.identity:
        raise ModelCorrupt(f"{checkpoint.path} changed while it was being loaded; load it again")
    behind: dict[str, dict[str, TensorInfo]] = {"": dict(whole.tensors)}
    for name, info in whole.tensors.items():
        at = -1
        for _ in range(_DEPTH):
            at = name.find(".", at + 1)
            if at < 0:
                break
            behind.setdefault(name[: at + 1], {})[name[at + 1 :]] = info
    largest = sorted(behind, key=lambda prefix: len(behind[prefix]), reverse=True)[:_TRIED]
    found = [
        prefix for prefix in behind if prefix in largest and len(behind[prefix]) > FEW and is_known(behind[prefix])
    ]
    if len(found) > 1:
        several = ", ".join(repr(prefix)[:80] for prefix in found[:5])
        raise ModelUnsupported(
            f"{checkpoint.path} holds several models, behind the prefixes {several}; save the one that is meant to a "
            "file of its own"
        )
    return read_checkpoint(checkpoint.path, found[0]) if found else checkpoint


def arrange(checkpoint: Checkpoint, layout: Mapping[str, Place]) -> Checkpoint:
    """The same checkpoint under the names of the single file; what that fuses or swaps becomes bytes in that order.

    A tensor without a place keeps its name. Raises `ModelCorrupt` if tensors lack, `ModelUnsupported` if such as are to
    be fused differ in dtype.
    """
    layout = _with_fused(layout, checkpoint.tensors)
    absent = [name for name in layout if name not in checkpoint.tensors]
    if absent:
        raise ModelCorrupt(f"{checkpoint.path} lacks {some(absent)}; download it again")
    pieces: dict[str, list[str]] = {}
    for name, place in sorted(layout.items(), key=lambda item: item[1].rows or (0, 0)):
        pieces.setdefault(place.key, []).append(name)
    tensors, parts = {}, {}
    for key, names in pieces.items():
        tensors[key] = _fuse(checkpoint, key, {name: layout[name] for name in names})
        parts[key] = tuple(part for name in names for part in _order(checkpoint, name, layout[name]))
    packed = {}
    for key, names in pieces.items():
        if any(name in checkpoint.quantization for name in names):
            packed[key] = _fuse_sides(checkpoint, key, {name: layout[name] for name in names}, tensors, parts)
    placed = set(layout)
    for name in layout:
        if name in checkpoint.quantization:
            placed |= {beside(name, leaf) for leaf in checkpoint.quantization[name].sides}
        elif checkpoint.tensors[name].dtype in FLOAT8:
            placed.add(beside(name, INPUT_SCALE))
    for name in checkpoint.tensors:
        if name not in placed:
            tensors[name], parts[name] = checkpoint.tensors[name], checkpoint.parts[name]
            if name in checkpoint.quantization:
                packed[name] = checkpoint.quantization[name]
    return replace(checkpoint, tensors=tensors, parts=parts, quantization=packed, diffusers=False)


def _with_fused(layout: Mapping[str, Place], tensors: Mapping[str, TensorInfo]) -> dict[str, Place]:
    """The same places; where a file holds several layers as one, the one in their place."""
    places = dict(layout)
    for name in tensors:
        layer, _, kind = name.rpartition(".")
        module, _, fused = layer.rpartition(".")
        parts = [f"{module}.{part}.{kind}" for part in FUSED_NAMES.get(fused, ())]
        if parts and all(part in places and part not in tensors for part in parts):
            gone = [places.pop(part) for part in parts]
            rows = [each.rows for each in gone if each.rows is not None]
            places[name] = Place(gone[0].key, (rows[0][0], sum(count for _, count in rows)))
    return places


def rename(checkpoint: Checkpoint, canonical: Callable[[str], str]) -> Checkpoint:
    """The same checkpoint under the names that ``canonical`` gives; the names of other tools among them.

    Raises `ModelCorrupt` if it holds one tensor under two names.
    """
    names = {name: canonical(name) for name in checkpoint.tensors}
    for weight, quantization in checkpoint.quantization.items():
        names |= {beside(weight, leaf): beside(names[weight], leaf) for leaf in quantization.sides}
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
        quantization={names[name]: each for name, each in checkpoint.quantization.items()},
    )


def _fuse(checkpoint: Checkpoint, key: str, places: Mapping[str, Place]) -> TensorInfo:
    infos = [checkpoint.tensors[name] for name in places]
    first = next(iter(places.values()))
    if len(infos) == 1 and first.rows is None:
        return infos[0]._replace(shape=(math.prod(infos[0].shape),)) if first.flat else infos[0]
    row = 0
    for (name, place), info in zip(places.items(), infos, strict=True):
        assert place.rows is not None
        if place.rows[0] != row or info.shape[:1] != place.rows[1:] or info.shape[1:] != infos[0].shape[1:]:
            raise ModelCorrupt(f"{checkpoint.path}: {name} is {list(info.shape)}, which is no part of {key}")
        if info.dtype != infos[0].dtype:
            raise ModelUnsupported(f"{checkpoint.path}: {' and '.join(places)} are not of one dtype")
        row += place.rows[1]
    return TensorInfo(infos[0].dtype, (row, *infos[0].shape[1:]))


def _fuse_sides(
    checkpoint: Checkpoint,
    key: str,
    places: Mapping[str, Place],
    tensors: dict[str, TensorInfo],
    parts: dict[str, tuple[Part, ...]],
) -> Quantization:
    """How the weight ``key`` is packed that ``places`` make; what lies beside it is put into ``tensors`` and ``parts``.

    Raises `ModelUnsupported` if that can't be had from the file's bytes: for layers with one scale each, or scales in
    tiles, that are to be one layer or exchange their halves.
    """
    first, *others = (checkpoint.quantization.get(name) for name in places)
    moved = len(places) > 1 or any(place.swap for place in places.values())
    if first is None or any(each != first for each in others):
        raise ModelUnsupported(f"{checkpoint.path}: {' and '.join(places)} are to be one layer, and packed differently")
    for leaf in first.sides:
        names = [beside(name, leaf) for name in places]
        infos = [checkpoint.tensors[name] for name in names]
        by_row = first.scales_rows(leaf) and all(info.size > 1 for info in infos)
        if moved and not by_row and (len(places) > 1 or infos[0].size > 1):
            raise ModelUnsupported(
                f"{checkpoint.path}: {some(names)} can't be put together in {key}; load the file in the authors' layout"
            )
        if any(info.dtype != infos[0].dtype for info in infos):
            raise ModelUnsupported(f"{checkpoint.path}: {some(names)} are not of one dtype, and are to be one tensor")
        tensors[beside(key, leaf)] = TensorInfo(infos[0].dtype, (sum(info.size for info in infos),))
        parts[beside(key, leaf)] = tuple(
            part
            for name, place in zip(names, places.values(), strict=True)
            for part in _order(checkpoint, name, place if by_row else Place(key))
        )
    return first


def _order(checkpoint: Checkpoint, name: str, place: Place) -> tuple[Part, ...]:
    parts = checkpoint.parts[name]
    if not place.swap:
        return parts
    (whole,) = parts
    shape = checkpoint.tensors[name].shape
    if not shape or shape[0] % 2:
        raise ModelCorrupt(f"{checkpoint.path}: {name} is {list(shape)}, whose rows are no scale and shift")
    middle = (whole.start + whole.stop) // 2
    return Part(whole.file, middle, whole.stop), Part(whole.file, whole.start, middle)


def some(names: Sequence[str]) -> str:
    """The first of these names, and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")

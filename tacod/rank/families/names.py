"""The names of weights: how another tool spells a family's parameters, as a table.

Each line of a table is a pattern of theirs and one of ours, without ``.weight`` and ``.bias`` where both have them:

    x_embedder                                                   img_in
    time_text_embed.{timestep,text}_embedder.linear_{1,2}        {time,vector}_in.{in,out}_layer
    transformer_blocks.*.attn.to_{q,k,v}                         double_blocks.*.img_attn.qkv[0,1,2]
    single_transformer_blocks.*.proj_mlp                         single_blocks.*.linear1[3:]
    norm_out.linear                                              final_layer.adaLN_modulation.1~

``*`` is a block's number. The choices in braces and brackets run in step: the first of theirs with the first of ours.
``[k]`` is the k-th part of the rows, each part with as many rows as the layer has inputs, and ``[k:]`` is all rows from
the k-th part on. ``[k/n]`` is the k-th of n equal parts. ``[q,k,v]`` are queries, as many rows as inputs, and keys and
values, which share the others: they may be fewer (grouped-query attention). ``~`` exchanges the halves of the rows
where there are two such parts: scale and shift; ``~~`` does so however many rows there are. A line of one pattern is of
names that are the same here. ``|`` says that the single file has the rows of their table in one row.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from tacod.checkpoint.header import MAX_TENSORS

__all__ = ["FUSED_NAMES", "Names", "Place"]

FUSED_NAMES = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
}
"""Layers that diffusers makes of several (``fuse_qkv_projections``), whose rows they have in this order."""
_KINDS = (".weight", ".bias", "")
_HEADS = ("q", "k", "v")
_CHOICES = re.compile(r"\{([^}]*)\}|\[([^\]]*)\]")


@dataclass(frozen=True)
class Place:
    """Where a tensor of diffusers' layout is in the single file: all of ``key``, or some of its rows."""

    key: str
    rows: tuple[int, int] | None = None
    """First row and number of rows, if the single file fuses layers that diffusers keeps apart (q, k, v)."""
    swap: bool = False
    """Whether the two halves of the rows are exchanged (scale and shift of a final modulation)."""
    flat: bool = False
    """Whether the single file has all rows as one (a table of modulations)."""


@dataclass(frozen=True)
class _Rule:
    theirs: str
    ours: str
    part: str
    """``0``, ``0:``, ``0/2`` or ``q``; empty for all rows."""
    swap: str
    """``~``, ``~~``, or nothing."""
    flat: bool


class Names:
    """A table of names; or several, for models of one family with different spellings.

    Of several tables, the one with most of the requested names is used.
    """

    def __init__(self, table: str, *others: str) -> None:
        """Read tables. Raises `ValueError` for a line whose sides don't run in step."""
        self._tables: list[Names] = [self, *map(Names, others)]
        self._by_ours: dict[str, list[_Rule]] = {}
        self._by_theirs: dict[str, _Rule] = {}
        for line in filter(None, map(str.strip, table.splitlines())):
            sides = line.split()
            for rule in _rules(sides[0], sides[-1]):
                self._by_ours.setdefault(rule.ours, []).append(rule)
                self._by_theirs[rule.theirs] = rule
        self._known = frozenset().union(*(table._by_theirs for table in self._tables))

    def __bool__(self) -> bool:
        return bool(self._by_theirs)

    def layout(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, Place]:
        """For a model's own names and shapes: diffusers' name of each parameter, and its place."""
        return max((table._layout(shapes) for table in self._tables), key=len)

    def _layout(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, Place]:
        places = {}
        for key, shape in shapes.items():
            for pattern, number, kind in _patterns(key):
                for rule in self._by_ours.get(pattern, ()):
                    inputs = shapes.get(key.removesuffix(kind) + ".weight", (0, 0))[-1]
                    swap = rule.swap == "~~" or (rule.swap == "~" and shape[0] == 2 * inputs)
                    place = Place(key, _rows(rule, shape[0], inputs), swap, rule.flat)
                    places[rule.theirs.replace("*", number) + kind] = place
        return places

    def ours(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
        """Our names and shapes of tensors under diffusers' names; those that the table lacks are left out."""
        found: dict[str, list[Sequence[int]]] = {}
        table = self._table(shapes)
        for name, shape in shapes.items():
            for pattern, number, kind in _patterns(name):
                rule = table._by_theirs.get(pattern)
                if rule is not None:
                    whole = (math.prod(shape),) if rule.flat else shape
                    found.setdefault(rule.ours.replace("*", number) + kind, []).append(whole)
        return {
            key: (sum(part[0] for part in parts), *parts[0][1:]) if all(parts) else () for key, parts in found.items()
        }

    def lacks(self, names: Collection[str]) -> list[str]:
        """The names that a file of diffusers' lacks.

        These are names of layers outside blocks, and of its first block if the second one has them.
        """
        given = set(names)

        def has(pattern: str, number: str) -> bool:
            return any(pattern.replace("*", number) + kind in given for kind in _KINDS)

        return [
            pattern.replace("*", "0")
            for pattern in self._table(given)._by_theirs
            if not has(pattern, "0") and ("*" not in pattern or has(pattern, "1"))
        ]

    def knows(self, name: str) -> bool:
        """Whether a table has this name of diffusers'."""
        return not self._known.isdisjoint(_spellings(name))

    def _has(self, name: str) -> bool:
        return not self._by_theirs.keys().isdisjoint(_spellings(name))

    def _table(self, theirs: Collection[str]) -> Names:
        """The table to use for a file with these names."""
        return max(self._tables, key=lambda table: sum(map(table._has, theirs)))


def _rules(theirs: str, ours: str) -> Iterator[_Rule]:
    bare = ours.rstrip("~|")
    swap, flat = ours.removeprefix(bare).rstrip("|"), ours.endswith("|")
    sides = [_expanded(theirs), _expanded(bare)]
    for one, other in zip(*sides, strict=True):
        ours, _, part = other.partition("[")
        yield _Rule(one, ours, part, swap, flat)


def _expanded(pattern: str) -> list[str]:
    """Every name that a pattern's choices make; that of brackets stays behind its bracket."""
    found = _CHOICES.search(pattern)
    if found is None:
        return [pattern]
    before, after = pattern[: found.start()], pattern[found.end() :]
    mark = "" if found[2] is None else "["
    return [
        before + mark + choice + rest for choice in (found[1] or found[2] or "").split(",") for rest in _expanded(after)
    ]


@functools.lru_cache(maxsize=8192)
def _patterns(name: str) -> list[tuple[str, str, str]]:
    """How a table may have a name: pattern, block's number, and kind, which the table leaves out.

    A file's names are looked up in the tables of all families.
    """
    found = []
    for kind in _KINDS:
        if name.endswith(kind):
            parts = name.removesuffix(kind).split(".")
            found.append((".".join(parts), "", kind))
            for at, part in enumerate(parts):
                if part.isdigit():
                    found.append((".".join([*parts[:at], "*", *parts[at + 1 :]]), part, kind))
    return found


@functools.lru_cache(MAX_TENSORS)
def _spellings(name: str) -> tuple[str, ...]:
    """The patterns of `_patterns` alone."""
    return tuple(pattern for pattern, _, _ in _patterns(name))


def _rows(rule: _Rule, rows: int, inputs: int) -> tuple[int, int] | None:
    if not rule.part:
        return None
    if rule.part in _HEADS:
        others = (rows - inputs) // 2
        at = _HEADS.index(rule.part)
        return (inputs + (at - 1) * others, others) if at else (0, inputs)
    if "/" in rule.part:
        at, parts = map(int, rule.part.split("/"))
        return at * rows // parts, rows // parts
    first = int(rule.part.removesuffix(":")) * inputs
    return first, rows - first if rule.part.endswith(":") else inputs

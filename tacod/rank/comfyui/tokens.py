"""The tokens of one forward that ranks share: which of them this rank has, and how they become whole again."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tacod.rank.comfyui.tables.base import Cut
from tacod.rank.parallel.sequence import SequenceParallel

__all__ = ["Misfit", "Run", "Tokens"]


class Misfit(Exception):
    """A network isn't as its table says; tells how."""


@dataclass(frozen=True)
class Run:
    """Tokens that ranks share out: frames of so many tokens, and of each frame a rank has its chunk."""

    frames: int
    size: int

    @property
    def total(self) -> int:
        """All its tokens."""
        return self.frames * self.size


class Tokens:
    """Those of one forward.

    Args:
        sequence: The ranks.
        frame: Of how many tokens a frame is, if blocks look at frames; 0 if they don't.
        leading: How many tokens the first of two runs has that are one tensor.
        meet: Called before each exchange; it raises if another rank has failed.
    """

    def __init__(
        self,
        sequence: SequenceParallel,
        frame: int = 0,
        leading: int = 0,
        meet: Callable[[], None] = lambda: None,
    ) -> None:
        self.sequence = sequence
        self.meet = meet
        self.runs: dict[str, Run] = {}
        """By name; empty before the first block."""
        self._frame, self._leading = frame, leading

    def begin(self, arguments: dict[str, Any], tokens: Mapping[str, Cut]) -> None:
        """Learn from the first block's arguments how many tokens there are, and leave out those that don't count."""
        for name, cut in tokens.items():
            value = arguments.get(name)
            if not isinstance(value, Tensor) or value.ndim <= cut.dim + cut.dims:
                raise Misfit(f"the first block's {name} is no tensor of tokens")
            length = math.prod(value.shape[cut.dim : cut.dim + cut.dims])
            if cut.crop:
                length = min(_number(arguments.get(cut.crop), cut.crop), length)
                arguments[name] = value.narrow(cut.dim, 0, length)
            leading = [min(_number(self._leading, "the first run"), length)] if len(cut.runs) > 1 else []
            for each, size in zip(cut.runs, (*leading, length - sum(leading)), strict=True):
                self._begin(each, size, name)

    def _begin(self, name: str, length: int, argument: str) -> None:
        size = self._frame or length
        if length and length % size:
            raise Misfit(f"the {length} tokens of {argument} are no frames of {size}")
        run = Run(length // size, size) if length else Run(1, 0)
        if self.runs.setdefault(name, run) != run:
            raise Misfit(f"the first block's {argument} has {length} tokens, unlike another argument")

    @property
    def scarce(self) -> str:
        """Which run is so short that some rank has none of it; empty if there is none.

        Not every network can compute on no tokens.
        """
        for name, run in self.runs.items():
            if not all(self.sequence.sizes(run.size)):
                return f"only {run.size} tokens of {name}{' in a frame' if run.frames > 1 else ''}"
        return ""

    def cut(self, value: Any, cut: Cut, name: str) -> Any:
        """This rank's tokens of a tensor, or of each in a list. Without frames and several runs it is a view."""
        if value is None:
            return None
        if isinstance(value, tuple | list):
            # A table may come with numbers.
            return type(value)(each if isinstance(each, float) else self.cut(each, cut, name) for each in value)
        runs = [self.runs[run] for run in cut.runs]
        total = sum(run.total for run in runs)
        last = cut.dim + cut.dims
        if cut.tail and isinstance(value, Tensor) and value.ndim > cut.dim and value.shape[cut.dim] < total:
            begin, end = (max(each - total + value.shape[cut.dim], 0) for each in self.sequence.place(total))
            return value.narrow(cut.dim, begin, end - begin)
        if not isinstance(value, Tensor) or value.ndim < last or math.prod(value.shape[cut.dim : last]) != total:
            shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise Misfit(f"{name} is {shape}, and {total} tokens were expected along {cut.dim}")
        if cut.dims > 1:
            value = value.view(*value.shape[: cut.dim], total, *[1] * (cut.dims - 1), *value.shape[last:])
        parts = zip(torch.split(value, [run.total for run in runs], cut.dim), runs, strict=True)
        chunks = [self._chunk(part, cut.dim, run) for part, run in parts]
        return chunks[0] if len(chunks) == 1 else torch.cat(chunks, cut.dim)

    def _chunk(self, tokens: Tensor, dim: int, run: Run) -> Tensor:
        if run.frames == 1:
            return self.sequence.shard(tokens, dim)
        return self.sequence.shard(torch.unflatten(tokens, dim, (run.frames, run.size)), dim + 1).flatten(dim, dim + 1)

    def gather(self, value: Any, cut: Cut, name: str) -> Tensor:
        """All tokens of a tensor that has this rank's: the inverse of `cut`, with all along the first dimension."""
        runs = [self.runs[run] for run in cut.runs]
        sizes = [self.mine([run]) for run in runs]
        if not isinstance(value, Tensor) or value.ndim <= cut.dim or value.shape[cut.dim] != sum(sizes):
            shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise Misfit(f"{name} gives {shape}, and {sum(sizes)} tokens were expected")
        parts = zip(torch.split(value, sizes, dim=cut.dim), runs, strict=True)
        wholes = [self.join(part, cut.dim, run) for part, run in parts]
        return wholes[0] if len(wholes) == 1 else torch.cat(wholes, dim=cut.dim)

    def join(self, tokens: Tensor, dim: int, run: Run) -> Tensor:
        """A run's tokens, of each rank's."""
        self.meet()
        if run.frames == 1:
            return self.sequence.gather(tokens.contiguous(), run.size, dim)
        framed = torch.unflatten(tokens.contiguous(), dim, (run.frames, tokens.shape[dim] // run.frames))
        return self.sequence.gather(framed, run.size, dim + 1).flatten(dim, dim + 1)

    def with_edges(self, tokens: Tensor, dim: int, reach: int) -> tuple[Tensor, int]:
        """This rank's tokens with up to ``reach`` of other ranks' on either side, and how many are on the left.

        There are fewer at the ends of the sequence. A chunk may be shorter than ``reach``.
        """
        runs = list(self.runs.values())
        if len(runs) != 1 or runs[0].frames > 1 or tokens.shape[dim] != self.mine(runs):
            raise Misfit(f"{tokens.shape[dim]} tokens beside each other, where {self.mine(runs)} were expected")
        sizes, me, length = self.sequence.sizes(runs[0].size), self.sequence.whole.rank, tokens.shape[dim]
        edges = [min(size, reach) for size in sizes]
        ends = (tokens.narrow(dim, 0, edges[me]), tokens.narrow(dim, length - edges[me], edges[me]))
        self.meet()
        everyones = self.sequence.whole.gather(torch.cat(ends, dim), [2 * edge for edge in edges], dim)
        pieces = torch.split(everyones, [edge for edge in edges for _ in range(2)], dim)
        # Of ranks on the left the last tokens, of those on the right the first ones.
        nothing = tokens.narrow(dim, 0, 0)
        left = torch.cat((nothing, *pieces[1 : 2 * me : 2]), dim)
        right = torch.cat((nothing, *pieces[2 * me + 2 :: 2]), dim)
        begin = max(left.shape[dim] - reach, 0)
        left = left.narrow(dim, begin, left.shape[dim] - begin)
        right = right.narrow(dim, 0, min(right.shape[dim], reach))
        return torch.cat((left, tokens, right), dim), left.shape[dim]

    def mine(self, runs: Iterable[Run]) -> int:
        """How many tokens of these runs this rank has."""
        places = [(run.frames, *self.sequence.place(run.size)) for run in runs]
        return sum(frames * (end - begin) for frames, begin, end in places)

    def count(self, count: Any, run: str, name: str) -> int | Tensor:
        """How many of the first ``count`` tokens of a run this rank has.

        For a tensor of the lengths of images that lie one behind the other, one of how many of each it has.
        """
        whole = self.runs[run]
        if isinstance(count, Tensor):
            if count.ndim != 1 or count.is_floating_point() or whole.frames > 1:
                raise Misfit(f"{name} has no lengths of images")
            ends = count.cumsum(0)
            begin, end = self.sequence.place(whole.size)
            return ends.clamp(begin, end) - (ends - count).clamp(begin, end)
        frames, rest = divmod(min(_number(count, name), whole.total), whole.size or 1)
        begin, end = self.sequence.place(whole.size)
        return frames * (end - begin) + min(max(rest - begin, 0), end - begin)


def _number(count: Any, name: str) -> int:
    if not isinstance(count, int) or count < 0:
        raise Misfit(f"{name} is no number of tokens")
    return count

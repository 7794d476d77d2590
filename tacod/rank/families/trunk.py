"""The loop over a family's blocks, with ControlNet residuals, step cache and fp16 clamp for all families."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from tacod.rank.families.control import Control
from tacod.rank.families.stream import ForwardPass
from tacod.rank.ops.attention_kernels import find_kernel
from tacod.rank.parallel.sequence import SequenceParallel

__all__ = ["BlockCache", "BlockWatch", "Trunk", "finite"]

_LARGEST = torch.finfo(torch.float16).max


class BlockCache(Protocol):
    """Decides after the first block whether to skip the others (`tacod.rank.forward.step_cache`)."""

    def find(self, first: Tensor, sequence: SequenceParallel) -> Tensor | None:
        """The earlier addition of the other blocks to the image's tokens; None if they must be computed.

        ``first`` [B, S, W] is what the first block has added. All ranks of a sequence skip, or none does. The streams
        of several latents are one row of all their numbers.
        """

    def keep(self, others: Tensor) -> None:
        """Remember what the other blocks have added, in the shape of ``first``."""


class BlockWatch(Protocol):
    """Follows a long forward (`tacod.rank.forward.watch`)."""

    def before(self, block: int, blocks: int) -> None:
        """Called before each block. Raises `Cancelled` on all ranks if they are to stop here."""


class Trunk:
    """The blocks of one forward. After them no streams are joined."""

    def __init__(
        self,
        f: ForwardPass,
        blocks: Sequence[Any],
        kinds: Mapping[int, tuple[str, int]],
        control: Control | None = None,
        clamps: bool = False,
        watch: BlockWatch | None = None,
    ) -> None:
        """Run nothing yet.

        Args:
            f: The forward, begun.
            blocks: Callables that take ``f`` and change its streams.
            kinds: For the ``id`` of a block the ComfyUI name of its list of residuals, and its place in that list.
            control: A ControlNet's residuals.
            clamps: Whether streams are clamped after each block in fp16.
            watch: Hears of each block before it begins.
        """
        f.kernel = find_kernel(f.sequence.policy.kernel)
        self._f, self._kinds, self._control, self._clamps, self._watch = f, kinds, control, clamps, watch
        self._count = len(blocks)
        self._blocks = enumerate(f.over(blocks))
        self._after: list[Tensor] = []
        """The output's tokens after the first block."""

    def run(self, cache: BlockCache | None = None) -> None:
        """Run the blocks one after the other; with a step cache perhaps the first one alone."""
        if cache is None:
            # Nothing holds on to tokens before or after the first block.
            self._go_on()
            return
        skipped = cache.find(self.first(), self._f.sequence)
        if skipped is None:
            cache.keep(self.rest())
        else:
            self.skip(skipped)

    def first(self) -> Tensor:
        """Run the first block. What it has added to the output's tokens, as `BlockCache.find` takes it."""
        before = self._f.output_tokens
        number, block = next(self._blocks)
        self._run(number, block)
        self._after = self._f.output_tokens
        return _added(self._f, self._after, before, whole=False)

    def rest(self) -> Tensor:
        """Run the other blocks. What they have added, as `BlockCache.keep` takes it."""
        self._go_on()
        return _added(self._f, self._f.output_tokens, self._after)

    def skip(self, others: Tensor) -> None:
        """In the place of `rest`, add what the other blocks have added before."""
        f = self._f
        f.part()
        parts = torch.split(others.flatten(), [tokens.numel() for tokens in self._after])
        for stream, tokens, part in zip(f.outputs or (f.image,), self._after, parts, strict=True):
            stream.tokens = tokens + part.view(tokens.shape)

    def _go_on(self) -> None:
        for number, block in self._blocks:
            self._run(number, block)
        self._f.part()

    def _run(self, number: int, block: Any) -> None:
        f = self._f
        if self._watch is not None:
            self._watch.before(number, self._count)
        block(f)
        if f.weights is not None:
            # This block's are about to go.
            for stream in f.streams:
                stream.catch_up()
        if self._clamps and f.image.dtype == torch.float16:
            for stream in f.streams:
                stream.tokens = finite(stream.tokens)
        kind = self._kinds.get(id(block))
        if self._control is not None and kind is not None and self._control.find(*kind) is not None:
            self._control.add(*kind, f.sequence, f.image_tokens, sum(f.image.lengths))


def _added(f: ForwardPass, after: Sequence[Tensor], before: Sequence[Tensor], whole: bool = True) -> Tensor:
    """What was added to the tokens of one stream, [B, S, W], or of several, as one row.

    Without ``whole`` it is only a share of a stream that each rank has whole, so that the ranks count each token once.
    """
    added = [one - other for one, other in zip(after, before, strict=True)]
    if not whole:
        streams = f.outputs or (f.image,)
        added = [f.sequence.shard(x) if each.whole else x for x, each in zip(added, streams, strict=True)]
    return added[0] if len(added) == 1 else torch.cat([each.flatten() for each in added])


def finite(x: Tensor) -> Tensor:
    """In fp16, replace infinities and NaN by finite numbers; other dtypes are unchanged."""
    if x.dtype != torch.float16:
        return x
    return torch.nan_to_num(x, nan=0.0, posinf=_LARGEST, neginf=-_LARGEST)

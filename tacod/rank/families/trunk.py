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

__all__ = ["BlockCache", "BlockWatch", "finite", "run_trunk"]

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


def run_trunk(
    f: ForwardPass,
    blocks: Sequence[Any],
    kinds: Mapping[int, tuple[str, int]],
    control: Control | None = None,
    cache: BlockCache | None = None,
    clamps: bool = False,
    watch: BlockWatch | None = None,
) -> None:
    """Run the blocks one after the other; afterwards no streams are joined.

    Args:
        f: The forward, begun.
        blocks: Callables that take ``f`` and change its streams.
        kinds: For the ``id`` of a block the ComfyUI name of its list of residuals, and its place in that list.
        control: A ControlNet's residuals.
        cache: The step cache of this run.
        clamps: Whether streams are clamped after each block in fp16.
        watch: Hears of each block before it begins.
    """
    f.kernel = find_kernel(f.sequence.policy.kernel)
    # Without a cache nothing holds on to the tokens before the first block.
    before = [] if cache is None else f.output_tokens
    for number, block in enumerate(f.over(blocks)):
        if watch is not None:
            watch.before(number, len(blocks))
        block(f)
        if f.weights is not None:
            # This block's are about to go.
            for stream in f.streams:
                stream.catch_up()
        if clamps and f.image.dtype == torch.float16:
            for stream in f.streams:
                stream.tokens = finite(stream.tokens)
        kind = kinds.get(id(block))
        if control is not None and kind is not None and control.find(*kind) is not None:
            control.add(*kind, f.sequence, f.image_tokens, sum(f.image.lengths))
        if cache is not None and number == 0:
            after = f.output_tokens
            skipped = cache.find(_added(f, after, before, whole=False), f.sequence)
            if skipped is not None:
                f.part()
                parts = torch.split(skipped.flatten(), [tokens.numel() for tokens in after])
                for stream, tokens, part in zip(f.outputs or (f.image,), after, parts, strict=True):
                    stream.tokens = tokens + part.view(tokens.shape)
                return
    f.part()
    if cache is not None:
        cache.keep(_added(f, f.output_tokens, after))


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

"""Sequence parallelism: several ranks share each token stream, Ulysses within and a ring around.

Ulysses (Jacobs et al., 2023, arXiv:2309.14509) exchanges tokens for heads; a ring (Liu et al., 2023,
arXiv:2310.01889) passes keys and values around and merges what each rank attends to; both together are USP (Fang and
Zhao, 2024, arXiv:2405.07719). Here neither tokens nor heads need to divide by the number of ranks: chunks differ by
one at most, and every exchange carries explicit sizes. A rank without tokens or heads sends nothing, but takes part.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tacod.plan import chunks
from tacod.rank.attention import attend, attend_part, merge
from tacod.rank.collectives import Group

__all__ = ["SequenceParallel"]


class SequenceParallel:
    """The ranks that share one sequence, seen from one of them.

    ``whole`` holds them all, ordered so that ``ulysses`` is a run of neighbours and ``ring`` those at the same place
    in each run. Without groups it is one process: no collectives, and everything here can be differentiated.
    """

    def __init__(self, whole: Group | None = None, ulysses: Group | None = None, ring: Group | None = None) -> None:
        self.whole = whole or Group()
        self.ulysses = ulysses or Group()
        self.ring = ring or Group()
        assert self.ulysses.size * self.ring.size == self.whole.size

    @property
    def size(self) -> int:
        """How many ranks share the sequence."""
        return self.whole.size

    def sizes(self, n: int) -> list[int]:
        """How many of ``n`` tokens each rank has: n // size, and one more for the first n % size ranks."""
        return chunks(n, self.size)

    def shard(self, tokens: Tensor, dim: int = 1) -> Tensor:
        """This rank's chunk of a whole stream, as a view."""
        sizes = self.sizes(tokens.shape[dim])
        return tokens.narrow(dim, sum(sizes[: self.whole.rank]), sizes[self.whole.rank])

    def gather(self, tokens: Tensor, n: int, dim: int = 1) -> Tensor:
        """The whole stream of ``n`` tokens, on every rank, from the ranks' chunks: the inverse of `shard`."""
        return self.whole.gather(tokens, self.sizes(n), dim)

    def in_order_of_ranks(self, mask: Tensor, lengths: Sequence[int]) -> Tensor:
        """A mask [B or 1, S, S] over the whole joint sequence, from the order of streams to that of `attention`'s.

        It comes as [B or 1, 1, S, S].
        """
        mask = mask.unsqueeze(1)
        if self.size == 1:
            return mask
        positions = torch.arange(sum(lengths), device=mask.device)
        streams = [torch.split(stream, self.sizes(len(stream))) for stream in torch.split(positions, list(lengths))]
        order = torch.cat([chunk for rank in zip(*streams, strict=True) for chunk in rank])
        return mask[:, :, order][..., order]

    def attention(self, q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], mask: Tensor | None = None) -> Tensor:
        """Attention over the whole joint sequence, for this rank's tokens.

        ``q``, ``k``, ``v`` are [B, S, H, D], where S counts this rank's chunks of the streams, one after another,
        and ``lengths`` are the streams' whole token counts. Returns [B, S, H * D].

        The gathered sequence is in the order of ranks, not of streams. It needs no sorting, for attention is
        equivariant under permutations of its tokens, and each rank gets its own tokens back. A ``mask`` is what
        `in_order_of_ranks` gives.
        """
        tokens = [sum(sizes) for sizes in zip(*map(self.sizes, lengths), strict=True)]
        runs = [tokens[i : i + self.ulysses.size] for i in range(0, self.size, self.ulysses.size)]
        run = runs[self.ring.rank]
        heads = chunks(q.shape[2], self.ulysses.size)
        q, k, v = _tokens_for_heads(self.ulysses, q, k, v, run, heads)
        if self.ring.size > 1:
            out = _around(self.ring, q, k, v, [sum(run) for run in runs], mask)
        else:
            out = attend(q, k, v, mask)
        return _heads_for_tokens(self.ulysses, out, run, heads)


def _tokens_for_heads(
    group: Group, q: Tensor, k: Tensor, v: Tensor, tokens: list[int], heads: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's tokens with all heads [B, S, H, D] become all tokens with this rank's heads [B, h, T, D].

    One exchange for all three; ``tokens`` and ``heads`` are what each rank has.
    """
    if group.size == 1:
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    batch, mine, _, width = q.shape
    own = heads[group.rank]
    # Heads come first, so that what goes to one rank lies together: [H, 3, B, S, D].
    sent = torch.stack([t.permute(2, 0, 1, 3) for t in (q, k, v)], dim=1).view(-1)
    each = 3 * batch * width
    parts = group.all_to_all(sent, [h * mine * each for h in heads], [own * s * each for s in tokens])
    whole = torch.cat([part.view(own, 3, batch, s, width) for part, s in zip(parts, tokens, strict=True)], dim=3)
    q, k, v = whole.permute(1, 2, 0, 3, 4)
    return q, k, v


def _heads_for_tokens(group: Group, out: Tensor, tokens: list[int], heads: list[int]) -> Tensor:
    """The way back: all tokens with this rank's heads [B, h, T, D] become its tokens with all heads [B, S, H * D]."""
    if group.size == 1:
        return out.transpose(1, 2).flatten(2)
    batch, own, _, width = out.shape
    mine = tokens[group.rank]
    sent = out.permute(2, 0, 1, 3).reshape(-1)  # tokens first: [T, B, h, D]
    each = batch * width
    parts = group.all_to_all(sent, [s * own * each for s in tokens], [mine * h * each for h in heads])
    whole = torch.cat([part.view(mine, batch, h, width) for part, h in zip(parts, heads, strict=True)], dim=2)
    return whole.transpose(0, 1).flatten(2)


def _around(group: Group, q: Tensor, k: Tensor, v: Tensor, tokens: list[int], mask: Tensor | None) -> Tensor:
    """Attention of this rank's queries over the keys of the whole ring [B, h, S, D]; ``tokens`` are each rank's."""
    rows = None if mask is None else torch.split(mask, tokens, dim=2)[group.rank]
    masks = [None] * group.size if rows is None else torch.split(rows, tokens, dim=3)
    batch, heads, _, width = k.shape
    block = torch.stack((k, v))
    part = None
    for turn in range(group.size):
        before = tokens[(group.rank - turn - 1) % group.size]
        passing = None
        if turn < group.size - 1:
            passing = group.pass_on(block.reshape(-1), 2 * batch * heads * before * width)
        mine = attend_part(q, block[0], block[1], masks[(group.rank - turn) % group.size])
        part = mine if part is None else merge(part, mine)
        if passing is not None:
            block = passing.wait().view(2, batch, heads, before, width)
    assert part is not None
    return part[0].to(q.dtype)

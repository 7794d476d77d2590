"""Asynchronous attention over tokens that ranks share: exchange tokens for heads, attend, exchange back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tacod.plan import AttentionPolicy
from tacod.rank.comm.group import Group
from tacod.rank.comm.transport import Deal, Exchange, Transport
from tacod.rank.ops.attention_kernels import Kernel
from tacod.rank.ops.group_bias import GroupBias, attend_biased
from tacod.rank.ops.qkv import QKV, HeadShare, deal_heads
from tacod.rank.ops.sdpa import attend_part, attend_pieces, merge

__all__ = ["JointAttention", "KeysValues"]


class Ranks(Protocol):
    """What attention needs to know of the ranks that share a sequence: see `SequenceParallel`."""

    @property
    def ulysses(self) -> Group: ...

    @property
    def ring(self) -> Group: ...

    @property
    def policy(self) -> AttentionPolicy: ...

    @property
    def transport(self) -> Transport: ...

    @property
    def head_shares(self) -> tuple[int, ...]: ...

    def sizes(self, n: int) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class KeysValues:
    """Keys and values of tokens that the ranks share, kept for later attentions."""

    heads: Tensor
    """This rank's key heads for the tokens of its Ulysses group, and the values: [2, B, g, S, D]."""
    lengths: tuple[int, ...]
    """How many tokens all ranks have together, of each part that was sharded by itself."""


class JointAttention:
    """The handle of an asynchronous attention. Work between its creation, `start` and `wait` overlaps communication."""

    def __init__(
        self,
        ranks: Ranks,
        streams: Sequence[Callable[[], QKV]],
        lengths: Sequence[Sequence[int]],
        mask: Tensor | GroupBias | None,
        overlap: bool = False,
        before: KeysValues | None = None,
        keep: bool = False,
        kernel: Kernel | None = None,
    ) -> None:
        """Project each stream, the longest first, and send its heads while the next one is projected.

        ``overlap`` says that the caller computes something before `start`, so the last stream travels beside that. The
        tokens attend to those of ``before`` too; then there is no mask. ``keep`` is for `kept`. A `GroupBias` is for
        one stream alone, whose tokens lie in their order on the ranks. ``kernel`` computes in place of the exact ones;
        `ArgumentError` says what it can't.
        """
        assert before is None or mask is None
        assert not isinstance(mask, GroupBias) or [len(parts) for parts in lengths] == [1]
        self._ranks, self._mask = ranks, mask
        self._before, self._keep, self._kernel = before, keep, kernel
        self._exchange: Exchange | None = None
        self._started = False
        counts = [[sum(each) for each in zip(*map(ranks.sizes, parts), strict=True)] for parts in lengths]
        size = ranks.ulysses.size
        runs = [[each[i : i + size] for each in counts] for i in range(0, len(counts[0]), size)]
        self._lengths = tuple(length for each in lengths for length in each)
        self._tokens = [sum(map(sum, run)) for run in runs]
        """How many tokens each rank of the ring attends to in its turn: those of its Ulysses group."""
        for length in () if before is None else before.lengths:
            sizes = ranks.sizes(length)
            self._tokens = [have + sum(sizes[i * size : (i + 1) * size]) for i, have in enumerate(self._tokens)]
        order = sorted(range(len(streams)), key=lambda index: -max(counts[index]))
        for index in order:
            qkv = streams[index]()
            if self._exchange is None:
                if kernel is not None:
                    kernel.check(qkv.first.dtype, qkv.width, mask)
                self._exchange = self._open(qkv, runs[ranks.ring.rank])
            self._exchange.send(qkv, index, overlap or index != order[-1])

    def _open(self, qkv: QKV, streams: Sequence[Sequence[int]]) -> Exchange:
        group, tensor = self._ranks.ulysses, qkv.first
        shares = deal_heads(qkv.heads, qkv.kv_heads, self._ranks.head_shares)
        self._share = shares[group.rank]
        deal = Deal(group.rank, streams, shares, len(tensor), qkv.width, tensor.dtype, tensor.device)
        return self._ranks.transport.open(deal, self._ranks.policy.exchange)

    def start(self) -> None:
        """Attend and send the result back while the caller computes something else. Optional: `wait` does it too."""
        self._start(overlap=True)

    def _start(self, overlap: bool) -> None:
        assert self._exchange is not None
        self._started = True
        q, k, v = self._exchange.received()
        if self._keep:
            self.kept = KeysValues(torch.stack((k, v)), self._lengths)
            """The keys and values of these tokens, once the attention is started with ``keep``."""
        self._exchange.give_back(self._attend(q, k, v), overlap)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Iterator[Tensor]:
        """This rank's heads for the tokens of its Ulysses group, in one result or several: [B, h, S', D]."""
        ranks = self._ranks
        if self._before is not None:
            k, v = (torch.cat(each, dim=2) for each in zip(self._before.heads, (k, v), strict=True))
        if ranks.ring.size > 1:
            yield _attend_ring(ranks.ring, self._share, q, k, v, self._tokens, self._mask, self._kernel)
            return
        if isinstance(self._mask, GroupBias):
            yield attend_biased(q, self._share.repeat(k), self._share.repeat(v), 0, 0, self._mask)[0].to(q.dtype)
            return
        if self._kernel is not None:
            yield self._kernel.attend(q, self._share.repeat(k), self._share.repeat(v), self._mask)
            return
        # One rank alone would have to join what it splits.
        split = ranks.policy.split_kv and ranks.ulysses.size > 1
        yield from attend_pieces(q, self._share.repeat(k), self._share.repeat(v), self._mask, split)

    def wait(self) -> Tensor:
        """The attention output of this rank's tokens, [B, S, H * D].

        Where ranks write into each other's memory this is a view of that memory. It stays valid until the next
        attention in the same slot begins, at the earliest the next `SequenceParallel.attend` after this call, which
        overwrites it. Consume it before, or clone it.
        """
        if not self._started:
            self._start(overlap=False)
        assert self._exchange is not None
        return self._exchange.result()


def _attend_ring(
    ring: Group,
    share: HeadShare,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tokens: list[int],
    mask: Tensor | GroupBias | None,
    kernel: Kernel | None,
) -> Tensor:
    """Attention of this rank's queries over the keys of the whole ring [B, h, S, D]; ``tokens`` are each rank's."""
    places = [sum(tokens[:rank]) for rank in range(ring.size)]
    bias, masks = (mask, None) if isinstance(mask, GroupBias) else (None, mask)
    if masks is not None and masks.shape[2] > 1:
        masks = torch.split(masks, tokens, dim=2)[ring.rank]
    each = [None] * ring.size if masks is None else torch.split(masks, tokens, dim=3)
    batch, heads, _, width = k.shape
    block = torch.stack((k, v))
    part = None
    for turn in range(ring.size):
        before = tokens[(ring.rank - turn - 1) % ring.size]
        passing = None
        if turn < ring.size - 1:
            passing = ring.pass_on(block.reshape(-1), 2 * batch * heads * before * width)
        keys, values = share.repeat(block[0]), share.repeat(block[1])
        whose = (ring.rank - turn) % ring.size
        if kernel is not None:
            mine = kernel.attend_part(q, keys, values)
        elif bias is None:
            mine = attend_part(q, keys, values, each[whose])
        else:
            mine = attend_biased(q, keys, values, places[ring.rank], places[whose], bias)
        part = mine if part is None else merge(part, mine)
        if passing is not None:
            block = passing.wait().view(2, batch, heads, before, width)
    assert part is not None
    return part[0].to(q.dtype)

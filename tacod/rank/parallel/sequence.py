"""Sequence parallelism: several ranks share each token stream, Ulysses within and a ring around.

Ulysses (Jacobs et al., 2023, arXiv:2309.14509) exchanges tokens for heads; a ring (Liu et al., 2023,
arXiv:2310.01889) passes keys and values around and merges what each rank attends to; both together are USP (Fang and
Zhao, 2024, arXiv:2405.07719). Here neither tokens nor heads need to divide by the number of ranks: chunks are as large
as the ranks' shares make them, and every exchange carries explicit sizes. A rank without tokens or heads sends nothing,
but takes part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tacod.plan import DEFAULT_POLICY, AttentionPolicy
from tacod.rank.comm.collective import Collective
from tacod.rank.comm.group import Group
from tacod.rank.comm.transport import Local, Transport
from tacod.rank.ops.attention_kernels import Kernel
from tacod.rank.ops.group_bias import GroupBias
from tacod.rank.ops.qkv import QKV
from tacod.rank.parallel.joint_attention import JointAttention, KeysValues
from tacod.shares import apportion

__all__ = ["SequenceParallel"]


class SequenceParallel:
    """The ranks that share one sequence, seen from one of them.

    ``whole`` holds them all, ordered so that ``ulysses`` is a run of neighbours and ``ring`` those at the same place
    in each run. Without groups it is one process: no collectives, and everything here can be differentiated.
    """

    def __init__(
        self,
        whole: Group | None = None,
        ulysses: Group | None = None,
        ring: Group | None = None,
        policy: AttentionPolicy = DEFAULT_POLICY,
        transport: Transport | None = None,
        images: Group | None = None,
        shares: tuple[int, ...] = (),
    ) -> None:
        """Join the groups.

        ``transport`` is what the ranks of ``ulysses`` exchange by; by default collectives. ``images`` are the ranks
        that compute the other images of the same forward, block by block beside this one. ``shares`` are those of the
        ranks of ``whole``; empty for equal ones.
        """
        self.policy = policy
        self.whole = whole or Group()
        self.ulysses = ulysses or Group()
        self.ring = ring or Group()
        self.images = images or Group()
        assert self.ulysses.size * self.ring.size == self.whole.size
        self.shares = shares or (1,) * self.whole.size
        assert len(self.shares) == self.whole.size
        self.head_shares = tuple(sum(self.shares[place :: self.ulysses.size]) for place in range(self.ulysses.size))
        """The shares of heads of each place in a run of ``ulysses``; those that a ring joins have the same heads."""
        alone = self.ulysses.size == 1
        self.transport = transport or (Local(in_ring=self.ring.size > 1) if alone else Collective(self.ulysses))

    @property
    def size(self) -> int:
        """How many ranks share the sequence."""
        return self.whole.size

    def sizes(self, n: int) -> tuple[int, ...]:
        """How many of ``n`` tokens each rank has, by its share."""
        return apportion(n, self.shares)

    def place(self, n: int) -> tuple[int, int]:
        """Where this rank's of ``n`` tokens begin and end."""
        sizes = self.sizes(n)
        begin = sum(sizes[: self.whole.rank])
        return begin, begin + sizes[self.whole.rank]

    def shard(self, tokens: Tensor, dim: int = 1) -> Tensor:
        """This rank's chunk of a whole stream, as a view."""
        begin, end = self.place(tokens.shape[dim])
        return tokens.narrow(dim, begin, end - begin)

    def gather(self, tokens: Tensor, n: int, dim: int = 1) -> Tensor:
        """The whole stream of ``n`` tokens, on every rank, from the ranks' chunks: the inverse of `shard`."""
        return self.whole.gather(tokens, self.sizes(n), dim)

    def in_order_of_ranks(self, mask: Tensor, lengths: Sequence[int]) -> Tensor:
        """A mask over the whole joint sequence, from the order of streams to that of `attend`'s.

        A dense mask [B or 1, S, S], which is added to the scores, becomes [B or 1, 1, S, S]. A key mask [B or 1, S] in
        bool, True for the tokens that all others attend to, becomes [B or 1, 1, 1, S]; at least one key of an image is
        True.
        """
        mask = mask.unsqueeze(1) if mask.ndim == 3 else mask[:, None, None]
        if self.size == 1:
            return mask
        positions = torch.arange(sum(lengths), device=mask.device)
        streams = [
            torch.split(stream, list(self.sizes(len(stream)))) for stream in torch.split(positions, list(lengths))
        ]
        order = torch.cat([chunk for rank in zip(*streams, strict=True) for chunk in rank])
        return (mask[:, :, order] if mask.shape[2] > 1 else mask)[..., order]

    def attend(
        self,
        streams: Sequence[Callable[[], QKV]],
        lengths: Sequence[int | tuple[int, ...]],
        mask: Tensor | GroupBias | None = None,
        overlap: bool = False,
        before: KeysValues | None = None,
        keep: bool = False,
        kernel: Kernel | None = None,
    ) -> JointAttention:
        """Begin attention over the whole joint sequence, for this rank's tokens.

        ``streams`` give this rank's chunks, and ``lengths`` are the streams' whole token counts: several of a stream
        whose parts were sharded each by itself; a single stream may be of all parts together. The gathered sequence is
        in the order of ranks, not of streams. It needs no sorting, for attention is equivariant under permutations of
        its tokens, and each rank gets its own tokens back. A ``mask`` is what `in_order_of_ranks` gives, or for a
        single stream a `GroupBias`. ``overlap`` says that the caller computes something before the handle's `start`.
        ``before`` are keys and values that an attention with ``keep`` has kept; these tokens attend to them too, and
        there is no mask then. Without a ``kernel`` attention is exact; one that can't compute this attention raises
        `ArgumentError`, on all ranks and before they exchange anything.
        """
        parts = [length if isinstance(length, tuple) else (length,) for length in lengths]
        if len(streams) == 1:
            parts = [tuple(length for part in parts for length in part)]
        return JointAttention(self, streams, parts, mask, overlap, before, keep, kernel)

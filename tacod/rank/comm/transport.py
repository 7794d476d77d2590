"""How one attention's queries, keys, values and outputs travel between the ranks of a Ulysses group.

Tokens are the first dimension of all exchanged tensors, so what the ranks send forms one tensor in place: nothing is
sorted or unpacked.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from tacod.rank.ops.qkv import QKV, HeadShare

__all__ = ["Deal", "Exchange", "Local", "Transport"]


@dataclass(frozen=True)
class Deal:
    """Who has what in one attention: tokens of all heads before and after it, heads of all tokens during it."""

    rank: int
    """This rank in the Ulysses group."""
    streams: Sequence[Sequence[int]]
    """For each stream, how many of its tokens each rank has."""
    shares: Sequence[HeadShare]
    """The heads that each rank attends with."""
    batch: int
    width: int
    """Channels of a head."""
    dtype: torch.dtype
    device: torch.device

    @property
    def ranks(self) -> int:
        """Ranks of the Ulysses group."""
        return len(self.shares)

    @property
    def others(self) -> list[int]:
        """The other ranks, starting with the next one, so that no two ranks start with the same."""
        return [(self.rank + turn) % self.ranks for turn in range(1, self.ranks)]

    @property
    def share(self) -> HeadShare:
        """This rank's heads."""
        return self.shares[self.rank]

    @property
    def tokens(self) -> list[int]:
        """How many tokens each rank has, over all streams."""
        return [sum(each) for each in zip(*self.streams, strict=True)]

    def begins(self, stream: int) -> list[int]:
        """Where each rank's tokens of a stream begin among all tokens, which are in the order of ranks."""
        tokens = self.tokens
        return [sum(tokens[:r]) + sum(each[r] for each in self.streams[:stream]) for r in range(self.ranks)]

    def new_packed(self, tokens: int, share: HeadShare) -> Tensor:
        """A tensor for packed heads of this many tokens: [tokens, B, share.count, D]."""
        return torch.empty(tokens, self.batch, share.count, self.width, dtype=self.dtype, device=self.device)


class Exchange(Protocol):
    """One attention's exchange, from tokens to heads and back. Its methods are called in this order."""

    def send(self, qkv: QKV, stream: int, overlap: bool) -> None:
        """Begin to send a stream's heads to their ranks; ``overlap`` says that work follows before `received`."""

    def received(self) -> tuple[Tensor, Tensor, Tensor]:
        """This rank's heads of all tokens: queries [B, h, S, D], keys and values [B, g, S, D]."""

    def give_back(self, outputs: Iterable[Tensor], overlap: bool) -> None:
        """Begin to return attention's outputs for consecutive tokens, [B, h, S', D] each, to the tokens' ranks."""

    def result(self) -> Tensor:
        """The output of this rank's tokens, [B, S, H * D]. It stays valid until a later `Transport.open`."""


class Transport(Protocol):
    """What moves data within one Ulysses group. Every rank makes the same calls in the same order."""

    def open(self, deal: Deal, encoding: Literal["exact", "int8"]) -> Exchange:
        """Begin one attention's exchange."""

    def abort(self) -> None:
        """The forward has failed: no exchange is under way any more."""

    def reset(self) -> None:
        """After a failure, stop using memory that ranks may still write to or wait for.

        Every CUDA graph must be gone.
        """


class Local:
    """The transport of a rank that has all heads: alone, or in a ring, which passes keys and values on."""

    def __init__(self, in_ring: bool = False) -> None:
        self._in_ring = in_ring

    def open(self, deal: Deal, encoding: Literal["exact", "int8"]) -> Exchange:
        """See `Transport.open`. Alone, on a CPU or under autograd, it is differentiable; otherwise it packs all."""
        packed = self._in_ring or (deal.device.type == "cuda" and not torch.is_grad_enabled())
        return _Packed(deal) if packed else _Joined()

    def abort(self) -> None:
        """See `Transport.abort`."""

    def reset(self) -> None:
        """See `Transport.reset`."""


class _Alone:
    _out: Tensor

    def give_back(self, outputs: Iterable[Tensor], overlap: bool) -> None:
        """See `Exchange.give_back`."""
        (self._out,) = outputs

    def result(self) -> Tensor:
        """See `Exchange.result`."""
        return self._out.transpose(1, 2).flatten(2)


class _Packed(_Alone):
    """Streams are packed into one tensor."""

    def __init__(self, deal: Deal) -> None:
        self._deal = deal
        self._packed = deal.new_packed(sum(deal.tokens), deal.share)

    def send(self, qkv: QKV, stream: int, overlap: bool) -> None:
        """See `Exchange.send`."""
        place = self._packed.narrow(0, self._deal.begins(stream)[0], self._deal.streams[stream][0])
        qkv.pack([place], self._deal.shares)

    def received(self) -> tuple[Tensor, Tensor, Tensor]:
        """See `Exchange.received`."""
        return self._deal.share.unpack(self._packed)


class _Joined(_Alone):
    """Writes nothing in place, so that autograd works."""

    def __init__(self) -> None:
        self._streams: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def send(self, qkv: QKV, stream: int, overlap: bool) -> None:
        """See `Exchange.send`."""
        self._streams[stream] = qkv.by_heads()

    def received(self) -> tuple[Tensor, Tensor, Tensor]:
        """See `Exchange.received`."""
        streams = [self._streams[index] for index in sorted(self._streams)]
        q, k, v = (torch.cat(parts, dim=1).transpose(1, 2) for parts in zip(*streams, strict=True))
        return q, k, v

"""A Ulysses group's exchanges by collectives (NCCL, gloo), or instead through the host's memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from tacod.rank.comm.group import Group
from tacod.rank.comm.int8 import decode, encode, encoded_bytes
from tacod.rank.comm.staging import Staging
from tacod.rank.comm.transport import Deal, Exchange
from tacod.rank.ops.qkv import QKV

__all__ = ["AllToAll", "Collective"]


class AllToAll:
    """An all-to-all that, on GPUs, runs while its rank computes.

    ``sent[r]`` goes to each other rank r, ``received[r]`` comes from it; all are contiguous. A rank moves its own part
    itself. ``int8`` sends rows in 8 bits.
    """

    def __init__(
        self, group: Group, staging: Staging | None, sent: Sequence[Tensor], received: Sequence[Tensor], int8: bool
    ) -> None:
        self._group = group
        group.clock.begun += 1
        self._received = received
        self._int8 = int8
        self._work: dist.Work | Staging | None = None
        nothing = sent[0].new_empty(0, dtype=torch.uint8)
        # As bytes, because gloo doesn't know every dtype in every version of torch, and nothing is added up here.
        others = [rank != group.rank for rank in range(group.size)]
        self._away = [self._bytes(each) if other else nothing for each, other in zip(sent, others, strict=True)]
        self._coming = [self._place(each) if other else nothing for each, other in zip(received, others, strict=True)]
        if staging is not None:
            self._work = staging
            staging.exchange(self._away, self._coming)
            return
        if sent[0].is_cuda:
            self._work = dist.all_to_all(self._coming, self._away, group=group.group, async_op=True)
            return
        # gloo knows no lists.
        sizes = [len(each) for each in self._coming]
        arrived = group.all_to_all(torch.cat(self._away), [len(each) for each in self._away], sizes)
        for each, part in zip(self._coming, torch.split(arrived, sizes), strict=True):
            each.copy_(part)

    def _bytes(self, sent: Tensor) -> Tensor:
        return encode(sent) if self._int8 else sent.view(-1).view(torch.uint8)

    def _place(self, received: Tensor) -> Tensor:
        if not self._int8:
            return received.view(-1).view(torch.uint8)
        size = encoded_bytes(received.numel() // max(received.shape[-1], 1), received.shape[-1])
        return received.new_empty(size, dtype=torch.uint8)

    def wait(self) -> None:
        """Make later work on this stream see what was received; the clock counts the time that was not hidden."""
        if self._work is not None:
            with self._group.clock.counting(on_gpu=True):
                self._work.wait()
        if self._int8:
            for coming, received in zip(self._coming, self._received, strict=True):
                if len(coming):
                    decode(coming, received)


class Collective:
    """The transport by collectives; with ``staging``, through the host's memory."""

    def __init__(self, group: Group, staging: Staging | None = None) -> None:
        self.group = group
        self.staging = staging

    def open(self, deal: Deal, encoding: Literal["exact", "int8"]) -> Exchange:
        """See `Transport.open`."""
        return _CollectiveExchange(self, deal, encoding == "int8")

    def abort(self) -> None:
        """See `Transport.abort`."""

    def reset(self) -> None:
        """See `Transport.reset`."""
        if self.staging is not None:
            self.staging.discard()


class _CollectiveExchange:
    def __init__(self, transport: Collective, deal: Deal, int8: bool) -> None:
        self._transport, self._deal, self._int8 = transport, deal, int8
        self._received = deal.new_packed(sum(deal.tokens), deal.share)
        self._coming: list[AllToAll] = []

    def _exchange(self, sent: Sequence[Tensor], received: Sequence[Tensor]) -> AllToAll:
        return AllToAll(self._transport.group, self._transport.staging, sent, received, self._int8)

    def send(self, qkv: QKV, stream: int, overlap: bool) -> None:
        """See `Exchange.send`."""
        deal = self._deal
        counts = deal.streams[stream]
        arriving = [self._received.narrow(0, *each) for each in zip(deal.begins(stream), counts, strict=True)]
        places = [deal.new_packed(counts[deal.rank], share) for share in deal.shares]
        places[deal.rank] = arriving[deal.rank]
        qkv.pack(places, deal.shares)
        self._coming.append(self._exchange(places, arriving))

    def received(self) -> tuple[Tensor, Tensor, Tensor]:
        """See `Exchange.received`."""
        for exchange in self._coming:
            exchange.wait()
        return self._deal.share.unpack(self._received)

    def give_back(self, outputs: Iterable[Tensor], overlap: bool) -> None:
        """See `Exchange.give_back`."""
        deal = self._deal
        first, *more = (output.permute(2, 0, 1, 3).contiguous() for output in outputs)
        leaving = list(torch.split(torch.cat((first, *more)) if more else first, deal.tokens))
        kept = leaving[deal.rank]
        tokens, batch, _, width = kept.shape
        self._parts = [kept.new_empty(tokens, batch, len(share.queries), width) for share in deal.shares]
        self._parts[deal.rank] = kept
        self._back = self._exchange(leaving, self._parts)

    def result(self) -> Tensor:
        """See `Exchange.result`."""
        self._back.wait()
        return torch.cat(self._parts, dim=2).transpose(0, 1).flatten(2)

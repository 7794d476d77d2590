"""Sequence parallelism after DeepSpeed-Ulysses (Jacobs et al., 2023, arXiv:2309.14509), made uneven.

Each rank holds some tokens with all heads. For attention the ranks exchange them, all to all, for all tokens with
some heads, and back again afterwards. Here neither tokens nor heads need to divide by the number of ranks: chunks
differ by one at most, and the exchange carries explicit sizes. A rank without tokens or heads sends nothing, but
takes part.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tacod.plan import chunks

__all__ = ["Ulysses"]


class Ulysses:
    """The ranks that share one sequence, seen from one of them.

    ``group`` None stands for one process: no collectives, and everything here can be differentiated. Every rank of a
    group must make the same calls in the same order.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank = dist.get_rank(group) if group is not None else 0
        self.size = dist.get_world_size(group) if group is not None else 1
        self.collective_s = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def sizes(self, n: int) -> list[int]:
        """How many of ``n`` tokens or heads each rank has: n // size, and one more for the first n % size ranks."""
        return chunks(n, self.size)

    def shard(self, tokens: Tensor, dim: int = 1) -> Tensor:
        """This rank's chunk of a whole stream, as a view."""
        sizes = self.sizes(tokens.shape[dim])
        return tokens.narrow(dim, sum(sizes[: self.rank]), sizes[self.rank])

    def gather(self, tokens: Tensor, n: int, dim: int = 1) -> Tensor:
        """The whole stream of ``n`` tokens, on every rank, from the ranks' chunks: the inverse of `shard`."""
        if self.size == 1:
            return tokens
        dim %= tokens.ndim
        shapes = [(*tokens.shape[:dim], size, *tokens.shape[dim + 1 :]) for size in self.sizes(n)]
        sent = tokens.reshape(-1)
        parts = self._all_to_all(sent.repeat(self.size), [sent.numel()] * self.size, [math.prod(s) for s in shapes])
        return torch.cat([part.view(shape) for part, shape in zip(parts, shapes, strict=True)], dim)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Tensor:
        """Attention over the whole joint sequence, for this rank's tokens.

        ``q``, ``k``, ``v`` are [B, S, H, D], where S counts this rank's chunks of the streams, one after another,
        and ``lengths`` are the streams' whole token counts. Returns [B, S, H * D].

        The gathered sequence is in the order of ranks, not of streams. It needs no sorting, for attention is
        equivariant under permutations of its tokens, and each rank gets its own tokens back.
        """
        if self.size == 1:
            return _attend(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2).flatten(2)
        batch, _, heads, width = q.shape
        rank_heads = self.sizes(heads)
        rank_tokens = [sum(sizes) for sizes in zip(*map(self.sizes, lengths), strict=True)]
        my_heads, my_tokens = rank_heads[self.rank], rank_tokens[self.rank]

        # Heads come first, so that what goes to one rank lies together: [H, 3, B, S, D].
        sent = torch.stack([t.permute(2, 0, 1, 3) for t in (q, k, v)], dim=1)
        parts = self._all_to_all(
            sent.view(-1),
            [h * 3 * batch * my_tokens * width for h in rank_heads],
            [my_heads * 3 * batch * s * width for s in rank_tokens],
        )
        whole = torch.cat(
            [part.view(my_heads, 3, batch, s, width) for part, s in zip(parts, rank_tokens, strict=True)], dim=3
        )
        out = _attend(*whole.permute(1, 2, 0, 3, 4))

        # And back, tokens first: [S, B, H, D].
        sent = out.permute(2, 0, 1, 3).contiguous()
        parts = self._all_to_all(
            sent.view(-1),
            [s * batch * my_heads * width for s in rank_tokens],
            [my_tokens * batch * h * width for h in rank_heads],
        )
        mine = torch.cat(
            [part.view(my_tokens, batch, h, width) for part, h in zip(parts, rank_heads, strict=True)], dim=2
        )
        return mine.transpose(0, 1).flatten(2)

    def take_collective_s(self) -> float:
        """Seconds spent in collectives since the last call. On CUDA this waits for the last of them to end."""
        if self._events:
            self._events[-1][1].synchronize()
            self.collective_s += sum(begin.elapsed_time(end) for begin, end in self._events) / 1000
            self._events.clear()
        taken, self.collective_s = self.collective_s, 0.0
        return taken

    def _all_to_all(self, sent: Tensor, send: list[int], receive: list[int]) -> tuple[Tensor, ...]:
        """Exchange flat buffers: ``send[r]`` elements of ``sent`` go to rank r, ``receive[r]`` come from it."""
        received = sent.new_empty(sum(receive))
        width = sent.element_size()
        if sent.is_cuda:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
        started = time.perf_counter()
        # As bytes, because gloo doesn't know every dtype in every version of torch, and nothing is added up here.
        dist.all_to_all_single(
            received.view(torch.uint8),
            sent.view(torch.uint8),
            [n * width for n in receive],
            [n * width for n in send],
            group=self.group,
        )
        if sent.is_cuda:
            end.record()
            self._events.append((begin, end))
        else:
            self.collective_s += time.perf_counter() - started
        return torch.split(received, receive)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention without a mask on [B, H, S, D]."""
    return scaled_dot_product_attention(q, k, v) if q.numel() else torch.empty_like(q)

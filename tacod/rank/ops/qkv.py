"""Queries, keys and values between their projection and attention: norms, rotary embeddings, and heads for ranks.

On a GPU, one kernel (`kernels.pack`) norms and rotates them and stores them where a rank needs them; it computes in
fp32 and rounds once. Under autograd and elsewhere, PyTorch's operations do it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tacod.rank.ops.fused import has_kernels
from tacod.rank.ops.norm import rms_norm
from tacod.shares import apportion

__all__ = ["QKV", "HeadShare", "QKNorm", "Rotation", "copy_heads", "deal_heads"]


@dataclass(frozen=True)
class Rotation:
    """A rotary position embedding (Su et al., 2021, arXiv:2104.09864) of one stream's tokens.

    ``cos`` and ``sin`` are fp32 [S, R / 2], or [B, S, R / 2] where images differ, or [B or 1, S, H, R / 2] where heads
    do. They rotate the first R channels of each head; the others stay. Channels 2i and 2i + 1 form a pair, or with
    ``halves`` channels i and i + R / 2 do (as in GPT-NeoX).
    """

    cos: Tensor
    sin: Tensor
    halves: bool = False

    def apply(self, x: Tensor) -> Tensor:
        """Rotate ``x`` [B, S, H, D] in fp32; the result has its dtype."""
        cos, sin = (self.cos, self.sin) if self.by_head else (self.cos.unsqueeze(-2), self.sin.unsqueeze(-2))
        width = 2 * cos.shape[-1]
        rotated = x[..., :width].float()
        one, other = rotated.chunk(2, dim=-1) if self.halves else torch.unflatten(rotated, -1, (-1, 2)).unbind(-1)
        pair = cos * one - sin * other, sin * one + cos * other
        out = (torch.cat(pair, dim=-1) if self.halves else torch.stack(pair, dim=-1).flatten(-2)).to(x.dtype)
        return out if width == x.shape[-1] else torch.cat((out, x[..., width:]), dim=-1)

    @property
    def by_head(self) -> bool:
        """Whether each head has angles of its own."""
        return self.cos.ndim == 4

    def of_heads(self, heads: range) -> Rotation:
        """The rotation of some heads."""
        if not self.by_head:
            return self
        return Rotation(self.cos[:, :, heads.start : heads.stop], self.sin[:, :, heads.start : heads.stop], self.halves)

    def split(self, sizes: Sequence[int]) -> list[Rotation]:
        """The rotations of consecutive runs of tokens, of these sizes."""
        tokens = -3 if self.by_head else -2
        parts = zip(*(torch.split(each, list(sizes), dim=tokens) for each in (self.cos, self.sin)), strict=True)
        return [Rotation(cos, sin, self.halves) for cos, sin in parts]

    @staticmethod
    def concatenate(parts: Sequence[Rotation]) -> Rotation:
        """The rotation of streams one after the other; all form pairs alike, with as many dimensions."""
        (halves,) = {part.halves for part in parts}
        tokens = -3 if parts[0].by_head else -2
        cos, sin = (torch.cat(each, dim=tokens) for each in zip(*((part.cos, part.sin) for part in parts), strict=True))
        return Rotation(cos, sin, halves)


@dataclass(frozen=True)
class QKNorm:
    """RMS norm of queries and of keys: over each head with weights [D], or over a token's whole row, [H * D]."""

    query: Tensor
    key: Tensor
    epsilon: float = 1e-6
    """Added to the mean square."""
    across_heads: bool = False
    """Over the whole row, before ranks get their heads; ``key`` is [kv_heads * D] then."""


@dataclass(frozen=True)
class HeadShare:
    """The heads that one rank attends with: query heads, and the key and value heads that these need.

    Packed, they are [S, B, `count`, D]: queries, then keys, then values.
    """

    queries: range
    keys: range
    group: int
    """Query heads for each key head."""

    @property
    def count(self) -> int:
        """Packed heads."""
        return len(self.queries) + 2 * len(self.keys)

    def select(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Its heads of all, as views: queries [B, S, heads, D], keys and values [B, S, kv_heads, D]."""
        queries, keys = (slice(heads.start, heads.stop) for heads in (self.queries, self.keys))
        return q[:, :, queries], k[:, :, keys], v[:, :, keys]

    def unpack(self, packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views of packed heads as queries [B, h, S, D], keys and values [B, g, S, D]."""
        q, k, v = torch.split(packed, [len(self.queries), len(self.keys), len(self.keys)], dim=2)
        return q.permute(1, 2, 0, 3), k.permute(1, 2, 0, 3), v.permute(1, 2, 0, 3)

    def repeat(self, kv: Tensor) -> Tensor:
        """Keys or values [B, g, S, D] once for each query head, [B, h, S, D]; as they are if there are as many."""
        if len(self.queries) == len(self.keys):
            return kv
        owners = [query // self.group - self.keys.start for query in self.queries]
        heads = (kv[:, i : i + 1].expand(-1, owners.count(i), -1, -1) for i in range(len(self.keys)))
        return torch.cat(list(heads), dim=1)


def deal_heads(heads: int, kv_heads: int, shares: tuple[int, ...]) -> list[HeadShare]:
    """Which heads each rank attends with: whole groups, or where ranks outnumber key heads, some queries of a group.

    ``shares`` are the ranks' (`tacod.shares`). ``kv_heads`` divides ``heads``. A key head that several ranks need goes
    to each of them.
    """
    group = heads // kv_heads
    assert group * kv_heads == heads
    unit = group if kv_heads >= len(shares) else 1
    dealt, start = [], 0
    for count in apportion(heads // unit, shares):
        queries = range(start, start + count * unit)
        keys = range(start // group, (queries.stop - 1) // group + 1) if count else range(0)
        dealt.append(HeadShare(queries, keys, group))
        start = queries.stop
    return dealt


@dataclass(frozen=True)
class QKV:
    """A stream's queries, keys and values as projected, with the norm and the rotation that are still to be applied.

    ``projected`` is one tensor [B, S, (heads + 2 * kv_heads) * D], or three: [B, S, heads * D] and twice [B, S,
    kv_heads * D]. ``rotation`` is of this stream's tokens; by head only for as many ``kv_heads``. If there are fewer
    ``kv_heads``, which must divide ``heads``, attention is grouped-query (Ainslie et al., 2023, arXiv:2305.13245).
    """

    projected: Tensor | tuple[Tensor, Tensor, Tensor]
    heads: int
    norm: QKNorm | None = None
    rotation: Rotation | None = None
    kv_heads: int = 0
    """0 for as many as ``heads``."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "kv_heads", self.kv_heads or self.heads)
        assert self.rotation is None or not self.rotation.by_head or self.kv_heads == self.heads

    @property
    def first(self) -> Tensor:
        """A tensor of it: for batch, tokens, dtype and device."""
        return self.projected if isinstance(self.projected, Tensor) else self.projected[0]

    @property
    def width(self) -> int:
        """Channels of a head, D."""
        fused = isinstance(self.projected, Tensor)
        return self.first.shape[-1] // (self.heads + 2 * self.kv_heads if fused else self.heads)

    def _by_heads(self) -> tuple[Tensor, Tensor, Tensor]:
        """As [B, S, H, D] each, normed if that is over whole rows."""
        counts = [self.heads, self.kv_heads, self.kv_heads]
        if isinstance(self.projected, Tensor):
            q, k, v = torch.split(self.projected, [count * self.width for count in counts], dim=-1)
        else:
            q, k, v = self.projected
        if self.norm is not None and self.norm.across_heads:
            q = rms_norm(q, self.norm.query, self.norm.epsilon)
            k = rms_norm(k, self.norm.key, self.norm.epsilon)
        q, k, v = (torch.unflatten(each, -1, (n, -1)) for each, n in zip((q, k, v), counts, strict=True))
        return q, k, v

    def by_heads(self) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, S, heads, D], keys and values [B, S, kv_heads, D], normed and rotated; differentiable."""
        q, k, v = self._by_heads()
        if self.norm is not None and not self.norm.across_heads:
            q = rms_norm(q, self.norm.query, self.norm.epsilon)
            k = rms_norm(k, self.norm.key, self.norm.epsilon)
        if self.rotation is not None:
            q, k = self.rotation.apply(q), self.rotation.apply(k)
        return q, k, v

    def pack(self, places: Sequence[Tensor], shares: Sequence[HeadShare]) -> None:
        """Store each share of the heads in its place, [S, B, share.count, D] and contiguous."""
        if has_kernels(self.first) and self.width % 2 == 0:
            from tacod.rank.ops import kernels

            q, k, v = self._by_heads()
            norm = None if self.norm is None or self.norm.across_heads else self.norm
            norms = None if norm is None else (norm.query, norm.key)
            epsilon = 0.0 if norm is None else norm.epsilon
            halves = self.rotation is not None and self.rotation.halves
            for place, share in zip(places, shares, strict=True):
                turn = None if self.rotation is None else self.rotation.of_heads(share.queries)
                turns = None if turn is None else (turn.cos, turn.sin)
                kernels.pack(*share.select(q, k, v), norms, turns, epsilon, place, halves)
            return
        heads = self.by_heads()
        for place, share in zip(places, shares, strict=True):
            place.copy_(torch.cat(share.select(*heads), dim=2).transpose(0, 1))


def copy_heads(source: Tensor, target: Tensor) -> None:
    """Copy [S, B, h, D] into as much of another tensor's heads."""
    if has_kernels(source):
        from tacod.rank.ops import kernels

        kernels.copy(source.flatten(2).flatten(0, 1), target.flatten(2).flatten(0, 1))
        return
    target.copy_(source)

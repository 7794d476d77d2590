"""The projections around an attention, under the names that the authors' files give them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tacod.rank.ops.norm import rms_norm
from tacod.rank.ops.qkv import QKV, QKNorm, Rotation
from tacod.rank.ops.sdpa import attend_part
from tacod.rank.parallel.sequence import SequenceParallel

__all__ = [
    "CrossAttention",
    "QKNormWeights",
    "SelfAttention",
    "attend_replicated",
    "attend_sharded",
    "find",
    "register",
]


def register(module: nn.Module, name: str, value: nn.Module | nn.Parameter) -> None:
    """Put a layer or parameter into a module under a dotted name, and make the modules on the way."""
    folder, _, leaf = name.rpartition(".")
    owner = module
    for part in folder.split(".") if folder else ():
        if part not in owner._modules:
            owner.add_module(part, nn.Module())
        owner = owner.get_submodule(part)
    if isinstance(value, nn.Parameter):
        owner.register_parameter(leaf, value)
    else:
        # Not by add_module, which refuses the name of a property: a Modulation's layer may be called "linear".
        owner._modules[leaf] = value


def find(module: nn.Module, name: str) -> Any:
    """A layer or parameter of a module by its dotted name.

    `nn.Module.get_submodule` checks each step of the way, which takes the host longer than some kernels run.
    """
    *folders, leaf = name.split(".")
    owner: Any = module
    for folder in folders:
        owner = owner._modules[folder]
    return owner._modules[leaf] if leaf in owner._modules else owner._parameters[leaf]


class QKNormWeights(nn.Module):
    """The weights of the RMS norms of queries and keys: over each head's channels, or over all heads' (a row)."""

    def __init__(self, q_width: int, k_width: int, names: tuple[str, str]) -> None:
        super().__init__()
        self._names = names
        for name, width in zip(names, (q_width, k_width), strict=True):
            register(self, name, nn.Parameter(torch.ones(width)))

    @property
    def weights(self) -> tuple[Tensor, Tensor]:
        """Of queries and keys."""
        return find(self, self._names[0]), find(self, self._names[1])


class SelfAttention(nn.Module):
    """The projections of one stream to queries, keys and values, and its output layer.

    Several streams may share the attention between them.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        head_width: int | None = None,
        layers: Sequence[str] = ("qkv",),
        out: str | None = "proj",
        norm: str | None = None,
        norms: tuple[str, str] = ("q_norm.weight", "k_norm.weight"),
        bias: bool = True,
        out_bias: bool = True,
        epsilon: float = 1e-6,
    ) -> None:
        """Make the layers.

        Args:
            width: Channels of a token.
            heads: Heads of the queries.
            kv_heads: Heads of keys and values, which divide ``heads`` (grouped-query attention: Ainslie et al., 2023,
                arXiv:2305.13245); by default as many.
            head_width: Channels of a head; by default ``width // heads``.
            layers: One name if a single matrix makes all three, else three names.
            out: The name of the output layer; None if there is none.
            norm: ``"head"`` or ``"row"`` for RMS norms of queries and keys over a head or over all heads, ``"layer"``
                for layer norms over a head.
            norms: Names of these norms' weights.
            bias: Whether ``layers`` have biases.
            out_bias: Whether ``out`` has one.
            epsilon: Of the norms.
        """
        super().__init__()
        self.heads, self.kv_heads = heads, kv_heads or heads
        self.head_width = head_width or width // heads
        self._norm, self.epsilon = norm, epsilon
        self._layers, self._out, self._norms = tuple(layers), out, norms
        sizes = [count * self.head_width for count in (heads, self.kv_heads, self.kv_heads)]
        for name, size in zip(layers, sizes if len(layers) == 3 else [sum(sizes)], strict=True):
            register(self, name, nn.Linear(width, size, bias=bias))
        if out is not None:
            register(self, out, nn.Linear(sizes[0], width, bias=out_bias))
        if norm is not None:
            counts = (heads, self.kv_heads) if norm == "row" else (1, 1)
            for name, count in zip(norms, counts, strict=True):
                register(self, name, nn.Parameter(torch.ones(count * self.head_width)))
                if norm == "layer":
                    bias_name = name.removesuffix("weight") + "bias"
                    register(self, bias_name, nn.Parameter(torch.zeros(self.head_width)))

    def forward(self, x: Tensor, rotation: Rotation | None = None, epsilon: float | None = None) -> QKV:
        """Queries, keys and values of ``x`` [B, S, W]; ``epsilon`` in place of the norms' own."""
        q, *kv = (find(self, name)(x) for name in self._layers)
        projected = (q, *kv) if kv else q
        norm = None
        if self._norm == "layer":
            projected = self._layer_normed(projected)
        elif self._norm is not None:
            weights = find(self, self._norms[0]), find(self, self._norms[1])
            norm = QKNorm(*weights, self.epsilon if epsilon is None else epsilon, across_heads=self._norm == "row")
        return QKV(projected, self.heads, norm, rotation, self.kv_heads)

    def attend_whole(self, x: Tensor, rotation: Rotation | None = None, epsilon: float | None = None) -> Tensor:
        """What tokens that every rank has, [B, L, W], attend to among themselves: [B, L, H * D], without exchange."""
        q, k, v = (each.flatten(2) for each in self(x, rotation, epsilon).by_heads())
        return attend_replicated(q, k, v, self.heads)

    def _layer_normed(self, projected: Any) -> Tensor:
        """Queries, keys and values as one tensor, with layer norms of each head's queries and keys."""
        q, k, v = QKV(projected, self.heads, kv_heads=self.kv_heads).by_heads()
        normed = []
        for x, name in zip((q, k), self._norms, strict=True):
            weight, bias = find(self, name), find(self, name.removesuffix("weight") + "bias")
            normed.append(functional.layer_norm(x, x.shape[-1:], weight, bias, self.epsilon))
        return torch.cat((*normed, v), dim=2).flatten(2)

    def project(self, attended: Tensor) -> Tensor:
        """The output layer of this stream's attention, [B, S, H * D] to [B, S, W]."""
        assert self._out is not None
        out: Tensor = find(self, self._out)(attended)
        return out


class CrossAttention(nn.Module):
    """Attention of this rank's tokens to texts or images that every rank has whole: it needs no exchange."""

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        head_width: int | None = None,
        context_width: int | None = None,
        q: str = "q_linear",
        kv: Sequence[Sequence[str]] = (("kv_linear",),),
        out: str = "proj",
        norm: str | None = None,
        norms: Sequence[str] = (),
        bias: bool = True,
        epsilon: float = 1e-6,
    ) -> None:
        """Make the layers.

        Args:
            width: Channels of a token.
            heads: Attention heads.
            head_width: Channels of a head; by default ``width // heads``.
            context_width: Channels of what is attended to; by default ``width``.
            q: The name of the layer of queries.
            kv: For each context the name of one layer for keys and values, or the names of two. What is attended to in
                each context is added up (Wan: text and image).
            out: The name of the output layer.
            norm: ``"head"`` or ``"row"``, as in `SelfAttention`.
            norms: Names of the norms' weights: of the queries, then of the keys of each context.
            bias: Whether the layers have biases.
            epsilon: Of the norms.
        """
        super().__init__()
        self.heads, self._norm, self.epsilon = heads, norm, epsilon
        self._q, self._kv, self._out, self._norms = q, [tuple(each) for each in kv], out, tuple(norms)
        head_width = head_width or width // heads
        inner = heads * head_width
        register(self, q, nn.Linear(width, inner, bias=bias))
        for names in self._kv:
            for name in names:
                register(self, name, nn.Linear(context_width or width, 2 * inner // len(names), bias=bias))
        register(self, out, nn.Linear(inner, width, bias=bias))
        for name in self._norms:
            register(self, name, nn.Parameter(torch.ones(inner if norm == "row" else head_width)))

    def forward(
        self,
        x: Tensor,
        *contexts: Tensor | None,
        masks: Sequence[Tensor | None] = (),
        epsilon: float | None = None,
    ) -> Tensor:
        """What tokens ``x`` [B, S, W] attend to in ``contexts`` [B, L, context_width], projected: [B, S, W].

        An absent context is left out. ``masks`` [B, L] are boolean and say of each context's tokens which count.
        An image none of whose tokens in a context count gets zeros from it. ``epsilon`` is in place of the norms' own.
        """
        q = self.queries(x, epsilon=epsilon)
        attended: Tensor | None = None
        for number, context in enumerate(contexts):
            if context is None:
                continue
            k, v = self.keys_values(context, number, epsilon=epsilon)
            mask = masks[number] if number < len(masks) else None
            part = attend_replicated(q, k, v, self.heads, mask)
            attended = part if attended is None else attended + part
        assert attended is not None
        return self.project(attended)

    def queries(self, x: Tensor, rotation: Rotation | None = None, epsilon: float | None = None) -> Tensor:
        """Of tokens [B, S, W]: [B, S, H * D]."""
        return self._normed(find(self, self._q)(x), 0, rotation, epsilon)

    def keys_values(
        self, context: Tensor, number: int = 0, rotation: Rotation | None = None, epsilon: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """Of the context of this ``number``, [B, L, context_width]: [B, L, H * D] each.

        They may be a `DiT.prefix`, if the context doesn't change from step to step.
        """
        projected = [find(self, name)(context) for name in self._kv[number]]
        k, v = projected if len(projected) == 2 else projected[0].chunk(2, dim=-1)
        return self._normed(k, 1 + number, rotation, epsilon), v

    def project(self, attended: Tensor) -> Tensor:
        """The output layer, [B, S, H * D] to [B, S, W]."""
        out: Tensor = find(self, self._out)(attended)
        return out

    def _normed(self, x: Tensor, number: int, rotation: Rotation | None, epsilon: float | None) -> Tensor:
        if self._norm is not None:
            rows = x if self._norm == "row" else torch.unflatten(x, -1, (self.heads, -1))
            x = rms_norm(rows, find(self, self._norms[number]), self.epsilon if epsilon is None else epsilon).view(
                x.shape
            )
        return x if rotation is None else rotation.apply(torch.unflatten(x, -1, (self.heads, -1))).flatten(2)


def attend_replicated(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """Attention of queries [B, S, H * D] to keys and values [B, L, H * D] that every rank has: [B, S, H * D].

    ``mask`` [B, L] is boolean: true where a key counts.
    """
    q, k, v = (torch.unflatten(each, -1, (heads, -1)).transpose(1, 2) for each in (q, k, v))
    keys = None if mask is None else mask[:, None, None]
    return functional.scaled_dot_product_attention(q, k, v, keys).transpose(1, 2).flatten(2)


def attend_sharded(sequence: SequenceParallel, q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Attention of queries that every rank has, to keys and values that ranks share out: [B, A, H * D] on every rank.

    ``q`` is [B, A, H * D]; ``k`` and ``v`` [B, S, H * D] are this rank's. Ranks exchange what each has seen of its own
    tokens: as many numbers as there are queries, so it is for few of these.
    """
    if sequence.size == 1:
        return attend_replicated(q, k, v, heads)
    dtype = q.dtype
    q, k, v = (torch.unflatten(each, -1, (heads, -1)).transpose(1, 2) for each in (q, k, v))
    out, seen = attend_part(q, k, v)
    mine = torch.cat((out, seen.unsqueeze(-1)), dim=-1)
    parts = sequence.whole.gather(mine.unsqueeze(0), [1] * sequence.size, dim=0)
    weights = parts[..., -1:].softmax(dim=0)
    return (weights * parts[..., :-1]).sum(dim=0).to(dtype).transpose(1, 2).flatten(2)

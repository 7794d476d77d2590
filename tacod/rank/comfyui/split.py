"""Splits an image's tokens over ranks within a network of ComfyUI's, by hooks on its modules and its attention.

A `Table` says where. Between the first block and the gathering every rank has its chunk of each run of tokens; what a
block does by token needs no change, and attention is exchanged (Ulysses, arXiv:2309.14509; ring, arXiv:2310.01889).
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tacod.rank.ops.qkv import QKV
from tacod.rank.parallel.sequence import SequenceParallel

__all__ = ["Blocks", "Cut", "Misfit", "Ones", "Split", "Table"]


class Misfit(Exception):
    """A network isn't as its table says; tells how."""


@dataclass(frozen=True)
class Cut:
    """Where an argument holds tokens: those of these runs, one behind the other, along a dimension."""

    dim: int
    runs: tuple[str, ...]


class Ones(tuple[int, ...]):
    """The shape of a mask that hides nothing."""


@dataclass(frozen=True)
class Blocks:
    """A list of blocks, and what they are called with."""

    path: str
    """Where the list is in the network."""
    along: Mapping[str, Cut] = field(default_factory=dict)
    """Arguments that each block gets whole, such as rotary tables; a rank's block gets its tokens'."""
    attention: Mapping[str, tuple[str, ...] | None] = field(default_factory=dict)
    """The runs that attend together in a module, by its path in the block; all of them in modules without an entry.
    None is for cross-attention, whose keys every rank has."""


@dataclass(frozen=True)
class Table:
    """How a network's tokens are split: a few lines for a family."""

    network: str
    """The class: its module, without ``comfy.ldm.``, and its name."""
    blocks: tuple[Blocks, ...]
    """In the order in which they run, without anything between them that looks at several tokens."""
    tokens: Mapping[str, Cut]
    """The arguments of the first block that hold tokens; each rank's first block gets its chunk of each run."""
    gather: tuple[str, tuple[str, ...]]
    """The module whose result is made whole again, and the runs that it holds, one behind the other."""
    heads: Callable[[Any], int]
    """The network's attention heads."""
    width: Callable[[Any], int]
    """The network's channels of a token."""
    lengths: Callable[[Any, Mapping[str, tuple[int, ...]]], tuple[int, ...]]
    """About how many tokens there are of each run, the image's last, from the network and the arguments' shapes."""
    probe: Callable[[Any], Mapping[str, tuple[int, ...] | int]]
    """The shapes of a small forward's arguments (``x`` among them), or a number; calls with others aren't split."""
    attention_names: tuple[str, ...] = ()
    """Where the network's modules name ComfyUI's attention, if they don't hand it the options of a call: module and
    name, without ``comfy.ldm.``."""


class Split:
    """The hooks of one network and of its patched copies, which share them."""

    def __init__(self, network: nn.Module, table: Table) -> None:
        """Put hooks on a network; without `sharing` they do nothing.

        Raises `Misfit` if it lacks what the table names.
        """
        self.table = table
        self._sequence: SequenceParallel | None = None
        self._lengths: dict[str, int] = {}
        self._within: list[tuple[str, ...] | None] = []
        self._named = [_place(name) for name in table.attention_names]
        lists = [(blocks, self._list(network, blocks)) for blocks in table.blocks]
        gathering = _module(network, table.gather[0])
        for number, (blocks, modules) in enumerate(lists):
            for place, block in enumerate(modules):
                self._watch(block, blocks, table.tokens if number == place == 0 else {})
        gathering.register_forward_hook(self._gather())

    @contextmanager
    def sharing(self, sequence: SequenceParallel, options: dict[str, Any]) -> Iterator[None]:
        """A context in which calls of the network split tokens; ``options`` of such a call get the attention."""
        self._sequence, self._lengths, self._within = sequence, {}, []
        options["optimized_attention_override"] = self._attend
        replaced = [(module, name, getattr(module, name)) for module, name in self._named]
        for module, name, attention in replaced:
            setattr(module, name, self._replacement(attention))
        try:
            yield
        finally:
            for module, name, attention in replaced:
                setattr(module, name, attention)
            self._sequence = None

    # --- hooks: plain functions, so that a copy of the network shares them --------------------------------------------

    @staticmethod
    def _list(network: nn.Module, blocks: Blocks) -> Sequence[nn.Module]:
        found = _module(network, blocks.path)
        if not isinstance(found, nn.ModuleList) or not len(found):
            raise Misfit(f"{blocks.path} is no list of blocks")
        for path in blocks.attention:
            _module(found[0], path)
        return list(found)

    def _watch(self, block: nn.Module, blocks: Blocks, tokens: Mapping[str, Cut]) -> None:
        signature = inspect.signature(block.forward)
        absent = [name for name in (*tokens, *blocks.along) if name not in signature.parameters]
        if absent:
            raise Misfit(f"{blocks.path} has blocks that take no {', '.join(absent)}")

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if self._sequence is None:
                return None
            try:
                bound = signature.bind(*args, **kwargs)
            except TypeError as error:
                raise Misfit(f"a block of {blocks.path} is called otherwise: {error}") from None
            if tokens:
                self._begin(bound.arguments, tokens)
            elif not self._lengths:
                raise Misfit(f"a block of {blocks.path} runs before the first one")
            for name, cut in blocks.along.items():
                bound.arguments[name] = self._cut(bound.arguments.get(name), cut, name)
            return bound.args, bound.kwargs

        block.register_forward_pre_hook(before, with_kwargs=True)
        for path, runs in blocks.attention.items():
            self._mark(_module(block, path), runs)

    def _mark(self, module: nn.Module, runs: tuple[str, ...] | None) -> None:
        def enter(module: nn.Module, args: Any) -> None:
            self._within.append(runs)

        def leave(module: nn.Module, args: Any, out: Any) -> None:
            self._within.pop()

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)

    def _gather(self) -> Callable[[nn.Module, Any, Any], Any]:
        def gather(module: nn.Module, args: Any, out: Any) -> Any:
            if self._sequence is None:
                return None
            path, runs = self.table.gather
            if not isinstance(out, Tensor) or not self._lengths:
                raise Misfit(f"{path} comes before the blocks, or gives no tensor")
            sizes = [self._mine(run) for run in runs]
            if out.ndim < 3 or out.shape[1] != sum(sizes):
                raise Misfit(f"{path} gives {list(out.shape)}, and {sum(sizes)} tokens were expected")
            parts = zip(torch.split(out, sizes, dim=1), runs, strict=True)
            whole = [self._sequence.gather(part.contiguous(), self._lengths[run]) for part, run in parts]
            # What comes behind sees whole tokens.
            self._lengths = {}
            return whole[0] if len(whole) == 1 else torch.cat(whole, dim=1)

        return gather

    # --- tokens -------------------------------------------------------------------------------------------------------

    def _begin(self, arguments: dict[str, Any], tokens: Mapping[str, Cut]) -> None:
        for name, cut in tokens.items():
            value = arguments.get(name)
            if not isinstance(value, Tensor) or value.ndim < 3 or len(cut.runs) != 1:
                raise Misfit(f"the first block's {name} is no tensor of tokens")
            self._lengths[cut.runs[0]] = value.shape[cut.dim]
        for name, cut in tokens.items():
            arguments[name] = self._cut(arguments[name], cut, name)

    def _cut(self, value: Any, cut: Cut, name: str) -> Any:
        """This rank's tokens of a tensor, or of each in a list."""
        assert self._sequence is not None
        if value is None:
            return None
        if isinstance(value, tuple | list):
            return type(value)(self._cut(each, cut, name) for each in value)
        lengths = [self._lengths[run] for run in cut.runs]
        if not isinstance(value, Tensor) or value.ndim <= cut.dim or value.shape[cut.dim] != sum(lengths):
            shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise Misfit(f"{name} is {shape}, and {sum(lengths)} tokens were expected along {cut.dim}")
        parts = [self._sequence.shard(part, cut.dim) for part in torch.split(value, lengths, cut.dim)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, cut.dim)

    def _mine(self, *runs: str) -> int:
        """This rank's tokens of these runs."""
        assert self._sequence is not None
        places = [self._sequence.place(self._lengths[run]) for run in runs]
        return sum(end - begin for begin, end in places)

    # --- attention ----------------------------------------------------------------------------------------------------

    def _replacement(self, attention: Callable[..., Any]) -> Callable[..., Any]:
        def replaced(*args: Any, **kwargs: Any) -> Any:
            return self._attend(attention, *args, **kwargs)

        return replaced

    def _attend(
        self,
        attention: Callable[..., Any],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        heads: int,
        mask: Tensor | None = None,
        attn_precision: Any = None,
        skip_reshape: bool = False,
        skip_output_reshape: bool = False,
        **options: Any,
    ) -> Any:
        """ComfyUI's attention, over the tokens of all ranks; by its own function before and behind the blocks."""
        runs = self._within[-1] if self._within else tuple(self._lengths)
        if self._sequence is None or not self._lengths or runs is None:
            return attention(
                q,
                k,
                v,
                heads,
                mask=mask,
                attn_precision=attn_precision,
                skip_reshape=skip_reshape,
                skip_output_reshape=skip_output_reshape,
                **options,
            )
        if skip_reshape:
            q, k, v = (each.transpose(1, 2).flatten(2) for each in (q, k, v))
        width = q.shape[-1] // heads
        if not q.shape[1] == k.shape[1] == v.shape[1] == self._mine(*runs):
            raise Misfit(
                f"an attention of {q.shape[1]} tokens over {k.shape[1]}, where {self._mine(*runs)} were expected"
            )
        scale = options.get("scale")
        if k.shape[-1] % width or k.shape != v.shape or (scale is not None and not math.isclose(scale, width**-0.5)):
            raise Misfit("an attention with heads or a scale that aren't usual")
        lengths = tuple(self._lengths[run] for run in runs)
        ordered = None if mask is None else self._mask(mask, lengths)
        qkv = QKV((q.contiguous(), k.contiguous(), v.contiguous()), heads, kv_heads=k.shape[-1] // width)
        out = self._sequence.attend([lambda: qkv], [lengths], ordered).wait().clone()
        return torch.unflatten(out, -1, (heads, width)).transpose(1, 2) if skip_output_reshape else out

    def _mask(self, mask: Tensor, lengths: Sequence[int]) -> Tensor:
        """A mask over all tokens, with those of keys in the order of ranks."""
        assert self._sequence is not None
        total = sum(lengths)
        if mask.ndim == 4 and mask.shape[1] == 1:
            mask = mask.squeeze(1)
        if mask.ndim == 3 and mask.shape[1] == 1:
            mask = mask.squeeze(1)
        counts = [sum(each) for each in zip(*map(self._sequence.sizes, lengths), strict=True)]
        if mask.ndim == 2 and mask.shape[1] == counts[self._sequence.whole.rank] != total:
            # A mask that goes along, so each rank has that of its own keys.
            return self._sequence.whole.gather(mask.contiguous(), counts, 1)[:, None, None]
        if mask.shape[-1] != total or mask.ndim > 3 or (mask.ndim == 3 and mask.shape[1] != total):
            raise Misfit(f"a mask of shape {list(mask.shape)} over {total} tokens")
        return self._sequence.in_order_of_ranks(mask, lengths)


def _place(path: str) -> tuple[Any, str]:
    """The module and the name in it."""
    where, _, name = path.rpartition(".")
    module = sys.modules.get(f"comfy.ldm.{where}")
    if not callable(getattr(module, name, None)):
        raise Misfit(f"there is no {path}")
    return module, name


def _module(network: nn.Module, path: str) -> nn.Module:
    try:
        return network.get_submodule(path)
    except AttributeError:
        raise Misfit(f"it has no {path}") from None

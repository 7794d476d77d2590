"""Splits an image's tokens over ranks within a network of ComfyUI's, by hooks on its modules and its attention.

A `Table` says where. Between the first block and the gathering every rank has its chunk of each run of tokens; what a
block does by token needs no change, and attention is exchanged (Ulysses, arXiv:2309.14509; ring, arXiv:2310.01889).
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tacod.rank.comfyui.attention import attend, attend_causally, attend_near
from tacod.rank.comfyui.exchanges import Sums, exchange_edges, exchange_heads
from tacod.rank.comfyui.tables.base import Attention, Blocks, Cut, Heads, LinearAttention, Table, Window
from tacod.rank.comfyui.tokens import Misfit, Tokens
from tacod.rank.parallel.sequence import SequenceParallel

__all__ = ["Split"]

_OPTIONS = ("mask", "attn_precision", "skip_reshape", "skip_output_reshape")
"""What ComfyUI's attention takes by place behind the heads."""


class Split:
    """The hooks of one network and of its patched copies, which share them."""

    def __init__(self, network: nn.Module, table: Table) -> None:
        """Put hooks on a network; without `sharing` they do nothing.

        Raises `Misfit` if it lacks what the table names.
        """
        self.table = table
        self.unshared = ""
        """Why each rank has computed all tokens of the last forward; empty if they were shared out. A run may have
        fewer than there are ranks, or attention fewer heads that are exchanged."""
        self._masks_own_keys = table.masks_own_keys
        self._sums = Sums(lambda: self._tokens)
        self._fewest_heads: int | None = None
        """Of attentions whose heads are exchanged for tokens; None if there are none."""
        self._tokens: Tokens | None = None
        """Those of the forward that runs, until they are whole again."""
        self._whole: Tensor | None = None
        """With `Table.between`: the tensor in which a block's result is put back."""
        self._within: list[tuple[str, ...] | int | None] = []
        """What the modules that run say of their attention: its runs, a window, or that every rank has its keys."""
        self._named = [_place(name) for name in table.attention_names]
        path, runs = table.gather
        lists = [(blocks, _blocks(network, blocks)) for blocks in table.blocks]
        last = next((modules[-1] for blocks, modules in lists if blocks.path == path), None)
        for number, (blocks, modules) in enumerate(lists):
            for place, block in enumerate(modules):
                first = number == place == 0
                self._watch(block, blocks, table.tokens if first or (table.between and number == 0) else {}, first)
                if table.between and number == 0 and block is not last:
                    block.register_forward_hook(self._put_back())
        cut = next((cut for cut in table.tokens.values() if cut.runs == runs), Cut(1, runs))
        (_module(network, path) if last is None else last).register_forward_hook(self._gather(cut))

    @contextmanager
    def sharing(self, tokens: Tokens, options: dict[str, Any]) -> Iterator[None]:
        """A context in which a call of the network splits its ``tokens``; the call's ``options`` get the attention."""
        self._tokens, self._within, self.unshared = tokens, [], "it doesn't come to its blocks"
        options["optimized_attention_override"] = self._attend
        replaced = [(module, name, getattr(module, name)) for module, name in self._named]
        for module, name, attention in replaced:
            setattr(module, name, self._replacement(attention))
        try:
            yield
        finally:
            for module, name, attention in replaced:
                setattr(module, name, attention)
            self._tokens = self._whole = None

    @property
    def image(self) -> tuple[SequenceParallel, int] | None:
        """The ranks that share the image's tokens now, and how many there are; None if each rank has all of them."""
        run = None if self._tokens is None else self._tokens.runs.get("image")
        return None if run is None or self._tokens is None else (self._tokens.sequence, run.total)

    # --- hooks: plain functions, so that a copy of the network shares them --------------------------------------------

    def _watch(self, block: nn.Module, blocks: Blocks, tokens: Mapping[str, Cut], first: bool) -> None:
        crops = [cut.crop for cut in tokens.values() if cut.crop]
        counted = [name.partition(".")[0] for name in blocks.counts]
        given_attention = [blocks.causal] if blocks.causal else []
        names = (*tokens, *crops, *blocks.along, *counted, *given_attention)
        signature = _signature(block, blocks.path, names)

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            shared = self._tokens
            if shared is None:
                return None
            try:
                bound = signature.bind(*args, **kwargs)
            except TypeError as error:
                raise Misfit(f"a block of {blocks.path} is called otherwise: {error}") from None
            given = bound.arguments
            if first:
                shared.begin(given, tokens)
                self.unshared = shared.scarce or self._scarce_heads(shared.sequence)
                if self.unshared:
                    self._tokens = None
                    return None
            elif not shared.runs:
                # Before the first block tokens are whole.
                return None
            for name, cut in tokens.items():
                if self.table.between:
                    given[name] = self._whole = _own(given[name]) if first else given.get(name)
                given[name] = shared.cut(given.get(name), cut, name)
            for name, cut in blocks.along.items():
                given[name] = shared.cut(given.get(name), cut, name)
            for name, run in blocks.counts.items():
                argument, _, part = name.partition(".")
                value = given.get(argument)
                if part:
                    given[argument] = copy.copy(value)
                    setattr(given[argument], part, shared.count(getattr(value, part, None), run, name))
                else:
                    given[argument] = shared.count(value, run, name)
            for name in given_attention:
                given[name] = partial(attend_causally, shared)
            return bound.args, bound.kwargs

        block.register_forward_pre_hook(before, with_kwargs=True)
        for path, runs in blocks.attention.items():
            self._mark(_module(block, path), runs)
        for path in blocks.convolutions:
            exchange_edges(_module(block, path), lambda: self._tokens)
        for each in blocks.within:
            self._watch(_module(block, each.path), each, {}, False)

    def _scarce_heads(self, sequence: SequenceParallel) -> str:
        few = self._fewest_heads
        return "" if few is None or all(sequence.sizes(few)) else f"only {few} heads to attend"

    def _mark(self, module: nn.Module, attention: Attention) -> None:
        within: tuple[str, ...] | int | None = None
        if isinstance(attention, LinearAttention):
            self._sums.add_in(module)
        elif isinstance(attention, Heads):
            heads = exchange_heads(module, attention, lambda: self._tokens)
            self._fewest_heads = min(heads, self._fewest_heads or heads)
        elif isinstance(attention, Window):
            within = getattr(module, attention.size)
            if within is None:
                return
            if not isinstance(within, int):
                raise Misfit(f"{attention.size} is no number of tokens")
        else:
            within = attention

        def enter(module: nn.Module, args: Any) -> None:
            self._within.append(within)

        def leave(module: nn.Module, args: Any, out: Any) -> None:
            self._within.pop()

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)

    def _put_back(self) -> Callable[[nn.Module, Any, Any], Any]:
        (cut,) = self.table.tokens.values()

        def put_back(module: nn.Module, args: Any, out: Any) -> Any:
            if self._tokens is None or self._whole is None:
                return None
            mine = self._tokens.cut(self._whole, cut, "a block's result")
            if not isinstance(out, Tensor) or out.shape != mine.shape:
                raise Misfit("a block's result isn't its tokens")
            # A view, so this is where the next block finds them.
            mine.copy_(out)
            return self._whole

        return put_back

    def _gather(self, cut: Cut) -> Callable[[nn.Module, Any, Any], Any]:
        path = self.table.gather[0]

        def gather(module: nn.Module, args: Any, out: Any) -> Any:
            if self._tokens is None:
                return None
            if not self._tokens.runs:
                raise Misfit(f"{path} comes before the blocks")
            out, *others = out if isinstance(out, tuple) and out else (out,)
            whole = self._tokens.gather(out, cut, path)
            if self._whole is not None:
                whole = whole.reshape(self._whole.shape[: cut.dim + cut.dims] + whole.shape[cut.dim + cut.dims :])
            # What comes behind sees whole tokens.
            self._tokens = None
            return (whole, *others) if others else whole

        return gather

    # --- attention ----------------------------------------------------------------------------------------------------

    def _replacement(self, attention: Callable[..., Any]) -> Callable[..., Any]:
        def replaced(*args: Any, **kwargs: Any) -> Any:
            return self._attend(attention, *args, **kwargs)

        return replaced

    def _attend(
        self, attention: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **options: Any
    ) -> Any:
        """ComfyUI's attention, over the tokens of all ranks; by its own function before and behind the blocks."""
        shared = self._tokens
        within = self._within[-1] if self._within else () if shared is None else tuple(shared.runs)
        if shared is None or not shared.runs or within is None:
            return attention(q, k, v, heads, *args, **options)
        options |= dict(zip(_OPTIONS, args, strict=False))
        if isinstance(within, int):
            options.pop("mask", None)
            theirs = partial(attention, **options)
            return attend_near(shared, theirs, q, k, v, heads, within, 2 if options.get("skip_reshape") else 1)
        runs = [shared.runs[name] for name in within]
        return attend(shared, runs, self._masks_own_keys, q, k, v, heads, **options)


def _signature(block: nn.Module, path: str, names: Sequence[str]) -> inspect.Signature:
    """A block's, in which these arguments have a place of their own."""
    signature = inspect.signature(block.forward)
    parameters = dict(signature.parameters)
    others = [each.name for each in parameters.values() if each.kind is each.VAR_KEYWORD]
    absent = [name for name in dict.fromkeys(names) if name not in parameters]
    if absent and not others:
        raise Misfit(f"{path} has blocks that take no {', '.join(absent)}")
    taken = [parameters.pop(name) for name in others]
    added = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in absent]
    return signature.replace(parameters=[*parameters.values(), *added, *taken])


def _own(tokens: Tensor) -> Tensor:
    return tokens.clone(memory_format=torch.contiguous_format)


def _blocks(network: nn.Module, blocks: Blocks) -> Sequence[nn.Module]:
    """The modules of a list, or the one that isn't in a list."""
    found = _module(network, blocks.path)
    modules = list(found.children()) if isinstance(found, nn.ModuleList | nn.ModuleDict) else [found]
    if not modules:
        raise Misfit(f"{blocks.path} is an empty list of blocks")
    for path in blocks.attention:
        _module(modules[0], path)
    return modules


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

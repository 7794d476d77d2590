"""What ranks exchange in modules whose code offers no hook: sums over tokens, the edges of chunks, heads for tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tacod.rank.comfyui.tables.base import Heads
from tacod.rank.comfyui.tokens import Misfit, Tokens
from tacod.rank.parallel.sequence import SequenceParallel

__all__ = ["Sums", "exchange_edges", "exchange_heads", "to_heads", "to_tokens"]

Shared = Callable[[], Tokens | None]
"""The tokens that are shared out now; None where they are whole."""
_PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm)


class Sums(TorchFunctionMode):
    """Adds up over ranks what linear attention (Katharopoulos et al., 2020, arXiv:2006.16236) sums over tokens.

    It sums keys × values in one matrix product, the first one in its module. The rest is by token. In each module of
    `add_in` this mode is on, and the first product there, a rank's part of the sum, becomes the whole.
    """

    def __init__(self, shared: Shared) -> None:
        super().__init__()
        self._shared = shared
        self._is_on = self._awaited = False

    def add_in(self, module: nn.Module) -> None:
        """Take part in a module of linear attention; a forward raises `Misfit` if it sums no tokens."""

        def enter(module: nn.Module, args: Any) -> None:
            if self._shared() is not None and not self._is_on:
                self._is_on = self._awaited = True
                self.__enter__()  # type: ignore[no-untyped-call]

        def leave(module: nn.Module, args: Any, out: Any) -> None:
            if not self._is_on:
                return
            self._is_on = False
            self.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            # After an error there is no result, and nothing more to say.
            if self._awaited and out is not None:
                raise Misfit("a linear attention without a matrix product")

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave, always_call=True)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one of torch's functions, and add up what it gives if that is a sum."""
        out = func(*args, **(kwargs or {}))
        shared = self._shared() if self._awaited and func in _PRODUCTS else None
        if shared is None:
            return out
        self._awaited = False
        mine = shared.mine(shared.runs.values())
        if len(args) != 2 or args[0].shape[-1] != mine or args[1].shape[-2] != mine:
            raise Misfit(f"a linear attention whose first matrix product isn't over its {mine} tokens")
        shared.meet()
        return shared.sequence.whole.sum(out.float()).to(out.dtype)


def exchange_edges(convolution: nn.Module, shared: Shared) -> None:
    """Have a convolution over [B, C, S] see the tokens beside a rank's chunk.

    Raises `Misfit` unless it is a `Conv1d` that gives as many tokens as it gets.
    """
    if not isinstance(convolution, nn.Conv1d):
        raise Misfit(f"a {type(convolution).__name__} where a Conv1d was expected")
    reach = convolution.dilation[0] * (convolution.kernel_size[0] - 1) // 2
    same = convolution.kernel_size[0] % 2 and convolution.stride == (1,) and convolution.padding == (reach,)
    if not same or convolution.padding_mode != "zeros":
        raise Misfit("a convolution that gives fewer or more tokens than it gets")
    before: list[int] = []

    def enter(module: nn.Module, args: tuple[Any, ...]) -> Any:
        if (tokens := shared()) is None:
            return None
        x, *others = args
        wider, left = tokens.with_edges(x, x.ndim - 1, reach)
        before[:] = [left]
        return (wider, *others)

    def leave(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Any:
        if (tokens := shared()) is None:
            return None
        return out.narrow(-1, before.pop(), tokens.mine(tokens.runs.values()))

    convolution.register_forward_pre_hook(enter)
    convolution.register_forward_hook(leave)


def exchange_heads(module: nn.Module, how: Heads, shared: Shared) -> int:
    """Have a module attend with some heads for all tokens, between two modules within it; returns its heads.

    Raises `Misfit` if the module isn't as the table says.
    """
    heads = getattr(module, how.count, None)
    if not isinstance(heads, int):
        raise Misfit(f"{how.count} is no number of heads")
    try:
        begin, end = module.get_submodule(how.begin), module.get_submodule(how.end)
    except AttributeError as error:
        raise Misfit(f"an attention is otherwise: {error}") from None

    def enter(module: nn.Module, args: Any) -> None:
        if (tokens := shared()) is not None:
            sequence = tokens.sequence
            setattr(module, how.count, sequence.sizes(heads)[sequence.whole.rank])

    def leave(module: nn.Module, args: Any, out: Any) -> None:
        setattr(module, how.count, heads)

    def give_tokens(module: nn.Module, args: Any, out: Any) -> Any:
        if (tokens := shared()) is None:
            return None
        mine, *whole = out if isinstance(out, tuple) else (out,)
        total, sequence = _packed(tokens, mine, how.parts * heads), tokens.sequence
        tokens.meet()
        everyones = to_heads(sequence, mine, total, how.parts, heads)
        texts = [_chosen(sequence, each, how.parts, heads) for each in whole]
        return (everyones, *texts) if texts else everyones

    def take_tokens(module: nn.Module, args: tuple[Any, ...]) -> Any:
        if (tokens := shared()) is None:
            return None
        sequence = tokens.sequence
        sizes = sequence.sizes(heads)
        mine, *whole = args
        total, here = sum(run.total for run in tokens.runs.values()), sizes[sequence.whole.rank]
        if not isinstance(mine, Tensor) or mine.ndim != 2 or len(mine) != total or mine.shape[1] % here:
            raise Misfit(f"{how.end} gets no {total} tokens of {here} heads")
        tokens.meet()
        width = mine.shape[1] // here
        texts = [sequence.whole.gather(each.contiguous(), [width * size for size in sizes], 1) for each in whole]
        return (to_tokens(sequence, mine, heads), *texts)

    module.register_forward_pre_hook(enter)
    # Its number of heads is whole again even if it fails.
    module.register_forward_hook(leave, always_call=True)
    begin.register_forward_hook(give_tokens)
    end.register_forward_pre_hook(take_tokens)
    return heads


def to_heads(sequence: SequenceParallel, tokens: Tensor, total: int, parts: int, heads: int) -> Tensor:
    """Of all tokens this rank's heads, [N, P * h * D], from this rank's tokens with all heads, [n, P * H * D].

    Each token has ``parts`` tensors of so many heads side by side. This is Ulysses' exchange (arXiv:2309.14509).
    """
    sizes, counts = sequence.sizes(heads), sequence.sizes(total)
    dealt = torch.split(torch.unflatten(tokens, -1, (parts, heads, -1)), list(sizes), dim=-2)
    wide = dealt[sequence.whole.rank][0].numel() if len(tokens) else 0
    sent = torch.cat([each.reshape(-1) for each in dealt])
    received = _all_to_all(sequence, sent, [each.numel() for each in dealt], [count * wide for count in counts])
    return received.view(total, wide)


def to_tokens(sequence: SequenceParallel, tokens: Tensor, heads: int) -> Tensor:
    """This rank's tokens with all heads, [n, H * D], from all tokens with this rank's heads, [N, h * D]."""
    sizes, counts = sequence.sizes(heads), sequence.sizes(len(tokens))
    me = sequence.whole.rank
    width = tokens.shape[-1] // sizes[me]
    sent = [count * tokens.shape[-1] for count in counts]
    arriving = [counts[me] * size * width for size in sizes]
    received = _all_to_all(sequence, tokens.reshape(-1), sent, arriving)
    pieces = zip(torch.split(received, arriving), sizes, strict=True)
    return torch.cat([piece.view(counts[me], size * width) for piece, size in pieces], dim=-1)


def _all_to_all(sequence: SequenceParallel, sent: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
    return sent if sequence.size == 1 else sequence.whole.all_to_all(sent, send, receive)


def _packed(tokens: Tokens, mine: Any, width: int) -> int:
    """How many tokens there are in all, of which ``mine`` [n, C] are this rank's."""
    runs = list(tokens.runs.values())
    if not isinstance(mine, Tensor) or mine.ndim != 2 or mine.shape[0] != tokens.mine(runs) or mine.shape[1] % width:
        shape = list(mine.shape) if isinstance(mine, Tensor) else type(mine).__name__
        raise Misfit(f"heads of {shape}, where {tokens.mine(runs)} tokens of {width} heads were expected")
    return sum(run.total for run in runs)


def _chosen(sequence: SequenceParallel, tokens: Tensor, parts: int, heads: int) -> Tensor:
    """This rank's heads of tokens that each rank has, [n, P * h * D] of [n, P * H * D]."""
    begin, end = sequence.place(heads)
    mine: Tensor = torch.unflatten(tokens, -1, (parts, heads, -1))[:, :, begin:end]
    return mine.flatten(1)

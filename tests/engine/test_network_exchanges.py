"""What ranks exchange in modules of ComfyUI's that look at several tokens, but by no attention of its own."""

from __future__ import annotations

from typing import Any

import made_up_exchanges
import pytest
import torch
from helpers import FP32
from made_up_exchanges import HEADS, WIDTH, Sums
from rank_worker import Ranks
from test_network_tables import OneOf
from torch import nn
from torch.overrides import _get_current_function_mode_stack

from tacod.rank.comfyui.exchanges import exchange_edges, exchange_heads
from tacod.rank.comfyui.split import Split
from tacod.rank.comfyui.tables.base import Heads
from tacod.rank.comfyui.tokens import Misfit, Tokens
from tacod.rank.parallel.sequence import SequenceParallel

LAYOUTS = [(1, 2, 1), (1, 1, 3), (1, 2, 2), (1, 5, 1), (1, 3, 1, (0, 3, 1, 2, 0))]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("sums", [23]),
        # Chunks are shorter than what the convolution sees of their neighbours.
        ("sums", [11, 5, 3]),
        ("windows", [23]),
        ("windows", [11, 4, 17]),
        ("causal", [9, 23]),
        ("causal", [23, 6]),
    ],
)
def test_shared_tokens_give_what_whole_ones_give(
    ranks: Ranks, kind: str, arguments: list[int], layout: tuple[Any, ...]
) -> None:
    found = ranks.run(layout, "exchanged", kind=kind, arguments=arguments)
    assert len(found) == layout[1] * layout[2]
    assert [(error <= FP32, split, heads) for error, split, heads in found] == [(True, True, HEADS)] * len(found)


def test_with_fewer_heads_than_ranks_each_rank_computes_all(ranks: Ranks) -> None:
    """Heads can't be dealt; a forward is right all the same."""
    # Of six heads over ranks of these shares one gets none.
    found = ranks.run((1, 2, 1, (99, 1, 0, 0, 0)), "exchanged", kind="windows", arguments=[230])
    assert found == [[0.0, False, HEADS]] * 2


def test_an_error_within_leaves_the_number_of_heads() -> None:
    network, table, (video, text), others = made_up_exchanges.windows(23)
    split, attention = Split(network, table), network.blocks[0].attn
    seen = []
    attention.proj_in.register_forward_pre_hook(lambda module, args: seen.append(attention.heads))
    with split.sharing(Tokens(OneOf(0, 2)), {}), pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        network(video, text[:, 1:], **others)
    assert seen == [HEADS // 2]
    assert attention.heads == HEADS


# --- modules that aren't as a table says ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(WIDTH, WIDTH),
        nn.Conv1d(WIDTH, WIDTH, 3),
        nn.Conv1d(WIDTH, WIDTH, 4, padding=2),
        nn.Conv1d(WIDTH, WIDTH, 3, padding=1, stride=2),
        nn.Conv1d(WIDTH, WIDTH, 3, padding=1, padding_mode="circular"),
        nn.Conv1d(WIDTH, WIDTH, 3, padding=1, dilation=2),
    ],
    ids=["a linear layer", "no padding", "an even kernel", "a stride", "a ring", "a dilation"],
)
def test_convolutions_that_do_not_fit(layer: nn.Module) -> None:
    with pytest.raises(Misfit, match=r"a convolution that gives|where a Conv1d was expected"):
        exchange_edges(layer, lambda: None)


@pytest.mark.parametrize(
    "how", [Heads("proj_in", "gone", "heads"), Heads("gone", "proj_out", "heads"), Heads("proj_in", "proj_out", "gone")]
)
def test_attention_that_does_not_fit(how: Heads) -> None:
    with pytest.raises(Misfit, match="gone"):
        exchange_heads(made_up_exchanges.Windows(), how, lambda: None)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"mask": torch.zeros(1, 32)}, "with a mask"),
        ({"is_causal": True}, "with is_causal"),
        ({"enable_gqa": False}, "an attention of 6 heads of 2, with 6 channels of keys"),
    ],
)
def test_causal_attention_that_does_not_fit(changed: dict[str, Any], words: str) -> None:
    network, table, tokens, others = made_up_exchanges.causal(9, 23)
    split, given = Split(network, table), Tokens(SequenceParallel(), leading=9)
    block = network.blocks[0]
    plain = block.forward
    block.forward = lambda x, attend: plain(x, lambda *args, **options: attend(*args, **{**options, **changed}))
    with split.sharing(given, {}), pytest.raises(Misfit, match=words):
        network(*tokens, **others)


class Otherwise(Sums):
    """Linear attention that sums something else first, or nothing."""

    def __init__(self, product: bool) -> None:
        super().__init__()
        self.product = product

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.qkv.weight[:WIDTH] if self.product else x + 1


@pytest.mark.parametrize(
    ("product", "words"), [(True, "isn't over its 23 tokens"), (False, "without a matrix product")]
)
def test_linear_attention_that_does_not_fit(product: bool, words: str) -> None:
    network, table, tokens, _ = made_up_exchanges.sums(23)
    network.blocks[1].attn = Otherwise(product)
    split = Split(network, table)
    with pytest.raises(Misfit, match=words), split.sharing(Tokens(SequenceParallel()), {}):
        network(*tokens)
    # Nothing is left of it for the next forward.
    network.blocks[1].attn = Sums()
    with split.sharing(Tokens(SequenceParallel()), {}):
        network(*tokens)
    assert not split.unshared


def test_an_error_in_linear_attention_leaves_nothing_on() -> None:
    network, table, tokens, _ = made_up_exchanges.sums(23)
    split = Split(network, table)
    with split.sharing(Tokens(SequenceParallel()), {}), pytest.raises(RuntimeError, match="shapes cannot be"):
        network(tokens[0][..., 1:])
    assert _get_current_function_mode_stack() == []
    expected = network(*tokens)
    with split.sharing(Tokens(SequenceParallel()), {}):
        assert torch.equal(network(*tokens), expected)

"""Every layout over gloo: any number of ranks, heads, tokens and images equals one process.

test_conformance.py has the forwards of every family, this file attention, collectives and ComfyUI's goldens.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers import golden_names, read_golden
from hypothesis import given, settings
from hypothesis import strategies as st
from rank_worker import LAYOUTS, WORLD, Ranks, projected
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tacod.plan import chunks
from tacod.rank.comm.clock import Clock
from tacod.rank.comm.group import Group
from tacod.rank.comm.peers import Peer
from tacod.rank.comm.transport import Deal, Exchange
from tacod.rank.ops.qkv import QKV, deal_heads
from tacod.rank.parallel.sequence import SequenceParallel

SEQUENCES = [layout for layout in LAYOUTS if layout[0] == 1 and layout != (1, 1, 1)]


KINDS = [
    # Three ranks always by both ways, then two, four and five: Ulysses, ring, both, and batch groups.
    ((1, 3, 1), "exchanged"),
    ((1, 3, 1), "shared"),
    ((1, 1, 3), "exchanged"),
    ((2, 1, 1), "exchanged"),
    ((2, 2, 1), "shared"),
    ((1, 2, 2), "shared"),
    ((1, 5, 1), "exchanged"),
]


@functools.cache
def batch_of(name: str) -> int:
    return read_golden(name).batch


@pytest.mark.parametrize(("layout", "how"), KINDS, ids=str)
@pytest.mark.parametrize("name", golden_names())
def test_equals_comfyui_on_several_ranks(ranks: Ranks, name: str, layout: tuple[int, ...], how: str) -> None:
    """Exchanged by collectives, or written into each other's memory; test_conformance.py has every layout.

    A golden of one image has two ranks where others have batch groups: in a ring, and with Ulysses.
    """
    if batch_of(name) == 1 and layout[0] > 1:
        layout = (1, layout[1], 2) if layout[1] == 1 else (1, *layout[1:])
    errors = ranks.run(layout, "golden", name=name, sharing=how == "shared")
    assert len(errors) == WORLD, "an idle rank gets the output too"
    assert max(errors) <= 2e-6, f"{name} in layout {layout}, {how}"


def test_no_forward_needs_pytorchs_compiler(ranks: Ranks) -> None:
    """Its import takes seconds; an operation on the meta device is enough for it."""
    for name in ("ltx25_av", "wan_animate"):
        ranks.run((1, 3, 1), "golden", name=name)
    assert ranks.run((1, 1, 1), "imported", module="torch._dynamo") == [False] * WORLD


class OneMemory:
    """A block of two ranks in one process, in which nothing travels."""

    def __init__(self, size: int) -> None:
        self._memory = torch.zeros(2, size, dtype=torch.uint8)

    def view(self, rank: int, shape: Sequence[int], dtype: torch.dtype, start: int) -> Tensor:
        size = torch.Size(shape).numel() * dtype.itemsize
        return self._memory[rank, start : start + size].view(dtype).view(list(shape))

    def send(self, source: Tensor, target: Tensor) -> None:
        target.copy_(source)

    def barrier(self, clock: Clock) -> None:
        pass


def test_what_returned_stays_while_the_next_attentions_heads_arrive() -> None:
    """A slower rank still reads it; the next one may be larger, as a text's is that is refined before the image."""
    peer = Peer(Group(), OneMemory)

    def begin(tokens: int) -> Exchange:
        deal = Deal(0, [[tokens] * 2], deal_heads(2, 2, 2), 1, 16, torch.float32, torch.device("cpu"))
        return peer.open(deal, "exact")

    begin(64).result()
    returned = begin(2).result().fill_(1.0)
    begin(64).send(QKV(torch.full((1, 64, 96), 7.0), 2), 0, overlap=False)
    assert (returned == 1).all()


def test_ranks_measure_the_same_rates(ranks: Ranks) -> None:
    measured = ranks.run((1, 1, 1), "warm_up")
    assert len(measured) == WORLD
    assert all(rates == measured[0] for rates in measured)
    assert all(number > 0 for number in measured[0])


def test_a_forward_that_has_no_room_on_one_rank_is_warmed_up_on_all(ranks: Ranks) -> None:
    """And no rank waits for the one that lacks it."""
    assert ranks.run((1, WORLD, 1), "warm_up", fits=False) == [[]] * WORLD


@pytest.mark.parametrize("layout", [(1, 3, 1), (1, 2, 2)], ids=str)
@pytest.mark.parametrize("name", ["flux_dev_odd", "sd35_medium"])
def test_what_is_exchanged_in_8_bits_loses_little(ranks: Ranks, name: str, layout: tuple[int, ...]) -> None:
    errors = ranks.run(layout, "golden", name=name, exchange="int8")
    assert 2e-6 < max(errors) <= 1e-2


@pytest.mark.parametrize("layout", [(1, 3, 1), (1, 1, 3), (1, 2, 2), (2, 2, 1)], ids=str)
@pytest.mark.parametrize("name", ["flux_dev_odd", "sd35_medium"])
def test_bf16_loses_nothing_to_the_exchange(ranks: Ranks, name: str, layout: tuple[int, ...]) -> None:
    alone = read_golden(name).error(SequenceParallel(), torch.bfloat16)
    assert max(ranks.run(layout, "golden", name=name, dtype="bfloat16")) <= 1.1 * alone


@settings(max_examples=80, deadline=None)
@given(
    layout=st.sampled_from(SEQUENCES),
    heads=st.integers(1, 9),
    batch=st.integers(1, 3),
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=3).filter(sum),
    seed=st.integers(0, 99),
)
def test_attention_equals_one_process(ranks: Ranks, layout: tuple[int, ...], **case: Any) -> None:
    assert max(ranks.run(layout, "attention", **case)) <= 2e-6


@pytest.mark.parametrize(("overlap", "expected"), [(False, [1, 2]), (True, [3, 3])])
def test_what_more_is_computed_beside_is_sent(ranks: Ranks, overlap: bool, expected: list[int]) -> None:
    """And the last result stored, unless something else follows; each rank has 10 of 20 tokens, in three results."""
    case = {"heads": 4, "batch": 1, "lengths": [20], "cuts": [5, 15], "seed": 0}
    assert ranks.run((1, 2, 1), "sent", overlap=overlap, **case) == expected


@settings(max_examples=60, deadline=None)
@given(
    layout=st.sampled_from([layout for layout in SEQUENCES if layout[1] > 1]),
    heads=st.integers(1, 9),
    batch=st.integers(1, 2),
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=2).filter(sum),
    cuts=st.lists(st.integers(1, 79), max_size=3),
    sharing=st.booleans(),
    overlap=st.booleans(),
    seed=st.integers(0, 99),
)
def test_results_that_come_one_after_the_other_find_their_ranks(
    ranks: Ranks, layout: tuple[int, ...], **case: Any
) -> None:
    """As from `attend_pieces`, and of any runs of tokens: stored into the ranks' memory, or exchanged."""
    assert max(ranks.run(layout, "attention", **case)) <= 2e-6


@settings(max_examples=150, deadline=None)
@given(
    layout=st.sampled_from([(1, 1, 1), *SEQUENCES]),
    groups=st.tuples(st.integers(1, 6), st.integers(1, 4)),
    batch=st.integers(1, 3),
    lengths=st.lists(st.integers(0, 20), min_size=1, max_size=3).filter(sum),
    norm=st.sampled_from(["", "head", "row"]),
    turn=st.sampled_from(["", "pairs", "halves"]),
    rotary=st.sampled_from([6, 16]),
    by_image=st.booleans(),
    separate=st.booleans(),
    keys=st.sampled_from(["all", "some", "shared"]),
    sharing=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_heads_norms_rotations_and_key_masks(
    ranks: Ranks, layout: tuple[int, ...], groups: tuple[int, int], **case: Any
) -> None:
    """Also more ranks than key heads, whose groups then are split, and key masks that hide all of a rank's tokens."""
    kv_heads, group = groups
    assert max(ranks.run(layout, "variant", heads=kv_heads * group, kv_heads=kv_heads, **case)) <= 2e-6


@pytest.mark.parametrize("layout", SEQUENCES, ids=str)
@pytest.mark.parametrize(("heads", "lengths"), [(3, [2]), (1, [1, 1]), (2, [0, 3]), (24, [512, 99])])
def test_ranks_without_tokens_or_heads_take_part(
    ranks: Ranks, layout: tuple[int, ...], heads: int, lengths: list[int]
) -> None:
    assert max(ranks.run(layout, "attention", heads=heads, batch=2, lengths=lengths, seed=1)) <= 2e-6


@pytest.mark.parametrize("layout", [(1, 2, 1), (1, 1, 3), (1, 2, 2), (1, 5, 1)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int64"])
@pytest.mark.parametrize(("shape", "dim"), [((2, 7, 5), 1), ((1, 2, 3), 1), ((9, 4), 0), ((2, 3, 11), -1)])
@pytest.mark.parametrize("lists", [False, True], ids=["as gloo", "as NCCL"])
def test_gather_undoes_shard(
    ranks: Ranks, layout: tuple[int, ...], dtype: str, shape: tuple[int, ...], dim: int, lists: bool
) -> None:
    answers = ranks.run(layout, "gather", dtype=dtype, shape=shape, dim=dim, lists=lists)
    assert answers == [True] * (layout[1] * layout[2])


@pytest.mark.parametrize("layout", [(1, 3, 1), (1, 1, 3)], ids=str)
def test_time_in_collectives_is_told_once(ranks: Ranks, layout: tuple[int, ...]) -> None:
    for taken, wall, again in ranks.run(layout, "timing"):
        assert 0 < taken < wall
        assert again == 0


@given(kv_heads=st.integers(1, 12), group=st.integers(1, 6), ranks=st.integers(1, 16))
def test_each_query_head_has_one_rank_and_its_key_head_there(kv_heads: int, group: int, ranks: int) -> None:
    shares = deal_heads(kv_heads * group, kv_heads, ranks)
    assert [head for share in shares for head in share.queries] == list(range(kv_heads * group))
    for share in shares:
        assert set(share.keys) == {head // group for head in share.queries}, "those that it needs, and no other"
    if kv_heads >= ranks:
        assert sum(len(share.keys) for share in shares) == kv_heads, "whole groups: no key head is sent twice"


@given(n=st.integers(0, 10_000), size=st.integers(1, 64))
def test_chunks_differ_by_one_at_most(n: int, size: int) -> None:
    sizes = chunks(n, size)
    assert sum(sizes) == n
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) - min(sizes) <= 1


def test_one_process_needs_no_group() -> None:
    alone = SequenceParallel()
    assert (alone.size, alone.sizes(7)) == (1, [7])
    q, k, v = torch.randn(3, 2, 7, 3, 8)
    expected = scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    assert torch.equal(alone.attend([projected(q, k, v)], (3, 4)).wait(), expected.transpose(1, 2).reshape(2, 7, 24))
    assert torch.equal(alone.gather(alone.shard(q), 7), q)

"""Every layout over gloo: any number of ranks, heads, tokens and images equals one process.

test_conformance.py has the forwards of every family, this file attention, collectives and ComfyUI's goldens.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers import golden_names, read_golden
from hypothesis import given, settings
from hypothesis import strategies as st
from rank_worker import LAYOUTS, UNEQUAL, WORLD, Ranks, projected, unequal
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tacod.rank.comm.clock import Clock
from tacod.rank.comm.group import Group
from tacod.rank.comm.peers import Peer
from tacod.rank.comm.transport import Deal, Exchange
from tacod.rank.ops.qkv import QKV, deal_heads
from tacod.rank.parallel.sequence import SequenceParallel

SEQUENCES = [layout for layout in LAYOUTS if layout[0] == 1 and layout != (1, 1, 1)]
SPREADS = st.one_of(st.sampled_from(SEQUENCES), unequal(SEQUENCES))
"""The same, half of them with any shares."""


KINDS = {
    # Each golden in a layout of each kind, by one of these in turn.
    "Ulysses": [((1, 3, 1), "exchanged"), ((1, 3, 1), "shared"), ((1, 5, 1), "exchanged"), ((1, 2, 1), "shared")],
    "ring": [((1, 1, 3), "exchanged"), ((1, 1, 3), "shared")],
    "both": [((1, 2, 2), "shared"), ((1, 2, 2), "exchanged")],
    "batch": [((2, 1, 1), "exchanged"), ((2, 2, 1), "shared")],
}
"""Layouts by their kinds, and whether ranks exchange by collectives or write into each other's memory."""


@functools.cache
def batch_of(name: str) -> int:
    return read_golden(name).batch


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "number"), [(name, number) for number, name in enumerate(golden_names())], ids=str)
def test_equals_comfyui_on_several_ranks(ranks: Ranks, name: str, number: int, kind: str) -> None:
    """On two, three, four or five; test_conformance.py has every family in every layout.

    A golden of one image has two ranks where others have batch groups: in a ring, and with Ulysses.
    """
    layout, how = KINDS[kind][number % len(KINDS[kind])]
    if batch_of(name) == 1 and layout[0] > 1:
        layout = (1, layout[1], 2) if layout[1] == 1 else (1, *layout[1:])
    errors = ranks.run(layout, "golden", name=name, sharing=how == "shared")
    assert len(errors) == WORLD, "an idle rank gets the output too"
    assert max(errors) <= 2e-6, f"{name} in layout {layout}, {how}"


@pytest.mark.parametrize(("name", "number"), [(name, number) for number, name in enumerate(golden_names())], ids=str)
def test_equals_comfyui_at_unequal_shares(ranks: Ranks, name: str, number: int) -> None:
    """Each golden in one layout after the other; test_conformance.py has every family and all layouts."""
    check_unequal(ranks, name, UNEQUAL[number % len(UNEQUAL)], sharing=number % 2 == 0)


@pytest.mark.parametrize("layout", UNEQUAL, ids=str)
@pytest.mark.parametrize("name", ["flux_dev_odd", "minimax_h3_mixed", "wan_vace", "z_image"])
def test_equals_comfyui_in_every_unequal_layout(ranks: Ranks, name: str, layout: tuple[Any, ...]) -> None:
    check_unequal(ranks, name, layout)


def check_unequal(ranks: Ranks, name: str, layout: tuple[Any, ...], sharing: bool = False) -> None:
    """A golden of one image has a ring of as many ranks where others have batch groups."""
    if batch_of(name) < layout[0]:
        layout = (1, layout[1], layout[0] * layout[2], layout[3])
    errors = ranks.run(layout, "golden", name=name, sharing=sharing)
    assert len(errors) == WORLD, "an idle rank gets the output too"
    assert max(errors) <= 2e-6, f"{name} in layout {layout}"


FORWARDS_ALONE = """
import sys, torch
from helpers import read_golden
from tacod.rank.parallel.sequence import SequenceParallel
with torch.inference_mode():
    for golden in map(read_golden, ("ltx25_av", "wan_animate")):
        model = golden.model()
        model.run(SequenceParallel(), model.prepare(golden.arguments(model)))
print("torch._dynamo" in sys.modules)
from tacod.rank.comfyui.contents import Contents
split = Contents(lambda state: dict(zip("ab", state["ab"].chunk(2))), {"ab": torch.empty(4, device="meta")}, None, {})
print(len(split.empty), "torch._dynamo" in sys.modules)
"""


def test_no_forward_and_no_load_needs_pytorchs_compiler() -> None:
    """Its import takes seconds; an operation on the meta device is enough for it. Other tests may import it."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", FORWARDS_ALONE]
    told = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert told.stdout == "False\n2 False\n", told.stderr


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
        deal = Deal(0, [[tokens] * 2], deal_heads(2, 2, (1, 1)), 1, 16, torch.float32, torch.device("cpu"))
        return peer.open(deal, "exact")

    begin(64).result()
    returned = begin(2).result().fill_(1.0)
    begin(64).send(QKV(torch.full((1, 64, 96), 7.0), 2), 0, overlap=False)
    assert (returned == 1).all()


@pytest.mark.parametrize(
    ("alone", "shares"),
    [
        ([0.1] * WORLD, []),
        ([0.1, 0.104, 0.101, 0.1, 0.103], []),
        ([0.1, 0.16, 0.16, 0.16, 0.16], [8, 5, 5, 5, 5]),
        ([0.3, 0.1, 0.3, 0.1, 0.3], [1, 3, 1, 3, 1]),
    ],
)
def test_ranks_measure_the_same_rates_and_shares(ranks: Ranks, alone: list[float], shares: list[int]) -> None:
    """Each measures itself, and all divide by what all have measured; a few percent are no difference."""
    measured = ranks.run((1, 1, 1), "warm_up", alone=alone)
    assert len(measured) == WORLD
    assert all(each == measured[0] for each in measured)
    rates, told = measured[0]
    assert all(number > 0 for number in rates)
    assert told == shares


def test_shares_that_were_asked_for_are_not_measured(ranks: Ranks) -> None:
    alone = [0.1, 0.2, 0.3, 0.4, 0.5]
    for asked, shares in (([2, 1, 1, 1, 1], [2, 1, 1, 1, 1]), ([3] * WORLD, [])):
        told = ranks.run((1, 1, 1), "warm_up", alone=alone, asked=asked)
        assert all(each[1] == shares for each in told)


def test_a_slow_rank_gets_less(ranks: Ranks) -> None:
    """Measured for real; how many times less depends on what else these cores do."""
    told = ranks.run((1, 1, 1), "pace", slow=2)
    assert all(each == told[0] for each in told)
    assert told[0][2] == min(told[0]) < max(told[0])


@pytest.mark.parametrize("lacks", [0, 3])
def test_a_forward_that_has_no_room_on_one_rank_is_warmed_up_on_all(ranks: Ranks, lacks: int) -> None:
    """And no rank waits for the one that lacks it."""
    alone = [None if rank == lacks else 0.1 + rank for rank in range(WORLD)]
    assert ranks.run((1, WORLD, 1), "warm_up", alone=alone) == [[None, []]] * WORLD


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
    layout=SPREADS,
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
    layout=SPREADS.filter(lambda layout: layout[1] > 1),
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
    layout=st.one_of(st.just((1, 1, 1)), SPREADS),
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


@given(
    kv_heads=st.integers(1, 12),
    group=st.integers(1, 6),
    shares=st.one_of(
        st.integers(1, 16).map(lambda ranks: (1,) * ranks),
        st.lists(st.integers(1, 20), min_size=1, max_size=8).map(tuple),
    ),
)
def test_each_query_head_has_one_rank_and_its_key_head_there(
    kv_heads: int, group: int, shares: tuple[int, ...]
) -> None:
    dealt = deal_heads(kv_heads * group, kv_heads, shares)
    assert [head for each in dealt for head in each.queries] == list(range(kv_heads * group))
    for each in dealt:
        assert set(each.keys) == {head // group for head in each.queries}, "those that it needs, and no other"
    if kv_heads >= len(shares):
        assert sum(len(each.keys) for each in dealt) == kv_heads, "whole groups: no key head is sent twice"


def test_one_process_needs_no_group() -> None:
    alone = SequenceParallel()
    assert (alone.size, alone.sizes(7)) == (1, (7,))
    q, k, v = torch.randn(3, 2, 7, 3, 8)
    expected = scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    assert torch.equal(alone.attend([projected(q, k, v)], (3, 4)).wait(), expected.transpose(1, 2).reshape(2, 7, 24))
    assert torch.equal(alone.gather(alone.shard(q), 7), q)

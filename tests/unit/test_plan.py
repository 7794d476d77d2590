"""The parallel plan: layouts that fit, a text that explains itself, refusals."""

from __future__ import annotations

import re
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tacod.layout import layouts
from tacod.plan import (
    AUTO,
    DeviceRates,
    Layout,
    Plan,
    Request,
    Shape,
    cost,
    make_plan,
    measured_rates,
    parse_request,
)
from tacod.shares import EQUAL, Shares
from tacod_client.errors import ArgumentError

FLUX = Shape(24, 3072, 1, (512, 4096))
FLUX_2K = Shape(24, 3072, 1, (512, 16384))
FLUX_CFG = Shape(24, 3072, 2, (512, 4096))
SD35_CFG = Shape(38, 2432, 2, (154, 4096))
PIXART = Shape(16, 1152, 1, (4096,))


@pytest.mark.parametrize(
    ("layout", "world_size", "shape", "text"),
    [
        ((1, 1, 1), 1, FLUX, "sequence 1 (24 heads on one rank)"),
        ((1, 3, 1), 3, FLUX, "sequence 3 (ulysses; 24 heads over 3 ranks: 8 each; 4608 tokens: 1537 + 1536 + 1535)"),
        ((1, 1, 3), 3, FLUX, "sequence 3 (ring; 4608 tokens: 1537 + 1536 + 1535)"),
        ((1, 3, 1), 3, Shape(5, 80), "sequence 3 (ulysses; 5 heads over 3 ranks: 2 + 2 + 1)"),
        (
            (1, 4, 1),
            4,
            Shape(3, 96, 1, (8,)),
            "sequence 4 (ulysses; 3 heads over 4 ranks: 1 + 1 + 1 + 0, 1 without a head to attend; 8 tokens: 2 each)",
        ),
        ((1, 1, 1), 3, FLUX, "sequence 1 (2 of 3 ranks idle)"),
        ((2, 1, 1), 2, FLUX_CFG, "batch 2 × sequence 1 (2 images over 2 groups: 1 each)"),
        (
            (2, 2, 2),
            8,
            FLUX_CFG,
            "batch 2 × sequence 4 (ulysses 2 × ring 2; 2 images over 2 groups: 1 each; "
            "24 heads over 2 ranks: 12 each; 4608 tokens: 1152 each)",
        ),
    ],
)
def test_plan_explains_itself(layout: tuple[int, int, int], world_size: int, shape: Shape, text: str) -> None:
    assert str(Plan(Layout(*layout), world_size, shape)) == text


def test_a_step_cache_is_told_and_none_is_not() -> None:
    def text(step_cache: float) -> str:
        return str(make_plan(parse_request({"step_cache": step_cache}, 3), 3, FLUX))

    assert text(0.1) == (
        "sequence 3 (ulysses; 24 heads over 3 ranks: 8 each; 4608 tokens: 1537 + 1536 + 1535; step cache 0.1)"
    )
    assert text(0) == text(0.0) == str(make_plan(AUTO, 3, FLUX))


@given(
    world_size=st.integers(1, 8),
    heads=st.integers(1, 64),
    batch=st.integers(1, 9),
    lengths=st.lists(st.integers(1, 5000), min_size=1, max_size=3),
)
def test_auto_leaves_no_rank_idle_and_no_group_without_an_image(
    world_size: int, heads: int, batch: int, lengths: list[int]
) -> None:
    plan = make_plan(AUTO, world_size, Shape(heads, 64 * heads, batch, tuple(lengths)))
    assert plan.layout.ranks == world_size
    assert plan.layout.batch <= batch
    assert sum(plan.tokens) == sum(lengths)
    assert str(plan)


@pytest.mark.parametrize(
    ("world_size", "shape", "batch", "sequence"),
    [
        (4, FLUX_CFG, 2, 2),
        (4, FLUX, 1, 4),
        (3, FLUX_CFG, 1, 3),
        (3, FLUX, 1, 3),
        (3, SD35_CFG, 1, 3),
        (6, SD35_CFG, 2, 3),
        (2, SD35_CFG, 2, 1),
        (3, PIXART, 1, 3),
        (8, FLUX_CFG, 2, 4),
    ],
)
def test_auto_splits_a_batch_before_a_sequence(world_size: int, shape: Shape, batch: int, sequence: int) -> None:
    layout = make_plan(AUTO, world_size, shape).layout
    assert (layout.batch, layout.sequence) == (batch, sequence)


def test_a_ring_costs_more_than_ulysses_where_heads_divide_and_less_where_they_do_not() -> None:
    assert cost(Layout(1, 4, 1), FLUX) < cost(Layout(1, 1, 4), FLUX)
    few = Shape(1, 3072, 1, (512, 16384))
    assert cost(Layout(1, 1, 3), few) < cost(Layout(1, 3, 1), few)


@pytest.mark.parametrize(
    ("request_", "asked", "layout"),
    [
        ("auto", AUTO, None),
        ({"sequence_parallel_degree": 6}, Request(sequence_parallel_degree=6), None),
        ({"ulysses": 3, "ring": 2}, Request(ulysses=3, ring=2), Layout(1, 3, 2)),
        ({"ring": 6}, Request(ring=6), Layout(1, 1, 6)),
        ({"cfg_parallel": True}, Request(cfg_parallel=True), None),
        ({"step_cache": 0.1}, Request(step_cache=0.1), None),
        ({"step_cache": 1, "ring": 6}, Request(ring=6, step_cache=1), Layout(1, 1, 6)),
        ({"flash_attention": True}, Request(flash_attention=True), None),
        ({"flash_attention": False}, Request(ring=1, flash_attention=False), None),
        ({"sequence_parallel_degree": 2, "cfg_parallel": False}, Request(2, False), None),
        ({"sequence_parallel_degree": 3, "cfg_parallel": True}, Request(3, True), None),
    ],
)
def test_what_is_asked_for_is_planned(request_: Any, asked: Request, layout: Layout | None) -> None:
    assert parse_request(request_, 6) == asked
    made = make_plan(asked, 6, FLUX_CFG).layout
    assert asked.allows(made, 2)
    assert layout is None or made == layout


def test_a_batch_of_one_is_not_split_whatever_is_asked() -> None:
    assert make_plan(Request(3, True), 6, FLUX).layout.batch == 1


def test_four_times_two_on_six_is_explained_and_what_fits_is_proposed() -> None:
    with pytest.raises(ArgumentError) as caught:
        parse_request({"sequence_parallel_degree": 4, "cfg_parallel": True}, 6)
    assert caught.value.argument == "plan"
    assert "sequence 4 × batch 2 (cfg_parallel) takes 8 ranks, and there are 6" in caught.value.message
    assert '{"sequence_parallel_degree": 3, "cfg_parallel": true}' in caught.value.message


@pytest.mark.parametrize(
    "request_",
    [
        *(None, "", "AUTO", 3, True, [], {}, "x" * 100_000),
        *({"sequence": 3}, {"sequence_parallel_degree": True}, {"ring": 3.0}, {"ulysses": "3"}, {"ring": 0}),
        *({"step_cache": value} for value in (-0.1, True, "0.1", None, float("nan"), float("inf"), [0.1])),
        *({"flash_attention": 1}, {"flash_attention": False, "ring": 2}),
        *({"cfg_parallel": 1}, {"sequence_parallel_degree": 4}, {"ulysses": 2, "ring": 2}),
        *({"sequence_parallel_degree": 3, "cfg_parallel": True}, {"sequence_parallel_degree": 3, "ulysses": 2}),
    ],
)
def test_what_cannot_be_is_not_guessed_at(request_: Any) -> None:
    with pytest.raises(ArgumentError, match=r"^plan: ") as caught:
        parse_request(request_, 3)
    assert caught.value.argument == "plan"
    assert len(caught.value.message) < 400


@pytest.mark.parametrize("layout", [Layout(1, 2, 1), Layout(1, 1, 2), Layout(1, 3, 1)], ids=str)
@pytest.mark.parametrize("share", [0.8, 1.0, 3.0])
def test_a_measured_pace_says_what_was_measured(layout: Layout, share: float) -> None:
    alone_s, together_s = 0.12, 0.12 * share
    rates = measured_rates(alone_s, layout, together_s, FLUX)
    assert cost(Layout(1, 1, 1), FLUX, rates) == pytest.approx(alone_s)
    assert cost(layout, FLUX, rates) == pytest.approx(together_s)


def test_ranks_faster_than_can_be_have_links_that_cost_nothing() -> None:
    rates = measured_rates(0.12, Layout(1, 2, 1), 0.01, FLUX)
    assert cost(Layout(1, 2, 1), FLUX, rates) == pytest.approx(0.06, rel=1e-3)


def test_more_ranks_that_would_be_slower_are_left_idle_and_said() -> None:
    slow = DeviceRates(bytes=5e9)
    plan = make_plan(AUTO, 2, FLUX, slow)
    assert plan.layout == Layout(1, 1, 1)
    assert plan.slowdown == pytest.approx(cost(Layout(1, 2, 1), FLUX, slow) / cost(Layout(1, 1, 1), FLUX, slow))
    assert re.search(r"1 of 2 ranks idle: with all it would take \d\.\d\d times as long", str(plan))


def test_what_was_asked_for_is_done_however_slow() -> None:
    slow = DeviceRates(bytes=5e9)
    assert make_plan(Request(sequence_parallel_degree=2), 2, FLUX, slow).layout == Layout(1, 2, 1)
    assert make_plan(AUTO, 2, FLUX_CFG, slow).layout == Layout(2, 1, 1), "images of their own exchange nothing"


def test_fast_links_are_used() -> None:
    assert make_plan(AUTO, 3, FLUX, DeviceRates()).layout == Layout(1, 3, 1)


def test_an_exchange_in_8_bits() -> None:
    asked = parse_request({"exchange": "int8"}, 2)
    plan = make_plan(asked, 2, FLUX)
    assert plan.attention.exchange == "int8"
    assert "exchanged in 8 bits" in str(plan)
    assert "8 bits" not in str(make_plan(asked, 1, FLUX)), "alone, nothing is exchanged"
    assert cost(plan.layout, FLUX, exchange="int8") < cost(plan.layout, FLUX)
    # Links on which only half the bytes are worth it.
    between = next(
        speed for speed in range(40, 4, -1) if make_plan(AUTO, 2, FLUX, DeviceRates(bytes=speed * 1e9)).slowdown
    )
    assert make_plan(asked, 2, FLUX, DeviceRates(bytes=between * 1e9)).layout == Layout(1, 2, 1)
    assert make_plan(parse_request({"exchange": "exact"}, 2), 2, FLUX).attention.exchange == "exact"
    with pytest.raises(ArgumentError, match="plan: exchange: expected 'exact' or 'int8', got 'fp8'"):
        parse_request({"exchange": "fp8"}, 2)


# --- unequal ranks ----------------------------------------------------------------------------------------------------

FAST_FIRST = Shares.of([8, 5, 5], measured=True)
"""As of a card beside two that are 1.6 times as slow."""


@pytest.mark.parametrize(
    ("world_size", "shape", "shares", "text"),
    [
        (
            3,
            FLUX,
            FAST_FIRST,
            "sequence 3 (ulysses; rank 0 is 1.6 times as fast; 24 heads over 3 ranks: 11 + 7 + 6; "
            "4608 tokens: 2048 + 1280 + 1280)",
        ),
        (
            3,
            Shape(24, 3072),
            Shares.of([1, 1, 2]),
            "sequence 3 (ulysses; rank 2 takes 2 times as much; 24 heads over 3 ranks: 6 + 6 + 12)",
        ),
        (
            4,
            FLUX_CFG,
            Shares.of([2, 1, 2, 1], measured=True),
            "batch 2 × sequence 2 (ulysses; ranks 0 and 2 are 2 times as fast; 2 images over 2 groups: 1 each; "
            "24 heads over 2 ranks: 16 + 8; 4608 tokens: 3073 + 1535)",
        ),
    ],
)
def test_a_plan_says_the_shares_and_why(world_size: int, shape: Shape, shares: Shares, text: str) -> None:
    assert str(make_plan(AUTO, world_size, shape, shares=shares)) == text


def test_unlike_groups_tell_their_own_shares() -> None:
    layout = Layout(2, 2, 1, (3, 1, 1, 1))
    plan = Plan(layout, 4, FLUX_CFG, shares=Shares.of([3, 1, 1, 1]))
    assert "24 heads over 2 ranks: 18 + 6 and 12 each; 4608 tokens: 3456 + 1152 and 2304 each" in plan.reason
    assert layout.images(6) == (4, 2)
    assert layout.images(2) == (1, 1), "no group is without an image"


def test_a_card_that_would_hold_up_the_others_is_left_idle() -> None:
    """Two images on the two fast cards exchange nothing."""
    slow_first, rates = Shares.of([1, 20, 20], measured=True), DeviceRates(flops=20e12)
    plan = make_plan(AUTO, 3, FLUX_CFG, rates, slow_first)
    assert plan.layout == Layout(2, 1, 1, (0, 1, 1))
    assert plan.layout.members == (1, 2)
    assert re.search(r"1 of 3 ranks idle \(rank 0\): with all it would take \d+\.\d\d times as long", str(plan))
    assert make_plan(AUTO, 3, FLUX_CFG, None, slow_first).layout.ranks == 3, "nothing was measured"


def test_where_links_are_slow_unequal_ranks_take_equal_shares() -> None:
    """A rank with more tokens exchanges more; what the configuration asks for is done all the same."""
    rates, paces = DeviceRates(flops=300e12, bytes=5e9), [8, 5, 5]
    asked = Request(sequence_parallel_degree=3)
    plan = make_plan(asked, 3, FLUX, rates, Shares.of(paces, measured=True))
    assert plan.layout == Layout(1, 3, 1)
    assert "rank 0 is 1.6 times as fast; equal shares exchange less; 24 heads over 3 ranks: 8 each" in str(plan)
    assert make_plan(asked, 3, FLUX, rates, Shares.of(paces)).layout == Layout(1, 3, 1, (8, 5, 5))
    quick = DeviceRates(flops=300e12, bytes=30e9)
    assert make_plan(asked, 3, FLUX, quick, Shares.of(paces, measured=True)).layout == Layout(1, 3, 1, (8, 5, 5))


def test_fewer_ranks_than_there_are_are_the_fastest() -> None:
    asked = Request(sequence_parallel_degree=2)
    assert make_plan(asked, 3, FLUX, shares=Shares.of([1, 3, 2])).layout == Layout(1, 2, 1, (0, 3, 2))
    assert make_plan(asked, 3, FLUX, shares=Shares.of([3, 3, 1])).layout == Layout(1, 2, 1), "as among equal ranks"


def test_a_batch_goes_to_groups_only_where_that_is_faster() -> None:
    """Of two images one each would wait for the slow card: all share both."""
    shares, rates = Shares.of([3, 1], measured=True), DeviceRates(bytes=1e12)
    assert make_plan(AUTO, 2, FLUX_CFG, rates, shares).layout == Layout(1, 2, 1, (3, 1))
    assert make_plan(AUTO, 2, FLUX_CFG, rates).layout == Layout(2, 1, 1)
    four = Shape(24, 3072, 4, (512, 4096))
    assert make_plan(AUTO, 2, four, rates, shares).layout == Layout(2, 1, 1, (3, 1))


@given(
    world_size=st.integers(1, 6),
    heads=st.integers(1, 48),
    batch=st.integers(1, 5),
    lengths=st.lists(st.integers(1, 5000), min_size=1, max_size=3),
    rates=st.sampled_from([None, DeviceRates(), DeviceRates(bytes=5e9), DeviceRates(flops=1e13)]),
    data=st.data(),
)
def test_any_paces_lose_nothing(
    world_size: int, heads: int, batch: int, lengths: list[int], rates: DeviceRates | None, data: st.DataObject
) -> None:
    each = data.draw(st.lists(st.integers(1, 40), min_size=world_size, max_size=world_size), "shares")
    shape, shares = Shape(heads, 64 * heads, batch, tuple(lengths)), Shares.of(each, measured=True)
    plan = make_plan(AUTO, world_size, shape, rates, shares)
    layout = plan.layout
    assert str(plan)
    assert len(set(layout.members)) == layout.ranks <= world_size
    assert list(layout.members) == sorted(layout.members)
    assert sum(layout.images(batch)) == batch
    assert min(layout.images(batch)) >= 1
    assert sum(plan.tokens) == sum(lengths)
    idle = [share for rank, share in enumerate(each) if rank not in layout.members]
    assert not idle or max(idle) <= min(each[rank] for rank in layout.members), "the slowest ones are left idle"
    assert rates is not None or layout.ranks == world_size
    if len(set(each)) == 1:
        assert plan == replace(make_plan(AUTO, world_size, shape, rates), shares=shares), "as if nothing was measured"


def test_unequal_shares_are_cheaper_on_unequal_ranks() -> None:
    shares = Shares.of([8, 5, 5], measured=True)
    even, uneven = (cost(Layout(1, 3, 1, each), FLUX, shares=shares) for each in ((1, 1, 1), (8, 5, 5)))
    assert uneven < 0.95 * even
    assert cost(Layout(1, 3, 1, (1, 1, 1)), FLUX) == cost(Layout(1, 3, 1), FLUX)


@pytest.mark.parametrize("layout", [Layout(1, 3, 1, (8, 5, 5)), Layout(1, 1, 3, (8, 5, 5))], ids=str)
def test_rates_of_unequal_ranks_say_what_was_measured(layout: Layout) -> None:
    rates = measured_rates(0.12, layout, 0.06, FLUX, FAST_FIRST)
    assert cost(Layout(1, 1, 1), FLUX, rates, shares=FAST_FIRST) == pytest.approx(0.12), "rank 0 alone"
    assert cost(Layout(1, 1, 1, (0, 1, 0)), FLUX, rates, shares=FAST_FIRST) == pytest.approx(0.192)
    assert cost(layout, FLUX, rates, shares=FAST_FIRST) == pytest.approx(0.06, rel=0.2)


def test_between_hosts_a_ring_or_batch_groups_or_nothing() -> None:
    """Of four ranks on two hosts; a long video has time to hide a ring's transfers, an image has not."""
    video, two = Shape(40, 5120, 1, (75600,)), (0, 0, 1, 1)
    assert make_plan(AUTO, 4, video, DeviceRates()).layout == Layout(1, 4, 1)
    assert make_plan(AUTO, 4, video, DeviceRates(), EQUAL, two).layout == Layout(1, 2, 2)
    assert make_plan(AUTO, 4, FLUX_CFG, DeviceRates(network_bytes=1e9), EQUAL, two).layout == Layout(2, 2, 1)
    assert make_plan(AUTO, 4, FLUX, DeviceRates(), EQUAL, two).layout == Layout(1, 2, 1)
    assert make_plan(AUTO, 4, FLUX, DeviceRates(network_bytes=5e10), EQUAL, two).layout == Layout(1, 4, 1)


PAGE = Path(__file__).parents[2] / "docs" / "scaling.md"
SHAPES = {
    "Flux.1 1024²": FLUX,
    "Flux.1 1024², batch of two": FLUX_CFG,
    "Wan 14B 480p": Shape(40, 5120, 1, (32760,)),
    "Wan 14B 720p": Shape(40, 5120, 1, (75600,)),
}
CHOSEN = {
    "two of one host": Layout(1, 2, 1),
    "Ulysses 4": Layout(1, 4, 1),
    "Ulysses 2 × ring 2": Layout(1, 2, 2),
    "batch 2 × Ulysses 2": Layout(2, 2, 1),
}


@pytest.mark.parametrize(
    "row", re.findall(r"^\| (\w.*, \d+ Gb/s) \| (.*) \|$", PAGE.read_text(), re.MULTILINE), ids=itemgetter(0)
)
def test_the_page_on_scaling_has_what_plans_count_with(row: tuple[str, str]) -> None:
    what, gigabits = re.fullmatch(r"(.*), (\d+) Gb/s", row[0]).groups()  # type: ignore[union-attr]
    shape, rates, two = SHAPES[what], DeviceRates(network_bytes=float(gigabits) / 8 * 1e9), (0, 0, 1, 1)
    *told, chosen = row[1].split(" | ")
    near = [layout for layout in layouts(4, shape.batch, ()) if layout.ranks == 2 and layout.ring == 1]
    counted = [
        cost(Layout(1, 1, 1), shape, rates),
        min(cost(layout, shape, rates) for layout in near),
        *(cost(layout, shape, rates, hosts=two) for layout in (Layout(1, 4, 1), Layout(1, 2, 2))),
    ]
    plan = make_plan(AUTO, 4, shape, rates, EQUAL, two)
    chosen, _, taken = chosen.partition(": ")
    assert plan.layout == CHOSEN[chosen]
    shown = [*told, taken] if taken else told
    assert [float(each) for each in shown] == [
        float(f"{1e3 * seconds:.3g}")
        for seconds in [*counted, cost(plan.layout, shape, rates, hosts=two)][: len(shown)]
    ]


@given(hosts=st.lists(st.integers(0, 2), min_size=4, max_size=4), batch=st.integers(1, 3))
def test_a_network_never_makes_it_faster(hosts: list[int], batch: int) -> None:
    shape, far = Shape(24, 3072, batch, (512, 4096)), tuple(sorted(hosts))
    rates = DeviceRates()
    for layout in layouts(4, batch, ()):
        assert cost(layout, shape, rates, hosts=far) >= cost(layout, shape, rates) - 1e-12

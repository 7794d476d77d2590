"""Shares of unequal ranks: whole numbers that lose nothing, follow the paces, and are equal for equal cards."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tacod.shares import ALIKE, EQUAL, Shares, apportion, in_lowest_terms, measured_shares

SHARES = st.lists(st.integers(1, 40), min_size=1, max_size=8).map(tuple)


@given(st.integers(0, 10**6), st.integers(1, 64))
def test_equal_shares_differ_by_at_most_one_and_the_first_take_the_rest(n: int, ranks: int) -> None:
    assert apportion(n, (1,) * ranks) == tuple(n // ranks + (rank < n % ranks) for rank in range(ranks))


@given(st.integers(0, 10**6), SHARES, st.integers(1, 9))
def test_nothing_is_lost_and_only_the_ratio_counts(n: int, shares: tuple[int, ...], times: int) -> None:
    parts = apportion(n, shares)
    assert len(parts) == len(shares)
    assert sum(parts) == n
    assert all(part >= n * share // sum(shares) for part, share in zip(parts, shares, strict=True))
    assert parts == apportion(n, tuple(times * share for share in shares))


@given(st.integers(0, 12), st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple), st.integers(0, 1))
def test_no_other_division_has_a_sooner_last_rank(n: int, shares: tuple[int, ...], least: int) -> None:
    assume(n >= least * len(shares))
    every = [parts for parts in itertools.product(range(least, n + 1), repeat=len(shares)) if sum(parts) == n]

    def last(parts: tuple[int, ...]) -> Fraction:
        return max(Fraction(part, share) for part, share in zip(parts, shares, strict=True))

    assert last(apportion(n, shares, least)) == min(map(last, every))


@given(SHARES, st.integers(0, 20))
def test_each_gets_the_least(shares: tuple[int, ...], more: int) -> None:
    n = len(shares) + more
    parts = apportion(n, shares, least=1)
    assert sum(parts) == n
    assert min(parts) >= 1


@pytest.mark.timeout(5)
def test_any_number_is_divided_at_once() -> None:
    """A batch may be said to have as many images as its sender likes."""
    assert apportion(2_000_000_000, (3, 1, 2), least=1) == (1_000_000_000, 333_333_333, 666_666_667)
    assert apportion(2_000_000_000, (1000, 1, 1), least=7) == (1_996_007_986, 1_996_007, 1_996_007)


@given(st.floats(1e-4, 1e4), st.lists(st.floats(0, ALIKE - 1e-6), min_size=1, max_size=8))
def test_cards_of_nearly_one_speed_have_equal_shares(seconds: float, more: list[float]) -> None:
    slowest = max(more)
    assert not measured_shares([seconds * (1 + each) / (1 + slowest) for each in [0.0, *more]]).each


@pytest.mark.parametrize(
    ("seconds", "each"),
    [
        ([0.1, 0.16, 0.16], (8, 5, 5)),
        ([0.1, 0.162, 0.158], (8, 5, 5)),
        ([0.2, 0.1], (1, 2)),
        ([0.1, 0.2, 0.1], (2, 1, 2)),
        ([1.0, 1.0], ()),
        ([3.0], ()),
        ([0.1, 0.104, 0.2, 0.207], (2, 2, 1, 1)),
        # Of a forward that takes no time to speak of, a host's hiccup is most.
        ([0.002, 0.0025, 0.001], ()),
    ],
)
def test_paces_are_multiples_of_a_twentieth(seconds: list[float], each: tuple[int, ...]) -> None:
    assert measured_shares(seconds) == Shares(each, measured=True)


@given(st.lists(st.floats(1e-3, 10), min_size=1, max_size=6), st.permutations(range(6)))
def test_the_order_of_ranks_says_nothing(seconds: list[float], order: list[int]) -> None:
    mine = [place for place in order if place < len(seconds)]
    given_ = measured_shares(seconds).each or (1,) * len(seconds)
    turned = measured_shares([seconds[place] for place in mine]).each or (1,) * len(seconds)
    assert turned == tuple(given_[place] for place in mine)
    for (one, a), (other, b) in itertools.combinations(zip(seconds, given_, strict=True), 2):
        assert a >= b if one <= other else a <= b


@pytest.mark.parametrize(
    ("shares", "text"),
    [
        (EQUAL, ""),
        (Shares.of([3, 3, 3]), ""),
        (Shares.of([8, 5, 5], measured=True), "rank 0 is 1.6 times as fast"),
        (Shares.of([1, 2, 2], measured=True), "ranks 1 and 2 are 2 times as fast"),
        (Shares.of([4, 2, 3]), "rank 0 takes 2 times as much, rank 2 takes 1.5 times as much"),
        (Shares.of([1, 1, 2, 3, 3]), "rank 2 takes 2 times as much, ranks 3 and 4 take 3 times as much"),
    ],
)
def test_shares_say_why(shares: Shares, text: str) -> None:
    assert str(shares) == text


def test_lowest_terms() -> None:
    assert in_lowest_terms([32, 20, 20]) == (8, 5, 5)
    assert in_lowest_terms([0, 4, 4]) == (0, 1, 1)
    assert in_lowest_terms([]) == ()

"""The parallel plan: uneven chunks that lose nothing, a text that explains itself, refusals by name."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tacod.plan import Plan, check_request, chunks, make_plan
from tacod_client.errors import ArgumentError


@given(st.integers(0, 10**6), st.integers(1, 64))
def test_chunks_lose_nothing_and_differ_by_at_most_one(n: int, parts: int) -> None:
    sizes = chunks(n, parts)
    assert len(sizes) == parts
    assert sum(sizes) == n
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] - sizes[-1] <= 1


def test_first_chunks_take_the_rest() -> None:
    assert chunks(4096, 3) == [1366, 1365, 1365]
    assert chunks(512, 3) == [171, 171, 170]
    assert chunks(2, 4) == [1, 1, 0, 0]
    assert chunks(0, 2) == [0, 0]


@pytest.mark.parametrize(
    ("plan", "text"),
    [
        (Plan(1, 1, 24, ()), "sequence 1 (one rank; 24 heads)"),
        (Plan(3, 3, 24, (512, 4096)), "sequence 3 (ulysses; 24 heads over 3 ranks: 8 each; "
                                      "4608 tokens: 1537 + 1536 + 1535)"),
        (Plan(3, 3, 24, (513, 4095)), "sequence 3 (ulysses; 24 heads over 3 ranks: 8 each; 4608 tokens: 1536 each)"),
        (Plan(3, 3, 5, ()), "sequence 3 (ulysses; 5 heads over 3 ranks: 2 + 2 + 1)"),
        (Plan(4, 4, 3, (8,)), "sequence 4 (ulysses; 3 heads over 4 ranks: 1 + 1 + 1 + 0, 1 of them without a head to "
                              "attend; 8 tokens: 2 each)"),
        (Plan(3, 1, 24, (512, 4096)), "sequence 1 (as asked; the other 2 repeat the work; 24 heads)"),
    ],
)  # fmt: skip
def test_plan_explains_itself(plan: Plan, text: str) -> None:
    assert str(plan) == text


@given(st.integers(1, 8), st.lists(st.integers(0, 5000), max_size=3))
def test_tokens_of_all_ranks_are_all_tokens(sequence: int, lengths: list[int]) -> None:
    tokens = Plan(sequence, sequence, 24, tuple(lengths)).tokens
    assert sum(tokens) == sum(lengths)
    assert len(tokens) == (sequence if lengths else 0)


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_auto_uses_all_ranks(world_size: int) -> None:
    assert check_request("auto", world_size) == world_size


def test_all_ranks_or_one_may_be_asked_for() -> None:
    assert check_request({"sequence": 3}, 3) == 3
    assert check_request({"sequence": 1}, 3) == 1


def test_made_plan_is_what_was_asked() -> None:
    assert make_plan({"sequence": 1}, 3, 24, [5, 7]) == Plan(3, 1, 24, (5, 7))
    assert make_plan("auto", 3, 24, ()) == Plan(3, 3, 24, ())


@pytest.mark.parametrize("sequence", [0, 2, 4, -1])
def test_what_cannot_be_is_not_guessed_at(sequence: int) -> None:
    with pytest.raises(ArgumentError, match=rf"^plan: sequence {sequence} on 3 ranks: .*all ranks or one") as caught:
        check_request({"sequence": sequence}, 3)
    assert caught.value.argument == "plan"


@pytest.mark.parametrize(
    "request_", [None, "", "AUTO", 3, True, [], {}, {"sequence": True}, {"sequence": 3.0}, {"sequence": "3"},
                 {"ring": 3}, {"sequence": 3, "ring": 1}, "x" * 100_000]
)  # fmt: skip
def test_other_requests_are_refused_with_what_is_expected(request_: Any) -> None:
    with pytest.raises(ArgumentError, match=r'^plan: expected "auto" or \{"sequence": n\}') as caught:
        check_request(request_, 3)
    assert len(caught.value.message) < 200

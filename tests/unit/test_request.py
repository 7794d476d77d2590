"""A request's completion, its answer, and who hears of which, in any order."""

from __future__ import annotations

import itertools
import weakref
from dataclasses import replace
from typing import Any

import pytest

from tacod_client.request import Completion, Request
from tacod_client.stats import PARTS, ModelStats
from tacod_client.wire import Message

COMPLETION = Message("completion", {"out": 1}, 7)
DONE, ERROR = Message("done", {"out": 1, "plan": "p"}, 7), Message("error", {}, 7)
PROGRESS = Message("progress", {}, 7)


@pytest.fixture
def request_() -> Request:
    """One that was sent."""
    return Request("forward", dict)


def test_an_answer_alone_is_a_reply(request_: Request) -> None:
    for message in (PROGRESS, DONE):
        assert not request_.take(message)
    assert list(request_.replies) == [PROGRESS, DONE]
    assert not request_.completed


@pytest.mark.parametrize("answer", [DONE, ERROR], ids=["done", "error"])
def test_a_completion_is_the_last_reply(request_: Request, answer: Message) -> None:
    request_.take(PROGRESS)
    request_.complete(COMPLETION)
    assert request_.completed
    assert not request_.take(PROGRESS), "that was on its way"
    request_.complete(COMPLETION)
    assert request_.take(answer)
    assert not request_.completed
    first, last = request_.replies
    assert first == PROGRESS
    assert isinstance(last, Completion)
    assert (last.body, last.id, last.request) == (COMPLETION.body, 7, request_)


@pytest.mark.parametrize("answer", [DONE, ERROR], ids=["done", "error"])
def test_a_completion_behind_the_answer_says_nothing(request_: Request, answer: Message) -> None:
    request_.take(answer)
    request_.complete(COMPLETION)
    assert not request_.completed
    assert list(request_.replies) == [answer]


@pytest.mark.parametrize("answer", [DONE, ERROR], ids=["done", "error"])
def test_a_completion_behind_an_answer_that_was_read_says_nothing(request_: Request, answer: Message) -> None:
    """One thread has taken the answer, and not yet forgotten the request, when another hears of the completion."""
    request_.take(answer)
    assert request_.replies.popleft() is answer
    request_.complete(COMPLETION)
    assert not request_.completed, "no answer would end that"
    assert not request_.replies
    request_.send_as(8)
    request_.complete(replace(COMPLETION, id=8))
    assert request_.completed, "it was sent anew"


def test_what_is_completed_holds_no_tensors() -> None:
    """A model and its connection remember the request until its answer is read, which may be long."""

    class Body:
        def build(self) -> dict[str, Any]:
            return {}

    body = Body()
    held = weakref.ref(body)
    request = Request("forward", body.build)
    request.send_as(7)
    request.complete(COMPLETION)
    del body
    assert held() is None


@pytest.mark.parametrize("order", [*itertools.permutations(["first", "second", "answer"])], ids="-".join)
@pytest.mark.parametrize("answer", [DONE, None], ids=["told", "never told"])
def test_all_hear_of_the_answer_once_and_in_order(
    request_: Request, order: tuple[str, ...], answer: Message | None
) -> None:
    heard: list[Any] = []
    request_.complete(COMPLETION)
    for event in order:
        if event == "answer":
            request_.end(answer)
        else:
            request_.when_answered(lambda message, event=event: heard.append((event, message)))  # type: ignore[misc]
    hearers = [event for event in order if event != "answer"]
    assert heard == [(event, answer) for event in hearers]


def test_a_forward_of_untold_time_counts_as_one_like_the_last() -> None:
    stats = ModelStats()
    timing = dict.fromkeys(("queue_s", "wire_s", "compute_s", "collective_s"), 0.25)
    stats.add({"timing": timing, "steps": 1, "attempts": 1, "ranks": 3, "plan": "sequence 3"}, 2.0)
    stats.add_untold(0.5)
    assert (stats.steps, stats.parallel_steps, stats.retries, stats.plan) == (2, 2, 0, "sequence 3")
    assert stats.seconds == sum(getattr(stats, f"{part}_s") for part in PARTS) == 2.5
    assert stats.last is not None
    assert (stats.last.seconds, stats.last.client_s, stats.last.ranks) == (0.5, 0.5, 3)

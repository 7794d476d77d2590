"""The restart policy, on a clock of its own."""

from __future__ import annotations

import pytest

from tacod.group.restarts import RestartPolicy


def waits(policy: RestartPolicy, *losses: float) -> list[float | None]:
    """How long each loss, at its moment, is waited out; None where the policy gives up."""
    starts = [(now, policy.next_start(now)) for now in losses]
    return [None if start is None else pytest.approx(start - now) for now, start in starts]


def test_first_restart_is_immediate() -> None:
    assert waits(RestartPolicy(5, 600.0), 1000.0) == [0.0]


def test_waits_double() -> None:
    assert waits(RestartPolicy(5, 600.0), 0, 1, 2, 3, 4) == [0, 0.1, 0.2, 0.4, 0.8]


def test_waits_are_bounded() -> None:
    assert waits(RestartPolicy(9, 600.0, first_s=4.0, longest_s=10.0), *range(5)) == [0, 4, 8, 10, 10]


def test_policy_gives_up_at_one_more_than_its_limit() -> None:
    assert waits(RestartPolicy(2, 600.0), 0, 1, 2, 3) == [0, 0.1, None, None]


def test_no_restarts_means_none() -> None:
    assert waits(RestartPolicy(0, 600.0), 0) == [None]


def test_losses_older_than_the_window_are_forgotten() -> None:
    policy = RestartPolicy(2, 600.0)
    assert waits(policy, 0, 300, 601) == [0, 0.1, 0.1]
    assert waits(policy, 650) == [None]
    assert waits(policy, 2000) == [0]


def test_loss_at_the_edge_of_the_window_still_counts() -> None:
    assert waits(RestartPolicy(1, 600.0), 0, 600) == [0, None]


def test_giving_up_is_no_restart() -> None:
    policy = RestartPolicy(1, 10.0)
    assert waits(policy, 0, 5, 9, 10.5) == [0, None, None, 0]


def test_a_generous_limit_does_not_overflow() -> None:
    assert waits(RestartPolicy(3000, 1e9), *range(2000))[-1] == 10.0


def test_losses_under_one_job_count_once() -> None:
    policy = RestartPolicy(2, 600.0)
    assert policy.next_start(0.0, "job 1") == 0.0
    assert policy.next_start(1.0, "job 1") == 1.0
    assert policy.next_start(2.0, "job 1") == 2.0
    assert policy.next_start(3.0) is not None
    assert policy.next_start(4.0, "job 2") is None


def test_losses_that_a_job_is_to_blame_for_do_not_count() -> None:
    policy = RestartPolicy(1, 600.0)
    for number in range(5):
        assert policy.next_start(float(number), f"job {number}") == number
        policy.forgive(f"job {number}")
    assert policy.next_start(9.0) == 9.0
    policy.forgive("")
    assert policy.next_start(10.0) is None

"""Counts and times: percentiles, the split of a step, the window."""

from __future__ import annotations

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tacod.observe.metrics import Metrics, StepTimes

SECONDS = st.floats(0, 1000)
TIMES = st.builds(StepTimes, SECONDS, SECONDS, SECONDS, SECONDS)


def of(*totals: float) -> Metrics:
    """Metrics of steps that took so long."""
    metrics = Metrics()
    for total in totals:
        metrics.add_step(StepTimes(0.0, 0.0, total, 0.0), 1, 1)
    return metrics


def test_nothing_done_is_all_zeros() -> None:
    told = Metrics().to_wire()
    assert told["step_s"] == {"mean": 0.0, "p50": 0.0, "p95": 0.0, "count": 0}
    assert told["jobs_total"] == {"result": 0, "failed": 0, "cancelled": 0}


@pytest.mark.parametrize(
    ("count", "p50", "p95"), [(1, 1, 1), (2, 1, 2), (3, 2, 3), (4, 2, 4), (10, 5, 10), (20, 10, 19), (100, 50, 95)]
)
def test_percentiles_are_by_nearest_rank(count: int, p50: int, p95: int) -> None:
    step = of(*reversed(range(1, count + 1))).to_wire()["step_s"]
    assert (step["p50"], step["p95"], step["count"]) == (p50, p95, count)


def test_mean_is_over_the_window_and_count_over_all() -> None:
    step = of(*[100.0] * 10, *[1.0] * Metrics.WINDOW).to_wire()["step_s"]
    assert step == {"mean": 1.0, "p50": 1.0, "p95": 1.0, "count": Metrics.WINDOW + 10}


@given(st.lists(TIMES, min_size=1, max_size=30))
def test_split_adds_up_to_the_step(steps: list[StepTimes]) -> None:
    metrics = Metrics()
    for times in steps:
        metrics.add_step(times, 1, 1)
    told = metrics.to_wire()
    parts = [told[name] for name in ("queue_s", "wire_s", "compute_s", "collective_s")]
    assert math.isclose(sum(parts), told["step_s"]["mean"], rel_tol=1e-9, abs_tol=1e-9)
    assert math.isclose(told["step_s"]["mean"], statistics.fmean(times.total_s for times in steps), abs_tol=1e-9)
    assert min(times.total_s for times in steps) <= told["step_s"]["p50"] <= told["step_s"]["p95"]


def test_each_part_is_told_under_its_own_name() -> None:
    metrics = Metrics()
    metrics.add_step(StepTimes(queue_s=1.0, wire_s=2.0, compute_s=3.0, collective_s=4.0), 1, 1)
    told = metrics.to_wire()
    assert [told[name] for name in ("queue_s", "wire_s", "compute_s", "collective_s")] == [1.0, 2.0, 3.0, 4.0]
    assert told["step_s"]["mean"] == 10.0


def test_forwards_of_a_step_are_counted_and_those_on_several_ranks_apart() -> None:
    metrics = Metrics()
    metrics.add_step(StepTimes(0, 0, 1, 0), forwards=2, ranks=3, skipped=1, prefix_hits=1, prefix_misses=1)
    metrics.add_step(StepTimes(0, 0, 1, 0), forwards=1, ranks=1, prefix_hits=1)
    told = metrics.to_wire()
    assert (told["forwards_total"], told["parallel_forwards_total"], told["skipped_forwards_total"]) == (3, 2, 1)
    assert told["prefix"] == {"hits": 2, "misses": 1}


def test_totals_are_told_as_they_were_counted() -> None:
    metrics = Metrics()
    metrics.jobs_total["failed"] += 2
    metrics.retried_forwards += 1
    told = metrics.to_wire()
    assert (told["jobs_total"]["failed"], told["retried_forwards"]) == (2, 1)


def test_groups_add_up() -> None:
    one, two = of(1.0, 3.0), of(8.0)
    two.jobs_total["result"] += 2
    two.add_step(StepTimes(0.0, 1.0, 2.0, 1.0), forwards=3, ranks=2, skipped=1, prefix_hits=4, prefix_misses=5)
    told = Metrics.sum([one, two]).to_wire()
    assert told["step_s"] == {"mean": 4.0, "p50": 3.0, "p95": 8.0, "count": 4}
    assert told["forwards_total"] == one.forwards_total + two.forwards_total
    assert (told["parallel_forwards_total"], told["skipped_forwards_total"]) == (two.parallel_forwards_total, 1)
    assert (told["prefix"], told["jobs_total"]["result"]) == ({"hits": 4, "misses": 5}, 2)
    assert Metrics.sum([one]).to_wire() == one.to_wire()


@given(st.lists(SECONDS, max_size=30))
def test_a_histogram_counts_up_to_each_bound(values: list[float]) -> None:
    metrics = of(*values)
    (family,) = metrics.steps.collect()
    found = {sample.labels["le"]: sample.value for sample in family.samples if sample.name.endswith("_bucket")}
    expected = {str(bound): sum(value <= bound for value in values) for bound in Metrics.STEP_BOUNDS}
    assert found == {**expected, "+Inf": len(values)}
    (total,) = (sample.value for sample in family.samples if sample.name.endswith("_sum"))
    assert math.isclose(total, sum(values), abs_tol=1e-9)


def test_totals_outlive_the_window() -> None:
    metrics = of(*[1.0] * (Metrics.WINDOW + 10))
    assert metrics.to_wire()["step_s"]["count"] == Metrics.WINDOW + 10
    assert metrics.part_seconds == {
        "queue_s": 0.0,
        "wire_s": 0.0,
        "compute_s": Metrics.WINDOW + 10,
        "collective_s": 0.0,
    }

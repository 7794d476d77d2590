"""Steps of runs that are kept in the store, for new ranks to go on behind them."""

from __future__ import annotations

from typing import Any

import pytest

from tacod.execution.kept_steps import KeptSteps
from tacod.execution.scheduler import Job, Verb
from tacod.execution.store import Store
from tacod.group.work import Sample, Stepped
from tacod_client.errors import QueueFull
from tacod_client.wire import Tensor


def tensor(content: int, size: int) -> Tensor:
    return Tensor("U8", (size,), (bytes([content]) * size,))


def run(steps: int = 9) -> Job:
    inputs: Any = tensor(0, 1)
    body = Sample("model", None, "euler", 0, 1.0, inputs, inputs, inputs, {}, None)
    return Job("1", b"a", 1, Verb.SAMPLE, "model", body, steps)


def step(*record: Tensor) -> Stepped:
    return Stepped("", 1, 1, 0, record=list(record))


def test_a_step_is_kept_if_all_before_it_are() -> None:
    store, job = Store(100), run()
    kept = KeptSteps(store)
    kept.keep(job, step(tensor(1, 10)))
    job.step = 1
    kept.keep(job, step(tensor(2, 10), tensor(3, 10)))
    assert (job.kept, len(job.record)) == (2, 3)
    job.step = 2
    kept.keep(job, step())
    assert (job.kept, job.record) == (0, [])
    job.step = 3
    kept.keep(job, step(tensor(4, 10)))
    assert (job.kept, job.record) == (0, [])


def test_half_of_the_store_is_for_other_things() -> None:
    store, job, other = Store(100), run(), run()
    kept = KeptSteps(store)
    kept.keep(job, step(tensor(1, 30)))
    kept.keep(other, step(tensor(2, 30)))
    assert (job.kept, other.kept) == (1, 0)


def test_patches_of_loaded_models_stay() -> None:
    """New ranks could not load the run's model without its patches."""
    store, job = Store(100), run()
    patch = store.put(tensor(1, 70))
    store.hold([patch])
    kept = KeptSteps(store)
    kept.keep(job, step(tensor(2, 40)))
    assert job.kept == 0
    assert patch in store
    kept.keep(job, step(tensor(2, 20)))
    assert job.kept == 1
    assert patch in store


def test_kept_steps_make_way_for_uploads() -> None:
    """Those of the run that has most, whole: some of a run's are good for nothing."""
    store, small, large = Store(100), run(), run()
    large.id = "2"
    kept = KeptSteps(store)
    kept.keep(small, step(tensor(1, 15)))
    kept.keep(large, step(tensor(2, 15), tensor(3, 15)))
    store.put(tensor(4, 60), b"client")
    assert (small.kept, large.kept, large.record) == (1, 0, [])
    assert not store.lacks(small.record)
    store.put(tensor(5, 100), b"client")
    assert small.kept == 0
    assert store.nbytes == 100


def test_kept_steps_make_way_before_patches_and_others_uploads_do() -> None:
    for protect in ("hold", "claim"):
        store, job = Store(100), run()
        kept = KeptSteps(store)
        kept.keep(job, step(tensor(1, 40)))
        other = store.put(tensor(2, 40), b"other", now=0.0)
        if protect == "hold":
            store.hold([other])
        else:
            store.claim(b"other", [other], now=0.0)
        store.put(tensor(3, 50), b"client", now=0.0)
        assert job.kept == 0
        assert other in store


def test_what_nobody_needs_goes_first() -> None:
    store, job = Store(100), run()
    kept = KeptSteps(store)
    spare = store.put(tensor(1, 40))
    kept.keep(job, step(tensor(2, 40)))
    store.put(tensor(3, 60), b"client")
    assert job.kept == 1
    assert spare not in store


def test_a_run_takes_no_room_from_another_ones_steps() -> None:
    store, job, other = Store(100), run(), run()
    other.id = "2"
    kept = KeptSteps(store)
    kept.keep(job, step(tensor(1, 30)))
    store.claim(b"client", [store.put(tensor(2, 60), b"client", now=0.0)], now=0.0)
    kept.keep(other, step(tensor(3, 20)))
    assert (job.kept, other.kept) == (1, 0)


def test_without_kept_steps_a_full_store_is_told() -> None:
    store = Store(100)
    KeptSteps(store)
    store.pin([store.put(tensor(1, 60))])
    with pytest.raises(QueueFull):
        store.put(tensor(2, 60), b"client")

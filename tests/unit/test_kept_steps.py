"""Steps of runs that are kept in the store, for new ranks to go on behind them."""

from __future__ import annotations

from typing import Any

from tacod.execution.kept_steps import KeptSteps
from tacod.execution.scheduler import Job, Verb
from tacod.execution.store import Store
from tacod.group.work import Sample, Stepped
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
    kept.keep(job, step(tensor(1, 10)), [job])
    job.step = 1
    kept.keep(job, step(tensor(2, 10), tensor(3, 10)), [job])
    assert (job.kept, len(job.record)) == (2, 3)
    job.step = 2
    kept.keep(job, step(), [job])
    assert (job.kept, job.record) == (0, [])
    job.step = 3
    kept.keep(job, step(tensor(4, 10)), [job])
    assert (job.kept, job.record) == (0, [])


def test_half_of_the_store_is_for_other_things() -> None:
    store, job, other = Store(100), run(), run()
    kept = KeptSteps(store)
    kept.keep(job, step(tensor(1, 30)), [job, other])
    kept.keep(other, step(tensor(2, 30)), [job, other])
    assert (job.kept, other.kept) == (1, 0)


def test_patches_of_loaded_models_stay() -> None:
    """New ranks could not load the run's model without its patches."""
    store, job = Store(100), run()
    patch = store.put(tensor(1, 70))
    store.hold([patch])
    kept = KeptSteps(store)
    kept.keep(job, step(tensor(2, 40)), [job])
    assert job.kept == 0
    assert patch in store
    kept.keep(job, step(tensor(2, 20)), [job])
    assert job.kept == 1
    assert patch in store

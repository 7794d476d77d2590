"""Cancel: at the next step, on all ranks; what is queued never starts; the next request is right."""

from __future__ import annotations

import time

import pytest
from helpers import FLUX, SD3, Daemon, Interrupted, Interruption, eventually

from tacod_client import Cancelled, Client, JobNotFound


def test_a_running_job(client: Client) -> None:
    model = client.load(SD3.file)
    before = client.stats()["jobs_total"]
    job = SD3.sample(model, 20000)
    for event in job:
        if event.step == 3:
            break
    started = time.monotonic()
    job.cancel()
    with pytest.raises(Cancelled, match=job.id):
        job.result()
    assert time.monotonic() - started < 1
    after = client.stats()["jobs_total"]
    assert after == {**before, "cancelled": before["cancelled"] + 1}
    SD3.check(model)


def test_the_end_of_a_job_stays_what_it_was(client: Client) -> None:
    job = SD3.sample(client.load(SD3.file), 20000)
    job.cancel()
    for _ in range(2):
        with pytest.raises(Cancelled):
            job.result()
    with pytest.raises(JobNotFound):
        job.cancel()


def test_a_queued_job_never_starts(sturdy: Daemon, client: Client) -> None:
    model = client.load(SD3.file)
    with sturdy.client() as other:
        running = SD3.sample(model, 20000)
        first, second = (SD3.sample(model, 4, seed) for seed in (1, 2))
        assert other.cancel(first.id) == "cancelled"
        with pytest.raises(Cancelled, match="at step 0 of 4"):
            first.result()
        assert [told["job"] for told in other.jobs()] == [running.id, second.id]
        assert other.cancel(running.id) in ("cancelled", "cancelling")
        with pytest.raises(Cancelled):
            running.result()
        assert [event.step for event in second] == [1, 2, 3, 4]


def test_an_interrupted_call_cancels_itself(sturdy: Daemon) -> None:
    interruption = Interruption()
    with sturdy.client(on_wait=interruption) as client, sturdy.client() as watcher:
        model = client.load(SD3.file)
        job = SD3.sample(model, 20000)
        next(iter(job))
        interruption.armed.set()
        with pytest.raises(Interrupted):
            job.result()
        eventually(lambda: watcher.jobs() == [], 3, "the job is gone")
        interruption.armed.clear()
        SD3.check(model)


def test_a_dropped_job_is_cancelled(sturdy: Daemon, client: Client) -> None:
    job = SD3.sample(client.load(SD3.file), 20000)
    next(iter(job))
    del job
    eventually(lambda: client.jobs() == [], 3, "the job is gone")
    FLUX.check(client.load(FLUX.file))

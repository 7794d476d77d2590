"""Cancel while a rank stands still: cancelled within `group.step_timeout_s`, and told once."""

from __future__ import annotations

import time

import pytest
from helpers import SD3, Daemon, stopped

from tacod_client import Cancelled, Client

from .conftest import STEP_TIMEOUT_S


def test_ends_within_the_deadline(sturdy: Daemon, client: Client) -> None:
    model = client.load(SD3.file)
    before = client.stats()["jobs_total"]
    job = SD3.sample(model, 20000)
    next(iter(job))
    started = time.monotonic()
    with stopped(sturdy.rank_pids()[0]):
        for _ in range(2):
            job.cancel()
        with pytest.raises(Cancelled):
            job.result()
    assert time.monotonic() - started < STEP_TIMEOUT_S + 2
    assert client.jobs() == []
    assert client.stats()["jobs_total"] == {**before, "cancelled": before["cancelled"] + 1}
    SD3.check(model)


def test_of_what_waits_behind_the_hang(sturdy: Daemon, client: Client) -> None:
    """It goes at once, and the work that hangs goes on."""
    with sturdy.client() as other:
        model = other.load(SD3.file)
        running = SD3.sample(client.load(SD3.file), 40)
        next(iter(running))
        with stopped(sturdy.rank_pids()[1]):
            queued = SD3.sample(model, 4)
            started = time.monotonic()
            queued.cancel()
            with pytest.raises(Cancelled, match="at step 0 of 4"):
                queued.result()
            assert time.monotonic() - started < STEP_TIMEOUT_S
        assert running.result().isfinite().all()

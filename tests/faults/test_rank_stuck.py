"""A rank stands still: after `group.step_timeout_s` all are replaced, and the work runs again."""

from __future__ import annotations

import time

import pytest
from helpers import FLUX, SD3, Daemon, stopped

from tacod_client import Cancelled, Client

from .conftest import STEP_TIMEOUT_S


def test_is_found_and_replaced(sturdy: Daemon, client: Client) -> None:
    model = client.load(FLUX.file)
    before = client.status()["group"]["restarts"]
    victim = sturdy.rank_pids()[1]
    started = time.monotonic()
    with stopped(victim):
        FLUX.check(model)
    assert time.monotonic() - started > STEP_TIMEOUT_S
    assert model.stats.retries == 1
    assert client.status()["group"]["restarts"] == before + 1
    assert f"rank 1 (pid {victim})" in sturdy.log
    assert "stuck: no answer to forward within" in sturdy.log


def test_a_cancelled_run_ends_within_the_deadline(sturdy: Daemon, client: Client) -> None:
    model = client.load(SD3.file)
    job = SD3.sample(model, 20000)
    next(iter(job))
    started = time.monotonic()
    with stopped(sturdy.rank_pids()[0]):
        job.cancel()
        with pytest.raises(Cancelled):
            job.result()
    assert time.monotonic() - started < STEP_TIMEOUT_S + 2
    assert client.jobs() == []
    SD3.check(model)

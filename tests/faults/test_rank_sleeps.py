"""A rank is stuck in Python: after `group.step_timeout_s` its stack is in the log and all ranks are replaced."""

from __future__ import annotations

import time

from helpers import FLUX, Daemon

from tacod_client import Client

from .conftest import STEP_TIMEOUT_S, Inject


def test_is_found_and_replaced(sturdy: Daemon, client: Client, inject: Inject) -> None:
    model = client.load(FLUX.file)
    inject(kind="sleep", rank=0)
    begin, started = len(sturdy.log), time.monotonic()
    FLUX.check(model)
    assert time.monotonic() - started > STEP_TIMEOUT_S
    assert model.stats.retries == 1
    log = sturdy.log[begin:]
    assert "stuck: no answer to forward within" in log
    # faulthandler's view of the rank that sleeps, and of the one that waits for it.
    sleeping, waiting = log.split("rank 0: ")[-1].split("rank 1: ")
    assert "in inject" in sleeping
    assert "in all_to_all" in waiting

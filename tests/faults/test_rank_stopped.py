"""A rank is stopped, or waits in an exchange: after `group.step_timeout_s` all are replaced, the work runs again."""

from __future__ import annotations

import re
import time

from helpers import FLUX, Daemon, stopped

from tacod_client import Client

from .conftest import STEP_TIMEOUT_S, Inject


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


def test_in_an_exchange(sturdy: Daemon, client: Client, inject: Inject) -> None:
    """As NCCL would have it: the process runs, and waits for a peer that never sends."""
    model = client.load(FLUX.file)
    inject(kind="collective", rank=1, when="after")
    begin = len(sturdy.log)
    FLUX.check(model)
    assert model.stats.retries == 1
    log = sturdy.log[begin:]
    assert re.search(r"rank 1 \(pid \d+\) stuck: no answer to forward within", log)
    assert "in broadcast" in log

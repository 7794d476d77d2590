"""A rank raises in a step: all are replaced and the step runs again; when retries don't help, its traceback comes.

What all ranks raise alike is the answer, and no rank is lost.
"""

from __future__ import annotations

import pytest
from helpers import FLUX, SD3, Daemon

from tacod_client import Client, EngineError, RankFailed

from .conftest import Inject


def test_each_time(sturdy: Daemon, client: Client, inject: Inject) -> None:
    model = client.load(FLUX.file)
    before = client.stats()
    # Twice the same is enough: what retries are left are not used.
    inject({"group.retries": 3}, kind="raise", rank=1, always=True)
    with pytest.raises(RankFailed, match=r"forward failed 2 times") as caught:
        FLUX.check(model)
    assert "rank 1 (cpu:1) raised:" in caught.value.message
    assert "RuntimeError: a fault on purpose in rank 1" in caught.value.message
    assert caught.value.details["attempts"] == 2
    after = client.stats()
    assert after["jobs_total"]["failed"] == before["jobs_total"]["failed"] + 1
    assert after["group_restarts"] == before["group_restarts"] + 2


def test_once_under_another_clients_run(sturdy: Daemon, client: Client, inject: Inject) -> None:
    """The forward that has the fault is run again; the run between whose steps it came begins anew."""
    model = client.load(FLUX.file)
    inject(kind="raise", rank=0)
    with sturdy.client() as other:
        job = SD3.sample(other.load(SD3.file), 12)
        FLUX.check(model)
        job.result()
    assert model.stats.retries == 1


def test_all_of_them_alike(sturdy: Daemon, client: Client, inject: Inject) -> None:
    model = client.load(FLUX.file)
    other = client.load(SD3.file)
    before = client.status()["group"]
    inject(kind="raise", always=True)
    with pytest.raises(EngineError, match="forward failed on all ranks alike, which go on: RuntimeError: a fault"):
        FLUX.check(model)
    inject(kind="raise", at="sample", skip=1)
    with pytest.raises(EngineError, match="sample failed on all ranks alike"):
        SD3.sample(other, 3).result()
    FLUX.check(model)
    after = client.status()["group"]
    assert after["restarts"] == before["restarts"]
    assert [rank["pid"] for rank in after["ranks"]] == [rank["pid"] for rank in before["ranks"]]

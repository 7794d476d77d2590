"""A request that needs more memory than there is: `OutOfMemory` with what was asked and what is free."""

from __future__ import annotations

import pytest
from helpers import FLUX, SD3, Daemon, eventually

from tacod_client import Client, Model, OutOfMemory

from .conftest import STEP_TIMEOUT_S, Inject

ASKED = r"tried to allocate \d+\.\d\d GiB, and \d+\.\d\d GiB are free; use a smaller image"


def load_alone(client: Client, file: str) -> Model:
    """The model, and no other: one that nobody uses would make room for it, and the step be done again."""
    model = client.load(file)
    for other in client.status()["models"]:
        if other["id"] != model.id:
            client.unload(other["id"])
    return model


def test_on_all_ranks(sturdy: Daemon, client: Client, inject: Inject) -> None:
    """They agree, so they stay."""
    model = load_alone(client, FLUX.file)
    pids, restarts = sturdy.rank_pids(), client.status()["group"]["restarts"]
    inject(kind="out_of_memory")
    with pytest.raises(OutOfMemory, match=ASKED):
        FLUX.check(model)
    FLUX.check(model)
    assert sturdy.rank_pids() == pids
    assert client.status()["group"]["restarts"] == restarts
    assert model.stats.retries == 0


def test_in_the_middle_of_a_run(sturdy: Daemon, client: Client, inject: Inject) -> None:
    model = load_alone(client, SD3.file)
    pids = sturdy.rank_pids()
    inject(kind="out_of_memory", at="sample", skip=3)
    job = SD3.sample(model, 8)
    with pytest.raises(OutOfMemory, match=ASKED):
        job.result()
    assert SD3.sample(model, 4).result().isfinite().all()
    assert sturdy.rank_pids() == pids


def test_on_one_rank_while_another_waits_for_it(sturdy: Daemon, client: Client, inject: Inject) -> None:
    """The other is stuck and is replaced; to ask for the same memory again would be of no use."""
    model = load_alone(client, FLUX.file)
    before = client.status()["group"]["restarts"]
    inject(kind="out_of_memory", rank=1)
    begin = len(sturdy.log)
    with pytest.raises(OutOfMemory, match=ASKED):
        FLUX.check(model)
    eventually(lambda: client.status()["group"]["restarts"] == before + 1, STEP_TIMEOUT_S, "one restart")
    assert "another rank reported: host out of memory" in sturdy.log[begin:]

"""`systemctl restart tacod` under a client's job: it waits for the next daemon, and ends with the same picture."""

from __future__ import annotations

import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import pytest
from helpers import FLUX, FP32, SD3, START_S, Daemon, Interrupted, Interruption, eventually, relative_error, stopped
from torch import Tensor

from tacod_client import Model, Unavailable

FORWARDS = 80
STEPS = 160
"""More than are done in `DRAIN_S`, while another client has its turns."""
DRAIN_S = 0.2


def forwards(model: Model, under_way: Event) -> Tensor:
    """As ComfyUI's samplers do it: each forward begins with what the last one gave."""
    inputs = SD3.inputs()
    for step in range(FORWARDS):
        inputs["x"] = model.forward(**inputs)
        if step == 5:
            under_way.set()
    x: Tensor = inputs["x"]
    return x


def one_run(model: Model, under_way: Event) -> Tensor:
    """As a script does it."""
    job = SD3.sample(model, STEPS)
    for event in job:
        if event.step > 5:
            under_way.set()
    x: Tensor = job.result()
    return x


def test_jobs_go_on_with_the_next_daemon(models: Path) -> None:
    """Another client's long run is what it would drain for; that one is given up after `drain_timeout_s`."""
    with (
        Daemon(1, [models], {"drain_timeout_s": DRAIN_S}) as daemon,
        daemon.client() as asks_for_forwards,
        daemon.client() as asks_for_a_run,
        daemon.client(reconnect_s=0) as other,
        ThreadPoolExecutor(2) as pool,
    ):
        asks = {forwards: asks_for_forwards, one_run: asks_for_a_run}
        models_of = {work: client.load(SD3.file) for work, client in asks.items()}
        undisturbed = {work: work(model, Event()) for work, model in models_of.items()}
        boot_id = asks_for_a_run.boot_id
        long = SD3.sample(other.load(SD3.file), 20000)
        next(iter(long))
        under_way = {work: Event() for work in asks}
        results = {work: pool.submit(work, model, under_way[work]) for work, model in models_of.items()}
        assert all(event.wait(START_S) for event in under_way.values())
        daemon.signal(signal.SIGTERM)
        with pytest.raises(Unavailable, match="safe to ask again"):
            long.result()
        assert daemon.wait() == 0
        daemon.check_leavings()
        time.sleep(0.5)
        daemon.start()
        for work, client in asks.items():
            assert relative_error(results[work].result(START_S), undisturbed[work]) <= FP32
            assert client.boot_id != boot_id
        FLUX.check(asks_for_a_run.load(FLUX.file))


def test_while_it_drains(models: Path) -> None:
    """Who has asked for nothing yet is refused at once; who waits for the next daemon can still cancel."""

    interruption = Interruption()

    with (
        Daemon(1, [models]) as daemon,
        daemon.client() as busy,
        daemon.client() as late,
        daemon.client(on_wait=interruption) as client,
    ):
        model = client.load(SD3.file)
        SD3.check(model)
        job = SD3.sample(busy.load(SD3.file), 20)
        next(iter(job))
        late.ping()
        # The rank stands still while we look, so that draining takes as long as that.
        with stopped(daemon.rank_pids()[0]), ThreadPoolExecutor(1) as pool:
            daemon.signal(signal.SIGTERM)
            eventually(lambda: late.status()["state"] == "draining", 5, "it drains")
            with pytest.raises(Unavailable, match="draining"):
                late.load(FLUX.file)
            forward = pool.submit(SD3.check, model)
            time.sleep(0.5)
            assert not forward.done()
            interruption.armed.set()
            with pytest.raises(Interrupted):
                forward.result(5)
        interruption.armed.clear()
        assert job.result().isfinite().all()
        assert daemon.wait() == 0

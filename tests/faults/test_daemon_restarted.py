"""`systemctl restart tacod` under a client's job: it waits for the next daemon, and ends with the same picture."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import pytest
from helpers import FLUX, FP32, SD3, START_S, Daemon, eventually, relative_error
from torch import Tensor

from tacod_client import Model, Unavailable

FORWARDS = 100
STEPS = 300
"""More than are done in `DRAIN_S`, while another client has its turns."""
DRAIN_S = 0.5


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


@pytest.mark.parametrize("work", [forwards, one_run])
def test_the_job_goes_on_with_the_next_daemon(models: Path, work: Callable[[Model, Event], Tensor]) -> None:
    """Another client's long run is what it would drain for; that one is given up after `drain_timeout_s`."""
    with (
        Daemon(1, [models], {"drain_timeout_s": DRAIN_S}) as daemon,
        daemon.client() as client,
        daemon.client(reconnect_s=0) as other,
        ThreadPoolExecutor(1) as pool,
    ):
        model = client.load(SD3.file)
        undisturbed = work(model, Event())
        boot_id = client.boot_id
        long = SD3.sample(other.load(SD3.file), 20000)
        next(iter(long))
        under_way = Event()
        result = pool.submit(work, model, under_way)
        assert under_way.wait(START_S)
        daemon.signal(signal.SIGTERM)
        with pytest.raises(Unavailable, match="safe to ask again"):
            long.result()
        assert daemon.wait() == 0
        daemon.check_leavings()
        time.sleep(0.5)
        daemon.start()
        assert relative_error(result.result(START_S), undisturbed) <= FP32
        assert client.boot_id != boot_id
        FLUX.check(client.load(FLUX.file))


def test_who_has_asked_for_nothing_yet_is_refused_at_once(models: Path) -> None:
    with Daemon(1, [models]) as daemon, daemon.client() as client, daemon.client() as late:
        job = SD3.sample(client.load(SD3.file), 400)
        next(iter(job))
        late.ping()
        daemon.signal(signal.SIGTERM)
        eventually(lambda: late.status()["state"] == "draining", 5, "it drains")
        with pytest.raises(Unavailable, match="draining"):
            late.load(FLUX.file)
        assert job.result().isfinite().all()
        assert daemon.wait() == 0


def test_a_click_on_cancel_is_heard_meanwhile(models: Path) -> None:
    class Interrupted(Exception):
        pass

    clicked = Event()

    def on_wait() -> None:
        if clicked.is_set():
            raise Interrupted

    with Daemon(1, [models]) as daemon, daemon.client() as busy, daemon.client(on_wait=on_wait) as client:
        model = client.load(SD3.file)
        SD3.check(model)
        job = SD3.sample(busy.load(SD3.file), 400)
        next(iter(job))
        with ThreadPoolExecutor(1) as pool:
            daemon.signal(signal.SIGTERM)
            eventually(lambda: busy.status()["state"] == "draining", 5, "it drains")
            forward = pool.submit(SD3.check, model)
            time.sleep(0.5)
            assert not forward.done()
            clicked.set()
            with pytest.raises(Interrupted):
                forward.result(5)
        clicked.clear()
        job.result()
        assert daemon.wait() == 0

"""A client that goes away loses its queue, and delays nobody."""

from __future__ import annotations

import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from helpers import SD3, Daemon, eventually

from tacod_client import Client
from tacod_client.connection import SILENCE_S

SCRIPT = """
import sys, time
import numpy as np
from tacod_client import Client
client = Client(sys.argv[1])
model = client.load(sys.argv[2])
latent = np.ones((1, 4, 9, 14), np.float32)
condition = {"context": np.ones((1, 129, 8), np.float32), "y": np.ones((1, 6), np.float32)}
levels = np.linspace(1, 0, 20001, dtype=np.float32)
jobs = [model.sample(noise=latent, latent=latent, sigmas=levels, positive=condition) for _ in range(3)]
print("queued", flush=True)
time.sleep(600)
"""


@contextmanager
def busy_client(daemon: Daemon) -> Iterator[subprocess.Popen[str]]:
    """A process with one run under way and two in the queue."""
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, daemon.endpoint, SD3.file],
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "queued\n"
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_its_work_leaves_the_queue(sturdy: Daemon, client: Client, number: int) -> None:
    with busy_client(sturdy) as process:
        assert len(client.jobs()) == 3
        process.send_signal(number)
        eventually(lambda: client.jobs() == [], 6, "its jobs are gone")
        eventually(lambda: client.status()["clients"] == 1, 6, "its session is gone")
    SD3.check(client.load(SD3.file))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_others_wait_no_longer_for_it(sturdy: Daemon, client: Client, number: int) -> None:
    """While its work is still there, one step of it for each of theirs, as if it lived; then none."""
    model = client.load(SD3.file)
    inputs = SD3.inputs()

    def median_s() -> float:
        times = []
        for _ in range(15):
            started = time.monotonic()
            model.forward(**inputs)
            times.append(time.monotonic() - started)
        return statistics.median(times)

    with busy_client(sturdy) as process:
        while_it_lives = median_s()
        process.send_signal(number)
        # What is added is for a machine that has other work.
        assert median_s() < 2 * while_it_lives + 0.02
        eventually(lambda: client.jobs() == [], 6, "its jobs are gone")
        assert median_s() < 2 * while_it_lives + 0.02


def test_closing_is_enough(sturdy: Daemon, client: Client) -> None:
    with sturdy.client() as other:
        model = other.load(SD3.file)
        jobs = [SD3.sample(model, 20000) for _ in range(2)]
        assert {job.id for job in jobs} == {told["job"] for told in client.jobs()}
    eventually(lambda: client.jobs() == [], 1, "its jobs are gone")
    SD3.check(client.load(SD3.file))


def test_one_that_does_not_read_delays_nobody(sturdy: Daemon, client: Client) -> None:
    with sturdy.client() as deaf:
        job = SD3.sample(deaf.load(SD3.file), 60)
        model = client.load(SD3.file)
        for seed in range(5):
            SD3.check(model, seed)
        assert job.result().isfinite().all()


def test_one_that_pauses_is_not_gone(patient: Daemon) -> None:
    """Between two calls nobody listens; that is no reason to think the daemon dead and to ask again."""
    with patient.client() as client:
        model = client.load(SD3.file)
        inputs = SD3.inputs(batch=8, size=(24, 24))
        model.forward(**inputs)
        # One that gave up while the daemon started may be a client still, for as long as its heartbeats are apart.
        clients = client.status()["clients"]
        before = client.stats()["forwards_total"]
        job = SD3.sample(model, 30)
        time.sleep(SILENCE_S + 0.5)
        job.result()
        time.sleep(SILENCE_S + 0.5)
        model.forward(**inputs)
        assert client.stats()["forwards_total"] == before + 31
        assert client.status()["clients"] <= clients, "it has asked for another session"

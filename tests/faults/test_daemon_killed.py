"""The daemon dies and comes back under a live client: same image, no rank left over."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import pytest
import torch
from helpers import FLUX, SD3, START_S, Daemon, eventually
from safetensors.torch import load_file, save_file
from torch import Tensor

from tacod_client import ConnectionLost

STEPS = 150
"""More than are done until a daemon is killed whose run has just begun."""


@pytest.fixture(scope="module")
def killed(models: Path) -> Iterator[Daemon]:
    """The daemon of one rank that tests kill."""
    with Daemon(1, [models]) as daemon:
        yield daemon


@pytest.fixture
def daemon(killed: Daemon) -> Daemon:
    """The same; it runs, whatever the last test did to it."""
    return killed if killed.running else killed.start()


def test_jobs_go_on_with_the_next_daemon(models: Path) -> None:
    """On several ranks; as they were asked for, whatever their caller has done with the tensors since."""
    steps = 40
    with (
        Daemon(2, [models]) as daemon,
        daemon.client() as client,
        daemon.client() as other,
        ThreadPoolExecutor(1) as pool,
    ):
        model = client.load(SD3.file)
        undisturbed = SD3.sample(model, steps).result()
        boot_id = client.boot_id
        under_way = Event()
        seen: list[int] = []

        def run() -> Tensor:
            job = SD3.sample(model, steps)
            for event in job:
                seen.append(event.step)
                under_way.set()
            out: Tensor = job.result()
            return out

        inputs = SD3.inputs()
        noise, _ = inputs.pop("x"), inputs.pop("timestep")
        y, sigmas = inputs["y"], torch.linspace(1, 0, steps + 1)
        theirs = other.load(SD3.file)
        changed = theirs.sample(noise=noise, latent=torch.zeros_like(noise), sigmas=sigmas, positive=inputs)
        next(iter(changed))
        for each in (noise, y, sigmas):
            each.zero_()
        result = pool.submit(run)
        assert under_way.wait(START_S)
        daemon.signal(signal.SIGKILL)
        assert daemon.wait() == -signal.SIGKILL
        eventually(lambda: not daemon.processes(), 10, "no rank survives")
        daemon.start()
        assert torch.equal(result.result(START_S), undisturbed)
        assert torch.equal(changed.result(), undisturbed)
        assert boot_id not in (client.boot_id, other.boot_id)
        assert seen[-steps:] == list(range(1, steps + 1))
        assert len(seen) > steps
        FLUX.check(client.load(FLUX.file))


def test_a_run_of_tacoctl_from_a_file_goes_on_with_the_next_daemon(daemon: Daemon, tmp_path: Path) -> None:
    """It loads the file again, as every client does."""
    inputs, outputs = tmp_path / "inputs", [tmp_path / name for name in ("undisturbed", "disturbed")]
    given = SD3.inputs()
    save_file({f"positive.{key}": given[key] for key in ("context", "y")}, inputs)
    with daemon.client() as client:

        def sample(output: Path) -> subprocess.Popen[str]:
            code = "import sys; from tacod_client.cli import main; sys.exit(main())"
            arguments = [
                "sample",
                SD3.file,
                str(inputs),
                "--size",
                "96x96",
                "--steps",
                str(STEPS),
                "--output",
                str(output),
            ]
            environment = {**os.environ, "TACOD_ENDPOINT": daemon.endpoint}
            command = [sys.executable, "-c", code, *arguments]
            return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)

        with sample(outputs[0]) as process:
            assert process.wait(START_S) == 0
        done = client.stats()["forwards_total"]
        with sample(outputs[1]) as process:
            eventually(lambda: client.stats()["forwards_total"] > done, START_S, "it runs")
            daemon.signal(signal.SIGKILL)
            daemon.wait()
            assert process.poll() is None
            eventually(lambda: not daemon.processes(), 10, "no rank survives")
            daemon.start()
            assert process.wait(START_S) == 0, process.communicate()[1]
    first, second = (load_file(output)["latent"] for output in outputs)
    assert torch.equal(first, second)


def test_one_that_stays_away_is_an_error_that_says_so(daemon: Daemon) -> None:
    with daemon.client(reconnect_s=1.0) as client:
        model = client.load(SD3.file)
        daemon.signal(signal.SIGKILL)
        daemon.wait()
        started = time.monotonic()
        with pytest.raises(ConnectionLost, match="systemctl status tacod"):
            SD3.check(model)
        assert 1 <= time.monotonic() - started < 6
        eventually(lambda: not daemon.processes(), 10, "no rank survives")

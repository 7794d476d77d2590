"""The disk is full, for the log and for uploads: work goes on, and what can't be written says so."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import FLUX, SD3, Daemon

from tacod_client import Unavailable

SIZE = 8 << 20


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A small disk."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount a tmpfs")
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(tmp_path)], capture_output=True, text=True
    )
    if mount.returncode != 0:
        pytest.skip(f"no tmpfs can be mounted here: {mount.stderr.strip()}")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def fill(folder: Path) -> Path:
    """Leave no byte free."""
    path = folder / "filler"
    with path.open("wb", buffering=0) as file:
        for size in (4096, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue
    assert os.statvfs(folder).f_bavail == 0
    return path


def test_work_goes_on(models: Path, small: Path) -> None:
    """And it ends as ever."""
    daemon = Daemon(1, [models], {"models.uploads": str(small / "uploads"), "log_level": "debug"})
    daemon.log_path = small / "log"
    with daemon, daemon.client() as client:
        model = client.load(SD3.file)
        filler = fill(small)
        logged = len(daemon.log)
        SD3.check(model)
        with pytest.raises(Unavailable, match="No space left on device; make room there"):
            client.upload(FLUX.model.state_dict(), {"tacod.config": json.dumps(FLUX.config)})
        os.kill(daemon.rank_pids()[0], signal.SIGKILL)
        SD3.check(model, seed=1)
        assert client.stats()["group_restarts"] == 1
        assert len(daemon.log) < logged + 4096, "the disk was full"
        filler.unlink()
        FLUX.check(client.load(client.upload(FLUX.model.state_dict(), {"tacod.config": json.dumps(FLUX.config)})))
        client.close()
        fill(small)
        daemon.stop()


def test_an_upload_that_does_not_fit_leaves_the_disk_to_the_others(models: Path, small: Path) -> None:
    notes, state = {"tacod.config": json.dumps(FLUX.config)}, FLUX.model.state_dict()
    with Daemon(1, [models], {"models.uploads": str(small)}) as daemon, daemon.client() as client:
        model = client.load(client.upload(state, notes))
        free = os.statvfs(small).f_bavail
        with daemon.client() as other, pytest.raises(Unavailable, match="No space left on device"):
            other.upload({"large": torch.zeros(4 << 20)})
        assert os.statvfs(small).f_bavail == free
        # More of them than the disk holds: old ones make room, the one that is loaded doesn't.
        each = sum(weight.nbytes for weight in state.values())
        for number in range(SIZE // each + 2):
            client.upload({**state, "img_in.bias": state["img_in.bias"] + number + 1}, notes)
        os.kill(daemon.rank_pids()[0], signal.SIGKILL)
        FLUX.check(model)

"""Two groups of a GPU each in one daemon: either gives ComfyUI's result, and both work at once."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from helpers import Daemon, read_golden, relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two groups need two GPUs"),
]

FP32_ON_GPU = 2e-5
"""GPU and CPU differ by more than two GPUs do."""
FORWARDS = 6
"""The third becomes a CUDA graph."""


@pytest.fixture(scope="module")
def daemon(models: Path) -> Iterator[Daemon]:
    with Daemon(roots=[models], gpus=[1, torch.cuda.device_count() - 1]) as daemon:
        yield daemon


@pytest.mark.parametrize("name", ["flux_dev_odd", "sd35_large"])
def test_two_clients_get_comfyuis_result_at_once(daemon: Daemon, models: Path, name: str) -> None:
    golden = read_golden(name)
    golden.save(models / f"{name}.safetensors")
    with daemon.client() as one, daemon.client() as two:
        loaded = [client.load(f"{name}.safetensors", dtype="fp32") for client in (one, two)]
        assert [model.group for model in loaded] == ["0", "1"]
        with ThreadPoolExecutor(2) as pool:
            for _ in range(FORWARDS):
                for out in pool.map(lambda model: model.forward(**golden.inputs), loaded):
                    assert relative_error(out, golden.out) <= FP32_ON_GPU
        groups = one.stats()["groups"]
        assert all(each["forwards_total"] >= FORWARDS for each in groups)
        devices = [[rank["device"] for rank in each["ranks"]] for each in one.status()["groups"]]
        assert [len(each) for each in devices] == [1, torch.cuda.device_count() - 1]
        assert len({device for each in devices for device in each}) == torch.cuda.device_count()

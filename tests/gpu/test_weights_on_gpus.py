"""Weights that GPUs hold together or that lie in the host's memory: the same bits, without and with CUDA graphs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from daemon.test_patches import MLP, QKV, lora
from helpers import FLUX, Daemon, quantized_golden_names, read_golden

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is available"),
]

WORLDS = [count for count in (1, 2, 3, 4) if count <= torch.cuda.device_count()]
FORWARDS = 4
"""As they come, captured, and replayed."""


def everyone(daemon: Daemon) -> dict[str, int]:
    """The plan by which all ranks take part: each load measures anew whether they would help such small models."""
    return {"sequence_parallel_degree": len(daemon.rank_pids())}


@pytest.fixture(scope="module", params=WORLDS, ids=lambda count: f"{count}gpu")
def gpu_daemon(request: pytest.FixtureRequest, models: Path) -> Iterator[Daemon]:
    with Daemon(roots=[models], gpus=request.param) as daemon:
        yield daemon


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp8"])
@pytest.mark.parametrize("weights", ["sharded", "host"])
def test_results_are_the_same_to_the_bit(gpu_daemon: Daemon, weights: str, dtype: str) -> None:
    plan = everyone(gpu_daemon)
    with gpu_daemon.client() as client:
        whole, apart = (
            client.load(FLUX.file, dtype=dtype, weights=each, plan=plan) for each in ("replicated", weights)
        )
        patches = [lora(QKV, 0.8), lora(MLP, -0.5, 1)]
        patched, also = (
            client.load(FLUX.file, dtype=dtype, weights=each, plan=plan, patches=patches)
            for each in ("replicated", weights)
        )
        for seed in range(FORWARDS):
            inputs = FLUX.inputs(seed)
            assert apart.forward(**inputs).equal(whole.forward(**inputs))
            assert also.forward(**inputs).equal(patched.forward(**inputs))
        told = {each["id"]: each for each in client.models()}
        expected = "replicated" if weights == "sharded" and len(told[apart.id]["resident_bytes"]) == 1 else weights
        assert told[apart.id]["weights"] == expected
        for model in (whole, apart):
            client.unload(model.id)


@pytest.mark.parametrize("weights", ["sharded", "host"])
@pytest.mark.parametrize("name", quantized_golden_names())
def test_packed_layers_are_fetched_as_they_are(gpu_daemon: Daemon, models: Path, name: str, weights: str) -> None:
    golden, file = read_golden(name), models / "packed.safetensors"
    golden.save(file)
    with gpu_daemon.client() as client:
        whole, apart = (
            client.load(file.name, weights=each, plan=everyone(gpu_daemon)) for each in ("replicated", weights)
        )
        for _ in range(FORWARDS):
            assert apart.forward(**golden.inputs).equal(whole.forward(**golden.inputs))
        for model in (whole, apart):
            client.unload(model.id)

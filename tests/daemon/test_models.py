"""Models through the daemon: exact on any number of ranks, identified by their file's state, given back."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import FLUX, FP32, SD3, Daemon, Tiny, relative_error

from tacod_client import Client, ConnectionFailed, ModelNotFound


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("tiny", [FLUX, SD3], ids=["flux", "sd3"])
def test_equals_one_process(daemons: Callable[[int], Daemon], tiny: Tiny, ranks: int) -> None:
    with daemons(ranks).client() as client:
        model = client.load(tiny.file)
        for batch, text, size in ((1, 5, (8, 8)), (2, 129, (17, 21)), (1, 1, (2, 2))):
            inputs = tiny.inputs(ranks, batch, text, size)
            assert relative_error(model.forward(**inputs), tiny.forward(**inputs)) <= FP32
        assert model.stats.forwards == 3
        assert model.stats.ranks == ranks


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_torch_comes_back_as_it_went(client: Client, dtype: torch.dtype) -> None:
    inputs = FLUX.inputs()
    inputs["x"] = inputs["x"].to(dtype)
    out = client.load(FLUX.file).forward(**inputs)
    assert (type(out), out.dtype, out.shape) == (torch.Tensor, dtype, inputs["x"].shape)
    expected = FLUX.forward(**{**inputs, "x": inputs["x"].float()})
    assert relative_error(out, expected) <= max(FP32, torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_numpy_comes_back_as_it_went(client: Client, dtype: type) -> None:
    inputs = {key: value.numpy() for key, value in SD3.inputs().items()}
    out = client.load(SD3.file).forward(**{**inputs, "x": inputs["x"].astype(dtype)})
    assert (type(out), out.dtype, out.shape) == (np.ndarray, dtype, inputs["x"].shape)


def test_a_tensor_need_not_be_contiguous(client: Client) -> None:
    inputs = SD3.inputs()
    turned = {**inputs, "x": inputs["x"].transpose(2, 3).contiguous().transpose(2, 3)}
    assert relative_error(client.load(SD3.file).forward(**turned), SD3.forward(**inputs)) <= FP32


@pytest.mark.parametrize("ranks", [1, 3])
def test_one_rank_gives_what_all_give(daemons: Callable[[int], Daemon], ranks: int) -> None:
    inputs = FLUX.inputs()
    with daemons(ranks).client() as client:
        together, alone = (
            client.load(FLUX.file),
            client.load(FLUX.file, plan={"sequence_parallel_degree": 1, "cfg_parallel": False}),
        )
        assert relative_error(alone.forward(**inputs), together.forward(**inputs)) <= FP32
        assert (alone.id, alone.stats.ranks, together.stats.ranks) == (together.id, 1, ranks)
        assert alone.stats.plan.startswith("sequence 1 (")
        assert together.stats.plan.startswith(f"sequence {ranks} (")


def test_load_is_idempotent(client: Client, models: Path) -> None:
    first, second = client.load(FLUX.file), client.load(str(models / FLUX.file))
    assert first.id == second.id
    assert [told["id"] for told in client.models()].count(first.id) == 1
    other = client.load(FLUX.file, dtype="bf16")
    assert other.id != first.id
    assert (first.dtype, other.dtype) == ("fp32", "bf16")
    assert first.parameters == other.parameters == sum(t.numel() for t in FLUX.model.state_dict().values())


def test_a_changed_file_is_another_model(client: Client, models: Path) -> None:
    before = Tiny("changing", FLUX.config, seed=1)
    path = before.save(models)
    old = client.load(before.file)
    before.check(old)

    after = Tiny("changing", FLUX.config, seed=2)
    after.save(models)
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    new = client.load(after.file)
    assert new.id != old.id
    after.check(new)
    before.check(old)
    client.unload(old.id)
    client.unload(new.id)


def test_unload_gives_the_model_back(client: Client) -> None:
    model = client.load(SD3.file, dtype="fp16")
    client.unload(model.id)
    assert model.id not in [told["id"] for told in client.models()]
    with pytest.raises(ModelNotFound, match=model.id):
        client.unload(model.id)


def test_a_model_that_another_client_unloaded_loads_itself_again(daemon: Daemon) -> None:
    with daemon.client() as one, daemon.client() as other:
        model = one.load(SD3.file)
        other.unload(model.id)
        SD3.check(model)
        assert model.id in [told["id"] for told in one.models()]


def test_two_clients_at_once(daemon: Daemon) -> None:
    def work(number: int) -> None:
        tiny = (FLUX, SD3)[number % 2]
        with daemon.client() as client:
            model = client.load(tiny.file)
            for seed in range(5):
                tiny.check(model, 10 * number + seed)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, range(2)))


def test_a_long_run_of_one_client_delays_another_by_a_step(daemon: Daemon) -> None:
    with daemon.client() as long, daemon.client() as short:
        job = SD3.sample(long.load(SD3.file), 20000)
        SD3.check(short.load(SD3.file))
        assert [told["job"] for told in short.jobs()] == [job.id]
        job.cancel()


def test_a_parallel_forward_is_compared_with_one_rank(daemons: Callable[[int], Daemon]) -> None:
    inputs = FLUX.inputs(text=17)
    with daemons(2).client() as client:
        together = client.load(FLUX.file)
        alone = client.load(FLUX.file, plan={"sequence_parallel_degree": 1, "cfg_parallel": False})
        for model in (together, alone, together):
            model.forward(**inputs)
            assert model.stats.last is not None
            if model is together:
                seen = None if alone.stats.last is None else alone.stats.last.compute_s
                assert model.stats.last.single_rank_s == seen


def test_plain_attention_gives_the_same(daemons: Callable[[int], Daemon]) -> None:
    inputs = FLUX.inputs()
    with daemons(2).client() as client:
        plain = client.load(FLUX.file, plan={"flash_attention": False})
        assert plain.plan.endswith("no flash attention)")
        assert relative_error(plain.forward(**inputs), FLUX.forward(**inputs)) <= FP32
        assert plain.stats.plan.endswith("no flash attention)")
        assert not client.load(FLUX.file).plan.endswith("no flash attention)")


def test_a_client_that_is_closed_lets_no_thread_of_its_own_wait(daemon: Daemon) -> None:
    with daemon.client() as other, ThreadPoolExecutor(1) as pool:
        job = SD3.sample(other.load(SD3.file), 4000)
        next(iter(job))
        waiting = pool.submit(job.result)
        time.sleep(0.2)
        other.close()
        with pytest.raises(ConnectionFailed, match="this client is closed"):
            waiting.result(5)

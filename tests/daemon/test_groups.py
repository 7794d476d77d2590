"""Two groups of ranks in one daemon: clients use both, and what is lost in one costs the other nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import FLUX, FP32, OFTEN, SD3, START_S, Daemon, eventually, read_golden, relative_error

from tacod.config import I_KNOW
from tacod_client import Cancelled, Client, ConfigInvalid, Job, Model, ModelNotFound

RANKS = [1, 2]
MANY_STEPS = 20000
SOON_S = 20.0
"""What takes a step or two, on a busy machine too."""
GOLDENS = ["flux_dev_odd", "sd35_large", "wan21_t2v"]


@pytest.fixture(scope="module")
def daemon(models: Path) -> Iterator[Daemon]:
    """A group of one rank, and one of two."""
    with Daemon(RANKS, [models], {"heartbeat_s": 1.0, **OFTEN}) as daemon:
        yield daemon


@pytest.fixture
def two(daemon: Daemon) -> Iterator[list[Client]]:
    """Two clients of a daemon that holds no models and has no other clients."""
    with ExitStack() as stack:
        first = stack.enter_context(daemon.client())
        eventually(lambda: first.status()["clients"] == 1, SOON_S, "earlier clients are gone")
        eventually(lambda: first.status()["state"] == "ready", START_S, "all ranks are there")
        for told in first.models():
            first.unload(told["id"])
        assert first.models() == []
        yield [first, stack.enter_context(daemon.client())]


def of_groups(client: Client) -> dict[str, dict[str, Any]]:
    """Each group's part of the status, by its name."""
    return {each["name"]: each for each in client.status()["groups"]}


def in_both(two: list[Client], file: str) -> list[Model]:
    """A model for each client, in a group of its own each."""
    loaded = [client.load(file) for client in two]
    assert [model.group for model in loaded] == ["0", "1"]
    return loaded


def begun(model: Model, steps: int = MANY_STEPS, seed: int = 0) -> Job:
    """A run that has done its first step."""
    job = FLUX.sample(model, steps, seed)
    next(iter(job))
    return job


def cancelled(job: Job) -> None:
    job.cancel()
    with pytest.raises(Cancelled):
        job.result()


@pytest.mark.parametrize("name", GOLDENS)
def test_equals_comfyui_in_either_group(two: list[Client], models: Path, name: str) -> None:
    golden = read_golden(name)
    if not (models / f"{name}.safetensors").exists():
        golden.save(models / f"{name}.safetensors")
    loaded = in_both(two, f"{name}.safetensors")
    assert loaded[0].id == loaded[1].id
    for model, ranks in zip(loaded, RANKS, strict=True):
        for _ in range(2):
            out = model.forward(**golden.inputs)
            assert relative_error(out if torch.is_tensor(out) else out[0], golden.out) <= FP32
        assert model.stats.ranks == ranks


def test_two_clients_compute_at_once(two: list[Client]) -> None:
    loaded = in_both(two, FLUX.file)
    jobs = [begun(model) for model in loaded]
    told = two[0].jobs()
    assert {(each["job"], each["group"], each["state"]) for each in told} == {
        (jobs[0].id, "0", "running"),
        (jobs[1].id, "1", "running"),
    }
    assert [each["queue"]["running"] for each in two[0].status()["groups"]] == [1, 1]
    assert two[0].status()["queue"]["running"] == 2
    for job in jobs:
        cancelled(job)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(FLUX.check, loaded, (1, 2)))


def test_a_job_that_waits_goes_to_the_group_that_is_free_first(two: list[Client]) -> None:
    loaded = in_both(two, FLUX.file)
    wanted = FLUX.sample(loaded[1], 4, seed=5).result()
    busy = [begun(model) for model in loaded]
    waits = FLUX.sample(loaded[0], 4, seed=5)
    assert {each["job"]: each["group"] for each in two[1].jobs()}[waits.id] == "0"
    cancelled(busy[1])
    assert torch.equal(waits.result(), wanted)
    assert {each["job"] for each in two[1].jobs()} == {busy[0].id}
    cancelled(busy[0])


FAULT = f"""
[testing]
i_know = "{I_KNOW}"
[[testing.faults]]
kind = "segfault"
at = "sample"
group = "1"
rank = 1
skip = 7
"""


def test_a_lost_rank_costs_its_group_time_and_the_other_nothing(daemon: Daemon, two: list[Client]) -> None:
    loaded = in_both(two, FLUX.file)
    wanted = [FLUX.sample(model, 20, seed=3).result() for model in loaded]
    before = of_groups(two[0])
    with daemon.changed({}, FAULT):
        jobs = [FLUX.sample(model, 20, seed=3) for model in loaded]
        for job, expected in zip(jobs, wanted, strict=True):
            assert torch.equal(job.result(), expected)
    assert [model.stats.retries for model in loaded] == [0, 1]
    after = of_groups(two[0])
    assert [after[name]["restarts"] - before[name]["restarts"] for name in after] == [0, 1]
    assert [rank["pid"] for rank in after["0"]["ranks"]] == [rank["pid"] for rank in before["0"]["ranks"]]
    assert two[0].status()["group"]["restarts"] == sum(each["restarts"] for each in after.values())


def test_latents_in_shared_memory_are_for_the_group_that_gets_the_job(two: list[Client]) -> None:
    loaded = in_both(two, FLUX.file)
    inputs = FLUX.inputs(size=(64, 64))
    wanted = FLUX.forward(**inputs)
    for _ in range(2):
        assert relative_error(loaded[1].forward(**inputs), wanted) <= FP32
    assert two[0].stats()["shared_bytes"] > 0
    # While its own group is busy, the same memory serves the other one.
    busy = begun(loaded[1])
    assert relative_error(loaded[1].forward(**inputs), wanted) <= FP32
    assert loaded[1].stats.ranks == 1
    cancelled(busy)


def test_unload_is_everywhere_and_patches_follow_their_base(two: list[Client], models: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    rows, columns = FLUX.model.state_dict()["img_in.weight"].shape
    up, down = torch.randn(rows, 2, generator=generator), torch.randn(2, columns, generator=generator)
    lora = [{"key": "img_in.weight", "kind": "lora", "up": up, "down": down, "alpha": 2.0}]
    loaded = in_both(two, FLUX.file)
    patched = two[1].load(FLUX.file, patches=lora)
    assert patched.group == "1"
    found = two[0].model(patched.id)
    assert found.group_in(two[0].status())["world_size"] == RANKS[1]
    assert {each["id"]: each["groups"] for each in two[0].models()} == {loaded[0].id: ["0", "1"], patched.id: ["1"]}
    assert [{model["id"] for model in each["models"]} for each in of_groups(two[0]).values()] == [
        {loaded[0].id},
        {loaded[0].id, patched.id},
    ]
    assert relative_error(patched.forward(**FLUX.inputs()), FLUX.forward(**FLUX.inputs())) > FP32
    two[0].unload(loaded[0].id)
    assert two[0].models() == []
    with pytest.raises(ModelNotFound):
        two[0].unload(loaded[0].id)
    # A client loads again what it needs.
    FLUX.check(loaded[1], seed=2)


def test_jobs_of_a_client_that_is_gone_leave_both_groups(daemon: Daemon, two: list[Client]) -> None:
    in_both(two, FLUX.file)
    with daemon.client() as gone:
        model = gone.load(FLUX.file)
        jobs = [FLUX.sample(model, MANY_STEPS) for _ in range(3)]
        assert two[0].status()["queue"] == {"running": 2, "queued": 1}
        assert len({each["job"] for each in two[0].jobs()}) == len(jobs)
    eventually(lambda: not two[0].jobs(), SOON_S, "its jobs are gone")


def test_a_reload_is_by_group(daemon: Daemon, two: list[Client]) -> None:
    text = daemon.config.read_text()
    try:
        daemon.config.write_text(text.replace("ranks = 2\n", "ranks = 2\nstep_timeout_s = 77.0\n"))
        assert two[0].reload() == ["group.1.step_timeout_s"]
        for change, told in (
            (text.replace("ranks = 2\n", "ranks = 3\n"), r"group\.1\.ranks: can't change while tacod runs"),
            (text + '[[group]]\ndevice = "cpu"\n', "group: tacod runs groups 0, 1, and the file has 0, 1, 2"),
            (text.replace("ranks = 1\n", 'ranks = 1\nname = "1"\n'), "group: 2 groups are named '1'"),
        ):
            daemon.config.write_text(change)
            with pytest.raises(ConfigInvalid, match=told):
                two[0].reload()
    finally:
        daemon.config.write_text(text)
        two[0].reload()


def test_status_and_stats_are_told_by_group(daemon: Daemon, two: list[Client]) -> None:
    for model in in_both(two, SD3.file):
        SD3.check(model)
    told, stats = two[0].status(), two[0].stats()
    assert told["group"]["world_size"] == sum(RANKS)
    assert [(rank["group"], rank["rank"], rank["device"]) for rank in told["group"]["ranks"]] == [
        ("0", 0, "cpu:0"),
        ("1", 0, "cpu:1"),
        ("1", 1, "cpu:2"),
    ]
    assert [(each["name"], each["state"], each["world_size"]) for each in told["groups"]] == [
        ("0", "ready", 1),
        ("1", "ready", 2),
    ]
    assert stats["forwards_total"] == sum(each["forwards_total"] for each in stats["groups"])
    assert all(each["forwards_total"] > 0 for each in stats["groups"])
    for verb in ("status", "stats", "models", "top --once"):
        done = subprocess.run(
            [sys.executable, "-c", "import sys; from tacod_client.cli import main; sys.exit(main())", *verb.split()],
            env={**os.environ, "TACOD_ENDPOINT": daemon.endpoint},
            capture_output=True,
            text=True,
            check=True,
        )
        assert any(line.split()[:1] == ["group"] for line in done.stdout.splitlines()), done.stdout
    metrics = subprocess.run(
        [sys.executable, "-c", "import sys; from tacod_client.cli import main; sys.exit(main())", "status", "--json"],
        env={**os.environ, "TACOD_ENDPOINT": daemon.endpoint},
        capture_output=True,
        text=True,
        check=True,
    )
    assert [each["name"] for each in json.loads(metrics.stdout)["groups"]] == ["0", "1"]


def test_a_stop_lets_both_groups_finish(daemon: Daemon, two: list[Client]) -> None:
    """The last test: it ends the daemon."""
    jobs = [begun(model, 30, seed=7) for model in in_both(two, FLUX.file)]
    daemon.signal(signal.SIGTERM)
    for job in jobs:
        assert job.result().isfinite().all()
    assert daemon.wait() == 0
    daemon.check_leavings()

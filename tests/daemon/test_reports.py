"""What the daemon tells about itself."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from typing import Any

import psutil
import pytest
import torch
from helpers import SD3, Daemon, eventually

from tacod_client import Cancelled, Client, __version__
from tacod_client.stats import PARTS


def test_status_has_what_others_read(daemon: Daemon, client: Client) -> None:
    model = client.load(SD3.file)
    told = eventually(lambda: (told := client.status())["queue"]["running"] == 0 and told, 5, "nothing runs")
    assert told["state"] == "ready"
    assert told["version"] == __version__
    assert (told["pid"], told["endpoint"], told["boot_id"]) == (daemon.pid, daemon.endpoint, client.boot_id)
    assert told["uptime_s"] > 0
    group = told["group"]
    assert (group["device"], group["world_size"], group["asked_ranks"]) == ("cpu", 2, 2)
    assert group["restarts"] == client.stats()["group_restarts"]
    required = {"rank", "pid", "device", "memory_used_bytes"}
    added = {"host", "prefix_bytes", "device_name", "memory_total_bytes", "device_memory_used_bytes", "utilization"}
    assert [set(rank) for rank in group["ranks"]] == [required | added] * 2
    assert [(rank["rank"], rank["device"]) for rank in group["ranks"]] == [(0, "cpu:0"), (1, "cpu:1")]
    for rank in group["ranks"]:
        assert rank["host"] == socket.gethostname()
        assert psutil.Process(rank["pid"]).ppid() == daemon.pid
        assert rank["memory_used_bytes"] > 0
    one = next(one for one in told["models"] if one["id"] == model.id)
    assert {"id", "name", "family", "path", "parameters", "plan", "loaded_s"} <= set(one)
    assert (one["name"], one["family"], one["parameters"]) == (SD3.file, "sd3", model.parameters)
    assert told["queue"] == {"running": 0, "queued": 0}
    assert told["clients"] >= 1


def test_devices_are_watched_while_ranks_work(client: Client) -> None:
    model = client.load(SD3.file)
    job = SD3.sample(model, 20000)

    def busy_ranks() -> list[dict[str, Any]]:
        return [rank for rank in client.status()["group"]["ranks"] if rank["utilization"]]

    ranks = eventually(lambda: len(found := busy_ranks()) == 2 and found, 15, "both ranks are seen at work")
    job.cancel()
    with pytest.raises(Cancelled):
        job.result()
    for rank in ranks:
        assert rank["device_name"] == "cpu"
        assert 0 < rank["utilization"] <= 1
        assert 0 < rank["memory_used_bytes"] < rank["memory_total_bytes"] == psutil.virtual_memory().total
        assert 0 < rank["device_memory_used_bytes"] <= rank["memory_total_bytes"]


def test_stats_have_what_others_read(client: Client) -> None:
    model = client.load(SD3.file)
    before = client.stats()
    SD3.check(model)
    SD3.sample(model, 4).result()
    after = client.stats()
    assert {"mean", "p50", "p95", "count"} == set(after["step_s"])
    assert {"queue_s", "wire_s", "compute_s", "collective_s", "retried_forwards", "group_restarts"} <= set(after)
    assert set(after["jobs_total"]) == {"result", "failed", "cancelled"}
    assert after["jobs_total"]["result"] - before["jobs_total"]["result"] == 2
    for key in ("forwards_total", "parallel_forwards_total"):
        assert after[key] - before[key] == 5
    assert after["step_s"]["count"] - before["step_s"]["count"] == 5
    assert after["rx_bytes"] > before["rx_bytes"]
    assert after["tx_bytes"] > before["tx_bytes"]
    assert set(after["store"]) == {"bytes", "hits", "misses"}


def test_the_split_of_a_step_adds_up(client: Client) -> None:
    model = client.load(SD3.file)
    started = time.perf_counter()
    for seed in range(5):
        model.forward(**SD3.inputs(seed))
    SD3.sample(model, 20).result()
    elapsed_s = time.perf_counter() - started

    stats = model.stats
    parts = [getattr(stats, f"{part}_s") for part in PARTS]
    assert all(part > 0 for part in parts)
    assert sum(parts) == pytest.approx(stats.seconds)
    assert stats.seconds <= elapsed_s
    assert (stats.forwards, stats.samples, stats.steps, stats.parallel_steps, stats.retries) == (5, 1, 25, 25, 0)

    told = client.stats()
    parts_told = (told["queue_s"], told["wire_s"], told["compute_s"], told["collective_s"])
    assert sum(parts_told) == pytest.approx(told["step_s"]["mean"])
    assert told["step_s"]["p50"] <= told["step_s"]["p95"]


def test_forwards_that_were_skipped_are_told(client: Client, daemon: Daemon) -> None:
    model = client.load(SD3.file, plan={"step_cache": 1e9})
    before = client.stats()["skipped_forwards_total"]
    SD3.sample(model, 6).result()
    assert model.stats.skipped == 4, "the first is computed, and the one after four"
    given = SD3.inputs()
    for level in (900.0, 800.0, 700.0):
        model.forward(**{**given, "timestep": torch.full((1,), level)})
    assert model.stats.skipped == 6
    with daemon.client() as other:
        # The same conditioning at a lower noise level, but of another client.
        theirs = other.load(SD3.file, plan={"step_cache": 1e9})
        theirs.forward(**{**given, "timestep": torch.full((1,), 600.0)})
        assert theirs.stats.skipped == 0
    assert client.stats()["skipped_forwards_total"] - before == 6
    assert "step cache 1e+09" in model.stats.plan


def test_jobs_are_told_while_they_last(client: Client) -> None:
    model = client.load(SD3.file)
    running, queued = SD3.sample(model, 20000), SD3.sample(model, 20000)
    next(iter(running))
    told = client.jobs()
    assert [(one["job"], one["verb"], one["state"]) for one in told] == [
        (running.id, "sample", told[0]["state"]),
        (queued.id, "sample", "queued"),
    ]
    assert 0 < told[0]["step"] < told[0]["total"] == 20000
    assert (told[0]["model"], f"pid {os.getpid()}" in told[0]["client"]) == (model.id, True)
    assert sum(client.status()["queue"].values()) == 2
    queued.cancel()
    running.cancel()


def test_ping_is_quick(client: Client) -> None:
    assert min(client.ping() for _ in range(5)) < 0.1


@pytest.mark.parametrize("module", ["tacod_client", "tacod_client.cli", "tacod.daemon"])
def test_the_supervisor_and_the_client_import_no_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

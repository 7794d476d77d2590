"""Ranks on the hosts of a Ray cluster: the same numbers, the same promises."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import FLUX, FP32, OFTEN, SOON_S, Daemon, Tiny, eventually, read_golden, relative_error
from ray_cluster import GOLDENS, LONG_S, SLOW, Cluster, check, running, wait_for_ready

from tacod_client import Cancelled

SLOW_BLOCKS = SLOW.replace("30.0", "2.0") + 'when = "block"\nalways = true\n'
DEEP = Tiny("deep_flux", {**FLUX.config, "depth": 3, "depth_single_blocks": 27})
"""Of which a forward with slow blocks takes longer than a test may."""


def tacoctl(daemon: Daemon, *words: str) -> str:
    code = "import sys; from tacod_client.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "--endpoint", daemon.endpoint, *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def on_ray(cluster: Cluster, ranks: int, roots: list[Path], **settings: Any) -> Daemon:
    return Daemon(
        ranks,
        roots,
        {**OFTEN, "group.launcher": "ray", "group.ray_address": cluster.address, **settings},
        wait=False,
    )


def test_three_ranks_on_two_hosts(cluster: Cluster, goldens: Path) -> None:
    DEEP.save(goldens)
    with on_ray(cluster, 3, [goldens]) as daemon:
        wait_for_ready(daemon)
        for name in GOLDENS:
            check(daemon, name, 3)
        check_cancel(daemon)


def check_cancel(daemon: Daemon) -> None:
    """A long forward stops before the same block on both hosts, and the ranks live on."""
    inputs, pids = DEEP.inputs(), daemon.rank_pids()
    with daemon.client() as client, daemon.client() as watcher, ThreadPoolExecutor() as others:
        model = client.load(DEEP.file)
        with daemon.changed({}, SLOW_BLOCKS):
            forward = others.submit(lambda: model.forward(**inputs))
            (job,) = eventually(lambda: [each for each in watcher.jobs() if each["block"]], LONG_S, "it is in a block")
            began_s = time.monotonic()
            assert watcher.cancel(job["job"]) == "cancelling"
            with pytest.raises(Cancelled):
                forward.result()
            # All of its 30 blocks would take a minute.
            assert time.monotonic() - began_s < 40
        assert relative_error(model.forward(**inputs), DEEP.forward(**inputs)) <= FP32
    assert daemon.rank_pids() == pids


def test_a_lost_host_costs_time_and_not_the_result(cluster: Cluster, goldens: Path) -> None:
    golden = read_golden("flux_dev")
    with on_ray(cluster, 4, [goldens]) as daemon:
        wait_for_ready(daemon)
        with daemon.client() as client:
            group = client.status()["group"]
            assert len({rank["host"] for rank in group["ranks"]}) == 2
            assert (group["world_size"], group["asked_ranks"]) == (4, 4)
            # Ranks on other hosts share no memory with clients.
            assert client.stats()["shared_bytes"] == 0
            check(daemon, "sd35_large", 4)
            model = client.load("flux_dev.safetensors")
            for layout in ({"ulysses": 2, "ring": 2}, "auto"):
                again = client.load("flux_dev.safetensors", plan=layout)
                assert relative_error(again.forward(**golden.inputs), golden.out) <= FP32
                assert again.stats.ranks == 4
            with daemon.changed({}, SLOW), ThreadPoolExecutor() as others:
                forward = others.submit(lambda: model.forward(**golden.inputs))
                eventually(lambda: running(daemon), SOON_S * 10, "the forward runs")
                cluster.kill(cluster.second)
                out = forward.result()
            assert relative_error(out, golden.out) <= FP32
            group = client.status()["group"]
            assert (group["world_size"], group["asked_ranks"]) == (2, 4)
            assert len({rank["host"] for rank in group["ranks"]}) == 1
            assert "fewer than group.ranks = 4" in daemon.log
            assert "2 of 4 ranks on cpu" in tacoctl(daemon, "status")
            cluster.second = cluster.add()
            eventually(lambda: client.status()["group"]["world_size"] == 4, LONG_S, "the host's ranks are back", 0.2)
            out = model.forward(**golden.inputs)
            assert relative_error(out, golden.out) <= FP32
            assert model.stats.ranks == 4


def test_groups_that_start_at_once_take_a_host_each(cluster: Cluster, goldens: Path) -> None:
    settings = {**OFTEN, "group.launcher": "ray", "group.ray_address": cluster.address}
    with Daemon([2, 2], [goldens], settings, wait=False) as daemon:
        wait_for_ready(daemon)
        with daemon.client() as client:
            hosts = [{rank["host"] for rank in group["ranks"]} for group in client.status()["groups"]]
        # Each host has two devices, so they are on two.
        assert [len(each) for each in hosts] == [1, 1]
        assert "has not begun" not in daemon.log
        assert "ending all ranks" not in daemon.log
        check(daemon, GOLDENS[0], 2)


def test_devices_of_a_host_are_held_once(cluster: Cluster) -> None:
    import ray

    from tacod.group.ray.cluster import Cluster as Client

    async def take() -> None:
        first, second = Client(cluster.address), Client(cluster.address)
        a, b = sorted(node.id for node in await first.nodes("CPU"))
        assert await first.hold({b: 2}, "CPU") is not None
        # It gets neither, and keeps nothing of the one that is free.
        assert await second.hold({a: 2, b: 2}, "CPU") is None
        assert not second.agents
        assert await first.hold({b: 2, a: 2}, "CPU") is not None
        assert [agent.node for agent in first.agents.values()] == [b, a]
        await first.close()
        for _ in range(20):
            if await second.hold({a: 2, b: 1}, "CPU") is not None:
                break
        assert {node: agent.count for node, agent in second.agents.items()} == {a: 2, b: 1}
        told = await asyncio.wait_for(second.agents[b].actor.describe.remote(), LONG_S)
        assert told["devices"] == ["cpu:0"]
        await second.close()

    ray.init(address=cluster.address, log_to_driver=False)
    try:
        asyncio.run(take())
    finally:
        ray.shutdown()


def test_each_host_holds_weights_for_its_ranks(cluster: Cluster, goldens: Path) -> None:
    FLUX.save(goldens)
    key, inputs = "double_blocks.1.img_attn.qkv.weight", FLUX.inputs()
    diff = torch.full(FLUX.model.state_dict()[key].shape, 0.01)
    patch = {"key": f"diffusion_model.{key}", "kind": "diff", "diff": diff, "strength": 1.0}
    outs = []
    with on_ray(cluster, 4, [goldens]) as daemon:
        wait_for_ready(daemon)
        for weights in ("replicated", "sharded", "host"):
            with daemon.client() as client:
                model = client.load(FLUX.file, weights=weights)
                patched = client.load(FLUX.file, [patch], weights=weights)
                (told, *_) = client.models()
                assert told["weights"] == weights
                assert (min(told["streamed_bytes"]) > 0) is (weights != "replicated")
                assert len(told["streamed_bytes"]) == 4
                outs.append([each.forward(**inputs) for each in (model, patched, model)])
                client.unload(model.id)
    for each in outs[1:]:
        assert all(map(torch.equal, each, outs[0]))
    assert relative_error(outs[0][0], FLUX.forward(**inputs)) <= FP32
    assert not torch.equal(outs[0][0], outs[0][1])


def test_a_cluster_that_is_too_small_is_a_wrong_configuration(cluster: Cluster) -> None:
    with on_ray(cluster, 64, []) as daemon:
        assert daemon.wait(LONG_S) == 78
        assert "is too small: 4 of 4 CPUs free" in daemon.log
        assert "group.ranks asks for 64" in daemon.log
        daemon.check_leavings()


def test_where_no_cluster_answers(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'taco-dit[ray]'")
    nowhere = {"group.launcher": "ray", "group.ray_address": "127.0.0.9:1", "group.max_restarts": 0}
    with Daemon(2, [tmp_path], nowhere, wait=False) as daemon:
        assert daemon.wait(LONG_S) == 1
        assert "no Ray cluster answers at 127.0.0.9:1 (group.ray_address)" in daemon.log
        daemon.check_leavings()

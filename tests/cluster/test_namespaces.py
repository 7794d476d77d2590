"""Ranks on hosts that share nothing but a network: files come by it, and a host that falls silent costs time alone."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from helpers import FP32, OFTEN, SOON_S, Daemon, eventually, read_golden, relative_error
from ray_cluster import GOLDENS, SLOW, check, running, wait_for_ready
from ray_namespaces import NamespaceCluster, NamespaceHost, why_not

SILENT_S = 150.0
"""A host that fell silent is missed after 35 s, and new ranks take their time on a busy machine."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[NamespaceCluster]:
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'taco-dit[ray]'")
    if reason := why_not():
        pytest.skip(reason)
    made = NamespaceCluster()
    try:
        yield made
    finally:
        made.close()


def on_hosts(cluster: NamespaceCluster, ranks: int, goldens: Path, **settings: Any) -> Daemon:
    on_ray = {"group.launcher": "ray", "group.ray_address": cluster.address}
    daemon = Daemon(
        ranks,
        [goldens],
        {**OFTEN, **on_ray, "group.model_cache": str(goldens / "cache"), **settings},
        wait=False,
    )
    daemon.wrapper = cluster.head.inside
    return daemon


def rank_environments(host: NamespaceHost) -> list[dict[str, str]]:
    """The environments of the ranks of a host."""
    found = []
    for pid in host.pids():
        text = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
        variables = dict(each.split("=", 1) for each in text.split("\0") if "=" in each)
        if "GLOO_SOCKET_IFNAME" in variables:
            found.append(variables)
    return found


def test_three_ranks_on_two_hosts_of_which_one_has_no_file(cluster: NamespaceCluster, goldens: Path) -> None:
    with on_hosts(cluster, 3, goldens) as daemon:
        wait_for_ready(daemon)
        with daemon.client() as client:
            hosts = {rank["host"] for rank in client.status()["group"]["ranks"]}
        assert hosts == {host.name for host in cluster.hosts}
        # Gloo itself would take the interface of the host's name.
        for host in cluster.hosts:
            environments = rank_environments(host)
            assert environments
            assert {each["GLOO_SOCKET_IFNAME"] for each in environments} == {"eth1"}
        there = Path(f"/proc/{cluster.second.pids()[0]}/root") / goldens.relative_to("/")
        assert not there.exists()
        for name in GOLDENS:
            check(daemon, name, 3)
            assert f"{name}.safetensors" in daemon.log.partition("sending ")[2]
        # A folder for each, and the one on tacod's own host was not needed.
        assert len(list((there / "cache").glob("*/model/model.safetensors"))) == len(GOLDENS)
        assert not (goldens / "cache").exists()
        sent = daemon.log.count("sending ")
        with daemon.client() as client:
            for told in client.models():
                client.unload(told["id"])
        check(daemon, GOLDENS[0], 3)
        assert daemon.log.count("sending ") == sent


def test_a_host_that_falls_silent_costs_time_and_not_the_result(cluster: NamespaceCluster, goldens: Path) -> None:
    golden = read_golden("flux_dev")
    with on_hosts(cluster, 4, goldens) as daemon:
        wait_for_ready(daemon)
        with daemon.client() as client:
            model = client.load("flux_dev.safetensors", plan={"ulysses": 2, "ring": 2})
            assert relative_error(model.forward(**golden.inputs), golden.out) <= FP32
            assert model.stats.ranks == 4
            model = client.load("flux_dev.safetensors")
            with daemon.changed({}, SLOW), ThreadPoolExecutor() as others:
                forward = others.submit(lambda: model.forward(**golden.inputs))
                eventually(lambda: running(daemon), SOON_S * 10, "the forward runs")
                cluster.cut(cluster.second)
                began_s = time.monotonic()
                out = forward.result(timeout=SILENT_S)
                print(f"{time.monotonic() - began_s:.1f} s after the host fell silent")
            assert relative_error(out, golden.out) <= FP32
            group = client.status()["group"]
            assert (group["world_size"], group["asked_ranks"]) == (2, 4)
            assert {rank["host"] for rank in group["ranks"]} == {cluster.head.name}

"""A Ray cluster on this machine, on its loopback interface alone; each raylet is a host."""

from __future__ import annotations

from typing import Any

from helpers import FP32, Daemon, eventually, read_golden, relative_error

__all__ = ["GOLDENS", "LONG_S", "QUIET", "SLOW", "Cluster", "check", "running", "wait_for_ready"]

LONG_S = 120.0
"""Longer than any start of ranks on a busy machine."""
GOLDENS = ("flux_dev", "sd35_large")
SLOW = """[testing]
i_know = "this daemon fails on purpose"
[[testing.faults]]
kind = "slow"
seconds = 30.0
"""
"""In which the first forward takes so long, unless its ranks are lost."""

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Otherwise each raylet starts a process more, which imports Ray for seconds.
    "RAY_ENABLE_METRICS_COLLECTION": "0",
}


class Cluster:
    """Hosts that can be added and killed."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster as RayCluster

        self._hosts = 0
        self._cluster: Any = RayCluster(initialize_head=True, head_node_args=self._options(2, include_dashboard=False))
        self.address: str = self._cluster.address
        try:
            self.second = self.add()
            """The host that is no head."""
        except BaseException:
            self.close()
            raise

    def _options(self, cpus: int, **more: Any) -> dict[str, Any]:
        self._hosts += 1
        # Not 127.0.0.1, for which Ray puts the machine's own address.
        address = f"127.0.0.{self._hosts + 1}"
        return {"num_cpus": cpus, "object_store_memory": 100 << 20, "node_ip_address": address, **more}

    def add(self, cpus: int = 2) -> Any:
        """Another host."""
        return self._cluster.add_node(**self._options(cpus))

    def kill(self, host: Any) -> None:
        """Have a host fail: its raylet is killed, and the kernel closes its connections."""
        self._cluster.remove_node(host, allow_graceful=False)

    def close(self) -> None:
        """End all of it."""
        self._cluster.shutdown()


def running(daemon: Daemon) -> bool:
    """Whether it computes now."""
    with daemon.client() as client:
        return bool(client.status()["queue"]["running"])


def wait_for_ready(daemon: Daemon) -> None:
    """Wait until its ranks have started on the cluster."""
    eventually(daemon._is_ready, LONG_S, "tacod is ready", every_s=0.2)


def check(daemon: Daemon, name: str, ranks: int) -> None:
    """A golden on so many ranks is what ComfyUI computed."""
    golden = read_golden(name)
    with daemon.client() as client:
        model = client.load(f"{name}.safetensors")
        assert relative_error(model.forward(**golden.inputs), golden.out) <= FP32
        assert model.stats.ranks == ranks

"""A Ray cluster on this machine, on its loopback interface alone; each raylet is a host."""

from __future__ import annotations

from typing import Any

__all__ = ["QUIET", "Cluster"]

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

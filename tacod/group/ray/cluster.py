"""The hosts of a Ray cluster, as its client sees them, and the actors that hold devices there."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tacod.group.ray.host import Host
from tacod.group.ray.placement import Node

__all__ = ["Agent", "Cluster", "Lost"]

LOST_S = 30.0
"""How long a host whose actor was lost is left out, unless Ray says sooner that it is gone."""
CLOSE_S = 3.0
"""How long the actors have to leave nothing behind."""


class Lost(Exception):
    """A generation is over; says why."""

    def __init__(self, reason: str, cause: str = "", configuration: bool = False) -> None:
        super().__init__(reason)
        self.cause = cause
        self.configuration = configuration
        """Whether the configuration asks for what the cluster isn't."""


@dataclass
class Agent:
    """The actor of one host."""

    node: str
    count: int
    """How many devices it holds."""
    actor: Any
    name: str = ""
    devices: list[str] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)


class Cluster:
    """The actors of this client, at most one on each host; they live on from one generation of ranks to the next."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.agents: dict[str, Agent] = {}
        """By node."""
        self._lost: dict[str, float] = {}
        """When the actors of nodes were lost."""

    async def nodes(self, resource: str) -> list[Node]:
        """The hosts that can be had, with the devices that actors here hold counted as free."""
        # The cluster's head may be slow to tell, and packets are not to wait for it.
        known, free = await asyncio.to_thread(_told_by_head)
        now = time.monotonic()
        found = []
        for node in known:
            node_id = node["NodeID"]
            if not node["Alive"] or now < self._lost.get(node_id, 0.0) + LOST_S:
                continue
            held = self.agents[node_id].count if node_id in self.agents else 0
            total = int(node["Resources"].get(resource, 0))
            free_now = int(free.get(node_id, {}).get(resource, 0)) + held
            found.append(Node(node_id, node["NodeManagerHostname"], min(free_now, total), total))
        return found

    def agent(self, node: str, count: int, resource: str) -> Agent:
        """The actor that holds so many devices of a node: the one that is there, or a new one."""
        known = self.agents.get(node)
        if known is not None and known.count == count:
            return known
        if known is not None:
            self.drop(node)
        options: dict[str, Any] = {"num_gpus": count} if resource == "GPU" else {"num_cpus": count}
        made = ray.remote(Host).options(
            **{"num_cpus": 0, **options},
            max_restarts=0,
            max_concurrency=1000,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
        )
        self.agents[node] = Agent(node, count, made.remote())
        return self.agents[node]

    def drop(self, node: str, lost: bool = False) -> None:
        """End a node's actor; one that was lost makes its node be left out for a while."""
        agent = self.agents.pop(node, None)
        if agent is None:
            return
        if lost:
            self._lost[node] = time.monotonic()
        with suppress(RayError, ValueError):
            ray.kill(agent.actor)

    async def close(self) -> None:
        """End all actors, which leave nothing behind."""
        ends = [agent.actor.close.remote() for agent in self.agents.values()]
        if ends:
            await asyncio.wait([asyncio.ensure_future(end) for end in ends], timeout=CLOSE_S)
        for node in list(self.agents):
            self.drop(node)


def _told_by_head() -> tuple[list[dict[str, Any]], dict[str, dict[str, float]]]:
    """All nodes, and what is free on each by its id."""
    from ray._private.state import available_resources_per_node

    return ray.nodes(), available_resources_per_node()

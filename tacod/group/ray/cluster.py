"""The hosts of a Ray cluster, as its client sees them, and the actors that hold devices there."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from tacod.group.ray.host import Host
from tacod.group.ray.placement import Node

__all__ = ["LOST_S", "SILENT_S", "Agent", "Cluster", "Lost"]

LOST_S = 30.0
"""How long a host whose actor was lost is left out, unless Ray says sooner that it is gone."""
SILENT_S = 120.0
"""The same for a host that doesn't answer; Ray itself takes a minute to say so."""
RESERVE_S = 5
"""How long Ray has to reserve a host's devices; if they are free, it takes well below a second."""
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
    reserved: PlacementGroup
    """What holds them."""
    name: str = ""
    devices: list[str] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)


class Cluster:
    """The actors of this client, at most one on each host; they live on from one generation of ranks to the next."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.agents: dict[str, Agent] = {}
        """By node."""
        self._out: dict[str, float] = {}
        """Until when nodes are left out."""
        self._ends: set[asyncio.Future[None]] = set()
        """What ends actors that were dropped."""
        self._one = asyncio.Lock()
        """One start after the other reserves devices."""

    async def nodes(self, resource: str) -> list[Node]:
        """The hosts that can be had, with the devices that actors here hold counted as free."""
        await self._ended()
        # The cluster's head may be slow to tell, and packets are not to wait for it.
        known, free = await asyncio.to_thread(_told_by_head)
        now = time.monotonic()
        found = []
        for node in known:
            node_id = node["NodeID"]
            if not node["Alive"] or now < self._out.get(node_id, 0.0):
                continue
            held = self.agents[node_id].count if node_id in self.agents else 0
            total = int(node["Resources"].get(resource, 0))
            free_now = int(free.get(node_id, {}).get(resource, 0)) + held
            found.append(Node(node_id, node["NodeManagerHostname"], min(free_now, total), total))
        return found

    async def hold(self, counts: Mapping[str, int], resource: str) -> list[Agent] | None:
        """The actors that hold so many devices of each node, in this order: those that are there, or new ones.

        None if something else has taken some of the devices; then no new ones hold any. It isn't to be cancelled, as
        devices that it has reserved by then would be lost.
        """
        async with self._one:
            return await self._hold(counts, resource)

    async def _hold(self, counts: Mapping[str, int], resource: str) -> list[Agent] | None:
        for node in [each for each, agent in self.agents.items() if counts.get(each) != agent.count]:
            self.drop(node)
        await self._ended()
        reserved: dict[str, PlacementGroup] = {}
        try:
            # In the same order for all groups: so no two of them wait for each other.
            for node in sorted({*counts}.difference(self.agents)):
                reserved[node] = await asyncio.to_thread(_reserve, node, {resource: counts[node]})
        except BaseException as error:
            for held in reserved.values():
                await asyncio.to_thread(_give_back, held)
            if isinstance(error, _Taken):
                return None
            raise
        for node, held in reserved.items():
            options: dict[str, Any] = {"num_gpus": counts[node]} if resource == "GPU" else {"num_cpus": counts[node]}
            made = ray.remote(Host).options(
                **{"num_cpus": 0, **options},
                max_restarts=0,
                max_concurrency=1000,
                scheduling_strategy=PlacementGroupSchedulingStrategy(held),
            )
            self.agents[node] = Agent(node, counts[node], made.remote(), held)
        return [self.agents[node] for node in counts]

    def drop(self, node: str, out_s: float = 0.0) -> None:
        """Have a node's actor end, and leave the node out for so long. It waits for nothing."""
        agent = self.agents.pop(node, None)
        if agent is None:
            return
        if out_s:
            self._out[node] = time.monotonic() + out_s
        # The cluster's head may not answer, and others are to hear at once that a host is lost.
        self._ends.add(asyncio.get_running_loop().run_in_executor(None, _end, agent))

    async def _ended(self) -> None:
        """Wait until the devices of dropped actors have been given back."""
        while self._ends:
            done, _ = await asyncio.wait(self._ends)
            self._ends -= done
            for end in done:
                end.result()

    async def close(self) -> None:
        """End all actors, which leave nothing behind."""
        ends = [agent.actor.close.remote() for agent in self.agents.values()]
        if ends:
            await asyncio.wait([asyncio.ensure_future(end) for end in ends], timeout=CLOSE_S)
        for node in list(self.agents):
            self.drop(node)
        await self._ended()


class _Taken(Exception):
    """Devices are not free."""


def _reserve(node: str, bundle: dict[str, float]) -> PlacementGroup:
    """Reserve devices of a node. Raises `_Taken` if they are not free."""
    held = placement_group([bundle], bundle_label_selector=[{"ray.io/node-id": node}])
    try:
        if not held.wait(RESERVE_S):
            raise _Taken
    except BaseException:
        # Or Ray would reserve them later, for nobody.
        _give_back(held)
        raise
    return held


def _end(agent: Agent) -> None:
    with suppress(RayError, ValueError):
        ray.kill(agent.actor)
    _give_back(agent.reserved)


def _give_back(held: PlacementGroup) -> None:
    with suppress(RayError, ValueError):
        remove_placement_group(held)


def _told_by_head() -> tuple[list[dict[str, Any]], dict[str, dict[str, float]]]:
    """All nodes, and what is free on each by its id."""
    from ray._private.state import available_resources_per_node

    return ray.nodes(), available_resources_per_node()

"""The process between the supervisor and a Ray cluster: it is the cluster's client, and owns the hosts' actors.

It keeps the actors from one generation of ranks to the next, so that their fork servers stay warm. When it ends, Ray
ends its actors, and the ranks end with those.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tacod import __version__, logs, prctl
from tacod.group.arena import Arena
from tacod.group.ray.files import FoundFile, find_files
from tacod.group.ray.host import Host
from tacod.group.ray.launcher import CONTROL, LOAD, MESSAGE_BYTES, RANK, WATCHED
from tacod.group.ray.placement import Node, describe, place
from tacod.group.work import Begun, Load, Progress, read_envelope, read_report

__all__ = ["main"]

log = logging.getLogger("tacod.ray")

INLINE_BYTES = 64 << 10
"""From this size on contents go by the object store: once to each host."""
ROOM_S = 20.0
"""How long to wait for devices that are there and not free; those of ranks before may not have been given back yet."""
LOST_S = 30.0
"""How long a host whose actor was lost is left out, unless Ray says sooner that it is gone."""
LOOK_S = 2.0
"""How often to look whether fewer ranks than asked for could be more."""
BEGIN_S = 60.0
"""How long an actor has to begin; it imports Ray and this package."""
KILL_S = 5.0
"""How long a host has to end its ranks before its actor is ended."""
STOP_S = 0.05
"""How often to look whether the supervisor asks for a stop."""


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


class Bridge:
    """Does what the supervisor asks for, one request after the other."""

    def __init__(self, supervisor: socket.socket, address: str) -> None:
        self.address = address
        self._supervisor = supervisor
        self._requests: asyncio.Queue[tuple[bytes, list[int]]] = asyncio.Queue()
        self._agents: dict[str, Agent] = {}
        """By node, those that live on between generations."""
        self._lost: dict[str, float] = {}
        """When the actors of nodes were lost."""
        self._generation: Generation | None = None

    async def run(self) -> None:
        """Serve until the supervisor ends."""
        asyncio.get_running_loop().add_reader(self._supervisor, self._read)
        while True:
            message, descriptors = await self._requests.get()
            if not message:
                return
            if message[:1] != CONTROL:
                if self._generation is not None:
                    self._generation.deliver(message[:1], message[1:])
                continue
            request = json.loads(message[1:])
            if request["verb"] == "start":
                self._generation = Generation(self, request, Arena(descriptors[0]))
            elif request["verb"] == "stacks" and self._generation is not None:
                asyncio.create_task(self._generation.tell_stacks(request["ranks"]))  # noqa: RUF006
            elif request["verb"] == "kill":
                await self._end_generation()
                self.tell("killed", request["epoch"])

    def _read(self) -> None:
        try:
            message, descriptors, _, _ = socket.recv_fds(self._supervisor, MESSAGE_BYTES, 1, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            message, descriptors = b"", []
        if not message:
            asyncio.get_running_loop().remove_reader(self._supervisor)
        self._requests.put_nowait((message, descriptors))

    async def _end_generation(self) -> None:
        if self._generation is not None:
            await self._generation.end()
            self._generation = None

    async def close(self) -> None:
        """End everything on the cluster."""
        await self._end_generation()
        for node in list(self._agents):
            self.drop(node)

    def tell(self, what: str, epoch: int, **more: Any) -> None:
        """Tell the supervisor something about a generation."""
        self.send(CONTROL + json.dumps({"what": what, "epoch": epoch, **more}).encode())

    def send(self, message: bytes) -> None:
        """Send the supervisor a message; waits for it if it is behind."""
        with suppress(BrokenPipeError, ConnectionResetError):
            self._supervisor.send(message)

    # --- the cluster's hosts ----------------------------------------------------------------------------------------

    def nodes(self, resource: str) -> list[Node]:
        """The hosts that can be had, with the devices that actors here hold counted as free."""
        from ray._private.state import available_resources_per_node

        free = available_resources_per_node()
        now = time.monotonic()
        found = []
        for node in ray.nodes():
            node_id = node["NodeID"]
            if not node["Alive"] or now < self._lost.get(node_id, 0.0) + LOST_S:
                continue
            held = self._agents[node_id].count if node_id in self._agents else 0
            total = int(node["Resources"].get(resource, 0))
            free_now = int(free.get(node_id, {}).get(resource, 0)) + held
            found.append(Node(node_id, node["NodeManagerHostname"], min(free_now, total), total))
        return found

    def agent(self, node: str, count: int, resource: str) -> Agent:
        """The actor that holds so many devices of a node: the one that is there, or a new one."""
        known = self._agents.get(node)
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
        self._agents[node] = Agent(node, count, made.remote())
        return self._agents[node]

    def drop(self, node: str, lost: bool = False) -> None:
        """End a node's actor; one that was lost makes its node be left out for a while."""
        agent = self._agents.pop(node, None)
        if agent is None:
            return
        if lost:
            self._lost[node] = time.monotonic()
        with suppress(RayError, ValueError):
            ray.kill(agent.actor)


class Generation:
    """The ranks of one start, on all hosts."""

    def __init__(self, bridge: Bridge, request: dict[str, Any], arena: Arena) -> None:
        self._bridge = bridge
        self._epoch: int = request["epoch"]
        self._least: int = request["least"]
        self._settings: dict[str, Any] = request["settings"]
        self._start = {key: request[key] for key in ("settings", "comfyui", "fault")}
        self._asked: int = self._settings.get("ranks", 1)
        self._resource = "GPU" if self._settings.get("device", "cuda") == "cuda" else "CPU"
        self._arena = arena
        self._agents: list[Agent] = []
        self._unanswered: set[int] = set()
        """Ranks that have not answered the watched command."""
        self._following: dict[str, asyncio.Task[None]] = {}
        """What keeps the boards alike meanwhile, by node, and what looks for a stop."""
        self._over = False
        self._tasks = [asyncio.create_task(self._guarded(self._begin()))]

    async def _guarded(self, work: Any) -> None:
        """Do something, and tell the supervisor if the generation is lost by that."""
        try:
            await work
        except Lost as lost:
            self._lose(str(lost), lost.cause, lost.configuration)
        except RayError as error:
            self._lose(f"Ray: {_first_line(error)}")
        except Exception as error:
            log.exception("the bridge to Ray failed")
            self._lose(f"the bridge to Ray failed: {error!r}", cause=repr(error))

    def _lose(self, reason: str, cause: str = "", configuration: bool = False) -> None:
        if not self._over:
            self._over = True
            self._bridge.tell("lost", self._epoch, reason=reason, cause=cause, configuration=configuration)

    async def _begin(self) -> None:
        counts = await self._place()
        self._agents = [self._bridge.agent(node, count, self._resource) for node, count in counts.items()]
        told = await asyncio.gather(*(self._describe(agent) for agent in self._agents))
        hosts = [number for number, agent in enumerate(self._agents) for _ in range(agent.count)]
        for number, agent in enumerate(self._agents):
            agent.name, agent.devices = told[number]["name"], told[number]["devices"]
            agent.ranks = [rank for rank, host in enumerate(hosts) if host == number]
        names = _apart([agent.name for agent in self._agents])
        self._bridge.tell(
            "placed",
            self._epoch,
            hosts=[names[host] for host in hosts],
            devices=[device for agent in self._agents for device in agent.devices],
        )
        rendezvous = await self._ask(self._agents[0], "listen", self._epoch)
        for number, agent in enumerate(self._agents):
            world = {"hosts": hosts, "host": number, "rendezvous": rendezvous}
            await self._ask(agent, "start", self._epoch, world, self._start)
            self._tasks.append(asyncio.create_task(self._guarded(self._follow(agent))))
        if len(hosts) < self._asked:
            self._tasks.append(asyncio.create_task(self._guarded(self._look_for_room(len(hosts)))))

    async def _place(self) -> dict[str, int]:
        """Which nodes have how many of the ranks."""
        until = time.monotonic() + ROOM_S
        what = "GPUs" if self._resource == "GPU" else "CPUs"
        here = ray.get_runtime_context().get_node_id()
        while True:
            nodes = self._bridge.nodes(self._resource)
            room = sum(node.free for node in nodes)
            # What is there and not free may become free: that of ranks before.
            coming = min(self._asked, sum(node.total for node in nodes))
            if room >= coming or (time.monotonic() > until and room >= self._least):
                if room < self._least:
                    break
                return place(min(self._asked, room), nodes, here)
            if time.monotonic() > until:
                break
            await asyncio.sleep(0.2)
        asked = f"group.ranks asks for {self._asked}"
        if self._least < self._asked:
            asked += f" and group.min_ranks for {self._least}"
        raise Lost(
            f"the Ray cluster {self._bridge.address} is too small: {describe(nodes, what)}, and {asked}; add hosts, "
            "end what else uses them, or ask for fewer",
            configuration=coming < self._least,
        )

    async def _describe(self, agent: Agent) -> dict[str, Any]:
        told: dict[str, Any] = await asyncio.wait_for(self._ask(agent, "describe"), BEGIN_S)
        if told["version"] != __version__:
            raise Lost(
                f"host {told['name']} has tacod {told['version']}, and this is {__version__}: install the same version "
                "on all hosts of the cluster",
                configuration=True,
            )
        return told

    async def _ask(self, agent: Agent, method: str, *arguments: Any) -> Any:
        """Call an actor. Raises `Lost` if it is gone, or if its method raised an error."""
        name = agent.name or f"node {agent.node[:8]}"
        try:
            return await getattr(agent.actor, method).remote(*arguments)
        except RayTaskError as error:
            raise Lost(f"host {name}: {error.cause!r}", cause=repr(error.cause)) from None
        except RayActorError as error:
            self._bridge.drop(agent.node, lost=True)
            reason = _first_line(error)
            if "ModuleNotFoundError" in str(error):
                reason = (
                    'tacod is not installed there for the Python that Ray runs (`pip install "taco-dit[daemon,ray]"`)'
                )
            raise Lost(f"host {name} was lost: {reason}") from None

    async def _follow(self, agent: Agent) -> None:
        """Pass on what a host's ranks do and say."""
        while True:
            for kind, rank, *rest in await self._ask(agent, "reports", self._epoch):
                if self._over:
                    return
                if kind == "packet":
                    self._pass_on(rank, *rest)
                elif kind == "began":
                    self._bridge.tell("began", self._epoch, rank=rank, pid=rest[0])
                elif kind == "ended":
                    self._bridge.tell("ended", self._epoch, rank=rank, code=rest[0])
                else:
                    raise Lost(f"host {agent.name}: {rest[0]}", cause=rest[1])

    def _pass_on(self, rank: int, packet: bytes, start: int, contents: Any) -> None:
        self._arena.write(start, contents)
        if rank in self._unanswered:
            report = read_report(self._arena.unpack(packet), None)
            if not isinstance(report, Progress | Begun):
                self._unanswered.discard(rank)
        self._bridge.send(b"p" + RANK.pack(rank) + packet)

    async def _look_for_room(self, ranks: int) -> None:
        """Tell when there could be more ranks."""
        while True:
            await asyncio.sleep(LOOK_S)
            room = min(self._asked, sum(node.free for node in self._bridge.nodes(self._resource)))
            if room > ranks:
                self._bridge.tell("room", self._epoch, ranks=room)
                return

    # --- commands ---------------------------------------------------------------------------------------------------

    def deliver(self, kind: bytes, packet: bytes) -> None:
        """Send a command's packet to all hosts."""
        if self._over:
            return
        if kind == WATCHED:
            self._unanswered = {rank for agent in self._agents for rank in agent.ranks}
            works: dict[str, Callable[[], Any]] = {
                agent.node: partial(self._follow_board, agent) for agent in self._agents
            }
            works["stop"] = self._follow_stop
            for name, work in works.items():
                # One of the command before may not have noticed its end yet, and goes on.
                if name not in self._following or self._following[name].done():
                    self._following[name] = asyncio.create_task(self._guarded(work()))
        self._tasks.append(asyncio.create_task(self._guarded(self._deliver(kind, packet))))
        self._tasks = [task for task in self._tasks if not task.done()]

    async def _deliver(self, kind: bytes, packet: bytes) -> None:
        start, stop = self._arena.span(packet)
        contents: Any = np.frombuffer(self._arena.read(start, stop), np.uint8)
        found: list[list[FoundFile] | None] = [None] * len(self._agents)
        refused = None
        if kind == LOAD:
            found = await self._find_files(packet)
            refused = next((file["error"] for files in found for file in files or () if file["error"]), None)
        # Small ones go with the call, large ones once to each host.
        contents = ray.put(contents) if stop - start > INLINE_BYTES else contents.tobytes()
        await asyncio.gather(
            *(
                self._ask(agent, "deliver", self._epoch, packet, start, contents, files, refused)
                for agent, files in zip(self._agents, found, strict=True)
            )
        )

    async def _find_files(self, packet: bytes) -> list[list[FoundFile] | None]:
        """Where each host has the files of a load."""
        command = read_envelope(self._arena.unpack(packet)).command
        assert isinstance(command, Load)
        files = await asyncio.to_thread(find_files, command)
        found = await asyncio.gather(*(self._ask(agent, "find", files, command.roots) for agent in self._agents))
        return list(found)

    async def _follow_board(self, agent: Agent) -> None:
        """Pass on what a host's ranks write on their board while a watched command runs."""
        board, seen = self._arena.board, b""
        while self._unanswered:
            seen = await self._ask(agent, "changed_board", self._epoch, seen)
            if self._over:
                return
            board.take(seen, agent.ranks, decision=0 in agent.ranks)
            await self._spread_board([other for other in self._agents if other is not agent])

    async def _follow_stop(self) -> None:
        """Tell the hosts that the supervisor asks for a stop."""
        told = self._arena.board.asked_to_stop
        while self._unanswered:
            await asyncio.sleep(STOP_S)
            if (asked := self._arena.board.asked_to_stop) != told:
                told = asked
                await self._spread_board(self._agents)

    async def _spread_board(self, agents: list[Agent]) -> None:
        copy = self._arena.board.copy(sum(agent.count for agent in self._agents))
        await asyncio.gather(*(self._ask(agent, "take_board", self._epoch, copy) for agent in agents))

    async def tell_stacks(self, ranks: list[int]) -> None:
        """Tell the supervisor where these ranks hang, as far as their hosts answer."""

        async def ask(agent: Agent) -> dict[str, str]:
            mine = [rank for rank in agent.ranks if rank in ranks]
            try:
                return {str(rank): text for rank, text in (await self._ask(agent, "stacks", mine)).items()}
            except Lost as lost:
                return {str(rank): str(lost) for rank in mine}

        parts = await asyncio.gather(*map(ask, self._agents))
        self._bridge.tell("stacks", self._epoch, stacks={rank: text for part in parts for rank, text in part.items()})

    async def end(self) -> None:
        """End the ranks on all hosts. A host that doesn't do so in time loses its actor, and so its ranks."""
        self._over = True
        for task in (*self._tasks, *self._following.values()):
            task.cancel()

        async def end(agent: Agent) -> None:
            try:
                await asyncio.wait_for(self._ask(agent, "kill", self._epoch), KILL_S)
            except (Lost, asyncio.TimeoutError):
                self._bridge.drop(agent.node, lost=True)

        await asyncio.gather(*map(end, self._agents))
        self._arena.close()


def _apart(names: list[str]) -> list[str]:
    """The names of hosts; those that several have are numbered."""
    return [name if names.count(name) == 1 else f"{name}#{names[:at].count(name)}" for at, name in enumerate(names)]


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _connect(address: str) -> None:
    """Join the cluster as a client. Raises `Lost`."""
    try:
        ray.init(address=address, log_to_driver=True, logging_level=logging.WARNING, include_dashboard=False)
    except (ConnectionError, OSError, TimeoutError) as error:
        raise Lost(
            f"no Ray cluster answers at {address} (group.ray_address): {_first_line(error)}; start one there with "
            "`ray start --head`, and have this machine join it with `ray start --address=HOST:PORT --num-gpus=0`"
        ) from None
    except Exception as error:
        # A cluster of another version, for example, is a RuntimeError with the two versions in it.
        text = " ".join(str(error).split())
        raise Lost(f"the Ray cluster {address} can't be joined: {text:.500}", configuration="ersion" in text) from None


def main() -> None:
    """Be the bridge, on the socket that is stdin."""
    prctl.die_with_parent()
    logs.configure(os.environ.get("TACOD_LOG_LEVEL", "info"))
    address, supervisor = sys.argv[1], socket.socket(fileno=0)
    bridge = Bridge(supervisor, address)
    try:
        _connect(address)
    except Lost as lost:
        # Whatever is asked for first is a start.
        message = supervisor.recv(MESSAGE_BYTES)
        if message:
            epoch = json.loads(message[1:])["epoch"]
            bridge.tell("lost", epoch, reason=str(lost), cause=lost.cause, configuration=lost.configuration)
            supervisor.recv(1)
        return

    async def run() -> None:
        try:
            await bridge.run()
        finally:
            await bridge.close()

    try:
        asyncio.run(run())
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()

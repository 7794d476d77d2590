"""The ranks of one start on the hosts of a cluster: placed, started, given commands and ended."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import socket
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from tacod import __version__
from tacod.group.arena import Arena
from tacod.group.ray.cluster import LOST_S, SILENT_S, Agent, Cluster, Lost
from tacod.group.ray.files import FoundFile, find_files
from tacod.group.ray.launcher import CONTROL, LOAD, PACKET, RANK, WATCHED
from tacod.group.ray.placement import describe, place
from tacod.group.ray.sending import Refused, send_missing
from tacod.group.work import Begun, Load, Progress, read_envelope, read_report
from tacod_client.errors import TacodError
from tacod_client.text import shortened

__all__ = ["Generation", "Supervisor", "first_line"]

log = logging.getLogger("tacod.ray")

INLINE_BYTES = 64 << 10
"""From this size on contents go by the object store: once to each host."""
ROOM_S = 20.0
"""How long to wait for devices that are there and not free; those of ranks before may not have been given back yet."""
LOOK_S = 2.0
"""How often to look whether fewer ranks than asked for could be more."""
BEGIN_S = 60.0
"""How long an actor has to begin; it imports Ray and this package."""
PING_S, ANSWER_S = 5.0, 30.0
"""How often hosts are asked whether they are there, and how long they have to answer."""
KILL_S = 5.0
"""How long a host has to end its ranks before its actor is ended."""
STOP_S = 0.05
"""How often to look whether the supervisor asks for a stop."""
TEXT_CHARACTERS = 16 << 10
"""Most characters of a text for the supervisor; a message to it has a limit, and JSON may need six bytes for one."""


class Supervisor:
    """The socket to the supervisor."""

    def __init__(self, channel: socket.socket) -> None:
        self.channel = channel

    def tell(self, what: str, epoch: int, **more: Any) -> None:
        """Tell something about a generation."""
        self.send(CONTROL + json.dumps({"what": what, "epoch": epoch, **more}).encode())

    def send(self, message: bytes) -> None:
        """Send a message; waits if the supervisor is behind."""
        with suppress(BrokenPipeError, ConnectionResetError):
            self.channel.send(message)


class Generation:
    """The ranks of one start, on all hosts."""

    def __init__(self, cluster: Cluster, supervisor: Supervisor, request: dict[str, Any], arena: Arena) -> None:
        self._cluster = cluster
        self._supervisor = supervisor
        self._epoch: int = request["epoch"]
        self._least: int = request["least"]
        self._settings: dict[str, Any] = request["settings"]
        self._start = {key: request[key] for key in ("settings", "comfyui", "fault")}
        self._asked: int = self._settings.get("ranks", 1)
        self._resource = "GPU" if self._settings.get("device", "cuda") == "cuda" else "CPU"
        self._others: int = request["beside"]
        self._beside: dict[str, int] = {}
        """How many ranks of tacod's other groups there may be on a node at most."""
        self._arena = arena
        self._agents: list[Agent] = []
        self._unanswered: set[int] = set()
        """Ranks that have not answered the watched command."""
        self._following: dict[str, asyncio.Task[None]] = {}
        """What keeps the boards alike meanwhile, by node, and what looks for a stop."""
        self._copies = 0
        """Of the supervisor's board, so far."""
        self._stop_told = 0
        """The last stop that the hosts were told of."""
        self._over = False
        self._tasks = [asyncio.create_task(self._guarded(self._begin()))]

    async def _guarded(self, work: Any) -> None:
        """Do something, and tell the supervisor if the generation is lost by that."""
        try:
            await work
        except Lost as lost:
            self._lose(str(lost), lost.cause, lost.configuration)
        except RayError as error:
            self._lose(f"Ray: {first_line(error)}")
        except Exception as error:
            log.exception("the bridge to Ray failed")
            self._lose(f"the bridge to Ray failed: {error!r}", cause=repr(error))

    def _lose(self, reason: str, cause: str = "", configuration: bool = False) -> None:
        if not self._over:
            self._over = True
            reason, cause = shortened(reason, TEXT_CHARACTERS), shortened(cause, TEXT_CHARACTERS)
            self._supervisor.tell("lost", self._epoch, reason=reason, cause=cause, configuration=configuration)

    async def _begin(self) -> None:
        self._agents = await self._hold()
        told = await asyncio.gather(*(self._describe(agent) for agent in self._agents))
        hosts = [number for number, agent in enumerate(self._agents) for _ in range(agent.count)]
        for number, agent in enumerate(self._agents):
            agent.name, agent.devices = told[number]["name"], told[number]["devices"]
            agent.ranks = [rank for rank, host in enumerate(hosts) if host == number]
        names = _apart([agent.name for agent in self._agents])
        self._supervisor.tell(
            "placed",
            self._epoch,
            hosts=[names[host] for host in hosts],
            devices=[device for agent in self._agents for device in agent.devices],
        )
        rendezvous = await self._ask(self._agents[0], "listen", self._epoch)
        for number, agent in enumerate(self._agents):
            world = {"hosts": hosts, "host": number, "rendezvous": rendezvous, "beside": self._beside[agent.node]}
            await self._ask(agent, "start", self._epoch, world, self._start)
            self._tasks.append(asyncio.create_task(self._guarded(self._follow(agent))))
            self._tasks.append(asyncio.create_task(self._guarded(self._ping(agent))))
        if len(hosts) < self._asked:
            self._tasks.append(asyncio.create_task(self._guarded(self._look_for_room(len(hosts)))))

    async def _hold(self) -> list[Agent]:
        """The actors that hold the devices of all ranks."""
        until = time.monotonic() + ROOM_S
        while True:
            counts = await self._place(until)
            if (agents := await asyncio.shield(self._cluster.hold(counts, self._resource))) is not None:
                return agents
            # Another group that started at the same time chose them too, or they are about to be given back.
            log.info("devices on the chosen hosts are taken: looking again")
            if time.monotonic() > until:
                raise Lost(
                    f"no {self._resource}s of the Ray cluster {self._cluster.address} stayed free for {ROOM_S:g} s; "
                    "end what else takes them, or ask for fewer (group.ranks)"
                )
            await asyncio.sleep(random.uniform(0.1, 0.5))

    async def _place(self, until: float) -> dict[str, int]:
        """Which nodes have how many of the ranks; waits for room until this moment."""
        what = "GPUs" if self._resource == "GPU" else "CPUs"
        here = ray.get_runtime_context().get_node_id()
        while True:
            nodes = await self._cluster.nodes(self._resource)
            room = sum(node.free for node in nodes)
            # What is there and not free may become free: that of ranks before.
            coming = min(self._asked, sum(node.total for node in nodes))
            if room >= coming or (time.monotonic() > until and room >= self._least):
                if room < self._least:
                    break
                counts = place(min(self._asked, room), nodes, here)
                self._beside = {
                    node.id: min(self._others, node.total - counts[node.id]) for node in nodes if node.id in counts
                }
                return counts
            if time.monotonic() > until:
                break
            await asyncio.sleep(0.2)
        asked = f"group.ranks asks for {self._asked}"
        if self._least < self._asked:
            asked += f" and group.min_ranks for {self._least}"
        raise Lost(
            f"the Ray cluster {self._cluster.address} is too small: {describe(nodes, what)}, and {asked}; add hosts, "
            "end what else uses them, or ask for fewer",
            configuration=coming < self._least,
        )

    async def _describe(self, agent: Agent) -> dict[str, Any]:
        try:
            told: dict[str, Any] = await asyncio.wait_for(self._ask(agent, "describe"), BEGIN_S)
        except asyncio.TimeoutError:
            self._cluster.drop(agent.node, out_s=LOST_S)
            reason = (
                f"tacod's actor on node {agent.node[:8]} has not begun within {BEGIN_S:g} s; Ray's logs there say why"
            )
            raise Lost(reason) from None
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
            self._cluster.drop(agent.node, out_s=LOST_S)
            reason = first_line(error)
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
                    self._supervisor.tell("began", self._epoch, rank=rank, pid=rest[0])
                elif kind == "ended":
                    self._supervisor.tell("ended", self._epoch, rank=rank, code=rest[0])
                else:
                    raise Lost(f"host {agent.name}: {rest[0]}", cause=rest[1])

    async def _ping(self, agent: Agent) -> None:
        """Notice that a host has fallen silent, as when its network ends without a word."""
        while True:
            await asyncio.sleep(PING_S)
            try:
                await asyncio.wait_for(self._ask(agent, "describe"), ANSWER_S)
            except asyncio.TimeoutError:
                self._cluster.drop(agent.node, out_s=SILENT_S)
                raise Lost(f"host {agent.name} was lost: it has not answered for {ANSWER_S:g} s") from None

    def _pass_on(self, rank: int, packet: bytes, start: int, contents: Any) -> None:
        self._arena.write(start, contents)
        if rank in self._unanswered:
            report = read_report(self._arena.unpack(packet), None)
            if not isinstance(report, Progress | Begun):
                self._unanswered.discard(rank)
        self._supervisor.send(PACKET + RANK.pack(rank) + packet)

    async def _look_for_room(self, ranks: int) -> None:
        """Tell when there could be more ranks."""
        while True:
            await asyncio.sleep(LOOK_S)
            nodes = await self._cluster.nodes(self._resource)
            room = min(self._asked, sum(node.free for node in nodes))
            if room > ranks:
                self._supervisor.tell("room", self._epoch, ranks=room)
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
        found: Sequence[list[FoundFile] | None] = [None] * len(self._agents)
        refused = None
        if kind == LOAD:
            found, refused = await self._find_files(packet)
        # Small ones go with the call, large ones once to each host.
        contents = ray.put(contents) if stop - start > INLINE_BYTES else contents.tobytes()
        await asyncio.gather(
            *(
                self._ask(agent, "deliver", self._epoch, packet, start, contents, files, refused)
                for agent, files in zip(self._agents, found, strict=True)
            )
        )

    async def _find_files(self, packet: bytes) -> tuple[list[list[FoundFile]], dict[str, Any] | None]:
        """Where each host has the files of a load, which are sent to those that lack them; or why ranks refuse it."""
        envelope = read_envelope(self._arena.unpack(packet))
        command = envelope.command
        assert isinstance(command, Load)
        try:
            files = await asyncio.to_thread(find_files, command)
        except TacodError as error:
            return [[] for _ in self._agents], error.to_wire()
        found = list(await asyncio.gather(*(self._ask(agent, "find", files, command.roots) for agent in self._agents)))

        def ask(agent: Agent, method: str, *arguments: Any) -> Awaitable[Any]:
            return self._ask(agent, method, self._epoch, *arguments)

        def tell(sent: int, total: int) -> None:
            self._supervisor.tell("sent", self._epoch, sent=sent, total=total)

        def is_stopped() -> bool:
            return self._arena.board.is_asked_to_stop(envelope.id)

        try:
            await send_missing(files, self._agents, found, ask, ray.put, tell, is_stopped)
        except Refused as refused:
            return found, refused.error
        return found, None

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
        while self._unanswered:
            # The supervisor may have asked before it came to this.
            if (asked := self._arena.board.asked_to_stop) != self._stop_told:
                self._stop_told = asked
                await self._spread_board(self._agents)
            await asyncio.sleep(STOP_S)

    async def _spread_board(self, agents: list[Agent]) -> None:
        ranks = sum(agent.count for agent in self._agents)
        # Calls may overtake each other: a host takes no copy that is older than one that it has.
        self._copies += 1
        number, copy = self._copies, self._arena.board.copy(ranks)
        await asyncio.gather(*(self._ask(agent, "take_board", self._epoch, number, copy) for agent in agents))

    def ask_for_stacks(self, ranks: list[int]) -> None:
        """Have the supervisor told where these ranks hang."""
        self._tasks.append(asyncio.create_task(self._guarded(self._tell_stacks(ranks))))

    async def _tell_stacks(self, ranks: list[int]) -> None:
        """Tell the supervisor where these ranks hang, as far as their hosts answer."""

        async def ask(agent: Agent) -> dict[str, str]:
            mine = [rank for rank in agent.ranks if rank in ranks]
            try:
                return {str(rank): text for rank, text in (await self._ask(agent, "stacks", mine)).items()}
            except Lost as lost:
                return {str(rank): str(lost) for rank in mine}

        parts = await asyncio.gather(*map(ask, self._agents))
        most = TEXT_CHARACTERS // max(len(ranks), 1)
        stacks = {rank: shortened(text, most) for part in parts for rank, text in part.items()}
        self._supervisor.tell("stacks", self._epoch, stacks=stacks)

    async def end(self) -> None:
        """End the ranks on all hosts. A host that doesn't do so in time loses its actor, and so its ranks."""
        self._over = True
        for task in (*self._tasks, *self._following.values()):
            task.cancel()

        async def end(agent: Agent) -> None:
            try:
                await asyncio.wait_for(self._ask(agent, "kill", self._epoch), KILL_S)
            except (Lost, RayError, asyncio.TimeoutError):
                self._cluster.drop(agent.node, out_s=LOST_S)

        await asyncio.gather(*map(end, self._agents))
        self._arena.close()


def _apart(names: list[str]) -> list[str]:
    """The names of hosts; those that several have are numbered."""
    return [name if names.count(name) == 1 else f"{name}#{names[:at].count(name)}" for at, name in enumerate(names)]


def first_line(error: Exception) -> str:
    """The first line of an error's message that says something."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)

"""What the bridge does with a generation of ranks, by actors that only note what they are asked."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Callable
from typing import Any, ClassVar

import pytest

pytest.importorskip("ray", reason="Ray is not installed: pip install 'taco-dit[ray]'")

from ray.exceptions import RaySystemError, RpcError

from tacod.group.arena import Arena
from tacod.group.ray import bridge as bridges
from tacod.group.ray import cluster as clusters
from tacod.group.ray import generation as generations
from tacod.group.ray.cluster import SILENT_S, Agent
from tacod.group.ray.generation import Generation, Supervisor
from tacod.group.ray.launcher import CONTROL, WATCHED
from tacod.group.work import Envelope, Unload

REQUEST = {
    "verb": "start",
    "epoch": 1,
    "least": 1,
    "settings": {"device": "cpu", "ranks": 1},
    "comfyui": None,
    "beside": 0,
    "fault": None,
}


class Actor:
    """Answers to no call but `take_board`, and keeps the copies that come with it."""

    def __init__(self) -> None:
        self.boards: list[bytes] = []

    def __getattr__(self, method: str) -> Any:
        async def answer(*arguments: Any) -> None:
            if method != "take_board":
                await asyncio.Event().wait()
            self.boards.append(arguments[-1])

        return type("Method", (), {"remote": staticmethod(answer)})


async def eventually(true: Callable[[], bool]) -> None:
    for _ in range(1000):
        if true():
            return
        await asyncio.sleep(0.01)
    pytest.fail("not in 10 s")


def test_a_stop_that_comes_right_behind_a_command_reaches_the_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    async def nothing(self: Generation) -> None:
        pass

    monkeypatch.setattr(Generation, "_begin", nothing)

    async def stop() -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        arena, actor = Arena(), Actor()
        generation = Generation(None, Supervisor(theirs), REQUEST, arena)  # type: ignore[arg-type]
        generation._agents = [Agent("node", 1, actor, None, ranks=[0])]
        packet = arena.pack(Envelope(7, Unload("m")).message())
        arena.board.ask_to_stop(7)
        generation.deliver(WATCHED, packet)
        await eventually(lambda: bool(actor.boards))
        for task in (*generation._tasks, *generation._following.values()):
            task.cancel()
        copied = Arena()
        copied.board.take(actor.boards[0], [], stop=True)
        assert copied.board.asked_to_stop == 7
        for end in (ours, theirs, arena, copied):
            end.close()

    asyncio.run(stop())


def test_a_host_that_does_not_answer_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when its network has ended, and no connection with it."""

    async def nothing(self: Generation) -> None:
        pass

    monkeypatch.setattr(Generation, "_begin", nothing)
    monkeypatch.setattr(generations, "PING_S", 0.01)
    monkeypatch.setattr(generations, "ANSWER_S", 0.05)

    class Noted:
        left_out: ClassVar[list[tuple[str, float]]] = []

        def drop(self, node: str, out_s: float = 0.0) -> None:
            self.left_out.append((node, out_s))

    async def ping() -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        arena = Arena()
        generation = Generation(Noted(), Supervisor(theirs), REQUEST, arena)  # type: ignore[arg-type]
        await generation._guarded(generation._ping(Agent("node", 1, Actor(), None, "b")))
        told = json.loads(ours.recv(1 << 20)[1:])
        assert (told["what"], told["reason"]) == ("lost", "host b was lost: it has not answered for 0.05 s")
        # Longer than Ray takes to say so.
        assert Noted.left_out == [("node", SILENT_S)]
        for end in (ours, theirs, arena):
            end.close()

    asyncio.run(ping())


def test_a_cluster_that_fails_while_devices_are_reserved_keeps_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray would reserve them later, for nobody."""

    class Group:
        def __init__(self, node: str) -> None:
            self.node = node

        def wait(self, timeout_seconds: float) -> bool:
            if self.node == "b":
                raise RpcError("the head is gone")
            return True

    given_back: list[str] = []

    def give_back(held: Group) -> None:
        given_back.append(held.node)
        raise RpcError("the head is gone")

    def reserve(bundles: Any, bundle_label_selector: list[dict[str, str]]) -> Group:
        return Group(bundle_label_selector[0]["ray.io/node-id"])

    monkeypatch.setattr(clusters, "placement_group", reserve)
    monkeypatch.setattr(clusters, "remove_placement_group", give_back)
    cluster = clusters.Cluster("auto")
    with pytest.raises(RpcError):
        asyncio.run(cluster.hold({"a": 1, "b": 1}, "CPU"))
    assert sorted(given_back) == ["a", "b"]
    assert not cluster.agents


def test_a_head_that_does_not_answer_holds_up_nobody_who_drops_an_actor(monkeypatch: pytest.MonkeyPatch) -> None:
    answers, told = threading.Event(), []

    def tell_head(what: str) -> None:
        assert answers.wait(60)
        told.append(what)

    monkeypatch.setattr(clusters.ray, "kill", tell_head)
    monkeypatch.setattr(clusters, "remove_placement_group", tell_head)
    monkeypatch.setattr(clusters, "_told_by_head", lambda: ([], {}))

    async def drop() -> None:
        cluster = clusters.Cluster("auto")
        cluster.agents["node"] = Agent("node", 1, "actor", "devices")  # type: ignore[arg-type]
        cluster.drop("node", out_s=SILENT_S)
        assert not cluster.agents
        assert not told
        # Who looks for devices sees those that it had.
        nodes = asyncio.create_task(cluster.nodes("CPU"))
        await asyncio.sleep(0.05)
        assert not nodes.done()
        answers.set()
        await nodes
        assert told == ["actor", "devices"]

    asyncio.run(drop())


def test_whatever_error_of_ray_comes_at_the_end_the_bridge_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    async def nothing(self: Generation) -> None:
        pass

    monkeypatch.setattr(Generation, "_begin", nothing)
    dropped: list[str] = []

    class Noted:
        def drop(self, node: str, out_s: float = 0.0) -> None:
            dropped.append(node)

    class Failing:
        def __getattr__(self, method: str) -> Any:
            async def answer(*arguments: Any) -> None:
                raise RaySystemError("the object's owner is gone")

            return type("Method", (), {"remote": staticmethod(answer)})

    async def end() -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        generation = Generation(Noted(), Supervisor(theirs), REQUEST, Arena())  # type: ignore[arg-type]
        generation._agents = [Agent("node", 1, Failing(), None, ranks=[0])]  # type: ignore[arg-type]
        await asyncio.sleep(0)  # it has begun
        await generation.end()
        assert dropped == ["node"]
        ours.close()
        theirs.close()

    asyncio.run(end())


def test_a_start_ends_the_ranks_before_whatever_was_told(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []

    class Noted:
        def __init__(self, cluster: Any, supervisor: Any, request: dict[str, Any], arena: Arena) -> None:
            self.epoch = request["epoch"]
            self.arena = arena

        async def end(self) -> None:
            ended.append(self.epoch)
            self.arena.close()

    monkeypatch.setattr(bridges, "Generation", Noted)

    async def start_twice() -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        bridge = bridges.Bridge(theirs, "auto")
        for epoch in (1, 2):
            bridge._requests.put_nowait((CONTROL + json.dumps({**REQUEST, "epoch": epoch}).encode(), [Arena().fd]))
        bridge._requests.put_nowait((b"", []))
        await bridge.run()
        assert ended == [1]
        await bridge.close()
        assert ended == [1, 2]
        ours.close()
        theirs.close()

    asyncio.run(start_twice())

"""Ranks on Ray, without Ray: where they are placed, what the configuration may ask for, and what the bridge tells."""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import os
import select
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tacod import logs
from tacod.config import Config, ConfigError, Group, load_config, to_toml
from tacod.group.arena import Arena
from tacod.group.board import Blocks
from tacod.group.group import GroupState, RankGroup
from tacod.group.launcher import launcher
from tacod.group.processes import devices
from tacod.group.ranks import GroupLost
from tacod.group.ray import host
from tacod.group.ray.launcher import CONTROL, MESSAGE_BYTES, RANK, RayLauncher
from tacod.group.ray.placement import Node, describe, place
from tacod.group.work import Load, Progress, Unload
from tacod_client.wire import Message, Tensor

# --- placement --------------------------------------------------------------------------------------------------------


def nodes(**free: int) -> list[Node]:
    return [Node(name, name, count, 4) for name, count in free.items()]


@pytest.mark.parametrize(
    ("ranks", "free", "placed"),
    [
        (2, {"a": 4, "b": 2, "c": 3}, {"b": 2}),
        (4, {"a": 3, "b": 3}, {"a": 2, "b": 2}),
        (3, {"a": 2, "b": 2}, {"a": 2, "b": 1}),
        (6, {"a": 1, "b": 4, "c": 2}, {"b": 4, "c": 2}),
        (7, {"a": 1, "b": 4, "c": 2}, {"b": 4, "c": 2, "a": 1}),
        (8, {"a": 1, "b": 4, "c": 2}, {}),
        (1, {}, {}),
    ],
)
def test_few_hosts_and_evenly(ranks: int, free: dict[str, int], placed: dict[str, int]) -> None:
    found = place(ranks, nodes(**free))
    assert found == placed
    assert list(found) == list(placed)


def test_among_equal_hosts_the_daemons_own_has_rank_0() -> None:
    assert list(place(4, nodes(a=2, b=2, c=2), here="c")) == ["c", "a"]
    assert place(2, nodes(a=2, b=2), here="b") == {"b": 2}


def test_what_a_cluster_has_in_words() -> None:
    assert describe([*nodes(a=1, b=4), Node("c", "head", 0, 0)], "GPUs") == "5 of 8 GPUs free (a: 1 of 4, b: 4 of 4)"


# --- the configuration ------------------------------------------------------------------------------------------------


def on_ray(**more: Any) -> Group:
    return Group.model_validate({"launcher": "ray", "device": "cpu", **more})


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"device": "cuda"}, "set ranks: how many GPUs"),
        ({"device": "cuda", "gpus": [0]}, "the cluster chooses the GPUs"),
        ({"ranks": 2, "min_ranks": 3}, "min_ranks = 3 is more than ranks = 2"),
        ({"ranks": 2, "min_ranks": 1, "shares": [2, 1]}, "remove min_ranks"),
        ({"ranks": 3, "shares": [2, 1]}, "expected a number for each of 3 ranks"),
        ({"ray_address": "ray://head:10001"}, "ray start"),
        ({"ray_address": "head"}, "HOST:PORT"),
        ({"launcher": "local", "min_ranks": 1}, 'are for launcher = "ray"'),
    ],
)
def test_what_the_configuration_may_not_ask_for(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        on_ray(**settings)


def test_how_few_ranks_go_on() -> None:
    assert on_ray(ranks=4).fewest_ranks == 1
    assert on_ray(ranks=4, min_ranks=3).fewest_ranks == 3
    assert on_ray(ranks=2, shares=[2, 1]).fewest_ranks == 2


def test_printed_configuration_is_read_again(tmp_path: Path) -> None:
    config = Config.model_validate({"group": {"launcher": "ray", "ranks": 4, "ray_address": "10.0.0.1:6379"}})
    (tmp_path / "config.toml").write_text(to_toml(config))
    assert load_config(tmp_path / "config.toml") == config


def test_a_version_of_ray_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.9.3")
    with pytest.raises(ConfigError, match=r"Ray 2.9.3 is too old; `pip install \"taco-dit\[ray\]\"` installs"):
        devices([on_ray(ranks=2)])


def test_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(ConfigError, match="Ray is not installed"):
        devices([on_ray(ranks=2)])


# --- memory on several hosts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [1, 5000])
def test_a_packet_and_its_span_say_all(names: int) -> None:
    """Also one whose head is too long for the packet; and one that begins anywhere, as an answer does."""
    here, there = Arena(), Arena()
    body = {**{str(number): 0 for number in range(names)}, "t": Tensor("U8", (100_000,), (os.urandom(100_000),))}
    for start in (here.end, here.end + 12_345):
        packet = here.pack(Message("done", body, 3), start)
        first, last = here.span(packet)
        assert first == start
        there.write(first, bytes(here.read(first, last)))
        read = there.unpack(packet, copy=True)
        assert read.body["t"].frames == body["t"].frames  # type: ignore[attr-defined]
    here.close()
    there.close()


def test_boards_of_two_hosts_become_alike() -> None:
    first, second = Arena(), Arena()
    first.board.tell(0, 9, Blocks(0, 3, 8))
    first.board.decide(9, 0, 4)
    second.board.tell(1, 9, Blocks(0, 2, 8))
    second.board.reach(1, 9, 0, 4)
    second.board.take(first.board.copy(2), [0], stop=True, decision=True)
    first.board.take(second.board.copy(2), [1])
    assert first.board.copy(2) == second.board.copy(2)
    assert second.board.decided(9, 0, 4) is True
    assert first.board.others_reached(2, 9, 0) == 4
    first.close()
    second.close()


# --- what the bridge tells --------------------------------------------------------------------------------------------


class Bridge:
    """In the bridge's place: hears what the launcher asks for, and tells what a test says."""

    def __init__(self, launcher: RayLauncher, monkeypatch: pytest.MonkeyPatch) -> None:
        self.launcher = launcher
        monkeypatch.setattr(launcher, "_start_bridge", self.start)

    def start(self) -> None:
        self.launcher._socket, self._socket = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.launcher._socket.setblocking(False)
        self._socket.setblocking(False)

    def asked(self) -> dict[str, Any]:
        message = self._socket.recv(MESSAGE_BYTES)
        assert message[:1] == CONTROL
        asked: dict[str, Any] = json.loads(message[1:])
        return asked

    def tell(self, what: str, epoch: int = 1, **more: Any) -> None:
        self._socket.send(CONTROL + json.dumps({"what": what, "epoch": epoch, **more}).encode())

    def begin(self, epoch: int = 1) -> None:
        self.tell("placed", epoch, hosts=["a", "b"], devices=["3", "0"])
        for rank in (1, 0):
            self.tell("began", epoch, rank=rank, pid=100 + rank)

    def close(self) -> None:
        self.launcher.kill()
        self._socket.close()
        assert self.launcher._socket is not None
        self.launcher._socket.close()


@pytest.fixture
def bridge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bridge]:
    made = Bridge(RayLauncher(on_ray(ranks=3), tmp_path), monkeypatch)
    made.launcher.spawn(on_ray(ranks=3))
    yield made
    made.close()


def test_at_first_all_ranks_are_needed_and_later_fewer_do(bridge: Bridge) -> None:
    launcher = bridge.launcher
    assert bridge.asked()["least"] == 3
    bridge.begin()
    bridge._socket.send(b"p" + RANK.pack(1) + b"packet")
    assert [(rank.index, packet) for rank, packet in launcher.receive()] == [(1, b"packet")]
    assert [(rank.index, rank.host, rank.device) for rank in launcher.ranks] == [(0, "a", "3"), (1, "b", "0")]
    assert len(launcher.devices) == 2
    bridge.tell("room", ranks=3)
    assert not list(launcher.receive())
    assert launcher.room == 3
    launcher.kill()
    assert bridge.asked()["verb"] == "kill"
    assert not launcher.ranks
    launcher.spawn(on_ray(ranks=3))
    assert bridge.asked()["least"] == 1
    assert launcher.room is None
    # What is told of ranks that were ended is no longer of interest.
    bridge.begin(epoch=1)
    assert not list(launcher.receive())
    assert not launcher.ranks


def test_groups_know_of_each_others_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They may be on the same hosts, and share the cores there."""
    settings = on_ray(ranks=2)
    made = launcher(settings, ["ray:0", "ray:1"], tmp_path, beside=3)
    assert isinstance(made, RayLauncher)
    bridge = Bridge(made, monkeypatch)
    made.spawn(settings)
    assert bridge.asked()["beside"] == 3
    bridge.close()


def test_a_rank_that_ends_is_told_with_its_host(bridge: Bridge) -> None:
    bridge.begin()
    bridge.tell("ended", rank=1, code=-9)
    assert not list(bridge.launcher.receive())
    with pytest.raises(GroupLost, match=r"rank 1 \(0 of b, pid 101\) was killed by SIGKILL") as caught:
        bridge.launcher.check(bridge.launcher.ranks)
    assert caught.value.cause == ""


def test_what_is_wrong_at_the_first_start_is_the_configurations(bridge: Bridge) -> None:
    bridge.tell("lost", reason="it is too small", cause="", configuration=True)
    assert not list(bridge.launcher.receive())
    with pytest.raises(ConfigError, match="group: it is too small"):
        bridge.launcher.check([])


def test_what_is_wrong_later_is_not(bridge: Bridge) -> None:
    bridge.begin()
    bridge.tell("lost", reason="it is too small", cause="", configuration=True)
    assert not list(bridge.launcher.receive())
    with pytest.raises(GroupLost, match="it is too small"):
        bridge.launcher.check([])


def test_a_command_goes_out_once(bridge: Bridge) -> None:
    bridge.asked()
    bridge.begin()
    assert not list(bridge.launcher.receive())
    for watched, kind in ((False, b"p"), (True, b"w")):
        bridge.launcher.send(b"packet", Unload("m"), watched)
        assert bridge._socket.recv(MESSAGE_BYTES) == kind + b"packet"
    bridge.launcher.send(b"packet", Load("m", "p", "i", None, None, None, []), False)
    assert bridge._socket.recv(MESSAGE_BYTES) == b"lpacket"
    with pytest.raises(BlockingIOError):
        bridge._socket.recv(MESSAGE_BYTES)


def test_a_load_has_time_as_long_as_its_file_is_sent(bridge: Bridge, tmp_path: Path) -> None:
    settings = on_ray(ranks=3, load_timeout_s=500.0)
    group = RankGroup(settings, ["ray:0"], tmp_path)
    group._launcher, group.state = bridge.launcher, GroupState.IDLE
    bridge.asked()
    bridge.begin()
    assert group.receive() is None
    group.run(Load("m", "p", "i", None, None, None, []), [], 10.0)
    assert group.progress is None
    bridge.tell("sent", sent=3, total=9)
    before_s = time.monotonic()
    assert group.receive() is None
    assert group.progress == Progress(3, 9)
    assert group.deadline is not None
    assert group.deadline >= before_s + 500
    # A cancel is told to the bridge; if ranks read already, they have as long as before.
    deadline = group.deadline
    group.stop()
    assert bridge.launcher.arena is not None
    assert bridge.launcher.arena.board.asked_to_stop == 1
    assert group.deadline == deadline
    bridge.tell("sent", sent=9, total=9)
    assert group.receive() is None
    assert group.deadline > deadline
    bridge.launcher.send(b"packet", Unload("m"), False)
    assert group.progress is None


NOT_JOINED = """
import json, socket
channel = socket.socket(fileno=0)
epoch = json.loads(channel.recv(1 << 20)[1:])["epoch"]
told = {"what": "lost", "epoch": epoch, "reason": "no cluster answers", "cause": "", "joined": False}
channel.send(b"c" + json.dumps(told).encode())
channel.recv(1)
"""
"""What the bridge does where no cluster answers."""


def test_each_start_tries_to_join_the_cluster_anew(tmp_path: Path) -> None:
    launcher = RayLauncher(on_ray(ranks=3), tmp_path)
    launcher._command = [sys.executable, "-c", NOT_JOINED]
    try:
        for _ in range(3):
            launcher.spawn(on_ray(ranks=3))
            assert select.select(launcher.sources, [], [], 60.0)[0]
            assert not list(launcher.receive())
            with pytest.raises(GroupLost, match="no cluster answers"):
                launcher.check([])
            launcher.kill()
    finally:
        launcher.close()


def test_a_start_that_its_end_has_overtaken_starts_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(logs, "configure", lambda level: None)
    monkeypatch.setattr(host, "Processes", lambda *told: pytest.fail("ranks are started"))

    async def start_late() -> None:
        late = host.Host()
        await late.kill(2)
        world = {"hosts": [0], "host": 0, "rendezvous": "tcp://127.0.0.1:1", "beside": 0}
        await late.start(2, world, {"settings": {"device": "cpu"}, "comfyui": None, "fault": None})
        await late.close()

    asyncio.run(start_late())
    assert not list(tmp_path.iterdir())

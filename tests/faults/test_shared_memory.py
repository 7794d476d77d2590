"""A client that shares memory with the ranks harms its own forward at worst, whatever it does there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import FLUX, FP32, SD3, START_S, Daemon, Interrupted, Interruption, eventually, relative_error, stopped

from tacod_client import ArgumentError, Client, latents
from tacod_client import model as model_module
from tacod_client.shared import Shared
from tacod_client.wire import MEMORY_SOCKET, Message

from .conftest import Inject
from .test_daemon_restarted import forwards

SCRIPT = """
import sys, time
import torch
from helpers import FLUX
from tacod_client import Client, latents
latents.LEAST_BYTES = 0
client = Client(sys.argv[1])
model = client.load(FLUX.file)
model.forward(**FLUX.inputs())
print("shares", flush=True)
model.forward(**FLUX.inputs(1))
"""


@pytest.fixture(autouse=True)
def all_latents(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small ones lie in shared memory too."""
    monkeypatch.setattr(latents, "LEAST_BYTES", 0)


def shares(client: Client) -> bool:
    """Whether a client shares memory with the ranks."""
    shared = client._connection.shared
    return shared is not None and bool(shared._memories)


def test_threads_share_one_memory(sturdy: Daemon, client: Client) -> None:
    model = client.load(FLUX.file)
    with ThreadPoolExecutor(6) as pool:
        for future in [pool.submit(FLUX.check, model, seed) for seed in range(24)]:
            future.result(START_S)
    assert shares(client)
    shared = client._connection.shared
    assert shared is not None
    assert all(memory.idle for memory in shared._memories)
    with sturdy.client() as other:
        assert other.stats()["shared_bytes"] == sum(memory.nbytes for memory in shared._memories)


def test_forwards_go_past_zeromq(
    sturdy: Daemon, client: Client, inject: Inject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the memory's channel, from many threads, also if they are cancelled; some go through ZeroMQ between them."""
    restarts, by_channel = client.status()["group"]["restarts"], []
    send = Shared.send

    def note(self: Shared, number: int, frames: Any) -> bool:
        by_channel.append(bool(len(by_channel) % 5) and send(self, number, frames))
        return by_channel[-1]

    monkeypatch.setattr(Shared, "send", note)
    interruption = Interruption()
    with sturdy.client(on_wait=interruption) as other, ThreadPoolExecutor(6) as pool:
        theirs, model = other.load(FLUX.file), client.load(FLUX.file)
        FLUX.check(theirs)
        for future in [pool.submit(FLUX.check, model, seed) for seed in range(30)]:
            future.result(START_S)
        cancelled = client.stats()["jobs_total"]["cancelled"]
        inject(kind="slow", at="forward", seconds=1.0, rank=1)
        slow = pool.submit(FLUX.check, model, 30)
        eventually(lambda: client.status()["queue"]["running"], 5, "the slow one runs")
        interruption.armed.set()
        for seed in range(8):
            with pytest.raises(Interrupted):
                theirs.forward(**FLUX.inputs(seed))
        interruption.armed.clear()
        FLUX.check(theirs, 9)
        slow.result(START_S)
        assert client.stats()["jobs_total"]["cancelled"] == cancelled + 8
    assert by_channel.count(True) > 30
    assert by_channel.count(False) == -(-len(by_channel) // 5)
    assert client.status()["group"]["restarts"] == restarts


def test_a_batch_of_any_size_is_right(client: Client) -> None:
    """Each larger one needs a larger memory, which takes the place of the one before."""
    model = client.load(FLUX.file)
    for side in (8, 200, 330):
        inputs = FLUX.inputs(side, batch=3, size=(side, side), text=1)
        inputs["x"] = inputs["x"][:, :, :16, :]
        assert relative_error(model.forward(**inputs), FLUX.forward(**inputs)) <= FP32
        assert shares(client)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_is_killed_under_a_forward(sturdy: Daemon, client: Client, rank: int) -> None:
    model = client.load(FLUX.file)
    FLUX.check(model)
    victim = client.status()["group"]["ranks"][rank]["pid"]
    with ThreadPoolExecutor(1) as pool, sturdy.client() as watcher:
        with stopped(victim):
            forward = pool.submit(FLUX.check, model, 3)
            eventually(lambda: watcher.status()["queue"]["running"], 3, "the forward runs")
            os.kill(victim, signal.SIGKILL)
        forward.result(START_S)
    assert model.stats.retries == 1
    assert shares(client)
    FLUX.check(model)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_client_dies_under_its_forward(sturdy: Daemon, client: Client, inject: Inject, number: int) -> None:
    restarts = client.status()["group"]["restarts"]
    inject(kind="slow", at="forward", seconds=3.0, rank=0, skip=1)
    command = [sys.executable, "-c", SCRIPT, sturdy.endpoint]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "shares\n"
            eventually(lambda: client.status()["queue"]["running"], 20, "its forward runs")
            assert client.stats()["shared_bytes"] > 0
            process.send_signal(number)
            eventually(lambda: client.stats()["shared_bytes"] == 0, 30, "what it shared is freed")
        finally:
            process.kill()
    FLUX.check(client.load(FLUX.file))
    assert client.status()["group"]["restarts"] == restarts


@contextmanager
def scribbling(client: Client) -> Iterator[None]:
    """Within, a thread writes to all memories of a client, numbers and what is none, as fast as it can."""
    ends = threading.Event()

    def scribble() -> None:
        rng = np.random.default_rng(0)
        while not ends.is_set():
            shared = client._connection.shared
            for memory in list(shared._memories) if shared is not None else ():
                there = np.frombuffer(memory.view[len(latents.MARK) : 64 << 10], np.float32)
                there[:] = rng.choice(np.float32([np.nan, np.inf, -1e38, 0, 1]), len(there))

    thread = threading.Thread(target=scribble)
    thread.start()
    try:
        yield
    finally:
        ends.set()
        thread.join()


@pytest.mark.parametrize("plan", ["auto", {"step_cache": 0.1}, {"ulysses": 2, "step_cache": 1e9}], ids=str)
def test_a_client_writes_while_ranks_read(sturdy: Daemon, client: Client, plan: Any) -> None:
    """Ranks then compute with latents that differ, and go on together."""
    restarts = client.status()["group"]["restarts"]
    ours = client.load(FLUX.file)
    inputs = FLUX.inputs(7)
    right = ours.forward(**inputs)
    with sturdy.client() as scribbler, ThreadPoolExecutor(1) as pool:
        theirs = scribbler.load(FLUX.file, plan=plan)
        theirs.forward(**FLUX.inputs())
        with scribbling(scribbler):
            wrong = [pool.submit(theirs.forward, **FLUX.inputs(seed, batch=2)) for seed in range(30)]
            for _ in range(20):
                assert torch.equal(ours.forward(**inputs), right)
            outs = [future.result(START_S) for future in wrong]
    assert not all(out.isfinite().all() for out in outs), "nobody wrote while ranks read"
    assert client.status()["group"]["restarts"] == restarts


def test_what_was_cancelled_is_not_written_over(sturdy: Daemon, inject: Inject) -> None:
    """The ranks may still be at it, so the next latents lie elsewhere."""

    interruption = Interruption()
    with sturdy.client(on_wait=interruption) as client:
        model = client.load(FLUX.file)
        FLUX.check(model)
        assert client._connection.shared is not None
        (before,) = client._connection.shared._memories
        inject(kind="slow", at="forward", seconds=0.5, rank=1)
        interruption.armed.set()
        with pytest.raises(Interrupted):
            model.forward(**FLUX.inputs(1))
        interruption.armed.clear()
        assert client._connection.shared._memories == []
        FLUX.check(model, 2)
        (after,) = client._connection.shared._memories
        assert after.number != before.number
        with sturdy.client() as other:
            eventually(lambda: other.stats()["shared_bytes"] == after.nbytes, 5, "the other one is freed")


def test_given_back_under_a_forward(sturdy: Daemon, client: Client, inject: Inject) -> None:
    """The forward goes on, though its result is lost with the memory; nobody else notices."""
    restarts = client.status()["group"]["restarts"]
    model = client.load(FLUX.file)
    FLUX.check(model)
    shared = client._connection.shared
    assert shared is not None
    (memory,) = shared._memories
    inject(kind="slow", at="forward", seconds=0.5, rank=1)
    with ThreadPoolExecutor(1) as pool, sturdy.client() as watcher:
        forward = pool.submit(model.forward, **FLUX.inputs(5))
        eventually(lambda: watcher.status()["queue"]["running"], 3, "the forward runs")
        client._connection.unshare(shared, [memory.number])
        shared.close()
        forward.result(START_S)
        eventually(lambda: watcher.stats()["shared_bytes"] == 0, 3, "it is freed")
    FLUX.check(model, 6)
    assert client.status()["group"]["restarts"] == restarts


def test_without_the_second_socket_or_with_no_room_it_is_frames(sturdy: Daemon, client: Client) -> None:
    path = Path(f"{sturdy.socket}{MEMORY_SOCKET}")
    away = path.with_name("away")
    path.rename(away)
    try:
        with sturdy.client() as lonely:
            FLUX.check(lonely.load(FLUX.file))
            assert lonely._connection.shared is not None
            assert not shares(lonely)
    finally:
        away.rename(path)
    for limit in (0, 1000):
        with sturdy.changed({"limits.shared_bytes": limit}), sturdy.client() as poor:
            FLUX.check(poor.load(FLUX.file))
            assert (poor._connection.shared is None) == (limit == 0)
            assert not shares(poor)
    FLUX.check(client.load(FLUX.file))
    assert shares(client)


def test_where_ranks_refuse_it_it_is_frames(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once the client knows, it doesn't try again with that model."""
    refused = []
    converse = model_module.converse

    def refuse(connection: Any, kind: str, build: Any, *more: Any) -> Iterator[Any]:
        if kind == "forward" and "memory" in build():
            refused.append(build()["memory"])
            raise ArgumentError("x: not this model's", argument="memory")
        return converse(connection, kind, build, *more)

    model = client.load(FLUX.file)
    monkeypatch.setattr(model_module, "converse", refuse)
    for seed in range(3):
        FLUX.check(model, seed)
    assert len(refused) == 1
    shared = client._connection.shared
    assert shared is not None
    assert all(memory.idle for memory in shared._memories)


def test_a_restarted_daemon_gives_a_new_memory(models: Path) -> None:
    with Daemon(1, [models], {"drain_timeout_s": 0.2}) as daemon, daemon.client() as client:
        model = client.load(SD3.file)
        undisturbed = forwards(model, threading.Event())
        boot_id, under_way = client.boot_id, threading.Event()
        with ThreadPoolExecutor(1) as pool:
            result = pool.submit(forwards, model, under_way)
            assert under_way.wait(START_S)
            daemon.signal(signal.SIGKILL)
            daemon.wait()
            eventually(lambda: not daemon.processes(), 10, "its ranks are gone")
            daemon.start()
            assert torch.equal(result.result(START_S), undisturbed)
        assert client.boot_id != boot_id
        assert shares(client)


def test_a_daemon_that_stops_before_the_result_is_read(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It frees the memory, and what was there would be zeros: the forward is done again."""
    with Daemon(1, [models]) as daemon, daemon.client() as client:
        model = client.load(FLUX.file)
        read, reads = latents.Latents.result, list[Any]()

        def read_later(self: latents.Latents, out: Any) -> Any:
            if not reads:
                daemon.signal(signal.SIGTERM)
                daemon.wait()
                daemon.start()
            reads.append(out)
            return read(self, out)

        monkeypatch.setattr(latents.Latents, "result", read_later)
        FLUX.check(model, 3)
        assert [each.offset is None for each in reads] == [False, True]


def test_what_an_earlier_session_was_answered_is_void(client: Client) -> None:
    """A result of it lies in memory that went with it."""
    connection = client._connection
    request = connection.start("status", dict)
    connection._drop_session()
    request.replies.append(Message("done", {"earlier": True}, request.id))
    assert "earlier" not in next(connection.replies(request)).body
    connection.forget(request)

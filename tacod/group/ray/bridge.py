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

import ray

from tacod import logs, prctl
from tacod.group.arena import Arena
from tacod.group.descriptors import recv_fds
from tacod.group.ray.cluster import Cluster, Lost
from tacod.group.ray.generation import Generation, Supervisor, first_line
from tacod.group.ray.launcher import CONTROL, MESSAGE_BYTES

__all__ = ["main"]

CONNECT_S = 10.0
"""How long the cluster's head has to take a connection."""


class Bridge:
    """Does what the supervisor asks for, one request after the other."""

    def __init__(self, channel: socket.socket, address: str) -> None:
        self._supervisor = Supervisor(channel)
        self._cluster = Cluster(address)
        self._requests: asyncio.Queue[tuple[bytes, list[int]]] = asyncio.Queue()
        self._generation: Generation | None = None

    async def run(self) -> None:
        """Serve until the supervisor ends."""
        asyncio.get_running_loop().add_reader(self._supervisor.channel, self._read)
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
                # The supervisor doesn't wait, so its word that the one before is over may not have come.
                await self._end_generation()
                self._generation = Generation(self._cluster, self._supervisor, request, Arena(descriptors[0]))
            elif request["verb"] == "stacks" and self._generation is not None:
                self._generation.ask_for_stacks(request["ranks"])
            elif request["verb"] == "kill":
                await self._end_generation()
                self._supervisor.tell("killed", request["epoch"])

    def _read(self) -> None:
        channel = self._supervisor.channel
        try:
            message, descriptors = recv_fds(channel, MESSAGE_BYTES, 1, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            message, descriptors = b"", []
        if not message:
            asyncio.get_running_loop().remove_reader(channel)
        self._requests.put_nowait((message, descriptors))

    async def _end_generation(self) -> None:
        if self._generation is not None:
            await self._generation.end()
            self._generation = None

    async def close(self) -> None:
        """End everything on the cluster."""
        await self._end_generation()
        await self._cluster.close()


def _connect(address: str) -> None:
    """Join the cluster as a client. Raises `Lost`."""
    try:
        if address != "auto":
            # Ray itself would try for minutes.
            host, _, port = address.rpartition(":")
            socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
        ray.init(address=address, log_to_driver=True, logging_level=logging.WARNING, include_dashboard=False)
    except (ConnectionError, OSError, TimeoutError) as error:
        raise Lost(
            f"no Ray cluster answers at {address} (group.ray_address): {first_line(error)}; start one there with "
            "`ray start --head`, and have this machine join it with `ray start --address=HOST:PORT --num-gpus=0`"
        ) from None
    except Exception as error:
        text = " ".join(str(error).split())
        # So Ray words that the cluster has another version, of itself or of Python.
        wrong = "version mismatch" in text.lower()
        raise Lost(f"the Ray cluster {address} can't be joined: {text:.500}", configuration=wrong) from None


def main() -> None:
    """Be the bridge, on the socket that is stdin."""
    prctl.die_with_parent()
    logs.configure(os.environ.get("TACOD_LOG_LEVEL", "info"))
    address, supervisor = sys.argv[1], socket.socket(fileno=0)
    try:
        _connect(address)
    except Lost as lost:
        # Whatever is asked for first is a start.
        message = supervisor.recv(MESSAGE_BYTES)
        if message:
            epoch = json.loads(message[1:])["epoch"]
            told = {"reason": str(lost), "cause": lost.cause, "configuration": lost.configuration, "joined": False}
            Supervisor(supervisor).tell("lost", epoch, **told)
            supervisor.recv(1)
        return

    async def run() -> None:
        bridge = Bridge(supervisor, address)
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

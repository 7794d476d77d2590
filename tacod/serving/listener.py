"""The sockets by which clients connect: a ROUTER socket on a unix socket and on TCP, and the access check."""

from __future__ import annotations

import ctypes
import logging
import os
import time
from contextlib import ExitStack
from typing import Any

import zmq

from tacod.config import Config, ConfigError
from tacod.serving.access import ZAP_DOMAIN, Access, Keys
from tacod.serving.memory_socket import MemorySocket, memory_path
from tacod.serving.unix_socket import PathTaken, UnixSocket
from tacod_client import wire

__all__ = ["MAX_FRAME_BYTES", "Listener"]

log = logging.getLogger(__name__)

MAX_FRAME_BYTES = 8 * wire.FRAME_BYTES
"""Largest frame that is read, so that a client which doesn't split tensors gets an error before it is disconnected."""
REBIND_S = 2.0
"""How long a port may take to be free after it was closed."""


class Listener:
    """The clients' ROUTER socket, bound.

    Raises `ConfigError` if it can't be, and `OSError`; then nothing is left open.
    """

    def __init__(self, config: Config, keys: Keys | None) -> None:
        with ExitStack() as made:
            context: zmq.Context[Any] = zmq.Context()
            made.callback(context.term)
            # Before the first client can come.
            self.access = Access(context, keys)
            made.callback(self.access.close)
            _seed()
            self.socket: zmq.Socket[bytes] = context.socket(zmq.ROUTER)
            made.callback(self.socket.close)
            self._configure(config.heartbeat_s)
            beside = memory_path(config.socket_path)
            try:
                unix = UnixSocket(config.socket_path)
                made.callback(unix.remove)
                self.memory = MemorySocket(beside) if beside is not None else None
                """Where clients on this machine get shared memory; None if its path would be too long."""
            except PathTaken as error:
                raise ConfigError(f"endpoint: {error}") from None
            if self.memory is not None:
                made.callback(self.memory.close)
            else:
                log.info("clients get no shared memory: %s is too long for a second socket", config.socket_path)
            self.addresses: list[object] = [unix.socket.getsockname()]
            """What clients' connections have on this side: a unix socket's path, a TCP port."""
            # By its number: ZeroMQ would remove whatever is at the path.
            self.socket.setsockopt(zmq.USE_FD, unix.socket.detach())
            self.socket.bind(b"ipc://" + os.fsencode(config.socket_path))
            self.socket.setsockopt(zmq.USE_FD, -1)
            if config.curve is not None:
                self.addresses.append(int(config.curve.listen.rpartition(":")[2]))
            if config.curve is not None and keys is not None:
                try:
                    self._bind_tcp(config.curve.listen, keys)
                except zmq.ZMQError as error:
                    raise ConfigError(f"curve.listen: {config.curve.listen}: {error.strerror}") from None
            self._made = made.pop_all()

    def _configure(self, heartbeat_s: float) -> None:
        socket = self.socket
        socket.setsockopt(zmq.LINGER, 2000)
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        # Little is queued in the socket, so that an outbox can still replace stale progress.
        socket.setsockopt(zmq.SNDHWM, 16)
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        # Nor are many messages of each client, whatever their size; further ones wait at its end.
        socket.setsockopt(zmq.RCVHWM, 16)
        # A peer that hangs is disconnected, and then the next message to it fails.
        socket.setsockopt(zmq.HEARTBEAT_IVL, int(heartbeat_s * 500))
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, int(heartbeat_s * 1000))
        # So is one that connects and doesn't say who it is.
        socket.setsockopt(zmq.HANDSHAKE_IVL, int(max(1.0, heartbeat_s) * 1000))

    def _bind_tcp(self, listen: str, keys: Keys) -> None:
        """Serve TCP too. Options set here apply to later binds only: the unix socket asks for no keys."""
        self.socket.curve_server = True
        self.socket.curve_secretkey = keys.secret
        self.socket.setsockopt(zmq.ZAP_DOMAIN, ZAP_DOMAIN)
        # Were nobody there to be asked, nobody would come in.
        self.socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
        self.socket.setsockopt(zmq.IPV6, "[" in listen)
        deadline = time.monotonic() + REBIND_S
        while True:
            try:
                self.socket.bind(listen)
            except zmq.ZMQError as error:
                if error.errno != zmq.EADDRINUSE or time.monotonic() > deadline:
                    raise
                # An unbind takes a moment.
                time.sleep(0.01)
            else:
                return

    def rebind(self, listen: str, keys: Keys) -> None:
        """Serve TCP under other keys; connections under the old ones end."""
        self.socket.unbind(listen)
        self._bind_tcp(listen, keys)

    def close(self) -> None:
        """Close the sockets."""
        self._made.close()


def _seed() -> None:
    """Have a ROUTER socket that is made now begin to count its peers at a number that nobody knows.

    Their addresses are numbers in order, and a peer may claim any address. One that claimed the next would have libzmq
    end the daemon, as it then gives the same one twice. libzmq takes the first number from C's generator, unseeded.
    """
    ctypes.CDLL(None).srand(ctypes.c_uint(int.from_bytes(os.urandom(4), "little")))

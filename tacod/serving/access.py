"""Who a client is, and what it may do: users of this machine by their uid, all others by their CURVE key."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import zmq
from zmq.utils import z85

from tacod.config import ConfigError, ConfigUnreadable, Curve
from tacod_client.curve import PUBLIC, read_public_key, read_secret_key
from tacod_client.frames import receive

__all__ = ["Access", "Keys", "User"]

log = logging.getLogger(__name__)

ZAP = "inproc://zeromq.zap.01"
ZAP_DOMAIN = b"tacod"
REFUSALS_LOGGED_S = 1.0
"""Refusals are logged once in this time, so that strangers don't decide how much is logged."""


@dataclass(frozen=True)
class User:
    """The user of a client: from the kernel on a unix socket, from the CURVE key over TCP."""

    uid: int | None = None
    key: bytes = field(default=b"", repr=False)
    name: str = ""
    """The key's name, which is that of its file."""

    def __str__(self) -> str:
        return f"uid {self.uid}" if self.uid is not None else f"key {self.name}"


@dataclass(frozen=True)
class Keys:
    """The daemon's own pair of keys, and the names of the allowed clients by their public keys in Z85."""

    public: bytes
    secret: bytes = field(repr=False)
    clients: Mapping[bytes, str]
    admins: frozenset[str]

    @staticmethod
    def read(path: str, curve: Curve | None) -> Keys | None:
        """The keys that a configuration, whose file is ``path``, names.

        Raises `ConfigError`; `ConfigUnreadable` if it is this user who may not read them.
        """
        if curve is None:
            return None
        try:
            key = "secret_key"
            public, secret = read_secret_key(curve.secret_key)
            key = "clients"
            clients = _read_clients(Path(curve.clients))
            key = "admins"
            stranger = next((name for name in curve.admins if name not in clients.values()), None)
            if stranger is not None:
                raise ValueError(f"no {stranger}{PUBLIC} is among curve.clients")
        except OSError as error:
            kind = ConfigUnreadable if isinstance(error, PermissionError) else ConfigError
            raise kind(f"{path}:curve.{key}: {error.filename}: {error.strerror}") from None
        except ValueError as error:
            raise ConfigError(f"{path}:curve.{key}: {error}") from None
        return Keys(public, secret, clients, frozenset(curve.admins))


def _read_clients(path: Path) -> dict[bytes, str]:
    # Not by `Path.glob`, to which a folder that it may not read is empty.
    files = sorted(each for each in path.iterdir() if each.name.endswith(PUBLIC)) if path.is_dir() else [path]
    clients: dict[bytes, str] = {}
    for file in files:
        key = read_public_key(file)
        if key in clients:
            raise ValueError(f"{file} holds the same key as {clients[key]}{PUBLIC}; each client needs its own")
        clients[key] = file.name.removesuffix(PUBLIC)
    return clients


class Access:
    """Decides which clients may connect.

    ZeroMQ asks about each key on a socket of its own (ZAP, https://rfc.zeromq.org/spec/27/). pyzmq's authenticator
    needs a thread or asyncio for that; here it is one more socket in the daemon's loop.
    """

    def __init__(self, context: zmq.Context[Any], keys: Keys | None) -> None:
        self.keys = keys
        self.socket: zmq.Socket[bytes] = context.socket(zmq.REP)
        self.socket.bind(ZAP)
        self._refused = 0
        self._next_line_s = 0.0

    def close(self) -> None:
        """Close the socket; after that nobody can connect over TCP."""
        self.socket.close(linger=0)

    def changes(self, keys: Keys | None) -> list[str]:
        """The configuration's keys whose files have changed since they were read."""
        old, new = self.keys, keys
        if old is None or new is None:
            return []
        pairs = {"curve.secret_key": (old.secret, new.secret), "curve.clients": (old.clients, new.clients)}
        return [name for name, (was, comes) in pairs.items() if was != comes]

    def poll(self) -> None:
        """Answer ZeroMQ's questions about keys."""
        while (frames := receive(self.socket)) is not None:
            _, request, domain, address, _, mechanism, *credentials = (frame.bytes for frame in frames)
            key = z85.encode(credentials[0]) if mechanism == b"CURVE" else b""
            known = domain == ZAP_DOMAIN and self.keys is not None and key in self.keys.clients
            if not known:
                self._log_refusal(address, key)
            verdict = (b"200", b"OK", key) if known else (b"400", b"unknown key", b"")
            self.socket.send_multipart([b"1.0", request, *verdict, b""])

    def _log_refusal(self, address: bytes, key: bytes) -> None:
        self._refused += 1
        now = time.monotonic()
        if now >= self._next_line_s:
            more = f" ({self._refused - 1} more since the last such line)" if self._refused > 1 else ""
            log.warning("refused %s: curve.clients lacks its key %s%s", _text(address), _text(key), more)
            self._refused, self._next_line_s = 0, now + REFUSALS_LOGGED_S

    def user_of(self, frame: zmq.Frame) -> User | None:
        """The user who sent a frame; None if its key is no longer allowed."""
        # "localhost:uid:gid:pid" on a unix socket, as the kernel told when it was connected; over TCP an address in
        # numbers. On a unix socket nobody checks a User-Id: the peer itself may send one.
        try:
            host, _, peer = str(frame.get("Peer-Address")).partition(":")
            if host == "localhost":
                return User(int(peer.split(":")[0]))
            key = str(frame.get("User-Id")).encode()
        except zmq.ZMQError:
            return None
        name = self.keys.clients.get(key) if self.keys is not None else None
        return User(key=key, name=name) if name is not None else None

    def knows(self, user: User) -> bool:
        """Whether a connected user is still allowed."""
        return user.uid is not None or (self.keys is not None and self.keys.clients.get(user.key) == user.name)

    def is_admin(self, user: User) -> bool:
        """Whether a user may act on others' jobs and on the daemon: root, the daemon's own user, ``curve.admins``."""
        if user.uid is not None:
            return user.uid in (0, os.geteuid())
        return self.knows(user) and self.keys is not None and user.name in self.keys.admins


def _text(value: bytes) -> str:
    return value.decode("ascii", "replace")

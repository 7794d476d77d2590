"""Where the daemon listens, and a socket that is connected to it."""

from __future__ import annotations

import errno
import os
import socket as sockets
from contextlib import closing
from typing import Any

import zmq

from tacod_client.curve import ClientKeys, find_keys
from tacod_client.errors import ConnectionFailed, NotAllowed, ProtocolError
from tacod_client.text import encodable

__all__ = ["UNIX_PATH_BYTES", "Endpoint", "find_endpoint"]

UNIX_PATH_BYTES = 107
"""Linux's limit for the path of a unix socket, without the zero at its end."""
DEFAULT_ENDPOINT = "ipc:///run/tacod/tacod.sock"


def find_endpoint(endpoint: str | None = None) -> str:
    """The argument, else ``TACOD_ENDPOINT``, else the user's own daemon if its socket exists, else the system's."""
    if endpoint or (endpoint := os.environ.get("TACOD_ENDPOINT")):
        return endpoint
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    # Not Path.exists: another user's folder is none that there is, and no error.
    if runtime and os.path.exists(own := os.path.join(runtime, "tacod", "tacod.sock")):
        return f"ipc://{own}"
    return DEFAULT_ENDPOINT


class Endpoint:
    """Where tacod listens, and how to connect there: a unix socket without keys, TCP with CURVE keys."""

    def __init__(
        self, endpoint: str, key: str | os.PathLike[str] | None, server_key: str | os.PathLike[str] | None
    ) -> None:
        self.endpoint = endpoint
        self._named_keys = (key, server_key)
        self._keys: ClientKeys | None = None
        self._monitor: zmq.Socket[bytes] | None = None
        """Reports the handshake's outcome."""

    def open(self, context: zmq.Context[Any], timeout_s: float) -> zmq.Socket[bytes]:
        """A DEALER socket that connects there.

        Raises `ConnectionFailed`, at once and with the reason, if nobody can be listening; ZeroMQ itself would wait in
        silence.
        """
        if self.endpoint.startswith("ipc://"):
            _probe_unix(self.endpoint, _parse_unix(self.endpoint))
            socket: zmq.Socket[bytes] = context.socket(zmq.DEALER)
        else:
            host, port = _parse_tcp(self.endpoint)
            # Read each time: keys may be replaced while a client lives.
            self._keys = find_keys(*self._named_keys)
            family = _probe_tcp(self.endpoint, host, port, timeout_s)
            socket = context.socket(zmq.DEALER)
            socket.setsockopt(zmq.IPV6, family == sockets.AF_INET6)
            socket.curve_serverkey = self._keys.server
            socket.curve_publickey, socket.curve_secretkey = self._keys.public, self._keys.secret
            events = zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
            self._monitor = socket.get_monitor_socket(events)
        socket.setsockopt(zmq.LINGER, 0)
        # No limit: at one ZeroMQ would read no further, not even the daemon's heartbeats, and a client that doesn't
        # look for a while would lose its connection and its jobs. What may wait is what was asked for, an answer to
        # each request and a few hundred bytes for each step of a run, and an `alive` at every heartbeat: some MB a day.
        socket.setsockopt(zmq.RCVHWM, 0)
        # Not IMMEDIATE: it would throw away what the daemon said last, if the daemon then went faster than we read.
        # As bytes: a path need not be UTF-8.
        socket.connect(os.fsencode(self.endpoint))  # type: ignore[arg-type]
        return socket

    def memory_path(self, suffix: Any) -> bytes | None:
        """The path of the unix socket that hands out shared memory, by what the daemon told; None if there is none."""
        if not isinstance(suffix, str) or not self.endpoint.startswith("ipc://"):
            return None
        return _parse_unix(self.endpoint) + os.fsencode(suffix)

    def close(self, socket: zmq.Socket[bytes], linger_ms: int) -> None:
        """Close a socket that was opened here, and its monitor."""
        if self._monitor is not None:
            socket.disable_monitor()
            self._monitor.close(linger=0)
            self._monitor = None
        socket.close(linger=linger_ms)

    def check(self) -> None:
        """Check whether the daemon has refused the keys; ZeroMQ would try again forever.

        Raises `NotAllowed` for a key that the daemon doesn't know, `ConnectionFailed` if the daemon doesn't have that
        public key.
        """
        if self._keys is None or self._monitor is None or not self._monitor.poll(0):
            return
        from zmq.utils.monitor import recv_monitor_message

        keys = self._keys
        if recv_monitor_message(self._monitor)["event"] == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            raise NotAllowed(
                f"tacod at {self.endpoint} doesn't know the key in {keys.path}; have its public key, "
                f"{keys.public.decode()}, put into the folder that curve.clients names, and run `tacoctl reload` there"
            )
        raise ConnectionFailed(
            f"no tacod with the key in {keys.server_path} answers at {self.endpoint}; "
            "copy the daemon's public key there anew, and see that the port is that of curve.listen"
        )


def _parse_unix(endpoint: str) -> bytes:
    """The socket's path."""
    try:
        path = os.fsencode(endpoint.removeprefix("ipc://"))
    except UnicodeEncodeError:
        raise ProtocolError(f"endpoint {endpoint!r}: no path can have such characters") from None
    # ZeroMQ takes what begins with @ for no path at all.
    if not path or path.startswith(b"@") or b"\0" in path:
        raise ProtocolError(f"endpoint {endpoint!r}: expected ipc:///path/to/socket or tcp://host:port")
    if len(path) > UNIX_PATH_BYTES:
        raise ProtocolError(
            f"endpoint {encodable(endpoint)}: a unix socket's path has {UNIX_PATH_BYTES} bytes at most; "
            "have tacod listen in a folder that is less deep"
        )
    return path


def _probe_unix(endpoint: str, path: bytes) -> None:
    with closing(sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM)) as probe:
        # One whose queue is full listens, if slowly.
        probe.setblocking(False)
        code = probe.connect_ex(path)
    if code == errno.EACCES:
        raise ConnectionFailed(
            f"{encodable(endpoint).removeprefix('ipc://')}: permission denied; add yourself to the group that owns it "
            "(`sudo usermod -aG tacod $USER`, then log in again)"
        )
    if code not in (0, errno.EAGAIN):
        raise ConnectionFailed(
            f"no tacod listens at {encodable(endpoint)} ({os.strerror(code)}); start it with `systemctl start tacod`, "
            "or set TACOD_ENDPOINT if it listens elsewhere"
        )


def _parse_tcp(endpoint: str) -> tuple[str, int]:
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not endpoint.startswith("tcp://") or not host or not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise ProtocolError(f"endpoint {endpoint!r}: expected ipc:///path/to/socket or tcp://host:port")
    return host, int(port)


def _probe_tcp(endpoint: str, host: str, port: int, timeout_s: float) -> sockets.AddressFamily:
    try:
        with closing(sockets.create_connection((host, port), timeout_s)) as probe:
            return sockets.AddressFamily(probe.family)
    except UnicodeError:
        raise ProtocolError(f"endpoint {endpoint!r}: no host can have such a name") from None
    except OSError as error:
        raise ConnectionFailed(
            f"no tacod listens at {endpoint} ({error.strerror or error}); see there that curve.listen is set "
            "and that no firewall stands between"
        ) from None

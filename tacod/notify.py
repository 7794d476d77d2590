"""sd_notify(3): tell systemd what the daemon is doing."""

from __future__ import annotations

import contextlib
import os
import socket

__all__ = ["notify", "watchdog_s"]


def notify(*fields: str) -> None:
    """Send fields such as ``READY=1`` or ``STATUS=loading``; without systemd this does nothing."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    # A manager that went away, or doesn't read, is no reason to stop serving.
    sock.settimeout(1.0)
    with sock, contextlib.suppress(OSError):
        sock.sendto("\n".join(fields).encode(), address)


def watchdog_s() -> float | None:
    """How often systemd wants a ``WATCHDOG=1``, in seconds: half of what it allows. None if it wants none."""
    usec = os.environ.get("WATCHDOG_USEC", "")
    ours = os.environ.get("WATCHDOG_PID") in (None, str(os.getpid()))
    return int(usec) / 2e6 if usec.isdigit() and int(usec) > 0 and ours else None

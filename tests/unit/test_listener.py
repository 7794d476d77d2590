"""The sockets by which clients connect."""

from __future__ import annotations

import ctypes
from pathlib import Path

import zmq

from tacod.config import Config
from tacod.serving.listener import Listener


def first_address(path: Path) -> bytes:
    """What the first peer of a daemon, as a new process has it, is known by."""
    # A process begins so, says C's standard.
    ctypes.CDLL(None).srand(1)
    listener = Listener(Config.model_validate({"endpoint": f"ipc://{path}", "group": {"device": "cpu"}}), None)
    try:
        with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
            socket.linger = 0
            socket.connect(f"ipc://{path}")
            socket.send(b"here")
            assert listener.socket.poll(10_000)
            return listener.socket.recv_multipart()[0]
    finally:
        listener.close()


def test_nobody_knows_at_which_number_peers_are_counted(tmp_path: Path) -> None:
    """Who did could claim the address of a peer to come, and libzmq would end the daemon over it."""
    addresses = {first_address(tmp_path / name) for name in ("a", "b", "c")}
    assert len(addresses) == 3
    assert all(len(each) == 5 and each.startswith(b"\0") for each in addresses)

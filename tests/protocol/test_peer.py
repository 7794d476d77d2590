"""Whose process a peer is, is what the kernel says, whatever the peer says itself in ZMTP's handshake."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import zmq

from tacod.serving.access import Access, Keys, User

GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
"""Of ZMTP 3.0, without security."""
PUBLIC, SECRET = zmq.curve_keypair()
KEYS = Keys(PUBLIC, SECRET, {PUBLIC: "carol"}, frozenset({"carol"}))


@pytest.fixture
def access() -> Iterator[Access]:
    with zmq.Context() as context:
        access = Access(context, KEYS)
        yield access
        access.close()


def ready(**properties: bytes) -> bytes:
    """READY with a peer's properties, and one message."""
    words = b"\x05READY"
    for name, value in {"Socket_Type": b"DEALER", **properties}.items():
        words += bytes([len(name)]) + name.replace("_", "-").encode() + struct.pack(">I", len(value)) + value
    return b"\x04" + bytes([len(words)]) + words + b"\x00\x02hi"


@pytest.mark.parametrize(
    "claims",
    [{}, {"User_Id": PUBLIC}, {"User_Id": b"nobody's"}, {"Peer_Address": b"127.0.0.1", "User_Id": PUBLIC}],
    ids=["none", "an admin's key", "an unknown key", "another address"],
)
def test_what_a_peer_on_the_unix_socket_claims_counts_for_nothing(
    access: Access, tmp_path: Path, claims: dict[str, bytes]
) -> None:
    path = f"{tmp_path}/s"
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.bind(f"ipc://{path}")
        with closing(socket.socket(socket.AF_UNIX)) as peer:
            peer.connect(path)
            peer.sendall(GREETING)
            # All of it: what comes before its last byte is lost on libzmq now and then.
            assert len(peer.recv(len(GREETING), socket.MSG_WAITALL)) == len(GREETING)
            peer.sendall(ready(**claims))
            assert router.poll(5000)
            frame, _ = router.recv_multipart(copy=False)
            assert access.user_of(frame) == User(os.geteuid())


def test_a_message_that_nobody_vouches_for_is_nobodys(access: Access) -> None:
    assert access.user_of(zmq.Frame(b"hi")) is None

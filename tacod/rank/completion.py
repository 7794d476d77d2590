"""A completion: rank 0 tells a client that its result lies in the shared memory, before the ranks have agreed on it.

All ranks have given their part by then. So the result is whole, and the command isn't done again whatever becomes of
the ranks: rank 0 notes the completion on the board first, and the supervisor looks there when ranks are lost. The
supervisor's answer follows on its own way, and serves where a completion can't be sent.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable

from tacod.group.board import REPORT_BYTES, Board
from tacod.group.work import Done, Envelope, Result, Stepped, pack_done
from tacod_client import wire
from tacod_client.wire import Message

__all__ = ["Completion"]

log = logging.getLogger(__name__)


class Completion:
    """That of one command. `prepare` it while a GPU still computes, and `send` it when the result is there."""

    def __init__(
        self,
        board: Board,
        envelope: Envelope,
        channel: socket.socket,
        inject: Callable[[str], None] = lambda when: None,
    ) -> None:
        """It goes to the client through ``channel``. ``inject`` may raise ``"written"`` before it is sent, in tests."""
        self._board = board
        self._envelope = envelope
        self._channel = channel
        self._inject = inject
        self._packet = b""

    def prepare(self, result: Result, memory_used_bytes: int) -> None:
        """Describe the result, if it is to lie in the client's memory alone."""
        number = self._envelope.request_id
        if number is None or not isinstance(result, Stepped) or result.out is None:
            return
        outs = result.out if isinstance(result.out, list) else [result.out]
        if any(each.offset is None for each in outs):
            return
        packet = b"".join(map(bytes, wire.encode(Message("completion", {"out": result.out}, number))))
        report = pack_done(Done(memory_used_bytes, 0.0, 0.0, result))
        if len(packet) <= wire.COMPLETION_BYTES and len(report) <= REPORT_BYTES:
            self._board.note_report(report)
            self._packet = packet

    def send(self) -> None:
        """The result is there: note it on the board, and tell the client, if that can be done without waiting."""
        if not self._packet:
            return
        self._inject("written")
        self._board.complete(self._envelope.id)
        try:
            self._channel.send(self._packet, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except OSError as error:
            # The client doesn't read, or is gone. It gets the supervisor's answer, if anything.
            log.debug("no completion was sent: %s", error.strerror)

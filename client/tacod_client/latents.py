"""A forward's latents on their way to the ranks, and its result on the way back: in shared memory, or as frames."""

from __future__ import annotations

import math
from typing import Any

from tacod_client.connection import Connection
from tacod_client.errors import ArgumentError, ProtocolError
from tacod_client.exchange import pack
from tacod_client.shared import Memory, Shared, aligned
from tacod_client.tensors import description, fill, kind_of
from tacod_client.wire import ALIGNED_BYTES, Tensor, map_tensors

__all__ = ["LEAST_BYTES", "Latents", "check_latents"]

LEAST_BYTES = 64 << 10
"""Smaller latents travel as frames, which are as fast."""
MARK = bytes(range(1, 1 + ALIGNED_BYTES))
"""What lies before the latents: pages that the daemon has freed are zeros, from the first one on."""


class Latents:
    """The latents of one forward, on their way in shared memory where that is possible.

    The forward calls `pack` each time that it is sent, `result` for its answer and `close` at its end.
    """

    def __init__(self, connection: Connection, x: Any, shares: bool = True) -> None:
        """``x`` is a tensor or a list of tensors of the caller's, torch or numpy; it is shared only if ``shares``."""
        self.shares = shares
        self._connection = connection
        self._given = list(x) if isinstance(x, (list, tuple)) else [x]
        self._x = x
        self._is_list = isinstance(x, (list, tuple))
        self._place: tuple[Shared, Memory, int] | None = None
        self._packed: Any = None
        self._fields: dict[str, Any] = {}

    def pack(self) -> tuple[Any, dict[str, Any]]:
        """``x`` as it is sent, and the fields of its request that say where it lies; none if it travels as frames.

        What an earlier call put into memory is still there, if the session is the same. Raises `ArgumentError`.
        """
        shared = self._connection.shared if self.shares else None
        if self._place is not None and self._place[0] is not shared:
            # That session has ended, and its memory with it.
            self._place = None
        if self._place is None and shared is not None:
            self._put(shared)
        if self._place is None and (self._packed is None or self._fields):
            self._packed, self._fields = pack(self._x, "x", {}, None), {}
        return self._packed, self._fields

    def _put(self, shared: Shared) -> None:
        tensors = [each for each in map(description, self._given) if each is not None]
        sizes = [each.nbytes for each in tensors]
        if len(tensors) < len(self._given) or not all(sizes) or sum(sizes) < LEAST_BYTES:
            return
        places, size = _lay_out(sizes)
        # A result has the latents' shapes, or fewer channels, and four bytes a number at most.
        room = _lay_out([max(each, 4 * math.prod(its.shape)) for each, its in zip(sizes, tensors, strict=True)])[1]
        taken = shared.take(len(MARK) + size + room)
        if taken is None:
            return
        memory, offset, useless = taken
        self._place = shared, memory, offset
        memory.view[offset : offset + len(MARK)] = MARK
        offset += len(MARK)
        try:
            for given, place, nbytes in zip(self._given, places, sizes, strict=True):
                fill(memory.view[offset + place : offset + place + nbytes], given)
        except BaseException:
            self.close(answered=True)
            raise
        x = [Tensor(its.dtype, its.shape, None, None, offset + at) for its, at in zip(tensors, places, strict=True)]
        self._packed = x if self._is_list else x[0]
        self._fields = {"memory": memory.number, "room": [offset + size, room]}
        self._connection.unshare(shared, useless)

    def result(self, out: Any) -> Any:
        """The answer's output, with tensors in shared memory as views of it, to be copied before `is_gone` is asked.

        Raises `ProtocolError`.
        """

        def found(tensor: Tensor) -> Tensor:
            if tensor.offset is None:
                return tensor
            start, size = self._fields.get("room", (0, 0))
            end = tensor.offset + tensor.nbytes
            if self._place is None or not start <= tensor.offset <= end <= start + size:
                raise ProtocolError("the daemon's output lies where none was asked for")
            return Tensor(tensor.dtype, tensor.shape, (self._place[1].view[tensor.offset : end],))

        return map_tensors(out, found)

    @property
    def is_gone(self) -> bool:
        """Whether the daemon has freed the memory, as it does when the session ends; then what was read there is void.

        To be asked after the result is copied.
        """
        if self._place is None:
            return False
        _, memory, offset = self._place
        return bytes(memory.view[offset : offset + len(MARK)]) != MARK

    def stop_sharing(self) -> None:
        """Have the latents travel as frames; the request that named their place was answered."""
        self.close(answered=True)
        self.shares = False

    def close(self, answered: bool) -> None:
        """Let go of the place; unless the request was ``answered``, nothing else is put there any more."""
        if self._place is None:
            return
        (shared, memory, offset), self._place = self._place, None
        self._connection.unshare(shared, shared.release(memory, offset, answered))


def _lay_out(sizes: list[int]) -> tuple[list[int], int]:
    """Where tensors of these sizes begin, one behind the other, and where the next one would."""
    places, position = [], 0
    for size in sizes:
        places.append(position)
        position = aligned(position + size, ALIGNED_BYTES)
    return places, position


def check_latents(name: str, given: Any) -> None:
    """Raise `ArgumentError`, naming the argument, unless it is a tensor or a list of such."""
    several = given if isinstance(given, (list, tuple)) else [given]
    if not several or any(kind_of(each) is None for each in several):
        missing = "missing, or " if given is None else ""
        raise ArgumentError(
            f"{name}: {missing}neither a torch tensor nor a numpy array, nor a list of such", argument=name
        )

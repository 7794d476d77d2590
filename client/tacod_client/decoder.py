"""A decoder that recognizes messages: a step of a run asks the same as the step before, of other latents.

A known message runs little code. That counts between two steps, when the code is no longer in the CPU's caches.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from functools import cache

import msgpack

from tacod_client import wire
from tacod_client.wire import Buffer, Form, Message

__all__ = ["Decoder", "header_of", "tail_of"]

FORMS = 64
"""Forms that are remembered; the least recently used goes first."""
LARGEST_BYTES = 16 << 10
"""Messages with a longer header are not remembered."""
_MORE_BYTES = {0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8}
"""How many bytes follow the first one of a msgpack uint."""


class Decoder:
    """Decodes messages, and recognizes those of some ``types`` by their headers.

    A header decides all of a message but its tensors' bytes. So a header that equals an earlier one in all but the id
    is valid too, and its message has the same `Form`. Only the sizes of its frames are checked.
    """

    def __init__(self, *types: str) -> None:
        self._heads = tuple(map(_head, types))
        self._forms: OrderedDict[bytes, Form] = OrderedDict()
        """By their headers without the id."""

    def decode(self, frames: Sequence[Buffer]) -> Message:
        """As `wire.decode`."""
        if len(frames) < 2 or frames[0] != wire.PREAMBLE or len(frames[1]) > LARGEST_BYTES:
            return wire.decode(frames)
        number, rest = _without_id(bytes(frames[1]), self._heads)
        form = self._forms.get(rest)
        if form is not None and number < 1 << 63:
            self._forms.move_to_end(rest)
            return form.fill(number, frames[2:])
        message = wire.decode(frames)
        if rest:
            assert message.form is not None
            self._forms[rest] = message.form
            if len(self._forms) > FORMS:
                self._forms.popitem(last=False)
        return message


def _without_id(header: bytes, heads: Sequence[bytes]) -> tuple[int, bytes]:
    """The id of a header that begins with one of these ``heads``, and the header's other bytes; 0 and none of others.

    An id is found only as `wire.encode` writes it.
    """
    for head in heads:
        if header.startswith(head):
            start = len(head) + 1
            first = header[start - 1] if len(header) >= start else 0xFF
            if first < 0x80:
                return first, head + header[start:]
            if first in _MORE_BYTES:
                end = start + _MORE_BYTES[first]
                return int.from_bytes(header[start:end], "big"), head + header[end:]
    return 0, b""


@cache
def _head(kind: str) -> bytes:
    """What stands before the id in a header that `wire.encode` has made."""
    packer = msgpack.Packer()
    return b"".join((packer.pack_map_header(5), packer.pack("type"), packer.pack(kind), packer.pack("id")))


def tail_of(header: bytes, kind: str) -> bytes:
    """What stands behind the id in a header of this type, as `wire.encode` makes it."""
    head = _head(kind)
    return _without_id(header, (head,))[1][len(head) :]


def header_of(kind: str, number: int, tail: bytes) -> bytes:
    """The header of a message of this type and id, by its `tail_of`."""
    return b"".join((_head(kind), msgpack.packb(number), tail))

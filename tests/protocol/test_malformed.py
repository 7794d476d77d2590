"""Each thing that docs/protocol.md forbids, sent once: a `ProtocolError` that names the field."""

from __future__ import annotations

import re
from typing import Any

import msgpack
import pytest

from tacod_client import wire
from tacod_client.errors import ProtocolError
from tacod_client.wire import decode

PREAMBLE = b"TACO\x01"
REF = msgpack.ExtType(1, bytes(4))
FLOAT = {"dtype": "F32", "shape": [2]}
EIGHT = bytes(8)
DIGEST = bytes(32)


def packed(**changes: Any) -> bytes:
    """A header with changes; an ellipsis leaves a field out."""
    header = {"type": "forward", "id": 1, "session": b"token", "tensors": [], "body": {}, **changes}
    data: bytes = msgpack.packb({key: value for key, value in header.items() if value is not ...})
    return data


def one(*contents: bytes, body: Any = None, **described: Any) -> list[bytes]:
    """A message with one tensor, and its frames."""
    body = {"x": REF} if body is None else body
    return [PREAMBLE, packed(tensors=[{**FLOAT, **described}], body=body), *contents]


def nested(depth: int, value: Any = 1) -> Any:
    """A value so many lists deep."""
    for _ in range(depth):
        value = [value]
    return value


def ref(index: int) -> msgpack.ExtType:
    return msgpack.ExtType(1, index.to_bytes(4, "big"))


GOOD = {
    "no tensor": [PREAMBLE, packed()],
    "a tensor": one(EIGHT),
    "a tensor by digest": one(digest=DIGEST, bytes=False),
    "a tensor with bytes and digest": one(EIGHT, digest=DIGEST, bytes=True),
    "an empty tensor": one(shape=[0, 3]),
    "a single number": one(bytes(4), shape=[]),
    "the deepest body": [PREAMBLE, packed(body={"a": nested(15)})],
    "the smallest id": [PREAMBLE, packed(id=0)],
    "the largest id": [PREAMBLE, packed(id=2**63 - 1)],
    "the largest header": [
        PREAMBLE,
        packed(body={"a": "x" * (wire.HEADER_BYTES - len(packed(body={"a": "x" * 2**16})) + 2**16)}),
    ],
    "the largest tensor": one(dtype="U8", shape=[2**40], digest=DIGEST, bytes=False),
    "most dimensions": one(EIGHT, shape=[2] + [1] * 7),
    "most tensors": [
        PREAMBLE,
        packed(
            tensors=[{**FLOAT, "digest": DIGEST, "bytes": False}] * 16384, body={"x": [ref(at) for at in range(16384)]}
        ),
    ],
}

BAD: dict[str, tuple[str, list[bytes]]] = {
    # frames and preamble
    "no frames": ("2 frames", []),
    "one frame": ("2 frames", [PREAMBLE]),
    "empty frames": ("frame 0", [b"", b""]),
    "bad magic": ("frame 0", [b"TACA\x01", packed()]),
    "lower-case magic": ("frame 0", [b"taco\x01", packed()]),
    "no version": ("frame 0", [b"TACO", packed()]),
    "long preamble": ("frame 0", [PREAMBLE + b"\0", packed()]),
    "huge preamble": ("frame 0", [PREAMBLE * 100_000, packed()]),
    "version 0": ("frame 0: protocol version 0", [b"TACO\x00", packed()]),
    "version 2": ("frame 0: protocol version 2", [b"TACO\x02", packed()]),
    "version 255": ("frame 0: protocol version 255", [b"TACO\xff", packed()]),
    "swapped frames": ("frame 0", [packed(), PREAMBLE]),
    # the header as a whole
    "empty header": ("frame 1", [PREAMBLE, b""]),
    "truncated msgpack": ("frame 1", [PREAMBLE, packed()[:-1]]),
    "half of a msgpack": ("frame 1", [PREAMBLE, packed()[:20]]),
    "bytes after the map": ("frame 1", [PREAMBLE, packed() + b"\xc0"]),
    "two maps": ("frame 1", [PREAMBLE, packed() * 2]),
    "reserved byte": ("frame 1", [PREAMBLE, b"\xc1"]),
    "nested without end": ("frame 1", [PREAMBLE, b"\x91" * 100_000]),
    "maps nested without end": ("frame 1", [PREAMBLE, b"\x81\xa1a" * 100_000]),
    "array of 4 billion": ("frame 1", [PREAMBLE, b"\xdd\xff\xff\xff\xff"]),
    "map of 4 billion": ("frame 1", [PREAMBLE, b"\xdf\xff\xff\xff\xff"]),
    "string of 4 billion": ("frame 1", [PREAMBLE, b"\xdb\xff\xff\xff\xff"]),
    "extension of 4 billion": ("frame 1", [PREAMBLE, b"\xc9\xff\xff\xff\xff\x01"]),
    "array": ("frame 1: expected a msgpack map, got list", [PREAMBLE, msgpack.packb([1, 2])]),
    "nil": ("frame 1: expected a msgpack map, got NoneType", [PREAMBLE, b"\xc0"]),
    "number": ("frame 1: expected a msgpack map, got int", [PREAMBLE, b"\x07"]),
    "string": ("frame 1: expected a msgpack map, got str", [PREAMBLE, msgpack.packb("type")]),
    "tensor as header": ("frame 1", [PREAMBLE, msgpack.packb(REF)]),
    "empty map": ("frame 1: unknown or missing field", [PREAMBLE, b"\x80"]),
    "non-UTF-8 string": ("frame 1", [PREAMBLE, packed().replace(b"forward", b"forwar\xff")]),
    "surrogate in a string": ("frame 1", [PREAMBLE, packed().replace(b"forward", b"forw\xed\xa0\x80")]),
    "non-UTF-8 key": ("frame 1", [PREAMBLE, packed().replace(b"body", b"bod\xff")]),
    "integer as key": ("frame 1", [PREAMBLE, msgpack.packb({1: 2})]),
    "array as key": ("frame 1", [PREAMBLE, b"\x81\x90\xc0"]),
    "binary keys": ("frame 1: unknown or missing", [PREAMBLE, msgpack.packb({b"type": "x"})]),
    "header too large": ("frame 1: a header of", [PREAMBLE, packed(type="x" * wire.HEADER_BYTES)]),
    # the header's fields
    "extra field": ("frame 1: unknown or missing field 'extra'", [PREAMBLE, packed(extra=1)]),
    "no type": ("field 'type'", [PREAMBLE, packed(type=...)]),
    "no id": ("field 'id'", [PREAMBLE, packed(id=...)]),
    "no session": ("field 'session'", [PREAMBLE, packed(session=...)]),
    "no tensors": ("field 'tensors'", [PREAMBLE, packed(tensors=...)]),
    "no body": ("field 'body'", [PREAMBLE, packed(body=...)]),
    "binary type": ("type: expected str, got bytes", [PREAMBLE, packed(type=b"forward")]),
    "nil type": ("type: expected str", [PREAMBLE, packed(type=None)]),
    "bool as id": ("id: expected int, got bool", [PREAMBLE, packed(id=True)]),
    "float as id": ("id: expected int, got float", [PREAMBLE, packed(id=1.0)]),
    "string as id": ("id: expected int", [PREAMBLE, packed(id="1")]),
    "tensor as id": ("id: expected int", [PREAMBLE, packed(id=REF)]),
    "negative id": ("id: out of range", [PREAMBLE, packed(id=-1)]),
    "id of 64 bits": ("id: out of range", [PREAMBLE, packed(id=2**63)]),
    "string as session": ("session: expected bytes, got str", [PREAMBLE, packed(session="token")]),
    "map as tensors": ("tensors: expected list, got dict", [PREAMBLE, packed(tensors={})]),
    "array as body": ("body: expected dict, got list", [PREAMBLE, packed(body=[])]),
    "tensor as body": ("body: expected dict", one(EIGHT, body=REF)),
    # the tensors' descriptions
    "too many tensors": ("tensors: 16385", [PREAMBLE, packed(tensors=[FLOAT] * 16385)]),
    "number as tensor": ("tensors[0]: expected a map", [PREAMBLE, packed(tensors=[1])]),
    "nil as tensor": ("tensors[0]: expected a map", [PREAMBLE, packed(tensors=[None])]),
    "reference as tensor": ("tensors[0]: expected a map", [PREAMBLE, packed(tensors=[REF])]),
    "unknown key": ("tensors[0]: expected a map", one(EIGHT, strides=[1])),
    "no dtype": ("tensors[0].dtype", [PREAMBLE, packed(tensors=[{"shape": [2]}], body={"x": REF}), EIGHT]),
    "unknown dtype": ("tensors[0].dtype: unknown dtype 'F128'", one(EIGHT, dtype="F128")),
    "torch's dtype name": ("tensors[0].dtype", one(EIGHT, dtype="float32")),
    "lower-case dtype": ("tensors[0].dtype", one(EIGHT, dtype="f32")),
    "binary dtype": ("tensors[0].dtype", one(EIGHT, dtype=b"F32")),
    "array as dtype": ("tensors[0].dtype", one(EIGHT, dtype=["F32"])),
    "no shape": ("tensors[0].shape", [PREAMBLE, packed(tensors=[{"dtype": "F32"}], body={"x": REF}), EIGHT]),
    "number as shape": ("tensors[0].shape", one(EIGHT, shape=2)),
    "string as shape": ("tensors[0].shape", one(EIGHT, shape="2")),
    "negative dimension": ("tensors[0].shape: sizes must be", one(EIGHT, shape=[-2])),
    "two negative dimensions": ("tensors[0].shape: sizes must be", one(EIGHT, shape=[-1, -2])),
    "bool as dimension": ("tensors[0].shape: sizes must be", one(bytes(4), shape=[True])),
    "float as dimension": ("tensors[0].shape: sizes must be", one(EIGHT, shape=[2.0])),
    "nested shape": ("tensors[0].shape: sizes must be", one(EIGHT, shape=[[2]])),
    "reference as dimension": ("tensors[0].shape: sizes must be", one(EIGHT, shape=[REF])),
    "nine dimensions": ("tensors[0].shape: expected a list of at most 8", one(EIGHT, shape=[2] + [1] * 8)),
    "dimension of 64 bits": ("tensors[0].shape", one(EIGHT, shape=[2**64 - 1])),
    "dimension over the limit": ("tensors[0].shape", one(dtype="U8", shape=[2**40 + 1], digest=DIGEST, bytes=False)),
    "bytes over the limit": ("tensors[0].shape", one(shape=[2**38 + 1], digest=DIGEST, bytes=False)),
    "product over the limit": ("tensors[0].shape", one(EIGHT, shape=[2**20, 2**20])),
    "product that wraps to 0": ("tensors[0].shape", one(shape=[2**32, 2**32])),
    "huge sizes behind a 0": ("tensors[0].shape", one(shape=[2**40, 2**40, 0])),
    "short digest": ("tensors[0].digest", one(EIGHT, digest=bytes(31))),
    "long digest": ("tensors[0].digest", one(EIGHT, digest=bytes(33))),
    "empty digest": ("tensors[0].digest", one(EIGHT, digest=b"")),
    "string as digest": ("tensors[0].digest", one(EIGHT, digest="0" * 32)),
    "number as bytes": ("tensors[0].bytes", one(EIGHT, digest=DIGEST, bytes=0)),
    "nil as bytes": ("tensors[0].bytes", one(EIGHT, digest=DIGEST, bytes=None)),
    "neither bytes nor digest": ("tensors[0].bytes", one(bytes=False)),
    "second tensor at fault": (
        "tensors[1].dtype",
        [PREAMBLE, packed(tensors=[FLOAT, {**FLOAT, "dtype": "X"}], body={"x": [REF, ref(1)]}), EIGHT, EIGHT],
    ),
    # frames against descriptions
    "frame missing": ("tensors[0]: F32 [2] takes 8 bytes", one()),
    "too few bytes": ("tensors[0]: F32 [2] takes 8 bytes", one(bytes(7))),
    "too many bytes": ("tensors[0]: F32 [2] takes 8 bytes", one(bytes(9))),
    "empty frame": ("tensors[0]: F32 [2] takes 8 bytes", one(b"")),
    "empty frame before": ("tensors[0]: F32 [2] takes 8 bytes", one(b"", EIGHT)),
    "contents split otherwise": ("tensors[0]: F32 [2] takes 8 bytes", one(bytes(4), bytes(4))),
    "frame over 8 MiB": (
        "tensors[0]: U8 [8388609]",
        one(bytes(wire.FRAME_BYTES + 1), dtype="U8", shape=[wire.FRAME_BYTES + 1]),
    ),
    "second frame missing": (
        "tensors[0]: U8 [8388609]",
        one(bytes(wire.FRAME_BYTES), dtype="U8", shape=[wire.FRAME_BYTES + 1]),
    ),
    "second tensor's frame missing": (
        "tensors[1]: F32 [2]",
        [PREAMBLE, packed(tensors=[FLOAT, FLOAT], body={"x": [REF, ref(1)]}), EIGHT],
    ),
    "frame left over": ("frames: 1 left over", one(EIGHT, EIGHT)),
    "empty frame left over": ("frames: 1 left over", one(EIGHT, b"")),
    "empty frame for an empty tensor": ("frames: 1 left over", one(b"", shape=[0])),
    "frame for a tensor by digest": ("frames: 1 left over", one(EIGHT, digest=DIGEST, bytes=False)),
    "frames without tensors": ("frames: 1 left over", [PREAMBLE, packed(), b"x"]),
    "50 frames": ("frames: 48 left over", [PREAMBLE, packed(), *[b"x"] * 48]),
    "50 empty frames": ("frame 0", [b""] * 50),
    # the body
    "tensor referenced twice": ("tensors: every tensor must stand", one(EIGHT, body={"x": [REF, REF]})),
    "tensor never referenced": ("tensors: every tensor must stand", one(EIGHT, body={})),
    "index out of range": ("body: refers to tensor 1", one(EIGHT, body={"x": ref(1)})),
    "index without tensors": ("body: refers to tensor 0", [PREAMBLE, packed(body={"x": REF})]),
    "index of 32 bits": ("body: refers to tensor 4294967295", one(EIGHT, body={"x": ref(2**32 - 1)})),
    "wrong extension": ("body: extension 2", one(EIGHT, body={"x": msgpack.ExtType(2, bytes(4))})),
    "extension 127": ("body: extension 127", one(EIGHT, body={"x": msgpack.ExtType(127, b"")})),
    "short index": ("body: extension 1 of 2 bytes", one(EIGHT, body={"x": msgpack.ExtType(1, bytes(2))})),
    "long index": ("body: extension 1 of 8 bytes", one(EIGHT, body={"x": msgpack.ExtType(1, bytes(8))})),
    "timestamp": ("body: Timestamp", [PREAMBLE, packed(body={"at": msgpack.Timestamp(0)})]),
    "bad timestamp": ("frame 1", [PREAMBLE, packed().replace(b"\xa4body\x80", b"\xa4body\x81\xa1a\xd4\xff\x00")]),
    "integer as key in the body": ("frame 1", [PREAMBLE, packed(body={1: 1})]),
    "binary key in the body": ("body: the keys of a map must be strings", [PREAMBLE, packed(body={b"x": 1})]),
    "binary key deeper": ("body: the keys of a map must be strings", [PREAMBLE, packed(body={"a": [{b"x": 1}]})]),
    "body nested too deep": ("body: nested deeper than 16", [PREAMBLE, packed(body={"a": nested(16)})]),
    "tensor nested too deep": ("body: nested deeper than 16", one(EIGHT, body={"x": nested(16, REF)})),
    "body nested far too deep": ("body: nested deeper than 16", [PREAMBLE, packed(body={"a": nested(300)})]),
}  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_what_is_allowed_is_read(name: str) -> None:
    assert decode(GOOD[name]).type == "forward"


def test_largest_header_is_as_large_as_it_may_be() -> None:
    assert len(GOOD["the largest header"][1]) == wire.HEADER_BYTES


@pytest.mark.parametrize("name", BAD)
def test_what_is_forbidden_is_refused_and_named(name: str) -> None:
    field, frames = BAD[name]
    with pytest.raises(ProtocolError, match=re.escape(field)) as caught:
        decode(frames)
    assert len(caught.value.message) < 400, "a message that fits on a screen"


@pytest.mark.parametrize("name", ["bad magic", "frame missing", "body nested too deep"])
def test_frames_may_be_any_kind_of_buffer(name: str) -> None:
    field, frames = BAD[name]
    for kind in (bytearray, memoryview):
        with pytest.raises(ProtocolError, match=re.escape(field)):
            decode([kind(frame) for frame in frames])


def test_wrong_version_tells_the_right_one() -> None:
    with pytest.raises(ProtocolError, match="speaks 1") as caught:
        decode([b"TACO\x02", packed()])
    assert caught.value.details == {"version": wire.PROTOCOL}


def test_size_is_refused_before_any_memory_is_taken_for_it() -> None:
    with pytest.raises(ProtocolError, match=r"tensors\[0\]"):
        decode(one(dtype="U8", shape=[2**40]))

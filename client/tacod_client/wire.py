"""The codec: messages and tensors as ZeroMQ frames (docs/protocol.md is normative).

A message is a list of frames::

    0   b"TACO" and one byte: the protocol version
    1   a msgpack map: type, id, session, body, tensors
    2…  the bytes of the tensors, in order, each in frames of at most 8 MiB

In the body a tensor stands as msgpack extension 1 holding its index in ``tensors``. A tensor may travel without its
bytes: by digest, when the receiver is known or hoped to hold it already, or by its offset in shared memory. Nothing
here imports torch, and nothing here touches a tensor's bytes before its dtype, shape and frames agree.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgpack

from tacod_client.errors import ProtocolError

__all__ = ["DTYPES", "FRAME_BYTES", "PROTOCOL", "Message", "Tensor", "decode", "encode", "map_tensors"]

PROTOCOL = 1
"""Version of the protocol, independent of the package's: a daemon refuses any other."""

MAGIC = b"TACO"
PREAMBLE = MAGIC + bytes([PROTOCOL])
FRAME_BYTES = 8 << 20
"""Tensor bytes are split into frames of this size (one 64 MiB frame takes four times as long as eight of 8)."""

HEADER_BYTES = 4 << 20
MAX_TENSORS = 16384
MAX_DIMS = 8
MAX_DEPTH = 16
MAX_TENSOR_BYTES = 1 << 40
MAX_STEPS = 100_000
"""Most steps of one sampling run."""
CHANGING = ("x", "timestep", "control")
"""Arguments of a forward that differ from step to step of a run: they are sent whole, and not stored by content."""
TENSOR_EXT = 1
MEMORY_SOCKET = ".memory"
"""What is appended to the path of the daemon's unix socket for the one that hands out shared memory."""
SHARE_BYTES = 4096
"""Largest packet on that socket."""
FORWARD_BYTES = 16 << 10
"""Largest packet on a memory's channel to the daemon: a forward whose latents lie in that memory."""
SIZE_BYTES = 4
"""Of a frame's size in such a packet."""
COMPLETION_BYTES = 4096
"""Largest packet on a channel to the client: a completion."""
ALIGNED_BYTES = 64
"""Tensors in shared memory begin at multiples of this."""
DIGEST_BYTES = 32

DTYPES: dict[str, int] = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
"""Element types by their safetensors names, with their sizes in bytes."""

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True)
class Tensor:
    """A tensor as the wire sees it: a description, and its little-endian, contiguous bytes or their digest.

    ``frames`` is None for a tensor that travels by ``digest`` alone, and for one that lies at an ``offset`` in the
    shared memory that its message names.
    """

    dtype: str
    shape: tuple[int, ...]
    frames: tuple[Buffer, ...] | None
    digest: bytes | None = None
    offset: int | None = None

    @property
    def nbytes(self) -> int:
        """Size of the contents in bytes."""
        return DTYPES[self.dtype] * math.prod(self.shape)

    def with_digest(self) -> Tensor:
        """The same tensor with its digest: SHA-256 over dtype, shape and bytes."""
        if self.digest is not None:
            return self
        if self.frames is None:
            raise ValueError("a tensor without bytes has no digest to compute")
        return Tensor(self.dtype, self.shape, self.frames, digest_of(self.dtype, self.shape, self.frames))

    def without_bytes(self) -> Tensor:
        """The tensor by digest alone."""
        if self.digest is None:
            raise ValueError("a tensor without a digest can't travel without its bytes")
        return Tensor(self.dtype, self.shape, None, self.digest)


def digest_of(dtype: str, shape: Sequence[int], frames: Iterable[Buffer]) -> bytes:
    """Content address of a tensor: 32 bytes, SHA-256 of ``"DTYPE:d0,d1,…:"`` and the contents."""
    state = hashlib.sha256(f"{dtype}:{','.join(map(str, shape))}:".encode())
    for frame in frames:
        state.update(frame)
    return state.digest()


def split(buffer: Buffer) -> tuple[Buffer, ...]:
    """Cut contiguous bytes into frames of at most `FRAME_BYTES`; no bytes give no frames."""
    view = memoryview(buffer).cast("B")
    if 0 < len(view) <= FRAME_BYTES:
        return (view,)
    return tuple(view[start : start + FRAME_BYTES] for start in range(0, len(view), FRAME_BYTES))


def frame_sizes(nbytes: int) -> list[int]:
    """The sizes of the frames that ``nbytes`` of contents travel in."""
    whole, rest = divmod(nbytes, FRAME_BYTES)
    return [FRAME_BYTES] * whole + ([rest] if rest else [])


@dataclass(frozen=True)
class Message:
    """One message: what it asks or answers, and the body, in which `Tensor` objects may stand anywhere.

    ``id`` is chosen by the side that asks and comes back in every answer; ``session`` is the token of `welcome`.
    """

    type: str
    body: dict[str, Any] = field(default_factory=dict)
    id: int = 0
    session: bytes = b""
    form: Form | None = field(default=None, compare=False, repr=False)
    """Of a message that was decoded."""
    frames: Sequence[Buffer] = field(default=(), compare=False, repr=False)
    """Of a message that was decoded: the tensors' bytes, in the order in which they came."""


def map_tensors(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """A body with ``change(tensor)`` in the place of each tensor."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: map_tensors(item, change) for key, item in value.items()}
    return [map_tensors(item, change) for item in value] if isinstance(value, list) else value


def encode(message: Message) -> list[Buffer]:
    """The frames of a message; tensors' bytes are not copied."""
    tensors: list[Tensor] = []

    def pack(value: Any) -> Any:
        if isinstance(value, Tensor):
            tensors.append(value)
            return msgpack.ExtType(TENSOR_EXT, (len(tensors) - 1).to_bytes(4, "big"))
        raise TypeError(f"{type(value).__name__} can't travel: use numbers, strings, bytes, lists, maps or tensors")

    body = msgpack.packb(message.body, default=pack)
    header = {
        "type": message.type,
        "id": message.id,
        "session": message.session,
        "tensors": [_describe(tensor) for tensor in tensors],
    }
    packer = msgpack.Packer()
    # The body is packed first, to find the tensors; it is spliced in as the map's last entry.
    parts = [packer.pack_map_header(5)]
    for key, value in header.items():
        parts += [packer.pack(key), packer.pack(value)]
    parts += [packer.pack("body"), body]
    frames: list[Buffer] = [PREAMBLE, b"".join(parts)]
    for tensor in tensors:
        frames.extend(tensor.frames or ())
    return frames


def _describe(tensor: Tensor) -> dict[str, Any]:
    described: dict[str, Any] = {"dtype": tensor.dtype, "shape": list(tensor.shape)}
    if tensor.offset is not None:
        described["offset"] = tensor.offset
        return described
    if tensor.digest is not None:
        described["digest"] = tensor.digest
    if tensor.frames is None:
        described["bytes"] = False
    return described


def join(frames: Sequence[Buffer]) -> bytes:
    """Frames as one packet: each behind its size, a little-endian number of `SIZE_BYTES`."""
    return b"".join([part for each in frames for part in (len(memoryview(each)).to_bytes(SIZE_BYTES, "little"), each)])


def cut(packet: bytes) -> list[memoryview]:
    """The frames of a packet that `join` has made; none of any other one."""
    view, frames, position = memoryview(packet), [], 0
    while position < len(view):
        start = position + SIZE_BYTES
        position = start + int.from_bytes(view[position:start], "little")
        frames.append(view[start:position])
    return frames if position == len(view) else []


def decode(frames: Sequence[Buffer]) -> Message:
    """The message that frames hold.

    Raises `ProtocolError`, naming the field, for anything that docs/protocol.md does not allow.
    """
    if len(frames) < 2:
        raise ProtocolError(f"a message has at least 2 frames, this one has {len(frames)}")
    _check_preamble(bytes(memoryview(frames[0])[:64]))
    header = _unpack_header(frames[1])
    tensors = [_read_description(item, f"tensors[{index}]") for index, item in enumerate(header["tensors"])]
    used = [0] * len(tensors)
    body, inline = _resolve(header["body"], tensors, used)
    if not all(count == 1 for count in used):
        raise ProtocolError("tensors: every tensor must stand in the body exactly once")
    return Form(header["type"], header["session"], tensors, body, inline).fill(header["id"], frames[2:])


class Form:
    """What messages have in common that differ in their id and in their tensors' bytes alone: all else of a header.

    ``known`` is for what a receiver has found out about such messages.
    """

    def __init__(self, kind: str, session: bytes, tensors: Sequence[Tensor], body: dict[str, Any], inline: Any) -> None:
        """``body`` has all tensors as they are described; ``inline`` tells where those stand that have bytes."""
        self.known: Any = None
        self._type = kind
        self._session = session
        self._tensors = tensors
        self._counts = [-(-each.nbytes // FRAME_BYTES) if each.frames is not None else 0 for each in tensors]
        """How many frames each has."""
        self._sizes: list[int] | None = None
        """Those of all frames; None until as many have come."""
        self._body = body
        self._inline = inline

    def fill(self, number: int, frames: Sequence[Buffer]) -> Message:
        """The message with this id, and these frames as its tensors' bytes.

        Raises `ProtocolError` if they don't have the sizes that the tensors' descriptions ask for.
        """
        if self._sizes is None or [len(memoryview(frame)) for frame in frames] != self._sizes:
            self._sizes = self._check(frames)
        tensors = list(self._tensors)
        position = 0
        for index, count in enumerate(self._counts):
            described = tensors[index]
            if described.frames is not None:
                taken = tuple(frames[position : position + count])
                position += count
                tensors[index] = Tensor(described.dtype, described.shape, taken, described.digest)
        return Message(self._type, _filled(self._body, self._inline, tensors), number, self._session, self, frames)

    def _check(self, frames: Sequence[Buffer]) -> list[int]:
        """The frames' sizes, which are those that the tensors ask for."""
        position = 0
        for index, (tensor, count) in enumerate(zip(self._tensors, self._counts, strict=True)):
            if tensor.frames is None:
                continue
            sizes = frame_sizes(tensor.nbytes)
            taken = frames[position : position + count]
            if [len(memoryview(frame)) for frame in taken] != sizes:
                raise ProtocolError(
                    f"tensors[{index}]: {tensor.dtype} {list(tensor.shape)} takes {tensor.nbytes} bytes in "
                    f"{len(sizes)} frame(s); the frames that came don't add up to that"
                )
            position += count
        if position != len(frames):
            raise ProtocolError(f"frames: {len(frames) - position} left over after the last tensor")
        return [len(memoryview(frame)) for frame in frames]


def _filled(value: Any, inline: Any, tensors: Sequence[Tensor]) -> Any:
    """A part of a body with other tensors where `_resolve` found some; what has none is shared."""
    if inline is None:
        return value
    if type(inline) is int:
        return tensors[inline]
    fresh = value.copy()
    for key, each in inline:
        fresh[key] = _filled(value[key], each, tensors)
    return fresh


def _check_preamble(preamble: bytes) -> None:
    if preamble[:4] != MAGIC or len(preamble) != 5:
        raise ProtocolError(f"frame 0: expected b'TACO' and a version byte, got {preamble[:16]!r}")
    if preamble[4] != PROTOCOL:
        raise ProtocolError(
            f"frame 0: protocol version {preamble[4]}, but this side speaks {PROTOCOL}; "
            "install the same TACO-DiT release for client and daemon",
            version=PROTOCOL,
        )


class _TensorRef(int):
    """A tensor's index, as it stood in the body."""


def _ext_hook(code: int, data: bytes) -> _TensorRef:
    if code != TENSOR_EXT or len(data) != 4:
        raise ProtocolError(f"body: extension {code} of {len(data)} bytes; only tensors (extension 1) are known")
    return _TensorRef.from_bytes(data, "big")


_FIELDS: dict[str, type] = {"type": str, "id": int, "session": bytes, "tensors": list, "body": dict}


def _unpack_header(frame: Buffer) -> dict[str, Any]:
    if len(memoryview(frame)) > HEADER_BYTES:
        raise ProtocolError(f"frame 1: a header of {len(memoryview(frame))} bytes; at most {HEADER_BYTES} are allowed")
    try:
        header = msgpack.unpackb(frame, ext_hook=_ext_hook, strict_map_key=True, raw=False)
    except ProtocolError:
        raise
    except Exception as error:  # msgpack raises half a dozen unrelated classes for malformed bytes
        raise ProtocolError(f"frame 1: not a msgpack map ({type(error).__name__}: {error})") from None
    if not isinstance(header, dict):
        raise ProtocolError(f"frame 1: expected a msgpack map, got {type(header).__name__}")
    if set(header) != set(_FIELDS):
        odd = sorted(set(map(str, header)) ^ set(_FIELDS))
        raise ProtocolError(f"frame 1: unknown or missing field {odd[0]!r}; the fields are {', '.join(_FIELDS)}")
    for name, kind in _FIELDS.items():
        if type(header[name]) is not kind:
            raise ProtocolError(f"{name}: expected {kind.__name__}, got {type(header[name]).__name__}")
    if not 0 <= header["id"] < 1 << 63:
        raise ProtocolError("id: out of range")
    if len(header["tensors"]) > MAX_TENSORS:
        count = len(header["tensors"])
        raise ProtocolError(f"tensors: {count} of them; at most {MAX_TENSORS} travel in one message")
    return header


def _read_description(item: Any, where: str) -> Tensor:
    """The tensor that is described; one whose bytes come in frames has none yet."""
    if not isinstance(item, dict) or not set(item) <= {"dtype", "shape", "digest", "bytes", "offset"}:
        raise ProtocolError(f"{where}: expected a map of dtype, shape and perhaps digest and bytes, or offset")
    dtype, shape, digest = item.get("dtype"), item.get("shape"), item.get("digest")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ProtocolError(f"{where}.dtype: unknown dtype {dtype!r:.40}; known are {', '.join(DTYPES)}")
    if not isinstance(shape, list) or len(shape) > MAX_DIMS:
        raise ProtocolError(f"{where}.shape: expected a list of at most {MAX_DIMS} sizes")
    if not all(type(size) is int and 0 <= size <= MAX_TENSOR_BYTES for size in shape):
        raise ProtocolError(f"{where}.shape: sizes must be integers from 0 up, got {str(shape)[:80]}")
    # A size of 0 hides no others: numpy and torch overflow on them all the same.
    if DTYPES[dtype] * math.prod(size or 1 for size in shape) > MAX_TENSOR_BYTES:
        raise ProtocolError(f"{where}.shape: {shape} is more than {MAX_TENSOR_BYTES} bytes")
    if digest is not None and (type(digest) is not bytes or len(digest) != DIGEST_BYTES):
        raise ProtocolError(f"{where}.digest: expected {DIGEST_BYTES} bytes")
    if type(item.get("bytes", True)) is not bool or (digest is None and not item.get("bytes", True)):
        raise ProtocolError(f"{where}.bytes: only a tensor with a digest may travel without its bytes")
    offset = item.get("offset")
    if "offset" in item:
        if type(offset) is not int or not 0 <= offset <= MAX_TENSOR_BYTES or offset % ALIGNED_BYTES:
            raise ProtocolError(f"{where}.offset: expected a multiple of {ALIGNED_BYTES} from 0 up, got {offset!r:.40}")
        if "digest" in item or "bytes" in item:
            raise ProtocolError(f"{where}.offset: a tensor in shared memory has neither digest nor bytes")
    frames = () if offset is None and item.get("bytes", True) else None
    return Tensor(dtype, tuple(shape), frames, digest, offset)


_STR = frozenset({str})
_PLAIN = frozenset({str, bytes, int, float, bool, type(None)})


def _resolve(value: Any, tensors: Sequence[Tensor], used: list[int], depth: int = 0) -> tuple[Any, Any]:
    """A part of a body with tensors in the place of indexes, and where in it those stand that have bytes.

    That is a tensor's index, or of a map or list the keys of such parts, each with where in it they stand; None if
    there are none.
    """
    if depth > MAX_DEPTH:
        raise ProtocolError(f"body: nested deeper than {MAX_DEPTH}")
    kind = type(value)
    if kind in _PLAIN:
        return value, None
    if kind is _TensorRef:
        if value >= len(tensors):
            raise ProtocolError(f"body: refers to tensor {int(value)}, but there are {len(tensors)}")
        used[value] += 1
        return tensors[value], None if tensors[value].frames is None else int(value)
    if kind is dict:
        if not _STR.issuperset(map(type, value)):
            raise ProtocolError("body: the keys of a map must be strings")
        parts = value.items()
    elif kind is list:
        parts = enumerate(value)
    else:
        raise ProtocolError(f"body: {kind.__name__} values are not allowed")
    inline = []
    for key, item in parts:
        value[key], where = _resolve(item, tensors, used, depth + 1)
        if where is not None:
            inline.append((key, where))
    return value, inline or None

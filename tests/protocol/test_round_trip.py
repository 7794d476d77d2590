"""What is encoded is what is decoded: bodies, and tensors of every dtype and shape, of torch and of numpy."""

from __future__ import annotations

from typing import Any

import msgpack
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tacod_client import wire
from tacod_client.errors import ArgumentError
from tacod_client.tensors import from_wire, kind_of, to_wire
from tacod_client.wire import DTYPES, Message, Tensor, cut, decode, encode, join

TORCH = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NUMPY = {
    "F64": "f8",
    "F32": "f4",
    "F16": "f2",
    "I64": "i8",
    "I32": "i4",
    "I16": "i2",
    "I8": "i1",
    "U8": "u1",
    "BOOL": "?",
}
SHAPES = st.lists(st.integers(0, 4), max_size=4).map(tuple)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=20)
    | st.binary(max_size=20)
)


@given(st.lists(st.binary(max_size=300), max_size=9))
def test_frames_in_a_packet_come_out_as_they_were(frames: list[bytes]) -> None:
    assert cut(join(frames)) == frames


@given(st.binary(max_size=400))
def test_any_packet_is_frames_or_none(packet: bytes) -> None:
    frames = cut(packet)
    assert not frames or join(frames) == packet


def travelled(tensor: Tensor) -> Tensor:
    """What arrives of a tensor, its frames those of the socket."""
    frames = [memoryview(bytes(frame)) for frame in encode(Message("test", {"tensor": tensor}))]
    arrived: Tensor = decode(frames).body["tensor"]
    return arrived


@st.composite
def contents(draw: st.DrawFn, dtypes: tuple[str, ...]) -> tuple[str, tuple[int, ...], bytes]:
    dtype, shape = draw(st.sampled_from(dtypes)), draw(SHAPES)
    size = DTYPES[dtype] * int(np.prod(shape, dtype=int))
    data = draw(st.binary(min_size=size, max_size=size))
    return dtype, shape, bytes(byte & 1 for byte in data) if dtype == "BOOL" else data


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    dtype, shape, data = draw(contents(tuple(DTYPES)))
    tensor = Tensor(dtype, shape, wire.split(data))
    how = draw(st.sampled_from(["bytes", "bytes and digest", "digest"]))
    if how == "bytes":
        return tensor
    return tensor.with_digest() if how == "bytes and digest" else tensor.with_digest().without_bytes()


VALUES = st.recursive(
    SCALARS | tensors(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.builds(
        Message,
        st.text(max_size=12),
        st.dictionaries(st.text(max_size=8), VALUES, max_size=4),
        st.integers(0, 2**63 - 1),
        st.binary(max_size=16),
    )
)
@settings(max_examples=300, deadline=None)
def test_message_comes_back_as_it_was(message: Message) -> None:
    assert decode(encode(message)) == message


def test_header_may_come_in_any_order() -> None:
    frames = encode(Message("ping", {"a": 1}, 5, b"token"))
    header = msgpack.unpackb(frames[1])
    backwards = msgpack.packb(dict(reversed(header.items())))
    assert backwards != frames[1]
    assert decode([frames[0], backwards]) == Message("ping", {"a": 1}, 5, b"token")


@given(contents(tuple(DTYPES)))
@settings(max_examples=200, deadline=None)
def test_torch_tensor_comes_back_bit_by_bit(content: tuple[str, tuple[int, ...], bytes]) -> None:
    dtype, shape, data = content
    tensor = torch.frombuffer(bytearray(data or b"\0" * 8), dtype=torch.uint8)
    tensor = tensor.view(TORCH[dtype]).reshape(shape) if data else torch.empty(shape, dtype=TORCH[dtype])
    sent = to_wire(tensor, "x")
    assert (sent.dtype, sent.shape) == (dtype, shape)
    back = from_wire(travelled(sent), "torch")
    assert (back.dtype, tuple(back.shape)) == (TORCH[dtype], shape)
    assert bytes(back.reshape(-1).view(torch.uint8).numpy()) == data


@given(contents(tuple(NUMPY)))
@settings(max_examples=200, deadline=None)
def test_numpy_array_comes_back_bit_by_bit(content: tuple[str, tuple[int, ...], bytes]) -> None:
    dtype, shape, data = content
    array = np.frombuffer(data, dtype=NUMPY[dtype]).reshape(shape)
    sent = to_wire(array, "x")
    assert (sent.dtype, sent.shape) == (dtype, shape)
    back = from_wire(travelled(sent), "numpy")
    assert (back.dtype, back.shape) == (array.dtype, shape)
    assert back.tobytes() == data


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 0, 3), (2, 3)])
def test_every_dtype_travels_in_every_kind_of_shape(dtype: str, shape: tuple[int, ...]) -> None:
    back = from_wire(travelled(to_wire(torch.zeros(shape).to(TORCH[dtype]), "x")), "torch")
    assert (back.dtype, tuple(back.shape)) == (TORCH[dtype], shape)


def test_strides_do_not_travel() -> None:
    tensor = torch.arange(24.0).reshape(2, 3, 4)
    for view in (tensor.transpose(0, 2), tensor[:, ::2], tensor[:1].expand(5, 3, 4)):
        assert torch.equal(from_wire(travelled(to_wire(view, "x")), "torch"), view)
        assert np.array_equal(from_wire(travelled(to_wire(view.numpy(), "x")), "numpy"), view.numpy())


def test_big_endian_arrays_arrive_with_their_values() -> None:
    array = np.arange(5, dtype=">f4")
    assert np.array_equal(from_wire(travelled(to_wire(array, "x")), "numpy"), array)


def test_lazy_negation_and_gradients_arrive_as_values() -> None:
    negative = torch.complex(torch.zeros(3), torch.ones(3)).conj().imag
    assert negative.is_neg()
    assert torch.equal(from_wire(to_wire(negative, "x"), "torch"), -torch.ones(3))
    assert torch.equal(from_wire(to_wire(torch.ones(2, requires_grad=True), "x"), "torch"), torch.ones(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_views_of_any_strides_travel(dtype: torch.dtype) -> None:
    whole = torch.arange(24).to(dtype)
    views = [
        whole[::2],
        whole[5],
        whole[:0],
        whole.reshape(1, 12, 2)[:, :, 0],
        whole.reshape(4, 6).t(),
        whole[:3].expand(2, 3),
        whole[3:4].expand(6),
        whole.reshape(1, 1, 24)[:, :, 3:4],
        whole.reshape(6, 4)[:1, :1],
        whole.reshape(6, 4)[2:3].mT[1:2],
        whole.reshape(6, 4)[:1].t()[:1],
        whole.reshape(2, 12)[1:, :1].expand(1, 1),
        whole.as_strided((3, 1), (1, 4)),
    ]
    for view in views:
        assert torch.equal(from_wire(to_wire(view, "x"), "torch"), view)


def test_result_is_writable_and_the_callers_own() -> None:
    data = np.arange(4, dtype=np.float32)
    sent = to_wire(data, "x")
    for kind in ("torch", "numpy"):
        back = from_wire(sent, kind)
        back += 1
    assert data.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("shape", [(2, 3), (0, 3)])
def test_a_result_is_on_the_cpu_wherever_its_caller_makes_tensors(shape: tuple[int, ...]) -> None:
    sent = torch.ones(shape)
    with torch.device("meta"):
        arrived = from_wire(to_wire(sent, "x"), "torch")
    assert arrived.device.type == "cpu"
    assert torch.equal(arrived, sent)


def test_large_tensor_travels_in_frames_of_8_mib() -> None:
    size = 2 * wire.FRAME_BYTES + 12
    array = np.arange(size // 4, dtype=np.int32)
    frames = encode(Message("test", {"tensor": to_wire(array, "x")}))
    assert [len(memoryview(frame)) for frame in frames[2:]] == [wire.FRAME_BYTES, wire.FRAME_BYTES, 12]
    assert np.array_equal(from_wire(decode(frames).body["tensor"], "numpy"), array)


def test_whole_frames_leave_no_empty_one() -> None:
    assert [len(memoryview(frame)) for frame in wire.split(bytes(wire.FRAME_BYTES))] == [wire.FRAME_BYTES]
    assert wire.split(b"") == ()


def test_contents_are_not_copied_by_the_encoder() -> None:
    array = np.zeros(1000, dtype=np.float32)
    frame = encode(Message("test", {"tensor": to_wire(array, "x")}))[2]
    array[0] = 1
    assert np.frombuffer(frame, dtype=np.float32)[0] == 1


def test_digest_tells_dtypes_shapes_and_contents_apart() -> None:
    sixteen = bytes(range(16))
    kinds: list[tuple[str, tuple[int, ...], bytes]] = [
        ("F32", (4,), sixteen),
        ("I32", (4,), sixteen),
        ("F32", (2, 2), sixteen),
        ("F32", (4,), sixteen[::-1]),
        ("F32", (), sixteen[:4]),
        ("F32", (1,), sixteen[:4]),
    ]
    assert len({wire.digest_of(dtype, shape, [data]) for dtype, shape, data in kinds}) == len(kinds)


def test_digest_does_not_depend_on_frames() -> None:
    assert wire.digest_of("U8", (4,), [b"ab", b"cd"]) == wire.digest_of("U8", (4,), [b"abcd"])


def test_tensor_by_digest_arrives_without_bytes() -> None:
    tensor = Tensor("U8", (2,), (b"ab",)).with_digest()
    arrived = travelled(tensor.without_bytes())
    assert arrived.frames is None
    assert arrived.digest == tensor.digest
    with pytest.raises(ValueError, match="no bytes"):
        from_wire(arrived, "numpy")


def test_digest_is_needed_to_leave_the_bytes_behind() -> None:
    with pytest.raises(ValueError, match="digest"):
        Tensor("U8", (2,), (b"ab",)).without_bytes()
    with pytest.raises(ValueError, match="digest"):
        Tensor("U8", (2,), None).with_digest()


@pytest.mark.parametrize(
    "value",
    [
        np.zeros(2, dtype=np.complex64),
        np.zeros(2, dtype=np.uint16),
        np.array(["text"]),
        np.array([None]),
        np.zeros(2, dtype="M8[s]"),
        np.zeros(2, dtype=[("a", "f4")]),
        torch.zeros(2, dtype=torch.complex64),
        torch.eye(3).to_sparse(),
    ],
    ids=str,
)
def test_what_cannot_travel_is_refused_by_name(value: Any) -> None:
    with pytest.raises(ArgumentError, match=r"^noise: .*doesn't travel") as caught:
        to_wire(value, "noise")
    assert caught.value.argument == "noise"


def test_values_that_are_no_data_are_refused_by_the_encoder() -> None:
    with pytest.raises(TypeError, match="object can't travel"):
        encode(Message("test", {"value": object()}))


def test_kind_is_known_of_torch_and_numpy_only() -> None:
    assert kind_of(torch.zeros(1)) == "torch"
    assert kind_of(np.zeros(1)) == "numpy"
    assert kind_of([1.0]) is None
    assert kind_of(np.float32(1)) is None

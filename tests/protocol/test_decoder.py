"""The decoder that recognizes messages, and what it must not take for the same."""

from __future__ import annotations

import msgpack
import pytest

from tacod_client.decoder import FORMS, Decoder, header_of, tail_of
from tacod_client.errors import ProtocolError
from tacod_client.wire import PREAMBLE, Message, Tensor, decode, encode

CONTEXT = Tensor("BF16", (2, 4096), (bytes(16384),)).with_digest().without_bytes()


def forward(number: int, times: bytes = bytes(4), model: str = "m", **fields: object) -> Message:
    arguments = {
        "x": Tensor("F32", (1, 4), None, offset=64),
        "timestep": Tensor("F32", (1,), (times,)),
        "context": CONTEXT,
        "lists": {"of": [Tensor("I8", (2,), (times[:2],)), 1.5, "text"]},
    }
    return Message("forward", {"model": model, "arguments": arguments, "memory": 1, **fields}, number, b"session")


@pytest.mark.parametrize("number", [0, 127, 128, 255, 256, 65535, 65536, 2**32 - 1, 2**32, 2**63 - 1])
def test_a_step_has_the_form_of_the_one_before(number: int) -> None:
    decoder = Decoder("forward")
    first = decoder.decode(encode(forward(1)))
    again = decoder.decode(encode(forward(number, b"abcd")))
    assert again == forward(number, b"abcd")
    assert again.form is first.form
    # What was read before is as it was.
    assert first == forward(1)


def test_what_differs_in_a_header_has_another_form() -> None:
    decoder = Decoder("forward")
    kinds = [forward(1), forward(1, model="n"), forward(1, memory=2), forward(1, room=[0, 64])]
    others = [Message("forward", forward(1).body, 1, b"another"), Message("forward", {"model": "m"}, 1, b"session")]
    seen = [decoder.decode(encode(each)) for each in (*kinds, *others)]
    assert seen == [*kinds, *others]
    assert len({id(each.form) for each in seen}) == len(seen)


@pytest.mark.parametrize("times", [b"", b"abc", b"abcde"])
def test_frames_of_other_sizes_are_refused_though_the_header_is_known(times: bytes) -> None:
    decoder = Decoder("forward")
    frames = encode(forward(1))
    decoder.decode(frames)
    assert frames[2] == bytes(4)
    with pytest.raises(ProtocolError, match="the frames that came don't add up"):
        decoder.decode([*frames[:2], times, *frames[3:]])
    with pytest.raises(ProtocolError, match="1 left over"):
        decoder.decode([*frames, b"more"])
    with pytest.raises(ProtocolError, match="add up"):
        decoder.decode(frames[:-1])
    assert decoder.decode(frames) == forward(1)


@pytest.mark.parametrize(
    "number",
    [b"\xff", b"\xcb" + bytes(8), b"\xc0", b"\xcf" + b"\xff" * 8, b"\xa1a", b"\xcd\x00", b"", b"\xc3"],
    ids=lambda each: each.hex() or "none",
)
def test_an_id_that_is_none_is_refused_though_the_rest_is_known(number: bytes) -> None:
    decoder = Decoder("forward")
    preamble, header, *frames = map(bytes, encode(forward(1)))
    decoder.decode([preamble, header, *frames])
    head, tail = header.split(b"\xa2id\x01")
    for strange in (head + b"\xa2id" + number + tail, head + b"\xa2id" + number):
        with pytest.raises(ProtocolError) as refused:
            decode([preamble, strange, *frames])
        with pytest.raises(ProtocolError) as again:
            decoder.decode([preamble, strange, *frames])
        assert again.value.message == refused.value.message


def test_an_id_in_another_encoding_teaches_nothing() -> None:
    """A signed id is sound; what stands behind its first byte is no end of a header."""
    decoder = Decoder("forward")
    preamble, header, *frames = map(bytes, encode(forward(5)))
    signed = header.replace(b"\xa2id\x05", b"\xa2id\xd0\x05")
    assert decoder.decode([preamble, signed, *frames]) == forward(5)
    with pytest.raises(ProtocolError):
        decoder.decode([preamble, signed.replace(b"\xd0", b"\x06"), *frames])


def test_other_preambles_types_and_orders_are_read_as_ever() -> None:
    decoder = Decoder("forward")
    preamble, header, *frames = map(bytes, encode(forward(1)))
    decoder.decode([preamble, header, *frames])
    with pytest.raises(ProtocolError, match="version 2"):
        decoder.decode([b"TACO\x02", header, *frames])
    with pytest.raises(ProtocolError, match="at least 2 frames"):
        decoder.decode([preamble])
    assert decoder.decode(encode(Message("ping", {}, 3))) == Message("ping", {}, 3)
    turned = msgpack.packb(dict(reversed(msgpack.unpackb(header, strict_map_key=True).items())))
    assert decoder.decode([preamble, turned, *frames]) == forward(1)


def test_it_forgets_what_was_long_ago_and_never_learns_long_headers() -> None:
    decoder = Decoder("forward")
    first = decoder.decode(encode(forward(1)))
    for number in range(FORMS):
        decoder.decode(encode(forward(1, model=f"m{number}")))
    assert decoder.decode(encode(forward(1))).form is not first.form
    long = forward(1, plan={"x" * 200: [0.5] * 4000})
    assert decoder.decode(encode(long)).form is not decoder.decode(encode(long)).form


def test_a_header_can_be_made_of_its_end() -> None:
    _, header, *_ = map(bytes, encode(forward(300)))
    tail = tail_of(header, "forward")
    assert header_of("forward", 300, tail) == header
    assert header_of("forward", 5, tail) == encode(forward(5))[1]
    assert encode(forward(300))[0] == PREAMBLE

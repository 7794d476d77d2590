"""Valid messages, damaged at random: what is left is read as a message or refused with a `ProtocolError`."""

from __future__ import annotations

import re
from typing import Any

import msgpack
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from tacod.execution.store import digests_of, tensors_of
from tacod.serving.messages import REQUESTS, parse
from tacod_client.decoder import Decoder
from tacod_client.errors import ArgumentError, ProtocolError
from tacod_client.wire import Message, Tensor, decode, encode, frame_sizes

X = Tensor("F32", (1, 2, 2), (bytes(16),))
HALF = Tensor("BF16", (3,), (bytes(6),))
STORED = Tensor("F16", (2, 2), (bytes(8),)).with_digest()
NONE = Tensor("I64", (0, 5), ())
TOKEN = bytes(range(16))

VALID = [
    [bytes(frame) for frame in encode(message)]
    for message in (
        Message("hello", {"client": "test", "pid": 7, "version": "0.1.0"}, 1),
        Message("ping", {}, 2**63 - 1, TOKEN),
        Message("put", {"tensors": [STORED, X]}, 3, TOKEN),
        Message(
            "load", {"path": "flux.safetensors", "dtype": None, "patches": None, "plan": {"sequence": 3}}, 4, TOKEN
        ),
        Message(
            "forward",
            {
                "model": "0123456789abcdef",
                "plan": "auto",
                "arguments": {"x": X, "timestep": HALF, "context": STORED.without_bytes(), "ref_latents": [X, NONE]},
            },
            5,
            TOKEN,
        ),
        Message(
            "forward",
            {
                "model": "0123456789abcdef",
                "plan": "auto",
                "arguments": {"x": [Tensor("F32", (1, 2, 2), None, offset=64), X]},
                "memory": 1,
                "room": [128, 64],
            },
            8,
            TOKEN,
        ),
        Message("unshare", {"memory": 1}, 9, TOKEN),
        Message("share", {"nbytes": 4096}, 0, TOKEN),
        Message(
            "sample",
            {
                "model": "0123456789abcdef",
                "plan": "auto",
                "sampler": "euler",
                "seed": 2**64 - 1,
                "cfg": 4.5,
                "noise": X,
                "latent": X,
                "sigmas": Tensor("F32", (3,), (bytes(12),)),
                "positive": {"context": STORED.without_bytes()},
                "negative": None,
            },
            6,
            TOKEN,
        ),
        Message("cancel", {"job": None, "request": 6}, 7, TOKEN),
    )
]
HEADER = 1
MARKS = bytes([0x80, 0x8F, 0x90, 0xC0, 0xC1, 0xC4, 0xC7, 0xCA, 0xCF, 0xD3, 0xD6, 0xD9, 0xDC, 0xDD, 0xDF, 0xFF])
"""Bytes that mean something to msgpack."""
KNOWING = Decoder("forward")
"""Has heard all that was checked before."""
KINDS = ("flip", "mark", "insert", "cut", "repeat", "cut off", "drop frame", "double frame", "move frame")


def damage(frames: list[bytes], accident: bytes) -> list[bytes]:
    """The frames after one accident, which four bytes describe: of which kind, to which frame, where, and how."""
    if not frames:
        return frames
    kind = KINDS[accident[0] % len(KINDS)]
    # The header is where the grammar is, so most damage goes there.
    at = (HEADER if accident[1] < 160 else accident[1]) % len(frames)
    frame, how = frames[at], accident[3]
    place = accident[2] * (len(frame) + 1) // 256
    before, after = frame[:place], frame[place:]
    if kind == "drop frame":
        return frames[:at] + frames[at + 1 :]
    if kind == "double frame":
        return [*frames[: at + 1], *frames[at:]]
    if kind == "move frame":
        return [*frames[:at], *frames[at + 1 :], frame]
    changed = {
        "flip": bytes(byte ^ (how or 1) for byte in after[:1]) + after[1:],
        "mark": MARKS[how % 16 :][:1] + after[1:],
        "insert": bytes([how]) + after,
        "cut": after[how % 40 :],
        "repeat": after[: how % 40] + after,
        "cut off": b"",
    }[kind]
    return [*frames[:at], before + changed, *frames[at + 1 :]]


def check(frames: list[bytes]) -> bool:
    """Read what frames hold as the daemon does; anything but a `TacodError` of the right kind goes through.

    Returns whether it could be read.
    """
    try:
        message = decode(frames)
    except ProtocolError as error:
        with pytest.raises(ProtocolError, match=f"^{re.escape(error.message)}$"):
            KNOWING.decode(frames)
        return False
    # A message that is known reads as one that isn't.
    assert encode(KNOWING.decode(frames)) == encode(message)
    # Tensors hold what they say.
    for tensor in tensors_of(message.body):
        if tensor.frames is not None:
            assert [len(frame) for frame in tensor.frames] == frame_sizes(tensor.nbytes)
    assert all(len(digest) == 32 for digest in digests_of(message.body))
    # What was read can be written and read again, so that it can be handed on to the ranks. (It is compared as bytes:
    # a NaN is not equal to itself.)
    again = encode(message)
    assert encode(decode(again)) == again
    if message.type in REQUESTS:
        check_request(message.type, message.body)
    return True


def check_request(kind: str, body: dict[str, Any]) -> None:
    """A request's body is taken, or refused by the name of a field."""
    refusal = None
    try:
        parse(REQUESTS[kind], body)
    except ArgumentError as error:
        refusal = error
    if refusal is not None:
        assert refusal.argument
        assert refusal.message.startswith(f"{refusal.argument}: ")


@given(st.lists(st.tuples(st.sampled_from(VALID), st.binary(min_size=4, max_size=8)), min_size=10, max_size=10))
@settings(max_examples=1_000, deadline=None)
def test_damaged_message_is_read_or_refused(messages: list[tuple[list[bytes], bytes]]) -> None:
    for frames, accidents in messages:
        for start in range(0, len(accidents) - 3, 4):
            frames = damage(frames, accidents[start : start + 4])
        event("read" if check(frames) else "refused")


@given(st.lists(st.binary(max_size=40), max_size=4))
@settings(max_examples=500, deadline=None)
def test_noise_is_refused(frames: list[bytes]) -> None:
    check(frames)
    check([b"TACO\x01", *frames])


NOISE: st.SearchStrategy[Any] = st.deferred(
    lambda: (
        st.none()
        | st.booleans()
        | st.integers(-(2**63), 2**64 - 1)
        | st.floats()
        | st.text(max_size=4)
        | st.binary(max_size=4)
        | st.builds(msgpack.ExtType, st.integers(0, 127), st.binary(max_size=5))
        | st.lists(NOISE, max_size=3)
        | st.dictionaries(st.text(max_size=4) | st.binary(max_size=2), NOISE, max_size=3)
    )
)


@given(
    st.dictionaries(st.sampled_from(["type", "id", "session", "tensors", "body", "more"]), NOISE),
    st.lists(st.binary(max_size=8), max_size=2),
)
@settings(max_examples=300, deadline=None)
def test_well_formed_header_with_nonsense_in_it_is_refused(header: dict[str, Any], frames: list[bytes]) -> None:
    sound = {"type": "put", "id": 1, "session": b"", "tensors": [], "body": {}}
    check([b"TACO\x01", msgpack.packb({**sound, **header}), *frames])


@given(st.dictionaries(st.sampled_from([*REQUESTS["sample"].model_fields, "job", "tensors", "path"]), NOISE))
@settings(max_examples=300, deadline=None)
def test_well_formed_request_with_nonsense_in_it_is_refused_by_name(body: dict[str, Any]) -> None:
    for kind in REQUESTS:
        check_request(kind, body)

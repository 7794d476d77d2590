"""What clients may ask: a checked request, or an `ArgumentError` that names the field."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from tacod.execution.store import tensors_of
from tacod.serving.messages import (
    PATCH_TENSORS,
    REQUESTS,
    VALUES,
    BeginUpload,
    Call,
    Cancel,
    Empty,
    Forward,
    Hello,
    Load,
    Piece,
    Put,
    RequestBody,
    Sample,
    Unshare,
    parse,
)
from tacod_client.errors import ArgumentError
from tacod_client.wire import HEADER_BYTES, Message, Tensor, decode, encode

X = Tensor("F32", (2,), (bytes(8),))
HELLO = {"client": "test", "pid": 7, "version": "0.1.0"}
LOAD = {"path": "flux.safetensors", "dtype": None, "patches": None, "plan": "auto"}
FORWARD = {"model": "id", "plan": "auto", "arguments": {"x": X}}
CALL = {"model": "id", "method": "preprocess_text_embeds", "arguments": {"context": X}}
SAMPLE = {
    "model": "id",
    "plan": "auto",
    "sampler": "euler",
    "seed": 0,
    "cfg": 1.0,
    "noise": X,
    "latent": X,
    "sigmas": X,
    "positive": {},
    "negative": None,
}
LATER = {"weights", "memory", "room"}
"""Fields that older clients don't send."""
GOOD: list[tuple[type[RequestBody], dict[str, Any]]] = [
    (Hello, HELLO),
    (Empty, {}),
    (Put, {"tensors": []}),
    (Put, {"tensors": [X] * 256}),
    (BeginUpload, {"nbytes": 1, "digests": [b"x"]}),
    (Piece, {"upload": "x", "offset": 0, "data": X}),
    (Load, {**LOAD, "weights": "host"}),
    (Load, {**LOAD, "dtype": "bf16", "patches": [1], "plan": {"sequence": 3}, "weights": "auto"}),
    (Forward, {**FORWARD, "memory": None, "room": None}),
    (Unshare, {"memory": 3}),
    (Call, CALL),
    (Sample, SAMPLE),
    (
        Forward,
        {**FORWARD, "memory": 1, "room": [64, 8], "plan": "x" * 256, "arguments": {"x": [X] * 507, "k" * 256: None}},
    ),
    (Sample, {**SAMPLE, "seed": 2**64 - 1, "cfg": 7, "negative": {"context": X}}),
    (Cancel, {"job": "1", "request": None}),
    (Cancel, {"job": None, "request": 1}),
]
BAD: list[tuple[type[RequestBody], dict[str, Any], str]] = [
    (Hello, {**HELLO, "pid": True}, "pid"),
    (Hello, {**HELLO, "pid": "7"}, "pid"),
    (Hello, {**HELLO, "pid": 7.0}, "pid"),
    (Hello, {**HELLO, "client": b"test"}, "client"),
    (Hello, {**HELLO, "client": "x" * 4097}, "client"),
    (Hello, {**HELLO, "colour": 1}, "colour"),
    (Empty, {"colour": 1}, "colour"),
    (Put, {}, "tensors"),
    (Put, {"tensors": [X] * 257}, "tensors"),
    (Put, {"tensors": [X, 1]}, "tensors.1"),
    (Put, {"tensors": {"a": X}}, "tensors"),
    (BeginUpload, {"nbytes": 0, "digests": []}, "nbytes"),
    (BeginUpload, {"nbytes": 1, "digests": ["x"]}, "digests.0"),
    (Piece, {"upload": "x", "offset": -1, "data": X}, "offset"),
    (Piece, {"upload": "x", "offset": 0, "data": b"x"}, "data"),
    (Call, {**CALL, "method": 3}, "method"),
    (Call, {**CALL, "method": "x" * 4097}, "method"),
    (Call, {**CALL, "plan": "auto"}, "plan"),
    (Call, {**CALL, "arguments": []}, "arguments"),
    (Load, {**LOAD, "dtype": "fp64"}, "dtype"),
    (Load, {**LOAD, "weights": "disk"}, "weights"),
    (Load, {**LOAD, "patches": {}}, "patches"),
    (Load, {**LOAD, "patches": [{"up": X}] * 6001}, "patches"),
    (Load, {**LOAD, "patches": [{"key": "k" * 2**21}]}, "patches"),
    (Load, {**LOAD, "patches": [{"key": b"k" * 2**21}]}, "patches"),
    (Load, {**LOAD, "patches": [[0] * 2**18]}, "patches"),
    (Load, {**LOAD, "path": 3}, "path"),
    (Forward, {**FORWARD, "model": None}, "model"),
    (Forward, {**FORWARD, "arguments": [X]}, "arguments"),
    (Forward, {**FORWARD, "arguments": {"x": [X] * 510}}, "arguments"),
    (Forward, {**FORWARD, "arguments": {"x": [[[]] * 600]}}, "arguments"),
    (Forward, {**FORWARD, "arguments": {"k" * 257: X}}, "arguments"),
    (Forward, {**FORWARD, "arguments": {"x": ["v" * 257]}}, "arguments"),
    (Forward, {**FORWARD, "arguments": {"x": {"y": b"v" * 257}}}, "arguments"),
    (Forward, {**FORWARD, "plan": "x" * 257}, "plan"),
    (Forward, {**FORWARD, "memory": "1"}, "memory"),
    (Forward, {**FORWARD, "memory": True}, "memory"),
    (Forward, {**FORWARD, "room": [0]}, "room"),
    (Forward, {**FORWARD, "room": [0, 8, 8]}, "room"),
    (Forward, {**FORWARD, "room": [-64, 8]}, "room.0"),
    (Forward, {**FORWARD, "room": [0, 8.0]}, "room.1"),
    (Unshare, {"memory": None}, "memory"),
    (Load, {**LOAD, "plan": {"sequence": "x" * 257}}, "plan"),
    (Sample, {**SAMPLE, "positive": {"k" * 257: X}}, "positive"),
    (Sample, {**SAMPLE, "negative": {"x": [X] * 510}}, "negative"),
    (Sample, {**SAMPLE, "seed": -1}, "seed"),
    (Sample, {**SAMPLE, "seed": 2**64}, "seed"),
    (Sample, {**SAMPLE, "seed": 1.0}, "seed"),
    (Sample, {**SAMPLE, "cfg": float("nan")}, "cfg"),
    (Sample, {**SAMPLE, "cfg": float("inf")}, "cfg"),
    (Sample, {**SAMPLE, "cfg": "1"}, "cfg"),
    (Sample, {**SAMPLE, "noise": [1.0]}, "noise"),
    (Sample, {**SAMPLE, "positive": None}, "positive"),
    (Cancel, {"job": 1, "request": None}, "job"),
    (Cancel, {"job": None, "request": True}, "request"),
]


@pytest.mark.parametrize(("kind", "body"), GOOD)
def test_sound_body_is_taken_as_it_is(kind: type[RequestBody], body: dict[str, Any]) -> None:
    assert dict(parse(kind, body)) == body


@pytest.mark.parametrize(("kind", "body", "field"), BAD)
def test_fault_is_told_by_the_fields_name(kind: type[RequestBody], body: dict[str, Any], field: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        parse(kind, body)
    assert caught.value.argument == field
    assert caught.value.message.startswith(f"{field}: ")
    assert caught.value.details == {"argument": field}


def test_what_older_clients_do_not_send_has_a_default() -> None:
    assert parse(Load, LOAD).weights == "auto"
    assert {
        name for kind in REQUESTS.values() for name, each in kind.model_fields.items() if not each.is_required()
    } == LATER


@pytest.mark.parametrize("kind", REQUESTS.values(), ids=REQUESTS)
def test_no_field_may_lack(kind: type[RequestBody]) -> None:
    sound = next(body for each, body in GOOD if each is kind) if kind is not REQUESTS["unload"] else {"model": "id"}
    for field in kind.model_fields:
        if field in LATER:
            continue
        with pytest.raises(ArgumentError, match="field required") as caught:
            parse(kind, {key: value for key, value in sound.items() if key != field})
        assert caught.value.argument == field


def test_largest_load_still_fits_when_it_is_handed_to_the_ranks() -> None:
    stored = [Tensor("F8_E4M3", (1,) * 6 + (n // 256 + 1, n % 256 + 1), ()).with_digest() for n in range(PATCH_TENSORS)]
    stored = [Tensor(each.dtype, each.shape, None, each.digest) for each in stored]
    patches: list[Any] = [{"key": "k" * 270, "kind": "set", "value": each} for each in stored]
    load = parse(Load, {**LOAD, "patches": patches, "path": "\U0001f600" * 4096})
    work = {**dict(load), "evict": [], "forget": [], "also": stored}
    frames = encode(Message("load", work))
    assert decode(frames).type == "load"
    assert len(memoryview(frames[1])) < HEADER_BYTES * 0.9, "with room for what the supervisor adds"


def test_tensors_are_handed_on_uncopied() -> None:
    assert parse(Forward, FORWARD).arguments["x"] is X


def test_request_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        parse(Hello, HELLO).pid = 8  # type: ignore[misc]


def test_long_values_are_not_told_back() -> None:
    for body in ({**HELLO, "client": "x" * 10**6}, {**HELLO, "x" * 10**6: 1}):
        with pytest.raises(ArgumentError) as caught:
            parse(Hello, body)
        assert len(caught.value.message) < 400
        assert len(caught.value.argument) <= 256


def widest(tensors: int) -> dict[str, Any]:
    """As much as a forward or a condition may hold, each tensor another one."""
    stored = [Tensor("F8_E4M3", (1,) * 7 + (n + 1,), (bytes(n + 1),)).with_digest() for n in range(tensors)]
    texts = ["\U0001f600" * 256] * (VALUES - 3 - tensors)
    return {"\U0001f600" * 256: [*(each.without_bytes() for each in stored), *texts]}


@pytest.mark.parametrize("tensors", [0, VALUES - 3])
def test_largest_request_still_fits_when_it_is_handed_to_the_ranks(tensors: int) -> None:
    both = {**SAMPLE, "positive": widest(tensors), "negative": widest(tensors), "sampler": "\U0001f600" * 4096}
    body = dict(parse(Sample, both))
    store = [each for each in tensors_of(body) if each.frames is None]
    work = {**body, "job": "ab-1", "step": 0, "evict": [], "forget": [], "also": store}
    frames = encode(Message("sample", work))
    assert decode([*frames[:2], *(bytes(8) for _ in range(3))]).type == "sample"
    assert len(memoryview(frames[1])) < HEADER_BYTES / 2, "with room for what the supervisor adds"

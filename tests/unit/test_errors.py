"""The error tree: as its docstring draws it, and the same on both sides of the wire."""

from __future__ import annotations

import json
import pickle
import re
from contextlib import closing
from typing import Any

import pytest

from tacod.group.arena import PACKET_BYTES, Arena
from tacod.group.board import BOARD_BYTES
from tacod_client import errors
from tacod_client.errors import ArgumentError, ModelNotFound, ProtocolError, TacodError
from tacod_client.wire import Message, decode, encode

TREE: list[type[TacodError]] = [getattr(errors, name) for name in errors.__all__]


def drawn() -> dict[str, str]:
    """Each class of the docstring's tree and its parent."""
    assert errors.__doc__ is not None
    parents: dict[str, str] = {}
    above = ["TacodError"]
    for line in errors.__doc__.splitlines():
        match = re.match(r"([│ ]*[├└]── )(\w+)", line)
        if match:
            depth = len(match[1]) // 4
            parents[match[2]] = above[depth - 1]
            above[depth:] = [match[2]]
    return parents


def test_tree_is_the_one_in_the_docstring() -> None:
    assert drawn() == {kind.__name__: kind.__mro__[1].__name__ for kind in TREE if kind is not TacodError}


def test_every_error_says_what_it_means() -> None:
    assert all(kind.__doc__ for kind in TREE)


@pytest.mark.parametrize("kind", TREE)
def test_error_crosses_the_wire_as_itself(kind: type[TacodError]) -> None:
    error = kind("what was at fault; what to do", limit=3, job="a-1")
    body = decode(encode(Message("error", error.to_wire()))).body
    back = TacodError.from_wire(body)
    assert type(back) is kind
    assert (back.message, str(back), back.details) == (error.message, error.message, error.details)
    assert body == {"code": kind.__name__, "message": error.message, "details": error.details}


def test_argument_crosses_the_wire_by_name() -> None:
    back = TacodError.from_wire(ArgumentError("x: bad", argument="x").to_wire())
    assert isinstance(back, ArgumentError)
    assert back.argument == "x"
    assert back.details == {"argument": "x"}


def test_every_error_may_be_caught_as_one() -> None:
    assert all(issubclass(kind, TacodError) for kind in TREE)
    assert not issubclass(TacodError, (OSError, ValueError))


@pytest.mark.parametrize("code", ["FutureError", "Exception", "SystemExit", "", None, 3, [], "_BY_CODE"])
def test_unknown_code_becomes_the_root(code: Any) -> None:
    back = TacodError.from_wire({"code": code, "message": "why", "details": {}})
    assert type(back) is TacodError
    assert back.message == "why"


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"code": "QueueFull"},
        {"code": "QueueFull", "message": 3, "details": None},
        {"code": "QueueFull", "message": "m", "details": [1]},
        {"code": "QueueFull", "message": "m", "details": {"self": 1, "message": 2, "cls": 3}},
        {"code": "ArgumentError", "message": "m", "details": {"argument": None}},
    ],
)
def test_odd_bodies_still_make_an_error(body: dict[str, Any]) -> None:
    assert isinstance(TacodError.from_wire(body), TacodError)


@pytest.mark.parametrize("body", [None, "text", [], 3])
def test_error_without_a_body_is_a_protocol_error(body: Any) -> None:
    assert isinstance(TacodError.from_wire(body), ProtocolError)


@pytest.mark.parametrize("kind", TREE)
def test_error_survives_pickling(kind: type[TacodError]) -> None:
    back = pickle.loads(pickle.dumps(kind("why", limit=3)))
    assert (type(back), back.message, back.details) == (kind, "why", kind("why", limit=3).details)


def test_error_body_is_json_too() -> None:
    assert json.loads(json.dumps(ArgumentError("x: bad", argument="x").to_wire()))["details"] == {"argument": "x"}


def test_a_text_that_is_no_unicode_travels() -> None:
    """Names of files, and in files, may be anything."""
    error = ModelNotFound("no \udc80.safetensors here", name="\ud800x", count=3)
    _, header = encode(Message("error", error.to_wire()))
    told = TacodError.from_wire(decode([b"TACO\x01", header]).body)
    assert told.message == "no \\udc80.safetensors here"
    assert told.details == {"name": "\\ud800x", "count": 3}


@pytest.mark.parametrize("character", ["x", "\xe9", "\U000e0001", "\udcff"])
def test_a_long_error_fits_a_packet(character: str) -> None:
    """Each rank says it, and only rank 0 has room for more. What a file calls its tensors may be long."""
    text = character * 100_000
    told = ArgumentError(text, argument=text, other=text).to_wire()
    assert told["message"].endswith("…")
    assert told["details"]["argument"].endswith("…")
    with closing(Arena()) as arena:
        assert len(arena.pack(Message("failed", {"error": told, "memory_used_bytes": 1 << 60}))) <= PACKET_BYTES
        assert arena.end == BOARD_BYTES, "nothing of it lies in the memory"

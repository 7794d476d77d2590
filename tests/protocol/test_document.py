"""docs/protocol.md is what the code does: its frames byte by byte, its tables name by name."""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import Any

import pytest

from tacod.execution.manifest import Model
from tacod.observe.metrics import Metrics
from tacod.serving import messages
from tacod.serving.messages import REQUESTS
from tacod_client import errors, wire
from tacod_client.wire import Message, Tensor, decode, encode

TEXT = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text()
CONTEXT = struct.pack("<2f", 0.5, 0.25)
CONTEXT_DIGEST = wire.digest_of("F32", (1, 1, 2), [CONTEXT])
EXAMPLES = {
    "hello": Message("hello", {"client": "example", "pid": 4242, "version": "0.1.0"}, 1),
    "forward": Message(
        "forward",
        {
            "model": "0123456789abcdef",
            "plan": "auto",
            "arguments": {
                "x": Tensor("F32", (1, 1, 1, 2), (struct.pack("<2f", 1.0, -2.0),)),
                "timestep": Tensor("F32", (1,), (struct.pack("<f", 0.75),)),
                "context": Tensor("F32", (1, 1, 2), None, CONTEXT_DIGEST),
            },
        },
        2,
        bytes(range(16)),
    ),
    "error": Message("error", {"code": "ArgumentError", "message": "y: missing", "details": {"argument": "y"}}, 2),
}


def golden(name: str) -> list[bytes]:
    """The frames that the page shows under a name."""
    block = re.search(rf"```frames {name}\n(.*?)```", TEXT, re.DOTALL)
    assert block is not None
    frames: list[bytes] = []
    for line in block[1].splitlines():
        if line.startswith("frame "):
            assert int(line.split()[1]) == len(frames)
            frames.append(b"")
        else:
            frames[-1] += bytes.fromhex(line.partition("|")[0])
    return frames


def table(head: str) -> list[list[str]]:
    """The cells of the table whose header row begins so."""
    rows = TEXT[TEXT.index(f"| {head} |") :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def names(cell: str) -> list[str]:
    """What stands in backticks in a cell."""
    return re.findall(r"`([^`]+)`", cell)


def test_page_has_exactly_these_examples() -> None:
    assert re.findall(r"```frames (\w+)", TEXT) == list(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_encoder_writes_the_golden_frames(name: str) -> None:
    assert [bytes(frame) for frame in encode(EXAMPLES[name])] == golden(name)


@pytest.mark.parametrize("name", EXAMPLES)
def test_decoder_reads_the_golden_frames(name: str) -> None:
    assert decode(golden(name)) == EXAMPLES[name]


def test_digest_is_the_one_on_the_page() -> None:
    assert CONTEXT.hex() in TEXT
    assert f"`{CONTEXT_DIGEST.hex()}`" in TEXT


def test_title_names_the_version() -> None:
    assert TEXT.startswith(f"# The protocol of tacod, version {wire.PROTOCOL}\n")


def test_dtypes_are_those_of_the_table() -> None:
    sizes: dict[str, int] = {}
    for dtypes, size, _ in table("`dtype` | bytes"):
        each = [int(number) for number in size.split(", ")]
        kinds = names(dtypes)
        sizes.update(zip(kinds, each * len(kinds) if len(each) == 1 else each, strict=False))
    assert sizes == wire.DTYPES


def test_requests_and_their_fields_are_those_of_the_table() -> None:
    documented = {}
    for request, fields, _ in table("request"):
        listed = [re.match(r"`(\w+)`", part) for part in fields.split(", ")]
        documented[names(request)[0]] = [
            match[1] for match in listed if match and match[1] not in ("fp32", "bf16", "fp16")
        ]
    assert documented == {name: list(kind.model_fields) for name, kind in REQUESTS.items()}


def test_error_codes_and_their_parents_are_those_of_the_table() -> None:
    documented = {names(code)[0]: names(parent)[0] for code, parent, _, _ in table("code")}
    tree = {
        kind.__name__: kind.__mro__[1].__name__
        for kind in (getattr(errors, name) for name in errors.__all__)
        if kind is not errors.TacodError and not issubclass(kind, errors.ConnectionFailed)
    }
    assert documented == tree


def test_limits_are_those_of_the_table() -> None:
    documented = [
        2 ** int(value[2:]) if value.startswith("2^") else int(value.split()[0]) for _, value in table("limit")
    ]
    limits = [wire.HEADER_BYTES, wire.MAX_TENSORS, wire.MAX_DIMS, wire.MAX_TENSOR_BYTES, wire.MAX_DEPTH]
    assert documented == limits
    assert f"{wire.FRAME_BYTES} bytes (8 MiB)" in TEXT
    assert f"at most {messages.VALUES} values each" in TEXT
    assert f"no text of more than {messages.TEXT} characters" in TEXT


def test_header_fields_are_those_of_the_table() -> None:
    documented = [names(key)[0] for key, _, _ in table("key")]
    assert documented == ["type", "id", "session", "tensors", "body"]


def replies(kind: str, to: str) -> list[str]:
    """The documented fields of a reply."""
    (row,) = (row for row in table("reply") if names(row[0]) == [kind] and to in (row[1], *names(row[1])))
    return names(row[2])


def test_stats_are_those_of_the_table() -> None:
    of_the_server = {"rx_bytes", "tx_bytes", "store", "shared_bytes", "group_restarts", "groups"}
    assert set(replies("done", "stats")) == set(Metrics().to_wire()) | of_the_server


def test_model_has_the_documented_fields() -> None:
    sentence = re.search(r"A model is a map of ([^.]*)\.", TEXT)
    assert sentence is not None
    assert names(sentence[1]) == list(Model("id", "/path", "identity", None).to_wire())


def test_error_reply_has_the_documented_fields() -> None:
    told: dict[str, Any] = errors.TacodError("why").to_wire()
    assert replies("error", "any") == list(told)

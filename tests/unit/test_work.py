"""What supervisor and ranks send each other: it arrives as it was sent, and anything else is refused."""

from __future__ import annotations

from typing import Any

import pytest

from tacod.group.arena import Arena
from tacod.group.work import (
    Begun,
    Broken,
    Command,
    Done,
    Envelope,
    Evict,
    Facts,
    Failed,
    Fault,
    Forward,
    Load,
    Loaded,
    Progress,
    Raised,
    Ready,
    Report,
    Sample,
    SampleStep,
    Stepped,
    Unload,
    read_envelope,
    read_report,
    report_message,
    with_tensors,
)
from tacod_client.errors import OutOfMemory, ProtocolError
from tacod_client.wire import Message, Tensor

X = Tensor("F32", (1,), (b"\1\0\0\0",))
KEPT = Tensor("F32", (2,), (bytes(8),)).with_digest()
NAMED = KEPT.without_bytes()
FACTS = Facts("sd3", 7, 5, "bf16", 3, 48, {"channels": 16}, notes=["a.lora_up"], shares=[2, 1], shares_measured=True)
PATCHES = [{"key": "k", "up": NAMED, "strength": 1.0}]
LOAD = Load("m", "/m", "i", "bf16", PATCHES, "b", ["o"], {"/lora": "j"}, shares=[2, 1])
FORWARD = Forward("m", {"ulysses": 2}, {"x": X, "context": NAMED, "control": [None, X]}, b"s")
SAMPLE = Sample("m", "auto", "euler", 3, 4.5, X, X, X, {"context": NAMED}, None)
COMMANDS = [LOAD, Unload("m", ["p"]), Evict(["m"]), FORWARD, SampleStep("j", 0, SAMPLE), SampleStep("j", 1)]


def through_memory(message: Message) -> Message:
    arena = Arena()
    try:
        return arena.unpack(arena.pack(message), copy=True)
    finally:
        arena.close()


@pytest.mark.parametrize("command", COMMANDS, ids=lambda each: each.verb)
def test_a_command_arrives_with_its_envelope(command: Command) -> None:
    envelope = Envelope(3, command, [KEPT], ["old run"], [b"d" * 32], Fault("raise", "after", 1))
    assert read_envelope(through_memory(envelope.message())) == envelope
    assert read_envelope(through_memory(Envelope(4, command).message())) == Envelope(4, command)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda each: each.verb)
def test_named_tensors_are_put_in_everywhere(command: Command) -> None:
    put_in = with_tensors(command, lambda each: KEPT if each == NAMED else each)
    assert type(put_in) is type(command)
    assert repr(put_in) == repr(command).replace(repr(NAMED), repr(KEPT))


@pytest.mark.parametrize(
    ("report", "command"),
    [
        (Ready(9), None),
        (Progress(1, 2), LOAD),
        (Begun(), FORWARD),
        (Done(9, 0.5, 0.25, Loaded(FACTS, FACTS)), LOAD),
        (Done(9, 0.5, 0.25, Stepped("ulysses 2", 2, 1, 0, None, X)), FORWARD),
        (Done(9, 0.5, 0.25, Stepped("ulysses 2", 2, 2, 1, 0.5)), SampleStep("j", 1)),
        (Done(9, 0.5, 0.25), Unload("m")),
        (Done(9, 0.5, 0.25), Evict(["m"])),
        (Raised(9, "Traceback", "TypeError: 3", "a.py:1", 2), FORWARD),
        (Broken("Traceback", "TypeError: 3"), FORWARD),
    ],
    ids=lambda each: type(each).__name__,
)
def test_a_report_arrives(report: Report, command: Command | None) -> None:
    message = through_memory(report_message(report, 5))
    assert message.id == 5
    assert read_report(message, command) == report


def test_an_error_arrives_as_its_class() -> None:
    error = OutOfMemory("no memory", limit=3)
    report = read_report(through_memory(report_message(Failed(9, error))), FORWARD)
    assert isinstance(report, Failed)
    assert report.memory_used_bytes == 9
    assert type(report.error) is OutOfMemory
    assert (report.error.message, report.error.details) == (error.message, error.details)


@pytest.mark.parametrize(
    ("kind", "body"),
    [("dance", {}), ("ready", {}), ("done", {"memory_used_bytes": 1}), ("failed", {"memory_used_bytes": 1})],
)
def test_other_reports_are_refused(kind: str, body: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError, match=kind):
        read_report(Message(kind, body), FORWARD)

"""Ranks of benchmarks that have no weights read a forward's tensors as a rank does."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tacod.group.arena import Arena
from tacod.group.work import Envelope, Forward, Load, Stepped, read_envelope
from tacod.rank.engine import Engine
from tacod_client.tensors import from_wire, to_wire
from tacod_client.wire import Tensor

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def arena() -> Iterator[Arena]:
    arena = Arena()
    yield arena
    arena.close()


def module(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module of benchmarks."""
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    return importlib.import_module(name)


def check_forwards(engine: Engine, arena: Arena) -> None:
    """Steps with a text that came with the first one give their latents back."""
    text = to_wire(torch.ones(1, 512, 4096).bfloat16(), "context").with_digest()
    load = Load("m", "/m", "i", None, None, None, [])
    engine.work(read_envelope(arena.unpack(arena.pack(Envelope(1, load).message()))))
    for step in range(4):
        x = torch.full((1, 16, 16, 16), float(step)).bfloat16()
        given = {"x": x, "timestep": torch.ones(1), "guidance": torch.ones(1), "y": torch.ones(1, 768).bfloat16()}
        arguments: dict[str, Tensor] = {name: to_wire(each, name) for name, each in given.items()}
        command = Forward("m", "auto", {**arguments, "context": text.without_bytes()}, b"s")
        message = Envelope(2 + step, command, store=[text] if step == 0 else []).message()
        told = engine.work(read_envelope(arena.unpack(arena.pack(message)))).result
        assert isinstance(told, Stepped)
        assert isinstance(told.out, Tensor)
        assert from_wire(told.out, "torch").float().eq(step).all()


def test_echo_ranks_read_named_tensors(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    check_forwards(module("echo_rank", monkeypatch).EchoEngine(0, 1), arena)


def test_idle_ranks_find_their_graphs(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    idle_rank = module("idle_rank", monkeypatch)
    monkeypatch.setattr(idle_rank.IdleGraph, "sleep_s", 0.0, raising=False)
    engine = idle_rank.IdleEngine(0, 1)
    check_forwards(engine, arena)
    (kinds,) = engine.forwards._kinds.values()
    assert [type(each) for each in kinds.values()] == [idle_rank.IdleGraph]

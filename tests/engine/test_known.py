"""Forwards whose messages differ in tensors' bytes alone: a rank knows them again, and gives what it gave before."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import FLUX, FP32, relative_error
from safetensors.torch import save_file

from tacod.checkpoint import read_checkpoint
from tacod.group.arena import Arena
from tacod.group.work import Envelope, Evict, Forward, Load, Stepped, Unload, read_envelope
from tacod.plan import Request
from tacod.rank.engine import Engine
from tacod.rank.families.base import DiT
from tacod.rank.families.flux import Flux
from tacod.rank.parallel.sequence import SequenceParallel
from tacod.rank.parallel.topology import Topology
from tacod_client.errors import ArgumentError, OutOfMemory
from tacod_client.tensors import from_wire, to_wire
from tacod_client.wire import Tensor

CONTEXT = FLUX.inputs()["context"]


class Rank:
    """An engine, and the arena by which commands come to it."""

    def __init__(self, path: str, keeps: bool) -> None:
        self.engine = Engine(torch.device("cpu"), Topology(), warm=False)
        self.engine.keeps_arguments = keeps
        self.path = path
        self._arena = Arena()
        self._sent: set[bytes] = set()
        self.load()

    def load(self) -> None:
        self.work(Load("m", self.path, read_checkpoint(self.path).identity, None, None, None, []))

    def work(self, command: Any, **more: Any) -> Any:
        message = Envelope(1, command, **more).message()
        return self.engine.work(read_envelope(self._arena.unpack(self._arena.pack(message)))).result

    def forward(self, arguments: dict[str, Any], context: torch.Tensor, **more: Any) -> torch.Tensor:
        """Of these arguments, with a context that is named by its digest."""
        named = to_wire(context, "context").with_digest()
        assert named.digest is not None
        fresh = [] if named.digest in self._sent else [named]
        self._sent.add(named.digest)
        packed = {name: to_wire(each, name) for name, each in arguments.items()}
        command = Forward("m", "auto", {**packed, "context": named.without_bytes()}, b"s")
        told = self.work(command, store=fresh, **more)
        assert isinstance(told, Stepped)
        assert isinstance(told.out, Tensor)
        out: torch.Tensor = from_wire(told.out, "torch")
        return out

    def evict(self, context: torch.Tensor) -> None:
        """Have it drop a tensor."""
        digest = to_wire(context, "context").with_digest().digest
        assert digest is not None
        self._sent.discard(digest)
        self.work(Evict([]), evict=[digest])


@pytest.fixture(params=[False, True], ids=["cpu", "keeps"])
def rank(request: pytest.FixtureRequest, tmp_path: Path) -> Rank:
    return Rank(str(FLUX.save(tmp_path)), request.param)


def arguments(seed: int) -> dict[str, Any]:
    """A step's; text apart, of which each step has the same."""
    given = FLUX.inputs(seed)
    del given["context"]
    return given


def check(rank: Rank, seed: int, context: torch.Tensor = CONTEXT, model: DiT = FLUX.model) -> None:
    """Its forward is that of its own arguments."""
    given = {**arguments(seed), "context": context}
    with torch.inference_mode():
        wanted = model(SequenceParallel(), **given)
    assert relative_error(rank.forward(arguments(seed), context), wanted) <= FP32


def test_a_step_is_known_and_computed_of_its_own_bytes(rank: Rank) -> None:
    for seed in range(4):
        check(rank, seed)
    # The one that brought the context, and those that didn't.
    assert len(rank.engine._known) == 2


def test_another_context_is_another_kind(rank: Rank) -> None:
    for seed in range(4):
        for context in (CONTEXT, CONTEXT + 1):
            check(rank, seed, context)


def test_nothing_is_known_of_what_was_dropped(rank: Rank) -> None:
    for seed in range(3):
        rank.forward(arguments(seed), CONTEXT)
    rank.evict(CONTEXT)
    assert not rank.engine._known
    for seed in range(3):
        check(rank, seed)


def test_nothing_is_known_of_a_model_that_is_gone(rank: Rank, tmp_path: Path) -> None:
    for seed in range(3):
        rank.forward(arguments(seed), CONTEXT)
    rank.work(Unload("m"))
    assert not rank.engine._known
    # Other weights by the same id, which no daemon would give it.
    other = copy.deepcopy(FLUX.model)
    for weight in other.parameters():
        weight *= 0.5
    rank.path = str(tmp_path / "other.safetensors")
    save_file(other.state_dict(), rank.path, metadata={"tacod.config": json.dumps(FLUX.config)})
    rank.load()
    for seed in range(3):
        check(rank, seed, model=other)


def test_a_model_that_stops_sharing_tokens_is_planned_anew(rank: Rank, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a network of ComfyUI's does whose call misfits its table."""
    for seed in range(3):
        rank.forward(arguments(seed), CONTEXT)
    planned = []
    limited = Flux.limited

    def noted(dit: Flux, asked: Request, given: Any) -> Request:
        planned.append(dit.shares_tokens)
        return limited(dit, asked, given)

    monkeypatch.setattr(Flux, "limited", noted)
    check(rank, 3)
    assert not planned, "it is known"
    monkeypatch.setattr(Flux, "shares_tokens", False)
    check(rank, 4)
    check(rank, 5)
    assert planned == [False]


def test_nothing_is_known_after_a_lack_of_memory(rank: Rank) -> None:
    for seed in range(3):
        rank.forward(arguments(seed), CONTEXT)
    with pytest.raises(OutOfMemory), rank.engine.memory_errors():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    assert not rank.engine._known
    check(rank, 3)


def test_what_is_refused_is_not_known(rank: Rank) -> None:
    wrong = {**arguments(0), "guidance": torch.ones(7)}
    for _ in range(2):
        with pytest.raises(ArgumentError, match="guidance"):
            rank.forward(wrong, CONTEXT)
    assert not rank.engine._known

"""What a rank says of an error that it didn't expect, and when it may go on."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tacod.rank.comm import group as collectives
from tacod.rank.comm.group import Group
from tacod.rank.engine import Engine
from tacod.rank.failure import TOLD_CHARACTERS, failure
from tacod.rank.parallel.topology import Topology


def caught(call: Any) -> Exception:
    try:
        call()
    except Exception as error:
        return error
    raise AssertionError


def mismatch() -> None:
    torch.ones(2, 3) @ torch.ones(2, 3)


def engine(device: str = "cpu") -> Any:
    made = Engine(torch.device("cpu"), Topology())
    return SimpleNamespace(device=torch.device(device), topology=made.topology, memory_used_bytes=1)


def test_shapes_that_do_not_fit_are_told_alike() -> None:
    told = [failure(engine(), caught(mismatch), 0) for _ in range(2)]
    assert told[0] == told[1]
    kind, body = told[0]
    assert kind == "raised"
    assert body["what"].startswith("RuntimeError: mat1 and mat2")
    assert body["place"].split()[-1].startswith("test_failure.py:")
    assert body["exchanges"] == 0
    assert "RuntimeError: mat1 and mat2" in body["traceback"]


def test_what_fails_in_an_exchange_ends_the_rank() -> None:
    """Two ranks may say the same of a connection that is gone."""
    error = caught(lambda: Group().all_to_all(torch.ones(1), [1, 2], [1]))
    assert collectives.__file__ in {frame.f_code.co_filename for frame in _frames(error)}
    assert failure(engine(), error, 0)[0] == "broken"


def _frames(error: Exception) -> list[Any]:
    frames, at = [], error.__traceback__
    while at is not None:
        frames.append(at.tb_frame)
        at = at.tb_next
    return frames


def test_a_gpus_rank_goes_on_only_before_anything_was_exchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    assert failure(engine("cuda"), caught(mismatch), 0)[0] == "raised"
    busy = engine("cuda")
    busy.topology.clock.begun = 3
    assert failure(busy, caught(mismatch), 3)[0] == "raised", "those were of another work item"
    assert failure(busy, caught(mismatch), 2)[0] == "broken"
    assert (
        failure(engine("cuda"), RuntimeError("CUDA error: an illegal memory access was encountered"), 0)[0] == "broken"
    )

    def lost(device: Any) -> None:
        raise RuntimeError("the GPU is lost")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    assert failure(engine("cuda"), caught(mismatch), 0)[0] == "broken"


def test_what_is_told_fits_a_packet() -> None:
    _, body = failure(engine(), RuntimeError("\ud800" + "a" * 100_000), 0)
    assert all(len(each.encode()) <= TOLD_CHARACTERS for each in body.values() if isinstance(each, str))

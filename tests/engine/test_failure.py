"""What a rank reports of an error that it didn't expect, and when it may go on."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tacod.group.work import Broken, Raised
from tacod.rank.comm import group as collectives
from tacod.rank.comm.group import Group
from tacod.rank.engine import Engine
from tacod.rank.failure import TRACEBACK_CHARACTERS, failure
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
    report = told[0]
    assert isinstance(report, Raised)
    assert report.what.startswith("RuntimeError: mat1 and mat2")
    assert report.place.split()[-1].startswith("test_failure.py:")
    assert report.exchanges == 0
    assert "RuntimeError: mat1 and mat2" in report.traceback


def test_what_fails_in_an_exchange_ends_the_rank() -> None:
    """Two ranks may say the same of a connection that is gone."""
    error = caught(lambda: Group().all_to_all(torch.ones(1), [1, 2], [1]))
    assert collectives.__file__ in {frame.f_code.co_filename for frame in _frames(error)}
    assert isinstance(failure(engine(), error, 0), Broken)


def _frames(error: Exception) -> list[Any]:
    frames, at = [], error.__traceback__
    while at is not None:
        frames.append(at.tb_frame)
        at = at.tb_next
    return frames


def test_a_gpus_rank_goes_on_only_before_anything_was_exchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    assert isinstance(failure(engine("cuda"), caught(mismatch), 0), Raised)
    busy = engine("cuda")
    busy.topology.clock.begun = 3
    assert isinstance(failure(busy, caught(mismatch), 3), Raised), "those were of another work item"
    assert isinstance(failure(busy, caught(mismatch), 2), Broken)
    illegal = RuntimeError("CUDA error: an illegal memory access was encountered")
    assert isinstance(failure(engine("cuda"), illegal, 0), Broken)

    def lost(device: Any) -> None:
        raise RuntimeError("the GPU is lost")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    assert isinstance(failure(engine("cuda"), caught(mismatch), 0), Broken)


def test_what_is_told_fits_a_packet() -> None:
    report = failure(engine(), RuntimeError("\ud800" + "a" * 100_000), 0)
    assert all(len(each.encode()) <= TRACEBACK_CHARACTERS for each in report.body().values() if isinstance(each, str))

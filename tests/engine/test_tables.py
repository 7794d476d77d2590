"""Tables are made once and not kept for ever, but for as long as a graph reads from them."""

from __future__ import annotations

import gc
import weakref

import torch
from torch import Tensor

from tacod.rank.families.pixart import _line
from tacod.rank.ops.table_cache import holding, table


def test_made_once_and_forgotten_when_others_came() -> None:
    made = []

    @table(kept=2)
    def ones(count: int) -> Tensor:
        made.append(count)
        return torch.ones(count)

    assert ones(1) is ones(1)
    for count in (2, 3, 1):
        ones(count)
    assert made == [1, 2, 3, 1]


def test_what_a_graph_reads_from_stays() -> None:
    def forward() -> weakref.ref[Tensor]:
        return weakref.ref(_line(5, 64, 2.0, 8, torch.device("cpu")))

    with holding() as held:
        kept = forward()
    for count in range(6, 80):
        _line(count, 64, 2.0, 8, torch.device("cpu"))
    gc.collect()
    assert kept() is not None
    del held
    gc.collect()
    assert kept() is None
    with holding() as nothing:
        pass
    forward()
    assert nothing == []

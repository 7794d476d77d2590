"""Made-up families, which together use all of the kit, against plain PyTorch in every layout."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from helpers import FP32
from made_up import CASES, error
from test_spread import LAYOUTS, WORLD, Ranks

from tacod.plan import Layout
from tacod.rank.parallel.topology import Topology


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    started = Ranks(tmp_path_factory.mktemp("gloo"))
    yield started
    started.close()


@pytest.mark.parametrize("case", CASES)
def test_equals_plain_operations(case: str) -> None:
    assert error(Topology(), Layout(1, 1, 1), case) <= FP32


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_equals_plain_operations_in_every_layout(ranks: Ranks, case: str, layout: tuple[int, ...]) -> None:
    errors = ranks.run(layout, "made_up", case=case, batch=max(2, layout[0]))
    assert len(errors) == WORLD, "an idle rank gets the output too"
    assert max(errors) <= FP32

"""Where weights lie: as much whole on each rank as fits, and what takes how much."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tacod.rank.weights.placement import Sizes, choose
from tacod_client.errors import ArgumentError, OutOfMemory

FLUX = Sizes({f"blocks.{n}": 300 for n in range(57)}, {f"blocks.{n}.mod": 110 for n in range(57)}, 100)
"""About Flux.1's, in MB."""


@pytest.mark.parametrize("budget", [None, FLUX.total])
def test_what_fits_stays_whole(budget: int | None) -> None:
    chosen = choose("auto", FLUX, 3, budget, reaches=True)
    assert (chosen.kind, chosen.device_bytes, chosen.streams) == ("replicated", FLUX.total, False)


def test_shares_are_among_the_ranks_if_these_reach_each_other() -> None:
    chosen = choose("auto", FLUX, 3, 12_000, reaches=True)
    assert chosen.kind == "sharded"
    # 100 for others, 600 for two blocks, a third of the modulations; each whole block costs two thirds more.
    assert chosen.device_bytes <= 12_000 < chosen.device_bytes + 201
    assert len(chosen.resident) == (12_000 - 700 - 57 * 410 // 3) // 200


@pytest.mark.parametrize(("ranks", "reaches"), [(1, False), (3, False)])
def test_the_host_has_what_no_rank_can(ranks: int, reaches: bool) -> None:
    chosen = choose("auto", FLUX, ranks, 12_000, reaches)
    assert chosen.kind == "host"
    # Modulations first: nothing is computed while they come.
    assert chosen.resident > FLUX.modulations.keys()
    assert len(chosen.resident) == 57 + (12_000 - 100 - 600 - 57 * 110) // 300


def test_a_modulation_lies_with_one_rank_alone() -> None:
    sizes = Sizes({"block": 300}, {"a": 50, "b": 50, "c": 20, "d": 20}, 7)
    # The first two have more than two thirds of the outputs, and the third rank owns two layers.
    assert choose("sharded", sizes, 3, None, reaches=True).device_bytes == 7 + 2 * 300 + 100 + 50


def test_the_host_has_what_even_shares_leave_no_room_for() -> None:
    assert choose("auto", FLUX, 3, 4_000, reaches=True).kind == "host"


def test_less_than_two_blocks_is_too_little() -> None:
    with pytest.raises(OutOfMemory, match=r"at least 0\.0 MiB .* models\.memory_bytes"):
        choose("auto", FLUX, 3, 699, reaches=True)
    assert choose("auto", FLUX, 3, 700, reaches=True).device_bytes == 700


@pytest.mark.parametrize("kind", ["sharded", "host"])
def test_what_is_asked_for_keeps_no_block_whole(kind: str) -> None:
    chosen = choose(kind, FLUX, 3, None, reaches=True)
    assert (chosen.kind, chosen.resident) == (kind, frozenset())
    assert choose("replicated", FLUX, 3, 1, reaches=True).kind == "replicated"


def test_one_rank_has_no_others_to_share_with() -> None:
    assert choose("sharded", FLUX, 1, None, reaches=False).kind == "replicated"


def test_ranks_that_do_not_reach_each_other_have_no_shares() -> None:
    with pytest.raises(ArgumentError, match='use "host"') as caught:
        choose("sharded", FLUX, 3, None, reaches=False)
    assert caught.value.argument == "weights"


def test_whole_blocks_are_spread_among_the_others() -> None:
    sizes = Sizes({str(n): 10 for n in range(10)})
    chosen = choose("auto", sizes, 1, 20 + 50, reaches=False)
    assert sorted(chosen.resident) == ["1", "3", "5", "7", "9"]


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=12),
    st.lists(st.integers(1, 20), max_size=5),
    st.integers(0, 30),
    st.integers(1, 5),
    st.integers(1, 900),
    st.booleans(),
)
def test_auto_keeps_to_its_budget(
    blocks: list[int], modulations: list[int], others: int, ranks: int, budget: int, reaches: bool
) -> None:
    sizes = Sizes(
        {f"b{n}": size for n, size in enumerate(blocks)}, {f"m{n}": size for n, size in enumerate(modulations)}, others
    )
    try:
        chosen = choose("auto", sizes, ranks, budget, reaches)
    except OutOfMemory:
        assert choose("host", sizes, ranks, None, reaches).device_bytes > budget
        return
    assert chosen.device_bytes <= budget
    assert chosen.resident <= {*sizes.blocks, *sizes.modulations}

"""Where weights lie: as much whole on each rank as fits, and what takes how much."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from helpers import FLUX as FLUX_FILE
from hypothesis import given
from hypothesis import strategies as st

from tacod.checkpoint import read_checkpoint
from tacod.execution.manifest import Manifest
from tacod.rank.parallel.modulation import owners
from tacod.rank.weights.placement import Links, Placement, Sizes, alternatives, choose, holders
from tacod.rank.weights.remap import identify
from tacod.rank.weights.sizes import sizes_of
from tacod_client.errors import ArgumentError, OutOfMemory

FLUX = Sizes({f"blocks.{n}": 300 for n in range(57)}, {f"blocks.{n}.mod": 110 for n in range(57)}, 100)
"""About Flux.1's, in MB."""


def chosen_for(asked: str, sizes: Sizes, ranks: int, budget: int | None, reaches: bool, fewer: int = 0) -> Placement:
    """The placement for ranks with one budget, which have the same."""
    chosen = choose(asked, sizes, [budget] * ranks, reaches, fewer)
    assert len(chosen.resident) == len(chosen.device_bytes) == len(chosen.streamed_bytes) == ranks
    return chosen


@pytest.mark.parametrize("budget", [None, FLUX.total])
def test_what_fits_stays_whole(budget: int | None) -> None:
    chosen = chosen_for("auto", FLUX, 3, budget, reaches=True)
    assert (chosen.kind, chosen.device_bytes, chosen.streams) == ("replicated", (FLUX.total,) * 3, False)


def test_shares_are_among_the_ranks_if_these_reach_each_other() -> None:
    chosen = chosen_for("auto", FLUX, 3, 12_000, reaches=True)
    assert chosen.kind == "sharded"
    # 100 for others, 600 for two blocks, a third of the modulations; each whole block costs two thirds more.
    assert all(held <= 12_000 < held + 201 for held in chosen.device_bytes)
    assert len(chosen.everywhere) == (12_000 - 700 - 57 * 410 // 3) // 200


@pytest.mark.parametrize(("ranks", "reaches"), [(1, False), (3, False)])
def test_the_host_has_what_no_rank_can(ranks: int, reaches: bool) -> None:
    chosen = chosen_for("auto", FLUX, ranks, 12_000, reaches)
    assert chosen.kind == "host"
    # Modulations first: nothing is computed while they come.
    assert chosen.everywhere > FLUX.modulations.keys()
    assert len(chosen.everywhere) == 57 + (12_000 - 100 - 600 - 57 * 110) // 300


@pytest.mark.parametrize("asked", ["sharded", "host"])
@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_a_modulation_of_tensors_that_stay_everywhere_has_no_bytes(asked: str, ranks: int) -> None:
    sizes = Sizes({"block": 300}, {"a": 50, "small": 0, "last": 0}, 7)
    kind = "replicated" if (asked, ranks) == ("sharded", 1) else asked
    assert chosen_for(asked, sizes, ranks, None, reaches=True).kind == kind


def test_a_modulation_lies_with_one_rank_alone() -> None:
    sizes = Sizes({"block": 300}, {"a": 50, "b": 50, "c": 20, "d": 20}, 7)
    # The first two have more than two thirds of the outputs, and the third rank owns two layers.
    shared = 7 + 2 * 300 + 100
    assert chosen_for("sharded", sizes, 3, None, reaches=True).device_bytes == (shared + 50, shared + 50, shared + 40)


def test_the_host_has_what_even_shares_leave_no_room_for() -> None:
    assert chosen_for("auto", FLUX, 3, 4_000, reaches=True).kind == "host"


def test_less_than_two_blocks_is_too_little() -> None:
    with pytest.raises(OutOfMemory, match=r"at least \d+ B .* models\.memory_bytes"):
        chosen_for("auto", FLUX, 3, 699, reaches=True)
    assert chosen_for("auto", FLUX, 3, 700, reaches=True).device_bytes == (700,) * 3


@pytest.mark.parametrize("kind", ["sharded", "host"])
def test_what_is_asked_for_keeps_no_block_whole(kind: str) -> None:
    chosen = chosen_for(kind, FLUX, 3, None, reaches=True)
    assert (chosen.kind, chosen.resident) == (kind, (frozenset(),) * 3)
    assert chosen_for("replicated", FLUX, 3, 1, reaches=True).kind == "replicated"


def test_one_rank_has_no_others_to_share_with() -> None:
    assert chosen_for("sharded", FLUX, 1, None, reaches=False).kind == "replicated"


def test_ranks_that_do_not_reach_each_other_have_no_shares() -> None:
    with pytest.raises(ArgumentError, match='use "host"') as caught:
        chosen_for("sharded", FLUX, 3, None, reaches=False)
    assert caught.value.argument == "weights"


def test_whole_blocks_are_spread_among_the_others() -> None:
    sizes = Sizes({str(n): 10 for n in range(10)})
    chosen = chosen_for("auto", sizes, 1, 20 + 50, reaches=False)
    assert sorted(chosen.everywhere) == ["1", "3", "5", "7", "9"]


@pytest.mark.parametrize(("ranks", "reaches"), [(1, False), (3, False), (3, True)])
@pytest.mark.parametrize("budget", [None, 12_000, 24_000])
def test_fewer_blocks_take_that_much_less(ranks: int, reaches: bool, budget: int | None) -> None:
    before = chosen_for("auto", FLUX, ranks, budget, reaches)
    for fewer in (1, 3, 10):
        after = chosen_for("auto", FLUX, ranks, budget, reaches, fewer)
        assert before.can_shrink
        assert max(after.device_bytes) <= max(before.device_bytes) - fewer * FLUX.largest
        assert min(after.streamed_bytes) >= max(before.streamed_bytes)
    least = chosen_for("auto", FLUX, ranks, budget, reaches, 1000)
    assert (least.device_bytes, least.can_shrink) == ((FLUX.least,) * ranks, False)


@pytest.mark.parametrize("asked", ["replicated", "sharded", "host"])
def test_what_was_asked_for_does_not_shrink(asked: str) -> None:
    assert not chosen_for(asked, FLUX, 3, None, True).can_shrink
    assert chosen_for(asked, FLUX, 3, None, True, fewer=5) == chosen_for(asked, FLUX, 3, None, True)


def test_what_would_take_less_is_told() -> None:
    gib = Sizes({name: size << 20 for name, size in FLUX.blocks.items()}, {}, 100 << 20)
    assert alternatives("replicated", gib, 3, True) == (
        'weights="sharded" takes 6.2 GiB, weights="host" takes 700.0 MiB on each device, and "auto" what there is room '
        "for, a file of fewer bits takes less"
    )
    assert alternatives("sharded", gib, 3, True).startswith("6 ranks take 3.5 GiB each, ")
    assert alternatives("host", gib, 3, True) == "a file of fewer bits takes less"


def test_each_rank_fills_its_own_budget() -> None:
    """Two large GPUs and one that has room for its share."""
    chosen = choose("auto", FLUX, [20_000, 9_000, 14_000], reaches=True)
    assert chosen.kind == "sharded"
    small, middle, large = (chosen.resident[rank] for rank in (1, 2, 0))
    assert small < middle < large
    for held, budget in zip(chosen.device_bytes, (20_000, 9_000, 14_000), strict=True):
        assert held <= budget < held + 301
    assert chosen.streamed_bytes[0] < chosen.streamed_bytes[2] < chosen.streamed_bytes[1]


def test_ranks_with_one_budget_may_own_unlike_modulations() -> None:
    """Rank 0 owns less, so it has room for a block that the others have none for."""
    modulations = dict(zip("abcdefghi", (51, 19, 75, 95, 32, 32, 29, 28, 50), strict=True))
    chosen = choose("auto", Sizes(dict.fromkeys("stuvwxyz", 69), modulations, 19), [735] * 4, reaches=True)
    assert chosen.kind == "sharded"
    assert all(735 - 69 < held <= 735 for held in chosen.device_bytes)
    assert len({len(each) for each in chosen.resident}) == 2


def test_a_rank_without_room_for_a_share_does_not_hold_the_others_back() -> None:
    chosen = choose("auto", FLUX, [None, 4_000, 30_000], reaches=True)
    assert chosen.kind == "host"
    assert chosen.streamed_bytes == (0, chosen.streamed_bytes[1], 0)
    assert chosen.device_bytes == (FLUX.total, chosen.device_bytes[1], FLUX.total)
    assert chosen.device_bytes[1] <= 4_000


def test_the_rest_comes_from_where_it_is_fetched_sooner() -> None:
    budgets = [12_000] * 3
    for links, kind in ((Links(120e9, 40e9), "sharded"), (Links(20e9, 40e9), "host"), (Links(30e9, 30e9), "sharded")):
        chosen = choose("auto", FLUX, budgets, True, links=links)
        assert chosen.kind == kind
        rate = links.peer_bytes_s if kind == "sharded" else links.host_bytes_s
        assert links.seconds(chosen) == [size / rate for size in chosen.streamed_bytes]


def test_the_cost_of_fetching_is_told() -> None:
    large = Sizes({name: size << 20 for name, size in FLUX.blocks.items()})
    chosen = choose("auto", large, [8 << 30] * 2, reaches=False)
    fetch_s = max(chosen.streamed_bytes) / 40e9
    assert chosen.describe(large).endswith(f"fetching takes {fetch_s * 1e3:.1f} ms at 40 GB/s (assumed)")
    longer = f"a forward is about {fetch_s * 1e3 - 100:.1f} ms longer"
    assert chosen.describe(large, Links(1, 40e9, True), 0.1).endswith(
        f"at 40 GB/s (measured), beside 100.0 ms of computing (estimated): {longer}"
    )
    assert chosen.describe(large, compute_s=9).endswith("beside 9000.0 ms of computing (estimated): it is hidden")


@pytest.mark.parametrize("weights", ["replicated", "sharded", "host"])
def test_what_weights_will_take_is_known_by_their_header(tmp_path: Path, weights: str) -> None:
    """So that enough others make room for a first load: two blocks are in buffers, and a rank may hold a share."""
    path = FLUX_FILE.save(tmp_path)
    model = Manifest([str(tmp_path)], "cpu").describe(str(path), "fp32", None, "auto", 2, weights)
    family, config, checkpoint = identify(read_checkpoint(str(path)))
    with torch.device("meta"):
        sizes = sizes_of(family(config), checkpoint, torch.float32)
    expected = max(chosen_for(weights, sizes, 2, None, True).device_bytes)
    # A block's modulations can't be told from the names.
    assert 0.95 * expected <= model.weight_bytes <= 1.5 * expected


def test_who_has_too_little_is_told() -> None:
    with pytest.raises(OutOfMemory, match=r"allowed on rank 1, so \d"):
        choose("auto", FLUX, [30_000, 600, 30_000], reaches=True)


@given(
    st.lists(st.integers(0, 50), min_size=1, max_size=12),
    st.lists(st.integers(0, 20), max_size=5),
    st.integers(0, 30),
    st.lists(st.integers(1, 900), min_size=1, max_size=5),
    st.booleans(),
    st.integers(0, 5),
)
def test_auto_keeps_to_its_budgets(
    blocks: list[int], modulations: list[int], others: int, budgets: list[int], reaches: bool, fewer: int
) -> None:
    sizes = Sizes(
        {f"b{n}": size for n, size in enumerate(blocks)}, {f"m{n}": size for n, size in enumerate(modulations)}, others
    )
    try:
        chosen = choose("auto", sizes, budgets, reaches, fewer)
    except OutOfMemory:
        assert sizes.least > min(budgets)
        return
    for held, budget, whole in zip(chosen.device_bytes, budgets, chosen.resident, strict=True):
        assert held <= budget
        assert whole <= sizes.units.keys()
    by_size = sorted(chosen.resident, key=len)
    assert all(one <= other for one, other in itertools.pairwise(by_size))


# --- on several hosts -------------------------------------------------------------------------------------------------


def test_each_host_shares_out_among_its_own_ranks() -> None:
    sizes = Sizes({str(n): 10 for n in range(12)}, {f"m{n}": 6 for n in range(6)}, 5)
    one = choose("sharded", sizes, [None] * 2, True)
    two = choose("sharded", sizes, [None] * 4, True, hosts=(0, 0, 1, 1))
    assert two.streamed_bytes == one.streamed_bytes * 2
    assert two.device_bytes == one.device_bytes * 2
    # A rank that is alone on its host holds all of it.
    mixed = choose("sharded", sizes, [None] * 3, True, hosts=(0, 0, 1))
    assert mixed.device_bytes[2] >= sizes.total
    assert mixed.streamed_bytes == (60, 60, 0)
    assert choose("sharded", sizes, [None] * 2, True, hosts=(0, 1)).kind == "replicated"


def test_auto_leaves_to_the_host_what_one_of_them_has_no_room_to_share() -> None:
    sizes = Sizes({str(n): 10 for n in range(12)}, {}, 5)
    assert choose("auto", sizes, [100] * 4, True, hosts=(0, 0, 1, 1)).kind == "sharded"
    assert choose("auto", sizes, [100] * 3, True, hosts=(0, 0, 1)).kind == "host"
    assert choose("auto", sizes, [100] * 2, True, hosts=(0, 1)).kind == "host"
    assert choose("auto", sizes, [200] * 2, True, hosts=(0, 1)).kind == "replicated"


@given(
    sizes=st.lists(st.integers(1, 100), max_size=12),
    hosts=st.lists(st.integers(0, 2), min_size=1, max_size=6),
)
def test_a_modulation_lies_with_the_rank_that_computes_it(sizes: list[int], hosts: list[int]) -> None:
    hosts = sorted(hosts)
    whose = owners(sizes, len(hosts))
    for host in {*hosts}:
        for holder, owner in zip(holders(sizes, hosts, host), whose, strict=True):
            assert hosts[holder] == host
            assert holder == owner or hosts[owner] != host

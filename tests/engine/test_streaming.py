"""Weights that ranks hold together or in the host's memory: results are the same to the bit, with less on each rank."""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from helpers import FLUX, GOLDEN, golden_names, quantized_golden_names, read_golden
from rank_worker import Ranks
from safetensors import safe_open

from tacod.checkpoint import TensorInfo, read_checkpoint
from tacod.group.work import Stepped
from tacod.rank.comm.group import Group
from tacod.rank.engine import Engine
from tacod.rank.families import detect
from tacod.rank.ops.packed.base import PackedLinear
from tacod.rank.parallel.topology import Topology
from tacod.rank.weights import links
from tacod.rank.weights.depot import Depot, HostSlabs, Owner, PeerSlabs, Stored
from tacod.rank.weights.placement import Links
from tacod.rank.weights.stage import OnCPU, Stage
from tacod.rank.weights.streaming import Streaming
from tacod.tools.plan import main as plan
from tacod_client.errors import OutOfMemory
from tacod_client.exchange import pack
from tacod_client.tensors import to_wire

BY_THEMSELVES = ("chroma", "chroma_radiance")
"""Goldens that are the only ones of their families."""


def cases() -> Iterator[tuple[str, str, int]]:
    """Each golden with weights here or there in turn, so that each family has both; the quantised ones with both.

    Each way with some numbers of ranks. One model's cases follow each other.
    """
    for place, name in enumerate([*golden_names(), *quantized_golden_names()]):
        both = name in BY_THEMSELVES or name.startswith("quantised/")
        if both or place % 2 == 0:
            yield name, "sharded", 2 + place // 2 % 4
        if both or place % 2 == 1:
            yield name, "host", 1 + place // 2 % 3


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """The path of a golden's file; the next golden's takes its place."""
    folder = tmp_path_factory.mktemp("goldens")

    @functools.lru_cache(maxsize=1)
    def save(name: str) -> str:
        path = folder / "model.safetensors"
        read_golden(name).save(path)
        return str(path)

    return save


def readers(told: list[Any]) -> Counter[int]:
    """How many times each byte of a file was read, by what ``reading_load`` tells of all ranks."""
    found: Counter[int] = Counter()
    for ranges, *_ in told:
        for start, end in ranges:
            found.update(range(start, end))
    return found


def takes_about(resident: int, expected: int) -> None:
    """Tensors begin at multiples of 256 bytes, which matters in models as small as these."""
    assert resident == pytest.approx(expected, rel=0.1, abs=1 << 16)


def family_of(name: str) -> str:
    """A golden's, by its header."""
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        names = [key for key in file.keys() if key.startswith("weights.")]  # noqa: SIM118
        shapes = {
            key.removeprefix("weights."): TensorInfo("BF16", tuple(file.get_slice(key).get_shape())) for key in names
        }
        return detect(shapes, json.loads(file.metadata()["config"]))[0].family


def test_each_family_has_weights_in_both_places() -> None:
    """A golden that comes later may be the only one of its family, or change the turns of the others."""
    found: dict[str, set[str]] = {}
    for name, weights, _ in cases():
        if not name.startswith("quantised/"):
            found.setdefault(family_of(name), set()).add(weights)
    assert len(found) > 15
    assert [family for family, places in found.items() if len(places) < 2] == []


@pytest.mark.parametrize(("name", "weights", "count"), [*cases()])
def test_results_are_the_same_to_the_bit(
    ranks: Ranks, saved: Callable[[str], str], name: str, weights: str, count: int
) -> None:
    told = ranks.run((1, count, 1), "streamed", name=name, path=saved(name), weights=weights)
    assert len(told) == count
    for same, _, _, streamed in told:
        assert same
        assert streamed > 0
    for _, resident, expected, _ in told:
        takes_about(resident, expected)


@pytest.mark.parametrize("layout", [(2, 2, 1), (1, 1, 3), (1, 1, 1)], ids=str)
def test_in_any_layout(ranks: Ranks, saved: Callable[[str], str], layout: tuple[int, ...]) -> None:
    """Ranks that a layout leaves out hold their part all the same."""
    told = ranks.run(layout, "streamed", name="flux_dev", path=saved("flux_dev"), weights="sharded", everyone=True)
    assert len(told) == layout[0] * layout[1] * layout[2]
    assert all(same for same, _, _, _ in told)


@pytest.mark.parametrize(
    "parts", [(0.7, 0.4), (1.0, 0.3), (0.0, 0.9), (0.9, 0.5, 0.7), (1.0, 0.2, 0.2), (0.0, 0.6, 1.0)]
)
@pytest.mark.parametrize("name", ["hidream", "qwen_image", "quantised/z_image_mxfp8"])
def test_each_rank_fills_its_own_budget(
    ranks: Ranks, saved: Callable[[str], str], name: str, parts: tuple[float, ...]
) -> None:
    """Of two or three ranks: the bits are the same, and a rank with more room fetches less."""
    told = ranks.run((1, len(parts), 1), "streamed", name=name, path=saved(name), weights="auto", parts=parts)
    assert len(told) == len(parts)
    for same, resident, expected, _ in told:
        assert same
        takes_about(resident, expected)
    fetched = [fetched for *_, fetched in told]
    assert len(set(fetched)) > 1
    assert [fetched[i] for i in sorted(range(len(parts)), key=parts.__getitem__)] == sorted(fetched, reverse=True)


@pytest.mark.parametrize("counts", [(0, 1), (2, 1), (0, 2, 4), (4, 1, 1)])
@pytest.mark.parametrize("name", ["hidream", "quantised/flux_dev_nvfp4"])
def test_ranks_that_share_may_hold_more_than_others(
    ranks: Ranks, saved: Callable[[str], str], name: str, counts: tuple[int, ...]
) -> None:
    told = ranks.run((1, len(counts), 1), "streamed", name=name, path=saved(name), weights="sharded", counts=counts)
    for same, resident, expected, _ in told:
        assert same
        takes_about(resident, expected)
    fetched = [fetched for *_, fetched in told]
    for one, other in itertools.permutations(range(len(counts)), 2):
        assert (fetched[one] > fetched[other]) or counts[one] >= counts[other]


@pytest.mark.parametrize("weights", ["sharded", "host"])
@pytest.mark.parametrize("name", ["hidream", "quantised/flux_dev_nvfp4"])
def test_ranks_with_unlike_devices_pack_for_themselves(
    ranks: Ranks, saved: Callable[[str], str], name: str, weights: str
) -> None:
    told = ranks.run((1, 3, 1), "streamed", name=name, path=saved(name), weights=weights, alike=False)
    assert all(same for same, *_ in told)
    assert all(streamed > 0 for *_, streamed in told)
    read = ranks.run((1, 3, 1), "reading_load", path=saved(name), weights=weights, alike=False)
    assert set(readers(read).values()) == {3}


@pytest.mark.parametrize("weights", ["sharded", "host"])
@pytest.mark.parametrize("name", ["hidream", "quantised/flux_dev_nvfp4", "minimax_h3_mask"])
@pytest.mark.parametrize("counts", [None, (1, 1, 2)])
def test_each_byte_is_read_once(
    ranks: Ranks, saved: Callable[[str], str], name: str, weights: str, counts: tuple[int, ...] | None
) -> None:
    """What every rank keeps whole it reads; all else is read by one rank for all, and lies in the host once."""
    told = ranks.run((1, 3, 1), "reading_load", path=saved(name), weights=weights, counts=counts)
    times = readers(told)
    assert set(times.values()) == {1, 3}
    assert sum(sum(end - start for start, end in ranges) < len(times) for ranges, *_ in told) >= 2
    assert len({(held, stored) for _, held, stored in told}) == 1
    _, held, stored = told[0]
    # The pieces of small tensors begin at multiples of 256 bytes too.
    assert stored <= held <= 1.1 * stored + (1 << 16)


HOSTS = [(0, 1), (0, 0, 1), (0, 1, 1, 1), (0, 0, 1, 1, 2)]


@pytest.mark.parametrize("weights", ["sharded", "host"])
@pytest.mark.parametrize("hosts", HOSTS, ids=str)
@pytest.mark.parametrize("name", ["hidream", "quantised/z_image_mxfp8"])
def test_each_host_holds_all_weights(
    ranks: Ranks, saved: Callable[[str], str], name: str, hosts: tuple[int, ...], weights: str
) -> None:
    told = ranks.run((1, len(hosts), 1), "streamed", name=name, path=saved(name), weights=weights, hosts=hosts)
    assert len(told) == len(hosts)
    for rank, (same, resident, expected, streamed) in enumerate(told):
        assert same
        takes_about(resident, expected)
        # What lies on a rank's own device it doesn't fetch, and hosts of one rank each share nothing.
        alone = hosts.count(hosts[rank]) == 1
        assert (streamed > 0) is (weights == "host" or not alone)


@pytest.mark.parametrize("layout", [(2, 2, 1), (1, 2, 1), (1, 1, 3), (1, 1, 1)], ids=str)
def test_on_several_hosts_in_any_layout(ranks: Ranks, saved: Callable[[str], str], layout: tuple[int, ...]) -> None:
    """Ranks compute modulations that another rank of their host holds."""
    hosts = (0, 0, 1, 1, 1)
    case: dict[str, Any] = {"path": saved("flux_dev"), "weights": "sharded", "hosts": hosts, "everyone": True}
    told = ranks.run(layout, "streamed", name="flux_dev", **case)
    assert len(told) == layout[0] * layout[1] * layout[2]
    assert all(same for same, *_ in told)


@pytest.mark.parametrize("parts", [(0.7, 0.4, 0.9), (1.0, 0.2, 0.2), (0.0, 0.6, 1.0)])
@pytest.mark.parametrize("hosts", [(0, 0, 1), (0, 1, 2)], ids=str)
def test_each_rank_of_several_hosts_fills_its_own_budget(
    ranks: Ranks, saved: Callable[[str], str], parts: tuple[float, ...], hosts: tuple[int, ...]
) -> None:
    case: dict[str, Any] = {"path": saved("hidream"), "weights": "auto", "parts": parts, "hosts": hosts}
    for same, resident, expected, _ in ranks.run((1, 3, 1), "streamed", name="hidream", **case):
        assert same
        takes_about(resident, expected)


@pytest.mark.parametrize("what", ["block", "corrupt", "reserve", "buffers"])
@pytest.mark.parametrize("failing", [0, 2])
def test_one_rank_that_fails_makes_those_of_other_hosts_fail(
    ranks: Ranks, saved: Callable[[str], str], failing: int, what: str
) -> None:
    path, hosts = saved("flux_dev"), (0, 0, 1, 1)
    told = ranks.run((1, 4, 1), "failing_load", path=path, failing=failing, what=what, hosts=hosts)
    kinds = {each.partition(":")[0] for rank, each in enumerate(told) if rank != failing}
    assert kinds == {"ModelCorrupt" if what == "corrupt" else "OutOfMemory"}
    # The ranks are in step again.
    told = ranks.run((1, 4, 1), "streamed", name="flux_dev", path=path, weights="sharded", hosts=hosts)
    assert all(same for same, *_ in told)


@pytest.mark.parametrize("fewer", [1, 2, 100])
def test_fewer_blocks_than_the_budget_allows(ranks: Ranks, saved: Callable[[str], str], fewer: int) -> None:
    case: dict[str, Any] = {"path": saved("hidream"), "weights": "auto", "parts": (0.9, 1.0)}
    befores, afters = (ranks.run((1, 2, 1), "streamed", name="hidream", **case, fewer=n) for n in (0, fewer))
    for before, after in zip(befores, afters, strict=True):
        assert after[0]
        assert after[1] < before[1]
        assert after[3] > before[3]


@pytest.mark.parametrize("what", ["block", "corrupt", "changed", "file", "reserve", "map", "buffers"])
@pytest.mark.parametrize("failing", [0, 1])
def test_one_rank_that_fails_makes_all_fail(ranks: Ranks, saved: Callable[[str], str], failing: int, what: str) -> None:
    path = saved("flux_dev")
    told = ranks.run((1, 2, 1), "failing_load", path=path, failing=failing, what=what)
    own, other = {
        "block": ("MemoryError: none", "OutOfMemory: another rank could not load these weights"),
        "buffers": ("OutOfMemoryError: none", "OutOfMemory: another rank could not load these weights"),
        # One rank alone reads a block, so it alone finds what is wrong with it.
        "corrupt": ("ModelCorrupt: a scale isn't finite",) * 2,
        "changed": ("ModelCorrupt: the file changed",) * 2,
    }.get(what, ("OutOfMemory: no memory for ", "OutOfMemory: no memory for "))
    assert told[failing].startswith(own)
    assert told[1 - failing].startswith(other)
    # The ranks are in step again.
    told = ranks.run((1, 2, 1), "streamed", name="flux_dev", path=path, weights="sharded")
    assert all(same for same, *_ in told)


@pytest.mark.parametrize("weights", ["sharded", "host"])
@pytest.mark.parametrize("failing", [0, 1])
def test_one_rank_that_fails_to_patch_makes_all_fail(
    ranks: Ranks, saved: Callable[[str], str], failing: int, weights: str
) -> None:
    told = ranks.run(
        (1, 2, 1), "failing_patch", name="flux_dev", path=saved("flux_dev"), weights=weights, failing=failing
    )
    assert told[failing] == ["MemoryError: none", True, True]
    said, unchanged, works = told[1 - failing]
    assert said.startswith("OutOfMemory: another rank could not load these weights")
    assert unchanged
    assert works


class Symmetric:
    """A block of memory on each rank, as GPUs have it: of one size."""

    made = 0

    def __init__(self, group: Any, size: int, agree: Any) -> None:
        self.parts = torch.zeros(3, size, dtype=torch.uint8)
        Symmetric.made += size

    def view(self, rank: int, shape: tuple[int], dtype: torch.dtype, start: int) -> torch.Tensor:
        part = self.parts[rank, start : start + shape[0]]
        assert part.shape == shape
        return part


def test_what_one_gpu_holds_alone_takes_no_memory_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tacod.rank.weights.depot.SymmetricBlock", Symmetric)
    monkeypatch.setattr(Symmetric, "made", 0)
    group = Group()
    monkeypatch.setattr(group, "size", 3)
    monkeypatch.setattr(group, "agree", lambda verdict: verdict)
    depot = Depot(group, lambda: PeerSlabs(group))
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(256, generator=generator) for _ in range(9)]
    stored: list[Stored] = []
    for holder in (0, 0, 1, 0, 2, 1, 2, 2, 1):
        # This process stores for each of the ranks in turn.
        monkeypatch.setattr(group, "rank", holder)
        stored += depot.store([[tensors[len(stored)]]], [Owner(holder=holder)])[0]
    assert Symmetric.made == 3 * 1024
    assert all(
        torch.equal(each.read(torch.device("cpu")), tensor) for each, tensor in zip(stored, tensors, strict=True)
    )
    # What is stored later, for another model, goes elsewhere: it is freed at another time.
    depot.store([[tensors[0]]], [Owner(holder=0)])
    assert Symmetric.made == 4 * 1024
    depot.settle()
    depot.store([[tensors[0]]], [Owner(holder=1)])
    assert Symmetric.made == 5 * 1024


def test_what_one_gpu_holds_alone_is_not_mixed_with_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stored at once, each rank's own takes the place that another one's leaves."""
    monkeypatch.setattr("tacod.rank.weights.depot.SymmetricBlock", Symmetric)
    monkeypatch.setattr(Symmetric, "made", 0)
    group = Group()
    monkeypatch.setattr(group, "size", 3)
    monkeypatch.setattr(group, "agree", lambda verdict: verdict)
    depot = Depot(group, lambda: PeerSlabs(group))
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(384, generator=generator) for _ in range(5)]
    # This process has filled all of them.
    whose = [Owner(0, 1), Owner(0), Owner(0, 0), Owner(0, 2), Owner(0)]
    stored = depot.store([[each] for each in tensors], whose)
    assert Symmetric.made == 2 * 512 + 1536
    for (each,), tensor in zip(stored, tensors, strict=True):
        assert torch.equal(each.read(torch.device("cpu")), tensor)


def test_gpus_that_are_told_to_use_collectives_alone_share_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    for on_gpu in (False, True):
        topology = Topology()
        monkeypatch.setattr(topology, "world_size", 2)
        monkeypatch.setattr(topology.everyone, "on_gpu", on_gpu, raising=False)
        assert topology.reaches is not on_gpu


def test_plan_says_where_weights_would_lie(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(FLUX.save(tmp_path))
    assert plan([file, "--ranks", "3", "--memory", "0.001"]) == 0
    where = r"\d+ of 4 blocks are whole there, the others in the host's memory, of which it fetches \d+\.\d KiB"
    said = capsys.readouterr().out
    assert re.search(rf"on each rank; {where}", said)
    cost = r"fetching takes 0\.\d ms at 40 GB/s \(assumed\), beside \d+\.\d ms of computing \(estimated\): "
    assert re.search(cost, said)
    assert plan([file, "--ranks", "3", "--memory", "0.001", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["weights"] == "host"
    assert max(told["resident_bytes"]) <= 0.001 * 2**30
    assert min(told["streamed_bytes"]) > 0
    assert plan([file, "--ranks", "3", "--memory", "0.00001"]) != 0
    assert "models.memory_bytes" in capsys.readouterr().err


def test_plan_says_it_by_rank_where_ranks_differ(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(FLUX.save(tmp_path))
    assert plan([file, "--ranks", "3", "--memory", "0.0011,0.001,0.0011"]) == 0
    said = capsys.readouterr().out
    assert "on ranks 0, 2; " in said
    assert "on rank 1; " in said
    for wrong in ("1,2", "1,x,2", "0", "1,-1,1", "nan", ""):
        assert plan([file, "--ranks", "3", f"--memory={wrong}"]) != 0
        assert "one number for all ranks or 3 numbers" in capsys.readouterr().err


# --- on one rank, of which the host's memory holds the blocks ---------------------------------------------------------


def forward(engine: Engine, model: str, inputs: dict[str, Any]) -> Any:
    """The bytes of an output."""
    done = engine.forward(model, "auto", pack(inputs, "arguments", {}, None), b"")
    assert isinstance(done, Stepped)
    return done.out


def load(engine: Engine, path: Path, dtype: str, patches: Any, weights: str) -> None:
    identity, base = read_checkpoint(str(path)).identity, "base" if patches else None
    engine.load("model", str(path), identity, dtype, patches, base, [], weights=weights)


def change(key: str, shape: tuple[int, ...], kind: str) -> dict[str, Any]:
    """A patch of a weight."""
    generator = torch.Generator().manual_seed(len(key))
    if kind == "diff":
        value = torch.randn(shape, generator=generator)
        return {"key": f"diffusion_model.{key}", "kind": kind, "diff": to_wire(value, "diff"), "strength": 0.1}
    up, down = torch.randn(shape[0], 2, generator=generator), torch.randn(2, shape[1], generator=generator)
    factors = {"up": to_wire(up, "up"), "down": to_wire(down, "down"), "alpha": 2.0}
    return {"key": f"diffusion_model.{key}", "kind": kind, **factors, "strength": 0.1}


def test_a_loop_within_a_loop_is_refused(tmp_path: Path) -> None:
    """The inner one would leave its own weights to the outer one's blocks."""
    engine = Engine(torch.device("cpu"), Topology())
    load(engine, FLUX.save(tmp_path), "fp32", None, "host")
    model = engine.models["model"].model
    assert model.weights is not None
    blocks = model.weights.over(model.trunk)
    next(blocks)
    # One that is over may be followed by another, and so may one that broke off.
    assert len(list(model.weights.over(model.modulating))) == len(model.modulating)
    with pytest.raises(RuntimeError, match="another loop"):
        next(blocks)
    assert list(model.weights.over(model.trunk)) == model.trunk


def test_a_step_cache_skips_blocks_that_are_fetched(tmp_path: Path) -> None:
    path, told = FLUX.save(tmp_path), []
    for weights in ("replicated", "host"):
        engine = Engine(torch.device("cpu"), Topology())
        load(engine, path, "fp32", None, weights)
        steps = []
        for step in range(6):
            inputs = FLUX.inputs()
            inputs["timestep"] = inputs["timestep"] * (1 - 0.01 * step)
            arguments = pack(inputs, "arguments", {}, None)
            done = engine.forward("model", {"step_cache": 0.4}, arguments, b"session")
            assert isinstance(done, Stepped)
            steps.append((done.out, done.skipped))
        # What came for the skipped blocks is in nobody's way.
        steps.append((forward(engine, "model", FLUX.inputs(3)), 0))
        told.append(steps)
    assert told[0] == told[1]
    assert 0 < sum(skipped for _, skipped in told[0]) < 6


def test_links_are_measured_where_there_is_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, group = torch.device("cpu"), Group()
    assert links.measure_links(group, cpu, reaches=False) == Links()
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(links, "BYTES", 1 << 20)
    rate = links._measure(group, cpu, HostSlabs(group, gpu=False))
    assert rate is not None
    assert 1e6 < rate < 1e13
    monkeypatch.setattr("tacod.rank.weights.depot.free_bytes", lambda: 1 << 10)
    assert links._measure(group, cpu, HostSlabs(group, gpu=False)) is None


@pytest.mark.parametrize("room", [1_700_000, 2_340_000])
def test_the_first_blocks_come_while_a_forward_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    """With less room the modulations are fetched too, and need the buffers first. No weights are fetched twice."""
    path, inputs = FLUX.save(tmp_path), FLUX.inputs()
    engine = Engine(torch.device("cpu"), Topology())
    load(engine, path, "fp32", None, "replicated")
    expected = forward(engine, "model", inputs)
    engine.unload("model", [])
    identity = read_checkpoint(str(path)).identity
    engine.load("model", str(path), identity, "fp32", None, None, [], memory_bytes=room)
    model = engine.models["model"].model
    assert isinstance(model.weights, Stage)
    happened: list[str] = []
    fetch, begin = OnCPU.fetch, model.begin
    monkeypatch.setattr(OnCPU, "fetch", lambda *given: [happened.append("fetch"), fetch(*given)])
    monkeypatch.setattr(model, "begin", lambda *given, **named: [happened.append("begin"), begin(*given, **named)])
    assert forward(engine, "model", inputs) == expected
    units = [unit.path for unit in model.weights.units]
    blocks = [path for path in units if path in model.blocks_at]
    assert happened[:3] == (["fetch", "fetch", "begin"] if units == blocks else ["begin", "fetch", "fetch"])
    assert happened.count("fetch") == len(units)
    assert forward(engine, "model", inputs) == expected


@pytest.mark.parametrize(
    ("weights", "shrinks", "advice"),
    [
        ("auto", True, ""),
        ("replicated", False, r'The model takes 2\.8 MiB of each device: weights="host" takes 1\.4 MiB on each device'),
        ("host", False, r"takes 1\.4 MiB of each device: a file of fewer bits takes less"),
    ],
)
def test_a_load_without_memory_says_by_how_much_and_what_takes_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: str, shrinks: bool, advice: str
) -> None:
    engine = Engine(torch.device("cpu"), Topology())
    text = (
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8.00 GiB of which 512.00 MiB is "
        "free. Of the allocated memory"
    )
    monkeypatch.setattr(Streaming, "finish", Mock(side_effect=torch.OutOfMemoryError(text)))
    with pytest.raises(OutOfMemory, match=r"1\.5 GiB lack; unload a model.*" + advice) as caught:
        load(engine, FLUX.save(tmp_path), "fp32", None, weights)
    assert caught.value.details == {"lacking_bytes": 3 << 29, "host": False, "shrinks": shrinks}
    assert engine.models == {}


@pytest.mark.parametrize(("weights", "shrinks"), [("auto", True), ("host", False)])
@pytest.mark.parametrize("known", [False, True])
def test_patches_without_memory_say_whether_fewer_blocks_help(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: str, shrinks: bool, known: bool
) -> None:
    """Whether their base was there before or not."""
    engine, path = Engine(torch.device("cpu"), Topology()), FLUX.save(tmp_path)
    key = "double_blocks.0.img_attn.qkv.weight"
    patches = [change(key, tuple(FLUX.model.state_dict()[key].shape), "diff")]
    with monkeypatch.context() as context:
        if known:
            engine.load("base", str(path), read_checkpoint(str(path)).identity, "fp32", None, None, [], weights=weights)
        context.setattr("tacod.rank.loader.apply", Mock(side_effect=MemoryError))
        with pytest.raises(OutOfMemory, match="unload a model") as caught:
            load(engine, path, "fp32", patches, weights)
    assert caught.value.details["shrinks"] is shrinks
    assert len(engine.models) == known


@pytest.mark.parametrize("kind", ["lora", "diff"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp8"])
def test_patches_of_a_plain_file(tmp_path: Path, dtype: str, kind: str) -> None:
    path, inputs = FLUX.save(tmp_path), FLUX.inputs()
    weights = FLUX.model.state_dict()
    keys = "double_blocks.0.img_attn.qkv.weight", "double_blocks.1.img_mod.lin.weight", "img_in.weight"
    patches = [change(key, tuple(weights[key].shape), kind) for key in keys]
    outs = []
    for where in ("replicated", "host"):
        engine = Engine(torch.device("cpu"), Topology())
        load(engine, path, dtype, patches, where)
        assert [each.facts.weights for each in engine.models.values()] == [where, where]
        outs.append([forward(engine, model, inputs) for model in ("model", "base", "model")])
    assert outs[0] == outs[1]
    assert outs[0][0] == outs[0][2] != outs[0][1]


@pytest.mark.parametrize("kind", ["lora", "diff"])
@pytest.mark.parametrize("name", quantized_golden_names()[::3])
def test_patches_of_packed_layers(tmp_path: Path, name: str, kind: str) -> None:
    golden, path = read_golden(name), tmp_path / "model.safetensors"
    golden.save(path)
    model = golden.model()
    layers = [key for key, each in model.named_modules() if isinstance(each, PackedLinear)]
    layers = [layers[0], layers[len(layers) // 2], layers[-1]]
    shapes = {key: (each.out_features, each.in_features) for key in layers if (each := model.get_submodule(key))}
    patches = [change(f"{key}.weight", shape, kind) for key, shape in shapes.items()]
    outs = []
    for where in ("replicated", "host"):
        engine = Engine(torch.device("cpu"), Topology(), smallest=0)
        load(engine, path, "fp32", patches, where)
        assert where == "replicated" or max(engine.models["model"].facts.streamed_bytes) > 0
        outs.append([forward(engine, model, golden.inputs) for model in ("model", "base", "model")])
    assert outs[0] == outs[1]
    assert outs[0][0] == outs[0][2] != outs[0][1]

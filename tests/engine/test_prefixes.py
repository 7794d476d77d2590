"""The prefix that forwards of a run share: it changes no bit, and is kept no longer and no larger than it may be.

test_qwen_image_21.py and its goldens hold the prefix itself to other implementations.
"""

from __future__ import annotations

import copy
import gc
import itertools
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from conformance import FAMILIES, each_latent, required_inputs, sent, tiny, with_optional
from helpers import Tiny
from rank_worker import LAYOUTS, WORLD, Ranks
from torch import Tensor

from tacod.checkpoint import read_checkpoint
from tacod.group.work import Command, Envelope, Evict, Forward, Sample, SampleStep, Stepped, Unload
from tacod.plan import Layout, Plan, Shape, parse_request
from tacod.rank.engine import Engine
from tacod.rank.families.inputs import Inputs
from tacod.rank.forward import captured as captured_forwards
from tacod.rank.forward import graphs
from tacod.rank.forward.graphs import Forwards, Graph
from tacod.rank.forward.prefixes import Prefix, Prefixes
from tacod.rank.forward.run import Call, equal, plan_for, run
from tacod.rank.parallel.sequence import SequenceParallel
from tacod.rank.parallel.topology import Topology
from tacod_client import wire
from tacod_client.errors import OutOfMemory
from tacod_client.tensors import from_wire, to_wire

QWEN = "qwen_image_21"
WITH_PREFIX = sorted(family for family in FAMILIES if tiny(family).has_prefix)
FAMILY = pytest.mark.parametrize("family", WITH_PREFIX)


def test_families_with_a_prefix() -> None:
    assert QWEN in WITH_PREFIX
    assert not tiny("sd3").has_prefix


def inputs_of(family: str, seed: int = 0, batch: int = 2) -> Inputs:
    dit = tiny(family)
    return dit.prepare(with_optional(dit, required_inputs(dit, batch, seed=seed), seed=seed))


# --- what it gives ----------------------------------------------------------------------------------------------------


@FAMILY
def test_it_depends_on_neither_time_nor_latents(family: str) -> None:
    dit, inputs = tiny(family), inputs_of(family)
    other = each_latent(inputs, lambda x: x + 1).replace(timestep=inputs["timestep"] / 2)
    with torch.inference_mode():
        one, two = (dit.compute_prefix(SequenceParallel(), each) for each in (inputs, other))
        assert all(map(torch.equal, one, two))
        assert equal(dit.run(SequenceParallel(), other, prefix=one), dit.run(SequenceParallel(), other))
        spoilt = [each + 1 if each.is_floating_point() else each for each in one]
        assert not equal(dit.run(SequenceParallel(), other, prefix=spoilt), dit.run(SequenceParallel(), other))


@pytest.mark.parametrize(
    ("layout", "sharing"),
    # Each layout by collectives or in shared memory, and three ranks by both.
    [*zip(LAYOUTS, itertools.cycle(("collectives", "shared memory")), strict=False), ((1, 3, 1), "collectives")],
    ids=str,
)
@FAMILY
def test_no_bit_changes_in_any_layout(ranks: Ranks, family: str, layout: tuple[int, ...], sharing: str) -> None:
    """Also where ranks have other numbers of heads and tokens, or none."""
    case: dict[str, Any] = {
        "batch": layout[0] + 1,
        "text": 5,
        "sides": (3, 4),
        "optional": ["ref_latents", "image_slots"],
    }
    case["sharing"] = sharing == "shared memory"
    told = ranks.run(layout, "prefixes", family=family, seed=1, prompts="aba", room=9, shared=False, **case)
    assert len(told) == WORLD
    for exact, found, _ in told:
        assert exact
        assert found == [False, False, True]
    busy, idle = told[: layout[0] * layout[1] * layout[2]], told[layout[0] * layout[1] * layout[2] :]
    assert sum(kept for *_, kept in busy) > 0
    assert all(kept == 0 for *_, kept in idle)


def test_ranks_share_the_memory(ranks: Ranks) -> None:
    case: dict[str, Any] = {"batch": 2, "text": 6, "sides": (3, 4), "optional": [], "shared": False}

    def kept(*layout: int) -> list[int]:
        told = ranks.run(layout, "prefixes", family=QWEN, seed=1, sharing=False, prompts="a", room=1, **case)
        return [each for *_, each in told]

    dit = tiny(QWEN)
    whole = 2 * 4 * dit.width * 2 * 6 * len(dit.trunk)  # keys and values, fp32, two images, six tokens, each block
    assert kept(1, 1, 1) == [whole, 0, 0, 0, 0]
    for layout in ((1, 3, 1), (1, 1, 3), (2, 1, 1)):
        count = layout[0] * layout[1] * layout[2]
        assert kept(*layout) == [whole // count] * count + [0] * (WORLD - count)
    assert sum(kept(1, 5, 1)) == sum(kept(1, 2, 2)) == sum(kept(2, 2, 1)) == whole


@pytest.mark.parametrize("layout", [(1, 1, 1), (1, 5, 1), (1, 2, 1), (1, 2, 2)], ids=str)
def test_all_ranks_forget_the_same(ranks: Ranks, layout: tuple[int, ...]) -> None:
    """Though not all hold as much; else one would wait for another that has its prefix."""
    case: dict[str, Any] = {"batch": 1, "text": 5, "sides": (3, 4), "optional": [], "shared": False}
    for room, expected in ((2.5, [0, 0, 1, 0, 0, 0]), (3.5, [0, 0, 1, 0, 1, 1]), (0.5, [0] * 6)):
        told = ranks.run(layout, "prefixes", family=QWEN, seed=1, sharing=False, prompts="abacba", room=room, **case)
        for exact, found, kept in told:
            assert exact
            assert found == list(map(bool, expected))
            assert room > 1 or kept == 0


# --- what is kept -----------------------------------------------------------------------------------------------------


def prefix_of(nbytes: int) -> Prefix:
    return Prefix([torch.zeros(nbytes, dtype=torch.uint8)], nbytes)


def test_the_least_recently_used_make_room() -> None:
    kept, dit = Prefixes(100), tiny(QWEN)
    for key in "abc":
        kept.keep(dit, key, prefix_of(30))
    assert kept.find(dit, "a") is not None
    kept.keep(dit, "d", prefix_of(30))
    assert [kept.find(dit, key) is not None for key in "abcd"] == [True, False, True, True]
    assert (kept.hits, kept.misses, kept.nbytes, len(kept)) == (4, 1, 90, 3)
    kept.keep(dit, "e", prefix_of(101))
    assert (kept.find(dit, "e"), len(kept)) == (None, 3), "one that is larger than all room moves nobody"
    kept.keep(dit, "f", prefix_of(100))
    assert len(kept) == 1


def test_models_have_their_own_and_are_not_held() -> None:
    kept, dit = Prefixes(100), tiny(QWEN)
    other = copy.deepcopy(dit)
    kept.keep(dit, "a", prefix_of(30))
    assert kept.find(other, "a") is None
    kept.keep(other, "a", prefix_of(20))
    kept.drop(dit)
    assert (kept.nbytes, kept.find(dit, "a")) == (20, None)
    seen = []

    class Seen(dict[str, Any]):
        def __del__(self) -> None:
            seen.append(True)

    other.seen = Seen()  # type: ignore[assignment]
    del other
    gc.collect()
    assert seen == [True], "no weights stay for a prefix"
    kept.clear()
    assert len(kept) == 0


# --- graphs -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def replaying(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs on a CPU: one that is replayed computes again from the tensors that it was captured with."""

    class Captured:
        def __init__(self) -> None:
            self.again: Callable[[], None] = lambda: None

        def replay(self) -> None:
            self.again()

    class Capture:
        def __init__(self, graph: Captured, **_: Any) -> None:
            capturing.append(graph)

        def __enter__(self) -> None: ...

        def __exit__(self, *_: Any) -> None:
            capturing.clear()

    capturing: list[Captured] = []

    def recorded(call: Call, topology: Topology, *rest: Any) -> Any:
        out = run(call, topology, *rest)
        if capturing:
            assert isinstance(out, Tensor)
            capturing[0].again = lambda: out.copy_(run(call, topology))  # type: ignore[assignment, func-returns-value]
        return out

    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: self.ndim == 4))
    monkeypatch.setattr(captured_forwards, "run", recorded)
    monkeypatch.setattr(captured_forwards, "_undone_if_it_breaks_off", nullcontext)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Captured)
    monkeypatch.setattr(torch.cuda, "graph", Capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: None)


def walk(forwards: Forwards, steps: str, text: Mapping[str, int] | None = None) -> list[Tensor]:
    """One forward for each letter, which is a conditioning; those of one ``text`` length have one kind of graph."""
    dit, outs = tiny(QWEN), []
    for number, letter in enumerate(steps):
        given = required_inputs(dit, 1, (text or {}).get(letter, 5), (3, 4), seed=ord(letter))
        given = given.replace(x=given["x"] + number)
        plan = Plan(Layout(1, 1, 1), 1, Shape(dit.heads, dit.width))
        out = forwards(Call(dit, plan, given, conditioning=letter))
        assert isinstance(out, Tensor)
        outs.append(out)
    return outs


def captured(forwards: Forwards) -> list[Graph]:
    return list(forwards._captured())


@pytest.mark.usefixtures("replaying")
def test_a_graph_serves_all_prompts_of_a_length() -> None:
    """It has a copy of the last prefix; another one is copied over it, and none is lost."""
    forwards, steps = Forwards(Topology()), "aaabbaccab"
    with torch.inference_mode():
        outs, expected = walk(forwards, steps), walk(Forwards(Topology(), graphs=False, prefix_bytes=0), steps)
    assert all(map(torch.equal, outs, expected))
    assert len(captured(forwards)) == 1
    assert (forwards.prefixes.hits, forwards.prefixes.misses) == (7, 3)
    assert forwards.prefix_bytes == 4 * captured(forwards)[0].most_bytes


@pytest.mark.usefixtures("replaying")
def test_what_a_graph_copies_is_bounded_too() -> None:
    """The graphs that were used the longest ago make room, and a prefix without room has none."""
    lengths = {"a": 5, "b": 6, "c": 4}
    with torch.inference_mode():
        one = walk(forwards := Forwards(Topology()), "aaa") and captured(forwards)[0].most_bytes
        forwards = Forwards(Topology(), prefix_bytes=2 * one)
        walk(forwards, "aaabbb", lengths)
        assert [graph.most_bytes for graph in captured(forwards)] == [one * 6 // 5], "5 + 6 tokens are more than 10"
        walk(forwards, "ccc", lengths)
        assert sorted(graph.most_bytes for graph in captured(forwards)) == [one * 4 // 5, one * 6 // 5]
        forwards = Forwards(Topology(), prefix_bytes=one - 1)
        walk(forwards, "aaa")
        assert captured(forwards) == []
        assert forwards.prefix_bytes == 0


def test_graphs_are_kept_apart_from_a_forward_that_breaks_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks may differ after it, so nothing is left of earlier forwards."""
    forwards = Forwards(Topology())
    with torch.inference_mode():
        walk(forwards, "a")
        with monkeypatch.context() as patch:
            patch.setattr(graphs, "compute_prefix", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                walk(forwards, "b")
    assert len(forwards.prefixes) == 0


# --- through the engine -----------------------------------------------------------------------------------------------


MODEL = Tiny("qwen", {**tiny(QWEN).tiny, "in_channels": 64, "out_channels": 64})
GENERATOR = torch.Generator().manual_seed(0)
CONTEXT, OTHER = (torch.randn(1, 7, 32, generator=GENERATOR) for _ in range(2))
REFERENCE = torch.randn(1, 64, 3, 4, generator=GENERATOR)


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    """With a model, and the same one patched where only the text goes through."""
    engine = Engine(torch.device("cpu"), Topology())
    path = str(MODEL.save(tmp_path))
    identity = read_checkpoint(path).identity
    change = to_wire(torch.full((48, 32), 0.1), "diff")
    patches = [{"key": "txt_in.in_layer.weight", "kind": "diff", "diff": change}]
    engine.load("patched", path, identity, "fp32", patches, "m", [])
    return engine


def work(engine: Engine, command: Command) -> Stepped:
    result = engine.work(Envelope(1, command)).result
    assert isinstance(result, Stepped)
    return result


class Asked:
    """Asks for forwards of an engine, and holds each to one that keeps nothing."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.level = 1.0

    def __call__(self, model: str = "m", session: bytes = b"a", plan: Any = "auto", side: int = 6, **given: Any) -> int:
        """How many forwards found their prefix."""
        self.level *= 0.9
        tensors = {"x": torch.ones(1, 64, side, 5), "timestep": torch.tensor([self.level]), "context": CONTEXT, **given}
        packed = {name: sent({name: value})[name] for name, value in tensors.items()}
        told = work(self.engine, Forward(model, plan, packed, session))
        assert told.prefix_hits + told.prefix_misses == 1
        dit = self.engine.models[model].model
        with torch.inference_mode():
            chosen = plan_for(dit, parse_request(plan, 1), 1, tensors)
            out = run(Call(dit, chosen, Inputs(tensors, dit.arguments())), Topology())
        assert isinstance(out, Tensor)
        assert isinstance(told.out, wire.Tensor)
        assert torch.equal(from_wire(told.out, "torch"), out)
        return told.prefix_hits


@pytest.fixture
def asked(engine: Engine) -> Asked:
    return Asked(engine)


def test_a_conditioning_is_known_by_its_contents(asked: Asked) -> None:
    assert [asked() for _ in range(3)] == [0, 1, 1]
    assert asked(session=b"b") == 1, "whoever asks"
    assert asked(context=CONTEXT.clone()) == 1
    assert asked(context=OTHER) == 0
    assert asked(ref_latents=[REFERENCE]) == 0
    assert asked(ref_latents=[REFERENCE], image_slots=[2]) == 0
    assert asked(ref_latents=[REFERENCE], image_slots=[3]) == 0
    assert asked(side=7) == 0, "a reference lies around the middle of the latent"
    assert asked(plan={"flash_attention": False}) == 0
    assert asked(model="patched") == 0
    assert asked(plan={"step_cache": 1e-9}) == 1
    assert asked(ref_latents=[REFERENCE], image_slots=[3]) == 1


def test_what_is_kept_goes_with_its_model(asked: Asked, engine: Engine) -> None:
    assert [asked(), asked(model="patched"), asked(ref_latents=[REFERENCE])] == [0, 0, 0]
    done = engine.work(Envelope(1, Evict(["patched"])))
    kept = engine.forwards.prefixes.nbytes
    assert done.prefix_bytes == kept == 2 * 4 * 48 * 2 * (7 + 7 + 12)
    assert asked() == 1
    assert engine.work(Envelope(1, Unload("m"))).prefix_bytes == 0
    assert len(engine.forwards.prefixes) == 0


def test_a_lack_of_memory_takes_what_is_kept(asked: Asked, engine: Engine) -> None:
    asked()
    with pytest.raises(OutOfMemory), engine.memory_errors():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has 1 GiB. Of")
    assert asked() == 0


@pytest.mark.parametrize(("negative", "forwards"), [(OTHER, 1), (OTHER[:, :5], 2)], ids=["a batch", "one by one"])
def test_a_run_computes_it_once(engine: Engine, tmp_path: Path, negative: Tensor, forwards: int) -> None:
    """And so does another run of the same conditions; a new one of the model, once it has made room, begins anew."""
    noise = torch.randn(1, 64, 4, 4, generator=torch.Generator().manual_seed(0))
    tensors = {"noise": noise, "latent": torch.zeros_like(noise), "sigmas": torch.linspace(1, 0, 5)}
    inputs = Sample(
        model="m",
        plan="auto",
        sampler="euler",
        seed=0,
        cfg=4.0,
        **{name: to_wire(value, name) for name, value in tensors.items()},
        positive={"context": to_wire(CONTEXT, "c")},
        negative={"context": to_wire(negative, "c")},
    )

    def steps(job: str, evict_at: int | None = None) -> tuple[list[tuple[int, int]], Any]:
        told = []
        for step in range(4):
            if step == evict_at:
                engine.work(Envelope(1, Evict(["m"])))
                engine.load("m", *again, "fp32", None, None, [])
            done = work(engine, SampleStep(job, step, inputs if step == 0 else None))
            told.append((done.prefix_hits, done.prefix_misses))
        return told, from_wire(done.out, "torch")

    path = str(tmp_path / MODEL.file)
    again = path, read_checkpoint(path).identity
    found, out = steps("one")
    assert found == [(0, forwards), *[(forwards, 0)] * 3]
    found, other = steps("two")
    assert found == [(forwards, 0)] * 4
    assert torch.equal(out, other)
    found, other = steps("three", evict_at=2)
    assert found == [(forwards, 0), (forwards, 0), (0, forwards), (forwards, 0)]
    assert torch.equal(out, other)

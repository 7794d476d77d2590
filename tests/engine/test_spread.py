"""Every layout over gloo: any number of ranks, heads, tokens and images equals one process.

Run as a script, this file is one rank: it reads cases as JSON lines and answers each with what it measured.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from attention_cases import largest_error
from helpers import FLUX, SD3, read_golden
from hypothesis import given, settings
from hypothesis import strategies as st
from shared_block import SharedBlock, reach_shared
from torch.nn.functional import scaled_dot_product_attention

from tacod.plan import DEFAULT_POLICY, AttentionPolicy, Layout, Plan, Shape, chunks
from tacod.rank.families.inputs import Inputs
from tacod.rank.forward.graphs import Forwards
from tacod.rank.forward.run import Call, run
from tacod.rank.forward.warmup import warm_up
from tacod.rank.ops.qkv import QKV, deal_heads
from tacod.rank.ops.sdpa import attend
from tacod.rank.parallel.sequence import SequenceParallel
from tacod.rank.parallel.topology import Topology

WORLD = 5
LAYOUTS = [
    (batch, ulysses, ring)
    for batch in range(1, WORLD + 1)
    for ulysses in range(1, WORLD // batch + 1)
    for ring in range(1, WORLD // batch // ulysses + 1)
]
SEQUENCES = [layout for layout in LAYOUTS if layout[0] == 1 and layout != (1, 1, 1)]
GOLDENS = [
    "flux_dev",
    "flux_dev_odd",
    "flux_schnell",
    "flux_kontext",
    "sd35_large",
    "sd35_medium",
    "pixart_alpha",
    "pixart_sigma",
]
FAMILIES = {"flux": FLUX.config, "sd3": SD3.config}


class Ranks:
    """The processes of one gloo world; every case runs on all of them, in a layout."""

    def __init__(self, folder: Path) -> None:
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        self.processes = [
            subprocess.Popen(
                [sys.executable, __file__, str(rank), f"file://{folder / 'rendezvous'}"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
                text=True,
            )
            for rank in range(WORLD)
        ]

    def run(self, layout: tuple[int, ...], verb: str, **case: Any) -> list[Any]:
        """What each rank measured; of those that the layout leaves idle, what they have to say."""
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(json.dumps({"layout": layout, "verb": verb, **case}) + "\n")
            process.stdin.flush()
        answers = [process.stdout.readline() for process in self.processes if process.stdout is not None]
        assert all(answers), "a rank died; its traceback is on stderr"
        return [answer for answer in map(json.loads, answers) if answer is not None]

    def close(self) -> None:
        """End the processes by closing their input."""
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in self.processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            assert process.stdout is not None
            process.stdout.close()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    started = Ranks(tmp_path_factory.mktemp("gloo"))
    yield started
    started.close()


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", GOLDENS)
def test_equals_comfyui_in_every_layout(ranks: Ranks, name: str, layout: tuple[int, ...]) -> None:
    images = len(read_golden(name).inputs["x"])
    if layout[0] > images:
        layout = (images, *layout[1:])
    errors = ranks.run(layout, "golden", name=name)
    assert len(errors) == WORLD, "an idle rank gets the output too"
    assert max(errors) <= 2e-6


@pytest.mark.parametrize("layout", [(1, 2, 1), (1, 3, 1), (1, 5, 1), (1, 2, 2), (2, 2, 1)], ids=str)
@pytest.mark.parametrize("name", ["flux_dev_odd", "sd35_medium", "flux_kontext", "pixart_sigma"])
def test_ranks_that_write_into_each_others_memory(ranks: Ranks, name: str, layout: tuple[int, ...]) -> None:
    if layout[0] > len(read_golden(name).inputs["x"]):
        layout = (1, *layout[1:])
    assert max(ranks.run(layout, "golden", name=name, sharing=True)) <= 2e-6


@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_ranks_come_to_the_same_pace(ranks: Ranks, family: str) -> None:
    paces = ranks.run((1, 1, 1), "warm_up", family=family)
    assert len(paces) == WORLD
    assert all(pace == paces[0] for pace in paces)
    assert all(number > 0 for number in paces[0])


def test_a_forward_that_has_no_room_on_one_rank_is_warmed_up_on_all(ranks: Ranks) -> None:
    """And no rank waits for the one that lacks it."""
    assert ranks.run((1, WORLD, 1), "warm_up", family="flux", fits=False) == [[]] * WORLD


@pytest.mark.parametrize("layout", [(1, 3, 1), (1, 2, 2)], ids=str)
@pytest.mark.parametrize("name", ["flux_dev_odd", "sd35_medium"])
def test_what_is_exchanged_in_8_bits_loses_little(ranks: Ranks, name: str, layout: tuple[int, ...]) -> None:
    errors = ranks.run(layout, "golden", name=name, exchange="int8")
    assert 2e-6 < max(errors) <= 1e-2


@pytest.mark.parametrize("layout", [(1, 3, 1), (1, 1, 3), (1, 2, 2), (2, 2, 1)], ids=str)
@pytest.mark.parametrize("name", ["flux_dev_odd", "sd35_medium"])
def test_bf16_loses_nothing_to_the_exchange(ranks: Ranks, name: str, layout: tuple[int, ...]) -> None:
    alone = read_golden(name).error(SequenceParallel(), torch.bfloat16)
    assert max(ranks.run(layout, "golden", name=name, dtype="bfloat16")) <= 1.1 * alone


@settings(max_examples=80, deadline=None)
@given(
    layout=st.sampled_from(SEQUENCES),
    heads=st.integers(1, 9),
    batch=st.integers(1, 3),
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=3).filter(sum),
    seed=st.integers(0, 99),
)
def test_attention_equals_one_process(ranks: Ranks, layout: tuple[int, ...], **case: Any) -> None:
    assert max(ranks.run(layout, "attention", **case)) <= 2e-6


@pytest.mark.parametrize(("overlap", "expected"), [(False, [1, 2]), (True, [3, 3])])
def test_what_more_is_computed_beside_is_sent(ranks: Ranks, overlap: bool, expected: list[int]) -> None:
    """And the last result stored, unless something else follows; each rank has 10 of 20 tokens, in three results."""
    case = {"heads": 4, "batch": 1, "lengths": [20], "cuts": [5, 15], "seed": 0}
    assert ranks.run((1, 2, 1), "sent", overlap=overlap, **case) == expected


@settings(max_examples=60, deadline=None)
@given(
    layout=st.sampled_from([layout for layout in SEQUENCES if layout[1] > 1]),
    heads=st.integers(1, 9),
    batch=st.integers(1, 2),
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=2).filter(sum),
    cuts=st.lists(st.integers(1, 79), max_size=3),
    sharing=st.booleans(),
    overlap=st.booleans(),
    seed=st.integers(0, 99),
)
def test_results_that_come_one_after_the_other_find_their_ranks(
    ranks: Ranks, layout: tuple[int, ...], **case: Any
) -> None:
    """As from `attend_pieces`, and of any runs of tokens: stored into the ranks' memory, or exchanged."""
    assert max(ranks.run(layout, "attention", **case)) <= 2e-6


@settings(max_examples=150, deadline=None)
@given(
    layout=st.sampled_from([(1, 1, 1), *SEQUENCES]),
    groups=st.tuples(st.integers(1, 6), st.integers(1, 4)),
    batch=st.integers(1, 3),
    lengths=st.lists(st.integers(0, 20), min_size=1, max_size=3).filter(sum),
    norm=st.sampled_from(["", "head", "row"]),
    turn=st.sampled_from(["", "pairs", "halves"]),
    rotary=st.sampled_from([6, 16]),
    by_image=st.booleans(),
    separate=st.booleans(),
    keys=st.sampled_from(["all", "some", "shared"]),
    sharing=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_heads_norms_rotations_and_key_masks(
    ranks: Ranks, layout: tuple[int, ...], groups: tuple[int, int], **case: Any
) -> None:
    """Also more ranks than key heads, whose groups then are split, and key masks that hide all of a rank's tokens."""
    kv_heads, group = groups
    assert max(ranks.run(layout, "variant", heads=kv_heads * group, kv_heads=kv_heads, **case)) <= 2e-6


@pytest.mark.parametrize("layout", SEQUENCES, ids=str)
@pytest.mark.parametrize(("heads", "lengths"), [(3, [2]), (1, [1, 1]), (2, [0, 3]), (24, [512, 99])])
def test_ranks_without_tokens_or_heads_take_part(
    ranks: Ranks, layout: tuple[int, ...], heads: int, lengths: list[int]
) -> None:
    assert max(ranks.run(layout, "attention", heads=heads, batch=2, lengths=lengths, seed=1)) <= 2e-6


@settings(max_examples=40, deadline=None)
@given(
    layout=st.sampled_from(LAYOUTS),
    family=st.sampled_from(sorted(FAMILIES)),
    more=st.integers(0, 2),
    text=st.integers(1, 9),
    height=st.integers(1, 13),
    width=st.integers(1, 13),
    references=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), max_size=2),
    residuals=st.integers(0, 60),
    masked=st.booleans(),
    seed=st.integers(0, 99),
)
def test_a_forward_equals_one_process(ranks: Ranks, layout: tuple[int, ...], more: int, **case: Any) -> None:
    errors = ranks.run(layout, "forward", batch=layout[0] + more, **case)
    assert len(errors) == WORLD
    assert max(errors) <= 2e-6


@pytest.mark.parametrize("layout", [(1, 2, 1), (1, 3, 1), (1, 1, 3), (1, 5, 1), (2, 1, 1), (2, 2, 1)], ids=str)
@pytest.mark.parametrize(("family", "threshold"), [("flux", 0.45), ("sd3", 0.56)])
def test_all_ranks_skip_the_same_steps(ranks: Ranks, family: str, threshold: float, layout: tuple[int, ...]) -> None:
    """Each group of the batch as one process does with its images; what is left idle gets the result too."""
    told = ranks.run(layout, "steps", family=family, threshold=threshold)
    assert len(told) == WORLD
    assert max(error for _, error, _ in told) <= 2e-6
    skipped, _, alone = told[0]
    # A group that skips waits for those that don't: what all skip is counted.
    assert skipped == [all(each) for each in zip(*alone, strict=True)]
    assert {True, False} == {each for group in alone for each in group}
    assert all(each[0] == skipped for each in told[: layout[0] * layout[1] * layout[2]])


@pytest.mark.parametrize("layout", [(1, 2, 1), (1, 1, 3), (1, 2, 2), (1, 5, 1)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int64"])
@pytest.mark.parametrize(("shape", "dim"), [((2, 7, 5), 1), ((1, 2, 3), 1), ((9, 4), 0), ((2, 3, 11), -1)])
def test_gather_undoes_shard(
    ranks: Ranks, layout: tuple[int, ...], dtype: str, shape: tuple[int, ...], dim: int
) -> None:
    answers = ranks.run(layout, "gather", dtype=dtype, shape=shape, dim=dim)
    assert answers == [True] * (layout[1] * layout[2])


@pytest.mark.parametrize("layout", [(1, 3, 1), (1, 1, 3)], ids=str)
def test_time_in_collectives_is_told_once(ranks: Ranks, layout: tuple[int, ...]) -> None:
    for taken, wall, again in ranks.run(layout, "timing"):
        assert 0 < taken < wall
        assert again == 0


@given(kv_heads=st.integers(1, 12), group=st.integers(1, 6), ranks=st.integers(1, 16))
def test_each_query_head_has_one_rank_and_its_key_head_there(kv_heads: int, group: int, ranks: int) -> None:
    shares = deal_heads(kv_heads * group, kv_heads, ranks)
    assert [head for share in shares for head in share.queries] == list(range(kv_heads * group))
    for share in shares:
        assert set(share.keys) == {head // group for head in share.queries}, "those that it needs, and no other"
    if kv_heads >= ranks:
        assert sum(len(share.keys) for share in shares) == kv_heads, "whole groups: no key head is sent twice"


@given(n=st.integers(0, 10_000), size=st.integers(1, 64))
def test_chunks_differ_by_one_at_most(n: int, size: int) -> None:
    sizes = chunks(n, size)
    assert sum(sizes) == n
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) - min(sizes) <= 1


def test_one_process_needs_no_group() -> None:
    alone = SequenceParallel()
    assert (alone.size, alone.sizes(7)) == (1, [7])
    q, k, v = torch.randn(3, 2, 7, 3, 8)
    expected = scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    assert torch.equal(alone.attend([projected(q, k, v)], (3, 4)).wait(), expected.transpose(1, 2).reshape(2, 7, 24))
    assert torch.equal(alone.gather(alone.shard(q), 7), q)


def projected(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Callable[[], QKV]:
    """As a fused projection would give them."""
    return lambda: QKV(torch.stack((q, k, v), dim=2).flatten(2), q.shape[2])


class Rank:
    """One rank's side of the cases; each verb returns what the test looks at."""

    def __init__(self, rank: int, rendezvous: str) -> None:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", rendezvous, rank=rank, world_size=WORLD, timeout=timedelta(seconds=60))

        def make_group(parts: list[list[int]]) -> dist.ProcessGroup:
            groups = [dist.new_group(part) for part in parts]
            return next(group for group, part in zip(groups, parts, strict=True) if rank in part)

        self.topology = Topology(rank, WORLD, make_group)
        self.sharing = Topology(rank, WORLD, make_group, reach_shared)

    def golden(
        self, layout: Layout, name: str, dtype: str = "float32", sharing: bool = False, exchange: Any = "exact"
    ) -> float:
        from helpers import read_golden, relative_error

        golden = read_golden(name)
        assert golden is not None
        kind = getattr(torch, dtype)
        return relative_error(
            self._run(layout, golden.model(kind), golden.arguments(kind), sharing, exchange), golden.out
        )

    def _run(
        self, layout: Layout, model: Any, inputs: dict[str, Any], sharing: bool = False, exchange: Any = "exact"
    ) -> Any:
        plan = Plan(layout, WORLD, Shape(model.heads, model.width), AttentionPolicy(exchange=exchange))
        topology = self.sharing if sharing else self.topology
        with torch.inference_mode():
            return run(Call(model, plan, Inputs(inputs, model.arguments())), topology)

    def warm_up(self, layout: Layout, family: str, fits: bool = True) -> list[float]:
        tiny = {"flux": FLUX, "sd3": SD3}[family]
        lack = mock.patch("tacod.rank.forward.warmup.run", side_effect=torch.OutOfMemoryError("CUDA out of memory"))
        with nullcontext() if fits else lack:
            pace = warm_up(tiny.model, Forwards(self.topology), torch.device("cpu"))
        return [] if pace is None else [pace.flops, pace.bytes, pace.collective_s]

    def _sequence(
        self, layout: Layout, sharing: bool = False, policy: AttentionPolicy = DEFAULT_POLICY
    ) -> SequenceParallel | None:
        seat = (self.sharing if sharing else self.topology).seat(layout)
        return None if seat is None else seat.sequence(policy)

    def attention(
        self,
        layout: Layout,
        heads: int,
        batch: int,
        lengths: list[int],
        seed: int,
        cuts: Sequence[int] = (),
        sharing: bool = False,
        overlap: bool = False,
    ) -> float | None:
        sequence = self._sequence(layout, sharing, AttentionPolicy(split_kv=bool(cuts)))
        if sequence is None:
            return None

        def in_runs(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any) -> Iterator[torch.Tensor]:
            edges = sorted({0, q.shape[2], *(cut for cut in cuts if cut < q.shape[2])})
            for begin, end in itertools.pairwise(edges) if len(edges) > 1 else [(0, 0)]:
                yield attend(q[:, :, begin:end], k, v)

        torch.manual_seed(seed)
        q, k, v = torch.randn(3, batch, sum(lengths), heads, 16)
        expected = torch.split(SequenceParallel().attend([projected(q, k, v)], lengths).wait(), lengths, dim=1)
        local = [torch.cat([sequence.shard(part) for part in torch.split(t, lengths, dim=1)], dim=1) for t in (q, k, v)]
        with mock.patch("tacod.rank.parallel.joint_attention.attend_pieces", in_runs):
            attending = sequence.attend([projected(*local)], lengths, overlap=overlap)
            if overlap:
                attending.start()
            mine = attending.wait().clone()
        outs = torch.split(mine, [sequence.sizes(length)[sequence.whole.rank] for length in lengths], dim=1)
        whole = [sequence.gather(out, length) for out, length in zip(outs, lengths, strict=True)]
        errors = [float((a - b).norm() / b.norm()) for a, b in zip(whole, expected, strict=True) if b.numel()]
        return max(errors) if all(map(math.isfinite, errors)) else math.inf

    def made_up(self, layout: Layout, **case: Any) -> float:
        from made_up import error

        return error(self.topology, layout, **case)

    def variant(self, layout: Layout, sharing: bool, **case: Any) -> float | None:
        sequence = self._sequence(layout, sharing)
        return None if sequence is None else largest_error(sequence, **case)

    def sent(self, layout: Layout, **case: Any) -> int | None:
        """How often a copy engine is asked for."""
        with mock.patch.object(SharedBlock, "send", autospec=True, side_effect=SharedBlock.send) as send:
            error = self.attention(layout, sharing=True, **case)
        assert error is None or error <= 2e-6
        return None if error is None else send.call_count

    def forward(
        self,
        layout: Layout,
        family: str,
        batch: int,
        text: int,
        height: int,
        width: int,
        references: list[list[int]],
        residuals: int,
        masked: bool,
        seed: int,
    ) -> float:
        from tacod.rank.families import detect
        from tacod.rank.families.control import Control
        from tacod_client.tensors import to_wire

        torch.manual_seed(seed)
        kind, config = detect({}, FAMILIES[family])
        model = kind(config).eval()
        inputs: dict[str, Any] = {
            "x": torch.randn(batch, 4, height, width),
            "timestep": torch.rand(batch),
            "context": torch.randn(batch, text, 8),
            "y": torch.randn(batch, 6),
        }
        if family == "flux":
            inputs["guidance"] = torch.full((batch,), 3.5)
            inputs["ref_latents"] = [torch.randn(batch, 4, *size) for size in references]
            inputs["rope_options"] = {"scale_x": 0.5, "shift_y": 3.0, "shift_t": 1.0} if residuals else None
        lengths = model.lengths(inputs)
        if residuals:
            residual = torch.randn(batch if seed % 2 else 1, min(residuals, lengths[1]), model.width)
            each = to_wire(residual, "control")
            inputs["control"] = Control({"input": [None, each], "output": [each, None, each]})
        if masked and family == "flux":
            mask = torch.randn(1 if seed % 3 else batch, sum(lengths), sum(lengths))
            # Of most other ranks' tokens a query sees none, but each sees itself.
            mask.masked_fill_(torch.rand(mask.shape) < (0.9 if seed % 2 else 0.3), -torch.inf)
            mask.diagonal(dim1=1, dim2=2).fill_(0.0)
            inputs["attention_mask"] = mask
        with torch.inference_mode():
            expected = model(SequenceParallel(), **inputs)
        out = self._run(layout, model, inputs)
        return float((out - expected).norm() / expected.norm())

    def steps(self, layout: Layout, family: str, threshold: float) -> tuple[list[bool], float, list[list[bool]]]:
        """Of a walk of some steps: which were skipped, the largest error, and which each group's images skip alone."""
        from tacod.rank.forward.graphs import Forwards

        tiny = {"flux": FLUX, "sd3": SD3}[family]
        inputs = tiny.inputs(batch=2, text=7)
        x = inputs.pop("x")
        levels = tiny.model.timestep(torch.linspace(1, 0.1, 10))
        shape = Shape(tiny.model.heads, tiny.model.width)

        def walk(forwards: Forwards, layout: Layout, mine: slice) -> tuple[list[torch.Tensor], list[bool]]:
            plan = Plan(layout, forwards.topology.world_size, shape, step_cache=threshold)
            outs, skipped = [], []
            generator = torch.Generator().manual_seed(1)
            for n, level in enumerate(levels.tolist()):
                noisy = x + 0.05 * n * torch.randn(x.shape, generator=generator)
                given = {**inputs, "x": noisy, "timestep": torch.full((2,), level)}
                call = Call(tiny.model, plan, Inputs(given, tiny.model.arguments()).images(mine))
                before = forwards.skipped
                outs.append(forwards(call))
                skipped.append(forwards.skipped > before)
            return outs, skipped

        with torch.inference_mode():
            outs, skipped = walk(Forwards(self.topology), layout, slice(0, 2))
            groups = [slice(i, i + 2 // layout.batch) for i in range(layout.batch)]
            alone = [walk(Forwards(Topology()), Layout(1, 1, 1), mine) for mine in groups]
        expected = [torch.cat(parts) for parts in zip(*(each[0] for each in alone), strict=True)]
        error = max(float((a - b).norm() / b.norm()) for a, b in zip(outs, expected, strict=True))
        return skipped, error, [each[1] for each in alone]

    def gather(self, layout: Layout, dtype: str, shape: list[int], dim: int) -> bool | None:
        sequence = self._sequence(layout)
        if sequence is None:
            return None
        tokens = torch.arange(torch.Size(shape).numel()).reshape(shape).to(getattr(torch, dtype))
        return torch.equal(sequence.gather(sequence.shard(tokens, dim), shape[dim], dim), tokens)

    def timing(self, layout: Layout) -> tuple[float, float, float] | None:
        sequence = self._sequence(layout)
        if sequence is None:
            return None
        clock = self.topology.clock
        clock.take_s()
        begin = time.perf_counter()
        tokens = sequence.shard(torch.zeros(1, 10, 4, 8))
        sequence.attend([projected(tokens, tokens, tokens)], [10]).wait()
        wall = time.perf_counter() - begin
        return clock.take_s(), wall, clock.take_s()


def main(number: str, rendezvous: str) -> None:
    # gloo reports its connections on stdout, which is for answers here.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    rank = Rank(int(number), rendezvous)
    for line in sys.stdin:
        case = json.loads(line)
        layout, verb = Layout(*case.pop("layout")), case.pop("verb")
        print(json.dumps(getattr(rank, verb)(layout, **case)), file=answers, flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])

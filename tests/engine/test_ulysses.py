"""Ulysses over gloo: any number of ranks, heads, tokens and images equals one process.

Run as a script, this file is one rank: it reads cases as JSON lines and answers each with what it measured.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from tacod.rank.ulysses import Ulysses

SIZES = (2, 3, 4)
WORLD = max(SIZES)
GOLDENS = ["flux_dev", "flux_dev_odd", "flux_schnell", "flux_kontext", "sd35_large", "sd35_medium"]
FAMILIES: dict[str, dict[str, Any]] = {
    "flux": {
        "image_model": "flux",
        "in_channels": 4,
        "out_channels": 4,
        "vec_in_dim": 6,
        "context_in_dim": 8,
        "hidden_size": 80,
        "num_heads": 5,
        "depth": 2,
        "depth_single_blocks": 2,
        "axes_dim": [4, 6, 6],
        "guidance_embed": True,
    },
    "sd3": {
        "image_model": "sd3",
        "in_channels": 4,
        "depth": 3,
        "adm_in_channels": 6,
        "context_embedder_config": {"params": {"in_features": 8, "out_features": 192}},
        "pos_embed_max_size": 12,
        "qk_norm": "rms",
        "x_block_self_attn_layers": [0, 2],
    },
}


class Ranks:
    """The processes of one gloo world; a case runs on the first ``size`` of them."""

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

    def run(self, size: int, verb: str, **case: Any) -> list[Any]:
        """What each of the first ``size`` ranks measured."""
        members = self.processes[:size]
        for process in members:
            assert process.stdin is not None
            process.stdin.write(json.dumps({"size": size, "verb": verb, **case}) + "\n")
            process.stdin.flush()
        answers = [process.stdout.readline() for process in members if process.stdout is not None]
        assert all(answers), "a rank died; its traceback is on stderr"
        return [json.loads(answer) for answer in answers]

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


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", GOLDENS)
def test_equals_comfyui_at_any_rank_count(
    ranks: Ranks, load_golden: Callable[[str], Any], name: str, size: int
) -> None:
    load_golden(name)
    for error in ranks.run(size, "golden", name=name):
        assert error <= 2e-6


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["flux_dev_odd", "sd35_medium"])
def test_bf16_loses_nothing_to_the_exchange(
    ranks: Ranks, load_golden: Callable[[str], Any], name: str, size: int
) -> None:
    load_golden(name)
    for error in ranks.run(size, "golden", name=name, dtype="bfloat16"):
        assert error <= 1e-2


@settings(max_examples=80, deadline=None)
@given(
    size=st.sampled_from(SIZES),
    heads=st.integers(1, 9),
    batch=st.integers(1, 3),
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=3).filter(any),
    seed=st.integers(0, 99),
)
def test_attention_equals_one_process(
    ranks: Ranks, size: int, heads: int, batch: int, lengths: list[int], seed: int
) -> None:
    for error in ranks.run(size, "attention", heads=heads, batch=batch, lengths=lengths, seed=seed):
        assert error <= 2e-6


@pytest.mark.parametrize(("heads", "lengths"), [(3, [2]), (1, [1, 1]), (2, [0, 3]), (24, [512, 99])])
def test_ranks_without_tokens_or_heads_take_part(ranks: Ranks, heads: int, lengths: list[int]) -> None:
    for error in ranks.run(WORLD, "attention", heads=heads, batch=2, lengths=lengths, seed=1):
        assert error <= 2e-6


@settings(max_examples=25, deadline=None)
@given(
    size=st.sampled_from(SIZES),
    family=st.sampled_from(sorted(FAMILIES)),
    batch=st.integers(1, 2),
    text=st.integers(1, 9),
    height=st.integers(1, 13),
    width=st.integers(1, 13),
    references=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), max_size=2),
    seed=st.integers(0, 99),
)
def test_a_forward_equals_one_process(ranks: Ranks, size: int, **case: Any) -> None:
    for error in ranks.run(size, "forward", **case):
        assert error <= 2e-6


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int64"])
@pytest.mark.parametrize(("shape", "dim"), [((2, 7, 5), 1), ((1, 2, 3), 1), ((9, 4), 0), ((2, 3, 11), -1)])
def test_gather_undoes_shard(ranks: Ranks, size: int, dtype: str, shape: tuple[int, ...], dim: int) -> None:
    assert ranks.run(size, "gather", dtype=dtype, shape=shape, dim=dim) == [True] * size


@pytest.mark.parametrize("size", SIZES)
def test_time_in_collectives_is_told_once(ranks: Ranks, size: int) -> None:
    for taken, wall, again in ranks.run(size, "timing"):
        assert 0 < taken < wall
        assert again == 0


@given(n=st.integers(0, 10_000), size=st.integers(1, 64))
def test_chunks_differ_by_one_at_most(n: int, size: int) -> None:
    ulysses = Ulysses()
    ulysses.size = size
    sizes = ulysses.sizes(n)
    assert sum(sizes) == n
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) - min(sizes) <= 1


def test_one_process_needs_no_group() -> None:
    alone = Ulysses()
    assert (alone.rank, alone.size, alone.sizes(7)) == (0, 1, [7])
    q, k, v = torch.randn(3, 2, 7, 3, 8)
    expected = scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    assert torch.equal(alone.attention(q, k, v, (3, 4)), expected.transpose(1, 2).reshape(2, 7, 24))
    assert torch.equal(alone.gather(alone.shard(q), 7), q)
    assert alone.take_collective_s() == 0


class Rank:
    """One rank's side of the cases; each verb returns what the test looks at."""

    def __init__(self, rank: int, rendezvous: str) -> None:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", rendezvous, rank=rank, world_size=WORLD, timeout=timedelta(seconds=60))
        groups = {size: dist.new_group(list(range(size))) for size in SIZES}
        self.ulysses = {size: Ulysses(group) for size, group in groups.items() if rank < size}

    def golden(self, ulysses: Ulysses, name: str, dtype: str = "float32") -> float:
        from helpers import read_golden

        golden = read_golden(name)
        assert golden is not None
        return float(golden.error(ulysses, getattr(torch, dtype)))

    def attention(self, ulysses: Ulysses, heads: int, batch: int, lengths: list[int], seed: int) -> float:
        torch.manual_seed(seed)
        q, k, v = torch.randn(3, batch, sum(lengths), heads, 16)
        expected = torch.split(Ulysses().attention(q, k, v, lengths), lengths, dim=1)
        local = [torch.cat([ulysses.shard(part) for part in torch.split(t, lengths, dim=1)], dim=1) for t in (q, k, v)]
        mine = ulysses.attention(*local, lengths)
        outs = torch.split(mine, [ulysses.sizes(length)[ulysses.rank] for length in lengths], dim=1)
        whole = [ulysses.gather(out, length) for out, length in zip(outs, lengths, strict=True)]
        return max(float((a - b).norm() / b.norm()) for a, b in zip(whole, expected, strict=True) if b.numel())

    def forward(
        self,
        ulysses: Ulysses,
        family: str,
        batch: int,
        text: int,
        height: int,
        width: int,
        references: list[list[int]],
        seed: int,
    ) -> float:
        from tacod.rank.families import detect

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
        with torch.inference_mode():
            expected = model(Ulysses(), **inputs)
            out = model(ulysses, **inputs)
        return float((out - expected).norm() / expected.norm())

    def gather(self, ulysses: Ulysses, dtype: str, shape: list[int], dim: int) -> bool:
        tokens = torch.arange(torch.Size(shape).numel()).reshape(shape).to(getattr(torch, dtype))
        return torch.equal(ulysses.gather(ulysses.shard(tokens, dim), shape[dim], dim), tokens)

    def timing(self, ulysses: Ulysses) -> tuple[float, float, float]:
        ulysses.take_collective_s()
        begin = time.perf_counter()
        ulysses.gather(ulysses.shard(torch.zeros(1, 10, 4)), 10)
        wall = time.perf_counter() - begin
        return ulysses.take_collective_s(), wall, ulysses.take_collective_s()


def main(number: str, rendezvous: str) -> None:
    # gloo reports its connections on stdout, which is for answers here.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    rank = Rank(int(number), rendezvous)
    for line in sys.stdin:
        case = json.loads(line)
        size, verb = case.pop("size"), case.pop("verb")
        print(json.dumps(getattr(rank, verb)(rank.ulysses[size], **case)), file=answers, flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])

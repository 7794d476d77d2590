"""Other attention kernels on GPUs, where their packages are: near exact, with graphs and in a ring; else refused."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import Daemon, read_golden, relative_error

from tacod.rank.ops.attention_kernels import KERNELS, Kernel, Obstacle
from tacod.rank.ops.sdpa import attend_part, merge
from tacod_client import ArgumentError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is available"),
]

WORLDS = [count for count in (1, 2, 3) if count <= torch.cuda.device_count()]
FAR = 6e-2
"""Of one attention on normal numbers, in 8 bits."""


def usable(name: str, width: int = 128) -> Kernel:
    """A kernel; the test is skipped, with the reason, where it can't run."""
    kernel = KERNELS[name]
    obstacle = kernel.obstacle(torch.device("cuda", 0), torch.bfloat16, width)
    if obstacle:
        pytest.skip(kernel.advice(obstacle))
    return kernel


@pytest.mark.parametrize("width", [64, 72, 128])
@pytest.mark.parametrize("tokens", [1, 77, 4608])
@pytest.mark.parametrize("name", KERNELS)
@torch.inference_mode()
def test_one_attention(name: str, tokens: int, width: int) -> None:
    """On what a rank receives, also of several images; the same to the bit if asked again."""
    kernel = usable(name, width)
    q, k, v = torch.randn(tokens, 2, 3, 6, width, device="cuda", dtype=torch.bfloat16).permute(2, 1, 3, 0, 4)
    expected, lse = attend_part(q.float(), k.float(), v.float())
    out = kernel.attend(q, k, v)
    assert (out.shape, out.dtype) == (q.shape, q.dtype)
    assert relative_error(out, expected) <= FAR
    assert torch.equal(kernel.attend(q, k, v), out)
    if kernel.takes_masks:
        keys = torch.arange(tokens, device="cuda")[None, None, None] % 5 != 1
        assert (
            relative_error(kernel.attend(q, k, v, keys), attend_part(q.float(), k.float(), v.float(), keys)[0]) <= FAR
        )
    if kernel.tells_lse and tokens > 1:
        cuts = [(0, tokens // 3), (tokens // 3, tokens // 3), (tokens // 3, tokens)]
        merged, seen = functools.reduce(merge, [kernel.attend_part(q, k[:, :, a:b], v[:, :, a:b]) for a, b in cuts])
        assert relative_error(merged, expected) <= FAR
        assert float((seen - lse).abs().max()) <= 0.1


@pytest.fixture(scope="module", params=WORLDS, ids=lambda count: f"{count}gpu")
def gpu_daemon(request: pytest.FixtureRequest, models: Path) -> Iterator[Daemon]:
    with Daemon(roots=[models], gpus=request.param, settings={"group.step_timeout_s": 60.0}) as daemon:
        yield daemon


@pytest.mark.parametrize("ring", [False, True], ids=["ulysses", "ring"])
@pytest.mark.parametrize("golden_name", ["flux_dev", "wan21_t2v", "lumina2"])
@pytest.mark.parametrize("name", KERNELS)
def test_forwards(gpu_daemon: Daemon, models: Path, name: str, golden_name: str, ring: bool) -> None:
    """As they come, captured and replayed: all the same to the bit, whether or not the kernel can be captured."""
    golden = read_golden(golden_name)
    ranks = len(gpu_daemon.rank_pids())
    dit = golden.model()
    kernel = usable(name, dit.width // dit.heads)
    if ring and (ranks == 1 or not kernel.tells_lse):
        pytest.skip("no ring of one GPU, and none without log-sum-exp")
    golden.save(models / f"{golden_name}.safetensors")
    plan = {"attention": name, "ring" if ring else "ulysses": ranks}
    with gpu_daemon.client() as client:
        exact = client.load(f"{golden_name}.safetensors", dtype="bf16").forward(**golden.inputs)
        model = client.load(f"{golden_name}.safetensors", dtype="bf16", plan=plan)
        outs = [model.forward(**golden.inputs) for _ in range(5)]
    assert f"attention {name}" in model.stats.plan
    assert all(torch.equal(out, outs[0]) for out in outs[1:])
    assert relative_error(outs[0], golden.out) <= max(2 * relative_error(exact, golden.out), 5e-2)


@pytest.mark.parametrize("name", KERNELS)
def test_what_can_not_run_is_refused_on_all_and_nothing_breaks(gpu_daemon: Daemon, models: Path, name: str) -> None:
    golden = read_golden("flux_dev")
    golden.save(models / "flux_dev.safetensors")
    with gpu_daemon.client() as client:
        in_fp32 = client.load("flux_dev.safetensors", dtype="fp32", plan={"attention": name})
        with pytest.raises(ArgumentError, match="bf16 and fp16 only"):
            in_fp32.forward(**golden.inputs)
        dit = golden.model()
        obstacle = KERNELS[name].obstacle(torch.device("cuda", 0), torch.bfloat16, dit.width // dit.heads)
        low = client.load("flux_dev.safetensors", dtype="bf16", plan={"attention": name})
        if obstacle != Obstacle.NONE:
            with pytest.raises(ArgumentError) as caught:
                low.forward(**golden.inputs)
            assert KERNELS[name].advice(obstacle) in caught.value.message
        elif not KERNELS[name].takes_masks:
            tokens = sum(golden.model().lengths(golden.arguments(golden.model())))
            with pytest.raises(ArgumentError, match="it takes no such mask"):
                low.forward(**golden.inputs, attention_mask=torch.ones(1, tokens, tokens).tril())
        plain = client.load("flux_dev.safetensors", dtype="fp32")
        assert relative_error(plain.forward(**golden.inputs), golden.out) <= 2e-5

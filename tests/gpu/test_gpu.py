"""The same promises on real GPUs, over NCCL."""

from __future__ import annotations

import copy
import functools
import math
import mmap
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from helpers import FLUX, FP32, SD3, Daemon, Tiny, golden_names, read_golden, relative_error, stopped
from safetensors.torch import save_file
from torch.nn.attention import sdpa_kernel

from tacod.checkpoint import read_checkpoint
from tacod.group.shared_memory import SharedMemory
from tacod.rank.families import kit
from tacod.rank.forward.run import FAST, PLAIN
from tacod.rank.ops.experts import mixture, stays_on_gpu
from tacod.rank.ops.sdpa import attend, attend_part, attend_pieces, merge
from tacod.rank.ops.split_kv import whole_waves
from tacod.rank.shared_memory import MappedMemories
from tacod.rank.weights.reader import Reader
from tacod_client import latents, wire
from tacod_client.request import Request

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is available"),
]

GOLDENS = golden_names()
ONE = {"sequence_parallel_degree": 1, "cfg_parallel": False}
WORLDS = [count for count in (1, 2, 3, 4) if count <= torch.cuda.device_count()]


@pytest.fixture(scope="module", params=WORLDS, ids=lambda count: f"{count}gpu")
def gpu_daemon(request: pytest.FixtureRequest, models: Path) -> Iterator[Daemon]:
    with Daemon(roots=[models], gpus=request.param, settings={"group.step_timeout_s": 20.0}) as daemon:
        yield daemon


@pytest.fixture(scope="module")
def daemon_without_graphs(gpu_daemon: Daemon, models: Path) -> Iterator[Daemon]:
    """On the same GPUs; how ranks are made a reload can't change."""
    settings = {"group.step_timeout_s": 20.0, "group.cuda_graphs": False}
    with Daemon(roots=[models], gpus=len(gpu_daemon.rank_pids()), settings=settings) as daemon:
        yield daemon


def everyone(daemon: Daemon) -> dict[str, int]:
    """The plan that has all ranks share the tokens: for models this small, the planner would rather leave them idle."""
    return {"sequence_parallel_degree": len(daemon.rank_pids())}


FP32_ON_GPU = 2e-5
"""The goldens are one CPU's. Where a timestep's or a frequency's last bit differs, as a GPU divides by multiplying and
each CPU has its own exp, the embedding of 1000 times it differs in the sixth digit. Ranks are held to `FP32` of one."""


@pytest.mark.parametrize("name", GOLDENS)
def test_goldens_in_fp32(gpu_daemon: Daemon, models: Path, name: str) -> None:
    golden = read_golden(name)
    golden.save(models / f"{name}.safetensors")
    with gpu_daemon.client() as client:
        model = client.load(f"{name}.safetensors", dtype="fp32", plan=everyone(gpu_daemon))
        out = model.forward(**golden.inputs)
        assert model.stats.ranks == len(gpu_daemon.rank_pids())
        alone = client.load(f"{name}.safetensors", dtype="fp32", plan=ONE).forward(**golden.inputs)
    assert relative_error(out, golden.out) <= FP32_ON_GPU
    assert relative_error(out, alone) <= FP32


@pytest.mark.parametrize("name", GOLDENS)
def test_goldens_in_bf16(gpu_daemon: Daemon, models: Path, name: str) -> None:
    golden = read_golden(name)
    golden.save(models / f"{name}.safetensors")
    with gpu_daemon.client() as client:
        model = client.load(f"{name}.safetensors", plan=everyone(gpu_daemon))
        out = model.forward(**golden.inputs)
        alone = client.load(f"{name}.safetensors", plan=ONE).forward(**golden.inputs)
    assert model.dtype == "bf16", "on a GPU the file's own dtype is the default"
    error = relative_error(alone, golden.out)
    assert error <= golden.bf16
    # Parts of a sequence are rounded otherwise than the whole: no worse, but for chance.
    assert relative_error(out, golden.out) <= max(golden.bf16, 1.25 * error)


def test_replays_equal_what_they_replay(gpu_daemon: Daemon, models: Path) -> None:
    """The first forward comes as it is, the second is captured, later ones are graphs; ranks store into each other."""
    golden = read_golden("flux_dev_odd")
    golden.save(models / "flux_dev_odd.safetensors")
    with gpu_daemon.client() as client:
        model = client.load("flux_dev_odd.safetensors", dtype="fp32", plan=everyone(gpu_daemon))
        outs = [model.forward(**golden.inputs) for _ in range(5)]
    assert all(torch.equal(out, outs[0]) for out in outs[1:])
    assert "no CUDA graph" not in gpu_daemon.log
    assert "don't write into each other's memory" not in gpu_daemon.log


def test_a_graph_serves_all_prompts_of_a_length(gpu_daemon: Daemon, models: Path) -> None:
    """It has a copy of what doesn't change from step to step, which another prompt's is copied over."""
    golden = read_golden("qwen_image_21_edit")
    golden.save(models / "qwen_image_21_edit.safetensors")
    prompts = [golden.inputs["context"] + number for number in range(3)]
    with gpu_daemon.client() as client:
        model = client.load("qwen_image_21_edit.safetensors", dtype="fp32", plan=everyone(gpu_daemon))
        before = client.stats()["prefix"]
        outs = [[model.forward(**{**golden.inputs, "context": each}) for _ in range(4)] for each in prompts * 2]
        after = client.stats()["prefix"]
    assert all(torch.equal(out, some[0]) for some in outs for out in some)
    assert all(torch.equal(one[0], two[0]) for one, two in zip(outs[:3], outs[3:], strict=True))
    assert not torch.equal(outs[0][0], outs[1][0])
    assert (after["hits"] - before["hits"], after["misses"] - before["misses"]) == (21, 3)
    assert "no CUDA graph" not in gpu_daemon.log


@pytest.mark.parametrize("ring", [False, True], ids=["ulysses", "ring"])
@pytest.mark.parametrize("name", ["flux_dev_odd", "wan21_t2v", "qwen_image_21_edit", "lumina2", "sd35_medium"])
def test_graphs_of_a_step_cache(
    gpu_daemon: Daemon, daemon_without_graphs: Daemon, models: Path, name: str, ring: bool
) -> None:
    """Steps that are computed and skipped, as they come and replayed, equal those of a daemon without graphs."""
    golden = read_golden(name)
    golden.save(models / f"{name}.safetensors")
    ranks = len(gpu_daemon.rank_pids())
    if ring and ranks == 1:
        pytest.skip("one GPU is no ring")
    plan = {"step_cache": 1e9, "ring" if ring else "ulysses": ranks}
    outs: list[list[torch.Tensor]] = []
    for daemon in (gpu_daemon, daemon_without_graphs):
        with daemon.client() as client:
            model = client.load(f"{name}.safetensors", dtype="fp32", plan=plan)
            outs.append([model.forward(**{**golden.inputs, "x": golden.inputs["x"] + 0.1 * n}) for n in range(12)])
            assert model.stats.skipped == 9, "the first is computed, and each after four skipped ones"
    assert all(torch.equal(*each) for each in zip(*outs, strict=True))
    assert "no CUDA graph" not in gpu_daemon.log


def test_graphs_after_all_models_are_unloaded(gpu_daemon: Daemon) -> None:
    """PyTorch ends the memory that graphs share with the last of them."""
    with gpu_daemon.client() as client:
        for each in client.status()["models"]:
            client.unload(each["id"])
        for tiny in (FLUX, SD3, FLUX):
            model = client.load(tiny.file, dtype="fp32", plan=everyone(gpu_daemon))
            outs = [model.forward(**tiny.inputs()) for _ in range(4)]
            assert all(torch.equal(out, outs[0]) for out in outs[1:])
            client.unload(model.id)
    assert "no CUDA graph" not in gpu_daemon.log


def test_graphs_of_experts(gpu_daemon: Daemon, models: Path) -> None:
    """How many tokens an expert gets is known on the GPU alone."""
    golden = read_golden("hidream")
    golden.save(models / "hidream.safetensors")
    with gpu_daemon.client() as client:
        model = client.load("hidream.safetensors", plan=everyone(gpu_daemon))
        outs = [model.forward(**golden.inputs) for _ in range(5)]
        moved = model.forward(**{**golden.inputs, "x": golden.inputs["x"].flip(-1)})
        client.unload(model.id)
        again = client.load("hidream.safetensors", plan=everyone(gpu_daemon))
        assert torch.equal(again.forward(**{**golden.inputs, "x": golden.inputs["x"].flip(-1)}), moved)
    assert all(torch.equal(out, outs[0]) for out in outs[1:])
    assert "no CUDA graph" not in gpu_daemon.log


@pytest.mark.parametrize(("tokens", "width", "hidden"), [(1000, 256, 704), (77, 320, 72), (1, 128, 64), (0, 128, 64)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.inference_mode()
def test_experts(dtype: torch.dtype, tokens: int, width: int, hidden: int) -> None:
    made = [kit.MLP(width, hidden, ("w1", "w2", "w3"), "swiglu", bias=False).to("cuda", dtype) for _ in range(4)]
    layers = [(each.w1, each.w2, each.w3) for each in made]
    x, chosen = torch.randn(tokens, width, device="cuda", dtype=dtype), torch.randn(tokens, 4, device="cuda").topk(2)[1]
    assert stays_on_gpu(layers)
    found = mixture(x, chosen, layers, made)
    exact = mixture(x.double(), chosen, [tuple(map(as_double, each)) for each in layers], list(map(as_double, made)))
    with mock.patch("tacod.rank.ops.experts.stays_on_gpu", return_value=False):
        plain = mixture(x, chosen, layers, made)
    assert found.shape == plain.shape == (tokens, 2, width)
    if tokens:
        assert relative_error(found, exact) <= 1.1 * relative_error(plain, exact)


def as_double(layer: torch.nn.Module) -> torch.nn.Module:
    """A copy in fp64."""
    return copy.deepcopy(layer).double()


def test_graphs_of_large_images(gpu_daemon: Daemon) -> None:
    """What ranks gather then lies in several pieces of memory, which nobody may take for one."""
    with gpu_daemon.client() as client:
        model = client.load(FLUX.file, dtype="fp32", plan=everyone(gpu_daemon))
        for side in range(288, 416, 16):
            inputs = FLUX.inputs(size=(side, side))
            outs = [model.forward(**inputs) for _ in range(4)]
            assert all(torch.equal(out, outs[0]) for out in outs[1:])
            assert model.stats.retries == 0, gpu_daemon.log
    assert "no CUDA graph" not in gpu_daemon.log


@pytest.mark.parametrize("key", ["cuda_graphs", "peer_memory", "warm_up"])
def test_without_one_of_the_engines_ways(models: Path, key: str) -> None:
    golden = read_golden("flux_dev_odd")
    golden.save(models / "flux_dev_odd.safetensors")
    settings = {f"group.{key}": False}
    with Daemon(roots=[models], gpus=WORLDS[-1], settings=settings) as daemon, daemon.client() as client:
        model = client.load("flux_dev_odd.safetensors", dtype="fp32", plan=everyone(daemon))
        assert all(relative_error(model.forward(**golden.inputs), golden.out) <= FP32 for _ in range(4))


@pytest.mark.skipif(WORLDS[-1:] < [2], reason="one GPU alone shares nothing out")
@pytest.mark.parametrize("way", ["peers", "NCCL", "host"])
def test_unequal_shares(models: Path, way: str) -> None:
    """The same result by each way of exchange, in images of a batch too, and to the bit at each replay."""
    names = ["flux_dev_odd", "sd35_medium", "minimax_h3_mixed", "wan21_t2v"]
    for name in names:
        read_golden(name).save(models / f"{name}.safetensors")
    settings = {"group.shares": [3, 1, 2, 2][: WORLDS[-1]], "group.peer_memory": way != "NCCL"}
    without = {"NCCL_P2P_DISABLE": "1"} if way == "host" else {}
    started = Daemon(roots=[models], gpus=WORLDS[-1], settings=settings, environment=without)
    with started as daemon, daemon.client() as client:
        for name in names:
            golden = read_golden(name)
            model = client.load(f"{name}.safetensors", dtype="fp32", plan=everyone(daemon))
            outs = [model.forward(**golden.inputs) for _ in range(4)]
            alone = client.load(f"{name}.safetensors", dtype="fp32", plan=ONE).forward(**golden.inputs)
            assert relative_error(outs[0], alone) <= FP32, f"{name}: {relative_error(outs[0], alone):.1e}"
            assert all(relative_error(out, outs[0]) == 0 for out in outs[1:]), name
            assert "rank 0 takes 3 times as much" in model.stats.plan, model.stats.plan
        inputs = FLUX.inputs(batch=3)
        batch = client.load(FLUX.file, dtype="fp32", plan={"cfg_parallel": True})
        assert relative_error(batch.forward(**inputs), FLUX.forward(**inputs)) <= FP32_ON_GPU
        assert "no CUDA graph" not in daemon.log


@pytest.mark.skipif(WORLDS[-1:] < [2], reason="one GPU alone exchanges nothing")
@pytest.mark.parametrize("exchange", ["exact", "int8"])
def test_through_the_hosts_memory(models: Path, exchange: str) -> None:
    """GPUs that are told not to reach each other: the same result, to the bit at each replay."""
    golden = read_golden("flux_dev_odd")
    golden.save(models / "flux_dev_odd.safetensors")
    without = {"NCCL_P2P_DISABLE": "1"}
    with Daemon(roots=[models], gpus=WORLDS[-1], environment=without) as daemon, daemon.client() as client:
        plan = {**everyone(daemon), "exchange": exchange}
        model = client.load("flux_dev_odd.safetensors", dtype="fp32", plan=plan)
        outs = [model.forward(**golden.inputs) for _ in range(5)]
        assert client.stats()["collective_s"] > 0
        tiny = FLUX.inputs(size=(512, 512))
        wide = [client.load(FLUX.file, dtype="fp32", plan=given).forward(**tiny) for given in [plan] * 4 + [ONE]]
        assert "exchange through the host's memory\n" in daemon.log
        assert "no CUDA graph" not in daemon.log
    assert relative_error(outs[0], golden.out) <= (FP32 if exchange == "exact" else 2e-2)
    assert all(torch.equal(out, outs[0]) for out in outs[1:])
    assert relative_error(wide[0], wide[-1]) <= (1e-5 if exchange == "exact" else 2e-2), "of more pieces than slots"
    assert all(torch.equal(out, wide[0]) for out in wide[1:-1])


@pytest.mark.parametrize("tiny", [FLUX, SD3], ids=lambda tiny: tiny.name)
def test_inputs_and_outputs_on_the_gpu(gpu_daemon: Daemon, tiny: Tiny) -> None:
    inputs = {name: value.cuda() for name, value in tiny.inputs(batch=2).items()}
    with gpu_daemon.client() as client:
        out = client.load(tiny.file, dtype="fp32", plan=everyone(gpu_daemon)).forward(**inputs)
    assert out.device == inputs["x"].device
    assert relative_error(out.cpu(), tiny.forward(**tiny.inputs(batch=2))) <= FP32


def test_memory_shared_with_a_client_is_registered() -> None:
    """Then the GPU copies to and from it by itself."""
    device = torch.device("cuda", 0)
    made = SharedMemory.make(1, 1 << 20)
    memories = MappedMemories(device)
    latent = torch.randn(3, 50, 70, dtype=torch.bfloat16)
    with mmap.mmap(made.fd, made.nbytes) as ours:
        for number in (1, 2):
            ours[128 : 128 + latent.nbytes] = latent.view(torch.uint8).numpy().tobytes()
            memories.add(number, made.nbytes, os.dup(made.fd))
            memory = memories.get(number)
            assert memory is not None
            assert memory.registered
            read = memory.read(wire.Tensor("BF16", tuple(latent.shape), None, offset=128), torch.float32)
            assert read.device == device
            assert torch.equal(read.cpu(), latent.float())
            assert memory.write([read], [0, read.nbytes - 1]) is None
            placed = memory.write([read, read.to(torch.float16)], [64, 1 << 19])
            torch.cuda.synchronize()
            assert placed is not None
            for told, expected in zip(placed, (latent.float(), latent.to(torch.float16)), strict=True):
                assert told.offset is not None
                found = torch.frombuffer(bytearray(ours[told.offset : told.offset + told.nbytes]), dtype=expected.dtype)
                assert torch.equal(found.view(expected.shape), expected)
            memories.drop(number)
    made.free()


@pytest.mark.parametrize("on_gpu", [False, True], ids=["of a client on the CPU", "of a client on the GPU"])
def test_latents_in_shared_memory(gpu_daemon: Daemon, monkeypatch: pytest.MonkeyPatch, on_gpu: bool) -> None:
    """The same bits as through frames, by graphs too, and after a rank was killed; the client hears of completions."""
    completed: list[int] = []
    complete = Request.complete

    def note(self: Request, message: wire.Message) -> None:
        complete(self, message)
        completed.append(message.id)

    monkeypatch.setattr(Request, "complete", note)
    inputs = {name: each.cuda() if on_gpu else each for name, each in FLUX.inputs(4, size=(64, 64)).items()}
    with gpu_daemon.client() as client:
        model = client.load(FLUX.file, dtype="fp32", plan=everyone(gpu_daemon))
        monkeypatch.setattr(latents, "LEAST_BYTES", 1 << 40)
        framed = [model.forward(**inputs) for _ in range(4)]
        assert client.stats()["shared_bytes"] == 0
        monkeypatch.setattr(latents, "LEAST_BYTES", 0)
        placed = [model.forward(**inputs) for _ in range(4)]
        assert client.stats()["shared_bytes"] > 0
        assert completed
        assert "can't be registered" not in gpu_daemon.log
        os.kill(gpu_daemon.rank_pids()[0], signal.SIGKILL)
        placed += [model.forward(**inputs) for _ in range(4)]
        assert all(torch.equal(each, framed[0]) for each in (*framed, *placed))
        assert all(each.device == inputs["x"].device for each in placed)


def test_a_step_adds_up_and_times_its_collectives(gpu_daemon: Daemon) -> None:
    with gpu_daemon.client() as client:
        model = client.load(FLUX.file, dtype="fp32", plan=everyone(gpu_daemon))
        FLUX.check(model)
        stats = client.stats()
    parts = sum(stats[key] for key in ("queue_s", "wire_s", "compute_s", "collective_s"))
    assert parts == pytest.approx(stats["step_s"]["mean"], rel=1e-6)
    assert (stats["collective_s"] > 0) == (len(gpu_daemon.rank_pids()) > 1)


def test_files_arrive_whole(tmp_path: Path) -> None:
    """Though each tensor's memory goes back, and is used for the next, while the GPU still reads it."""
    sizes = 3 * [0, 1, 1 << 20, (16 << 20) + 1, 100 << 20, 3, 40 << 20]
    tensors = {f"{n:02}": torch.randint(256, (size,), dtype=torch.uint8) for n, size in enumerate(sizes)}
    save_file(tensors, tmp_path / "m.safetensors")
    found = []
    with (
        torch.inference_mode(),
        Reader(read_checkpoint(str(tmp_path / "m.safetensors")), torch.device("cuda", 0)) as reader,
    ):
        for data in reader.read(tensors):
            found.append(data ^ 255)
            del data
    for expected, each in zip(tensors.values(), found, strict=True):
        assert torch.equal(each.cpu() ^ 255, expected)


def test_unload_gives_device_memory_back(gpu_daemon: Daemon) -> None:
    with gpu_daemon.client() as client:
        before = [rank["memory_used_bytes"] for rank in client.status()["group"]["ranks"]]
        model = client.load(SD3.file, dtype="fp16")
        loaded = [rank["memory_used_bytes"] for rank in client.status()["group"]["ranks"]]
        client.unload(model.id)
        after = [rank["memory_used_bytes"] for rank in client.status()["group"]["ranks"]]
    assert all(now > then for now, then in zip(loaded, before, strict=True))
    assert after == before


def test_a_sampling_run_is_the_same_at_any_number_of_gpus(gpu_daemon: Daemon) -> None:
    with gpu_daemon.client() as client:
        together = SD3.sample(client.load(SD3.file, dtype="fp32", plan=everyone(gpu_daemon)), 8).result()
        alone = SD3.sample(client.load(SD3.file, dtype="fp32", plan=ONE), 8).result()
    assert relative_error(together, alone) <= 1e-5


@pytest.mark.parametrize("fault", ["killed", "stopped"])
def test_a_lost_rank_costs_time_and_nothing_else(gpu_daemon: Daemon, fault: str) -> None:
    """SIGSTOP is what a rank stuck in NCCL looks like: nobody else notices until the deadline."""
    with gpu_daemon.client() as client:
        model = client.load(SD3.file, dtype="fp32", plan=everyone(gpu_daemon))
        undisturbed = SD3.sample(model, 60).result()
        job = SD3.sample(model, 60)
        next(iter(job))
        victim = gpu_daemon.rank_pids()[-1]
        restarts = client.status()["group"]["restarts"]
        if fault == "killed":
            os.kill(victim, signal.SIGKILL)
            latent = job.result()
        else:
            with stopped(victim):
                latent = job.result()
        assert client.status()["group"]["restarts"] == restarts + 1
    assert relative_error(latent, undisturbed) <= 1e-5
    assert "has used CUDA" not in gpu_daemon.log, "the ranks could not be forked"


def test_residuals_masks_and_plain_attention(gpu_daemon: Daemon) -> None:
    inputs = FLUX.inputs(batch=2, text=5)
    residual, mask = torch.randn(2, 35, 80), torch.randn(1, 40, 40)
    more = {"attention_mask": mask, "rope_options": {"scale_x": 0.5, "shift_y": 2.0}}
    control = {"input": [residual, None], "output": [residual]}
    expected = FLUX.forward(**inputs, **more, control=control)
    with gpu_daemon.client() as client:
        for plan in (everyone(gpu_daemon), {**everyone(gpu_daemon), "flash_attention": False}):
            model = client.load(FLUX.file, dtype="fp32", plan=plan)
            assert relative_error(model.forward(**inputs, **more, control=control), expected) <= FP32
            assert relative_error(model.forward(**inputs), FLUX.forward(**inputs)) <= FP32


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("width", [16, 20, 128])
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 2e-6), (torch.bfloat16, 6e-3)], ids=["fp32", "bf16"])
def test_attention_in_parts(dtype: torch.dtype, most: float, width: int, masked: bool) -> None:
    """What a ring merges, of uneven parts, and with keys that nobody may see."""
    q, k, v = torch.randn(3, 2, 3, 77, width, device="cuda")
    mask = torch.randn(1, 1, 77, 77, device="cuda") if masked else None
    if mask is not None:
        mask[..., 5, 30:] = -torch.inf
    expected = attend(q.double(), k.double(), v.double(), None if mask is None else mask.double())
    q, k, v, mask = (None if each is None else each.to(dtype) for each in (q, k, v, mask))
    pieces = [(0, 30), (30, 35), (35, 77)]
    parts = [attend_part(q, k[:, :, a:b], v[:, :, a:b], None if mask is None else mask[..., a:b]) for a, b in pieces]
    out = functools.reduce(merge, parts)[0]
    assert relative_error(out, expected) <= most


HOPPER = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0),
    reason="only Hopper's attention is computed in whole waves",
)


def _pieces(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> list[torch.Tensor]:
    """Results of whole waves, as they are sent: [S', B, H, D]."""
    return [each.permute(2, 0, 1, 3).contiguous() for each in attend_pieces(q, k, v, split_kv=True)]


@HOPPER
@pytest.mark.parametrize(("heads", "runs"), [(12, 2), (8, 2), (24, 1), (1, 1)])
@pytest.mark.parametrize(("tokens", "width"), [(4608, 128), (4500, 128), (4608, 64), (4608, 72)])
@torch.inference_mode()
def test_attention_in_whole_waves(heads: int, runs: int, tokens: int, width: int) -> None:
    """As exact as in one, on what a rank receives; 132 multiprocessors are a full H100's."""
    q, k, v = torch.randn(tokens, 1, 3, heads, width, device="cuda", dtype=torch.bfloat16).permute(2, 1, 3, 0, 4)
    k[:, :, : tokens // 3] *= 3  # so that the shares' weights differ
    expected = attend(q.double(), k.double(), v.double()).permute(2, 0, 1, 3)
    with sdpa_kernel(PLAIN):
        (plain,) = _pieces(q, k, v)
    with sdpa_kernel(FAST, set_priority=True):
        whole = attend(q, k, v).permute(2, 0, 1, 3)
        results = _pieces(q, k, v)
        again = _pieces(q, k, v)
    if torch.cuda.get_device_properties(0).multi_processor_count == 132:
        assert len(results) == runs
    assert all(torch.equal(*each) for each in zip(results, again, strict=True))
    rows, parts = whole_waves(tokens, tokens, heads, 132)
    if parts == 1:
        assert torch.equal(torch.cat(results), whole)
    # Shares of the keys are rounded once each, and then what they give together: where all queries' keys are shared
    # out, that is up to the square root of 2 of what one rounding errs by.
    most = (1.1 if rows else math.sqrt(2)) * relative_error(whole, expected)
    assert relative_error(torch.cat(results), expected) <= most
    assert relative_error(plain, expected) <= most


@HOPPER
def test_whole_waves_travel_while_the_rest_is_computed(gpu_daemon: Daemon) -> None:
    """As it comes, captured and replayed; of two ranks the one with 3 of 5 heads has two results, the other one."""
    if len(gpu_daemon.rank_pids()) == 1:
        pytest.skip("one GPU alone attends at once")
    if torch.cuda.get_device_properties(0).multi_processor_count != 132:
        pytest.skip("the sizes are those of GPUs with 132 multiprocessors")
    inputs = FLUX.inputs(size=(152, 152), text=8)
    tokens = 76**2 + 8
    assert whole_waves(tokens, tokens, 3, 132) == (44 * 128, 12)
    with gpu_daemon.client() as client:
        alone = client.load(FLUX.file, dtype="bf16", plan=ONE).forward(**inputs)
        model = client.load(FLUX.file, dtype="bf16", plan=everyone(gpu_daemon))
        outs = [model.forward(**inputs) for _ in range(6)]
        exact = client.load(FLUX.file, dtype="fp32", plan=ONE).forward(**inputs)
        assert model.stats.retries == 0, gpu_daemon.log
    assert all(torch.equal(out, outs[0]) for out in outs[1:])
    assert "no CUDA graph" not in gpu_daemon.log
    assert "keys are not split" not in gpu_daemon.log
    assert relative_error(outs[0], exact) <= 1.1 * relative_error(alone, exact)

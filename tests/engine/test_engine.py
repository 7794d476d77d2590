"""What an engine holds, and lets go of."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from helpers import FLUX, FP32, quantized_golden_names, read_golden, relative_error

from tacod.checkpoint import read_checkpoint
from tacod.group.work import Envelope, Evict, Failed, Load, Sample, SampleStep, Stepped
from tacod.rank.__main__ import _do
from tacod.rank.engine import Engine
from tacod.rank.parallel.topology import Topology
from tacod.rank.weights.load import _place
from tacod_client.errors import ArgumentError, OutOfMemory
from tacod_client.exchange import pack
from tacod_client.tensors import from_wire, to_wire

KEY = "double_blocks.0.img_attn.qkv.weight"


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(FLUX.save(tmp_path))


@pytest.fixture
def engine() -> Engine:
    return Engine(torch.device("cpu"), Topology())


def load(engine: Engine, path: str, model: str, patches: Any = None, evict: tuple[str, ...] = ()) -> None:
    base = "base" if patches else None
    engine.load(model, path, read_checkpoint(path).identity, "fp32", patches, base, list(evict))


def difference(value: torch.Tensor) -> list[dict[str, Any]]:
    return [{"key": f"diffusion_model.{KEY}", "kind": "diff", "diff": to_wire(value, "diff"), "strength": 1.0}]


def run(
    engine: Engine, job: str, step: int, model: str = "base", batch: int = 1, plan: Any = "auto", **more: Any
) -> Stepped:
    """One step of a run of three."""
    given = FLUX.inputs(batch=batch)
    noise = given.pop("x")
    del given["timestep"]
    positive = pack({**given, **more}, "positive", {}, None)
    negative = pack({**given, "context": -given["context"], **more}, "negative", {}, None)
    inputs = Sample(
        model=model,
        plan=plan,
        sampler="euler",
        seed=0,
        cfg=3.0,
        noise=to_wire(noise, "noise"),
        latent=to_wire(torch.zeros_like(noise), "latent"),
        sigmas=to_wire(torch.linspace(1, 0, 4), "sigmas"),
        positive=positive,
        negative=negative,
    )
    result = engine.work(Envelope(1, SampleStep(job, step, inputs if step == 0 else None))).result
    assert isinstance(result, Stepped)
    return result


def test_patches_that_fail_leave_no_base_behind(engine: Engine, path: str) -> None:
    """The daemon never heard of it: it could neither list nor unload it."""
    with pytest.raises(ArgumentError):
        load(engine, path, "patched", difference(torch.ones(3, 3)))
    assert engine.models == {}
    load(engine, path, "base")
    with pytest.raises(ArgumentError):
        load(engine, path, "patched", difference(torch.ones(3, 3)))
    assert list(engine.models) == ["base"]
    load(engine, path, "patched", difference(torch.ones(FLUX.model.state_dict()[KEY].shape)))
    assert list(engine.models) == ["base", "patched"]


def test_a_patch_of_a_weight_in_fp32_is_not_rounded(engine: Engine, tmp_path: Path) -> None:
    """Wan embeds patches by such weights in a model of bf16."""
    path, key = str(tmp_path / "wan.safetensors"), "patch_embedding.weight"
    golden = read_golden("wan_scail")
    golden.weights[key] = golden.weights[key].float() + 1e-4
    golden.save(Path(path))
    identity, change = read_checkpoint(path).identity, torch.full_like(golden.weights[key], 1e-5)
    patches = [{"key": f"diffusion_model.{key}", "kind": "diff", "diff": to_wire(change, "diff"), "strength": 1.0}]
    engine.load("patched", path, identity, "bf16", patches, "base", [])
    weights = engine.models["patched"].model.state_dict()
    assert torch.equal(weights[key], golden.weights[key] + change)
    assert weights["head.head.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("name", quantized_golden_names())
def test_nothing_stays_of_a_file_that_is_refused_half_way(engine: Engine, tmp_path: Path, name: str) -> None:
    """Whether a scale is a number is seen when the layer's turn comes. The report outlives the load."""
    golden, file = read_golden(name), tmp_path / "model.safetensors"
    golden.save(file)
    checkpoint = read_checkpoint(str(file))
    weight = max(checkpoint.quantization, key=lambda each: checkpoint.parts[each])
    leaf = checkpoint.quantization[weight].sides[0]
    part = checkpoint.parts[f"{weight.removesuffix('weight')}{leaf}"][0]
    with open(file, "r+b") as opened:
        opened.seek(part.start)
        opened.write(b"\xff" * (part.stop - part.start))
    seen: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
    placed = []

    def place(model: Any, *arguments: Any) -> None:
        seen.add(model)
        placed.append(arguments[1])
        _place(model, *arguments)

    command = Load("bad", str(file), read_checkpoint(str(file)).identity, None, None, None, [])
    with mock.patch("tacod.rank.weights.load._place", place):
        report = _do(engine, Envelope(1, command))
    assert isinstance(report, Failed)
    assert f"{weight.removesuffix('weight')}{leaf} holds numbers that aren't finite" in report.error.message
    assert placed[-1] == weight
    assert len(placed) > len(checkpoint.tensors) / 4, "much had been read by then"
    assert list(seen) == []
    assert engine.models == {}


@pytest.mark.parametrize("way", ["unload", "evict", "load"])
def test_a_run_does_not_keep_a_model_that_is_gone(engine: Engine, path: str, way: str) -> None:
    load(engine, path, "base")
    run(engine, "job", 0)
    model = weakref.ref(engine.models["base"].model)
    if way == "unload":
        engine.unload("base", [])
    elif way == "evict":
        engine.evict(["base"])
    else:
        load(engine, path, "other", evict=("base",))
    gc.collect()
    assert model() is None
    assert list(engine.runs) == ([] if way == "unload" else ["job"]), "an eviction keeps what a run has reached"


@pytest.mark.parametrize("patched", [False, True], ids=["plain", "patched"])
@pytest.mark.parametrize("threshold", [0.0, 0.99], ids=["exact", "step-cache"])
def test_a_run_goes_on_where_it_was_when_its_model_is_back(
    engine: Engine, path: str, patched: bool, threshold: float
) -> None:
    """After each of its steps another model takes the place of its own, and of that model's base."""
    patches = difference(torch.ones(FLUX.model.state_dict()[KEY].shape)) if patched else None
    model = "patched" if patched else "base"

    def back() -> None:
        load(engine, path, model, patches)

    back()
    plan = {"step_cache": threshold}
    undisturbed = [run(engine, "undisturbed", step, model, plan=plan) for step in range(3)]
    assert threshold == 0 or sum(told.skipped for told in undisturbed) > 0, "the step cache has something to keep"
    for step in range(3):
        told = run(engine, "disturbed", step, model, plan=plan)
        assert (told.sigma, told.skipped) == (undisturbed[step].sigma, undisturbed[step].skipped)
        if step < 2:
            if step:
                engine.evict([model])
            engine.load("other", path, read_checkpoint(path).identity, "fp32", None, None, [model, "base"])
            assert list(engine.models) == ["other"]
            back()
    assert torch.equal(from_wire(told.out, "torch"), from_wire(undisturbed[2].out, "torch"))
    assert engine.runs == {}
    assert len(engine.forwards.step_caches) == 0


def test_unloaded_with_what_was_made_of_it(engine: Engine, path: str) -> None:
    load(engine, path, "patched", difference(torch.ones(FLUX.model.state_dict()[KEY].shape)))
    weight = weakref.ref(engine.models["patched"].model.img_in.weight)
    engine.unload("base", ["patched"])
    gc.collect()
    assert engine.models == {}
    assert weight() is None


def test_a_fault_before_a_command_leaves_its_tensors_kept(engine: Engine) -> None:
    """The supervisor counts them as sent, and names them by digest from then on."""
    tensor = to_wire(torch.ones(3), "x").with_digest()

    def fail(when: str) -> None:
        raise RuntimeError(f"a fault {when} the command")

    with pytest.raises(RuntimeError, match="a fault before the command"):
        engine.work(Envelope(1, Evict([]), store=[tensor]), fail)
    assert torch.equal(from_wire(engine._kept(tensor.without_bytes()), "torch"), torch.ones(3))


def test_a_mask_for_all_images_is_one_for_each_of_a_guided_batch(engine: Engine, path: str) -> None:
    load(engine, path, "base")
    mask = torch.rand(1, 129 + 35, 129 + 35, generator=torch.Generator().manual_seed(0)) < 0.7
    outs = []
    for number, each in enumerate((mask, mask.expand(2, -1, -1))):
        for step in range(3):
            told = run(engine, str(number), step, batch=2, attention_mask=each)
        outs.append(from_wire(told.out, "torch"))
    assert relative_error(outs[0], outs[1]) <= FP32
    for step in range(3):
        told = run(engine, "unmasked", step, batch=2)
    assert relative_error(from_wire(told.out, "torch"), outs[1]) > 1e-3


@pytest.mark.parametrize(
    "text",
    [
        "CUDA driver error: out of memory",
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    ],
)
def test_a_lack_of_memory_by_any_name(engine: Engine, text: str) -> None:
    with pytest.raises(OutOfMemory, match="the GPU is out of memory"), engine.memory_errors():
        raise RuntimeError(text)
    with pytest.raises(RuntimeError, match="misaligned"), engine.memory_errors():
        raise RuntimeError("CUDA error: misaligned address")

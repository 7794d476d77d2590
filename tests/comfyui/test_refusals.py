"""What the daemon can't honour is refused by its name, before anything is sampled, and leaves ComfyUI as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from comfyui_graphs import FLUX, SD3, Pair, TinyModel, save
from comfyui_server import ComfyUI
from helpers import Daemon, relative_error
from safetensors.torch import save_file

Outcomes = Callable[..., Any]

AFTER: dict[str, tuple[TinyModel, str, dict[str, Any], str]] = {
    "skip-layer guidance": (
        SD3,
        "SkipLayerGuidanceDiT",
        {
            "double_layers": "0",
            "single_layers": "0",
            "scale": 3.0,
            "start_percent": 0.5,
            "end_percent": 1.0,
            "rescaling_scale": 0.0,
        },
        "SkipLayerGuidance",
    ),
    "a block replacement": (FLUX, "TestReplace", {"what": "patches_replace"}, "patches_replace of 'dit'"),
    "a block patch": (FLUX, "TestReplace", {"what": "patches"}, "patches of 'post_input'"),
    "another attention": (FLUX, "TestReplace", {"what": "attention"}, "optimized_attention_override"),
    "a block's object": (FLUX, "TestReplace", {"what": "object"}, "diffusion_model.double_blocks.0"),
    "a network's method": (FLUX, "TestReplace", {"what": "method"}, "diffusion_model.forward_orig"),
    "a look into the blocks": (FLUX, "TestReplace", {"what": "look"}, "diffusion_model.double_blocks"),
    "a weight wrapper": (FLUX, "TestReplace", {"what": "wrapper"}, "a weight wrapper on diffusion_model.img_in.weight"),
    "a kind of patch": (FLUX, "TestReplace", {"what": "kind"}, "kind 'glora' on diffusion_model.img_in.weight"),
    "a merge": (FLUX, "ModelMergeSimple", {"model2": "@file", "ratio": 0.5}, "ModelMerge"),
    "a LoRA in bypass mode": (
        FLUX,
        "LoraLoaderBypassModelOnly",
        {"lora_name": "bypassed.safetensors", "strength_model": 1.0},
        "a LoRA in bypass mode: its layers are in the daemon; use Load LoRA",
    ),
    "a copy for another GPU": (FLUX, "TestReplace", {"what": "multigpu"}, "MultiGPU CFG Split"),
    "a second loader": (FLUX, "loader", {}, "a second TACO-DiT Model Loader"),
}


def steps(outcome: Any) -> int:
    """How far any sampler got."""
    return max((event["value"] for event in outcome.of("progress") if event["max"] < 100), default=0)


@pytest.fixture(scope="session", autouse=True)
def bypassed(comfyui_models: Path) -> None:
    """A LoRA of a layer within the blocks."""
    key = "diffusion_model.double_blocks.0.img_attn.proj"
    up, down = torch.ones(80, 2), torch.ones(2, 80)
    lora = {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down}
    (comfyui_models / "loras").mkdir(exist_ok=True)
    save_file(lora, comfyui_models / "loras" / "bypassed.safetensors")


def skip_without(comfyui: ComfyUI, what: str) -> None:
    """Some versions of ComfyUI lack what is refused."""
    if what == "LoraLoaderBypassModelOnly" and what not in comfyui.nodes:
        pytest.skip("this version of ComfyUI has no LoraLoaderBypass")
    if what.startswith("multigpu") and "MultiGPU_WorkUnits" not in comfyui.nodes:
        pytest.skip("this version of ComfyUI has no MultiGPU CFG Split")


@pytest.mark.parametrize("case", AFTER)
def test_refused_after_the_loader(comfyui: ComfyUI, case: str) -> None:
    model, kind, inputs, name = AFTER[case]
    skip_without(comfyui, inputs.get("what", kind))
    pair = Pair(model)
    pair.load()
    head = pair.head("taco")
    if kind == "loader":
        pair.add("again", "TACODiTModelLoader", **{**pair.nodes["loader"]["inputs"], "model": "@loader"})
    else:
        own = "model1" if kind == "ModelMergeSimple" else "model"
        pair.add("again", kind, **{own: f"@{head}"}, **inputs)
    pair.on("taco", "again")
    pair.sample()
    for node in ("sampler_stock", "save_stock"):
        del pair.nodes[node]
    outcome = comfyui.run(pair.nodes)
    assert outcome.kind == "error"
    assert outcome.error.startswith("TACO-DiT can't honour ")
    assert name in outcome.error
    assert steps(outcome) == 0


@pytest.mark.parametrize("what", ["patches_replace", "object", "wrapper", "kind", "merge", "bypass"])
def test_refused_before_the_loader_and_the_stock_branch_runs_on(comfyui: ComfyUI, what: str) -> None:
    skip_without(comfyui, "LoraLoaderBypassModelOnly" if what == "bypass" else what)
    before = stock(comfyui)
    pair = Pair(FLUX)
    if what == "bypass":
        lora = {"lora_name": "bypassed.safetensors", "strength_model": 1.0}
        pair.add("again", "LoraLoaderBypassModelOnly", model="@file", **lora)
    elif what == "merge":
        pair.add("again", "ModelMergeSimple", model1="@file", model2="@file", ratio=0.5)
    else:
        pair.add("again", "TestReplace", model="@file", what=what)
    pair.on("taco", "again")
    pair.load()
    pair.sample()
    for node in ("sampler_stock", "save_stock"):
        del pair.nodes[node]
    outcome = comfyui.run(pair.nodes)
    assert outcome.kind == "error"
    assert outcome.error.startswith("TACO-DiT can't honour ")
    assert relative_error(stock(comfyui), before) == 0


def test_copies_on_other_gpus_before_the_loader_have_no_effect(comfyui: ComfyUI) -> None:
    """Nobody asked for a wrong picture: it runs, and the console says so."""
    skip_without(comfyui, "multigpu")
    seen = len(comfyui.log)
    pair = Pair(FLUX)
    pair.add("copied", "TestReplace", model="@file", what="multigpu before")
    pair.on("taco", "copied")
    pair.load()
    pair.sample(steps=1)
    outcome = comfyui.run(pair.nodes)
    assert outcome.kind == "success", outcome.error
    assert relative_error(comfyui.latent(pair.file("taco")), comfyui.latent(pair.file("stock"))) <= 1e-5
    assert "TACO-DiT: MultiGPU CFG Split has no effect: the daemon runs the model" in comfyui.log[seen:]


def test_another_device_behind_the_loader(comfyui: ComfyUI) -> None:
    """What samples may be elsewhere; the network stays in the daemon. On a CPU it is but a run."""
    if "SelectModelDevice" not in comfyui.nodes:
        pytest.skip("this version of ComfyUI has no Select Model Device")
    pair = Pair(FLUX)
    pair.load()
    pair.add("device", "SelectModelDevice", model="@loader", device="cpu")
    pair.on("taco", "device")
    pair.sample(steps=1)
    outcome = comfyui.run(pair.nodes)
    assert outcome.kind == "success", outcome.error
    assert relative_error(comfyui.latent(pair.file("taco")), comfyui.latent(pair.file("stock"))) <= 1e-5


def test_a_hook_that_needs_the_weights(comfyui: ComfyUI, comfyui_models: Path) -> None:
    """It is a difference from the weights, of another checkpoint."""
    save(FLUX, comfyui_models / "checkpoints", "hooked.safetensors", "model.diffusion_model.")
    pair = Pair(FLUX)
    pair.add("hook", "CreateHookModelAsLoraModelOnly", ckpt_name="hooked.safetensors", strength_model=1.0)
    pair.add("hooked", "ConditioningSetProperties", cond_NEW="@positive", hooks="@hook", strength=1.0)
    pair.nodes["hooked"]["inputs"]["set_cond_area"] = "default"
    pair.load()
    pair.sample(positive="@hooked")
    for node in ("sampler_stock", "save_stock"):
        del pair.nodes[node]
    outcome = comfyui.run(pair.nodes)
    assert outcome.kind == "error"
    assert outcome.error.startswith("TACO-DiT can't honour a patch of kind 'model_as_lora' on diffusion_model.")
    assert steps(outcome) == 0


def stock(comfyui: ComfyUI) -> Any:
    """A run of ComfyUI's own."""
    pair = Pair(FLUX)
    pair.sample(steps=1)
    for node in ("sampler_taco", "save_taco"):
        del pair.nodes[node]
    assert comfyui.run(pair.nodes).kind == "success"
    return comfyui.latent(pair.file("stock"))


def test_a_unet(comfyui: ComfyUI) -> None:
    pair = Pair(SD3)
    pair.add("file", "TestUNet")
    pair.load()
    pair.add("size", "TestSize", model="@loader")
    outcome = comfyui.run({name: pair.nodes[name] for name in ("file", "loader", "size")})
    assert outcome.error.startswith("TACO-DiT can't honour a BaseModel: it is no diffusion transformer")


def test_a_plain_model_in_our_sampler(comfyui: ComfyUI) -> None:
    pair = Pair(FLUX)
    pair.sample("TACODiTKSampler", enable_taco_dit=True, **SAMPLING)
    outcome = comfyui.run(pair.nodes)
    assert outcome.error.startswith("TACO-DiT can't honour a model that went through no TACO-DiT loader")


SAMPLING = {"seed": 1, "steps": 2, "cfg": 1.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}


def test_saving(comfyui: ComfyUI) -> None:
    pair = Pair(FLUX)
    pair.load()
    pair.add("saved", "ModelSave", model="@loader", filename_prefix="saved")
    outcome = comfyui.run({name: pair.nodes[name] for name in ("file", "loader", "saved")})
    assert outcome.error.startswith("TACO-DiT can't honour saving the model")


def test_no_daemon(comfyui: ComfyUI) -> None:
    pair = Pair(FLUX, endpoint="ipc:///nowhere/tacod.sock")
    pair.load()
    pair.sample()
    outcome = comfyui.run(pair.nodes)
    assert outcome.error.startswith("TACO-DiT not available: ")
    assert "systemctl start tacod" in outcome.error


def test_a_file_that_the_daemon_may_not_read(comfyui: ComfyUI) -> None:
    """It is sent, where that is allowed, and refused with both reasons where it isn't."""
    pair = Pair(FLUX)
    with Daemon(1) as closed:
        pair.load()
        pair.nodes["loader"]["inputs"]["endpoint"] = closed.endpoint
        pair.sample()
        outcome = comfyui.run(pair.nodes)
        assert outcome.kind == "error"
        assert "models.roots" in outcome.error
        assert "models.uploads" in outcome.error

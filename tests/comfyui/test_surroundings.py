"""What others have done to the same model, before and beside the loader: none of it is taken for this MODEL's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from comfyui_graphs import FLUX, SD3, Pair, TinyModel, save
from comfyui_server import ComfyUI, Outcome
from helpers import Daemon, Tiny, relative_error
from safetensors.torch import save_file

Both = Callable[..., Outcome]


def only(pair: Pair, branch: str) -> dict[str, Any]:
    """The graph of one branch."""
    other = {"stock": ("taco", "loader"), "taco": ("stock",)}[branch]
    return {name: node for name, node in pair.nodes.items() if not name.endswith(other)}


def test_what_another_branch_put_on_the_model_they_share(comfyui: ComfyUI) -> None:
    """ComfyUI leaves it there until the next one is loaded."""
    plain, shifted, pair = Pair(SD3), Pair(SD3), Pair(SD3)
    shifted.add("shifted", "ModelSamplingSD3", model="@file", shift=9.0)
    shifted.on("stock", "shifted")
    pair.load()
    for each, branch in ((plain, "stock"), (shifted, "stock"), (pair, "taco")):
        each.sample()
        outcome = comfyui.run(only(each, branch))
        assert outcome.kind == "success", outcome.error
    wanted = comfyui.latent(plain.file("stock"))
    assert relative_error(comfyui.latent(shifted.file("stock")), wanted) > 1e-3
    assert relative_error(comfyui.latent(pair.file("taco")), wanted) <= 1e-5


@pytest.mark.parametrize("before", [True, False], ids=["before the loader", "behind it"])
def test_a_compiled_model_runs_in_the_daemon(comfyui_models: Path, both: Both, before: bool) -> None:
    with Daemon(1, [comfyui_models]) as own, own.client() as client:
        pair = Pair(FLUX, endpoint=own.endpoint)
        pair.ranks["taco"] = 1
        if before:
            pair.on_model("TestCompile")
        pair.load()
        if not before:
            pair.on_model("TestCompile")
        pair.sample(steps=2, cfg=1.0)
        both(pair)
        assert client.stats()["forwards_total"] == 2


@pytest.mark.parametrize(("what", "named"), [("hook", "a hook on"), ("instance", "a replacement of")])
def test_code_that_was_put_into_the_network_is_refused(
    comfyui: ComfyUI, comfyui_models: Path, what: str, named: str
) -> None:
    touched = TinyModel(Tiny(f"touched_{what}", FLUX.tiny.config, seed=7), FLUX.width, FLUX.pooled)
    save(touched, comfyui_models / "diffusion_models")
    pair = Pair(touched)
    pair.add("again", "TestReplace", model="@file", what=what)
    pair.on("taco", "again")
    pair.load()
    pair.sample()
    outcome = comfyui.run(only(pair, "taco"))
    assert outcome.kind == "error"
    assert outcome.error.startswith(f"TACO-DiT can't honour {named} diffusion_model.img_in")


def test_a_file_that_changes_under_a_loaded_model(
    comfyui: ComfyUI, both: Both, comfyui_models: Path, tmp_path: Path
) -> None:
    """A LoRA is merged into the weights that ComfyUI has, and not into others."""
    folder = comfyui_models / "diffusion_models"
    changing = TinyModel(Tiny("changing", FLUX.tiny.config, seed=8), FLUX.width, FLUX.pooled)
    other = TinyModel(Tiny("changed", FLUX.tiny.config, seed=9), FLUX.width, FLUX.pooled)
    for each in (changing, other):
        save(each, folder)
    key = "lora_unet_double_blocks_0_img_attn_qkv"
    up, down = torch.randn(2, 240, 4, generator=torch.Generator().manual_seed(0))
    lora = {f"{key}.lora_up.weight": 0.1 * up, f"{key}.lora_down.weight": 0.1 * down[:80].T.contiguous()}
    (comfyui_models / "loras").mkdir(exist_ok=True)
    save_file(lora, comfyui_models / "loras" / "late.safetensors")
    with Daemon(1, [comfyui_models], {"models.uploads": str(tmp_path)}) as taking:
        pair = Pair(changing, endpoint=taking.endpoint)
        pair.ranks["taco"] = 1
        pair.load()
        pair.sample(save="_before")
        both(pair, "_before")
        # Another file in its place: the old one stays readable to those who have it open.
        (folder / other.tiny.file).replace(folder / changing.tiny.file)
        pair.on_model("LoraLoaderModelOnly", lora_name="late.safetensors", strength_model=1.0)
        pair.sample(save="_after")
        both(pair, "_before", "_after")
    before, after = (comfyui.latent(pair.file("taco", each)) for each in ("_before", "_after"))
    assert relative_error(after, before) > 1e-3


def test_a_file_that_was_replaced_and_a_model_that_made_room(both: Both, comfyui_models: Path, tmp_path: Path) -> None:
    """The daemon can't load it again; the weights are here, and the loader doesn't run again."""
    folder = comfyui_models / "diffusion_models"
    kept = TinyModel(Tiny("kept", FLUX.tiny.config, seed=10), FLUX.width, FLUX.pooled)
    other = TinyModel(Tiny("newer", FLUX.tiny.config, seed=11), FLUX.width, FLUX.pooled)
    for each in (kept, other):
        save(each, folder)
    with Daemon(1, [comfyui_models], {"models.uploads": str(tmp_path)}) as taking, taking.client() as client:
        pair = Pair(kept, endpoint=taking.endpoint)
        pair.ranks["taco"] = 1
        pair.load()
        pair.sample()
        both(pair)
        (folder / other.tiny.file).replace(folder / kept.tiny.file)
        for model in client.models():
            client.unload(model["id"])
        for name, node in pair.nodes.items():
            if name.startswith("sampler"):
                node["inputs"]["seed"] += 1
        both(pair)


def test_a_loader_that_is_off_behind_one_that_is_on(comfyui: ComfyUI, comfyui_models: Path) -> None:
    with Daemon(1, [comfyui_models]) as daemon, daemon.client() as client:
        pair = Pair(FLUX, endpoint=daemon.endpoint)
        pair.load()
        settings = {**pair.nodes["loader"]["inputs"], "model": "@loader", "enable_taco_dit": False}
        pair.add("off", "TACODiTModelLoader", **settings)
        pair.on("taco", "off")
        pair.sample()
        outcome = comfyui.run(pair.nodes)
        assert outcome.kind == "success", outcome.error
        assert client.stats()["forwards_total"] == 0
    stock, here = (comfyui.latent(pair.file(branch)) for branch in ("stock", "taco"))
    assert torch.equal(stock, here)


@pytest.mark.parametrize("before", [True, False], ids=["before the loader", "behind it"])
def test_switched_off_with_another_compute_dtype(comfyui: ComfyUI, before: bool) -> None:
    pair = Pair(FLUX)
    if before:
        pair.on_model("ModelComputeDtype", dtype="bf16")
    pair.load()
    if not before:
        pair.on_model("ModelComputeDtype", dtype="bf16")
    pair.sample()
    pair.nodes["sampler_taco"]["class_type"] = "TACODiTKSampler"
    pair.nodes["sampler_taco"]["inputs"]["enable_taco_dit"] = False
    outcome = comfyui.run(pair.nodes)
    assert outcome.kind == "success", outcome.error
    stock, taco = (comfyui.latent(pair.file(branch)) for branch in ("stock", "taco"))
    assert relative_error(taco, stock) <= 1e-5


def test_loaders_may_be_called_by_keyword(comfyui: ComfyUI) -> None:
    """Other packs do; what is noted of a file must not come in their way."""
    pair = Pair(FLUX)
    pair.nodes["file"] = {"class_type": "TestLoader", "inputs": {"unet_name": FLUX.tiny.file}}
    pair.load()
    pair.sample(steps=1)
    outcome = comfyui.run(only(pair, "taco"))
    assert outcome.kind == "success", outcome.error

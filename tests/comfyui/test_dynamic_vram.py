"""Dynamic VRAM, which ComfyUI has on by default on NVIDIA: layers without tensors until a file fills them.

On a CPU ComfyUI never turns it on, so the test nodes do. Weights then are what they are under it; how they come onto a
GPU isn't seen here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from comfyui_graphs import BROAD, FLUX, SD3, Pair, TinyModel, save
from comfyui_server import PATH, PYTHON, ComfyUI, Outcome
from helpers import Daemon, relative_error
from safetensors.torch import save_file
from test_end_to_end import WIDE, only
from test_loras import files, put_on, with_two

__all__ = ["files"]

Both = Callable[..., Outcome]
Pairs = Callable[[TinyModel], Pair]

SWITCH = "aimdo_enabled"


ON_GPU = bool(os.environ.get("COMFYUI_ON_GPU"))
"""Whether ComfyUI is to have a GPU here: then dynamic VRAM is its own, and nothing is set by hand."""
MOST = 1e-4 if ON_GPU else 1e-5
"""A GPU's matrix products and a CPU's differ in their order, and the ranks are on the CPU."""


@contextmanager
def started(endpoint: str, models: Path, *options: str) -> Iterator[ComfyUI]:
    """A ComfyUI with dynamic VRAM."""
    source = Path(PATH, "comfy", "memory_management.py")
    if not source.is_file() or SWITCH not in source.read_text():
        pytest.skip("this version of ComfyUI has no dynamic VRAM")
    with pytest.MonkeyPatch.context() as patch:
        if not ON_GPU:
            patch.setenv("TACO_DIT_TEST_DYNAMIC_VRAM", "1")
        server = ComfyUI(PATH, PYTHON, endpoint, models, *options)
        server.on_gpu = ON_GPU
        with server as comfyui:
            assert not ON_GPU or "DynamicVRAM support detected and enabled" in comfyui.log
            yield comfyui


@pytest.fixture(scope="module")
def dynamic(endpoints: Callable[[int], Daemon], comfyui_models: Path) -> Iterator[ComfyUI]:
    """One that computes in fp32, as the daemon's ranks do on a CPU."""
    with started(endpoints(3).endpoint, comfyui_models, *(["--force-fp32"] if ON_GPU else [])) as comfyui:
        yield comfyui


@pytest.mark.parametrize("where", ["before", "after", "around"])
def test_two_loras(both: Both, pair: Pairs, dynamic: ComfyUI, where: str) -> None:
    both(with_two(pair(FLUX), where, 0.8), most=MOST, server=dynamic)


@pytest.mark.parametrize("model", [FLUX, SD3], ids=lambda model: model.tiny.name)
def test_a_lora_behind_the_header_only_loader_and_a_second_run(
    both: Both, pair: Pairs, dynamic: ComfyUI, model: TinyModel
) -> None:
    """The model is freed between the runs, as by the button on the page."""
    run = pair(model)
    run.load("TACODiTUNETLoader", unet_name=model.tiny.file)
    put_on(run, "sd3" if model is SD3 else "comfyui", 1.1)
    run.sample(save="_first", steps=2)
    both(run, "_first", most=MOST, server=dynamic)
    dynamic.post("/free", {"unload_models": True, "free_memory": True})
    run.sample(save="_second", steps=3)
    both(run, "_second", most=MOST, server=dynamic)


@pytest.mark.parametrize("model", [BROAD, FLUX], ids=lambda model: model.tiny.name)
def test_weights_that_the_loader_was_told_to_round(
    comfyui: ComfyUI, dynamic: ComfyUI, comfyui_models: Path, tmp_path: Path, model: TinyModel
) -> None:
    """They lie in the file's dtype, and each layer is rounded as it is used: so they are sent, rounded.

    On a CPU nothing rounds them for the stock branch, so that runs where ComfyUI rounds what it loads.
    """
    if model is FLUX and not ON_GPU:
        pytest.skip("COMFYUI_ON_GPU is not set: without dynamic VRAM of its own ComfyUI rounds small layers, too")
    save(model, comfyui_models / "diffusion_models")
    with Daemon(1, [comfyui_models], settings={"models.uploads": str(tmp_path)}) as taking:
        run = Pair(model, endpoint=taking.endpoint)
        run.nodes["file"]["inputs"]["weight_dtype"] = "fp8_e4m3fn"
        run.load()
        run.sample(steps=2)
        run.add("info", "TACODiTInfoDisplay", info="@loader#1")
        if not ON_GPU:
            # There a patcher is never a dynamic one, and nothing would be rounded.
            run.add("marked", "TestDynamic", model="@file")
            run.nodes["loader"]["inputs"]["model"] = ["marked", 0]
        rounding = dynamic if ON_GPU else comfyui
        ours, stock = dynamic.run(only(run, "taco")), rounding.run(only(run, "stock"))
    assert (ours.error, stock.error) == ("", "")
    assert "Weights: sent to " in ours.texts["info"]
    assert relative_error(dynamic.latent(run.file("taco")), rounding.latent(run.file("stock"))) <= MOST


@pytest.fixture(scope="module")
def users(endpoints: Callable[[int], Daemon], comfyui_models: Path) -> Iterator[ComfyUI]:
    """One as users have it on their GPU, which computes in bf16."""
    if not ON_GPU:
        pytest.skip("COMFYUI_ON_GPU is not set: on a CPU ComfyUI computes in fp32")
    save(WIDE, comfyui_models / "diffusion_models")
    random = torch.Generator().manual_seed(1)
    # On layers whose change isn't mixed up with what bf16 rounds on its way through the blocks.
    lora = {
        f"diffusion_model.{layer}.lora_{part}.weight": 0.04 * torch.randn(shape, generator=random)
        for layer, outputs, inputs in (("img_in", 3072, 64), ("final_layer.linear", 64, 3072))
        for part, shape in (("up", (outputs, 8)), ("down", (8, inputs)))
    }
    save_file(lora, comfyui_models / "loras" / "wide.safetensors")
    with started(endpoints(3).endpoint, comfyui_models) as comfyui:
        yield comfyui


@pytest.mark.parametrize("where", ["before", "after", "around"])
def test_as_users_have_it(users: ComfyUI, where: str) -> None:
    """At Flux.1's width, stock and ours in one graph: what the LoRA does is seen, and no other difference."""
    run = Pair(WIDE)
    run.sample(save="_without", steps=3, cfg=1.0)
    if where in ("before", "around"):
        put_on(run, "wide", 1.0)
    run.load()
    if where in ("after", "around"):
        put_on(run, "wide", 1.0)
    run.sample(save="_with", steps=3, cfg=1.0)
    outcome = users.run(run.nodes)
    assert outcome.kind == "success", outcome.error
    plain, stock, ours = (
        users.latent(run.file(*of)) for of in (("stock", "_without"), ("stock", "_with"), ("taco", "_with"))
    )
    error, effect = relative_error(ours, stock), relative_error(stock, plain)
    print(f"a LoRA {where} the loader, in bf16: {error:.1e} from stock, which it moved by {effect:.1e}")
    assert error < 0.02 < effect / 10

"""Dynamic VRAM, which ComfyUI has on by default on NVIDIA: layers without tensors until a file fills them.

On a CPU ComfyUI never turns it on, so the test nodes do. Weights then are what they are under it; how they come onto a
GPU isn't seen here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from comfyui_graphs import FLUX, SD3, Pair, TinyModel
from comfyui_server import ComfyUI, Outcome
from conftest import PATH, PYTHON
from helpers import Daemon, relative_error
from test_loras import files, put_on

__all__ = ["files"]

Both = Callable[..., Outcome]
Pairs = Callable[[TinyModel], Pair]

SWITCH = "aimdo_enabled"


@pytest.fixture(scope="module")
def dynamic(endpoints: Callable[[int], Daemon], comfyui_models: Path) -> Iterator[ComfyUI]:
    """A ComfyUI whose layers are filled as dynamic VRAM fills them."""
    source = Path(PATH, "comfy", "memory_management.py")
    if not source.is_file() or SWITCH not in source.read_text():
        pytest.skip("this version of ComfyUI has no dynamic VRAM")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TACO_DIT_TEST_DYNAMIC_VRAM", "1")
        with ComfyUI(PATH, PYTHON, endpoints(3).endpoint, comfyui_models) as comfyui:
            yield comfyui


@pytest.mark.parametrize("where", ["before", "after", "around"])
def test_two_loras(both: Both, pair: Pairs, dynamic: ComfyUI, where: str) -> None:
    run = pair(FLUX)
    if where == "after":
        run.load()
    put_on(run, "kohya", 0.8)
    if where == "around":
        run.load()
    put_on(run, "diffusers", 1.3)
    if where == "before":
        run.load()
    run.sample(steps=3)
    both(run, server=dynamic)


@pytest.mark.parametrize("model", [FLUX, SD3], ids=lambda model: model.tiny.name)
def test_a_lora_behind_the_header_only_loader_and_a_second_run(
    both: Both, pair: Pairs, dynamic: ComfyUI, model: TinyModel
) -> None:
    """The model is freed between the runs, as by the button on the page."""
    run = pair(model)
    run.load("TACODiTUNETLoader", unet_name=model.tiny.file)
    put_on(run, "sd3" if model is SD3 else "comfyui", 1.1)
    run.sample(save="_first", steps=2)
    both(run, "_first", server=dynamic)
    dynamic.post("/free", {"unload_models": True, "free_memory": True})
    run.sample(save="_second", steps=3)
    both(run, "_second", server=dynamic)


def test_weights_that_the_loader_was_told_to_round(
    comfyui: ComfyUI, dynamic: ComfyUI, comfyui_models: Path, tmp_path: Path
) -> None:
    """They lie in the file's dtype, and each layer is rounded as it is used: so they are sent, rounded.

    On a CPU nothing rounds them for the stock branch, so that runs where ComfyUI rounds what it loads.
    """
    with Daemon(1, [comfyui_models], settings={"models.uploads": str(tmp_path)}) as taking:
        run = Pair(FLUX, endpoint=taking.endpoint)
        run.nodes["file"]["inputs"]["weight_dtype"] = "fp8_e4m3fn"
        run.load()
        run.sample(steps=2)
        run.add("info", "TACODiTInfoDisplay", info="@loader#1")
        stock = [name for name in run.nodes if name.endswith("_stock")]
        ours = [name for name in run.nodes if name.endswith("_taco") or name in ("loader", "info")]
        outcomes = [
            server.run({name: node for name, node in run.nodes.items() if name not in left_out})
            for server, left_out in ((comfyui, ours), (dynamic, stock))
        ]
    assert [outcome.error for outcome in outcomes] == ["", ""]
    assert "Weights: sent to " in outcomes[1].texts["info"]
    assert relative_error(dynamic.latent(run.file("taco")), comfyui.latent(run.file("stock"))) <= 1e-5

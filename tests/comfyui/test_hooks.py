"""A ComfyUI that has moved or renamed what the nodes hold on to: its console names it, and the rest works."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from comfyui_graphs import FLUX, Pair, TinyModel
from comfyui_server import PATH, PYTHON, ComfyUI, Outcome
from helpers import Daemon
from safetensors.torch import save_file

Both = Callable[..., Outcome]

RENAMED = (
    "send_progress_text",
    "current_loaded_models",
    "process_unet_state_dict",
    "convert_diffusers_mmdit",
    "get_combined_hook_patches",
    "OUTER_SAMPLE",
    "WrapperExecutor",
)
TOLD = (
    "nodes.KSampler: there is no TACO-DiT KSampler",
    "server.PromptServer.send_progress_text: loading shows no text in the node's body",
    "comfy.model_management.current_loaded_models: weights that ComfyUI has on its GPU stay there",
    "comfy.supported_models_base.BASE.process_unet_state_dict: weights that ComfyUI renames are not found",
    "comfy.model_detection.convert_diffusers_mmdit: TACO-DiT UNET Loader knows no files in diffusers' names",
    "comfy.model_patcher.ModelPatcher.get_combined_hook_patches: hooks on the conditioning",
    "comfy.patcher_extension.WrappersMP.OUTER_SAMPLE: statistics have no steps",
    "comfy.patcher_extension.WrapperExecutor.new_class_executor: EasyCache and other wrappers around the network are",
)


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of ComfyUI in which these names are others throughout, as an update might make them."""
    copy = tmp_path_factory.mktemp("changed") / "ComfyUI"
    shutil.copytree(PATH, copy, ignore=shutil.ignore_patterns(".*", "__pycache__", "tests*"))
    word = re.compile(rf"\b({'|'.join(RENAMED)})\b")
    for file in copy.rglob("*.py"):
        text = file.read_text(errors="surrogateescape")
        if word.search(text):
            file.write_text(word.sub(r"\1_of_late", text), errors="surrogateescape")
    with (copy / "nodes.py").open("a") as file:
        file.write("\ndel KSampler\n")
    return copy


@pytest.fixture(scope="module")
def taking(comfyui_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon that takes what isn't found."""
    uploads = str(tmp_path_factory.mktemp("uploads"))
    with Daemon(1, [comfyui_models], settings={"models.uploads": uploads}) as daemon:
        yield daemon


@pytest.fixture(scope="module")
def lacking(changed: Path, taking: Daemon, comfyui_models: Path) -> Iterator[ComfyUI]:
    with ComfyUI(str(changed), PYTHON, taking.endpoint, comfyui_models) as comfyui:
        yield comfyui


def test_what_is_missing_is_named_at_start(lacking: ComfyUI) -> None:
    assert [line for line in TOLD if f"TACO-DiT: this ComfyUI has no {line}" not in lacking.log] == []
    offered = {name for name in lacking.nodes if name.startswith("TACODiT")}
    assert offered == {"TACODiTModelLoader", "TACODiTUNETLoader", "TACODiTInfoDisplay", "TACODiTStatsDisplay"}


@pytest.mark.parametrize("loader", ["TACODiTModelLoader", "TACODiTUNETLoader"])
def test_the_rest_works(both: Both, lacking: ComfyUI, taking: Daemon, loader: str) -> None:
    pair = Pair(FLUX, endpoint=taking.endpoint)
    pair.ranks["taco"] = 1
    pair.load(loader, **({"unet_name": FLUX.tiny.file} if loader == "TACODiTUNETLoader" else {}))
    pair.sample(steps=2)
    both(pair, server=lacking)


def test_a_hook_on_the_conditioning_is_refused(lacking: ComfyUI, taking: Daemon, comfyui_models: Path) -> None:
    """It would be dropped: the daemon can't be told of it."""
    pair = _hooked(FLUX, taking.endpoint, comfyui_models)
    outcome = lacking.run(pair.nodes)
    assert outcome.kind == "error"
    assert outcome.error.startswith("TACO-DiT can't honour hooks on the conditioning")


def _hooked(model: TinyModel, endpoint: str, models: Path) -> Pair:
    (models / "loras").mkdir(exist_ok=True)
    key = "diffusion_model.img_in"
    lora = {f"{key}.lora_up.weight": torch.ones(80, 2), f"{key}.lora_down.weight": torch.ones(2, 64)}
    save_file(lora, models / "loras" / "hooked.safetensors")
    pair = Pair(model, endpoint=endpoint)
    pair.add("hook", "CreateHookLoraModelOnly", lora_name="hooked.safetensors", strength_model=1.0)
    pair.add("hooked", "ConditioningSetProperties", cond_NEW="@positive", hooks="@hook", strength=1.0)
    pair.nodes["hooked"]["inputs"]["set_cond_area"] = "default"
    pair.load()
    pair.sample(positive="@hooked", steps=1)
    for node in ("sampler_stock", "save_stock"):
        del pair.nodes[node]
    return pair

"""Where a MODEL's weights come from: a file that is found, and trusted only if it holds what the MODEL holds."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from comfyui_graphs import FLUX, SD3, Pair, TinyModel, save
from comfyui_server import ComfyUI, Outcome
from helpers import Daemon, Tiny
from safetensors.torch import load_file, save_file

Both = Callable[..., Outcome]
Pairs = Callable[[TinyModel], Pair]


def shown(pair: Pair) -> Pair:
    """With the loader's info shown."""
    pair.add("info", "TACODiTInfoDisplay", info="@loader#1")
    return pair


def test_found_by_the_graph(both: Both, pair: Pairs, comfyui_models: Path) -> None:
    """What was noted on the MODEL is gone: the loader further up says which file it was."""
    run = pair(SD3)
    run.on_model("TestForget")
    run.load()
    run.sample(steps=2)
    outcome = both(shown(run))
    path = comfyui_models / "diffusion_models" / SD3.tiny.file
    assert f"Weights: read by the daemon from {path.resolve()}" in outcome.texts["info"]


def test_a_link_into_a_hubs_cache(both: Both, pair: Pairs, comfyui_models: Path) -> None:
    """The file that it leads to has no ending."""
    blobs = comfyui_models / "blobs"
    blobs.mkdir()
    save(FLUX, blobs, "0123abcd")
    link = comfyui_models / "diffusion_models" / "linked.safetensors"
    link.symlink_to(blobs / "0123abcd")
    run = pair(FLUX)
    run.nodes["file"]["inputs"]["unet_name"] = link.name
    run.load()
    run.sample(steps=1)
    outcome = both(shown(run))
    assert f"Weights: read by the daemon from {(blobs / '0123abcd').resolve()}" in outcome.texts["info"]


@pytest.fixture
def taking(comfyui_models: Path, tmp_path: Path) -> Iterator[Daemon]:
    """A daemon that takes what it can't read."""
    with Daemon(1, [comfyui_models], settings={"models.uploads": str(tmp_path)}) as daemon:
        yield daemon


def sampled(model: TinyModel, endpoint: str, **loader: Any) -> Pair:
    """A short run beside stock, its info shown."""
    run = Pair(model, endpoint=endpoint)
    run.nodes["file"]["inputs"] |= loader
    run.load()
    run.sample(steps=2)
    return shown(run)


@pytest.mark.parametrize("what", ["all", "values"])
def test_a_file_that_was_replaced(
    comfyui: ComfyUI, both: Both, comfyui_models: Path, taking: Daemon, what: str
) -> None:
    """ComfyUI still has the weights that were in it; so they are what is sent. Values lie behind queries and keys."""
    models = comfyui_models / "diffusion_models"
    first = TinyModel(Tiny(f"replaced_{what}", FLUX.tiny.config, seed=1), FLUX.width, FLUX.pooled)
    second = TinyModel(Tiny("other", FLUX.tiny.config, seed=2 if what == "all" else 1), FLUX.width, FLUX.pooled)
    save(first, models)
    run = sampled(first, taking.endpoint)
    run.ranks["taco"] = 1
    stock = {
        name: run.nodes[name] for name in ("file", "positive", "negative", "latent", "sampler_stock", "save_stock")
    }
    assert comfyui.run(stock).kind == "success"
    save(second, models)
    if what == "values":
        state = load_file(models / second.tiny.file)
        merged = state["double_blocks.0.img_attn.qkv.weight"]
        merged[len(merged) // 3 * 2 :] *= 1.1
        save_file(state, models / second.tiny.file, metadata={"tacod.config": json.dumps(FLUX.tiny.config)})
    # Another file in its place: the old one stays readable to those who have it open.
    (models / second.tiny.file).replace(models / first.tiny.file)
    outcome = both(run)
    assert "Weights: sent to " in outcome.texts["info"]


def test_rounded_by_the_loader(both: Both, taking: Daemon) -> None:
    """The file holds more than the MODEL does."""
    run = sampled(FLUX, taking.endpoint, weight_dtype="fp8_e4m3fn")
    run.ranks["taco"] = 1
    outcome = both(run)
    assert "Weights: sent to " in outcome.texts["info"]


def save_eight_bits(model: TinyModel, path: Path, scaled: bool) -> None:
    """Matrices in fp8, as published files have them: rounded, or scaled with the scales beside.

    The rest are numbers that fp8 has, for ComfyUI 0.3.64 rounds the biases beside scaled matrices.
    """
    tensors = {}
    for key, weight in model.tiny.model.state_dict().items():
        if weight.ndim != 2:
            tensors[key] = weight.to(torch.float8_e4m3fn).float()
            continue
        scale = weight.abs().max() / 448 if scaled else torch.tensor(1.0)
        tensors[key] = (weight / scale).to(torch.float8_e4m3fn)
        if scaled:
            tensors[key.removesuffix("weight") + "scale_weight"] = scale
    if scaled:
        tensors["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    save_file(tensors, path, metadata={"tacod.config": json.dumps(model.tiny.config)})


@pytest.fixture
def _eight_bits(comfyui: ComfyUI) -> None:
    if "fp8 and fp4 support will not be available" in comfyui.log:
        pytest.skip("this ComfyUI needs the package comfy-kitchen for scaled weights")


@pytest.mark.usefixtures("_eight_bits")
@pytest.mark.parametrize("loader", ["TACODiTModelLoader", "TACODiTUNETLoader"])
@pytest.mark.parametrize("kind", ["plain", "scaled"])
@pytest.mark.parametrize("model", [FLUX, SD3], ids=lambda model: model.tiny.name)
def test_eight_bits(both: Both, pair: Pairs, comfyui_models: Path, model: TinyModel, kind: str, loader: str) -> None:
    """A file with 8-bit weights is read by the daemon, through either loader."""
    path = comfyui_models / "diffusion_models" / f"{model.tiny.name}_fp8_{kind}.safetensors"
    save_eight_bits(model, path, kind == "scaled")
    run = pair(model)
    run.add("file", "UNETLoader", unet_name=path.name, weight_dtype="default")
    run.load(loader, **({"unet_name": path.name} if loader == "TACODiTUNETLoader" else {}))
    run.sample()
    outcome = both(shown(run))
    assert f"Weights: read by the daemon from {path.resolve()}" in outcome.texts["info"]


def test_rounded_to_another_kind_of_eight_bits(both: Both, comfyui_models: Path, taking: Daemon) -> None:
    """The file holds as many bits, but others."""
    path = comfyui_models / "diffusion_models" / "e4m3.safetensors"
    save_eight_bits(FLUX, path, scaled=False)
    run = sampled(FLUX, taking.endpoint, unet_name=path.name, weight_dtype="fp8_e5m2")
    run.ranks["taco"] = 1
    outcome = both(run)
    assert "Weights: sent to " in outcome.texts["info"]


def test_hints_that_lead_nowhere(both: Both, pair: Pairs, comfyui_models: Path) -> None:
    """What a MODEL's notes name is no model file, or another one's; the graph has the right one."""
    models = comfyui_models / "diffusion_models"
    (models / "broken.safetensors").write_bytes(bytes(100))
    (models / "broken.gguf").write_bytes(b"GGUF" + bytes(60))
    run = pair(SD3)
    hints = [str(models / name) for name in ("broken.safetensors", "broken.gguf", FLUX.tiny.file, "gone.safetensors")]
    run.on_model("TestHints", paths="\n".join(hints))
    run.load()
    run.sample(steps=1)
    outcome = both(shown(run))
    assert f"Weights: read by the daemon from {(models / SD3.tiny.file).resolve()}" in outcome.texts["info"]


@pytest.mark.usefixtures("_eight_bits")
@pytest.mark.parametrize("model", [FLUX, SD3], ids=lambda model: model.tiny.name)
def test_eight_bits_are_sent(both: Both, comfyui_models: Path, tmp_path: Path, model: TinyModel) -> None:
    """Scaled weights and their scales, to a daemon that can't read the file."""
    path = comfyui_models / "diffusion_models" / f"{model.tiny.name}_fp8_sent.safetensors"
    save_eight_bits(model, path, scaled=True)
    with Daemon(1, settings={"models.uploads": str(tmp_path)}) as far:
        run = sampled(model, far.endpoint, unet_name=path.name)
        run.ranks["taco"] = 1
        outcome = both(run)
    assert "Weights: sent to " in outcome.texts["info"]
    (sent,) = tmp_path.glob("*.safetensors")
    assert sent.stat().st_size < 1.2 * path.stat().st_size


def test_weights_that_were_sent_and_made_room_are_sent_again(both: Both, tmp_path: Path) -> None:
    """The loader doesn't run again, since nothing in the graph before the sampler has changed."""
    with Daemon(1, settings={"models.uploads": str(tmp_path)}) as far, far.client() as client:
        run = sampled(FLUX, far.endpoint)
        run.ranks["taco"] = 1
        both(run)
        for model in client.models():
            client.unload(model["id"])
        (sent,) = tmp_path.glob("*.safetensors")
        sent.unlink()
        for name, node in run.nodes.items():
            if name.startswith("sampler"):
                node["inputs"]["seed"] += 1
        both(run)
        assert sent.exists()

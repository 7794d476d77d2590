"""GGUF files: through ComfyUI-GGUF's loaders with ours behind them, and through ours alone."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from comfyui_graphs import WHOLE_BLOCKS, Pair, TinyModel
from comfyui_server import PATH, PYTHON, ComfyUI, Outcome
from gguf_files import random_blocks
from helpers import Daemon
from safetensors.torch import save_file

Both = Callable[..., Outcome]

PACK = os.environ.get("COMFYUI_GGUF", "")
FLUX, SD3 = WHOLE_BLOCKS
KINDS = {
    "flux_Q8_0": (FLUX, "Q8_0", "Q8_0"),
    "flux_Q4_K_M": (FLUX, "Q4_K", "Q6_K"),
    "flux_Q2_K": (FLUX, "Q2_K", "Q3_K"),
    "flux_Q4_0": (FLUX, "Q4_0", "Q5_1"),
    "flux_IQ4": (FLUX, "IQ4_NL", "IQ4_XS"),
    "flux_BF16": (FLUX, "BF16", "F16"),
    "sd3_Q5_K_M": (SD3, "Q5_K", "Q5_0"),
}
"""What most matrices are in, and what those that widen the tokens are in: published files are mixtures, too."""
PLAIN = ("img_in", "txt_in", "time_in", "vector_in", "guidance_in", "final_layer")
PLAIN += ("x_embedder", "t_embedder", "y_embedder", "context_embedder", "pos_embed")
"""What the pack's tools leave in F32."""


@pytest.fixture(scope="module")
def models(comfyui_models: Path) -> Path:
    """A GGUF file of each kind."""
    for name, (model, most, some) in KINDS.items():
        write(comfyui_models / "diffusion_models" / f"{name}.gguf", model, most, some)
    (comfyui_models / "loras").mkdir(exist_ok=True)
    random = torch.Generator().manual_seed(3)
    up, down = (0.05 * torch.randn(shape, generator=random) for shape in ((768, 4), (4, 256)))
    key = "diffusion_model.double_blocks.0.img_attn.qkv"
    lora = {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down}
    save_file(lora, comfyui_models / "loras" / "gguf.safetensors")
    return comfyui_models


def write(path: Path, model: TinyModel, most: str, some: str) -> None:
    writer = gguf.GGUFWriter(path, "sd3" if model is SD3 else "flux")
    writer.add_string("tacod.config", json.dumps(model.tiny.config))
    for name, weight in model.tiny.model.state_dict().items():
        kind = "F32"
        if weight.ndim == 2 and not name.startswith(PLAIN):
            kind = some if weight.shape[0] == 4 * weight.shape[1] or weight.shape[0] == 256 * 7 else most
        writer.add_tensor(name, packed(weight, kind), raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def packed(weight: torch.Tensor, kind: str) -> np.ndarray:
    """A matrix as blocks: quantized where the package can, else random ones whose numbers are as large as its own."""
    numbers = np.ascontiguousarray(weight.float().numpy())
    try:
        return gguf.quants.quantize(numbers, gguf.GGMLQuantizationType[kind])
    except NotImplementedError:
        return random_blocks(kind, *weight.shape, seed=weight.shape[0])


@pytest.fixture(scope="module")
def packed_comfyui(models: Path, endpoints: Callable[[int], Daemon]) -> Iterator[ComfyUI]:
    """A ComfyUI with the pack."""
    if not PACK:
        pytest.skip("set COMFYUI_GGUF to a checkout of city96/ComfyUI-GGUF, and have gguf in COMFYUI_PYTHON")
    server = ComfyUI(PATH, PYTHON, endpoints(3).endpoint, models)
    server.packs = [Path(PACK)]
    with server as comfyui:
        yield comfyui


def through_the_pack(name: str, endpoints: dict[str, tuple[int, str]] | None = None) -> Pair:
    run = Pair(KINDS[name][0], endpoints or {})
    run.add("file", "UnetLoaderGGUFAdvanced", unet_name=f"{name}.gguf", dequant_dtype="float32")
    run.nodes["file"]["inputs"] |= {"patch_dtype": "default", "patch_on_device": False}
    return run


@pytest.mark.parametrize("name", KINDS)
def test_a_model_from_the_pack(
    both: Both, packed_comfyui: ComfyUI, endpoints: Callable[[int], Daemon], models: Path, name: str
) -> None:
    run = through_the_pack(name, {f"taco{ranks}": (ranks, endpoints(ranks).endpoint) for ranks in (1, 2)})
    run.load()
    run.sample(steps=2)
    run.add("info", "TACODiTInfoDisplay", info="@loader_taco1#1")
    outcome = both(run, server=packed_comfyui)
    path = (models / "diffusion_models" / f"{name}.gguf").resolve()
    assert f"Weights: read by the daemon from {path}" in outcome.texts["info"]
    assert "Note: " not in outcome.texts["info"]


@pytest.mark.parametrize("where", ["before", "after"])
def test_a_lora_on_it(both: Both, packed_comfyui: ComfyUI, where: str) -> None:
    run = through_the_pack("flux_Q4_K_M")
    if where == "after":
        run.load()
    run.on_model("LoraLoaderModelOnly", lora_name="gguf.safetensors", strength_model=0.9)
    if where == "before":
        run.load()
    run.sample(steps=2)
    both(run, server=packed_comfyui)


def test_other_numbers_are_said(packed_comfyui: ComfyUI) -> None:
    """By default the pack dequantizes in fp16."""
    run = through_the_pack("flux_Q8_0")
    run.add("file", "UnetLoaderGGUF", unet_name="flux_Q8_0.gguf")
    run.load()
    run.sample(steps=2)
    run.add("info", "TACODiTInfoDisplay", info="@loader#1")
    outcome = packed_comfyui.run(run.nodes)
    assert outcome.kind == "success", outcome.error
    assert (
        "Note: the daemon dequantizes GGUF weights in fp32, and ComfyUI-GGUF's loader in float16"
        in (outcome.texts["info"])
    )


def test_found_by_its_memory_map(both: Both, packed_comfyui: ComfyUI, models: Path) -> None:
    """Nothing in the graph names the file."""
    run = through_the_pack("flux_Q8_0")
    run.add("forgotten", "TestUnnamed", file="@file")
    for branch in run.branches:
        run.on(branch, "forgotten")
    run.load()
    run.sample(steps=1)
    run.add("info", "TACODiTInfoDisplay", info="@loader#1")
    outcome = both(run, server=packed_comfyui)
    assert f"Weights: read by the daemon from {models.resolve()}" in outcome.texts["info"]


@pytest.mark.parametrize("name", KINDS)
def test_by_its_header(both: Both, packed_comfyui: ComfyUI, name: str) -> None:
    """TACO-DiT UNET Loader, beside the pack's."""
    run = through_the_pack(name)
    run.load("TACODiTUNETLoader", unet_name=f"{name}.gguf")
    run.sample(steps=2)
    both(run, server=packed_comfyui)


def test_the_pack_is_not_needed(comfyui: ComfyUI, models: Path) -> None:
    """ComfyUI itself reads no GGUF files; switched off it says so."""
    inputs = comfyui.get("/object_info/TACODiTUNETLoader")["TACODiTUNETLoader"]["input"]["required"]
    assert "flux_Q8_0.gguf" in inputs["unet_name"][0]
    run = Pair(FLUX)
    del run.nodes["file"]
    run.load("TACODiTUNETLoader", unet_name="flux_Q8_0.gguf")
    run.sample(steps=1)
    graph = {name: node for name, node in run.nodes.items() if not name.endswith("_stock")}
    assert comfyui.run(graph).kind == "success"
    graph["loader"]["inputs"]["enable_taco_dit"] = False
    outcome = comfyui.run(graph)
    assert outcome.error.startswith("TACO-DiT can't honour flux_Q8_0.gguf with enable_taco_dit off")
    assert "Unet Loader (GGUF)" in outcome.error


def test_out_of_the_daemons_reach(packed_comfyui: ComfyUI) -> None:
    """It can't be sent: the daemon reads GGUF files itself."""
    with Daemon(1) as far:
        run = through_the_pack("flux_Q8_0", {"far": (1, far.endpoint)})
        run.load()
        run.sample(steps=1)
        graph = {name: node for name, node in run.nodes.items() if not name.endswith("_stock")}
        outcome = packed_comfyui.run(graph)
    assert outcome.kind == "error"
    assert "models.roots" in outcome.error

"""The example workflows: each is what ComfyUI takes, and runs with stand-ins for the files that one has to download."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from comfyui_graphs import FLUX, PIXART
from comfyui_server import NODES, ComfyUI, Graph

from tacod import embedded

WORKFLOWS = sorted((NODES / "example_workflows").glob("*.json"))
CONTROL = "control_after_generate"


def to_api(workflow: dict[str, Any]) -> Graph:
    """A saved workflow in API form, as the page makes it of one."""
    links = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    graph: Graph = {}
    for node in workflow["nodes"]:
        values = iter(node.get("widgets_values", []))
        inputs: dict[str, Any] = {}
        for each in node.get("inputs", []):
            if "widget" in each:
                inputs[each["name"]] = next(values)
                if each["name"] == "seed":
                    next(values)
            if each.get("link") is not None:
                inputs[each["name"]] = links[each["link"]]
        graph[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return graph


@pytest.fixture(params=WORKFLOWS, ids=lambda path: path.stem)
def graph(request: pytest.FixtureRequest) -> Graph:
    return to_api(json.loads(request.param.read_text()))


def test_there_is_one_for_each_family_and_use() -> None:
    assert {path.stem for path in WORKFLOWS} == {
        *("flux1_basic", "sd35_basic", "pixart_sigma_basic", "flux1_lora", "flux1_kontext"),
    }
    for path in WORKFLOWS:
        assert path.with_suffix(".jpg").is_file()


def test_only_files_are_missing(comfyui: ComfyUI, graph: Graph) -> None:
    """ComfyUI's own check of the graph finds nothing but files that aren't there."""
    with pytest.raises(AssertionError) as caught:
        comfyui.post("/prompt", {"prompt": graph})
    for node in json.loads(str(caught.value))["node_errors"].values():
        for error in node["errors"]:
            assert error["type"] in ("value_not_in_list", "custom_validation_failed"), error


def test_each_runs_with_stand_ins(comfyui: ComfyUI, comfyui_models: Path, graph: Graph) -> None:
    """Loaders, text encoders and the VAE are tiny ones; what is between them is as it was saved."""
    shutil.copy(embedded.PATH, comfyui_models / "checkpoints")
    tiny = PIXART if any("PixArt" in str(node["inputs"]) for node in graph.values()) else FLUX
    shapes = False
    for node in graph.values():
        kind, inputs = node["class_type"], node["inputs"]
        if kind == "CheckpointLoaderSimple" and "sd3.5" in inputs["ckpt_name"]:
            inputs["ckpt_name"], shapes = embedded.PATH.name, True
        elif kind == "CheckpointLoaderSimple":
            node |= {"class_type": "TestCheckpoint", "inputs": {"unet_name": tiny.tiny.file}}
        elif kind == "TACODiTUNETLoader":
            inputs["unet_name"] = tiny.tiny.file
        elif kind in ("CLIPLoader", "DualCLIPLoader"):
            node |= {"class_type": "TestClip", "inputs": {"width": tiny.width, "pooled": tiny.pooled}}
        elif kind == "VAELoader":
            node |= {"class_type": "TestImageVAE", "inputs": {"channels": tiny.channels}}
        elif kind == "LoadImage":
            node |= {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 9}}
        elif kind == "FluxKontextImageScale":
            node |= {"class_type": "ImageScale", "inputs": {**inputs, **SMALL}}
        elif kind == "LoraLoaderModelOnly":
            node |= {"class_type": "TestLora", "inputs": {"model": inputs["model"]}}
    size = 256 if shapes else 320 if tiny is PIXART else 64
    for node in graph.values():
        if node["class_type"].startswith("Empty") and "Latent" in node["class_type"]:
            node["inputs"] |= {"width": size, "height": size}
        elif node["class_type"] == "CLIPTextEncode" and shapes and node["inputs"]["text"]:
            node["inputs"]["text"] = embedded.PROMPTS[0]
        elif node["class_type"] == "TACODiTKSampler":
            node["inputs"]["steps"] = 3
    outcome = comfyui.run(graph)
    assert outcome.kind == "success", outcome.error
    texts = list(outcome.texts.values())
    assert any("Plan: sequence 3" in text for text in texts)
    assert any("Steps: 3 in " in text for text in texts)
    images = list((comfyui.base / "output").glob("TACO-DiT_*.png"))
    assert images


SMALL = {"upscale_method": "area", "width": 64, "height": 64, "crop": "disabled"}

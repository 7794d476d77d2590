"""The example workflows: each is what ComfyUI takes, and runs with stand-ins for the files that one has to download."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from comfyui_graphs import FLUX, PIXART, TinyModel, save_lora
from comfyui_server import NODES, ComfyUI, Graph
from image_cases import CASES, Sizes, write
from PIL import Image, ImageChops, ImageSequence
from video_cases import VIDEO

from tacod import embedded

WORKFLOWS = sorted((NODES / "example_workflows").glob("*.json"))
GOLDENS = {
    "z_image": "z_image",
    "qwen_image_edit": "qwen_edit_2511",
    "qwen_image_2.1": "qwen_image_21_edit",
    "qwen_image": "qwen_image",
    "krea2": "krea2",
    "flux-2-klein": "flux2_klein",
    "flux2_dev": "flux2_dev",
    "Chroma": "chroma",
    "chroma-radiance": "chroma_radiance",
    "longcat_image": "longcat_edit",
    "cosmos_predict2": "cosmos_predict2_t2i",
    "anima": "anima",
    "hidream_i1": "hidream",
    "NetaYume": "lumina2",
    "wan2.2_i2v": "wan22_i2v",
    "hunyuanvideo1.5": "hunyuan_video_15",
}
"""The goldens whose models stand in for files whose names begin so; the first that fits."""
SMALL = {"upscale_method": "area", "width": 64, "height": 64, "crop": "disabled"}


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
                if each["name"] in ("seed", "noise_seed"):
                    next(values)
            if each.get("link") is not None:
                inputs[each["name"]] = links[each["link"]]
        graph[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return graph


@pytest.fixture(params=WORKFLOWS, ids=lambda path: path.stem)
def graph(request: pytest.FixtureRequest, comfyui: ComfyUI) -> Graph:
    graph = to_api(json.loads(request.param.read_text()))
    for node in graph.values():
        if node["class_type"] not in comfyui.nodes:
            pytest.skip(f"this version of ComfyUI has no {node['class_type']}")
        method = node["inputs"].get("reference_latents_method", "")
        if method not in str(comfyui.nodes[node["class_type"]]["input"]):
            pytest.skip(f"this version of ComfyUI has no {method}")
    return graph


def test_there_is_one_for_each_family_and_use() -> None:
    assert {path.stem for path in WORKFLOWS} == {
        *("flux1_basic", "sd35_basic", "pixart_sigma_basic", "flux1_lora", "flux1_kontext"),
        *("z_image_turbo", "qwen_image", "krea2_turbo", "flux2_klein", "qwen_image_edit", "chroma"),
        *("anima", "hidream_i1", "lumina2", "longcat_image", "flux2_dev", "chroma_radiance", "qwen_image_21"),
        *("cosmos_predict2", "wan22_image_to_video", "hunyuan_video_15"),
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


def tiny_model(graph: Graph, models: Path) -> TinyModel | Sizes:
    """What stands in for the graph's model; its file is there."""
    given = [(key, value) for node in graph.values() for key, value in node["inputs"].items()]
    files = [str(value) for key, value in given if key in ("unet_name", "ckpt_name")]
    for start, golden in GOLDENS.items():
        if any(file.startswith(start) for file in files):
            case = next(case for case in (*CASES, *VIDEO.values()) if case.golden == golden)
            write(case, models)
            return Sizes(case)
    return PIXART if any("PixArt" in file for file in files) else FLUX


def with_stand_ins(graph: Graph, models: Path) -> Graph:
    """The graph with tiny loaders, text encoders and VAEs, and small pictures; the rest is as it was saved."""
    tiny = tiny_model(graph, models)
    frames = isinstance(tiny, Sizes) and tiny.tiny.has_frames
    text = {"width": tiny.width, "pooled": tiny.pooled, **(tiny.tiny.text if isinstance(tiny, Sizes) else {})}
    shapes = any("sd3.5" in str(node["inputs"]) for node in graph.values())
    size = 256 if shapes else 320 if tiny is PIXART else 64
    for node in graph.values():
        kind, inputs = node["class_type"], node["inputs"]
        if kind == "CheckpointLoaderSimple" and shapes:
            shutil.copy(embedded.PATH, models / "checkpoints")
            inputs["ckpt_name"] = embedded.PATH.name
        elif kind == "CheckpointLoaderSimple":
            node |= {"class_type": "TestCheckpoint", "inputs": {"unet_name": tiny.tiny.file, **text}}
        elif kind in ("TACODiTUNETLoader", "UNETLoader"):
            inputs["unet_name"] = tiny.tiny.file
        elif kind in ("CLIPLoader", "DualCLIPLoader", "QuadrupleCLIPLoader"):
            node |= {"class_type": "TestClip", "inputs": text}
        elif kind == "VAELoader" and tiny.tiny.file.startswith(("wan", "hunyuan_video")):
            pixels = 16 if tiny.channels == 32 else 8
            node |= {"class_type": "TestVideoVAE", "inputs": {"channels": tiny.channels, "pixels": pixels}}
        elif kind == "VAELoader":
            node |= {"class_type": "TestImageVAE", "inputs": {"channels": tiny.channels, "frames": frames}}
        elif kind == "LoadImage":
            node |= {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 9}}
        elif kind in ("FluxKontextImageScale", "ImageScaleToTotalPixels"):
            node |= {"class_type": "ImageScale", "inputs": {**inputs, **SMALL}}
        elif kind == "LoraLoaderModelOnly":
            save_lora(FLUX, models / "loras" / inputs["lora_name"])
        elif kind == "WanImageToVideo":
            inputs |= {"width": size, "height": size, "length": 9}
        elif kind == "SaveAnimatedWEBP":
            inputs["lossless"] = True
        elif kind == "KSamplerAdvanced":
            # The second half of a run begins where the first one ended.
            inputs |= {"steps": 4} | ({"end_at_step": 2} if inputs["start_at_step"] == 0 else {"start_at_step": 2})
        elif kind.startswith("Empty"):
            inputs |= {"width": size, "height": size} | ({"length": 9} if "length" in inputs else {})
        elif kind == "CLIPTextEncode" and shapes and inputs["text"]:
            inputs["text"] = embedded.PROMPTS[0]
        elif kind in ("TACODiTKSampler", "Flux2Scheduler", "BetaSamplingScheduler"):
            inputs["steps"] = 3
    return graph


def test_each_runs_with_stand_ins(comfyui: ComfyUI, comfyui_models: Path, graph: Graph) -> None:
    """In the daemon and, with the nodes switched off, in ComfyUI: the same picture."""
    graph = with_stand_ins(graph, comfyui_models)
    # Other sampler nodes have no statistics.
    counted = any(node["class_type"] == "TACODiTKSampler" for node in graph.values())
    pictures = []
    for enabled in (True, False):
        for node in graph.values():
            if "enable_taco_dit" in node["inputs"]:
                node["inputs"]["enable_taco_dit"] = enabled
        outcome = comfyui.run(graph)
        assert outcome.kind == "success", outcome.error
        texts = list(outcome.texts.values())
        assert any(("Plan: sequence 3" if enabled else "TACO-DiT is off") in text for text in texts)
        steps = "Steps: 3 in " if enabled else "TACO-DiT was off: 3 steps"
        assert any(steps in text for text in texts) == counted
        saved = [data["output"]["images"] for data in outcome.of("executed") if "images" in (data["output"] or {})]
        ((picture,),) = saved
        file = Image.open(comfyui.base / "output" / picture["filename"])
        pictures.append([frame.convert("RGB") for frame in ImageSequence.Iterator(file)])
    assert len(pictures[0]) == (3 if any(node["class_type"] == "SaveAnimatedWEBP" for node in graph.values()) else 1)
    for remote, local in zip(*pictures, strict=True):
        assert any(low < high for low, high in remote.getextrema())
        assert max(high for _, high in ImageChops.difference(remote, local).getextrema()) <= 1

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
from template_models import Model
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
    "wan2.2_animate": "wan_animate",
    "kandinsky5": "kandinsky5",
    "ltx-2.3": "ltx23_av",
    "minimax_h3": "minimax_h3_t2v",
}
"""The goldens whose models stand in for files whose names begin so; the first that fits."""
LOADED = {
    "CLIPLoader": "CLIP",
    "DualCLIPLoader": "CLIP",
    "LTXAVTextEncoderLoader": "CLIP",
    "VAELoader": "VAE",
    "LTXVAudioVAELoader": "VAE",
    "CLIPVisionEncode": "CLIP_VISION_OUTPUT",
    "LoadImage": "IMAGE",
    "GetVideoComponents": "IMAGE",
}
"""Nodes that a video's stand-ins take the place of, and what those give."""
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
        *("wan22_animate", "kandinsky5", "ltx23", "minimax_h3"),
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


def golden_of(graph: Graph) -> str | None:
    """The golden whose model stands in for the graph's; None for another tiny model."""
    given = [(key, value) for node in graph.values() for key, value in node["inputs"].items()]
    files = [str(value) for key, value in given if key in ("unet_name", "ckpt_name")]
    return next((golden for start, golden in GOLDENS.items() if any(file.startswith(start) for file in files)), None)


def with_stand_ins(graph: Graph, models: Path) -> Graph:
    """The graph with tiny loaders, text encoders and VAEs, and small pictures; the rest is as it was saved."""
    golden = golden_of(graph)
    tiny: TinyModel | Sizes = PIXART if any("PixArt" in str(node["inputs"]) for node in graph.values()) else FLUX
    frames, beside = False, {}
    if golden is not None:
        case = next(case for case in CASES if case.golden == golden)
        write(case, models)
        tiny, frames, beside = Sizes(case), case.has_frames, case.text
    text = {"width": tiny.width, "pooled": tiny.pooled, **beside}
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
        elif kind == "VAELoader":
            node |= {"class_type": "TestImageVAE", "inputs": {"channels": tiny.channels, "frames": frames}}
        elif kind == "LoadImage":
            node |= {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 9}}
        elif kind in ("FluxKontextImageScale", "ImageScaleToTotalPixels"):
            node |= {"class_type": "ImageScale", "inputs": {**inputs, **SMALL}}
        elif kind == "LoraLoaderModelOnly":
            save_lora(FLUX, models / "loras" / inputs["lora_name"])
        elif kind.startswith("Empty"):
            inputs |= {"width": size, "height": size}
        elif kind == "CLIPTextEncode" and shapes and inputs["text"]:
            inputs["text"] = embedded.PROMPTS[0]
        elif kind in ("TACODiTKSampler", "Flux2Scheduler", "BetaSamplingScheduler"):
            inputs["steps"] = 3
    return graph


def with_video_stand_ins(graph: Graph, model: Model, comfyui: ComfyUI) -> Graph:
    """The same of a video's graph. A video that is saved with its sound is also saved as plain frames."""
    for name, node in list(graph.items()):
        kind, inputs = node["class_type"], node["inputs"]
        if kind == "CheckpointLoaderSimple":
            node |= {"class_type": "UNETLoader", "inputs": {"unet_name": model.file, "weight_dtype": "default"}}
            graph["vae"] = _node(model, "VAE")
            for other in graph.values():
                other["inputs"] |= {key: ["vae", 0] for key, value in other["inputs"].items() if value == [name, 2]}
        elif kind in ("TACODiTUNETLoader", "UNETLoader"):
            inputs["unet_name"] = model.file_for(inputs["unet_name"])
        elif kind in LOADED:
            sound = "audio" in f"{kind} {inputs.get('vae_name')}".lower() and LOADED[kind] == "VAE"
            node |= _node(model, LOADED[kind], "audio_vae" if sound else "", moving=kind == "GetVideoComponents")
        elif kind == "VAEDecodeTiled":
            node |= {"class_type": "VAEDecode", "inputs": {key: inputs[key] for key in ("samples", "vae")}}
        elif kind == "SaveAnimatedWEBP":
            inputs["lossless"] = True
        else:
            takes = comfyui.nodes[kind]["input"]
            inputs |= model.fixed(kind, {**takes.get("required", {}), **takes.get("optional", {})}, inputs)
        if kind == "CreateVideo":
            frames = {"images": inputs["images"], "filename_prefix": "frames", "fps": inputs["fps"], "lossless": True}
            graph["frames"] = {
                "class_type": "SaveAnimatedWEBP",
                "inputs": {**frames, "quality": 100, "method": "default"},
            }
    return graph


def _node(model: Model, *what: str, moving: bool = False) -> dict[str, Any]:
    kind, name = (*what, "")[:2]
    stand_in = model.stand_in(kind, "", name, moving)
    assert stand_in is not None
    return {"class_type": stand_in[0], "inputs": stand_in[1]}


def test_each_runs_with_stand_ins(comfyui: ComfyUI, comfyui_models: Path, graph: Graph) -> None:
    """In the daemon and, with the nodes switched off, in ComfyUI: the same picture."""
    golden = golden_of(graph)
    if golden in VIDEO:
        graph = with_video_stand_ins(graph, Model(golden, comfyui_models), comfyui)
    else:
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
        files = [comfyui.base / "output" / each["subfolder"] / each["filename"] for (each,) in saved]
        videos = [file for file in files if file.suffix == ".mp4"]
        assert len(videos) == ("frames" in graph)
        assert all(b"mp4a" in video.read_bytes() for video in videos), "a video has its sound"
        (file,) = (each for each in files if each not in videos)
        pictures.append([frame.convert("RGB") for frame in ImageSequence.Iterator(Image.open(file))])
    assert (len(pictures[0]) > 1) == (golden in VIDEO)
    for remote, local in zip(*pictures, strict=True):
        assert any(low < high for low, high in remote.getextrema())
        assert max(high for _, high in ImageChops.difference(remote, local).getextrema()) <= 1

"""LTX-Video and LTX-2 with ComfyUI's own nodes for them: by ComfyUI alone and through the daemon."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from comfyui_graphs import Pair
from comfyui_server import ComfyUI, Outcome
from helpers import Daemon, read_golden
from image_cases import Case, Sizes, write
from safetensors.torch import load_file, save_file
from test_image_families import refused
from test_two_latents import PARTS, Graph, both_parts

Both = Callable[..., Outcome]
COARSE = "coarse.safetensors"
"""A LoRA whose guides have half of a video's resolution."""
BLOCK, CONNECTOR = "transformer_blocks.0", "audio_embeddings_connector.transformer_1d_blocks.0"
CASES = {
    case.golden: case
    for case in (
        Case("ltxv_t2v", "lightricks", 128, (4, 6), (f"{BLOCK}.attn1.to_q", f"{BLOCK}.ff.net.2")),
        Case("ltxv_i2v", "lightricks", 128, (4, 6)),
        Case("ltx2", "lightricks", 128, (4, 6), text={"width": 16}),
        Case("ltx23_av", "lightricks", 128, (4, 6), (f"{BLOCK}.audio_to_video_attn.to_q", f"{CONNECTOR}.attn1.to_v")),
        Case("ltx25_av", "lightricks", 128, (3, 5)),
    )
}


def models(*names: str) -> Any:
    return pytest.mark.parametrize("case", names, indirect=True)


@pytest.fixture
def case(request: pytest.FixtureRequest, comfyui_models: Path) -> Case:
    """A model whose file lies where ComfyUI looks for it, with a LoRA if it has layers for one."""
    case = CASES[request.param]
    write(case, comfyui_models)
    return case


def prepared(run: Pair, case: Case) -> None:
    """A latent of 3 frames at 24 frames a second, pictures, and VAEs; raw states of a text for LTX-2's connectors."""
    run.nodes["latent"]["inputs"]["frames"] = 3
    video = read_golden(case.golden).config["image_model"] == "ltxv"
    raw = json.dumps({"unprocessed_ltxav_embeds": True})
    for name in ("positive", "negative"):
        run.nodes[f"{name}_text"] = run.nodes.pop(name)
        # LTX-Video's network can't do without its text encoder's mask.
        given = {"hidden": 3} if video else {"values": raw}
        run.add(f"{name}_raw", "TestTextMask" if video else "TestValues", conditioning=f"@{name}_text", **given)
    run.add("timed", "LTXVConditioning", positive="@positive_raw", negative="@negative_raw", frame_rate=24.0)
    run.nodes["positive"], run.nodes["negative"] = _through("@timed"), _through("@timed#1")
    rows, columns = case.size
    run.add("vae", "TestLtxVAE", sound=False)
    run.add("sound_vae", "TestLtxVAE", sound=True)
    run.add("start", "TestFrames", seed=1, frames=1, height=32 * rows, width=32 * columns)
    run.add("end", "TestFrames", seed=2, frames=9, height=32 * rows, width=32 * columns)
    run.add("area", "TestMask", height=32 * rows, width=32 * columns)


def _through(link: str) -> dict[str, Any]:
    """A node that hands a conditioning on."""
    name, _, slot = link[1:].partition("#")
    return {"class_type": "TestValues", "inputs": {"conditioning": [name, int(slot or 0)], "values": "{}"}}


def guided(run: Pair, latent: str = "@latent", **last: Any) -> dict[str, str]:
    """Guides for the first frame and for the end; what a sampler takes of them."""
    common = {"vae": "@vae", "image": "@start", "frame_idx": 0, "strength": 0.7}
    run.add("first", "LTXVAddGuide", positive="@positive", negative="@negative", latent=latent, **common)
    common |= {"image": "@end", "frame_idx": 8, "strength": 1.0, **last}
    run.add("guided", "LTXVAddGuide", positive="@first", negative="@first#1", latent="@first#2", **common)
    return {"positive": "@guided", "negative": "@guided#1", "latent_image": "@guided#2"}


@pytest.fixture
def run(comfyui: ComfyUI, case: Case, endpoints: Callable[[int], Daemon]) -> Pair:
    """A graph with this model of a video alone, and branches through daemons of 1, 2 and 3 ranks."""
    run = Pair(Sizes(case), {f"taco{n}": (n, endpoints(n).endpoint) for n in (1, 2)})  # type: ignore[arg-type]
    prepared(run, case)
    return run


@pytest.fixture
def graph(comfyui: ComfyUI, case: Case, endpoints: Callable[[int], Daemon]) -> Graph:
    """The same with a sound of 10 steps beside the video."""
    if "LTXVConcatAVLatent" not in comfyui.nodes:
        pytest.skip("this version of ComfyUI has no latents of several parts")
    run = Graph(Sizes(case), {f"taco{n}": (n, endpoints(n).endpoint) for n in (1, 2)})  # type: ignore[arg-type]
    prepared(run, case)
    run.add("quiet", "TestLatent", seed=5, batch=1, channels=8, height=10, width=16, scale=0.0)
    run.add("empty", "LTXVConcatAVLatent", video_latent="@latent", audio_latent="@quiet")
    run.latent = "empty"
    return run


# --- a video alone ----------------------------------------------------------------------------------------------------


@models("ltxv_t2v")
def test_with_and_without_guidance_and_a_lora(comfyui: ComfyUI, both: Both, run: Pair, case: Case) -> None:
    run.load()
    run.sample(save="_1", cfg=1.0)
    run.sample(save="_4", cfg=4.0)
    run.on_model("LoraLoaderModelOnly", lora_name=case.file, strength_model=1.2)
    run.sample(save="_lora", cfg=1.0)
    both(run, "_1", "_4", "_lora")
    plain, merged = (comfyui.latent(run.file("taco", save)) for save in ("_1", "_lora"))
    assert (plain - merged).norm() > 1e-3 * plain.norm()


@models("ltxv_t2v", "ltxv_i2v")
def test_a_first_picture_and_a_mask(comfyui: ComfyUI, both: Both, run: Pair) -> None:
    """Each token has a time of its own."""
    run.nodes["latent"]["inputs"] |= {"batch": 2, "scale": 1.0, "seed": 9}
    run.add("begun", "LTXVImgToVideoInplace", vae="@vae", image="@start", latent="@latent", strength=0.9)
    run.add("masked", "SetLatentNoiseMask", samples="@latent", mask="@area")
    run.load()
    run.sample(save="_begun", cfg=3.0, latent_image="@begun")
    run.sample(save="_mask", cfg=1.0, denoise=0.7, latent_image="@masked", sampler_name="dpmpp_2m")
    both(run, "_begun", "_mask")
    assert comfyui.latent(run.file("taco", "_begun")).shape[0] == 2


@models("ltxv_t2v", "ltxv_i2v")
def test_guides(comfyui: ComfyUI, both: Both, run: Pair) -> None:
    """Weaker ones, stronger ones, and one that is seen only where a mask shows it."""
    run.load()
    run.sample(save="_weak", cfg=3.0, **guided(run))
    for name, more in {"strong": {"strength": 1.6}, "shown": {"attention_mask": ["area", 0], "strength": 0.8}}.items():
        run.add(name, "LTXVAddGuide", **{**run.nodes["guided"]["inputs"], **more})
        inputs = {"positive": f"@{name}", "negative": f"@{name}#1", "latent_image": f"@{name}#2"}
        run.sample(save=f"_{name}", cfg=1.0, **inputs)
    both(run, "_weak", "_strong", "_shown")
    plain, shown = (comfyui.latent(run.file("taco", save)) for save in ("_strong", "_shown"))
    assert plain.shape[2] == 3 + 1 + 1
    assert (plain - shown)[:, :, :3].norm() > 1e-3 * plain.norm()


@models("ltxv_t2v")
def test_a_guide_of_half_the_resolution(comfyui_models: Path, both: Both, run: Pair, case: Case) -> None:
    """Between its tokens are such as aren't there."""
    weights = load_file(comfyui_models / "loras" / case.file)
    save_file(weights, comfyui_models / "loras" / COARSE, {"reference_downscale_factor": "2"})
    run.add("adapted", "LoraLoaderModelOnly", model="@file", lora_name=COARSE, strength_model=1.0)
    run.add("coarse", "GetICLoRAParameters", iclora_model="@adapted")
    for branch in run.branches:
        run.on(branch, "adapted")
    run.load()
    run.sample(cfg=3.0, **guided(run, iclora_parameters="@coarse", strength=0.6))
    both(run)


@models("ltxv_t2v")
def test_code_between_blocks_is_refused(comfyui: ComfyUI, run: Pair) -> None:
    run.load()
    run.on_model("TestReplace", what="patches_replace")
    assert "TACO-DiT can't honour patches_replace of 'dit'" in refused(comfyui, run, steps=2)


# --- with sound -------------------------------------------------------------------------------------------------------


@models("ltx2", "ltx23_av", "ltx25_av")
def test_video_and_sound(comfyui: ComfyUI, both: Both, graph: Graph) -> None:
    graph.load()
    graph.sample(save="_1", cfg=1.0)
    graph.sample(save="_4", cfg=4.0)
    graph.sample(save="_noise", cfg=2.0, sampler_name="euler_ancestral")
    both(graph, *both_parts("_1", "_4", "_noise"))
    video, sound = (comfyui.latent(graph.file("taco", f"_4_{part}")) for part in PARTS)
    assert video.shape[:3] == (1, 128, 3)
    assert sound.shape == (1, 8, 10, 16)


@models("ltx23_av")
def test_a_lora_of_connectors_too(comfyui: ComfyUI, both: Both, graph: Graph, case: Case) -> None:
    """The text's context is another one then."""
    graph.load()
    graph.sample(save="_plain", cfg=1.0)
    graph.on_model("LoraLoaderModelOnly", lora_name=case.file, strength_model=1.2)
    graph.sample(save="_lora", cfg=1.0)
    both(graph, *both_parts("_plain", "_lora"))
    plain, merged = (comfyui.latent(graph.file("taco", f"{save}_sound")) for save in ("_plain", "_lora"))
    assert (plain - merged).norm() > 1e-3 * plain.norm()


@models("ltx23_av", "ltx25_av")
def test_guides_and_a_voice(comfyui: ComfyUI, both: Both, graph: Graph) -> None:
    inputs = guided(graph)
    graph.add("whole", "LTXVConcatAVLatent", video_latent="@guided#2", audio_latent="@quiet")
    graph.add("voice", "TestSound", seed=3, samples=3200, rate=16000)
    graph.load()
    graph.sample(save="_guided", cfg=3.0, **{**inputs, "latent_image": "@whole"})
    given = {"positive": "@guided", "negative": "@guided#1", "reference_audio": "@voice", "audio_vae": "@sound_vae"}
    given |= {"identity_guidance_scale": 2.0, "start_percent": 0.0, "end_percent": 1.0}
    graph.both("heard", "LTXVReferenceAudio", model="@model", **given)
    for branch in graph.branches:
        graph.on(branch, f"heard_{branch}")
    heard = {"positive": "@heard_*#1", "negative": "@heard_*#2", "latent_image": "@whole"}
    graph.sample(save="_heard", cfg=3.0, **heard)
    both(graph, *both_parts("_guided", "_heard"))
    plain, heard_sound = (comfyui.latent(graph.file("taco", f"{save}_sound")) for save in ("_guided", "_heard"))
    assert (plain - heard_sound).norm() > 1e-3 * plain.norm()


@models("ltx23_av")
def test_guidance_by_what_is_left_out(comfyui: ComfyUI, both: Both, graph: Graph) -> None:
    graph.load()
    graph.sample(save="_plain", cfg=1.0)
    graph.on_model("LTXVModalityGuidance", modality_scale=2.0, start_percent=0.0, end_percent=1.0)
    graph.sample(save="_apart", cfg=1.0)
    graph.on_model("LTXVSpatioTemporalGuidance", scale=1.0, blocks="1", start_percent=0.0, end_percent=1.0)
    graph.sample(save="_unattended", cfg=2.0)
    both(graph, *both_parts("_plain", "_apart", "_unattended"))
    outs = [comfyui.latent(graph.file("taco", f"{save}_video")) for save in ("_plain", "_apart", "_unattended")]
    assert all((one - other).norm() > 1e-3 * one.norm() for one, other in itertools.pairwise(outs))


@models("ltx23_av")
def test_masks_of_video_and_sound(both: Both, graph: Graph) -> None:
    graph.nodes["latent"]["inputs"] |= {"scale": 1.0, "seed": 9}
    graph.add("masked", "SetLatentNoiseMask", samples="@latent", mask="@area")
    graph.add("loud", "TestLatent", seed=6, batch=1, channels=8, height=10, width=16, scale=1.0)
    graph.add("half", "TestMask", height=10, width=16)
    graph.add("silent", "SetLatentNoiseMask", samples="@loud", mask="@half")
    graph.add("both_masked", "LTXVConcatAVLatent", video_latent="@masked", audio_latent="@silent")
    graph.add("begun", "LTXVImgToVideoInplace", vae="@vae", image="@start", latent="@latent", strength=1.0)
    graph.add("begun_loud", "LTXVConcatAVLatent", video_latent="@begun", audio_latent="@quiet")
    graph.load()
    graph.sample(save="_mask", cfg=3.0, denoise=0.8, latent_image="@both_masked")
    graph.sample(save="_begun", cfg=3.0, latent_image="@begun_loud")
    both(graph, *both_parts("_mask", "_begun"))

"""LTX-Video and LTX-2 with ComfyUI's own nodes for them: by ComfyUI alone and through the daemon."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from comfyui_graphs import Pair, differ
from comfyui_server import ComfyUI, Outcome, has
from helpers import FP32, relative_error
from image_cases import Case
from safetensors.torch import load_file, save_file
from video_cases import models

Both = Callable[..., Outcome]
COARSE = "coarse.safetensors"
"""A LoRA whose guides have half of a video's resolution."""


def guided(run: Pair, latent: str = "@latent", **last: Any) -> dict[str, str]:
    """Guides for the first frame and for the end; what a sampler takes of them."""
    common = {"vae": "@vae", "image": "@start", "frame_idx": 0, "strength": 0.7}
    run.add("first", "LTXVAddGuide", positive="@positive", negative="@negative", latent=latent, **common)
    common |= {"image": "@end", "frame_idx": 8, "strength": 1.0, **last}
    run.add("guided", "LTXVAddGuide", positive="@first", negative="@first#1", latent="@first#2", **common)
    return {"positive": "@guided", "negative": "@guided#1", "latent_image": "@guided#2"}


# --- a video alone ----------------------------------------------------------------------------------------------------


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
    taken = comfyui.nodes["LTXVAddGuide"]["input"]
    given: dict[str, dict[str, Any]] = {"strong": {"strength": min(1.6, taken["required"]["strength"][1]["max"])}}
    if has("comfy_extras/nodes_lt.py", "attention_mask=None"):
        given["shown"] = {"attention_mask": ["area", 0], "strength": 0.8}
    for name, more in given.items():
        run.add(name, "LTXVAddGuide", **{**run.nodes["guided"]["inputs"], **more})
        inputs = {"positive": f"@{name}", "negative": f"@{name}#1", "latent_image": f"@{name}#2"}
        run.sample(save=f"_{name}", cfg=1.0, **inputs)
    both(run, "_weak", *(f"_{name}" for name in given))
    plain, last = (comfyui.latent(run.file("taco", f"_{name}")) for name in ("strong", [*given][-1]))
    assert plain.shape[2] >= 3 + 1 + 1, "guides are further frames"
    assert ((plain - last)[:, :, :3].norm() > 1e-3 * plain.norm()) == ("shown" in given)


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


# --- with sound -------------------------------------------------------------------------------------------------------


@models("ltx2", "ltx23_av", "ltx25_av")
def test_video_and_sound(comfyui: ComfyUI, both: Both, run: Pair) -> None:
    run.load()
    run.sample(save="_1", cfg=1.0)
    run.sample(save="_4", cfg=4.0)
    run.sample(save="_noise", cfg=2.0, sampler_name="euler_ancestral")
    both(run, "_1", "_4", "_noise")
    video, sound = (comfyui.latent(run.file("taco", f"_4{part}")) for part in run.parts)
    assert video.shape[:3] == (1, 128, 3)
    assert sound.shape == (1, 8, 10, 16)


@models("ltx23_av")
def test_a_lora_of_connectors_too(comfyui: ComfyUI, both: Both, run: Pair, case: Case) -> None:
    """The text's context is another one then."""
    run.load()
    run.sample(save="_plain", cfg=1.0)
    run.on_model("LoraLoaderModelOnly", lora_name=case.file, strength_model=1.2)
    run.sample(save="_lora", cfg=1.0)
    both(run, "_plain", "_lora")
    differ(comfyui, run, "_plain", "_lora")


@models("ltx23_av")
def test_contexts_outside_of_a_run(comfyui: ComfyUI, run: Pair, case: Case) -> None:
    """By the connectors with the LoRA that is on the MODEL that ComfyUI has loaded last."""
    run.load()
    run.both("plain", "TestContexts", model="@model", conditioning="@positive")
    run.on_model("LoraLoaderModelOnly", lora_name=case.file, strength_model=1.2)
    run.both("lora", "TestContexts", model="@model", conditioning="@positive")
    for branch in run.branches:
        for name in ("plain", "lora"):
            Pair.save(run, f"{name}_{branch}", branch, f"_{name}")
    outcome = comfyui.run(run.nodes)
    assert outcome.kind == "success", outcome.error
    plain, changed = (comfyui.latent(run.file("stock", f"_{name}")) for name in ("plain", "lora"))
    assert relative_error(changed, plain) > 1e-3
    for branch in run.branches:
        assert relative_error(comfyui.latent(run.file(branch, "_plain")), plain) <= FP32
        assert relative_error(comfyui.latent(run.file(branch, "_lora")), changed) <= FP32


@models("ltx23_av", "ltx25_av")
def test_guides_and_a_voice(comfyui: ComfyUI, both: Both, run: Pair) -> None:
    inputs = guided(run)
    run.add("whole", "LTXVConcatAVLatent", video_latent="@guided#2", audio_latent="@quiet")
    run.add("voice", "TestSound", seed=3, samples=3200, rate=16000)
    run.load()
    run.sample(save="_guided", cfg=3.0, **{**inputs, "latent_image": "@whole"})
    given = {"positive": "@guided", "negative": "@guided#1", "reference_audio": "@voice", "audio_vae": "@sound_vae"}
    given |= {"identity_guidance_scale": 2.0, "start_percent": 0.0, "end_percent": 1.0}
    run.both("heard", "LTXVReferenceAudio", model="@model", **given)
    for branch in run.branches:
        run.on(branch, f"heard_{branch}")
    heard = {"positive": "@heard_*#1", "negative": "@heard_*#2", "latent_image": "@whole"}
    run.sample(save="_heard", cfg=3.0, **heard)
    both(run, "_guided", "_heard")
    differ(comfyui, run, "_guided", "_heard")


@models("ltx23_av")
def test_guidance_by_what_is_left_out(comfyui: ComfyUI, both: Both, run: Pair) -> None:
    run.load()
    run.sample(save="_plain", cfg=1.0)
    run.on_model("LTXVModalityGuidance", modality_scale=2.0, start_percent=0.0, end_percent=1.0)
    run.sample(save="_apart", cfg=1.0)
    run.on_model("LTXVSpatioTemporalGuidance", scale=1.0, blocks="1", start_percent=0.0, end_percent=1.0)
    run.sample(save="_unattended", cfg=2.0)
    both(run, "_plain", "_apart", "_unattended")
    differ(comfyui, run, "_plain", "_apart", "_unattended")


@models("ltx23_av")
def test_masks_of_video_and_sound(both: Both, run: Pair) -> None:
    run.nodes["latent"]["inputs"] |= {"scale": 1.0, "seed": 9}
    run.add("masked", "SetLatentNoiseMask", samples="@latent", mask="@area")
    run.add("loud", "TestLatent", seed=6, batch=1, channels=8, height=10, width=16, scale=1.0)
    run.add("half", "TestMask", height=10, width=16)
    run.add("silent", "SetLatentNoiseMask", samples="@loud", mask="@half")
    run.add("both_masked", "LTXVConcatAVLatent", video_latent="@masked", audio_latent="@silent")
    run.add("begun", "LTXVImgToVideoInplace", vae="@vae", image="@start", latent="@latent", strength=1.0)
    run.add("begun_loud", "LTXVConcatAVLatent", video_latent="@begun", audio_latent="@quiet")
    run.load()
    run.sample(save="_mask", cfg=3.0, denoise=0.8, latent_image="@both_masked")
    run.sample(save="_begun", cfg=3.0, latent_image="@begun_loud")
    both(run, "_mask", "_begun")

"""Wan's kinds of models with ComfyUI's own nodes for them: by ComfyUI alone and through the daemon."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from comfyui_graphs import Pair, differ, refused
from comfyui_server import ComfyUI, Outcome, has
from helpers import Daemon
from image_cases import Case
from safetensors.torch import save_file
from video_cases import conditioned, models

Both = Callable[..., Outcome]
SIDES = {"width": 80, "height": 64, "length": 9, "batch_size": 1}
LARGER = {"width": 96, "height": 64, "length": 9, "batch_size": 1}


KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "wan21_i2v": ("WanImageToVideo", {"start_image": "@start", "clip_vision_output": "@seen"}),
    "wan22_i2v": ("WanImageToVideo", {"start_image": "@start"}),
    "wan_flf": (
        "WanFirstLastFrameToVideo",
        {
            "start_image": "@start",
            "end_image": "@end",
            "clip_vision_start_image": "@seen",
            "clip_vision_end_image": "@seen_end",
        },
    ),
    "wan_fun": (
        "WanFunControlToVideo",
        {"start_image": "@start", "control_video": "@video", "clip_vision_output": "@seen"},
    ),
    "wan_fun_frames": ("Wan22FunControlToVideo", {"ref_image": "@end", "control_video": "@video"}),
    "wan_camera": (
        "WanCameraImageToVideo",
        {"start_image": "@start", "clip_vision_output": "@seen", "camera_conditions": "@path"},
    ),
    "wan_camera_22": ("WanCameraImageToVideo", {"start_image": "@start", "camera_conditions": "@path"}),
    "wan_vace": ("WanVaceToVideo", {"control_video": "@video", "reference_image": "@start", "strength": 0.8}),
}
"""ComfyUI's node for each model, and what that is given."""
CAMERA = {"camera_pose": "Pan Up", "width": 80, "height": 64, "length": 9, "speed": 1.5}


@models(*KINDS)
def test_what_is_given_beside_the_text(comfyui: ComfyUI, both: Both, run: Pair, case: Case) -> None:
    kind, given = KINDS[case.golden]
    if kind not in comfyui.nodes:
        pytest.skip(f"this version of ComfyUI has no {kind}")
    run.add("path", "WanCameraEmbedding", **CAMERA)
    run.load()
    inputs = conditioned(run, kind, **SIDES, **given)
    run.sample(save="_1", cfg=1.0, steps=3, **inputs)
    run.sample(save="_4", cfg=4.0, steps=3, **inputs)
    without = {**inputs, "positive": "@positive", "negative": "@negative"}
    run.sample(save="_without", cfg=1.0, steps=3, **without)
    both(run, "_1", "_4", "_without")
    differ(comfyui, run, "_without", "_1")


@models("wan22_ti2v")
def test_a_first_image_of_5b(both: Both, run: Pair) -> None:
    """Its frame is at time 0."""
    run.add("begun", "Wan22ImageToVideoLatent", vae="@vae", **LARGER, start_image="@start")
    run.load()
    run.sample(latent_image="@begun", cfg=4.0)
    both(run)


@models("wan_vace")
def test_two_videos_given_to_vace_in_a_batch(comfyui: ComfyUI, both: Both, run: Pair, case: Case) -> None:
    sides = {**SIDES, "batch_size": 2}
    run.load()
    conditioned(run, "WanVaceToVideo", **sides, control_video="@video", strength=1.0)
    again = {"vae": "@vae", **sides, "strength": 0.5}
    run.add("more", "WanVaceToVideo", positive="@given", negative="@given#1", **again)
    inputs = {"positive": "@more", "negative": "@more#1", "latent_image": "@more#2"}
    run.sample(save="_plain", cfg=1.0, steps=3, **inputs)
    run.on_model("LoraLoaderModelOnly", lora_name=case.file, strength_model=1.0)
    run.sample(save="_lora", cfg=4.0, steps=3, **inputs)
    both(run, "_plain", "_lora")


@models("wan21_t2v")
def test_frames_behind_the_video(both: Both, run: Pair) -> None:
    """As Phantom has its subjects; for the negative conditioning they are zeros."""
    given = {"positive": "@positive", "negative": "@negative", "vae": "@vae", **SIDES, "images": "@end"}
    run.add("wan", "WanPhantomSubjectToVideo", **given)
    run.load()
    run.sample(save="_1", cfg=1.0, positive="@wan", negative="@wan#2", latent_image="@wan#3")
    run.sample(save="_4", cfg=4.0, positive="@wan", negative="@wan#2", latent_image="@wan#3")
    both(run, "_1", "_4")


@models("wan22_i2v")
def test_two_experts_one_after_the_other(
    comfyui: ComfyUI, comfyui_models: Path, endpoints: Callable[[int], Daemon], both: Both, run: Pair, case: Case
) -> None:
    """As 2.2 A14B has them: one model for high noise, and another for low noise from the middle of the run on."""
    other = case.model()
    other.weights["blocks.0.ffn.0.weight"] = 1.5 * other.weights["blocks.0.ffn.0.weight"]
    other.save(comfyui_models / "diffusion_models" / "low_noise.safetensors")
    run.add("low", "UNETLoader", unet_name="low_noise.safetensors", weight_dtype="default")
    run.load()
    inputs = conditioned(run, "WanImageToVideo", **SIDES, start_image="@start")
    common = {"noise_seed": 7, "steps": 6, "cfg": 3.5, "sampler_name": "euler", "scheduler": "simple"}
    first = {"add_noise": "enable", "start_at_step": 0, "end_at_step": 3, "return_with_leftover_noise": "enable"}
    last = {"add_noise": "disable", "start_at_step": 3, "end_at_step": 10000, "return_with_leftover_noise": "disable"}
    run.sample("KSamplerAdvanced", save="_high", **common, **first, **inputs)
    for branch, ranks in {"stock": 0, **run.ranks}.items():
        run.on(branch, "low")
        if ranks:
            settings = dict(run.nodes["loader"]["inputs"], model="@low", endpoint=endpoints(ranks).endpoint)
            run.on(branch, run.add(f"low_{branch}", "TACODiTModelLoader", **settings)[1:])
    run.sample("KSamplerAdvanced", save="_low", **common, **last, **{**inputs, "latent_image": "@sampler_high_*"})
    both(run, "_high", "_low")
    differ(comfyui, run, "_low", "_high", least=1e-2)


@models("wan21_t2v")
@pytest.mark.parametrize("loader", ["TACODiTModelLoader", "TACODiTUNETLoader"])
def test_a_network_that_keeps_what_it_has_seen_is_refused(
    comfyui: ComfyUI, comfyui_models: Path, run: Pair, case: Case, loader: str
) -> None:
    """Only the file's metadata tells Causal Forcing's from Wan 2.1, and ComfyUI's configuration forgets it."""
    golden, name = case.model(), "causal.safetensors"
    metadata = {"tacod.config": json.dumps(golden.config), "config": json.dumps({"transformer": {"causal_ar": True}})}
    save_file(golden.weights, comfyui_models / "diffusion_models" / name, metadata)
    run.nodes["file"]["inputs"]["unet_name"] = name
    run.load(loader, **({"unet_name": name} if loader == "TACODiTUNETLoader" else {}))
    message = "TACO-DiT can't honour CausalWanModel: it keeps keys and values"
    if not has("comfy/supported_models.py", "causal_ar"):
        # For this version it is a Wan 2.1.
        message = "config key 'causal_ar': Causal Forcing's network, which this version doesn't run"
    assert message in refused(comfyui, run, steps=2)


OTHERS = {"s2v": "Wan 2.2 S2V", "humo": "HuMo", "animate2": "Wan Animate 2", "wandancer": "WanDancer"}
"""ComfyUI's further networks of the family, by its names and by their own."""


@models("wan21_t2v")
@pytest.mark.parametrize("kind", OTHERS)
def test_another_network_is_refused_by_its_name(
    comfyui: ComfyUI, comfyui_models: Path, run: Pair, case: Case, kind: str
) -> None:
    if not has("comfy/supported_models.py", f'"{kind}"'):
        pytest.skip(f"this version of ComfyUI has no {OTHERS[kind]}")
    golden, name = case.model(), f"{kind}.safetensors"
    # WanDancer has an image beside the latent, and ComfyUI knows it by that, too.
    config = {**golden.config, "model_type": kind} | ({"in_dim": 36} if kind == "wandancer" else {})
    metadata = {"tacod.config": json.dumps(config)}
    save_file(golden.weights, comfyui_models / "diffusion_models" / name, metadata)
    run.load("TACODiTUNETLoader", unet_name=name)
    message = f"{OTHERS[kind]}, which this version doesn't run; run it in ComfyUI without the TACO-DiT nodes"
    assert message in refused(comfyui, run, steps=2)

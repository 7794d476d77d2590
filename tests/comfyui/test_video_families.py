"""Wan's kinds of models with ComfyUI's own nodes for them: by ComfyUI alone and through the daemon."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from comfyui_graphs import Pair
from comfyui_server import ComfyUI, Outcome
from helpers import Daemon
from image_cases import Case, Sizes, write
from safetensors.torch import save_file
from test_image_families import refused

Both = Callable[..., Outcome]
CASES = {
    case.golden: case
    for case in (
        Case("wan21_t2v", "wan", size=(9, 13), lora=("blocks.0.self_attn.q", "blocks.1.ffn.2")),
        Case("wan21_i2v", "wan", lora=("blocks.0.cross_attn.k_img", "blocks.1.cross_attn.o")),
        Case("wan22_i2v", "wan", lora=("blocks.1.self_attn.v",)),
        Case("wan22_ti2v", "wan", 48, (4, 6), ("blocks.0.ffn.0",)),
        Case("wan_flf", "wan", config={"in_dim": 36, "out_dim": 16, "clip_dim": 40}),
        Case("wan_fun", "wan", config={"in_dim": 48, "out_dim": 16, "in_dim_ref_conv": 16, "clip_dim": 40}),
        Case("wan_fun_frames", "wan", config={"in_dim": 52, "out_dim": 16, "in_dim_ref_conv": 16}),
        Case("wan_camera", "wan", config={"in_dim": 32, "out_dim": 16, "in_dim_control_adapter": 24, "clip_dim": 40}),
        Case("wan_camera_22", "wan", config={"in_dim": 36, "out_dim": 16, "in_dim_control_adapter": 24}),
        Case("wan_vace", "wan", config={"in_dim": 16, "out_dim": 16, "vace_in_dim": 96}, lora=("vace_blocks.0.ffn.0",)),
    )
}
"""The goldens' models; ComfyUI takes others only with the channels of published ones."""
SIDES = {"width": 80, "height": 64, "length": 9, "batch_size": 1}
LARGER = {"width": 96, "height": 64, "length": 9, "batch_size": 1}


@pytest.fixture
def case(request: pytest.FixtureRequest, comfyui_models: Path) -> Case:
    """A model whose file lies where ComfyUI looks for it, with a LoRA if it has layers for one."""
    case = CASES[request.param]
    write(case, comfyui_models)
    return case


@pytest.fixture
def run(case: Case, endpoints: Callable[[int], Daemon]) -> Pair:
    """A graph with this model and a latent of 3 frames, and branches through daemons of 1, 2 and 3 ranks."""
    pair = Pair(Sizes(case), {f"taco{n}": (n, endpoints(n).endpoint) for n in (1, 2)})  # type: ignore[arg-type]
    pair.nodes["latent"]["inputs"]["frames"] = 3
    pair.add("vae", "TestVideoVAE", channels=case.channels, pixels=16 if case.channels == 48 else 8)
    pair.add("start", "TestFrames", seed=1, frames=1, height=48, width=72)
    pair.add("end", "TestFrames", seed=2, frames=1, height=64, width=80)
    pair.add("video", "TestFrames", seed=3, frames=9, height=64, width=80)
    pair.add("seen", "TestClipVision", seed=4, tokens=5)
    pair.add("seen_end", "TestClipVision", seed=5, tokens=5)
    return pair


def models(*names: str) -> Any:
    return pytest.mark.parametrize("case", names, indirect=True)


def conditioned(run: Pair, kind: str, sides: Mapping[str, int] = SIDES, **given: Any) -> dict[str, str]:
    """One of ComfyUI's nodes that make conditioning and the latent of a video; what a sampler takes of it."""
    run.add("wan", kind, positive="@positive", negative="@negative", vae="@vae", **sides, **given)
    return {"positive": "@wan", "negative": "@wan#1", "latent_image": "@wan#2"}


@models("wan21_t2v", "wan22_i2v", "wan22_ti2v", "wan21_i2v")
def test_with_and_without_guidance_and_a_lora(comfyui: ComfyUI, both: Both, run: Pair, case: Case) -> None:
    """The ones that take an image have none."""
    run.load()
    run.sample(save="_1", cfg=1.0)
    run.sample(save="_4", cfg=4.0)
    run.on_model("LoraLoaderModelOnly", lora_name=case.file, strength_model=1.2)
    run.sample(save="_lora", cfg=1.0)
    both(run, "_1", "_4", "_lora")
    plain, merged = (comfyui.latent(run.file("taco", save)) for save in ("_1", "_lora"))
    assert plain.shape[2] == 3
    assert (plain - merged).norm() > 1e-3 * plain.norm()


@models("wan21_t2v", "wan22_ti2v")
def test_a_batch_and_a_mask(both: Both, run: Pair) -> None:
    """With a mask each frame of 5B has a time of its own."""
    run.nodes["latent"]["inputs"] |= {"batch": 2, "scale": 1.0, "seed": 9}
    run.add("mask", "TestMask", height=64, width=64)
    run.add("masked", "SetLatentNoiseMask", samples="@latent", mask="@mask")
    run.load()
    run.sample(save="_batch", denoise=0.8)
    run.sample(save="_mask", denoise=0.7, latent_image="@masked", sampler_name="dpmpp_2m")
    both(run, "_batch", "_mask")


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
    inputs = conditioned(run, kind, **given)
    run.sample(save="_1", cfg=1.0, steps=3, **inputs)
    run.sample(save="_4", cfg=4.0, steps=3, **inputs)
    without = {**inputs, "positive": "@positive", "negative": "@negative"}
    run.sample(save="_without", cfg=1.0, steps=3, **without)
    both(run, "_1", "_4", "_without")
    plain, led = (comfyui.latent(run.file("taco", save)) for save in ("_without", "_1"))
    assert (led - plain).norm() > 1e-3 * plain.norm()


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
    conditioned(run, "WanVaceToVideo", sides, control_video="@video", strength=1.0)
    again = {"vae": "@vae", **sides, "strength": 0.5}
    run.add("more", "WanVaceToVideo", positive="@wan", negative="@wan#1", **again)
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


@models("wan21_t2v")
def test_stretched_positions(comfyui: ComfyUI, both: Both, run: Pair) -> None:
    if "ScaleROPE" not in comfyui.nodes:
        pytest.skip("this version of ComfyUI has no ScaleROPE")
    options = {"scale_x": 0.7, "scale_y": 1.5, "scale_t": 0.8, "shift_x": 2.0, "shift_y": -1.0, "shift_t": 1.0}
    run.load()
    run.on_model("ScaleROPE", **options)
    run.sample(cfg=1.0)
    both(run)


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
    inputs = conditioned(run, "WanImageToVideo", start_image="@start")
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
    high, done = (comfyui.latent(run.file("taco", save)) for save in ("_high", "_low"))
    assert (done - high).norm() > 1e-2 * done.norm()


@models("wan21_t2v")
def test_code_between_blocks_is_refused(comfyui: ComfyUI, run: Pair) -> None:
    run.load()
    run.on_model("TestReplace", what="patches_replace")
    assert "TACO-DiT can't honour patches_replace of 'dit'" in refused(comfyui, run, steps=2)


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
    assert "TACO-DiT can't honour CausalWanModel: it keeps keys and values" in refused(comfyui, run, steps=2)

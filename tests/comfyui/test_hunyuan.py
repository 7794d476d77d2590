"""HunyuanVideo, 1.5 and HunyuanImage 2.1 with ComfyUI's own nodes for them: by ComfyUI alone and through the daemon."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from comfyui_graphs import Pair, differ, refused
from comfyui_server import ComfyUI, Outcome
from image_cases import Case
from video_cases import conditioned, models

Both = Callable[..., Outcome]
SIDES = {"width": 48, "height": 64, "length": 9, "batch_size": 1}


@models("hunyuan_video_t2v", "hunyuan_image_21")
def test_a_batch_of_two(both: Both, run: Pair) -> None:
    run.nodes["latent"]["inputs"] |= {"batch": 2, "scale": 1.0, "seed": 9}
    run.load()
    run.sample(save="_1", cfg=1.0, denoise=0.8)
    run.sample(save="_4", cfg=4.0, denoise=0.8, sampler_name="dpmpp_2m")
    both(run, "_1", "_4")


@models("hunyuan_video_t2v")
def test_a_text_whose_last_tokens_are_padding(comfyui: ComfyUI, both: Both, run: Pair) -> None:
    """ComfyUI's network takes a mask for one image at a time."""
    run.add("masked", "TestTextMask", conditioning="@positive", hidden=4)
    run.load()
    run.sample(save="_mask", cfg=1.0, positive="@masked")
    run.sample(save="_plain", cfg=1.0)
    both(run, "_mask", "_plain")
    differ(comfyui, run, "_mask", "_plain")


@models("hunyuan_video_t2v")
def test_guidance(comfyui: ComfyUI, both: Both, run: Pair) -> None:
    run.add("guided", "FluxGuidance", conditioning="@positive", guidance=2.5)
    run.load()
    run.sample(save="_2", cfg=1.0, positive="@guided")
    run.sample(save="_6", cfg=1.0)
    both(run, "_2", "_6")
    differ(comfyui, run, "_2", "_6")


KINDS = {"hunyuan_video_i2v": "v1 (concat)", "hunyuan_video_i2v_replace": "v2 (replace)", "hunyuan_video_t2v": "custom"}
"""The ways of ComfyUI's node to give a first image, each with a model that takes it."""


@models(*KINDS)
def test_a_first_image(comfyui: ComfyUI, both: Both, run: Pair, case: Case) -> None:
    """ComfyUI's network takes a video before the video for one image at a time, so there without cfg."""
    kind = KINDS[case.golden]
    for name in ("positive", "negative"):
        given = {"vae": "@vae", **SIDES, "guidance_type": kind, "start_image": "@start"}
        run.add(f"led_{name}", "HunyuanImageToVideo", positive=f"@{name}", **given)
    run.load()
    led = {"positive": "@led_positive", "negative": "@led_negative", "latent_image": "@led_positive#1"}
    run.sample(save="_1", cfg=1.0, **led)
    run.sample(save="_without", cfg=1.0, latent_image="@led_positive#1")
    saves = ["_1", "_without"]
    if kind != "custom":
        run.sample(save="_4", cfg=4.0, **led)
        saves.append("_4")
    both(run, *saves)
    differ(comfyui, run, "_without", "_1")


@models("hunyuan_video_i2v_replace")
def test_a_first_frame_with_two_guidances_is_refused(comfyui: ComfyUI, run: Pair) -> None:
    """ComfyUI's network adds one image's guidance to the first frames of both, and the other's to all else."""
    given = {"vae": "@vae", **SIDES, "guidance_type": "v2 (replace)", "start_image": "@start"}
    for name, guidance in {"positive": 2.5, "negative": 6.0}.items():
        run.add(f"guided_{name}", "FluxGuidance", conditioning=f"@{name}", guidance=guidance)
        run.add(f"led_{name}", "HunyuanImageToVideo", positive=f"@guided_{name}", **given)
    run.load()
    led = {"positive": "@led_positive", "negative": "@led_negative", "latent_image": "@led_positive#1"}
    assert "TACO-DiT can't honour a given first frame with two guidances" in refused(comfyui, run, cfg=4.0, **led)


@models("hunyuan_video_15")
def test_a_first_image_of_15(comfyui: ComfyUI, both: Both, run: Pair) -> None:
    """The image stands in the latent's further channels, and a vision encoder has seen it."""
    given = {"start_image": "@start", "clip_vision_output": "@seen"}
    led = conditioned(run, "HunyuanVideo15ImageToVideo", **SIDES, **given)
    run.load()
    run.sample(save="_1", cfg=1.0, **led)
    run.sample(save="_4", cfg=4.0, **led)
    run.sample(save="_without", cfg=1.0, latent_image="@given#2")
    both(run, "_1", "_4", "_without")
    differ(comfyui, run, "_without", "_1")


@models("hunyuan_video_15_distilled")
def test_super_resolution_by_a_distilled_model(comfyui: ComfyUI, both: Both, run: Pair) -> None:
    """Each step is told where it goes; a second-order sampler also asks between the steps."""
    run.nodes["latent"]["inputs"] |= {"scale": 1.0, "seed": 9}
    given = {"start_image": "@start", "clip_vision_output": "@seen", "latent": "@latent", "noise_augmentation": 0.7}
    led = conditioned(run, "HunyuanVideo15SuperResolution", **given)
    run.load()
    run.sample(save="_1", cfg=1.0, **led)
    run.sample(save="_heun", cfg=1.0, sampler_name="dpm_2", **led)
    run.sample(save="_4", cfg=4.0, **led)
    both(run, "_1", "_heun", "_4")


@models("hunyuan_image_distilled")
def test_a_distilled_model_of_images(comfyui: ComfyUI, both: Both, run: Pair) -> None:
    run.load()
    run.sample(save="_4", cfg=1.0, steps=4)
    run.sample(save="_2", cfg=1.0, steps=2)
    both(run, "_4", "_2")


@models("hunyuan_image_refiner")
@pytest.mark.parametrize("augmentation", [0.0, 0.25])
def test_the_refiner_of_images(both: Both, run: Pair, augmentation: float) -> None:
    """It has layers for the next step's time, which ComfyUI leaves out."""
    run.nodes["latent"]["inputs"] |= {"frames": 1, "scale": 1.0, "seed": 9}
    run.add("led", "HunyuanRefinerLatent", positive="@positive", negative="@negative", latent="@latent")
    run.nodes["led"]["inputs"]["noise_augmentation"] = augmentation
    run.load()
    led = {"positive": "@led", "negative": "@led#1", "latent_image": "@led#2"}
    run.sample(save="_1", cfg=1.0, **led)
    run.sample(save="_4", cfg=4.0, **led)
    both(run, "_1", "_4")


@models("hunyuan_video_t2v")
def test_sides_that_comfyui_fails_at_are_refused(comfyui: ComfyUI, run: Pair) -> None:
    run.nodes["latent"]["inputs"]["height"] = 7
    run.load()
    assert "make width and height multiples of 16 pixels" in refused(comfyui, run, steps=2)

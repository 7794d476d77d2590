"""HunyuanVideo, 1.5 and HunyuanImage 2.1 with ComfyUI's own nodes for them: by ComfyUI alone and through the daemon."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from comfyui_graphs import Pair
from comfyui_server import ComfyUI, Outcome
from helpers import Daemon
from image_cases import Case, Sizes, write
from test_image_families import refused

Both = Callable[..., Outcome]
SEEN_WIDTH = 1152
"""Of the tokens of images, by which ComfyUI tells 1.5."""
BYT5 = {"byt5_in_dim": 36, "byt5_hidden_dim": 44}
SPELLED = {"byt5_width": 36}
DISTILLED = {**BYT5, "in_channels": 64, "out_channels": 64}
SEEING = {**BYT5, "vision_in_dim": SEEN_WIDTH, "out_channels": 32}
CASES = {
    case.golden: case
    for case in (
        Case("hunyuan_video_t2v", "hunyuan_video", size=(8, 6)),
        Case("hunyuan_video_i2v", "hunyuan_video", size=(8, 6), lora=("single_blocks.1.linear1",)),
        Case("hunyuan_video_i2v_replace", "hunyuan_video", size=(8, 6), lora=("double_blocks.0.img_attn.qkv",)),
        Case(
            "hunyuan_video_15",
            "hunyuan_video",
            32,
            (5, 3),
            ("double_blocks.0.img_mlp.2", "txt_in.individual_token_refiner.blocks.0.mlp.0"),
            text=SPELLED,
            config=SEEING,
        ),
        Case(
            "hunyuan_video_15_distilled",
            "hunyuan_video",
            32,
            (5, 3),
            text=SPELLED,
            config={**SEEING, "in_channels": 98},
        ),
        Case("hunyuan_image_21", "hunyuan_video", 64, (5, 7), ("single_blocks.0.linear2",), text=SPELLED),
        Case("hunyuan_image_distilled", "hunyuan_video", 64, (5, 7), text=SPELLED, config=DISTILLED),
        Case("hunyuan_image_refiner", "hunyuan_video", 32, (5, 7), config={"in_channels": 128, "out_channels": 64}),
    )
}
"""The goldens' models; ComfyUI takes others only with the channels of published ones."""
SIDES = {"width": 48, "height": 64, "length": 9, "batch_size": 1}


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
    for name in ("positive", "negative"):
        pair.nodes[name]["inputs"] |= case.text
    if case.has_frames:
        pair.nodes["latent"]["inputs"]["frames"] = 3
    pair.add("vae", "TestVideoVAE", channels=case.channels, pixels=16 if case.channels == 32 else 8)
    pair.add("start", "TestFrames", seed=1, frames=1, height=48, width=72)
    pair.add("seen", "TestClipVision", seed=4, tokens=5, width=SEEN_WIDTH)
    return pair


def models(*names: str) -> Any:
    return pytest.mark.parametrize("case", names, indirect=True)


@models("hunyuan_video_i2v", "hunyuan_video_i2v_replace", "hunyuan_video_15", "hunyuan_image_21")
def test_with_and_without_guidance_and_a_lora(comfyui: ComfyUI, both: Both, run: Pair, case: Case) -> None:
    """The ones that take an image have none."""
    run.load()
    run.sample(save="_1", cfg=1.0)
    run.sample(save="_4", cfg=4.0)
    run.on_model("LoraLoaderModelOnly", lora_name=case.file, strength_model=1.2)
    run.sample(save="_lora", cfg=1.0)
    both(run, "_1", "_4", "_lora")
    plain, merged = (comfyui.latent(run.file("taco", save)) for save in ("_1", "_lora"))
    assert (plain - merged).norm() > 1e-3 * plain.norm()


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
    masked, plain = (comfyui.latent(run.file("taco", save)) for save in ("_mask", "_plain"))
    assert (masked - plain).norm() > 1e-3 * plain.norm()


@models("hunyuan_video_t2v")
def test_guidance(comfyui: ComfyUI, both: Both, run: Pair) -> None:
    run.add("guided", "FluxGuidance", conditioning="@positive", guidance=2.5)
    run.load()
    run.sample(save="_2", cfg=1.0, positive="@guided")
    run.sample(save="_6", cfg=1.0)
    both(run, "_2", "_6")
    two, six = (comfyui.latent(run.file("taco", save)) for save in ("_2", "_6"))
    assert (two - six).norm() > 1e-3 * six.norm()


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
    plain, given = (comfyui.latent(run.file("taco", save)) for save in ("_without", "_1"))
    assert (plain - given).norm() > 1e-3 * plain.norm()


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
    given = {"vae": "@vae", **SIDES, "start_image": "@start", "clip_vision_output": "@seen"}
    run.add("led", "HunyuanVideo15ImageToVideo", positive="@positive", negative="@negative", **given)
    run.load()
    led = {"positive": "@led", "negative": "@led#1", "latent_image": "@led#2"}
    run.sample(save="_1", cfg=1.0, **led)
    run.sample(save="_4", cfg=4.0, **led)
    run.sample(save="_without", cfg=1.0, latent_image="@led#2")
    both(run, "_1", "_4", "_without")
    plain, with_image = (comfyui.latent(run.file("taco", save)) for save in ("_without", "_1"))
    assert (plain - with_image).norm() > 1e-3 * plain.norm()


@models("hunyuan_video_15_distilled")
def test_super_resolution_by_a_distilled_model(comfyui: ComfyUI, both: Both, run: Pair) -> None:
    """Each step is told where it goes; a second-order sampler also asks between the steps."""
    run.nodes["latent"]["inputs"] |= {"scale": 1.0, "seed": 9}
    given = {"vae": "@vae", "start_image": "@start", "clip_vision_output": "@seen", "latent": "@latent"}
    run.add("led", "HunyuanVideo15SuperResolution", positive="@positive", negative="@negative", **given)
    run.nodes["led"]["inputs"]["noise_augmentation"] = 0.7
    run.load()
    led = {"positive": "@led", "negative": "@led#1", "latent_image": "@led#2"}
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
def test_code_between_blocks_is_refused(comfyui: ComfyUI, run: Pair) -> None:
    run.load()
    run.on_model("TestReplace", what="patches_replace")
    assert "TACO-DiT can't honour patches_replace of 'dit'" in refused(comfyui, run, steps=2)


@models("hunyuan_video_t2v")
def test_sides_that_comfyui_fails_at_are_refused(comfyui: ComfyUI, run: Pair) -> None:
    run.nodes["latent"]["inputs"]["height"] = 7
    run.load()
    assert "make width and height multiples of 16 pixels" in refused(comfyui, run, steps=2)

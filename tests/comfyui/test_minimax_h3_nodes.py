"""MiniMax-H3 with ComfyUI's own nodes for it: by ComfyUI alone and through the daemon.

Latents are a video and its sound, which the sampler holds scaled onto the video's noise levels.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from comfyui_server import ComfyUI, Outcome
from helpers import Daemon
from image_cases import Case, Sizes, write
from test_two_latents import PARTS, Graph, both_parts

Both = Callable[..., Outcome]
STEP = 800
"""Samples for each step of a sound's latent."""
SIDES = {"width": 128, "height": 96, "length": 22}
CASES = {
    case.golden: case
    for case in (
        Case(
            "minimax_h3_t2v",
            "minimax",
            24,
            lora=("blocks.0.attn.qkv_proj", "blocks.1.mlp.fc2", "token_refiner.blocks.0.attn.out_proj"),
            text={"width": 40},
        ),
        Case(
            "minimax_h3_i2v",
            "minimax",
            24,
            lora=("blocks.1.adaln_proj.linear", "final_layer.video_out", "condition_proj"),
            text={"width": 40},
        ),
    )
}
"""A model with pruned modulations and one with full ones."""


@pytest.fixture
def case(request: pytest.FixtureRequest, comfyui_models: Path) -> Case:
    """A model whose file lies where ComfyUI looks for it, with a LoRA."""
    case = CASES[request.param]
    write(case, comfyui_models)
    return case


@pytest.fixture
def run(case: Case, endpoints: Callable[[int], Daemon]) -> Graph:
    """A graph with this model, prompts, an empty video with sound, and branches through daemons of 1, 2 and 3 ranks."""
    run = Graph(Sizes(case), {f"taco{n}": (n, endpoints(n).endpoint) for n in (1, 2)})  # type: ignore[arg-type]
    run.add("vae", "TestVideoVAE", channels=24, pixels=16)
    run.add("sound_vae", "TestSoundVAE", channels=32)
    for name, seed in (("positive", 1), ("negative", 2)):
        run.add(f"clip_{name}", "TestH3Clip", seed=seed, width=40)
        prompt = {"clip": f"@clip_{name}", "vae": "@vae", "prompt": "a fox" if seed == 1 else ""}
        run.add(name, "MiniMaxH3ImageToVideo", **prompt, **SIDES)
    run.add("empty", "EmptyMiniMaxH3LatentAV", **SIDES)
    run.latent = "empty"
    return run


def models(*names: str) -> Any:
    return pytest.mark.parametrize("case", names, indirect=True)


def parts_of(comfyui: ComfyUI, run: Graph, save: str) -> list[Any]:
    return [comfyui.latent(run.file("taco", f"{save}_{part}")) for part in PARTS]


@models(*CASES)
def test_with_and_without_guidance_and_a_lora(comfyui: ComfyUI, both: Both, run: Graph, case: Case) -> None:
    run.load()
    run.sample(save="_1", cfg=1.0)
    run.sample(save="_4", cfg=4.0, sampler_name="res_multistep", scheduler="simple")
    run.on_model("LoraLoaderModelOnly", lora_name=case.file, strength_model=1.2)
    run.sample(save="_lora", cfg=1.0)
    both(run, *both_parts("_1", "_4", "_lora"))
    for plain, merged in zip(*(parts_of(comfyui, run, save) for save in ("_1", "_lora")), strict=True):
        assert (plain - merged).norm() > 1e-3 * plain.norm()
    video, sound = parts_of(comfyui, run, "_1")
    assert video.shape == (1, 24, 7, 6, 8)
    assert sound.shape == (1, 32, 2, 37)


@models("minimax_h3_t2v")
def test_first_and_last_frame(comfyui: ComfyUI, both: Both, run: Graph) -> None:
    run.add("first", "TestFrames", seed=1, frames=1, height=60, width=72)
    run.add("last", "TestFrames", seed=2, frames=1, height=96, width=128)
    begun = {"clip": "@clip_positive", "vae": "@vae", "prompt": "a fox", "first_frame": "@first", "last_frame": "@last"}
    run.add("begun", "MiniMaxH3ImageToVideo", **begun, **SIDES)
    run.load()
    run.sample(save="_with", cfg=1.0, positive="@begun", latent_image="@begun#1")
    run.sample(save="_without", cfg=1.0)
    both(run, *both_parts("_with", "_without"))
    for given, plain in zip(*(parts_of(comfyui, run, save) for save in ("_with", "_without")), strict=True):
        assert (given - plain).norm() > 1e-2 * plain.norm()


@models("minimax_h3_i2v")
def test_guides_at_any_frame_with_sounds(comfyui: ComfyUI, both: Both, run: Graph) -> None:
    """A clip with its sound, a picture counted from the end, and a sound alone."""
    run.add("clip", "TestFrames", seed=3, frames=5, height=96, width=128)
    run.add("picture", "TestFrames", seed=4, frames=1, height=64, width=64)
    run.add("track", "TestSound", seed=5, samples=9 * STEP, rate=32000)
    guides = [
        {"image": "@clip", "audio": "@track", "frame_idx": 4},
        {"image": "@picture", "frame_idx": -1},
        {"audio": "@track", "frame_idx": 15},
    ]
    positive = "@positive"
    for number, guide in enumerate(guides):
        more = {"vae": "@vae", "audio_vae": "@sound_vae", "latent": "@empty"}
        positive = run.add(f"guide{number}", "MiniMaxH3AddGuide", positive=positive, **more, **guide)
    run.load()
    run.sample(cfg=2.5, positive=positive, steps=3)
    both(run, *both_parts(""))


@models("minimax_h3_t2v")
def test_references_of_all_kinds(comfyui: ComfyUI, both: Both, run: Graph) -> None:
    """Pictures of other sides, a video with a sound and one without, and a sound; with a guide, too."""
    run.add("wide", "TestFrames", seed=6, frames=1, height=64, width=128)
    run.add("tall", "TestFrames", seed=7, frames=1, height=96, width=64)
    run.add("movie", "TestFrames", seed=8, frames=22, height=64, width=96)
    run.add("mute", "TestFrames", seed=9, frames=6, height=64, width=64)
    run.add("track", "TestSound", seed=10, samples=8 * STEP, rate=32000)
    run.add("song", "TestSound", seed=11, samples=5 * STEP, rate=32000)
    given = {
        "ref_images.ref_image_0": "@wide",
        "ref_images.ref_image_1": "@tall",
        "ref_videos.ref_video_0": "@movie",
        "ref_videos.ref_video_1": "@mute",
        "ref_video_audios.ref_video_audio_0": "@track",
        "ref_audios.ref_audio_0": "@song",
    }
    common = {"clip": "@clip_positive", "vae": "@vae", "audio_vae": "@sound_vae", "prompt": "a fox", **SIDES}
    run.add("referring", "MiniMaxH3ReferenceToVideo", **common, ref_image_size="match", **given)
    guide = {"positive": "@referring", "vae": "@vae", "latent": "@empty", "image": "@tall", "frame_idx": 2}
    run.add("guided", "MiniMaxH3AddGuide", **guide)
    run.load()
    run.sample(save="_with", cfg=1.0, positive="@referring", latent_image="@referring#1")
    run.sample(save="_guided", cfg=1.0, positive="@guided")
    run.sample(save="_without", cfg=1.0)
    both(run, *both_parts("_with", "_guided", "_without"))
    outs = [parts_of(comfyui, run, save) for save in ("_with", "_guided", "_without")]
    for one, other in ((0, 1), (0, 2)):
        for given_, plain in zip(outs[one], outs[other], strict=True):
            assert (given_ - plain).norm() > 1e-3 * plain.norm()


@models(*CASES)
def test_masks_of_each_latent(comfyui: ComfyUI, both: Both, run: Graph) -> None:
    """What they keep is given at almost no noise; a mask in halves, and one of levels between."""
    run.add("moving", "TestLatent", seed=4, batch=1, channels=24, height=6, width=8, frames=7, scale=1.0)
    run.add("loud", "TestLatent", seed=5, batch=1, channels=32, height=2, width=37, scale=1.0)
    run.add("mask", "TestMask", height=96, width=128)
    run.add("mask_moving", "SetLatentNoiseMask", samples="@moving", mask="@mask")
    run.add("mask_loud", "SetLatentNoiseMask", samples="@loud", mask="@mask")
    run.load()
    for save, video, sound in (("_both", "mask_moving", "mask_loud"), ("_video", "mask_moving", "loud")):
        run.add(f"masked{save}", "LTXVConcatAVLatent", video_latent=f"@{video}", audio_latent=f"@{sound}")
        run.sample(save=save, cfg=1.0, latent_image=f"@masked{save}", denoise=0.9)
    both(run, *both_parts("_both", "_video"))
    outs = [parts_of(comfyui, run, save) for save in ("_both", "_video")]
    assert not outs[0][1].equal(outs[1][1])


@models("minimax_h3_t2v")
def test_other_shifts_before_and_behind_the_loader(comfyui: ComfyUI, both: Both, run: Graph) -> None:
    """As FastH3 has them."""
    run.on_model("MiniMaxH3SigmaShift", shift_video=10.0, shift_audio=3.0)
    run.load()
    run.sample(save="_before", cfg=1.0)
    run.on_model("MiniMaxH3SigmaShift", shift_video=6.0, shift_audio=6.0)
    run.sample(save="_behind", cfg=1.0)
    both(run, *both_parts("_before", "_behind"))


@models("minimax_h3_t2v")
def test_easy_cache_sees_the_sound_at_its_own_noise_level(comfyui: ComfyUI, both: Both, run: Graph) -> None:
    if "EasyCache" not in comfyui.nodes:
        pytest.skip("this version of ComfyUI has no EasyCache")
    settings = {"reuse_threshold": 3.0, "start_percent": 0.1, "end_percent": 0.95, "verbose": False}
    run.load()
    run.sample(save="_all", cfg=1.0, steps=12)
    run.on_model("EasyCache", **settings)
    run.sample(save="_some", cfg=1.0, steps=12)
    both(run, *both_parts("_all", "_some"))
    for every, some in zip(*(parts_of(comfyui, run, save) for save in ("_all", "_some")), strict=True):
        assert (every - some).norm() > 1e-4 * every.norm(), "steps are left out"


@models("minimax_h3_t2v")
def test_an_image_of_a_latent_without_sound(both: Both, run: Graph) -> None:
    """ComfyUI makes a pair of it."""
    run.add("image", "EmptyLatentImage", width=128, height=96, batch_size=1)
    run.load()
    run.sample(cfg=1.0, latent_image="@image")
    both(run, *both_parts(""))


@models("minimax_h3_i2v")
def test_the_unet_loader_of_ours(both: Both, run: Graph, case: Case) -> None:
    """It reads the file's header alone."""
    run.load("TACODiTUNETLoader", unet_name=case.file)
    run.sample(cfg=1.0)
    both(run, *both_parts(""))


@models("minimax_h3_t2v")
def test_code_between_blocks_is_refused(comfyui: ComfyUI, run: Graph) -> None:
    run.load()
    run.on_model("TestReplace", what="patches_replace")
    run.sample(steps=2)
    others = tuple(f"_{branch}" for branch in run.branches if branch != "taco")
    outcome = comfyui.run({name: node for name, node in run.nodes.items() if not name.endswith(others)})
    assert "TACO-DiT can't honour patches_replace of 'dit'" in outcome.error

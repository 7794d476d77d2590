"""MiniMax-H3 with ComfyUI's own nodes for it: by ComfyUI alone and through the daemon.

Latents are a video and its sound, which the sampler holds scaled onto the video's noise levels.
"""

from __future__ import annotations

from collections.abc import Callable

from comfyui_graphs import Pair, cached, differ, refused
from comfyui_server import ComfyUI, Outcome
from image_cases import Case
from video_cases import MINIMAX, models

Both = Callable[..., Outcome]
STEP = 800
"""Samples for each step of a sound's latent."""
SIDES = {"width": 128, "height": 96, "length": 22}


@models("minimax_h3_t2v")
def test_first_and_last_frame(comfyui: ComfyUI, both: Both, run: Pair) -> None:
    run.add("first", "TestFrames", seed=1, frames=1, height=60, width=72)
    run.add("last", "TestFrames", seed=2, frames=1, height=96, width=128)
    begun = {"clip": "@clip_positive", "vae": "@vae", "prompt": "a fox", "first_frame": "@first", "last_frame": "@last"}
    run.add("begun", "MiniMaxH3ImageToVideo", **begun, **SIDES)
    run.load()
    run.sample(save="_with", cfg=1.0, positive="@begun", latent_image="@begun#1")
    run.sample(save="_without", cfg=1.0)
    both(run, "_with", "_without")
    differ(comfyui, run, "_without", "_with", least=1e-2)


@models("minimax_h3_i2v")
def test_guides_at_any_frame_with_sounds(comfyui: ComfyUI, both: Both, run: Pair) -> None:
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
    both(run)


@models("minimax_h3_t2v")
def test_references_of_all_kinds(comfyui: ComfyUI, both: Both, run: Pair) -> None:
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
    both(run, "_with", "_guided", "_without")
    differ(comfyui, run, "_guided", "_with", "_without")


@models(*MINIMAX)
def test_masks_of_each_latent(comfyui: ComfyUI, both: Both, run: Pair) -> None:
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
    both(run, "_both", "_video")
    differ(comfyui, run, "_both", "_video")


@models("minimax_h3_t2v")
def test_other_shifts_before_and_behind_the_loader(comfyui: ComfyUI, both: Both, run: Pair) -> None:
    """As FastH3 has them."""
    run.on_model("MiniMaxH3SigmaShift", shift_video=10.0, shift_audio=3.0)
    run.load()
    run.sample(save="_before", cfg=1.0)
    run.on_model("MiniMaxH3SigmaShift", shift_video=6.0, shift_audio=6.0)
    run.sample(save="_behind", cfg=1.0)
    both(run, "_before", "_behind")


@models("minimax_h3_t2v")
def test_a_shift_of_zero_is_no_missing_one(comfyui: ComfyUI, both: Both, run: Pair) -> None:
    """It is the video's; with the sound's, ComfyUI divides 0 by 0."""
    run.load()
    run.sample(save="_plain", cfg=1.0)
    run.on_model("TestOptions", values='{"minimax_h3_sigma_shift_video": 0.0}')
    run.sample(save="_zero", cfg=1.0)
    both(run, "_plain", "_zero")
    differ(comfyui, run, "_plain", "_zero")
    run.on_model("TestOptions", values='{"minimax_h3_sigma_shift_audio": 0.0}')
    assert "minimax_h3_sigma_shift_audio" in refused(comfyui, run, save="_sound", cfg=1.0)


@models("minimax_h3_t2v")
def test_easy_cache_sees_the_sound_at_its_own_noise_level(comfyui: ComfyUI, both: Both, run: Pair) -> None:
    cached(comfyui, both, run)


@models("minimax_h3_t2v")
def test_an_image_of_a_latent_without_sound(both: Both, run: Pair) -> None:
    """ComfyUI makes a pair of it."""
    run.add("image", "EmptyLatentImage", width=128, height=96, batch_size=1)
    run.load()
    run.sample(cfg=1.0, latent_image="@image")
    both(run)


@models("minimax_h3_i2v")
def test_the_unet_loader_of_ours(both: Both, run: Pair, case: Case) -> None:
    """It reads the file's header alone."""
    run.load("TACODiTUNETLoader", unet_name=case.file)
    run.sample(cfg=1.0)
    both(run)

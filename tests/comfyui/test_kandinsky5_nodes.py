"""Kandinsky 5 with ComfyUI's own nodes for it: by ComfyUI alone and through the daemon."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from comfyui_graphs import Pair, differ, refused
from comfyui_server import ComfyUI, Outcome
from video_cases import KANDINSKY, conditioned, models

Both = Callable[..., Outcome]


@models(*KANDINSKY)
def test_a_batch(both: Both, run: Pair) -> None:
    run.nodes["latent"]["inputs"] |= {"batch": 2, "scale": 1.0, "seed": 9}
    run.load()
    run.sample(denoise=0.8)
    both(run)


@models("kandinsky5_image")
def test_a_mask(both: Both, run: Pair) -> None:
    """A video's network gets a mask of too many channels from ComfyUI, and fails."""
    run.nodes["latent"]["inputs"] |= {"scale": 1.0, "seed": 9}
    run.add("mask", "TestMask", height=64, width=80)
    run.add("masked", "SetLatentNoiseMask", samples="@latent", mask="@mask")
    run.load()
    run.sample(denoise=0.7, latent_image="@masked", sampler_name="dpmpp_2m")
    both(run)


@models("kandinsky5")
@pytest.mark.parametrize(("frames", "batch"), [(1, 1), (6, 2)], ids=["an image", "frames in a batch"])
def test_a_video_from_what_it_begins_with(comfyui: ComfyUI, both: Both, run: Pair, frames: int, batch: int) -> None:
    """As the workflow of the I2V models has it; what is decoded has its first frames put right after the sampler."""
    if "Kandinsky5ImageToVideo" not in comfyui.nodes:
        pytest.skip("this version of ComfyUI has no Kandinsky5ImageToVideo")
    run.nodes["start"]["inputs"]["frames"] = frames
    sides = {"width": 80, "height": 64, "length": 9, "batch_size": batch}
    inputs = conditioned(run, "Kandinsky5ImageToVideo", **sides, start_image="@start")
    run.load()
    run.sample(save="_1", cfg=1.0, steps=3, **inputs)
    run.sample(save="_5", cfg=5.0, steps=3, **inputs)
    run.sample(save="_without", cfg=1.0, steps=3, latent_image="@given#2")
    both(run, "_1", "_5", "_without")
    differ(comfyui, run, "_without", "_1", least=1e-2)


@models(*KANDINSKY)
def test_odd_sides_are_refused(comfyui: ComfyUI, run: Pair) -> None:
    """ComfyUI fails there."""
    run.nodes["latent"]["inputs"]["height"] = 9
    run.load()
    assert "x: its latents are 9 by 10; both must be even" in refused(comfyui, run, steps=2)

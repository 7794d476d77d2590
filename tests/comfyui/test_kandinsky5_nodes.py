"""Kandinsky 5 with ComfyUI's own nodes for it: by ComfyUI alone and through the daemon."""

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
CASES = {
    case.golden: case
    for case in (
        Case(
            "kandinsky5",
            "kandinsky5",
            size=(8, 10),
            lora=(
                "text_transformer_blocks.1.self_attention.to_key",
                "visual_transformer_blocks.0.feed_forward.in_layer",
            ),
        ),
        Case(
            "kandinsky5_image",
            "kandinsky5",
            size=(14, 10),
            lora=("visual_transformer_blocks.1.cross_attention.to_value", "visual_embeddings.in_layer"),
            config={"visual_embed_dim": 64, "in_visual_dim": 16, "out_visual_dim": 16},
        ),
    )
}
"""The goldens' models, with the channels of published ones."""


@pytest.fixture
def case(request: pytest.FixtureRequest, comfyui_models: Path) -> Case:
    """A model whose file lies where ComfyUI looks for it, with a LoRA."""
    case = CASES[request.param]
    write(case, comfyui_models)
    return case


@pytest.fixture
def run(case: Case, endpoints: Callable[[int], Daemon]) -> Pair:
    """A graph with this model, of a video a latent of 3 frames, and branches through daemons of 1, 2 and 3 ranks."""
    pair = Pair(Sizes(case), {f"taco{n}": (n, endpoints(n).endpoint) for n in (1, 2)})  # type: ignore[arg-type]
    if case.has_frames:
        pair.nodes["latent"]["inputs"]["frames"] = 3
    return pair


def models(*names: str) -> Any:
    return pytest.mark.parametrize("case", names, indirect=True)


@models(*CASES)
def test_with_and_without_guidance_and_a_lora(comfyui: ComfyUI, both: Both, run: Pair, case: Case) -> None:
    run.load()
    run.sample(save="_1", cfg=1.0)
    run.sample(save="_4", cfg=4.0)
    run.on_model("LoraLoaderModelOnly", lora_name=case.file, strength_model=1.2)
    run.sample(save="_lora", cfg=1.0)
    both(run, "_1", "_4", "_lora")
    plain, merged = (comfyui.latent(run.file("taco", save)) for save in ("_1", "_lora"))
    assert plain.ndim == (5 if case.has_frames else 4)
    assert (plain - merged).norm() > 1e-3 * plain.norm()


@models(*CASES)
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
def test_a_video_from_what_it_begins_with(
    comfyui: ComfyUI, both: Both, run: Pair, case: Case, frames: int, batch: int
) -> None:
    """As the workflow of the I2V models has it; what is decoded has its first frames put right after the sampler."""
    if "Kandinsky5ImageToVideo" not in comfyui.nodes:
        pytest.skip("this version of ComfyUI has no Kandinsky5ImageToVideo")
    run.add("vae", "TestVideoVAE", channels=16, pixels=8)
    run.add("start", "TestFrames", seed=1, frames=frames, height=48, width=72)
    sides = {"width": 80, "height": 64, "length": 9, "batch_size": batch}
    begun = {"positive": "@positive", "negative": "@negative", "vae": "@vae", "start_image": "@start"}
    run.add("begun", "Kandinsky5ImageToVideo", **begun, **sides)
    inputs = {"positive": "@begun", "negative": "@begun#1", "latent_image": "@begun#2"}
    run.load()
    run.sample(save="_1", cfg=1.0, steps=3, **inputs)
    run.sample(save="_5", cfg=5.0, steps=3, **inputs)
    run.sample(save="_without", cfg=1.0, steps=3, latent_image="@begun#2")
    both(run, "_1", "_5", "_without")
    plain, led = (comfyui.latent(run.file("taco", save)) for save in ("_without", "_1"))
    assert (led - plain).norm() > 1e-2 * plain.norm()


@models(*CASES)
def test_stretched_positions(comfyui: ComfyUI, both: Both, run: Pair) -> None:
    if "ScaleROPE" not in comfyui.nodes:
        pytest.skip("this version of ComfyUI has no ScaleROPE")
    options = {"scale_x": 0.7, "scale_y": 1.5, "scale_t": 0.8, "shift_x": 2.0, "shift_y": -1.0, "shift_t": 1.0}
    run.load()
    run.on_model("ScaleROPE", **options)
    run.sample(cfg=1.0)
    both(run)


@models("kandinsky5")
def test_code_between_blocks_is_refused(comfyui: ComfyUI, run: Pair) -> None:
    run.load()
    run.on_model("TestReplace", what="patches_replace")
    assert "TACO-DiT can't honour patches_replace of 'dit'" in refused(comfyui, run, steps=2)


@models(*CASES)
def test_odd_sides_are_refused(comfyui: ComfyUI, run: Pair) -> None:
    """ComfyUI fails there."""
    run.nodes["latent"]["inputs"]["height"] = 9
    run.load()
    assert "x: its latents are 9 by 10; both must be even" in refused(comfyui, run, steps=2)

"""What every video family does with ComfyUI's nodes: by ComfyUI alone and through the daemon."""

from __future__ import annotations

from collections.abc import Callable

from comfyui_graphs import Pair, cached, differ, refused
from comfyui_server import ComfyUI, Outcome
from image_cases import Case
from video_cases import KANDINSKY, VIDEO, models, stretched

Both = Callable[..., Outcome]
BY_TEXT_ALONE = [golden for golden, case in VIDEO.items() if case.lora and not golden.startswith(("wan_", "ltx2"))]
"""Models with a LoRA whose networks do without anything else. Tests of the others give them what they need."""
ONE_EACH = ("wan21_t2v", "wan_animate", "hunyuan_video_t2v", "kandinsky5", "ltxv_t2v", "ltx23_av", "minimax_h3_t2v")


@models(*BY_TEXT_ALONE)
def test_with_and_without_guidance_and_a_lora(comfyui: ComfyUI, both: Both, run: Pair, case: Case) -> None:
    """The ones that take an image have none."""
    run.load()
    run.sample(save="_1", cfg=1.0)
    run.sample(save="_4", cfg=4.0)
    run.on_model("LoraLoaderModelOnly", lora_name=case.file, strength_model=1.2)
    run.sample(save="_lora", cfg=1.0)
    both(run, "_1", "_4", "_lora")
    differ(comfyui, run, "_1", "_lora")
    latents = [comfyui.latent(run.file("taco", name)) for name in run.saved("_1")]
    assert [each.ndim for each in latents] == ([5, 4] if len(run.parts) > 1 else [5 if case.has_frames else 4])


@models("wan21_t2v", *KANDINSKY)
def test_stretched_positions(comfyui: ComfyUI, both: Both, run: Pair) -> None:
    run.load()
    run.sample(save="_plain", cfg=1.0)
    stretched(comfyui, run)
    run.sample(save="_stretched", cfg=1.0)
    both(run, "_plain", "_stretched")
    differ(comfyui, run, "_plain", "_stretched")


@models(*BY_TEXT_ALONE)
def test_easy_cache(comfyui: ComfyUI, both: Both, run: Pair) -> None:
    cached(comfyui, both, run)


@models("wan21_t2v", "kandinsky5")
def test_an_empty_map_of_positions(comfyui: ComfyUI, both: Both, run: Pair, case: Case) -> None:
    """Kandinsky 5's network looks whether it is there, and leaves out its own factors if it is."""
    run.load()
    run.sample(save="_plain", cfg=1.0, steps=2)
    run.on_model("TestOptions", values='{"rope_options": {}}')
    run.sample(save="_empty", cfg=1.0, steps=2)
    both(run, "_plain", "_empty")
    plain, empty = (comfyui.latent(run.file("taco", save)) for save in ("_plain", "_empty"))
    assert plain.equal(empty) == (case.golden == "wan21_t2v")


@models(*ONE_EACH)
def test_code_between_blocks_is_refused(comfyui: ComfyUI, run: Pair) -> None:
    run.load()
    run.on_model("TestReplace", what="patches_replace")
    assert "TACO-DiT can't honour patches_replace of 'dit'" in refused(comfyui, run, steps=2)

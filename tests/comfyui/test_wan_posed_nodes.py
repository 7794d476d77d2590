"""Wan 2.2 Animate, SCAIL and SCAIL-2 with ComfyUI's own nodes for them: by ComfyUI alone and through the daemon."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from comfyui_graphs import Pair, differ
from comfyui_server import ComfyUI, Outcome
from helpers import Daemon
from image_cases import Case
from video_cases import POSED, conditioned, models, stretched

Both = Callable[..., Outcome]
SIDES = {"width": 96, "height": 64, "length": 9, "batch_size": 1}
ANIMATE = {
    "length": 5,
    "continue_motion_max_frames": 5,
    "video_frame_offset": 0,
    "clip_vision_output": "@seen",
    "reference_image": "@start",
    "face_video": "@video",
    "pose_video": "@pose",
}
SCAIL = {
    "pose_strength": 0.9,
    "pose_start": 0.0,
    "pose_end": 1.0,
    "video_frame_offset": 0,
    "previous_frame_count": 5,
    "clip_vision_output": "@seen",
    "reference_image": "@start",
    "pose_video": "@pose",
}
MASKED = {**SCAIL, "reference_image": "@views", "reference_image_mask": "@colours", "pose_video_mask": "@video"}
USES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "animate": ("wan_animate", "WanAnimateToVideo", ANIMATE),
    "animate, poses alone": ("wan_animate", "WanAnimateToVideo", {**ANIMATE, "face_video": None}),
    "animate, two videos": ("wan_animate", "WanAnimateToVideo", {**ANIMATE, "batch_size": 2}),
    "animate, a person replaced": (
        "wan_animate",
        "WanAnimateToVideo",
        {
            **{key: value for key, value in ANIMATE.items() if key != "face_video"},
            "background_video": "@pose",
            "character_mask": "@mask",
            "continue_motion": "@video",
        },
    ),
    "scail": ("wan_scail", "WanSCAILToVideo", SCAIL),
    "scail, two videos": ("wan_scail", "WanSCAILToVideo", {**SCAIL, "batch_size": 2, "clip_vision_output": None}),
    "scail2": ("wan_scail2", "WanSCAILToVideo", MASKED),
    "scail2, a person replaced": ("wan_scail2", "WanSCAILToVideo", {**MASKED, "replacement_mode": True}),
    "scail2, poses for some steps": ("wan_scail2", "WanSCAILToVideo", {**MASKED, "pose_start": 0.3, "pose_end": 0.8}),
    "scail2, continued": ("wan_scail2", "WanSCAILToVideo", {**MASKED, "previous_frames": "@pose"}),
}
"""The model, ComfyUI's node for it, and what that is given."""


@pytest.mark.parametrize(("case", "kind", "given"), USES.values(), ids=list(USES), indirect=["case"])
def test_what_is_given_beside_the_text(
    comfyui: ComfyUI, both: Both, run: Pair, case: Case, kind: str, given: dict[str, Any]
) -> None:
    run.load()
    inputs = conditioned(run, kind, **{**SIDES, **given})
    # ComfyUI encodes a face at every step, which takes a CPU long.
    steps = 2 if case.golden == "wan_animate" else 3
    run.sample(save="_1", cfg=1.0, steps=steps, **inputs)
    run.sample(save="_4", cfg=4.0, steps=steps, **inputs)
    run.sample(save="_without", cfg=1.0, steps=steps, latent_image="@given#2")
    both(run, "_1", "_4", "_without")
    differ(comfyui, run, "_without", "_1")


@models(*POSED)
def test_a_lora(comfyui: ComfyUI, both: Both, run: Pair, case: Case) -> None:
    animate = case.golden == "wan_animate"
    kind, given = ("WanAnimateToVideo", ANIMATE) if animate else ("WanSCAILToVideo", SCAIL)
    run.load()
    inputs = conditioned(run, kind, **{**SIDES, **given})
    run.sample(save="_plain", cfg=1.0, steps=2, **inputs)
    run.on_model("LoraLoaderModelOnly", lora_name=case.file, strength_model=1.2)
    run.sample(save="_lora", cfg=1.0, steps=2, **inputs)
    both(run, "_plain", "_lora")
    differ(comfyui, run, "_plain", "_lora")


@models("wan_animate")
def test_a_face_is_encoded_once_a_run(both: Both, run: Pair, endpoints: Callable[[int], Daemon]) -> None:
    def told() -> list[dict[str, int]]:
        found = []
        for ranks in (1, 2, 3):
            with endpoints(ranks).client() as client:
                found.append(client.stats()["prefix"])
        return found

    run.add("other", "TestFrames", seed=7, frames=5, height=64, width=96)
    run.load()
    before = told()
    given = {**SIDES, **ANIMATE, "face_video": "@other"}
    run.sample(cfg=1.0, steps=3, **conditioned(run, "WanAnimateToVideo", **given))
    both(run)
    for one, other in zip(before, told(), strict=True):
        assert (other["hits"] - one["hits"], other["misses"] - one["misses"]) == (2, 1)


@models("wan_scail2")
def test_stretched_positions(comfyui: ComfyUI, both: Both, run: Pair) -> None:
    """Those of references and poses stay."""
    run.load()
    stretched(comfyui, run)
    for save, replaces in {"_shown": False, "_replaced": True}.items():
        given = {**SIDES, **MASKED, "replacement_mode": replaces}
        run.sample(save=save, cfg=1.0, steps=3, **conditioned(run, "WanSCAILToVideo", f"given{save}", **given))
    both(run, "_shown", "_replaced")

"""Wan 2.2 Animate, SCAIL and SCAIL-2 with ComfyUI's own nodes for them: by ComfyUI alone and through the daemon."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from comfyui_graphs import Pair
from comfyui_server import ComfyUI, Outcome
from conftest import PATH
from helpers import Daemon
from image_cases import Case, Sizes, write

Both = Callable[..., Outcome]
FACE = {"widths": [2] * 8, "style": 8, "motion": 4, "outputs": 512, "face": 8}
"""As the tests' pack makes ComfyUI's."""
CASES = {
    case.golden: case
    for case in (
        Case(
            "wan_animate",
            "wan",
            config={"in_dim": 36, "out_dim": 16, "face": FACE},
            lora=(
                "blocks.3.self_attn.q",
                "face_adapter.fuser_blocks.1.linear1_kv",
                "face_adapter.fuser_blocks.0.linear2",
            ),
        ),
        Case("wan_scail", "wan", config={"in_dim": 20, "out_dim": 16}, lora=("blocks.1.cross_attn.v_img",)),
        Case("wan_scail2", "wan", config={"in_dim": 20, "out_dim": 16, "mask_in_dim": 28}, lora=("blocks.0.ffn.0",)),
    )
}
"""The goldens' models, with the channels of published ones."""
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


@pytest.fixture
def case(request: pytest.FixtureRequest, comfyui_models: Path) -> Case:
    """A model whose file lies where ComfyUI looks for it, with a LoRA."""
    case = CASES[request.param]
    words = {"wan_animate": "class AnimateWanModel", "wan_scail": "class SCAILWanModel"}
    word = words.get(case.golden, "class SCAIL2WanModel")
    if not any(word in path.read_text() for path in Path(PATH, "comfy/ldm/wan").glob("*.py")):
        pytest.skip(f"this version of ComfyUI has no {word}")
    write(case, comfyui_models)
    return case


@pytest.fixture
def run(case: Case, endpoints: Callable[[int], Daemon]) -> Pair:
    """A graph with this model and what it may be given, and branches through daemons of 1, 2 and 3 ranks."""
    pair = Pair(Sizes(case), {f"taco{n}": (n, endpoints(n).endpoint) for n in (1, 2)})  # type: ignore[arg-type]
    pair.nodes["latent"]["inputs"]["frames"] = 3
    pair.add("vae", "TestVideoVAE", channels=16, pixels=8)
    pair.add("start", "TestFrames", seed=1, frames=1, height=48, width=72)
    pair.add("views", "TestFrames", seed=2, frames=2, height=64, width=96)
    pair.add("colours", "TestFrames", seed=3, frames=2, height=64, width=96)
    pair.add("video", "TestFrames", seed=4, frames=9, height=64, width=96)
    pair.add("pose", "TestFrames", seed=5, frames=9, height=64, width=96)
    pair.add("mask", "TestMask", height=64, width=96)
    pair.add("seen", "TestClipVision", seed=6, tokens=5)
    return pair


def conditioned(run: Pair, name: str, kind: str, given: Mapping[str, Any]) -> dict[str, str]:
    """One of ComfyUI's nodes that make conditioning and the latent of a video; what a sampler takes of it."""
    chosen = {key: value for key, value in {**SIDES, **given}.items() if value is not None}
    run.add(name, kind, positive="@positive", negative="@negative", vae="@vae", **chosen)
    return {"positive": f"@{name}", "negative": f"@{name}#1", "latent_image": f"@{name}#2"}


@pytest.mark.parametrize(("case", "kind", "given"), USES.values(), ids=list(USES), indirect=["case"])
def test_what_is_given_beside_the_text(
    comfyui: ComfyUI, both: Both, run: Pair, case: Case, kind: str, given: dict[str, Any]
) -> None:
    run.load()
    inputs = conditioned(run, "given", kind, given)
    # ComfyUI encodes a face at every step, which takes a CPU long.
    steps = 2 if case.golden == "wan_animate" else 3
    run.sample(save="_1", cfg=1.0, steps=steps, **inputs)
    run.sample(save="_4", cfg=4.0, steps=steps, **inputs)
    run.sample(save="_without", cfg=1.0, steps=steps, latent_image="@given#2")
    both(run, "_1", "_4", "_without")
    plain, led = (comfyui.latent(run.file("taco", save)) for save in ("_without", "_1"))
    assert (led - plain).norm() > 1e-3 * plain.norm()


@pytest.mark.parametrize("case", CASES, indirect=True)
def test_a_lora(comfyui: ComfyUI, both: Both, run: Pair, case: Case) -> None:
    kind = "WanAnimateToVideo" if case.golden == "wan_animate" else "WanSCAILToVideo"
    run.load()
    inputs = conditioned(run, "given", kind, ANIMATE if case.golden == "wan_animate" else SCAIL)
    run.sample(save="_plain", cfg=1.0, steps=2, **inputs)
    run.on_model("LoraLoaderModelOnly", lora_name=case.file, strength_model=1.2)
    run.sample(save="_lora", cfg=1.0, steps=2, **inputs)
    both(run, "_plain", "_lora")
    plain, merged = (comfyui.latent(run.file("taco", save)) for save in ("_plain", "_lora"))
    assert (plain - merged).norm() > 1e-3 * plain.norm()


@pytest.mark.parametrize("case", ["wan_animate"], indirect=True)
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
    given = {**ANIMATE, "face_video": "@other"}
    run.sample(cfg=1.0, steps=3, **conditioned(run, "given", "WanAnimateToVideo", given))
    both(run)
    for one, other in zip(before, told(), strict=True):
        assert (other["hits"] - one["hits"], other["misses"] - one["misses"]) == (2, 1)


@pytest.mark.parametrize("case", ["wan_scail2"], indirect=True)
def test_stretched_positions(comfyui: ComfyUI, both: Both, run: Pair) -> None:
    """Those of references and poses stay."""
    if "ScaleROPE" not in comfyui.nodes:
        pytest.skip("this version of ComfyUI has no ScaleROPE")
    options = {"scale_x": 0.7, "scale_y": 1.5, "scale_t": 0.8, "shift_x": 2.0, "shift_y": -1.0, "shift_t": 1.0}
    run.load()
    run.on_model("ScaleROPE", **options)
    for save, replaces in {"_shown": False, "_replaced": True}.items():
        given = {**MASKED, "replacement_mode": replaces}
        run.sample(save=save, cfg=1.0, steps=3, **conditioned(run, f"given{save}", "WanSCAILToVideo", given))
    both(run, "_shown", "_replaced")

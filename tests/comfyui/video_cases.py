"""Tiny models of the video families as graphs of a ComfyUI use them, and what their tests have in common.

Models are the goldens', but ComfyUI takes some only with the channels of published ones.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from comfyui_graphs import AVPair, Pair
from comfyui_server import PATH, ComfyUI, has
from helpers import read_golden
from image_cases import Case, Sizes

__all__ = [
    "FAMILIES",
    "HUNYUAN",
    "KANDINSKY",
    "LTX",
    "MINIMAX",
    "POSED",
    "SEEN_WIDTH",
    "VIDEO",
    "WAN",
    "conditioned",
    "graph_of",
    "has_sound",
    "models",
    "pixels_of",
    "skip_what_comfyui_lacks",
    "stretched",
]


def _by_golden(*cases: Case) -> dict[str, Case]:
    return {case.golden: case for case in cases}


WAN = _by_golden(
    Case("wan21_t2v", "wan", size=(9, 13), lora=("blocks.0.self_attn.q", "blocks.1.ffn.2")),
    Case("wan21_i2v", "wan", lora=("blocks.0.cross_attn.k_img", "blocks.1.cross_attn.o")),
    Case("wan22_i2v", "wan", lora=("blocks.1.self_attn.v",)),
    Case("wan22_ti2v", "wan", 48, (4, 6), ("blocks.0.ffn.0",)),
    Case("wan_flf", "wan", lora=("blocks.0.ffn.0",), config={"in_dim": 36, "out_dim": 16, "clip_dim": 40}),
    Case(
        "wan_fun",
        "wan",
        lora=("blocks.0.ffn.0",),
        config={"in_dim": 48, "out_dim": 16, "in_dim_ref_conv": 16, "clip_dim": 40},
    ),
    Case(
        "wan_fun_frames", "wan", lora=("blocks.0.ffn.0",), config={"in_dim": 52, "out_dim": 16, "in_dim_ref_conv": 16}
    ),
    Case("wan_camera", "wan", config={"in_dim": 32, "out_dim": 16, "in_dim_control_adapter": 24, "clip_dim": 40}),
    Case(
        "wan_camera_22",
        "wan",
        lora=("blocks.0.ffn.0",),
        config={"in_dim": 36, "out_dim": 16, "in_dim_control_adapter": 24},
    ),
    Case("wan_vace", "wan", config={"in_dim": 16, "out_dim": 16, "vace_in_dim": 96}, lora=("vace_blocks.0.ffn.0",)),
)
FACE = {"widths": [2] * 8, "style": 8, "motion": 4, "outputs": 512, "face": 8}
"""As the tests' pack makes ComfyUI's."""
POSED = _by_golden(
    Case(
        "wan_animate",
        "wan",
        config={"in_dim": 36, "out_dim": 16, "face": FACE},
        lora=("blocks.3.self_attn.q", "face_adapter.fuser_blocks.1.linear1_kv", "face_adapter.fuser_blocks.0.linear2"),
    ),
    Case("wan_scail", "wan", config={"in_dim": 20, "out_dim": 16}, lora=("blocks.1.cross_attn.v_img",)),
    Case("wan_scail2", "wan", config={"in_dim": 20, "out_dim": 16, "mask_in_dim": 28}, lora=("blocks.0.ffn.0",)),
)
SEEN_WIDTH = 1152
"""Of the tokens of images, by which ComfyUI tells HunyuanVideo 1.5."""
_BYT5 = {"byt5_in_dim": 36, "byt5_hidden_dim": 44}
_SPELLED = {"byt5_width": 36}
_SEEING = {**_BYT5, "vision_in_dim": SEEN_WIDTH, "out_channels": 32}
HUNYUAN = _by_golden(
    Case("hunyuan_video_t2v", "hunyuan_video", size=(8, 6)),
    Case("hunyuan_video_i2v", "hunyuan_video", size=(8, 6), lora=("single_blocks.1.linear1",)),
    Case("hunyuan_video_i2v_replace", "hunyuan_video", size=(8, 6), lora=("double_blocks.0.img_attn.qkv",)),
    Case(
        "hunyuan_video_15",
        "hunyuan_video",
        32,
        (5, 3),
        ("double_blocks.0.img_mlp.2", "txt_in.individual_token_refiner.blocks.0.mlp.0"),
        text=_SPELLED,
        config=_SEEING,
    ),
    Case(
        "hunyuan_video_15_distilled",
        "hunyuan_video",
        32,
        (5, 3),
        text={**_SPELLED, "width": 40},
        config={**_SEEING, "in_channels": 98, "context_in_dim": 40},
    ),
    Case("hunyuan_image_21", "hunyuan_video", 64, (5, 7), ("single_blocks.0.linear2",), text=_SPELLED),
    Case(
        "hunyuan_image_distilled",
        "hunyuan_video",
        64,
        (5, 7),
        text=_SPELLED,
        config={**_BYT5, "in_channels": 64, "out_channels": 64},
    ),
    Case("hunyuan_image_refiner", "hunyuan_video", 32, (5, 7), config={"in_channels": 128, "out_channels": 64}),
)
KANDINSKY = _by_golden(
    Case(
        "kandinsky5",
        "kandinsky5",
        size=(8, 10),
        lora=("text_transformer_blocks.1.self_attention.to_key", "visual_transformer_blocks.0.feed_forward.in_layer"),
    ),
    Case(
        "kandinsky5_image",
        "kandinsky5",
        size=(14, 10),
        lora=("visual_transformer_blocks.1.cross_attention.to_value", "visual_embeddings.in_layer"),
        config={"visual_embed_dim": 64, "in_visual_dim": 16, "out_visual_dim": 16},
    ),
)
_BLOCK, _CONNECTOR = "transformer_blocks.0", "audio_embeddings_connector.transformer_1d_blocks.0"
LTX = _by_golden(
    Case("ltxv_t2v", "lightricks", 128, (4, 6), (f"{_BLOCK}.attn1.to_q", f"{_BLOCK}.ff.net.2")),
    Case("ltxv_i2v", "lightricks", 128, (4, 6)),
    Case("ltx2", "lightricks", 128, (4, 6), (f"{_BLOCK}.audio_to_video_attn.to_q",), text={"width": 16}),
    Case("ltx23_av", "lightricks", 128, (4, 6), (f"{_BLOCK}.audio_to_video_attn.to_q", f"{_CONNECTOR}.attn1.to_v")),
    Case("ltx25_av", "lightricks", 128, (3, 5)),
)
MINIMAX = _by_golden(
    Case(
        "minimax_h3_t2v",
        "minimax",
        24,
        (6, 8),
        ("blocks.0.attn.qkv_proj", "blocks.1.mlp.fc2", "token_refiner.blocks.0.attn.out_proj"),
        text={"width": 40},
    ),
    Case(
        "minimax_h3_i2v",
        "minimax",
        24,
        (6, 8),
        ("blocks.1.adaln_proj.linear", "final_layer.video_out", "condition_proj"),
        text={"width": 40},
    ),
)
"""A model with pruned modulations and one with full ones."""
FAMILIES = (WAN, POSED, HUNYUAN, KANDINSKY, LTX, MINIMAX)
VIDEO: dict[str, Case] = {golden: case for family in FAMILIES for golden, case in family.items()}
_CLASSES = {"wan_animate": "AnimateWanModel", "wan_scail": "SCAILWanModel", "wan_scail2": "SCAIL2WanModel"}
"""ComfyUI's networks that it hasn't always had."""


def models(*names: str) -> Any:
    """Parametrize a test with these goldens' models, for the fixtures ``case`` and ``run``."""
    return pytest.mark.parametrize("case", names, indirect=True)


def pixels_of(case: Case) -> int:
    """Of a cell of a model's latent, along each side."""
    return {128: 32, 48: 16, 32: 16, 24: 16}.get(case.channels, 8)


def skip_what_comfyui_lacks(case: Case, comfyui: ComfyUI) -> None:
    """Skip the test if this version of ComfyUI can't have the model."""
    name = _CLASSES.get(case.golden)
    if name and not any(f"class {name}" in path.read_text() for path in Path(PATH, "comfy/ldm/wan").glob("*.py")):
        pytest.skip(f"this version of ComfyUI has no {name}")
    if has_sound(case) and "LTXVConcatAVLatent" not in comfyui.nodes:
        pytest.skip("this version of ComfyUI has no latents of several parts")


def has_sound(case: Case) -> bool:
    return case.golden in MINIMAX or (case.golden in LTX and not case.golden.startswith("ltxv"))


def graph_of(case: Case, also: Mapping[str, tuple[int, str]]) -> Pair:
    """A graph with this model, prompts, an empty latent, and what its family's nodes may be given.

    Args:
        case: A model of `VIDEO`.
        also: See `Pair`.
    """
    # It has of `TinyModel` what a graph asks for.
    run = (AVPair if has_sound(case) else Pair)(Sizes(case), also)  # type: ignore[arg-type]
    prepare = next(prepare for family, prepare in _PREPARED if case.golden in family)
    prepare(run, case)
    return run


def _with_frames(run: Pair, case: Case) -> None:
    for name in ("positive", "negative"):
        run.nodes[name]["inputs"] |= case.text
    if case.has_frames:
        run.nodes["latent"]["inputs"]["frames"] = 3
    run.add("vae", "TestVideoVAE", channels=case.channels, pixels=pixels_of(case))
    run.add("start", "TestFrames", seed=1, frames=1, height=48, width=72)


def _wan(run: Pair, case: Case) -> None:
    _with_frames(run, case)
    run.add("end", "TestFrames", seed=2, frames=1, height=64, width=80)
    run.add("video", "TestFrames", seed=3, frames=9, height=64, width=80)
    run.add("seen", "TestClipVision", seed=4, tokens=5)
    run.add("seen_end", "TestClipVision", seed=5, tokens=5)


def _posed(run: Pair, case: Case) -> None:
    _with_frames(run, case)
    run.add("views", "TestFrames", seed=2, frames=2, height=64, width=96)
    run.add("colours", "TestFrames", seed=3, frames=2, height=64, width=96)
    run.add("video", "TestFrames", seed=4, frames=9, height=64, width=96)
    run.add("pose", "TestFrames", seed=5, frames=9, height=64, width=96)
    run.add("mask", "TestMask", height=64, width=96)
    run.add("seen", "TestClipVision", seed=6, tokens=5)


def _hunyuan(run: Pair, case: Case) -> None:
    _with_frames(run, case)
    run.add("seen", "TestClipVision", seed=4, tokens=5, width=SEEN_WIDTH)


def _ltx(run: Pair, case: Case) -> None:
    """At 24 frames a second, with a sound of 10 steps; raw states of a text for LTX-2's connectors.

    Before ComfyUI's network had connectors its text encoder did, whose states are for video and sound.
    """
    connects = has("comfy/ldm/lightricks/av_model.py", "preprocess_text_embeds")
    run.nodes["latent"]["inputs"]["frames"] = 3
    video = read_golden(case.golden).config["image_model"] == "ltxv"
    raw = json.dumps({"unprocessed_ltxav_embeds": True} if connects else {})
    for name in ("positive", "negative"):
        run.nodes[f"{name}_text"] = run.nodes.pop(name)
        if not video and not connects:
            run.nodes[f"{name}_text"]["inputs"]["width"] *= 2
        # LTX-Video's network can't do without its text encoder's mask.
        given = {"hidden": 3} if video else {"values": raw}
        run.add(f"{name}_raw", "TestTextMask" if video else "TestValues", conditioning=f"@{name}_text", **given)
    run.add("timed", "LTXVConditioning", positive="@positive_raw", negative="@negative_raw", frame_rate=24.0)
    run.add("positive", "TestValues", conditioning="@timed", values="{}")
    run.add("negative", "TestValues", conditioning="@timed#1", values="{}")
    rows, columns = case.size
    sides = {"height": 32 * rows, "width": 32 * columns}
    run.add("vae", "TestLtxVAE", sound=False)
    run.add("sound_vae", "TestLtxVAE", sound=True)
    run.add("start", "TestFrames", seed=1, frames=1, **sides)
    run.add("end", "TestFrames", seed=2, frames=9, **sides)
    run.add("area", "TestMask", **sides)
    if not video:
        run.add("quiet", "TestLatent", seed=5, batch=1, channels=8, height=10, width=16, scale=0.0)
        run.add("empty", "LTXVConcatAVLatent", video_latent="@latent", audio_latent="@quiet")
        run.latent = "empty"


def _minimax(run: Pair, case: Case) -> None:
    sides = {"width": 128, "height": 96, "length": 22}
    run.add("vae", "TestVideoVAE", channels=24, pixels=16)
    run.add("sound_vae", "TestSoundVAE", channels=32)
    for name, seed in (("positive", 1), ("negative", 2)):
        run.add(f"clip_{name}", "TestH3Clip", seed=seed, width=40)
        prompt = {"clip": f"@clip_{name}", "vae": "@vae", "prompt": "a fox" if seed == 1 else ""}
        run.add(name, "MiniMaxH3ImageToVideo", **prompt, **sides)
    run.add("empty", "EmptyMiniMaxH3LatentAV", **sides)
    run.latent = "empty"


_PREPARED: tuple[tuple[Mapping[str, Case], Callable[[Pair, Case], None]], ...] = (
    (WAN, _wan),
    (POSED, _posed),
    (HUNYUAN, _hunyuan),
    (KANDINSKY, _with_frames),
    (LTX, _ltx),
    (MINIMAX, _minimax),
)


def conditioned(run: Pair, kind: str, name: str = "given", **given: Any) -> dict[str, str]:
    """One of the nodes that make conditioning and the latent of a video; what a sampler takes of it."""
    chosen = {key: value for key, value in given.items() if value is not None}
    run.add(name, kind, positive="@positive", negative="@negative", vae="@vae", **chosen)
    return {"positive": f"@{name}", "negative": f"@{name}#1", "latent_image": f"@{name}#2"}


def stretched(comfyui: ComfyUI, run: Pair) -> None:
    """Put other positions on each branch's MODEL."""
    if "ScaleROPE" not in comfyui.nodes:
        pytest.skip("this version of ComfyUI has no ScaleROPE")
    options = {"scale_x": 0.7, "scale_y": 1.5, "scale_t": 0.8, "shift_x": 2.0, "shift_y": -1.0, "shift_t": 1.0}
    run.on_model("ScaleROPE", **options)

"""The image families that came after Flux.1, SD3 and PixArt: the same graphs by ComfyUI and through the daemon."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from comfyui_graphs import Pair, cached, refused
from comfyui_server import PATH, ComfyUI, Outcome, version
from helpers import Daemon
from image_cases import CASES, Case, Sizes, named, write

Both = Callable[..., Outcome]


@pytest.fixture(params=CASES, ids=lambda case: case.golden)
def case(request: pytest.FixtureRequest, comfyui_models: Path) -> Case:
    """A model whose file lies where ComfyUI looks for it, with a LoRA."""
    case: Case = request.param
    write(case, comfyui_models)
    return case


@pytest.fixture
def run(case: Case, endpoints: Callable[[int], Daemon]) -> Pair:
    """A graph with this model, and branches through daemons of 1, 2 and 3 ranks."""
    pair = Pair(Sizes(case), {f"taco{n}": (n, endpoints(n).endpoint) for n in (1, 2)})  # type: ignore[arg-type]
    for name in ("positive", "negative"):
        pair.nodes[name]["inputs"] |= case.text
    return pair


def test_with_and_without_guidance_and_a_lora(comfyui: ComfyUI, both: Both, run: Pair, case: Case) -> None:
    run.load()
    run.sample(save="_1", cfg=1.0)
    run.sample(save="_4", cfg=4.0)
    run.on_model("LoraLoaderModelOnly", lora_name=case.file, strength_model=1.2)
    run.sample(save="_lora", cfg=1.0)
    both(run, "_1", "_4", "_lora")
    plain, merged = (comfyui.latent(run.file("taco", save)) for save in ("_1", "_lora"))
    assert (plain - merged).norm() > 1e-3 * plain.norm()


WRAPPED = [case for case in CASES if not case.golden.startswith("qwen_image_21")]
"""Those whose networks let others wrap them."""


@pytest.mark.parametrize("case", WRAPPED, indirect=True, ids=lambda case: case.golden)
def test_easy_cache(comfyui: ComfyUI, both: Both, run: Pair) -> None:
    """It finds what it needs by its place among the arguments that a network gives to what wraps it."""
    cached(comfyui, both, run)


def test_a_batch_and_a_mask(both: Both, run: Pair) -> None:
    run.nodes["latent"]["inputs"] |= {"batch": 2, "scale": 1.0, "seed": 9}
    run.add("mask", "TestMask", height=64, width=64)
    run.add("masked", "SetLatentNoiseMask", samples="@latent", mask="@mask")
    run.load()
    run.sample(save="_batch", denoise=0.8)
    run.sample(save="_mask", denoise=0.7, latent_image="@masked", sampler_name="dpmpp_2m")
    both(run, "_batch", "_mask")


MASKED = ("lumina2", "z_image", "qwen_image", "qwen_edit", "qwen_edit_2511", "qwen_layered")
"""Whose text encoders say which tokens are padding."""


@pytest.mark.parametrize("case", named(*MASKED), indirect=True, ids=lambda case: case.golden)
def test_a_text_with_padding(comfyui: ComfyUI, both: Both, run: Pair, case: Case) -> None:
    for name in ("positive", "negative"):
        run.add(f"{name}_padded", "TestTextMask", conditioning=f"@{name}", hidden=4 if name == "positive" else 2)
    padded = {"positive": "@positive_padded", "negative": "@negative_padded"}
    run.load()
    if case.module == "lumina" and version() < (0, 11):
        assert "TACO-DiT can't honour a text with padding" in refused(comfyui, run, **padded)
        return
    run.sample(save="_1", cfg=1.0, **padded)
    run.sample(save="_4", cfg=4.0, **padded)
    both(run, "_1", "_4")


SLOTS = {"_between": "[4, 9]", "_partly": "[3]", "_behind": "[]"}
"""Places in the text, of 11 tokens, before which two references stand; those without one stand behind it."""


@pytest.mark.parametrize(
    "case", named("qwen_image_21", "qwen_image_21_edit"), indirect=True, ids=lambda case: case.golden
)
def test_references_between_words(comfyui: ComfyUI, both: Both, run: Pair, case: Case) -> None:
    run.add("first", "TestLatent", seed=5, height=6, width=7, channels=case.channels)
    run.add("second", "TestLatent", seed=6, height=9, width=4, channels=case.channels)
    run.add("one", "ReferenceLatent", conditioning="@positive", latent="@first")
    run.add("two", "ReferenceLatent", conditioning="@one", latent="@second")
    run.load()
    for save, slots in SLOTS.items():
        run.add(f"placed{save}", "TestValues", conditioning="@two", values=f'{{"image_slots": {slots}}}')
        run.sample(save=save, positive=f"@placed{save}", cfg=4.0 if save == "_between" else 1.0, steps=2)
    both(run, *SLOTS)
    latents = [comfyui.latent(run.file("taco", save)) for save in SLOTS]
    assert (latents[1] - latents[2]).norm() > 1e-3 * latents[2].norm()


@pytest.mark.parametrize("case", named("qwen_image_21"), indirect=True, ids=lambda case: case.golden)
def test_text_and_references_are_computed_once_a_run(both: Both, run: Pair, endpoints: Callable[[int], Daemon]) -> None:
    """The conditioning travels and is computed at a run's first step; a second run with it computes nothing."""

    def told() -> list[dict[str, int]]:
        found = []
        for ranks in (1, 2, 3):
            with endpoints(ranks).client() as client:
                found.append(client.stats()["prefix"])
        return found

    run.add("picture", "TestLatent", seed=5, height=6, width=7, channels=64)
    run.add("shown", "ReferenceLatent", conditioning="@positive", latent="@picture")
    run.load()
    before = told()
    run.sample(save="_1", positive="@shown", cfg=1.0)
    run.sample(save="_2", positive="@shown", cfg=1.0, seed=4321, sampler_name="dpmpp_2m")
    both(run, "_1", "_2")
    for one, other in zip(before, told(), strict=True):
        assert (other["hits"] - one["hits"], other["misses"] - one["misses"]) == (7, 1)


@pytest.mark.parametrize("case", named("qwen_image_21"), indirect=True, ids=lambda case: case.golden)
def test_a_rounded_prefix_cache_is_refused(comfyui: ComfyUI, run: Pair) -> None:
    run.load()
    run.on_model("TestReplace", what="rounded cache")
    assert "TACO-DiT can't honour a prefix cache in int8: " in refused(comfyui, run)


@pytest.mark.parametrize("case", named("hidream"), indirect=True, ids=lambda case: case.golden)
def test_a_picture_beside_the_image(both: Both, run: Pair) -> None:
    """As HiDream-E1's workflow has it."""
    run.add("picture", "TestLatent", seed=5, height=13, width=10, channels=16)
    run.add("mask", "TestMask", height=104, width=80)
    run.add("shown", "TestConcat", conditioning="@positive", latent="@picture", mask="@mask")
    run.load()
    run.sample(positive="@shown", cfg=1.0)
    both(run)


@pytest.mark.parametrize("case", named("chroma_radiance"), indirect=True, ids=lambda case: case.golden)
@pytest.mark.parametrize("sequential", [False, True], ids=["tiles", "positions"])
def test_options_of_chroma_radiance(comfyui: ComfyUI, both: Both, run: Pair, sequential: bool) -> None:
    """The size of tiles changes no number; what changes the text's positions is refused."""
    if "force_sequential_txt_ids" not in str(comfyui.nodes.get("ChromaRadianceOptions")):
        pytest.skip("this version of ComfyUI has no such options")
    options = {"preserve_wrapper": True, "start_sigma": 1.0, "end_sigma": 0.0, "nerf_tile_size": 4}
    run.load()
    run.on_model("ChromaRadianceOptions", **options, force_sequential_txt_ids=sequential)
    if sequential:
        assert "TACO-DiT can't honour use_sequential_txt_ids of ChromaRadianceOptions: " in refused(comfyui, run)
    else:
        run.sample(cfg=1.0, steps=2)
        both(run)


PATCHED = {
    "z_image": ("ZImageFunControlnet", "'noise_refiner', 'double_block' (ZImageControlPatch", 0),
    "qwen_image": ("QwenImageDiffsynthControlnet", "'double_block' (DiffSynthCnetPatch", 1),
}
"""ComfyUI's nodes that put a ControlNet between a network's blocks, and what they put there."""


@pytest.mark.parametrize("case", named(*PATCHED), indirect=True, ids=lambda case: case.golden)
def test_a_controlnet_between_blocks_is_refused(comfyui: ComfyUI, run: Pair, case: Case) -> None:
    node, what, frames = PATCHED[case.golden]
    if node not in comfyui.nodes:
        pytest.skip(f"this version of ComfyUI has no {node}")
    run.add("patch", "TestModelPatch", sort=case.golden, config=json.dumps(case.model().config))
    run.add("vae", "TestImageVAE", channels=16, frames=bool(frames))
    run.add("image", "TestImage", height=104, width=80)
    run.load()
    run.on_model(node, model_patch="@patch", vae="@vae", image="@image", strength=1.0)
    error = refused(comfyui, run)
    assert f"TACO-DiT can't honour patches of {what}" in error
    assert "take off the node that puts it there" in error


@pytest.mark.parametrize("case", named("qwen_image"), indirect=True, ids=lambda case: case.golden)
def test_a_controlnet_that_runs_layers_of_the_network(comfyui: ComfyUI, both: Both, run: Pair, case: Case) -> None:
    """Qwen-Image's Fun ControlNet embeds latent, text and time by the network that it controls."""
    if "class QwenFunControlNet" not in Path(PATH, "comfy/controlnet.py").read_text():
        pytest.skip("this version of ComfyUI has no QwenFunControlNet")
    run.add("net", "TestControlNet", sort="qwen_fun", config=json.dumps(case.model().config))
    run.add("vae", "TestImageVAE", channels=16)
    run.add("image", "TestImage", height=104, width=80)
    given = {"positive": "@positive", "negative": "@negative", "control_net": "@net", "image": "@image", "vae": "@vae"}
    run.add("led", "ControlNetApplyAdvanced", **given, strength=0.9, start_percent=0.0, end_percent=0.7)
    run.load()
    run.sample(save="_without")
    run.sample(save="_with", positive="@led", negative="@led#1")
    both(run, "_without", "_with")
    without, led = (comfyui.latent(run.file("taco", save)) for save in ("_without", "_with"))
    assert (led - without).norm() > 1e-3 * without.norm()


@pytest.mark.parametrize("case", named("qwen_image"), indirect=True, ids=lambda case: case.golden)
def test_easy_cache_beside_a_controlnet(comfyui: ComfyUI, both: Both, run: Pair, case: Case) -> None:
    """The network has its residuals behind what it gives by position."""
    width = case.model().config["num_attention_heads"] * case.model().config["attention_head_dim"]
    for prompt in ("positive", "negative"):
        run.add(f"{prompt}_led", "TestControl", conditioning=f"@{prompt}", width=width, tokens=35)
    cached(comfyui, both, run, positive="@positive_led", negative="@negative_led")


@pytest.mark.parametrize("case", [case for case in CASES if case.method], indirect=True, ids=lambda case: case.golden)
def test_references(comfyui: ComfyUI, both: Both, run: Pair, case: Case) -> None:
    menu = comfyui.nodes["FluxKontextMultiReferenceLatentMethod"]["input"]["required"]["reference_latents_method"]
    if case.method != "default" and case.method not in str(menu):
        pytest.skip(f"this version of ComfyUI has no {case.method}")
    shape: dict[str, Any] = {"batch": 1, "channels": case.channels, "scale": 1.0, "frames": case.frames}
    run.add("first", "TestLatent", seed=5, height=6, width=7, **shape)
    run.add("second", "TestLatent", seed=6, height=9, width=4, **shape)
    run.add("one", "ReferenceLatent", conditioning="@positive", latent="@first")
    run.add("two", "ReferenceLatent", conditioning="@one", latent="@second")
    positive = "@two"
    if case.method != "default":
        how = {"conditioning": positive, "reference_latents_method": case.method}
        positive = run.add("how", "FluxKontextMultiReferenceLatentMethod", **how)
    run.load()
    run.sample(save="_without", cfg=1.0)
    run.sample(save="_1", positive=positive, cfg=1.0)
    run.sample(save="_4", positive=positive, cfg=4.0)
    run.add("two_latents", "TestLatent", seed=8, height=case.size[0], width=case.size[1], **{**shape, "batch": 2})
    # ComfyUI itself fails with a batch, references at time 0 and embedded guidance.
    fails = case.golden == "flux2_dev"
    run.sample(save="_batch", positive="@two" if fails else positive, cfg=4.0, latent_image="@two_latents")
    both(run, "_without", "_1", "_4", "_batch")
    without, led = (comfyui.latent(run.file("taco", save)) for save in ("_without", "_1"))
    assert (led - without).norm() > 1e-3 * without.norm()

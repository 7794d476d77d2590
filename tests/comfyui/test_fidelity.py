"""The same graph by ComfyUI alone and through the daemon: the final latents agree to 1e-5 in fp32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from comfyui_graphs import CANNY, FILL, FLUX, PIXART, SD3, Pair, TinyModel
from comfyui_server import ComfyUI, Outcome
from helpers import Daemon

Both = Callable[..., Outcome]
FAMILIES = pytest.mark.parametrize("model", [FLUX, SD3, PIXART], ids=lambda model: model.tiny.name)


@pytest.mark.parametrize("ranks", [1, 2, 3])
@FAMILIES
def test_each_family_at_any_number_of_ranks(
    endpoints: Callable[[int], Daemon], both: Both, model: TinyModel, ranks: int
) -> None:
    pair = Pair(model, endpoint=endpoints(ranks).endpoint)
    pair.load()
    pair.sample()
    both(pair)


@pytest.mark.parametrize("scheduler", ["normal", "simple", "beta", "karras"])
@FAMILIES
def test_every_sampler(comfyui: ComfyUI, both: Both, model: TinyModel, scheduler: str) -> None:
    samplers = comfyui.get("/object_info/KSampler")["KSampler"]["input"]["required"]["sampler_name"][0]
    pair = Pair(model)
    pair.load()
    for sampler in samplers:
        pair.sample(save=f"_{sampler}", sampler_name=sampler, scheduler=scheduler)
    # One prompt for all of them; a failure names the sampler by its file.
    both(pair, *(f"_{sampler}" for sampler in samplers))


@pytest.mark.parametrize("case", [{"cfg": 1.0}, {"denoise": 0.6}, {"cfg": 1.0, "denoise": 0.6, "steps": 5}], ids=str)
@FAMILIES
def test_cfg_and_denoise(both: Both, model: TinyModel, case: dict[str, Any]) -> None:
    pair = Pair(model)
    pair.nodes["latent"]["inputs"] |= {"scale": 1.0, "seed": 9}
    pair.load()
    pair.sample(**case)
    both(pair)


@pytest.mark.parametrize("size", [(15, 17), (9, 20)], ids=str)
@pytest.mark.parametrize("model", [FLUX, SD3], ids=lambda model: model.tiny.name)
def test_odd_sizes_and_batches(both: Both, model: TinyModel, size: tuple[int, int]) -> None:
    pair = Pair(model)
    pair.nodes["latent"]["inputs"] |= {"height": size[0], "width": size[1], "batch": 3, "scale": 1.0}
    pair.load()
    pair.sample(denoise=0.8)
    both(pair)


@FAMILIES
def test_a_mask(both: Both, model: TinyModel) -> None:
    pair = Pair(model)
    pair.nodes["latent"]["inputs"] |= {"scale": 1.0, "seed": 9}
    pair.add("mask", "TestMask", height=64, width=64)
    pair.add("masked", "SetLatentNoiseMask", samples="@latent", mask="@mask")
    pair.latent = "masked"
    pair.load()
    pair.sample(denoise=0.7, sampler_name="dpmpp_2m")
    both(pair)


@FAMILIES
def test_two_halves(both: Both, model: TinyModel) -> None:
    pair = Pair(model)
    pair.load()
    common = {"noise_seed": 3, "steps": 6, "cfg": 4.5, "sampler_name": "euler", "scheduler": "simple"}
    first = {"add_noise": "enable", "start_at_step": 0, "end_at_step": 3, "return_with_leftover_noise": "enable"}
    second = {"add_noise": "disable", "start_at_step": 3, "end_at_step": 99, "return_with_leftover_noise": "disable"}
    pair.sample("KSamplerAdvanced", save="_1", **common, **first)
    pair.sample("KSamplerAdvanced", save="_2", **common, **second, latent_image="@sampler_1_*")
    both(pair, "_1", "_2")


GUIDERS: dict[str, dict[str, Any]] = {
    "BasicGuider": {"conditioning": "@positive"},
    "CFGGuider": {"positive": "@positive", "negative": "@negative", "cfg": 4.0},
    "DualCFGGuider": {
        "cond1": "@positive",
        "cond2": "@third",
        "negative": "@negative",
        "cfg_conds": 4.0,
        "cfg_cond2_negative": 3.0,
        "style": "regular",
    },
    "PerpNegGuider": {
        "positive": "@positive",
        "negative": "@negative",
        "empty_conditioning": "@third",
        "cfg": 4.0,
        "neg_scale": 0.7,
    },
}


@pytest.mark.parametrize("guider", GUIDERS)
@FAMILIES
def test_custom_sampling(both: Both, model: TinyModel, guider: str) -> None:
    pair = Pair(model)
    pair.add("third", "TestConditioning", seed=3, tokens=11, width=model.width, pooled=model.pooled)
    pair.load()
    guided = pair.both("guider", guider, model="@model", **GUIDERS[guider])
    sigmas = pair.both("sigmas", "BasicScheduler", model="@model", scheduler="simple", steps=4, denoise=1.0)
    pair.add("noise", "RandomNoise", noise_seed=7)
    pair.add("which", "KSamplerSelect", sampler_name="dpmpp_2m")
    for branch in ("stock", "taco"):
        pair.add(
            f"run_{branch}",
            "SamplerCustomAdvanced",
            noise="@noise",
            guider=guided.replace("*", branch),
            sampler="@which",
            sigmas=sigmas.replace("*", branch),
            latent_image="@latent",
        )
        pair.save(f"run_{branch}", branch)
    both(pair)


def test_regions_and_stretches_of_time(both: Both) -> None:
    pair = Pair(SD3)
    pair.add("area", "ConditioningSetArea", conditioning="@positive", width=64, height=96, x=32, y=0, strength=0.8)
    pair.add("third", "TestConditioning", seed=3, tokens=7, width=SD3.width, pooled=SD3.pooled)
    pair.add("early", "ConditioningSetTimestepRange", conditioning="@third", start=0.0, end=0.6)
    pair.add("mask", "TestMask", height=64, width=64)
    pair.add("left", "ConditioningSetMask", conditioning="@early", mask="@mask", strength=1.0, set_cond_area="default")
    pair.add("two", "ConditioningCombine", conditioning_1="@area", conditioning_2="@left")
    pair.add("all", "ConditioningCombine", conditioning_1="@two", conditioning_2="@positive")
    pair.load()
    pair.sample(positive="@all")
    both(pair)


PATCHES_OF_SAMPLING: dict[str, tuple[TinyModel, str, dict[str, Any]]] = {
    "ModelSamplingSD3": (SD3, "ModelSamplingSD3", {"shift": 5.0}),
    "ModelSamplingFlux": (
        FLUX,
        "ModelSamplingFlux",
        {"max_shift": 1.3, "base_shift": 0.4, "width": 512, "height": 512},
    ),
    "RescaleCFG": (SD3, "RescaleCFG", {"multiplier": 0.7}),
    "CFGZeroStar": (SD3, "CFGZeroStar", {}),
    "EasyCache": (
        FLUX,
        "EasyCache",
        {"reuse_threshold": 0.2, "start_percent": 0.1, "end_percent": 0.9, "verbose": False},
    ),
    "LazyCache": (
        SD3,
        "LazyCache",
        {"reuse_threshold": 0.2, "start_percent": 0.1, "end_percent": 0.9, "verbose": False},
    ),
    "DifferentialDiffusion": (SD3, "DifferentialDiffusion", {"strength": 1.0}),
}


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("name", PATCHES_OF_SAMPLING)
def test_what_acts_around_the_network(both: Both, name: str, before: bool) -> None:
    model, kind, inputs = PATCHES_OF_SAMPLING[name]
    pair = Pair(model)
    if not before:
        pair.load()
    pair.on_model(kind, **inputs)
    if before:
        pair.load()
    pair.sample(steps=10)
    both(pair)


def test_guidance_and_references(both: Both) -> None:
    pair = Pair(FLUX)
    pair.add("reference", "TestLatent", seed=5, batch=1, channels=16, height=10, width=12, scale=1.0)
    pair.add("guided", "FluxGuidance", conditioning="@positive", guidance=2.5)
    pair.add("one", "ReferenceLatent", conditioning="@guided", latent="@reference")
    pair.add("two", "ReferenceLatent", conditioning="@one", latent="@latent")
    pair.add("how", "FluxKontextMultiReferenceLatentMethod", conditioning="@two", reference_latents_method="index")
    pair.load()
    pair.sample(save="_1", positive="@one", cfg=1.0)
    pair.sample(save="_2", positive="@how", cfg=2.0)
    both(pair, "_1", "_2")


@pytest.mark.parametrize("model", [CANNY, FILL], ids=lambda model: model.tiny.name)
def test_extra_channels(both: Both, model: TinyModel) -> None:
    pair = Pair(model)
    pair.add("image", "TestLatent", seed=5, batch=1, channels=16, height=14, width=16, scale=1.0)
    pair.add("mask", "TestMask", height=112, width=128)
    pair.add("filled", "TestConcat", conditioning="@positive", latent="@image", mask="@mask")
    pair.load()
    pair.sample(positive="@filled", cfg=1.0)
    both(pair)


@pytest.mark.parametrize("model", [FLUX, SD3, PIXART], ids=lambda model: model.tiny.name)
def test_opened_by_its_header(both: Both, comfyui: ComfyUI, model: TinyModel) -> None:
    pair = Pair(model)
    pair.load()
    loader = pair.nodes["loader"]
    loader["class_type"] = "TACODiTUNETLoader"
    loader["inputs"] = {**loader["inputs"], "unet_name": model.tiny.file}
    del loader["inputs"]["model"]
    pair.sample()
    both(pair)


@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("model", [FLUX, SD3], ids=lambda model: model.tiny.name)
def test_residuals_of_a_controlnet(both: Both, model: TinyModel, cfg: float) -> None:
    pair = Pair(model)
    width = model.tiny.config.get("hidden_size", 192)
    for prompt in ("positive", "negative"):
        pair.add(f"{prompt}_led", "TestControl", conditioning=f"@{prompt}", width=width, tokens=56)
    pair.load()
    pair.sample(positive="@positive_led", negative="@negative_led", cfg=cfg)
    both(pair)


@pytest.mark.parametrize("size", [(7, 8), (5, 6)], ids=["native", "scaled"])
def test_an_attention_mask(both: Both, size: tuple[int, int]) -> None:
    pair = Pair(FLUX)
    pair.add("styled", "TestAttentionMask", conditioning="@positive", rows=size[0], columns=size[1])
    pair.load()
    pair.sample(positive="@styled", cfg=1.0)
    both(pair)


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_stretched_positions(both: Both, before: bool) -> None:
    pair = Pair(FLUX)
    options = {"scale_x": 0.7, "scale_y": 1.5, "scale_t": 1.0, "shift_x": 2.0, "shift_y": -1.0, "shift_t": 1.0}
    if not before:
        pair.load()
    pair.on_model("ScaleROPE", **options)
    if before:
        pair.load()
    pair.sample()
    both(pair)

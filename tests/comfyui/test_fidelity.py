"""The same graph by ComfyUI alone and through the daemon: the final latents agree to 1e-5 in fp32."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from comfyui_graphs import CANNY, FILL, FLUX, PIXART, SD3, Pair, TinyModel, save
from comfyui_server import PATH, ComfyUI, Outcome
from helpers import Daemon
from safetensors.torch import save_file

Both = Callable[..., Outcome]
Pairs = Callable[[TinyModel], Pair]
FAMILIES = pytest.mark.parametrize("model", [FLUX, SD3, PIXART], ids=lambda model: model.tiny.name)


@FAMILIES
@pytest.mark.parametrize("cfg", [1.0, 4.5])
def test_plain(both: Both, pair: Pairs, model: TinyModel, cfg: float) -> None:
    run = pair(model)
    run.load()
    run.sample(cfg=cfg)
    both(run)


WAYS: dict[str, dict[str, Any]] = {
    **{scheduler: {"scheduler": scheduler} for scheduler in ("normal", "simple", "beta", "karras")},
    "a part without guidance": {"scheduler": "simple", "cfg": 1.0, "denoise": 0.6},
}


@pytest.mark.parametrize("way", WAYS)
@FAMILIES
def test_every_sampler(
    comfyui: ComfyUI, both: Both, endpoints: Callable[[int], Daemon], model: TinyModel, way: str
) -> None:
    """Each at 1, 2 and 3 ranks, each number in another way: a sampler doesn't see how many there are."""
    samplers = comfyui.get("/object_info/KSampler")["KSampler"]["input"]["required"]["sampler_name"][0]
    ranks = 1 + list(WAYS).index(way) % 3
    run = Pair(model, endpoint=endpoints(ranks).endpoint)
    run.ranks["taco"] = ranks
    if "denoise" in WAYS[way]:
        run.nodes["latent"]["inputs"] |= {"scale": 1.0, "seed": 9}
    run.load()
    for sampler in samplers:
        # It divides by the smallest noise level, and multiplies by the step's length: with four steps the last bit of
        # fp32 would become 1e-5, in ComfyUI as here.
        steps = 8 if sampler == "heun" else 4
        run.sample(save=f"_{sampler}", sampler_name=sampler, steps=steps, **WAYS[way])
    # One prompt for all of them; a failure names the sampler by its file.
    both(run, *(f"_{sampler}" for sampler in samplers))


@pytest.mark.parametrize("case", [{"cfg": 1.0}, {"denoise": 0.6}, {"cfg": 1.0, "denoise": 0.6, "steps": 5}], ids=str)
@FAMILIES
def test_cfg_and_denoise(both: Both, pair: Pairs, model: TinyModel, case: dict[str, Any]) -> None:
    run = pair(model)
    run.nodes["latent"]["inputs"] |= {"scale": 1.0, "seed": 9}
    run.load()
    run.sample(**case)
    both(run)


@pytest.mark.parametrize("size", [(15, 17), (9, 20)], ids=str)
@pytest.mark.parametrize("model", [FLUX, SD3], ids=lambda model: model.tiny.name)
def test_odd_sizes_and_batches(both: Both, pair: Pairs, model: TinyModel, size: tuple[int, int]) -> None:
    run = pair(model)
    run.nodes["latent"]["inputs"] |= {"height": size[0], "width": size[1], "batch": 3, "scale": 1.0}
    run.load()
    run.sample(denoise=0.8)
    both(run)


def test_a_part_of_a_batch(both: Both, pair: Pairs) -> None:
    """The images get the noise of their places in the whole batch."""
    run = pair(SD3)
    run.nodes["latent"]["inputs"]["batch"] = 4
    run.add("part", "LatentFromBatch", samples="@latent", batch_index=2, length=2)
    run.add("twice", "RepeatLatentBatch", samples="@part", amount=2)
    run.load()
    run.sample(save="_part", latent_image="@part")
    run.sample(save="_twice", latent_image="@twice")
    both(run, "_part", "_twice")


@FAMILIES
def test_a_mask(both: Both, pair: Pairs, model: TinyModel) -> None:
    run = pair(model)
    run.nodes["latent"]["inputs"] |= {"scale": 1.0, "seed": 9}
    run.add("mask", "TestMask", height=64, width=64)
    run.add("masked", "SetLatentNoiseMask", samples="@latent", mask="@mask")
    run.latent = "masked"
    run.load()
    run.sample(denoise=0.7, sampler_name="dpmpp_2m")
    both(run)


@FAMILIES
def test_two_halves(both: Both, pair: Pairs, model: TinyModel) -> None:
    run = pair(model)
    run.load()
    common = {"noise_seed": 3, "steps": 6, "cfg": 4.5, "sampler_name": "euler", "scheduler": "simple"}
    first = {"add_noise": "enable", "start_at_step": 0, "end_at_step": 3, "return_with_leftover_noise": "enable"}
    second = {"add_noise": "disable", "start_at_step": 3, "end_at_step": 99, "return_with_leftover_noise": "disable"}
    run.sample("KSamplerAdvanced", save="_1", **common, **first)
    run.sample("KSamplerAdvanced", save="_2", **common, **second, latent_image="@sampler_1_*")
    both(run, "_1", "_2")


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
def test_custom_sampling(both: Both, pair: Pairs, model: TinyModel, guider: str) -> None:
    run = pair(model)
    run.add("third", "TestConditioning", seed=3, tokens=11, width=model.width, pooled=model.pooled)
    run.load()
    guided = run.both("guider", guider, model="@model", **GUIDERS[guider])
    sigmas = run.both("sigmas", "BasicScheduler", model="@model", scheduler="simple", steps=4, denoise=1.0)
    run.add("noise", "RandomNoise", noise_seed=7)
    run.add("which", "KSamplerSelect", sampler_name="dpmpp_2m")
    for branch in run.branches:
        run.add(
            f"run_{branch}",
            "SamplerCustomAdvanced",
            noise="@noise",
            guider=guided.replace("*", branch),
            sampler="@which",
            sigmas=sigmas.replace("*", branch),
            latent_image="@latent",
        )
        run.save(f"run_{branch}", branch)
    both(run)


def test_regions_and_stretches_of_time(both: Both, pair: Pairs) -> None:
    run = pair(SD3)
    run.add("area", "ConditioningSetArea", conditioning="@positive", width=64, height=96, x=32, y=0, strength=0.8)
    run.add("third", "TestConditioning", seed=3, tokens=7, width=SD3.width, pooled=SD3.pooled)
    run.add("early", "ConditioningSetTimestepRange", conditioning="@third", start=0.0, end=0.6)
    run.add("mask", "TestMask", height=64, width=64)
    run.add("left", "ConditioningSetMask", conditioning="@early", mask="@mask", strength=1.0, set_cond_area="default")
    run.add("two", "ConditioningCombine", conditioning_1="@area", conditioning_2="@left")
    run.add("all", "ConditioningCombine", conditioning_1="@two", conditioning_2="@positive")
    run.load()
    run.sample(positive="@all")
    both(run)


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
    "ContextWindows": (
        SD3,
        "ContextWindowsManual",
        {
            "context_length": 3,
            "context_overlap": 1,
            "context_schedule": "standard_static",
            "context_stride": 1,
            "closed_loop": False,
            "fuse_method": "pyramid",
            "dim": 0,
            "freenoise": False,
        },
    ),
    "APG": (FLUX, "APG", {"eta": 0.9, "norm_threshold": 4.0, "momentum": 0.2}),
    "DifferentialDiffusion": (SD3, "DifferentialDiffusion", {"strength": 1.0}),
}


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("name", PATCHES_OF_SAMPLING)
def test_what_acts_around_the_network(both: Both, pair: Pairs, name: str, before: bool) -> None:
    model, kind, inputs = PATCHES_OF_SAMPLING[name]
    if name == "ContextWindows" and 'sample_sigmas"], timestep,' in Path(PATH, "comfy/context_windows.py").read_text():
        pytest.skip("context windows fail on a batch in this ComfyUI by itself: it looks for all timesteps at once")
    run = pair(model)
    run.nodes["latent"]["inputs"]["batch"] = 5 if name == "ContextWindows" else 1
    if not before:
        run.load()
    run.on_model(kind, **inputs)
    if before:
        run.load()
    run.sample(steps=10)
    both(run)


def test_guidance_and_references(both: Both, pair: Pairs) -> None:
    run = pair(FLUX)
    run.add("reference", "TestLatent", seed=5, batch=1, channels=16, height=10, width=12, scale=1.0)
    run.add("guided", "FluxGuidance", conditioning="@positive", guidance=2.5)
    run.add("one", "ReferenceLatent", conditioning="@guided", latent="@reference")
    run.add("two", "ReferenceLatent", conditioning="@one", latent="@latent")
    run.add("how", "FluxKontextMultiReferenceLatentMethod", conditioning="@two", reference_latents_method="index")
    run.load()
    run.sample(save="_1", positive="@one", cfg=1.0)
    run.sample(save="_2", positive="@how", cfg=2.0)
    both(run, "_1", "_2")


def kontext(run: Pair, method: str) -> None:
    """Two references on the positive conditioning, laid out in a way."""
    run.add("reference", "TestLatent", seed=5, batch=1, channels=16, height=10, width=12, scale=1.0)
    run.add("one", "ReferenceLatent", conditioning="@positive", latent="@reference")
    run.add("two", "ReferenceLatent", conditioning="@one", latent="@latent")
    run.add("how", "FluxKontextMultiReferenceLatentMethod", conditioning="@two", reference_latents_method=method)


@pytest.mark.parametrize("method", ["offset", "index", "uxo/uno"])
def test_references_in_stretched_positions(comfyui: ComfyUI, both: Both, pair: Pairs, method: str) -> None:
    """Versions differ in whether the references are stretched, too."""
    if "ScaleROPE" not in comfyui.nodes:
        pytest.skip("this version of ComfyUI has no ScaleROPE")
    run = pair(FLUX)
    kontext(run, method)
    run.load()
    scale = {"scale_x": 0.7, "scale_y": 1.5, "scale_t": 1.0, "shift_x": 2.0, "shift_y": -1.0, "shift_t": 1.0}
    run.on_model("ScaleROPE", **scale)
    run.sample(positive="@how", cfg=1.0)
    both(run)


def test_references_at_time_zero(comfyui: ComfyUI, both: Both, pair: Pairs) -> None:
    """Flux.1 fails with them by itself where it knows them, and lays them out as ever where it doesn't."""
    how = comfyui.nodes["FluxKontextMultiReferenceLatentMethod"]["input"]["required"]["reference_latents_method"]
    if "index_timestep_zero" not in str(how):
        pytest.skip("this version of ComfyUI has no references at time zero")
    run = pair(FLUX)
    kontext(run, "index_timestep_zero")
    run.load()
    run.sample(positive="@how", cfg=1.0)
    if "index_timestep_zero" not in Path(PATH, "comfy/ldm/flux/model.py").read_text():
        both(run)
        return
    for branch, error in (("stock", "shape"), ("taco1", "can't honour ref_latents_method 'index_timestep_zero'")):
        others = [f"{kind}_{each}" for kind in ("sampler", "save") for each in run.branches if each != branch]
        outcome = comfyui.run({name: node for name, node in run.nodes.items() if name not in others})
        assert outcome.kind == "error"
        assert error in outcome.error


def test_queries_and_keys_near_zero(both: Both, pair: Pairs, comfyui_models: Path) -> None:
    """What the norms of queries and keys add to the mean square shows: versions differ in it."""
    state = {name: weight.clone() for name, weight in FLUX.tiny.model.state_dict().items()}
    for name in state:
        if name.endswith((".qkv.weight", ".qkv.bias", ".linear1.weight", ".linear1.bias")):
            state[name][: 2 * 80] *= 1e-3
    metadata = {"tacod.config": json.dumps(FLUX.tiny.config)}
    save_file(state, comfyui_models / "diffusion_models" / "weak.safetensors", metadata=metadata)
    run = pair(FLUX)
    run.add("file", "UNETLoader", unet_name="weak.safetensors", weight_dtype="default")
    run.load()
    run.sample()
    both(run)


@pytest.mark.parametrize("model", [CANNY, FILL], ids=lambda model: model.tiny.name)
def test_extra_channels(both: Both, pair: Pairs, model: TinyModel) -> None:
    run = pair(model)
    run.add("image", "TestLatent", seed=5, batch=1, channels=16, height=14, width=16, scale=1.0)
    run.add("mask", "TestMask", height=112, width=128)
    run.add("filled", "TestConcat", conditioning="@positive", latent="@image", mask="@mask")
    run.load()
    run.sample(positive="@filled", cfg=1.0)
    both(run)


@pytest.mark.parametrize("model", [FLUX, SD3, PIXART], ids=lambda model: model.tiny.name)
def test_opened_by_its_header(both: Both, pair: Pairs, model: TinyModel) -> None:
    run = pair(model)
    run.load("TACODiTUNETLoader", unet_name=model.tiny.file)
    run.sample()
    both(run)


@pytest.mark.parametrize("kind", ["TACODiTModelLoader", "TACODiTUNETLoader"])
@pytest.mark.parametrize("model", [FLUX, SD3], ids=lambda model: model.tiny.name)
def test_a_checkpoint(both: Both, pair: Pairs, comfyui_models: Path, model: TinyModel, kind: str) -> None:
    """The diffusion model out of a file that holds more."""
    name = f"whole_{model.tiny.name}.safetensors"
    save(model, comfyui_models / "checkpoints", name, "model.diffusion_model.")
    run = pair(model)
    run.add("file", "CheckpointLoaderSimple", ckpt_name=name)
    run.load(kind, **({"unet_name": name} if kind == "TACODiTUNETLoader" else {}))
    run.sample()
    both(run)

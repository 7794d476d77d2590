"""LoRAs on a MODEL and on the conditioning: what the daemon merges is what ComfyUI merges."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from comfyui_graphs import FLUX, SD3, Pair, TinyModel
from comfyui_server import ComfyUI, Outcome
from helpers import Daemon, in_diffusers
from image_cases import CASES, Case, Sizes, write
from safetensors.torch import save_file

Both = Callable[..., Outcome]
Pairs = Callable[[TinyModel], Pair]

KOHYA = {"lora_unet_double_blocks_0_img_attn_qkv": (240, 80), "lora_unet_single_blocks_1_linear2": (80, 400)}
COMFYUI = {"diffusion_model.double_blocks.1.txt_mlp.0": (320, 80), "diffusion_model.final_layer.linear": (64, 80)}
DIFFUSERS = {
    "transformer.transformer_blocks.0.attn.to_q": (80, 80),
    "transformer.transformer_blocks.1.attn.add_v_proj": (80, 80),
    "transformer.single_transformer_blocks.0.attn.to_k": (80, 80),
    "transformer.single_transformer_blocks.1.proj_mlp": (320, 80),
}
DIFFUSERS_SD3 = {
    "transformer.transformer_blocks.0.attn.to_q": (192, 192),
    "transformer.transformer_blocks.2.attn.add_k_proj": (192, 192),
    "transformer.transformer_blocks.1.ff.net.0.proj": (768, 192),
}
FILES = {
    "kohya": (FLUX, KOHYA),
    "comfyui": (FLUX, COMFYUI),
    "diffusers": (FLUX, DIFFUSERS),
    "sd3": (SD3, DIFFUSERS_SD3),
}


_FLUXES = r"(single_)?transformer_blocks\.0\.(attn\.(to_[qv]|add_k_proj|to_out\.0|to_qkv_mlp_proj)|ff\.|proj_out)"
_QWENS = r"transformer_blocks\.0\.(attn\.(to_q|add_k_proj|to_out\.0)|(img|txt)_mlp\.|img_mod)"
IN_DIFFUSERS = {
    "z_image": r"(layers|noise_refiner|context_refiner)\.0\.(attention\.to_|feed_forward)",
    "qwen_image": _QWENS,
    "qwen_edit": _QWENS,
    "qwen_edit_2511": _QWENS,
    "qwen_layered": _QWENS,
    "flux2_klein": _FLUXES,
    "flux2_dev": _FLUXES,
    "longcat_edit": rf"{_FLUXES}|single_transformer_blocks\.1\.proj_mlp",
    "chroma": _FLUXES,
    "krea2": r"transformer_blocks\.[01]\.(attn\.to_|ff)",
    "hidream": r"double_stream_blocks\.0\.block\.attn1\.to_|single_stream_blocks\.1\.block\.ff_i\.experts",
}
"""Layers by diffusers' names, for the families whose such names ComfyUI knows in LoRA files."""
BY_DIFFUSERS_NAMES = ("z_image", "krea2")
"""The families for which ai-toolkit writes diffusers' names behind its own prefix."""


def _spellings(case: Case) -> dict[str, tuple[str, str, dict[str, torch.Tensor]]]:
    """LoRA files as trainers write them: the endings of their two matrices, and the weights that they change."""
    golden = case.model()
    weights = {key.removesuffix(".weight"): value for key, value in golden.weights.items() if key.endswith(".weight")}
    inner = [key for key, value in weights.items() if value.ndim == 2 and not re.search("final|embedding|embed$", key)]
    named = {key: weights[key] for key in inner[::3]}  # a third, of unlike sorts
    diffusers = {}
    if case.golden in IN_DIFFUSERS:
        every = in_diffusers(golden.model())
        names = [key for key in every if re.match(IN_DIFFUSERS[case.golden], key) and every[key].ndim == 2]
        diffusers = {key.removesuffix(".weight"): every[key] for key in names}
        assert diffusers
    behind = diffusers if case.golden in BY_DIFFUSERS_NAMES else named
    kohya = {f"lora_unet_{key.replace('.', '_')}": value for key, value in named.items()}
    files = {
        "kohya": ("lora_up", "lora_down", kohya),
        "ai_toolkit": ("lora_B", "lora_A", {f"diffusion_model.{key}": value for key, value in behind.items()}),
        "diffusers": ("lora_B", "lora_A", {f"transformer.{key}": value for key, value in diffusers.items()}),
    }
    return {name: file for name, file in files.items() if file[2]}


def _save(case: Case, models: Path) -> Iterable[str]:
    for spelling, (up, down, weights) in _spellings(case).items():
        random = torch.Generator().manual_seed(7)
        tensors = {}
        for key, weight in weights.items():
            outputs, inputs = weight.shape
            tensors[f"{key}.{up}.weight"] = 0.1 * torch.randn(outputs, 4, generator=random)
            tensors[f"{key}.{down}.weight"] = 0.1 * torch.randn(4, inputs, generator=random)
            if spelling == "kohya":
                tensors[f"{key}.alpha"] = torch.tensor(2.0)
        save_file(tensors, models / "loras" / f"{case.golden}_{spelling}.safetensors")
        yield spelling


@pytest.fixture(scope="session", autouse=True)
def files(comfyui_models: Path) -> None:
    """LoRA files in the names that trainers give."""
    (comfyui_models / "loras").mkdir(exist_ok=True)
    for name, (_, keys) in FILES.items():
        random = torch.Generator().manual_seed(len(name))
        tensors = {}
        for key, (outputs, inputs) in keys.items():
            tensors[f"{key}.lora_up.weight"] = 0.1 * torch.randn(outputs, 4, generator=random)
            tensors[f"{key}.lora_down.weight"] = 0.1 * torch.randn(4, inputs, generator=random)
            tensors[f"{key}.alpha"] = torch.tensor(2.0)
        save_file(tensors, comfyui_models / "loras" / f"{name}.safetensors")


def put_on(run: Pair, name: str, strength: float) -> None:
    run.on_model("LoraLoaderModelOnly", lora_name=f"{name}.safetensors", strength_model=strength)


def with_two(run: Pair, where: str, strength: float) -> Pair:
    """A short run with two LoRAs: before the loader, after it, or one on each side."""
    if where == "after":
        run.load()
    put_on(run, "kohya", strength)
    if where == "around":
        run.load()
    put_on(run, "diffusers", 1.3)
    if where == "before":
        run.load()
    run.sample(steps=3)
    return run


@pytest.mark.parametrize("name", FILES)
def test_a_lora_makes_a_difference(comfyui: ComfyUI, both: Both, pair: Pairs, name: str) -> None:
    """In every naming: as ComfyUI merges it, and not as without it."""
    run = pair(FILES[name][0])
    run.load()
    run.sample(save="_without")
    put_on(run, name, 1.2)
    run.sample(save="_with")
    both(run, "_without", "_with")
    without, merged = (comfyui.latent(run.file("taco", save)) for save in ("_without", "_with"))
    assert (merged - without).norm() > 1e-3 * without.norm()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.golden)
def test_spellings_of_trainers(comfyui: ComfyUI, both: Both, comfyui_models: Path, case: Case) -> None:
    """kohya's, ai-toolkit's and diffusers' names for each of the families that came after Flux.1."""
    write(case, comfyui_models)
    # It has of `TinyModel` what a graph asks for.
    run = Pair(Sizes(case))  # type: ignore[arg-type]
    for name in ("positive", "negative"):
        run.nodes[name]["inputs"] |= case.text
    run.load()
    run.sample(save="_without", cfg=1.0, steps=2)
    heads = {branch: run.head(branch) for branch in run.branches}
    saves = []
    for spelling in _save(case, comfyui_models):
        for branch, head in heads.items():
            run.on(branch, head)
        put_on(run, f"{case.golden}_{spelling}", 1.0)
        run.sample(save=f"_{spelling}", cfg=1.0, steps=2)
        saves.append(f"_{spelling}")
    both(run, "_without", *saves)
    without, *merged = (comfyui.latent(run.file("taco", save)) for save in ("_without", *saves))
    for each in merged:
        assert (each - without).norm() > 1e-3 * without.norm()


@pytest.mark.parametrize("strength", [0.8, -0.4])
@pytest.mark.parametrize("where", ["before", "after", "around"])
def test_two_loras(both: Both, pair: Pairs, where: str, strength: float) -> None:
    """Before the loader, after it, or one on each side."""
    both(with_two(pair(FLUX), where, strength))


def test_a_strength_that_changes_on_the_way(both: Both, pair: Pairs) -> None:
    """A hook puts a LoRA on for the positive prompt alone, and turns it down."""
    run = pair(FLUX)
    run.add("hook", "CreateHookLoraModelOnly", lora_name="comfyui.safetensors", strength_model=1.0)
    run.add("early", "CreateHookKeyframe", strength_mult=1.0, start_percent=0.0)
    run.add("late", "CreateHookKeyframe", strength_mult=0.2, start_percent=0.5, prev_hook_kf="@early")
    run.add("hooks", "SetHookKeyframes", hooks="@hook", hook_kf="@late")
    run.add("hooked", "ConditioningSetProperties", cond_NEW="@positive", hooks="@hooks", strength=1.0)
    run.nodes["hooked"]["inputs"]["set_cond_area"] = "default"
    run.load()
    run.sample(positive="@hooked", cfg=3.0, steps=6)
    both(run)


def test_another_strength_loads_only_its_layers(comfyui: ComfyUI, comfyui_models: Path) -> None:
    """The file is read once; each strength then takes the memory of the layers that it patches."""
    with Daemon(1, [comfyui_models]) as daemon:
        for strength in (0.5, 0.7):
            run = Pair(FLUX, endpoint=daemon.endpoint)
            run.load()
            put_on(run, "comfyui", strength)
            run.sample(steps=1)
            outcome = comfyui.run(run.nodes)
            assert outcome.kind == "success", outcome.error
        with daemon.client() as client:
            models = client.models()
    whole, *patched = sorted((told["weight_bytes"] for told in models), reverse=True)
    numbers = sum(outputs * inputs for outputs, inputs in COMFYUI.values())
    assert patched == [4 * numbers, 4 * numbers]
    assert whole > 5 * patched[0]

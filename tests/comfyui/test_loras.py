"""LoRAs on a MODEL and on the conditioning: what the daemon merges is what ComfyUI merges."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from comfyui_graphs import FLUX, SD3, Pair, TinyModel
from comfyui_server import ComfyUI, Outcome
from helpers import Daemon
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

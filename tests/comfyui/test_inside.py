"""What other nodes add inside of the network: a ControlNet's residuals, a bias on attention, stretched positions."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from comfyui_graphs import FLUX, SD3, Pair, TinyModel, differ
from comfyui_server import ComfyUI, Outcome

Both = Callable[..., Outcome]
Pairs = Callable[[TinyModel], Pair]


@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("model", [FLUX, SD3], ids=lambda model: model.tiny.name)
def test_residuals_of_a_controlnet(both: Both, pair: Pairs, model: TinyModel, cfg: float) -> None:
    run = pair(model)
    width = model.tiny.config.get("hidden_size", 192)
    for prompt in ("positive", "negative"):
        run.add(f"{prompt}_led", "TestControl", conditioning=f"@{prompt}", width=width, tokens=56)
    run.load()
    run.sample(positive="@positive_led", negative="@negative_led", cfg=cfg)
    both(run)


def test_a_guidance_that_is_disabled(comfyui: ComfyUI, both: Both, pair: Pairs) -> None:
    run = pair(FLUX)
    run.add("unguided", "FluxDisableGuidance", conditioning="@positive")
    run.load()
    run.sample(save="_with", cfg=1.0)
    run.sample(save="_without", cfg=1.0, positive="@unguided")
    both(run, "_with", "_without")
    differ(comfyui, run, "_with", "_without")


@pytest.mark.parametrize("size", [(7, 8), (5, 6)], ids=["native", "scaled"])
def test_an_attention_mask(both: Both, pair: Pairs, size: tuple[int, int]) -> None:
    run = pair(FLUX)
    run.add("styled", "TestAttentionMask", conditioning="@positive", rows=size[0], columns=size[1])
    run.load()
    run.sample(positive="@styled", cfg=1.0)
    both(run)


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_stretched_positions(comfyui: ComfyUI, both: Both, pair: Pairs, before: bool) -> None:
    if "ScaleROPE" not in comfyui.nodes:
        pytest.skip("this version of ComfyUI has no ScaleROPE")
    run = pair(FLUX)
    options = {"scale_x": 0.7, "scale_y": 1.5, "scale_t": 1.0, "shift_x": 2.0, "shift_y": -1.0, "shift_t": 1.0}
    if not before:
        run.load()
    run.on_model("ScaleROPE", **options)
    if before:
        run.load()
    run.sample()
    both(run)


CONTROLNETS = {"flux": FLUX, "flux_latent": FLUX, "sd3": SD3, "sd35": SD3, "sd35_single": SD3}


@pytest.mark.parametrize("kind", CONTROLNETS)
def test_a_controlnet(comfyui: ComfyUI, both: Both, pair: Pairs, kind: str) -> None:
    """ComfyUI's own networks of each sort; they run here, and act in the ranks."""
    run = pair(CONTROLNETS[kind])
    run.add("net", "TestControlNet", sort=kind, config=json.dumps(run.model.tiny.config))
    run.add("image", "TestImage", height=112, width=128)
    run.add("vae", "TestImageVAE", channels=16)
    given = {"control_net": "@net", "image": "@image", "vae": "@vae"}
    run.add(
        "led",
        "ControlNetApplyAdvanced",
        positive="@positive",
        negative="@negative",
        strength=0.9,
        start_percent=0.0,
        end_percent=0.7,
        **given,
    )
    run.load()
    run.sample(save="_without")
    run.sample(save="_with", positive="@led", negative="@led#1", cfg=3.0)
    both(run, "_without", "_with")
    without, led = (comfyui.latent(run.file("taco", save)) for save in ("_without", "_with"))
    assert (led - without).norm() > 1e-3 * without.norm()

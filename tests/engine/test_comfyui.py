"""What a forward takes besides plain tensors means what it means in ComfyUI's own networks."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import pytest
import torch
from helpers import FLUX, SD3, Tiny, relative_error
from torch import Tensor

from tacod.rank.arguments import load_arguments
from tacod_client.exchange import each_once, pack

pytestmark = pytest.mark.comfyui
TEXT, TOKENS, REFERENCE = 129, 35, 8


def theirs(comfy: Any, tiny: Tiny) -> torch.nn.Module:
    """ComfyUI's network with the same weights."""
    named = {key: value for key, value in tiny.config.items() if key != "image_model"}
    if tiny is SD3:
        kind = comfy.ldm.modules.diffusionmodules.mmdit.OpenAISignatureMMDITWrapper
        embedder = {"target": "torch.nn.Linear", **named["context_embedder_config"]}
        size = named["pos_embed_max_size"]
        named |= {"context_embedder_config": embedder, "num_patches": size**2, "input_size": None}
    else:
        kind = comfy.ldm.flux.model.Flux
        named |= {"patch_size": 2, "mlp_ratio": 4.0, "theta": 10000, "qkv_bias": True, "txt_ids_dims": []}
        # Versions differ in what they take.
        known = {field.name for field in dataclasses.fields(comfy.ldm.flux.model.FluxParams)}
        named = {key: value for key, value in named.items() if key in known}
    network: torch.nn.Module = kind(
        **named, dtype=torch.float32, device="cpu", operations=comfy.ops.disable_weight_init
    )
    network.load_state_dict(tiny.model.state_dict())
    return network.eval().requires_grad_(False)


def ours(tiny: Tiny, inputs: dict[str, Any]) -> Tensor:
    """Through the wire's form of the arguments."""
    inputs = {**inputs, **({"control": each_once(inputs["control"])} if "control" in inputs else {})}
    values = load_arguments(
        pack(inputs, "arguments", {}, None), tiny.model.arguments(), torch.float32, torch.device("cpu")
    )
    return tiny.forward(**values)


def residuals(width: int, batch: int, tokens: int) -> dict[str, list[Tensor | None]]:
    one, two = 10 * torch.randn(2, batch, tokens, width)
    return {"input": [None, one], "output": [one, two, None, two], "middle": []}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("references", [False, True])
@pytest.mark.parametrize(
    "kind", ["nothing", "residuals", "fewer residuals", "mask", "boolean mask", "positions", "all"]
)
def test_flux_is_comfyuis(comfy: Any, monkeypatch: pytest.MonkeyPatch, kind: str, references: bool, batch: int) -> None:
    if kind == "positions" and "rope_options" not in inspect.getsource(comfy.ldm.flux.model):
        pytest.skip("this version of ComfyUI has no ScaleROPE")
    # As on GPUs: what ComfyUI takes on a CPU adds a boolean mask as numbers.
    attend = comfy.ldm.modules.attention.attention_pytorch
    monkeypatch.setattr(comfy.ldm.flux.math, "optimized_attention", attend)
    torch.manual_seed(0)
    inputs = FLUX.inputs(batch=batch)
    plain = FLUX.forward(**inputs)
    tokens = TEXT + TOKENS + REFERENCE * references
    options: dict[str, Any] = {}
    if references:
        inputs["ref_latents"] = [torch.randn(batch, 4, 3, 8)]
        plain = FLUX.forward(**inputs)
    if kind in ("residuals", "all"):
        inputs["control"] = residuals(80, batch, TOKENS)
    if kind == "fewer residuals":
        inputs["control"] = residuals(80, 1, 7)
    if kind in ("mask", "all"):
        inputs["attention_mask"] = torch.randn(batch, tokens, tokens).masked_fill(
            torch.rand(batch, tokens, tokens) < 0.3, -torch.inf
        )
    if kind == "boolean mask":
        inputs["attention_mask"] = torch.rand(batch, tokens, tokens) < 0.6
    if kind in ("positions", "all") and "rope_options" in inspect.getsource(comfy.ldm.flux.model):
        options = {"scale_x": 0.6, "scale_y": 1.7, "scale_t": 2.0, "shift_x": 3.0, "shift_y": -1.5, "shift_t": 2.0}
    expected = theirs(comfy, FLUX)(**inputs, transformer_options={"rope_options": options} if options else {})
    out = ours(FLUX, {**inputs, **({"rope_options": options} if options else {})})
    assert relative_error(out, expected) <= 2e-6
    assert kind == "nothing" or relative_error(plain, expected) > 1e-3


@pytest.mark.parametrize("batch", [1, 2])
def test_sd3_is_comfyuis(comfy: Any, batch: int) -> None:
    torch.manual_seed(0)
    inputs = SD3.inputs(batch=batch)
    plain = SD3.forward(**inputs)
    control = {**residuals(192, batch, TOKENS), "input": []}
    named = {key: value for key, value in inputs.items() if key not in ("x", "timestep")}
    expected = theirs(comfy, SD3)(inputs["x"], inputs["timestep"], control=control, **named)
    assert relative_error(ours(SD3, {**inputs, "control": control}), expected) <= 2e-6
    assert relative_error(plain, expected) > 1e-3

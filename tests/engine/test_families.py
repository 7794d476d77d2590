"""Families against ComfyUI's forwards, and their detection from published layouts."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import golden_names, read_golden

from tacod.checkpoint import TensorInfo
from tacod.rank.families import detect, families
from tacod.rank.families.base import DiT
from tacod.rank.families.flux import Flux
from tacod.rank.families.kit import sinusoid
from tacod.rank.families.sd3 import SD3
from tacod.rank.parallel.sequence import SequenceParallel
from tacod_client.errors import ArgumentError, ModelUnsupported

GOLDENS = golden_names()
TINY_FLUX: dict[str, Any] = {
    "image_model": "flux",
    "in_channels": 4,
    "out_channels": 4,
    "vec_in_dim": 6,
    "context_in_dim": 8,
    "hidden_size": 48,
    "mlp_ratio": 4.0,
    "num_heads": 3,
    "depth": 1,
    "depth_single_blocks": 1,
    "axes_dim": [4, 6, 6],
    "theta": 10000,
    "patch_size": 2,
    "qkv_bias": True,
    "guidance_embed": True,
    "txt_ids_dims": [],
}
TINY_SD3: dict[str, Any] = {
    "image_model": "sd3",
    "in_channels": 4,
    "patch_size": 2,
    "depth": 2,
    "adm_in_channels": 6,
    "context_size": 8,
    "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 8, "out_features": 128}},
    "num_patches": 100,
    "pos_embed_max_size": 10,
    "pos_embed_scaling_factor": None,
    "qk_norm": "rms",
    "x_block_self_attn_layers": [0],
    "input_size": None,
}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def test_every_family_has_a_golden() -> None:
    assert {read_golden(name).model().family for name in GOLDENS} == {family.family for family in families()}


@pytest.mark.parametrize("name", GOLDENS)
def test_equals_comfyui_in_fp32(name: str) -> None:
    assert read_golden(name).error(SequenceParallel()) <= 2e-6


@pytest.mark.parametrize("name", GOLDENS)
def test_is_near_comfyui_in_bf16(name: str) -> None:
    golden = read_golden(name)
    assert golden.error(SequenceParallel(), torch.bfloat16) <= golden.bf16


@pytest.mark.parametrize("name", GOLDENS)
def test_a_golden_fits_its_own_description(name: str) -> None:
    golden = read_golden(name)
    model = golden.model()
    latents, outs = (each if isinstance(each, list) else [each] for each in (golden.inputs["x"], golden.out))
    assert model.output_shapes([tuple(each.shape) for each in latents]) == [tuple(each.shape) for each in outs]
    with pytest.raises(ArgumentError, match=r"^nothing: .* takes no such argument"):
        replace(golden, inputs={**golden.inputs, "nothing": outs[0]}).arguments(model)


def header(model: DiT) -> dict[str, TensorInfo]:
    return {name: TensorInfo("BF16", tuple(tensor.shape)) for name, tensor in model.state_dict().items()}


FLUX_DEV: dict[str, Any] = {
    **TINY_FLUX,
    "in_channels": 16,
    "out_channels": 16,
    "vec_in_dim": 768,
    "context_in_dim": 4096,
    "hidden_size": 3072,
    "num_heads": 24,
    "depth": 19,
    "depth_single_blocks": 38,
    "axes_dim": [16, 56, 56],
}


def sd3_config(depth: int, positions: int, **more: Any) -> dict[str, Any]:
    return {
        **TINY_SD3,
        "in_channels": 16,
        "out_channels": 16,
        "depth": depth,
        "adm_in_channels": 2048,
        "context_size": 4096,
        "context_embedder_config": {
            "target": "torch.nn.Linear",
            "params": {"in_features": 4096, "out_features": 64 * depth},
        },
        "num_patches": positions**2,
        "pos_embed_max_size": positions,
        "context_processor_layers": None,
        "x_block_self_attn_layers": [],
        **more,
    }


PUBLISHED: dict[str, tuple[dict[str, Any], int, dict[str, tuple[int, ...]]]] = {
    "flux1-dev": (
        FLUX_DEV,
        11_901_408_320,
        {
            "img_in.weight": (3072, 64),
            "guidance_in.in_layer.weight": (3072, 256),
            "double_blocks.18.txt_mlp.2.weight": (3072, 12288),
            "double_blocks.18.img_attn.norm.key_norm.scale": (128,),
            "single_blocks.37.linear1.weight": (21504, 3072),
            "final_layer.adaLN_modulation.1.weight": (6144, 3072),
        },
    ),
    "flux1-schnell": (
        {**FLUX_DEV, "guidance_embed": False},
        11_891_178_560,
        {"vector_in.in_layer.weight": (3072, 768)},
    ),
    "flux1-fill-dev": ({**FLUX_DEV, "in_channels": 96}, 11_902_391_360, {"img_in.weight": (3072, 384)}),
    "sd3_medium": (
        sd3_config(24, 192, qk_norm=None),
        2_028_328_000 + 192**2 * 1536,
        {"joint_blocks.23.context_block.adaLN_modulation.1.weight": (3072, 1536), "pos_embed": (1, 36864, 1536)},
    ),
    "sd3.5_large": (
        sd3_config(38, 192),
        8_056_627_520 + 192**2 * 2432,
        {"joint_blocks.37.x_block.attn.qkv.weight": (7296, 2432), "pos_embed": (1, 36864, 2432)},
    ),
    "sd3.5_medium": (
        sd3_config(24, 384, x_block_self_attn_layers=list(range(13))),
        2_243_171_520 + 384**2 * 1536,
        {
            "joint_blocks.12.x_block.adaLN_modulation.1.weight": (13824, 1536),
            "joint_blocks.12.x_block.attn2.ln_q.weight": (64,),
            "pos_embed": (1, 147456, 1536),
        },
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_are_detected(name: str) -> None:
    """From the header alone; parameter counts are the published ones, plus SD3's position table."""
    config, parameters, shapes = PUBLISHED[name]
    with torch.device("meta"):
        model = detect({}, config)[0](config)
    tensors = header(model)
    assert {key: tensors[key].shape for key in shapes} == shapes
    assert sum(tensor.numel() for tensor in model.state_dict().values()) == parameters
    family, found = detect(tensors)
    assert family is type(model)
    assert found == config


def test_what_a_file_says_overrides_what_is_detected() -> None:
    tensors = header(Flux(TINY_FLUX))
    family, found = detect(tensors, {"axes_dim": [4, 6, 6]})
    assert family is Flux
    assert found["axes_dim"] == [4, 6, 6]
    assert found["num_heads"] == 3
    assert detect(tensors, {"image_model": "flux", "theta": 7})[1]["theta"] == 7


def test_families_are_found_by_their_files() -> None:
    assert {Flux, SD3} <= set(families())
    names = [family.family for family in families()]
    assert all(family.title and family.models for family in families())
    assert names == sorted(names)
    assert len({model for family in families() for model in family.image_models}) == len(
        [model for family in families() for model in family.image_models]
    )


def changed(config: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    config = copy.deepcopy(config)
    config[key] = value
    return config


@pytest.mark.parametrize(
    ("config", "key", "value"),
    [
        (TINY_FLUX, "axes_dim", [16, 56, 56]),
        (TINY_FLUX, "axes_dim", [5, 5, 6]),
        (TINY_FLUX, "axes_dim", [4, 12]),
        (TINY_FLUX, "axes_dim", None),
        (TINY_FLUX, "num_heads", 5),
        (TINY_FLUX, "num_heads", 0),
        (TINY_FLUX, "hidden_size", "48"),
        (TINY_FLUX, "hidden_size", True),
        (TINY_FLUX, "depth", 10**9),
        (TINY_FLUX, "depth", -1),
        (TINY_FLUX, "theta", float("nan")),
        (TINY_FLUX, "mlp_ratio", "4"),
        (TINY_FLUX, "guidance_embed", 1),
        (TINY_FLUX, "vec_in_dim", None),
        (TINY_FLUX, "global_modulation", True),
        (TINY_FLUX, "txt_ids_dims", [3]),
        (TINY_FLUX, "default_ref_method", "beside"),
        (TINY_SD3, "depth", 3),
        (TINY_SD3, "depth", 10**9),
        (TINY_SD3, "num_patches", 99),
        (TINY_SD3, "pos_embed_max_size", None),
        (TINY_SD3, "adm_in_channels", None),
        (TINY_SD3, "context_embedder_config", None),
        (TINY_SD3, "qk_norm", "l2"),
        (TINY_SD3, "x_block_self_attn_layers", [2]),
        (TINY_SD3, "x_block_self_attn_layers", "0"),
        (TINY_SD3, "context_processor_layers", 2),
        (TINY_SD3, "swiglu", True),
        (TINY_SD3, "mlp_ratio", 3.0),
    ],
)
def test_an_impossible_configuration_is_refused_by_its_key(config: dict[str, Any], key: str, value: Any) -> None:
    family, merged = detect({}, changed(config, key, value))
    told = "num_patches|context_embedder_config" if key == "depth" and value == 3 else key
    with torch.device("meta"), pytest.raises(ModelUnsupported, match=told):
        family(merged)


UNETS = {
    "Stable Diffusion 1.x": 768,
    "Stable Diffusion 2.x": 1024,
    "SDXL": 2048,
}


@pytest.mark.parametrize("prefix", ["input_blocks.4.1.transformer_blocks.0", "down_blocks.1.attentions.0"])
@pytest.mark.parametrize("name", UNETS)
def test_unets_are_refused_by_name(name: str, prefix: str) -> None:
    tensors = {f"{prefix}.attn2.to_k.weight": TensorInfo("F16", (640, UNETS[name]))}
    with pytest.raises(ModelUnsupported, match=rf"UNet \({name}\).*tokens"):
        detect(tensors)


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ("input_blocks.0.0.weight", "UNet;"),
        ("double_layers.0.attn.w1q.weight", "looks like AuraFlow"),
        ("lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight", "LoRA"),
        ("first_stage_model.decoder.conv_in.weight", "flux, .*sd3"),
    ],
)
def test_other_files_are_refused_by_what_they_are(key: str, told: str) -> None:
    with pytest.raises(ModelUnsupported, match=told):
        detect({key: TensorInfo("F16", (8, 8))})


@pytest.mark.parametrize(
    "mark",
    ["double_stream_modulation_img.lin.weight", "distilled_guidance_layer.norms.0.scale", "txt_norm.scale"],
)
def test_flux_like_files_of_other_families_are_not_taken_for_flux(mark: str) -> None:
    tensors = header(Flux(TINY_FLUX))
    assert Flux.detect(tensors) is not None
    assert Flux.detect({**tensors, mark: TensorInfo("BF16", (288, 48))}) is None


@pytest.mark.parametrize("value", ["stable_cascade", None, 3, ["flux"]])
def test_an_unknown_image_model_is_refused(value: Any) -> None:
    with pytest.raises(ModelUnsupported, match="image_model"):
        detect(header(Flux(TINY_FLUX)), {"image_model": value})


@pytest.mark.parametrize("missing", ["final_layer.linear.weight", "txt_in.weight"])
def test_an_incomplete_file_is_refused_by_the_missing_tensor(missing: str) -> None:
    tensors = header(Flux(TINY_FLUX))
    del tensors[missing]
    with pytest.raises(ModelUnsupported, match=missing):
        detect(tensors)


def flux_inputs(height: int = 6, width: int = 8) -> dict[str, Any]:
    return {
        "x": torch.randn(2, 4, height, width),
        "timestep": torch.tensor([0.7373, 0.2]),
        "context": torch.randn(2, 5, 8),
        "y": torch.randn(2, 6),
        "guidance": torch.tensor([3.5, 2.0]),
    }


def test_odd_sizes_are_padded_circularly() -> None:
    model = Flux(TINY_FLUX)
    odd = flux_inputs(5, 7)
    padded = torch.cat([odd["x"], odd["x"][:, :, :1]], dim=2)
    even = {**odd, "x": torch.cat([padded, padded[..., :1]], dim=3)}
    with torch.inference_mode():
        out = model(SequenceParallel(), **odd)
        assert out.shape == odd["x"].shape
        assert torch.equal(out, model(SequenceParallel(), **even)[:, :, :5, :7])


def test_lengths_count_the_tokens_of_each_stream() -> None:
    arguments = {**flux_inputs(5, 7), "ref_latents": [torch.randn(2, 4, 3, 2), torch.randn(2, 4, 8, 8)]}
    assert Flux(TINY_FLUX).lengths(arguments) == (5, 12 + 2 + 16)
    arguments["ref_latents"] = None
    assert Flux(TINY_FLUX).lengths(arguments) == (5, 12)
    assert SD3(TINY_SD3).lengths(arguments) == (5, 12)


def test_what_can_be_left_out_has_comfyuis_defaults() -> None:
    model = Flux(TINY_FLUX)
    inputs = {**flux_inputs(), "ref_latents": [torch.randn(2, 4, 4, 4)]}
    with torch.inference_mode():
        zeros = model(SequenceParallel(), **{**inputs, "y": torch.zeros(2, 6)}, ref_latents_method="offset")
        del inputs["y"]
        assert torch.equal(model(SequenceParallel(), **inputs), zeros)


def test_each_way_to_place_references_differs() -> None:
    model = Flux(TINY_FLUX)
    inputs = {**flux_inputs(), "ref_latents": [torch.randn(2, 4, 4, 4), torch.randn(2, 4, 6, 4)]}
    methods = model.arguments()["ref_latents_method"].choices
    with torch.inference_mode():
        outs = [model(SequenceParallel(), **inputs, ref_latents_method=method) for method in methods]
    assert not any(torch.equal(outs[i], outs[j]) for i in range(len(outs)) for j in range(i))


def test_guidance_counts_where_the_model_was_distilled_for_it() -> None:
    """It may be left out, as FluxDisableGuidance does; that isn't a guidance of 0."""
    plain, distilled = Flux({**TINY_FLUX, "guidance_embed": False}), Flux(TINY_FLUX)
    inputs = flux_inputs()
    with torch.inference_mode():
        none = distilled(SequenceParallel(), **{name: each for name, each in inputs.items() if name != "guidance"})
        for guidance in (inputs["guidance"], torch.zeros_like(inputs["guidance"])):
            assert not torch.equal(distilled(SequenceParallel(), **{**inputs, "guidance": guidance}), none)
        out = plain(SequenceParallel(), **inputs)
        del inputs["guidance"]
        assert torch.equal(plain(SequenceParallel(), **inputs), out)


def test_timesteps_are_embedded_in_fp32() -> None:
    """737.3 is 736 in bf16: another place on the fast sinusoids."""
    exact = sinusoid(torch.tensor([737.3]))
    assert exact.dtype == torch.float32
    assert float((exact - sinusoid(torch.tensor([737.3]).bfloat16())).abs().max()) > 0.1
    model = Flux(TINY_FLUX).bfloat16()
    inputs = {k: v if v.ndim == 1 else v.bfloat16() for k, v in flux_inputs().items()}
    with torch.inference_mode():
        near = model(SequenceParallel(), **{**inputs, "timestep": torch.tensor([0.7373, 0.2])})
        far = model(SequenceParallel(), **{**inputs, "timestep": torch.tensor([0.7373, 0.2]).bfloat16().float()})
    assert not torch.equal(near, far)


def test_timesteps_have_comfyuis_scale() -> None:
    sigma = torch.tensor([0.25])
    assert Flux(TINY_FLUX).timestep(sigma) == 0.25
    assert SD3(TINY_SD3).timestep(sigma) == 250


def sd3_inputs(height: int = 6, width: int = 8) -> dict[str, Any]:
    return {
        "x": torch.randn(2, 4, height, width),
        "timestep": torch.tensor([737.3, 200.0]),
        "context": torch.randn(2, 5, 8),
        "y": torch.randn(2, 6),
    }


def test_a_latent_over_the_position_table_is_refused() -> None:
    model = SD3(TINY_SD3)
    with torch.inference_mode(), pytest.raises(ArgumentError, match="at most 20 by 20") as caught:
        model(SequenceParallel(), **sd3_inputs(6, 21))
    assert caught.value.argument == "x"

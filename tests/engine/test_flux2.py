"""FLUX.2: what it does with references, its refusals, and its detection from the headers of published files."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conformance import required_inputs, tiny
from helpers import FP32, relative_error

from tacod.checkpoint import TensorInfo
from tacod.rank.families import detect, from_diffusers
from tacod.rank.families.base import DiT
from tacod.rank.families.flux2 import Flux2
from tacod.rank.families.inputs import Inputs
from tacod.rank.parallel.sequence import SequenceParallel
from tacod_client.errors import ModelUnsupported


def published(width: int, context: int, double: int, single: int, guided: bool) -> dict[str, Any]:
    return {
        **Flux2.tiny,
        "in_channels": 128,
        "out_channels": 128,
        "vec_in_dim": None,
        "context_in_dim": context,
        "hidden_size": width,
        "mlp_ratio": 3.0,
        "num_heads": width // 128,
        "depth": double,
        "depth_single_blocks": single,
        "axes_dim": [32, 32, 32, 32],
        "theta": 2000,
        "patch_size": 1,
        "qkv_bias": False,
        "ops_bias": False,
        "global_modulation": True,
        "mlp_silu_act": True,
        "guidance_embed": guided,
        "default_ref_method": "index",
        "ref_index_scale": 10.0,
        "txt_ids_dims": [3],
        "yak_mlp": False,
        "txt_norm": False,
    }


PUBLISHED = {
    "dev": (published(6144, 15360, 8, 48, True), 32.2, {"single_blocks.47.linear1.weight": (55296, 6144)}),
    "klein 4B": (published(3072, 7680, 5, 20, False), 3.9, {"double_blocks.4.img_mlp.0.weight": (18432, 3072)}),
    "klein 9B": (published(4096, 12288, 8, 24, False), 9.1, {"txt_in.weight": (4096, 12288)}),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_are_detected(name: str) -> None:
    """From the header alone; billions of parameters are the published ones."""
    config, billions, shapes = PUBLISHED[name]
    with torch.device("meta"):
        model = Flux2(config)
    weights = model.state_dict()
    assert not [key for key in weights if key.endswith(".bias")]
    assert {key: tuple(weights[key].shape) for key in shapes} == shapes
    assert round(sum(each.numel() for each in weights.values()) / 1e9, 1) == billions
    tensors = {key: TensorInfo("BF16", tuple(each.shape)) for key, each in weights.items()}
    assert detect(tensors) == (Flux2, config)
    renamed = {key.replace("_norm.scale", "_norm.weight"): info for key, info in tensors.items()}
    assert detect(renamed) == (Flux2, config), "as ComfyUI saves it"
    theirs = {
        key: TensorInfo(
            "BF16", (place.rows[1] if place.rows else weights[place.key].shape[0], *weights[place.key].shape[1:])
        )
        for key, place in Flux2.diffusers_layout(config).items()
    }
    told = {
        "_class_name": "Flux2Transformer2DModel",
        "num_layers": config["depth"],
        "num_single_layers": config["depth_single_blocks"],
        "guidance_embeds": config["guidance_embed"],
    }
    assert from_diffusers("folder", told, theirs) == config


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("axes_dim", [4, 6, 6]),
        ("axes_dim", [8, 8, 8, 8]),
        ("num_heads", 5),
        ("global_modulation", False),
        ("mlp_silu_act", False),
        ("ops_bias", True),
        ("qkv_bias", True),
        ("vec_in_dim", 768),
        ("txt_ids_dims", [1, 2]),
        ("default_ref_method", "beside"),
        ("yak_mlp", True),
        ("txt_norm", True),
    ],
)
def test_an_impossible_configuration_is_refused_by_its_key(key: str, value: Any) -> None:
    with torch.device("meta"), pytest.raises(ModelUnsupported, match=key):
        Flux2({**Flux2.tiny, key: value})


def forward(dit: DiT, inputs: Inputs, **more: Any) -> torch.Tensor:
    with torch.inference_mode():
        out = dit.run(SequenceParallel(), inputs.replace(**more))
    assert isinstance(out, torch.Tensor)
    return out


def test_references_lie_by_index_unless_told() -> None:
    dit = tiny("flux2")
    inputs = required_inputs(dit, 2)
    references = [torch.randn(2, 4, 3, 5), torch.randn(2, 4, 4, 2)]
    methods = dit.arguments()["ref_latents_method"].choices  # type: ignore[union-attr]
    outs = {method: forward(dit, inputs, ref_latents=references, ref_latents_method=method) for method in methods}
    assert torch.equal(forward(dit, inputs, ref_latents=references), outs["index"])
    assert len(outs) == 4
    assert all(relative_error(outs[one], outs[other]) > 1e-4 for one in outs for other in outs if one < other)
    alone = forward(dit, inputs)
    assert all(torch.equal(forward(dit, inputs, ref_latents_method=method), alone) for method in methods)


def test_a_reference_at_timestep_0_is_one_like_any_where_the_image_is_clean() -> None:
    dit = tiny("flux2")
    inputs = required_inputs(dit, 2).replace(timestep=torch.zeros(2), ref_latents=[torch.randn(2, 4, 3, 5)])
    outs = [forward(dit, inputs, ref_latents_method=method) for method in ("index", "index_timestep_zero")]
    assert relative_error(*outs) <= FP32


def test_the_timestep_is_the_noise_level() -> None:
    dit = tiny("flux2")
    assert dit.timestep(torch.tensor(0.25)) == 0.25
    assert dit.sampling() == {"channels": 4, "latent": ["B", 4, "H", "W"], "downscale": 16, "prediction": "flow"}
    latent = torch.randn(1, 4, 2, 2)
    assert dit.latent_format is not None
    assert torch.equal(dit.latent_format.into_model(latent), latent)

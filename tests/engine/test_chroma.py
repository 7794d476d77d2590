"""Chroma and Chroma Radiance: their refusals, and their detection from the headers of published files."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conformance import required_inputs, tiny
from helpers import read_golden

from tacod.checkpoint import TensorInfo
from tacod.rank.families import detect
from tacod.rank.families.chroma import Chroma
from tacod.rank.families.chroma_radiance import ChromaRadiance
from tacod.rank.families.inputs import Argument
from tacod.rank.parallel.sequence import SequenceParallel
from tacod_client.errors import ArgumentError, ModelUnsupported

BASE: dict[str, Any] = {
    "context_in_dim": 4096,
    "vec_in_dim": None,
    "hidden_size": 3072,
    "mlp_ratio": 4.0,
    "num_heads": 24,
    "depth": 19,
    "depth_single_blocks": 38,
    "axes_dim": [16, 56, 56],
    "theta": 10000,
    "qkv_bias": True,
    "txt_ids_dims": [],
    "in_dim": 64,
    "out_dim": 3072,
    "hidden_dim": 5120,
    "n_layers": 5,
}
CHROMA: dict[str, Any] = {**BASE, "image_model": "chroma", "in_channels": 64, "out_channels": 64, "patch_size": 2}
RADIANCE: dict[str, Any] = {
    **BASE,
    "image_model": "chroma_radiance",
    "in_channels": 3,
    "out_channels": 3,
    "patch_size": 16,
    "nerf_hidden_size": 64,
    "nerf_mlp_ratio": 4,
    "nerf_depth": 4,
    "nerf_max_freqs": 8,
    "nerf_tile_size": 512,
    "nerf_final_head_type": "conv",
    "nerf_embedder_dtype": "float32",
    "use_x0": False,
    "use_sequential_txt_ids": False,
}
PUBLISHED = {
    "Chroma1-HD": (Chroma, CHROMA, 8.9),
    "Radiance": (ChromaRadiance, RADIANCE, 9.5),
    "Radiance x0": (ChromaRadiance, {**RADIANCE, "use_x0": True, "use_sequential_txt_ids": True}, 9.5),
    "an early Radiance": (ChromaRadiance, {**RADIANCE, "nerf_final_head_type": "linear"}, 9.5),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_are_detected(name: str) -> None:
    """From the header alone; billions of parameters are the published ones."""
    kind, config, billions = PUBLISHED[name]
    with torch.device("meta"):
        weights = kind(config).state_dict()
    assert round(sum(each.numel() for each in weights.values()) / 1e9, 1) == billions
    tensors = {key: TensorInfo("BF16", tuple(each.shape)) for key, each in weights.items()}
    assert detect(tensors) == (kind, config)
    renamed = {key.replace(".scale", ".weight"): info for key, info in tensors.items()}
    assert renamed.keys() != tensors.keys()
    assert detect(renamed) == (kind, config), "as ComfyUI saves it"


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        (Chroma, "in_dim", 32),
        (Chroma, "out_dim", 32),
        (Chroma, "in_channels", 18),
        (Chroma, "out_channels", 18),
        (Chroma, "depth", 30),
        (Chroma, "n_layers", 17),
        (Chroma, "axes_dim", [4, 4, 4, 4]),
        (Chroma, "txt_ids_dims", [3]),
        (Chroma, "vec_in_dim", 768),
        (ChromaRadiance, "out_channels", 4),
        (ChromaRadiance, "nerf_final_head_type", "mlp"),
        (ChromaRadiance, "nerf_embedder_dtype", "bfloat16"),
    ],
)
def test_an_impossible_configuration_is_refused_by_its_key(family: Any, key: str, value: Any) -> None:
    with torch.device("meta"), pytest.raises(ModelUnsupported, match=key):
        family({**family.tiny, key: value})


def test_a_model_of_clean_images_takes_whole_patches_alone() -> None:
    model = ChromaRadiance({**ChromaRadiance.tiny, "use_x0": True}).eval().requires_grad_(False)
    inputs = required_inputs(model, 1, 3, (8, 12))
    assert model.run(SequenceParallel(), inputs).shape == (1, 3, 8, 12)
    with pytest.raises(ArgumentError, match="multiples of 4") as caught:
        model.lengths(inputs.replace(x=torch.randn(1, 3, 8, 10)))
    assert caught.value.argument == "x"
    tiny("chroma_radiance").lengths(inputs.replace(x=torch.randn(1, 3, 8, 10)))


def test_a_clean_image_is_turned_into_a_velocity() -> None:
    plain = tiny("chroma_radiance")
    model = ChromaRadiance({**ChromaRadiance.tiny, "use_x0": True}).eval().requires_grad_(False)
    model.load_state_dict({**plain.state_dict(), "__x0__": torch.empty(0)})
    inputs = required_inputs(plain, 2, 3, (8, 12)).replace(timestep=torch.tensor([0.5, 0.25]))
    with torch.inference_mode():
        clean, velocity = plain.run(SequenceParallel(), inputs), model.run(SequenceParallel(), inputs)
    assert torch.allclose(velocity, (inputs["x"] - clean) / torch.tensor([0.5, 0.25]).view(2, 1, 1, 1))


def test_the_text_of_a_sequential_model_has_positions() -> None:
    golden = read_golden("chroma_radiance")
    model = golden.model()
    assert isinstance(model, ChromaRadiance)
    inputs = golden.arguments(model)
    with torch.inference_mode():
        before = model.run(SequenceParallel(), inputs)
        model.text_axes = [0]
        assert not torch.equal(model.run(SequenceParallel(), inputs), before)


def test_the_guidance_is_asked_for() -> None:
    spec = tiny("chroma").arguments()["guidance"]
    assert isinstance(spec, Argument)
    assert spec.required
    assert tiny("chroma").timestep(torch.tensor(0.25)) == 0.25

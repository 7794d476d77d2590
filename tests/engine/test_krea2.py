"""What Krea 2 alone does, and the same forward by diffusers' class."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import FP32, relative_error
from safetensors.torch import save_file
from torch import Tensor

from tacod.checkpoint import TensorInfo, read_checkpoint
from tacod.rank.families import detect
from tacod.rank.families.krea2 import Krea2
from tacod.rank.families.latents import WAN21
from tacod.rank.parallel.sequence import SequenceParallel
from tacod.rank.weights.load import load_model
from tacod_client.errors import ModelUnsupported

TINY = dict(Krea2.tiny)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def made(**config: Any) -> Krea2:
    """A model whose parameters are all random."""
    model = Krea2({**TINY, **config}).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith((".scale", ".lin")):
            parameter.normal_(0, 0.2)
    return model


def inputs(batch: int = 2, references: int = 0, **more: Any) -> dict[str, Any]:
    given = {
        "x": torch.randn(batch, 4, 1, 9, 6),
        "timestep": torch.linspace(0.9, 0.3, batch),
        "context": torch.randn(batch, 5, 48),
        **more,
    }
    if references:
        given["ref_latents"] = [torch.randn(batch, 4, 1, 4 + n, 7) for n in range(references)]
    return given


def forward(model: Krea2, arguments: dict[str, Any]) -> Tensor:
    with torch.inference_mode():
        out: Tensor = model(SequenceParallel(), **arguments)
    return out


# --- files ------------------------------------------------------------------------------------------------------------

PUBLISHED: dict[str, Any] = {
    "image_model": "krea2",
    "features": 6144,
    "channels": 16,
    "patch": 2,
    "layers": 28,
    "heads": 48,
    "kvheads": 12,
    "txtlayers": 12,
    "txtdim": 2560,
    "txtheads": 20,
    "txtkvheads": 20,
    "multiplier": 4,
    "tdim": 256,
}
SHAPES = {
    "first.weight": (6144, 64),
    "blocks.27.attn.wq.weight": (6144, 6144),
    "blocks.27.attn.wk.weight": (1536, 6144),
    "blocks.27.attn.gate.weight": (6144, 6144),
    "blocks.27.attn.qknorm.knorm.scale": (128,),
    "blocks.27.mlp.down.weight": (6144, 16384),
    "blocks.27.mod.lin": (36864,),
    "txtfusion.projector.weight": (1, 12),
    "txtfusion.refiner_blocks.1.mlp.up.weight": (6912, 2560),
    "txtmlp.0.scale": (2560,),
    "tproj.1.weight": (36864, 6144),
    "last.modulation.lin": (2, 6144),
}


def header(model: Krea2) -> dict[str, TensorInfo]:
    return {name: TensorInfo("BF16", tuple(tensor.shape)) for name, tensor in model.state_dict().items()}


def test_the_published_file_is_detected() -> None:
    with torch.device("meta"):
        model = Krea2({"image_model": "krea2"})
    tensors = header(model)
    assert {key: tensors[key].shape for key in SHAPES} == SHAPES
    assert detect(tensors) == (Krea2, PUBLISHED)
    assert model.axes == [32, 48, 48]


@pytest.mark.parametrize("multiplier", [1, 3, 5])
def test_the_width_of_feed_forward_is_told_by_shapes(multiplier: int) -> None:
    """Of text and blocks, whose widths differ; one of several multipliers that give the same is as good as another."""
    with torch.device("meta"):
        model = Krea2({**TINY, "features": 192, "txtdim": 320, "multiplier": multiplier})
        found = detect(header(model))[1]
        assert header(Krea2(found)) == header(model)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"patch": 1}, "patch"),
        ({"bias": True}, "bias"),
        ({"heads": 5}, "heads"),
        ({"kvheads": 4}, "kvheads"),
        ({"txtheads": 3}, "txtheads"),
        ({"txtkvheads": 3}, "txtkvheads"),
        ({"features": 90}, "axes_dim"),
        ({"axes_dim": [8, 6, 6]}, "axes_dim"),
        ({"theta": 0}, "theta"),
        ({"norm_eps": 1e-6}, "norm_eps"),
        ({"default_ref_method": "negative_index"}, "default_ref_method"),
    ],
)
def test_a_configuration_that_can_not_be_is_refused_by_its_key(change: dict[str, Any], key: str) -> None:
    with pytest.raises(ModelUnsupported, match=f"config key '{key}'"):
        Krea2({**TINY, **change})


def test_diffusers_class_is_the_same_model_under_other_names(tmp_path: Path) -> None:
    """Its tables have six rows where ours have one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        diffusers = pytest.importorskip("diffusers")
        theirs = diffusers.Krea2Transformer2DModel(
            in_channels=16,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=6,
            num_key_value_heads=2,
            intermediate_size=128,
            text_hidden_dim=16,
            num_text_layers=3,
            text_num_attention_heads=4,
            text_num_key_value_heads=2,
            text_intermediate_size=128,
            axes_dims_rope=(4, 6, 6),
        ).eval()
        theirs.requires_grad_(False)
        for name, parameter in theirs.named_parameters():
            if "norm" in name or "table" in name:
                parameter.normal_(0, 0.2)
        config = {key: list(value) if isinstance(value, tuple) else value for key, value in theirs.config.items()}
    (tmp_path / "config.json").write_text(json.dumps({**config, "_class_name": type(theirs).__name__}))
    save_file(theirs.state_dict(), tmp_path / "diffusion_pytorch_model.safetensors")
    ours = load_model(read_checkpoint(str(tmp_path)), torch.float32, torch.device("cpu"))
    assert isinstance(ours, Krea2)

    given = inputs()
    given["x"] = given["x"][..., :8, :]
    packed = given["x"].view(2, 4, 4, 2, 3, 2).permute(0, 2, 4, 1, 3, 5).reshape(2, 12, 16)
    places = torch.zeros(5 + 12, 3)
    places[5:, 1:] = torch.cartesian_prod(torch.arange(4.0), torch.arange(3.0))
    with torch.inference_mode():
        out = theirs(packed, given["context"].unflatten(-1, (3, 16)), given["timestep"], places).sample
    expected = out.view(2, 4, 3, 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(2, 4, 1, 8, 6)
    assert relative_error(forward(ours, given), expected) <= FP32


# --- references -------------------------------------------------------------------------------------------------------


def test_references_without_a_method_are_not_looked_at() -> None:
    """As in ComfyUI."""
    model, given = made(), inputs(references=2)
    alone = {name: value for name, value in given.items() if name != "ref_latents"}
    assert torch.equal(forward(model, given), forward(model, alone))
    assert torch.equal(forward(model, {**alone, "ref_latents_method": "index"}), forward(model, alone))
    assert relative_error(forward(model, {**given, "ref_latents_method": "index"}), forward(model, alone)) > 1e-2


def test_references_at_time_zero_are_those_of_a_step_at_zero() -> None:
    model = made()
    given = inputs(references=1, ref_latents_method="index_timestep_zero")
    by_index = {**given, "ref_latents_method": "index"}
    assert relative_error(forward(model, given), forward(model, by_index)) > 1e-3
    now = {"timestep": torch.zeros(2)}
    assert relative_error(forward(model, {**given, **now}), forward(model, {**by_index, **now})) <= FP32


def test_a_model_may_have_a_method_of_its_own() -> None:
    given = inputs(references=1)
    torch.manual_seed(1)
    model = made(default_ref_method="index_timestep_zero")
    torch.manual_seed(1)
    other = made()
    told = {**given, "ref_latents_method": "index_timestep_zero"}
    assert torch.equal(forward(model, given), forward(other, told))


def test_references_lie_on_planes_of_their_own() -> None:
    """So their order counts."""
    model, given = made(), inputs(references=2, ref_latents_method="index")
    turned = {**given, "ref_latents": given["ref_latents"][::-1]}
    assert relative_error(forward(model, turned), forward(model, given)) > 1e-3
    assert model.lengths(given) == (5, 2 * 4 + 3 * 4, 5 * 3)


# --- text -------------------------------------------------------------------------------------------------------------


def test_the_text_has_no_order() -> None:
    model, given = made(), inputs()
    turned = {**given, "context": given["context"].flip(1)}
    assert relative_error(forward(model, turned), forward(model, given)) <= FP32


def test_the_timestep_is_the_noise_level() -> None:
    levels = torch.tensor([0.0, 0.37, 1.0])
    assert torch.equal(made().timestep(levels), levels)


def test_latents_are_those_of_wans_vae() -> None:
    """With one frame; by the means and deviations of the first and the last channel."""
    latents = Krea2.latent_format
    assert latents is WAN21
    latent = torch.ones(1, 16, 1, 2, 2)
    inside = latents.into_model(latent)
    torch.testing.assert_close(inside[0, 0], torch.full((1, 2, 2), (1 + 0.7571) / 2.8184))
    torch.testing.assert_close(inside[0, 15], torch.full((1, 2, 2), (1 + 0.2921) / 1.9160))
    torch.testing.assert_close(latents.out_of_model(inside), latent)

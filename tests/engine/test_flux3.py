"""What FLUX.3 alone does, and the same forward by diffusers' class."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import FP32, assert_same_model, relative_error
from safetensors.torch import save_file
from torch import Tensor

from tacod.checkpoint import TensorInfo, read_checkpoint
from tacod.rank.families import detect
from tacod.rank.families.base import LatentFormat
from tacod.rank.families.flux import Flux
from tacod.rank.families.flux2 import Flux2
from tacod.rank.families.flux3 import Flux3
from tacod.rank.families.stream import ForwardPass
from tacod.rank.parallel.sequence import SequenceParallel
from tacod.rank.sampling.sampling import check_samples
from tacod.rank.weights.load import load_model
from tacod_client.errors import ArgumentError, ModelUnsupported

TINY = dict(Flux3.tiny)
BASE: dict[str, Any] = {**TINY, "flow_map": False}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def made(config: dict[str, Any]) -> Flux3:
    """A model whose parameters are all random."""
    model = Flux3(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith(".scale"):
            parameter.normal_(1, 0.2)
    return model


def inputs(batch: int = 2, references: int = 0, **more: Any) -> dict[str, Any]:
    given = {
        "x": torch.randn(batch, 4, 7, 6),
        "timestep": torch.linspace(0.9, 0.3, batch),
        "context": torch.randn(batch, 5, 16),
        **more,
    }
    if references:
        given["ref_latents"] = [torch.randn(batch, 4, 4 + n, 5) for n in range(references)]
    return given


def forward(model: Flux3, arguments: dict[str, Any]) -> Tensor:
    with torch.inference_mode():
        out: Tensor = model(SequenceParallel(), **arguments)
    return out


# --- files ------------------------------------------------------------------------------------------------------------

PUBLISHED: dict[str, Any] = {
    "image_model": "flux3",
    "in_channels": 128,
    "cond_in_channels": 128,
    "num_layers": 5,
    "num_single_layers": 28,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 20480,
    "timestep_channels": 256,
    "mlp_ratio": 3.0,
    "axes_dims_rope": [32, 32, 32, 32],
    "rope_theta": 10000,
    "flow_map": False,
}
SHAPES = {
    "time_in.in_layer.weight": (3072, 256),
    "emb_in.image_cond.weight": (3072, 128),
    "txt_in.weight": (3072, 20480),
    "early_stream_modulations.txt.lin.weight": (9216, 3072),
    "single_stream_modulations.image_cond.lin.weight": (9216, 3072),
    "content_mode_blocks.image_cond.4.mlp_in.weight": (18432, 3072),
    "txt_mode_blocks.4.attn_out.weight": (3072, 3072),
    "single_blocks.27.norm.query_norm.scale": (128,),
    "single_blocks.27.mlp_out.weight": (3072, 9216),
    "final_layer.image.adaLN_modulation.1.weight": (6144, 3072),
    "final_layer.image.linear.weight": (128, 3072),
}


def header(config: dict[str, Any]) -> dict[str, TensorInfo]:
    with torch.device("meta"):
        model = Flux3(config)
    return {name: TensorInfo("BF16", tuple(tensor.shape)) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("flow_map", [False, True])
def test_the_published_files_are_detected(flow_map: bool) -> None:
    """A distilled one has an embedder more."""
    tensors = header({**PUBLISHED, "flow_map": flow_map})
    assert {key: tensors[key].shape for key in SHAPES} == SHAPES
    assert ("ref_time_in.out_layer.weight" in tensors) == flow_map
    assert detect(tensors) == (Flux3, {**PUBLISHED, "flow_map": flow_map})
    assert Flux.detect(tensors) is None
    assert Flux2.detect(tensors) is None


def test_widths_are_told_by_shapes() -> None:
    config = {
        **PUBLISHED,
        "in_channels": 8,
        "cond_in_channels": 12,
        "num_layers": 1,
        "num_single_layers": 3,
        "attention_head_dim": 16,
        "num_attention_heads": 3,
        "joint_attention_dim": 24,
        "timestep_channels": 64,
        "mlp_ratio": 1.5,
        "axes_dims_rope": [4, 4, 4, 4],
    }
    assert detect(header(config)) == (Flux3, config)


def test_without_a_configuration_the_sizes_are_the_published_ones() -> None:
    assert header({"image_model": "flux3"}) == header(PUBLISHED)


def test_heads_of_training_are_left_out(tmp_path: Path) -> None:
    model = made(BASE)
    tensors = {**model.state_dict(), "repa_projectors.image.0.weight": torch.randn(4, 4)}
    save_file(tensors, tmp_path / "m.safetensors", {"tacod.config": json.dumps(BASE)})
    loaded = load_model(read_checkpoint(str(tmp_path / "m.safetensors")), torch.float32, torch.device("cpu"))
    given = inputs(references=1)
    assert isinstance(loaded, Flux3)
    assert_same_model(loaded, model, forward(loaded, given), forward(model, given))


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"axes_dims_rope": [8, 4, 4]}, "axes_dims_rope"),
        ({"axes_dims_rope": [4, 4, 4, 8]}, "axes_dims_rope"),
        ({"attention_head_dim": 18}, "axes_dims_rope"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"mlp_ratio": "3"}, "mlp_ratio"),
        ({"eps": 1e-5}, "eps"),
        ({"flow_map": 1}, "flow_map"),
        ({"num_single_layers": 10**9}, "num_single_layers"),
    ],
)
def test_a_configuration_that_can_not_be_is_refused_by_its_key(change: dict[str, Any], key: str) -> None:
    with pytest.raises(ModelUnsupported, match=f"config key '{key}'"):
        Flux3({**TINY, **change})


@pytest.mark.parametrize("flow_map", [False, True])
def test_diffusers_class_is_the_same_model_under_other_names(tmp_path: Path, flow_map: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        diffusers = pytest.importorskip("diffusers")
        if not hasattr(diffusers, "Flux3Transformer2DModel"):
            pytest.skip("diffusers has no FLUX.3")
        theirs = diffusers.Flux3Transformer2DModel(
            in_channels=4,
            cond_in_channels=4,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=24,
            num_attention_heads=3,
            joint_attention_dim=16,
            mlp_ratio=2.0,
            axes_dims_rope=(4, 8, 8, 4),
            rope_theta=500,
            flow_map=flow_map,
        )
        theirs.eval().requires_grad_(False)
        for name, parameter in theirs.named_parameters():
            if "norm_q" in name or "norm_k" in name:
                parameter.normal_(1, 0.2)
        config = {key: list(value) if isinstance(value, tuple) else value for key, value in theirs.config.items()}
    (tmp_path / "config.json").write_text(json.dumps({**config, "_class_name": type(theirs).__name__}))
    save_file(theirs.state_dict(), tmp_path / "diffusion_pytorch_model.safetensors")
    ours = load_model(read_checkpoint(str(tmp_path)), torch.float32, torch.device("cpu"))
    assert isinstance(ours, Flux3)

    target = {"target_timestep": torch.tensor([0.7, 0.1])} if flow_map else {}
    given = inputs(references=2, **target)
    words = torch.zeros(5, 4)
    words[:, 3] = torch.arange(5)
    references = given["ref_latents"]
    with torch.inference_mode():
        out = theirs(
            packed(given["x"]),
            given["context"],
            given["timestep"],
            places(given["x"], 0),
            words,
            image_cond_hidden_states=torch.cat([packed(each) for each in references], dim=1),
            image_cond_ids=torch.cat([places(each, -1 - at) for at, each in enumerate(references)]),
            **target,
        ).sample
    assert relative_error(packed(forward(ours, given)), out) <= FP32


def packed(latent: Tensor) -> Tensor:
    return latent.flatten(2).transpose(1, 2)


def places(latent: Tensor, plane: int) -> Tensor:
    """Time, row, column and plane of each cell; two cells are one step."""
    rows, columns = (torch.arange(side) / 2 for side in latent.shape[2:])
    cells = torch.cartesian_prod(rows, columns)
    return torch.cat((torch.zeros(len(cells), 1), cells, torch.full((len(cells), 1), float(plane))), dim=1)


# --- forwards ---------------------------------------------------------------------------------------------------------


def test_a_flow_map_must_be_told_where_a_step_goes_to() -> None:
    model, given = made(TINY), inputs()
    assert model.arguments()["target_timestep"].required
    near, far = (forward(model, {**given, "target_timestep": torch.full((2,), level)}) for level in (0.5, 0.0))
    assert relative_error(near, far) > 1e-3
    assert "target_timestep" not in made(BASE).arguments()


def test_a_flow_map_has_no_sample() -> None:
    with pytest.raises(ArgumentError, match=r"target_timestep.*call forward for each step"):
        check_samples(made(TINY))
    assert check_samples(made(BASE)) == (LatentFormat(1.0, 0.0),)


def test_times_count_in_fp32_where_weights_are_bf16() -> None:
    """Both levels are 0.5 in bf16."""
    model = made(TINY).bfloat16()
    given = {name: value.bfloat16() if value.ndim > 1 else value for name, value in inputs().items()}
    for name in ("timestep", "target_timestep"):
        levels = {"timestep": torch.full((2,), 0.5), "target_timestep": torch.full((2,), 0.25)}
        out = forward(model, {**given, **levels})
        assert not torch.equal(out, forward(model, {**given, **levels, name: levels[name] * 1.0009}))


def test_the_timestep_is_the_noise_level() -> None:
    levels = torch.tensor([0.0, 0.37, 1.0])
    assert torch.equal(made(BASE).timestep(levels), levels)


def test_text_and_references_have_time_zero() -> None:
    """Before the joint blocks nothing of theirs changes with the timestep, and the image's does."""
    model = made({**BASE, "num_single_layers": 1})
    seen: list[Sequence[Tensor]] = []

    def keep(_: Any, args: tuple[ForwardPass]) -> None:
        (f,) = args
        assert f.references is not None
        seen.append(torch.split(f.joint.tokens, [each.size for each in (f.text, f.references, f.image)], dim=1))

    joint = model.single_blocks[0].register_forward_pre_hook(keep)
    given = inputs(references=1)
    forward(model, given)
    forward(model, {**given, "timestep": given["timestep"] / 2})
    joint.remove()
    (text, references, image), (text_after, references_after, image_after) = seen
    assert text.equal(text_after)
    assert references.equal(references_after)
    assert relative_error(image_after, image) > 1e-3


def test_references_lie_on_planes_of_their_own() -> None:
    """So their order counts, and those of different sizes are one stream."""
    model, given = made(BASE), inputs(references=2)
    turned = {**given, "ref_latents": given["ref_latents"][::-1]}
    assert relative_error(forward(model, turned), forward(model, given)) > 1e-4
    assert model.lengths(given) == (5, 4 * 5 + 5 * 5, 7 * 6)
    assert model.lengths(inputs()) == (5, 42)


def test_references_may_have_other_channels_than_the_image() -> None:
    model, given = made({**BASE, "cond_in_channels": 6}), inputs()
    references = [torch.randn(2, 6, 3, 3)]
    assert forward(model, {**given, "ref_latents": references}).shape == given["x"].shape


def test_no_references_are_as_good_as_none() -> None:
    model, given = made(BASE), inputs()
    assert torch.equal(forward(model, {**given, "ref_latents": []}), forward(model, given))

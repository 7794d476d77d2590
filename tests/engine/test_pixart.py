"""What PixArt alone does, and the same forward by diffusers' class."""

from __future__ import annotations

import copy
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import FP32, assert_same_model, in_diffusers, relative_error
from safetensors.torch import save_file
from torch import Tensor

from tacod.checkpoint import TensorInfo, read_checkpoint
from tacod.plan import AUTO
from tacod.rank.families import detect
from tacod.rank.families.base import LatentFormat
from tacod.rank.families.pixart import PixArt
from tacod.rank.forward.graphs import Forwards
from tacod.rank.parallel.sequence import SequenceParallel
from tacod.rank.parallel.topology import Topology
from tacod.rank.sampling.sampling import SampleRequest, begin
from tacod.rank.weights.load import load_model
from tacod_client.errors import ArgumentError, ModelUnsupported
from tacod_client.tensors import to_wire

ALPHA: dict[str, Any] = {
    "image_model": "pixart_alpha",
    "num_heads": 3,
    "patch_size": 2,
    "hidden_size": 36,
    "in_channels": 4,
    "depth": 2,
    "caption_channels": 8,
    "pred_sigma": True,
    "micro_condition": True,
    "model_max_length": 7,
}
SIGMA: dict[str, Any] = {**ALPHA, "image_model": "pixart_sigma", "micro_condition": False}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def inputs(height: int = 34, width: int = 38, batch: int = 2, text: int = 5) -> dict[str, Any]:
    return {
        "x": torch.randn(batch, 4, height, width),
        "timestep": torch.linspace(999, 20, batch),
        "context": torch.randn(batch, text, 8),
        "c_size": torch.tensor([[512.0, 768.0]]).repeat(batch, 1),
        "c_ar": torch.full((batch, 1), 2 / 3),
    }


def forward(model: PixArt, **arguments: Any) -> Tensor:
    with torch.inference_mode():
        out: Tensor = model(SequenceParallel(), **arguments)
    return out


# --- files ------------------------------------------------------------------------------------------------------------


def header(model: PixArt) -> dict[str, TensorInfo]:
    return {name: TensorInfo("F16", tuple(tensor.shape)) for name, tensor in model.state_dict().items()}


def published(image_model: str, tokens: int | None, side: int | None) -> dict[str, Any]:
    alpha = image_model == "pixart_alpha"
    config: dict[str, Any] = {
        "image_model": image_model,
        "num_heads": 16,
        "patch_size": 2,
        "hidden_size": 1152,
        "in_channels": 4,
        "depth": 28,
        "caption_channels": 4096,
        "pred_sigma": True,
        "micro_condition": alpha,
    }
    if tokens is not None:
        config["model_max_length"] = tokens
    if side is not None:
        config |= {"num_patches": (side // 2) ** 2, "input_size": side, "pe_interpolation": side // 64}
    return config


COMMON = {
    "blocks.27.attn.qkv.weight": (3456, 1152),
    "blocks.27.cross_attn.kv_linear.weight": (2304, 1152),
    "blocks.27.mlp.fc1.weight": (4608, 1152),
    "blocks.0.scale_shift_table": (6, 1152),
    "t_block.1.weight": (6912, 1152),
    "x_embedder.proj.weight": (1152, 4, 2, 2),
    "y_embedder.y_proj.fc1.weight": (1152, 4096),
    "final_layer.linear.weight": (32, 1152),
    "final_layer.scale_shift_table": (2, 1152),
}
PUBLISHED: dict[str, tuple[dict[str, Any], dict[str, tuple[int, ...]]]] = {
    "PixArt-XL-2-1024-MS": (
        published("pixart_alpha", 120, 128),
        {
            "pos_embed": (1, 4096, 1152),
            "y_embedder.y_embedding": (120, 4096),
            "csize_embedder.mlp.0.weight": (384, 256),
            "ar_embedder.mlp.2.weight": (384, 384),
        },
    ),
    "PixArt-XL-2-512-MS": (published("pixart_alpha", 120, 64), {"pos_embed": (1, 1024, 1152)}),
    "PixArt-Sigma-XL-2-512-MS": (published("pixart_sigma", 300, 64), {"pos_embed": (1, 1024, 1152)}),
    "PixArt-Sigma-XL-2-1024-MS": (published("pixart_sigma", 300, None), {"y_embedder.y_embedding": (300, 4096)}),
    "PixArt-Sigma-XL-2-2K-MS": (published("pixart_sigma", 300, 256), {"pos_embed": (1, 16384, 1152)}),
    "a conversion from diffusers": (published("pixart_sigma", None, None), {}),
}
PARAMETERS = {"pixart_alpha": 611_349_152, "pixart_sigma": 610_856_096}
"""As diffusers counts them, in its own class at this size."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_are_detected(name: str) -> None:
    config, shapes = PUBLISHED[name]
    with torch.device("meta"):
        model = PixArt(config)
    tensors = header(model)
    shapes = {**COMMON, **shapes}
    assert {key: tensors[key].shape for key in shapes} == shapes
    assert ("pos_embed" in tensors) == ("pos_embed" in shapes)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[config["image_model"]]
    assert detect(tensors) == (PixArt, config)


def test_without_micro_conditions_a_file_is_taken_for_a_sigma() -> None:
    """As ComfyUI does; the file may say that it is an alpha, whose latents have another scale."""
    tensors = header(PixArt({**ALPHA, "micro_condition": False}))
    assert detect(tensors)[1]["image_model"] == "pixart_sigma"
    family, config = detect(tensors, {"image_model": "pixart_alpha", "micro_condition": False, "num_heads": 3})
    model = family(config)
    assert model.latent_format == LatentFormat(0.18215, 0)
    assert set(model.state_dict()) == set(tensors)


def test_a_file_loads_with_the_tensors_that_a_forward_leaves_alone(tmp_path: Path) -> None:
    model = PixArt({**ALPHA, "num_patches": 16})
    weights = model.state_dict()
    torch.nn.init.normal_(weights["pos_embed"])
    torch.nn.init.normal_(weights["y_embedder.y_embedding"])
    path = tmp_path / "tiny.safetensors"
    save_file(
        {f"model.diffusion_model.{key}": value for key, value in weights.items()},
        path,
        metadata={"tacod.config": '{"image_model": "pixart_alpha", "num_heads": 3, "pe_interpolation": 1}'},
    )
    loaded = load_model(read_checkpoint(str(path)), torch.float32, torch.device("cpu"))
    assert isinstance(loaded, PixArt)
    assert torch.equal(loaded.state_dict()["pos_embed"], weights["pos_embed"])
    arguments, expected = inputs(), filled({**ALPHA, "pe_interpolation": 1}, weights)
    assert_same_model(loaded, expected, forward(loaded, **arguments), forward(expected, **arguments))


def filled(config: dict[str, Any], weights: dict[str, Tensor]) -> PixArt:
    """A model with as many of the weights as it has a place for."""
    model = PixArt({**config, "model_max_length": None})
    model.load_state_dict({key: weights[key] for key in model.state_dict()})
    return model


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_heads", 5),
        ("num_heads", 0),
        ("hidden_size", 40),
        ("hidden_size", "36"),
        ("hidden_size", True),
        ("depth", 10**9),
        ("depth", 0),
        ("patch_size", 0),
        ("in_channels", None),
        ("caption_channels", -1),
        ("pred_sigma", 1),
        ("micro_condition", "yes"),
        ("mlp_ratio", 0),
        ("pe_interpolation", 0),
        ("pe_interpolation", float("nan")),
        ("pe_precision", -1),
        ("pe_precision", 0.5),
        ("model_max_length", 0),
        ("num_patches", "all"),
        ("qk_norm", True),
        ("kv_compress_config", {"sampling": "conv", "scale_factor": 2, "kv_compress_layer": [14]}),
    ],
)
def test_an_impossible_configuration_is_refused_by_its_key(key: str, value: Any) -> None:
    config = copy.deepcopy(ALPHA)
    config[key] = value
    family, config = detect({}, config)
    with torch.device("meta"), pytest.raises(ModelUnsupported, match=f"'{key}'"):
        family(config)


def test_widths_are_refused_where_positions_do_not_divide_them() -> None:
    with pytest.raises(ModelUnsupported, match=r"'hidden_size'.* 12"):
        PixArt({**ALPHA, "hidden_size": 40, "num_heads": 1})
    PixArt({**SIGMA, "hidden_size": 40, "num_heads": 1})
    with pytest.raises(ModelUnsupported, match=r"'hidden_size'.* 4"):
        PixArt({**SIGMA, "hidden_size": 42, "num_heads": 1})


@pytest.mark.parametrize("missing", ["x_embedder.proj.weight", "final_layer.linear.weight"])
def test_an_incomplete_file_is_refused_by_the_missing_tensor(missing: str) -> None:
    tensors = header(PixArt(ALPHA))
    del tensors[missing]
    with pytest.raises(ModelUnsupported, match=missing):
        detect(tensors)


def test_other_files_with_such_keys_are_not_taken_for_pixart() -> None:
    ace_step = {
        "t_block.1.weight": TensorInfo("F16", (15360, 2560)),
        "genre_embedder.weight": TensorInfo("F16", (8, 8)),
    }
    assert PixArt.detect(ace_step) is None
    assert PixArt.detect({"adaln_single.linear.weight": TensorInfo("F16", (6912, 1152))}) is None


def test_latents_have_the_scale_of_the_vae() -> None:
    assert PixArt(ALPHA).latent_format == LatentFormat(0.18215, 0)
    assert PixArt(SIGMA).latent_format == LatentFormat(0.13025, 0)


# --- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(32, 32), (16, 48), (30, 34), (2, 62), (8, 8)])
def test_a_latent_below_the_position_grid_is_refused(height: int, width: int) -> None:
    model = PixArt(ALPHA)
    with pytest.raises(ArgumentError, match=r"^x: .* 528 pixels.*272 by 272") as caught:
        forward(model, **inputs(height, width))
    assert caught.value.argument == "x"
    with pytest.raises(ArgumentError):
        model.lengths(inputs(height, width))


@pytest.mark.parametrize(("height", "width"), [(35, 40), (40, 35), (63, 63)])
def test_a_latent_of_no_whole_patches_is_refused(height: int, width: int) -> None:
    with pytest.raises(ArgumentError, match="multiples of 16 pixels") as caught:
        forward(PixArt(SIGMA), **inputs(height, width))
    assert caught.value.argument == "x"


@pytest.mark.parametrize(("height", "width"), [(34, 32), (2, 64), (40, 36), (64, 96), (128, 128), (256, 192)])
def test_other_latents_are_run(height: int, width: int) -> None:
    model = PixArt({**SIGMA, "hidden_size": 8, "num_heads": 1, "depth": 1})
    arguments = inputs(height, width, batch=1)
    assert model.lengths(arguments) == (height * width // 4,)
    out = forward(model, **arguments)
    assert out.shape == arguments["x"].shape
    assert out.isfinite().all()


def test_what_can_be_left_out_has_comfyuis_defaults() -> None:
    """An alpha without micro-conditions takes those of x: its size in pixels, and height over width."""
    model, arguments = PixArt(ALPHA), inputs(34, 38)
    arguments |= {"c_size": torch.tensor([[272.0, 304.0]] * 2), "c_ar": torch.full((2, 1), 34 / 38)}
    out = forward(model, **arguments)
    other = forward(model, **{**arguments, "c_size": arguments["c_size"] * 2})
    assert relative_error(other, out) > 1e-3
    del arguments["c_size"], arguments["c_ar"]
    assert torch.equal(forward(model, **arguments), out)


def test_a_sigma_does_not_look_at_micro_conditions() -> None:
    model, arguments = PixArt(SIGMA), inputs()
    out = forward(model, **arguments)
    del arguments["c_size"], arguments["c_ar"]
    assert torch.equal(forward(model, **arguments), out)


def test_timesteps_are_embedded_in_fp32() -> None:
    model = PixArt(ALPHA).bfloat16()
    arguments = {key: value if value.ndim == 1 else value.bfloat16() for key, value in inputs().items()}
    times = torch.tensor([737.0, 201.0])
    near = forward(model, **{**arguments, "timestep": times})
    far = forward(model, **{**arguments, "timestep": times.bfloat16().float()})
    assert near.dtype == torch.bfloat16
    assert not torch.equal(near, far)


# --- noise levels -----------------------------------------------------------------------------------------------------


def levels() -> Tensor:
    """The 1000 levels of training, added up one by one."""
    product, found = 1.0, []
    for step in range(1000):
        product *= 1 - (1e-4 + (2e-2 - 1e-4) * step / 999)
        found.append(((1 - product) / product) ** 0.5)
    return torch.tensor(found, dtype=torch.float64)


def test_timesteps_are_those_of_training() -> None:
    model, table = PixArt(SIGMA), levels()
    steps = model.timestep(table.float())
    assert steps.dtype == torch.float32
    assert torch.equal(steps, torch.arange(1000.0))
    # Nearest on a log scale: the border between two steps is their geometric mean.
    border = (table[700] * table[701]).sqrt()
    near = torch.stack([border * (1 - 1e-4), border * (1 + 1e-4)]).float()
    assert model.timestep(near).tolist() == [700, 701]
    assert model.timestep(torch.tensor([[0.0, 1e9]])).tolist() == [[0, 999]]
    assert model.timestep(torch.tensor(1.0)).shape == ()


def test_the_terminal_level_is_that_of_training() -> None:
    assert PixArt.process.terminal_sigma == pytest.approx(float(levels()[-1]), rel=1e-6)
    assert PixArt.process.terminal_sigma == pytest.approx(157.407, abs=1e-3)


@pytest.mark.parametrize("config", [ALPHA, SIGMA], ids=["alpha", "sigma"])
@pytest.mark.parametrize("top", [999, 600])
def test_a_run_equals_a_loop_by_hand(config: dict[str, Any], top: int) -> None:
    """From the terminal level with noise alone, and from halfway with a latent."""
    model = PixArt(config).eval().requires_grad_(False)
    table = levels()
    sigmas = torch.cat([table[torch.linspace(top, 0, 5).round().long()], torch.zeros(1, dtype=torch.float64)]).float()
    noise, positive, negative = torch.randn(1, 4, 34, 36), torch.randn(1, 6, 8), torch.randn(1, 4, 8)
    latent = torch.zeros_like(noise) if top == 999 else torch.randn_like(noise)
    request = SampleRequest(
        sampler="euler",
        seed=0,
        cfg=4.5,
        noise=to_wire(noise, "noise"),
        latent=to_wire(latent, "latent"),
        sigmas=to_wire(sigmas, "sigmas"),
        positive={"context": to_wire(positive, "context")},
        negative={"context": to_wire(negative, "context")},
    )
    request.check(model)
    with torch.inference_mode():
        run = begin(request, model, AUTO, Forwards(Topology()), torch.device("cpu"))
        *_, last = run.steps
        out = run.finish(last)

    scale = 0.18215 if config is ALPHA else 0.13025
    x = noise * (1 + sigmas[0] ** 2) ** 0.5 if top == 999 else latent * scale + noise * sigmas[0]
    for sigma, following in pairwise(sigmas):
        step = (table.log() - sigma.double().log()).abs().argmin().float().reshape(1)
        noisy = x / (sigma**2 + 1) ** 0.5
        away, towards = (forward(model, x=noisy, timestep=step, context=text) for text in (negative, positive))
        epsilon = away + 4.5 * (towards - away)
        x = x + (following - sigma) * epsilon
    assert relative_error(out, x / scale) <= 1e-5
    assert out.isfinite().all()


@pytest.mark.parametrize("sampler", ["euler_ancestral", "uni_pc"])
def test_a_sampler_for_flows_is_refused(sampler: str) -> None:
    noise = to_wire(torch.randn(1, 4, 34, 36), "noise")
    levels_given = to_wire(torch.tensor([9.0, 0.0]), "sigmas")
    positive = {"context": to_wire(torch.randn(1, 6, 8), "context")}
    request = SampleRequest(sampler, 0, 1.0, noise, noise, levels_given, positive, None)
    with pytest.raises(ArgumentError, match=sampler) as caught:
        request.check(PixArt(ALPHA))
    assert caught.value.argument == "sampler"


# --- diffusers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [ALPHA, SIGMA], ids=["alpha", "sigma"])
def test_diffusers_class_is_the_same_model_under_other_names(config: dict[str, Any]) -> None:
    """Names and shapes, and the output where both have the same positions."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        diffusers = pytest.importorskip("diffusers")
        theirs = diffusers.PixArtTransformer2DModel(
            num_attention_heads=3,
            attention_head_dim=12,
            num_layers=2,
            cross_attention_dim=36,
            caption_channels=8,
            sample_size=64,
            interpolation_scale=1,
            use_additional_conditions=config["micro_condition"],
        ).eval()
    ours = PixArt(config).eval()
    weights = in_diffusers(ours)
    shapes = {name: tensor.shape for name, tensor in theirs.state_dict().items()}
    assert {name: tensor.shape for name, tensor in weights.items()} == shapes
    theirs.load_state_dict(weights)
    arguments = inputs(64, 62)
    conditions = {"resolution": arguments["c_size"], "aspect_ratio": arguments["c_ar"]}
    with torch.inference_mode():
        expected = theirs(
            arguments["x"],
            encoder_hidden_states=arguments["context"],
            timestep=arguments["timestep"],
            added_cond_kwargs=conditions if config is ALPHA else {"resolution": None, "aspect_ratio": None},
        ).sample[:, :4]
    assert relative_error(forward(ours, **arguments), expected) <= FP32

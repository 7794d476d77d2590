"""Qwen-Image: what only this family knows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conformance import CPU, required_inputs, tiny
from helpers import FP32, assert_same_model, in_diffusers, read_golden, relative_error
from safetensors.torch import save_file
from torch import Tensor

from tacod.checkpoint import TensorInfo, read_checkpoint
from tacod.rank.arguments import check_arguments, load_arguments
from tacod.rank.families import detect
from tacod.rank.families.base import DiT
from tacod.rank.families.inputs import Inputs
from tacod.rank.families.latents import WAN21
from tacod.rank.families.qwen_image import QwenImage
from tacod.rank.parallel.sequence import SequenceParallel
from tacod.rank.weights.load import load_model
from tacod_client.errors import ArgumentError, ModelUnsupported
from tacod_client.tensors import to_wire

CONFIG: dict[str, Any] = {
    "image_model": "qwen_image",
    "in_channels": 16,
    "out_channels": 4,
    "patch_size": 2,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 8,
    "axes_dims_rope": [4, 6, 6],
    "default_ref_method": "index",
    "use_additional_t_cond": False,
}
LAYERED = {**CONFIG, "default_ref_method": "negative_index", "use_additional_t_cond": True}
METHODS = ("index", "index_timestep_zero", "negative_index", "offset")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def run(model: DiT, **given: Any) -> Tensor:
    """A forward on one rank, of arguments as a client sends them."""

    def sent(value: Any) -> Any:
        if isinstance(value, list):
            return list(map(sent, value))
        return to_wire(value, "argument") if isinstance(value, Tensor) else value

    wires, specs = {name: sent(value) for name, value in given.items() if value is not None}, model.arguments()
    check_arguments(wires, specs, model.family)
    with torch.inference_mode():
        out = model.run(SequenceParallel(), model.prepare(load_arguments(wires, specs, torch.float32, CPU)))
    assert isinstance(out, Tensor)
    return out


def inputs(images: int = 2, frames: int = 1) -> dict[str, Any]:
    return {
        "x": torch.randn(images, 4, frames, 6, 9),
        "timestep": torch.tensor([0.7373, 0.251])[:images],
        "context": torch.randn(images, 7, 8),
    }


# --- detection --------------------------------------------------------------------------------------------------------


def published(**more: tuple[int, ...]) -> dict[str, TensorInfo]:
    """The header of Qwen-Image's single file, from its authors' sizes."""
    width, context, block = 3072, 3584, {}
    for stream in ("img", "txt"):
        block |= {f"{stream}_mod.1": (6 * width, width), f"{stream}_mlp.net.0.proj": (4 * width, width)}
        block[f"{stream}_mlp.net.2"] = (width, 4 * width)
    attention = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    block |= {f"attn.{name}": (width, width) for name in attention}
    layers = {f"transformer_blocks.{i}.{name}": shape for i in range(60) for name, shape in block.items()}
    layers |= {"img_in": (width, 64), "txt_in": (width, context), "proj_out": (64, width)}
    layers["norm_out.linear"] = (2 * width, width)
    layers |= {f"time_text_embed.timestep_embedder.linear_{n}": (width, n_in) for n, n_in in ((1, 256), (2, width))}
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": shape for name, shape in layers.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in layers.items()}
    for norm in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
        shapes |= {f"transformer_blocks.{i}.attn.{norm}.weight": (128,) for i in range(60)}
    shapes |= {"txt_norm.weight": (context,), **more}
    return {name: TensorInfo("BF16", shape) for name, shape in shapes.items()}


LAYER_TABLE = {"time_text_embed.addition_t_embedding.weight": (2, 3072)}


@pytest.mark.parametrize(
    ("more", "method", "layered"),
    [
        ({}, "index", False),
        ({"__index_timestep_zero__": (0,)}, "index_timestep_zero", False),
        (LAYER_TABLE, "negative_index", True),
        ({"__index_timestep_zero__": (0,), **LAYER_TABLE}, "negative_index", True),
    ],
    ids=["Qwen-Image", "Edit-2511", "Layered", "both marks"],
)
def test_published_files_are_detected(more: dict[str, tuple[int, ...]], method: str, layered: bool) -> None:
    tensors = published(**more)
    family, config = detect(tensors)
    assert family is QwenImage
    assert config == {
        "image_model": "qwen_image",
        "in_channels": 64,
        "out_channels": 16,
        "patch_size": 2,
        "num_layers": 60,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 3584,
        "axes_dims_rope": [16, 56, 56],
        "default_ref_method": method,
        "use_additional_t_cond": layered,
    }
    shapes = QwenImage.shapes(config)
    if not (layered and "__index_timestep_zero__" in more):
        assert shapes == {name: info.shape for name, info in tensors.items()}
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 20_430_401_088 + layered * 2 * 3072


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"controlnet_blocks.0.weight": (3072, 3072)}, "a ControlNet"),
        ({"txt_norm.weight": (2560,), "proj_out.weight": (128, 3072)}, "no family knows this file"),
        ({"proj_out.weight": None}, "proj_out.weight: expected a tensor of 2 dimensions, but it is missing"),
    ],
    ids=["ControlNet", "Mage-Flow", "incomplete"],
)
def test_files_that_are_another_model(change: dict[str, Any], told: str) -> None:
    tensors = published(**{name: shape or () for name, shape in change.items()})
    tensors = {name: info for name, info in tensors.items() if change.get(name, ()) is not None}
    with pytest.raises(ModelUnsupported, match=told):
        detect(tensors)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("in_channels", 18),
        ("out_channels", 8),
        ("patch_size", 1),
        ("num_layers", 0),
        ("num_attention_heads", "2"),
        ("attention_head_dim", 0),
        ("axes_dims_rope", [16, 56, 56]),
        ("default_ref_method", "uxo"),
        ("use_additional_t_cond", 1),
        ("final_layer", False),
    ],
)
def test_an_impossible_configuration_is_refused_by_its_key(key: str, value: Any) -> None:
    with torch.device("meta"), pytest.raises(ModelUnsupported, match=key):
        QwenImage({**CONFIG, key: value})


@pytest.mark.parametrize(
    ("config", "told", "method"),
    [
        (CONFIG, {}, "index"),
        (CONFIG, {"zero_cond_t": True}, "index_timestep_zero"),
        (LAYERED, {"use_additional_t_cond": True, "use_layer3d_rope": True}, "negative_index"),
    ],
    ids=["Qwen-Image", "Edit-2511", "Layered"],
)
def test_a_diffusers_folder(config: dict[str, Any], told: dict[str, Any], method: str, tmp_path: Path) -> None:
    model = QwenImage(config).eval()
    named = {"_class_name": "QwenImageTransformer2DModel", "num_layers": 2, "axes_dims_rope": [4, 6, 6], **told}
    (tmp_path / "config.json").write_text(json.dumps(named))
    save_file(in_diffusers(model), tmp_path / "diffusion_pytorch_model.safetensors")
    loaded = load_model(read_checkpoint(str(tmp_path)), torch.float32, CPU)
    assert isinstance(loaded, QwenImage)
    assert (loaded.reference_method, loaded.layered) == (method, config["use_additional_t_cond"])
    given = {**inputs(), "ref_latents": [torch.randn(2, 4, 1, 4, 5)]}
    assert_same_model(loaded, model, run(loaded, **given), run(model, **given, ref_latents_method=method))


# --- forwards ---------------------------------------------------------------------------------------------------------


def test_timesteps_are_noise_levels() -> None:
    assert tiny("qwen_image").timestep(torch.tensor([0.25])).tolist() == [0.25]


def test_each_way_to_place_references_differs() -> None:
    model = QwenImage(CONFIG)
    given = {**inputs(), "ref_latents": [torch.randn(2, 4, 1, 4, 5), torch.randn(2, 4, 1, 6, 3)]}
    outs = {method: run(model, **given, ref_latents_method=method) for method in METHODS}
    assert all(relative_error(outs[a], outs[b]) > 1e-4 for a in METHODS for b in METHODS if a != b)
    assert torch.equal(run(model, **given), outs["index"])
    assert torch.equal(run(model, **given, ref_latents_method="uxo"), outs["offset"]), "as ComfyUI takes other words"
    with pytest.raises(ArgumentError, match=r"^ref_latents_method: 'beside' is none of 'index', 'index_timestep_zero'"):
        run(model, **given, ref_latents_method="beside")


@pytest.mark.parametrize("method", METHODS)
def test_without_references_the_method_is_nothing(method: str) -> None:
    model, given = QwenImage(CONFIG), inputs()
    expected = run(model, **given)
    assert torch.equal(run(model, **given, ref_latents_method=method), expected)
    assert torch.equal(run(model, **given, ref_latents=[], ref_latents_method=method), expected)


def test_references_at_time_zero_do_not_see_the_image_s_time() -> None:
    """A reference's own modulation is the same at every time; by "index" it is the image's."""
    golden = read_golden("qwen_edit_2511")
    model = golden.model()
    at_zero = golden.error(SequenceParallel())
    golden.inputs["ref_latents_method"] = "index"
    assert golden.error(SequenceParallel()) > 1e3 * FP32 > at_zero
    # At time 0 both are the same.
    given = {**golden.inputs, "timestep": torch.zeros(2)}
    outs = [run(model, **{**given, "ref_latents_method": each}) for each in ("index", "index_timestep_zero")]
    assert relative_error(*outs) <= FP32


def test_integers_floats_and_booleans_hide_the_same_text() -> None:
    model, given = QwenImage(CONFIG), inputs()
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0], [1, 0, 1, 1, 0, 0, 0]])
    added = torch.zeros(2, 7).masked_fill(mask == 0, torch.finfo(torch.float32).min)
    outs = [run(model, **given, attention_mask=each) for each in (mask, mask.bool(), added)]
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])
    hidden = given["context"].masked_fill(mask[..., None] == 0, 9.0)
    assert torch.equal(run(model, **{**given, "context": hidden}, attention_mask=mask), outs[0])
    assert relative_error(run(model, **given), outs[0]) > 1e-4
    with pytest.raises(ArgumentError, match=r"^attention_mask: floats are added to scores"):
        run(model, **given, attention_mask=mask.float())


def test_text_that_all_images_hide_is_left_out_at_its_end_alone() -> None:
    """A token's position is its place, so what stands before one that counts stays."""
    model, given = QwenImage(CONFIG), inputs()
    mask = torch.tensor([[1, 0, 1, 1, 0, 0, 0], [1, 0, 1, 0, 0, 0, 0]]).bool()
    prepared = model.prepare(Inputs({**given, "attention_mask": mask}, model.arguments()))
    assert prepared["context"].shape == (2, 4, 8)
    assert torch.equal(prepared["attention_mask"], mask[:, :4])


@pytest.mark.parametrize("rows", [[0], [1], [0, 1], [1, 0]])
def test_rows_of_layered(rows: list[int]) -> None:
    model, given = QwenImage(LAYERED), inputs(frames=3)
    out = run(model, **given, additional_t_cond=torch.tensor(rows))
    each = [
        run(
            model,
            **{name: value[i : i + 1] for name, value in given.items()},
            additional_t_cond=torch.tensor([(rows * 2)[i]]),
        )
        for i in range(2)
    ]
    assert relative_error(out, torch.cat(each)) <= FP32
    assert (relative_error(run(model, **given), out) > 1e-4) == any(rows), "row 0 is the default"


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (torch.tensor([2, 0]), "expected whole numbers from 0 to 1"),
        (torch.tensor([-1, 0]), "expected whole numbers from 0 to 1"),
        (torch.tensor([1.0, 0.0]), "expected a tensor of whole numbers, got F32"),
        (torch.tensor([1, 0, 1]), "it is for 3 images, but x has 2 images"),
    ],
)
def test_what_is_no_row_is_refused(value: Tensor, told: str) -> None:
    with pytest.raises(ArgumentError, match=f"^additional_t_cond: {told}"):
        run(QwenImage(LAYERED), **inputs(), additional_t_cond=value)


def test_a_row_is_nothing_to_a_model_without_the_table() -> None:
    model, given = QwenImage(CONFIG), inputs()
    assert torch.equal(run(model, **given, additional_t_cond=torch.tensor([1])), run(model, **given))


def test_frames_are_planes_of_one_image() -> None:
    """What stands in another frame is seen, and where it stands counts."""
    model = QwenImage(CONFIG)
    given = inputs(1, frames=3)
    out = run(model, **given)
    assert out.shape == given["x"].shape
    turned = run(model, **{**given, "x": given["x"].flip(2)}).flip(2)
    assert relative_error(turned, out) > 1e-4
    alone = run(model, **{**given, "x": given["x"][:, :, :1]})
    assert relative_error(alone, out[:, :, :1]) > 1e-4


def test_lengths_count_frames_and_references() -> None:
    references = [torch.randn(2, 4, 1, 3, 2), torch.randn(2, 4, 2, 8, 8)]
    assert QwenImage(CONFIG).lengths({**inputs(frames=3), "ref_latents": references}) == (7, 3 * 15 + 2 + 32)


def test_a_4d_latent_is_refused() -> None:
    given = inputs()
    with pytest.raises(ArgumentError, match=r"^x: expected shape \[B, 4, T, H, W\], got shape \[2, 4, 6, 9\]"):
        run(QwenImage(CONFIG), **{**given, "x": given["x"][:, :, 0]})


def test_latents_are_those_of_wans_vae() -> None:
    """The first and the last channel, by the means and deviations of the VAE."""
    latents = QwenImage.latent_format
    assert latents is WAN21
    latent = torch.ones(1, 16, 1, 2, 2)
    inside = latents.into_model(latent)
    torch.testing.assert_close(inside[0, 0], torch.full((1, 2, 2), (1 + 0.7571) / 2.8184))
    torch.testing.assert_close(inside[0, 15], torch.full((1, 2, 2), (1 + 0.2921) / 1.9160))
    torch.testing.assert_close(latents.out_of_model(inside), latent)


def test_the_last_blocks_text_is_dead_weight() -> None:
    model = QwenImage(CONFIG)
    given = required_inputs(model)
    with torch.inference_mode():
        out = model.run(SequenceParallel(), given)
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                assert name.startswith(("transformer_blocks.1.txt_mlp.", "transformer_blocks.1.attn.to_add_out."))
                parameter.zero_()
        assert torch.equal(model.run(SequenceParallel(), given), out)

"""What only Wan knows: its kinds of models, times of frames, and what is given beside the video."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import FP32, in_diffusers, read_golden, relative_error
from safetensors.torch import save_file
from torch import Tensor

from tacod.checkpoint import TensorInfo, read_checkpoint
from tacod.rank.families import detect, from_diffusers
from tacod.rank.families.inputs import Inputs
from tacod.rank.families.latents import WAN21, WAN22
from tacod.rank.families.wan import Wan
from tacod.rank.forward.warmup import usual_inputs
from tacod.rank.parallel.sequence import SequenceParallel
from tacod.rank.sampling.sampling import check_samples
from tacod.rank.weights.load import load_model, set_weight
from tacod.rank.weights.remap import identify
from tacod_client.errors import ArgumentError, ModelCorrupt, ModelUnsupported

CPU = torch.device("cpu")
TINY = {key: value for key, value in Wan.tiny.items() if key not in ("clip_dim", "flf_pos_embed_token_number")}
VACE = {"model_type": "vace", "in_dim": 4, "num_layers": 4, "vace_layers": 2, "vace_in_dim": 6}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def made(**more: Any) -> Wan:
    return Wan({**TINY, "model_type": "t2v", **more}).eval().requires_grad_(False)


def inputs(model: Wan, frames: int = 3, height: int = 6, width: int = 8, **more: Any) -> dict[str, Any]:
    return {
        "x": torch.randn(2, model.channels, frames, height, width),
        "timestep": torch.tensor([737.0, 200.0]),
        "context": torch.randn(2, 7, 16),
        **more,
    }


def forward(model: Wan, given: dict[str, Any]) -> Tensor:
    with torch.inference_mode():
        out = model.run(SequenceParallel(), Inputs(given, model.arguments()))
    assert isinstance(out, Tensor)
    return out


# --- files ------------------------------------------------------------------------------------------------------------


def published(large: bool, **more: Any) -> dict[str, Any]:
    return {
        "image_model": "wan2.1",
        "dim": 5120 if large else 1536,
        "out_dim": 16,
        "num_heads": 40 if large else 12,
        "ffn_dim": 13824 if large else 8960,
        "num_layers": 40 if large else 30,
        "in_dim": 16,
        "text_dim": 4096,
        "model_type": "t2v",
        **more,
    }


CLIP = {"model_type": "i2v", "clip_dim": 1280}
FIVE = {"dim": 3072, "out_dim": 48, "num_heads": 24, "ffn_dim": 14336, "num_layers": 30, "in_dim": 48}
CAMERA = {"in_dim_control_adapter": 24}
PUBLISHED = {
    "2.1_t2v_1.3B": (published(False), 1_418_996_800),
    "2.1_t2v_14B": (published(True), 14_288_491_584),
    "2.1_i2v_14B": (published(True, in_dim=36, **CLIP), 16_394_878_784),
    "2.1_flf2v_14B": (published(True, in_dim=36, **CLIP, flf_pos_embed_token_number=514), 16_395_536_704),
    "2.2_i2v_A14B": (published(True, in_dim=36), 14_288_901_184),
    "2.2_ti2v_5B": (published(False, **FIVE), 4_999_787_712),
    "fun_control_1.3B": (published(False, in_dim=48, **CLIP, in_dim_ref_conv=16), 1_564_602_176),
    "2.2_fun_control_A14B": (published(True, in_dim=52, in_dim_ref_conv=16), 14_289_561_664),
    "vace_1.3B": (published(False, model_type="vace", vace_in_dim=96, vace_layers=15), 2_153_972_032),
    "vace_14B": (published(True, model_type="vace", vace_in_dim=96, vace_layers=8), 17_337_592_896),
    "fun_camera_1.3B": (published(False, in_dim=32, **{**CLIP, "model_type": "camera"}, **CAMERA), 1_616_313_152),
    "2.2_fun_camera_A14B": (published(True, in_dim=36, model_type="camera_2.2", **CAMERA), 14_792_233_024),
}


def header(model: Wan) -> dict[str, TensorInfo]:
    return {name: TensorInfo("BF16", tuple(tensor.shape)) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_are_detected(name: str) -> None:
    """From the header alone; parameters are counted as ComfyUI's own network has them."""
    config, parameters = PUBLISHED[name]
    with torch.device("meta"):
        model = Wan(config)
    tensors, width = header(model), config["dim"]
    shapes = {
        "patch_embedding.weight": (width, config["in_dim"], 1, 2, 2),
        "time_projection.1.weight": (6 * width, width),
        "text_embedding.2.weight": (width, width),
        "blocks.0.modulation": (1, 6, width),
        "blocks.0.self_attn.norm_k.weight": (width,),
        "blocks.0.norm3.bias": (width,),
        "blocks.0.ffn.2.weight": (width, config["ffn_dim"]),
        "head.modulation": (1, 2, width),
    }
    assert {key: tensors[key].shape for key in shapes} == shapes
    assert sum(tensor.numel() for tensor in model.state_dict().values()) == parameters
    assert detect(tensors) == (Wan, config)
    assert model.latent_format is (WAN22 if "5B" in name else WAN21)
    assert model.sampling()["latent"] == ["B", config["out_dim"], "T", "H", "W"]


OTHERS = {
    "casual_audio_encoder.encoder.final_linear.weight": "S2V",
    "audio_proj.audio_proj_glob_1.layer.bias": "HuMo",
    "patch_embedding_global.weight": "WanDancer",
}


@pytest.mark.parametrize("mark", OTHERS)
def test_a_network_of_another_kind_is_refused_by_its_name(mark: str) -> None:
    family, config = detect({**header(made()), mark: TensorInfo("BF16", (4, 4))})
    with torch.device("meta"), pytest.raises(ModelUnsupported, match=OTHERS[mark]):
        family(config)


def saved(folder: Path, model: Wan, **metadata: str) -> Path:
    path = folder / "model.safetensors"
    save_file(model.state_dict(), path, metadata)
    return path


@pytest.mark.parametrize(
    ("notes", "told"),
    [
        ({"causal_ar": True}, "causal_ar"),
        ({"model_type": "flow_rvs"}, "FlowRVS"),
        ({"model_type": "animate2"}, "Animate 2"),
        ({"model_type": ["t2v"]}, "model_type"),
        ({"eps": 1e-5}, "eps"),
    ],
)
def test_a_kind_that_only_metadata_tells_is_refused_by_its_name(tmp_path: Path, notes: Any, told: str) -> None:
    """ComfyUI lets it go before what it detects."""
    path = saved(tmp_path, made(), config=json.dumps({"transformer": notes}))
    with pytest.raises(ModelUnsupported, match=told):
        load_model(read_checkpoint(str(path)), torch.float32, CPU)


def test_metadata_goes_before_tensors_and_behind_the_models_own_description(tmp_path: Path) -> None:
    path = saved(tmp_path, made(), config=json.dumps({"transformer": {"num_heads": 4}}))
    family, config, checkpoint = identify(read_checkpoint(str(path)))
    assert (family, config["num_heads"]) == (Wan, 4)
    assert identify(checkpoint) == (family, config, checkpoint)
    own = {"tacod.config": json.dumps({**TINY, "model_type": "t2v"})}
    path = saved(tmp_path, made(), config=json.dumps({"transformer": {"num_heads": 4}}), **own)
    assert identify(read_checkpoint(str(path)))[1]["num_heads"] == 3


@pytest.mark.parametrize("text", ["{", "[]", '{"transformer": 3}', "3"])
def test_metadata_that_cant_be_read_is_refused(tmp_path: Path, text: str) -> None:
    path = saved(tmp_path, made(), config=text)
    with pytest.raises(ModelCorrupt, match="metadata's config"):
        load_model(read_checkpoint(str(path)), torch.float32, CPU)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_heads", 5),
        ("num_heads", 16),
        ("patch_size", [2, 2, 2]),
        ("freq_dim", 128),
        ("qk_norm", False),
        ("cross_attn_norm", False),
        ("window_size", [8, 8]),
        ("model_type", "x2v"),
        ("in_dim", None),
        ("vace_layers", 3),
        ("vace_layers", 8),
        ("in_dim_ref_conv", 4),
    ],
)
def test_an_impossible_configuration_is_refused_by_its_key(key: str, value: Any) -> None:
    with torch.device("meta"), pytest.raises(ModelUnsupported, match=f"'{key}'"):
        made(**{**VACE, key: value})


THEIRS: dict[str, Any] = {
    "in_channels": 5,
    "out_channels": 4,
    "num_attention_heads": 3,
    "attention_head_dim": 16,
    "num_layers": 4,
    "ffn_dim": 80,
    "text_dim": 16,
}


@pytest.mark.parametrize(
    ("name", "ours", "more"),
    [
        ("WanTransformer3DModel", {"in_dim": 5}, {}),
        (
            "WanTransformer3DModel",
            {"model_type": "i2v", "clip_dim": 32, "flf_pos_embed_token_number": 10},
            {"image_dim": 32, "added_kv_proj_dim": 48, "pos_embed_seq_len": 10},
        ),
        ("WanVACETransformer3DModel", VACE, {"in_channels": 4, "vace_layers": [0, 2], "vace_in_channels": 6}),
    ],
    ids=["t2v", "flf2v", "vace"],
)
def test_a_diffusers_folder_is_the_same_model(tmp_path: Path, name: str, ours: Any, more: Any) -> None:
    diffusers = pytest.importorskip("diffusers")
    told = {**THEIRS, **more}
    theirs = getattr(diffusers, name)(**told)
    model = made(**{"num_layers": 4, **ours})
    weights = in_diffusers(model)
    assert {key: each.shape for key, each in weights.items()} == {
        key: each.shape for key, each in theirs.state_dict().items()
    }
    save_file(weights, tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": name, **told}))
    loaded = load_model(read_checkpoint(str(tmp_path)), torch.float32, CPU)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert isinstance(loaded, Wan)
    assert (loaded.kind, loaded.heads) == (model.kind, model.heads)
    assert all(torch.equal(each, model.state_dict()[key]) for key, each in loaded.state_dict().items())


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("WanTransformer3DModel", "qk_norm", "rms_norm"),
        ("WanTransformer3DModel", "patch_size", [2, 2, 2]),
        ("WanVACETransformer3DModel", "vace_layers", [0, 1]),
        ("WanVACETransformer3DModel", "vace_layers", 2),
    ],
)
def test_a_diffusers_model_of_another_kind_is_refused_by_its_key(name: str, key: str, value: Any) -> None:
    model = made(**VACE) if "VACE" in name else made(num_layers=4)
    tensors = {each: TensorInfo("F32", tuple(tensor.shape)) for each, tensor in in_diffusers(model).items()}
    with torch.device("meta"), pytest.raises(ModelUnsupported, match=key):
        Wan(from_diffusers("here", {"_class_name": name, **THEIRS, key: value}, tensors))


@pytest.mark.parametrize(("more", "layers"), [({}, 1), (VACE, 2), ({"model_type": "scail2"}, 3)])
def test_patches_are_embedded_by_weights_in_fp32(tmp_path: Path, more: dict[str, Any], layers: int) -> None:
    """Whatever the compute dtype is, with a patch of them or without, as ComfyUI has it."""
    model = made(**more)
    path = saved(tmp_path, model, **{"tacod.config": json.dumps({**TINY, "model_type": "t2v", **more})})
    loaded = load_model(read_checkpoint(str(path)), torch.bfloat16, CPU)
    exact = {name: weight for name, weight in loaded.state_dict().items() if weight.dtype == torch.float32}
    assert len(exact) == 2 * layers
    assert all("patch_embedding" in name for name in exact)
    assert all(torch.equal(weight, model.state_dict()[name]) for name, weight in exact.items())
    assert loaded.dtype == torch.bfloat16
    key, change = "patch_embedding.weight", torch.randn_like(exact["patch_embedding.weight"])
    set_weight(loaded, key, exact[key] + change)
    assert torch.equal(loaded.state_dict()[key], exact[key] + change)
    set_weight(loaded, "head.head.weight", model.state_dict()["head.head.weight"])
    assert loaded.state_dict()["head.head.weight"].dtype == torch.bfloat16


# --- forwards ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "left_out"),
    [
        ("wan21_i2v", "clip_fea"),
        ("wan_flf", "clip_fea"),
        ("wan_fun", "reference_latent"),
        ("wan_fun", "clip_fea"),
        ("wan_beside", "time_dim_concat"),
        ("wan_beside", "context_latents"),
        ("wan_beside", "rope_options"),
        ("wan_camera", "camera_conditions"),
        ("wan_camera_22", "camera_conditions"),
        ("wan_vace", "vace_strength"),
    ],
)
def test_what_a_golden_is_given_counts(name: str, left_out: str) -> None:
    golden = read_golden(name)
    other = replace(golden, inputs={key: each for key, each in golden.inputs.items() if key != left_out})
    assert other.error(SequenceParallel()) > 1e-3


def test_one_time_is_the_same_for_each_frame() -> None:
    model = made(in_dim=5)
    given = inputs(model)
    each = given["timestep"][:, None].repeat(1, 3)
    assert relative_error(forward(model, {**given, "timestep": each}), forward(model, given)) <= FP32
    each[:, 0] = 0
    assert relative_error(forward(model, {**given, "timestep": each}), forward(model, given)) > 1e-3


def test_times_of_frames_that_tokens_cant_be_told_apart_by_are_refused() -> None:
    """ComfyUI fails there."""
    model = made(in_dim=5)
    given = inputs(model, 3, 2, 2, timestep=torch.ones(2, 3), time_dim_concat=torch.randn(2, 5, 2, 2, 2))
    with pytest.raises(ArgumentError, match=r"^timestep: its 3 frames .* in 5 tokens"):
        forward(model, given)


def test_vace_without_strengths_has_1_for_each() -> None:
    model = made(**VACE)
    given = inputs(model, vace_context=torch.randn(2, 2, 6, 3, 6, 8))
    assert torch.equal(forward(model, given), forward(model, {**given, "vace_strength": [1, 1.0]}))
    one = {**given, "vace_context": given["vace_context"][:, :1]}
    assert relative_error(forward(model, {**given, "vace_strength": [1.0, 0.0]}), forward(model, one)) <= FP32


@pytest.mark.parametrize("strength", [1.0, [1.0, "2"], [1.0, float("nan")], [True, 1.0], [1.0, 1e9], {"a": 1.0}])
def test_strengths_that_are_no_numbers_are_refused(strength: Any) -> None:
    golden = read_golden("wan_vace")
    with pytest.raises(ArgumentError, match=r"^vace_strength: expected a list of numbers from -1000 to 1000"):
        replace(golden, inputs={**golden.inputs, "vace_strength": strength}).arguments(golden.model())


@pytest.mark.parametrize(
    ("config", "sides", "given", "told"),
    [
        ({"in_dim_ref_conv": 4}, (5, 8), {"reference_latent": (2, 4, 5, 8)}, r"^x: .* 5 by 8; with reference_latent"),
        ({**VACE}, (6, 7), {"vace_context": (2, 1, 6, 3, 6, 7)}, r"^x: .* 6 by 7; with vace_context"),
        (
            {"model_type": "camera_2.2", "in_dim_control_adapter": 2},
            (5, 8),
            {"camera_conditions": (2, 2, 3, 40, 64)},
            r"^x: .* with camera_conditions both must be even",
        ),
        (
            {"model_type": "camera_2.2", "in_dim_control_adapter": 2},
            (6, 8),
            {"camera_conditions": (2, 2, 3, 40, 64)},
            r"^camera_conditions: expected 48 by 64 pixels.* 40 by 64",
        ),
        (
            {"model_type": "i2v", "clip_dim": 8, "flf_pos_embed_token_number": 6},
            (6, 8),
            {"clip_fea": (2, 7, 8)},
            r"^clip_fea: its K is 7.*6 tokens",
        ),
    ],
)
def test_what_comfyui_has_no_place_for_is_refused(config: Any, sides: Any, given: Any, told: str) -> None:
    model = made(**config)
    values = inputs(model, 3, *sides, **{name: torch.randn(shape) for name, shape in given.items()})
    with pytest.raises(ArgumentError, match=told):
        model.lengths(values)


def test_a_strength_for_another_number_of_videos_is_refused() -> None:
    model = made(**VACE)
    given = inputs(model, vace_context=torch.randn(2, 2, 6, 3, 6, 8), vace_strength=[1.0])
    with pytest.raises(ArgumentError, match=r"^vace_strength: expected 2 numbers"):
        model.lengths(given)


@pytest.mark.parametrize(
    "config", [{}, VACE, {"model_type": "camera_2.2"}, {"model_type": "scail2"}, {"in_dim_ref_conv": 4}]
)
def test_every_kind_has_a_usual_forward(config: dict[str, Any]) -> None:
    model = made(**config)
    usual = usual_inputs(model, CPU)
    assert usual is not None
    assert model.lengths(usual) == (3 * 30 * 52,)


def test_latents_of_5b_are_sampled_in_their_own_space() -> None:
    with torch.device("meta"):
        five, video = Wan(PUBLISHED["2.2_ti2v_5B"][0]), Wan(PUBLISHED["2.2_i2v_A14B"][0])
    assert check_samples(five) == (WAN22,)
    assert (five.downscale, video.downscale) == (16, 8)
    assert WAN22.channels == 48
    with pytest.raises(ArgumentError, match="its x has 36 channels and its output 16"):
        check_samples(video)


def test_timesteps_are_thousandths() -> None:
    assert made().timestep(torch.tensor([0.25])) == 250

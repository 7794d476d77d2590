"""What only LTX-Video and LTX-2 know: their files, guides, timesteps of tokens, sound, and texts' connectors."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from helpers import FP32, GOLDEN, Golden, in_diffusers, read_golden, relative_error
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from tacod.checkpoint import TensorInfo, read_checkpoint
from tacod.rank.families import detect, from_diffusers
from tacod.rank.families.base import DiT
from tacod.rank.families.inputs import Inputs
from tacod.rank.families.ltx2 import LTX2
from tacod.rank.families.ltx_video import LTXVideo
from tacod.rank.ops.group_bias import GroupBias, attend_biased
from tacod.rank.ops.sdpa import merge
from tacod.rank.parallel.sequence import SequenceParallel
from tacod.rank.weights.load import load_model
from tacod.rank.weights.lora import read_lora
from tacod.rank.weights.remap import identify
from tacod_client.errors import ArgumentError, ModelUnsupported

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


# --- files ------------------------------------------------------------------------------------------------------------

NEWER = {
    "apply_gated_attention": True,
    "cross_attention_adaln": True,
    "caption_proj_before_connector": True,
    "caption_projection_first_linear": False,
    "connector_num_attention_heads": 32,
    "connector_attention_head_dim": 128,
    "connector_num_layers": 8,
    "connector_apply_gated_attention": True,
    "audio_connector_num_attention_heads": 32,
    "audio_connector_attention_head_dim": 64,
}
PLACES = {
    "rope_type": "split",
    "frequencies_precision": "float64",
    "causal_temporal_positioning": True,
    "use_middle_indices_grid": True,
    "timestep_scale_multiplier": 1000,
    "av_ca_timestep_scale_multiplier": 1000.0,
}
"""What only the metadata of LTX-2's files has."""
PUBLISHED: dict[str, tuple[type[DiT], dict[str, Any], int]] = {
    "0.9_2B": (LTXVideo, {"attention_head_dim": 64, "num_layers": 28}, 1_923_385_472),
    "0.9.8_13B": (
        LTXVideo,
        {"attention_head_dim": 128, "num_layers": 48, "cross_attention_dim": 4096},
        13_042_569_344,
    ),
    "2_19B": (
        LTX2,
        {"attention_head_dim": 128, "num_layers": 48, "cross_attention_dim": 4096, "caption_channels": 3840, **PLACES},
        19_585_115_392,
    ),
    "2.3_21B": (
        LTX2,
        {"attention_head_dim": 128, "num_layers": 48, "cross_attention_dim": 4096, **NEWER, **PLACES},
        21_005_004_544,
    ),
    "2.5_21B": (
        LTX2,
        {
            "attention_head_dim": 128,
            "num_layers": 48,
            "cross_attention_dim": 4096,
            **NEWER,
            **PLACES,
            "ff_bias": False,
            "use_keyframes_abs_pos_embedding": True,
        },
        21_004_025_600,
    ),
}


def header(model: DiT) -> dict[str, TensorInfo]:
    return {name: TensorInfo("BF16", tuple(tensor.shape)) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_are_detected(name: str) -> None:
    """From the header, and for LTX-2 its metadata; parameters are counted as ComfyUI's own network has them."""
    kind, config, parameters = PUBLISHED[name]
    with torch.device("meta"):
        model = kind(config)
    assert sum(tensor.numel() for tensor in model.state_dict().values()) == parameters
    tensors = header(model)
    found, detected = detect(tensors)
    assert found is kind
    assert {key: value for key, value in config.items() if detected.get(key, value) != value} == {}
    with torch.device("meta"):
        again = kind({**detected, **(PLACES if kind is LTX2 else {})})
    assert header(again) == tensors
    assert (again.heads, again.width) == (32, config["attention_head_dim"] * 32)


def saved(folder: Path, model: DiT, **metadata: str) -> Path:
    path = folder / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path, metadata)
    return path


def test_metadata_tells_where_tokens_stand(tmp_path: Path) -> None:
    config = dict(LTX2.tiny)
    described = {key: config.pop(key) for key in list(config) if key in PLACES} | {"num_attention_heads": 3}
    path = saved(tmp_path, LTX2(LTX2.tiny), config=json.dumps({"transformer": described}))
    family, found, _ = identify(read_checkpoint(str(path)))
    assert family is LTX2
    assert {key: found[key] for key in described} == described
    assert isinstance(load_model(read_checkpoint(str(path)), torch.float32, CPU), LTX2)


def test_a_file_without_metadata_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelUnsupported, match=r"rope_type.*lacks the metadata"):
        load_model(read_checkpoint(str(saved(tmp_path, LTX2(LTX2.tiny)))), torch.float32, CPU)


def test_ltx_video_needs_no_metadata(tmp_path: Path) -> None:
    """Its first files have none; ComfyUI's defaults are theirs."""
    model = LTXVideo({"image_model": "ltxv", "num_layers": 1, "attention_head_dim": 2, "cross_attention_dim": 64})
    loaded = load_model(read_checkpoint(str(saved(tmp_path, model))), torch.float32, CPU)
    assert isinstance(loaded, LTXVideo)
    assert (loaded.causal, loaded.multiplier, loaded.rope_kind) == (False, 1000.0, {"double": False, "halves": False})


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [
        (LTXVideo, "attention_head_dim", 15),
        (LTXVideo, "cross_attention_dim", 64),
        (LTXVideo, "cross_attention_adaln", True),
        (LTXVideo, "caption_proj_before_connector", True),
        (LTXVideo, "positional_embedding_max_pos", [20, 2048]),
        (LTXVideo, "positional_embedding_max_pos", [20, 0, 2048]),
        (LTXVideo, "rope_type", "other"),
        (LTXVideo, "causal_temporal_positioning", "yes"),
        (LTXVideo, "timestep_scale_multiplier", 0),
        (LTX2, "audio_cross_attention_dim", 64),
        (LTX2, "audio_in_channels", 64),
        (LTX2, "use_prompt_adaln_single", False),
        (LTX2, "frequencies_precision", "float16"),
        (LTX2, "connector_attention_head_dim", 3),
        (LTX2, "audio_positional_embedding_max_pos", [20, 20]),
    ],
)
def test_an_impossible_configuration_is_refused_by_its_key(kind: Any, key: str, value: Any) -> None:
    with torch.device("meta"), pytest.raises(ModelUnsupported, match=f"'{key}'"):
        kind({**kind.tiny, key: value})


THEIRS: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 3,
    "attention_head_dim": 16,
    "cross_attention_dim": 48,
    "caption_channels": 16,
    "num_layers": 2,
}


def test_a_diffusers_folder_is_the_same_model(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.LTXVideoTransformer3DModel(**THEIRS)
    model = LTXVideo({**LTXVideo.tiny, "causal_temporal_positioning": True}).eval()
    weights = in_diffusers(model)
    assert {key: each.shape for key, each in weights.items()} == {
        key: each.shape for key, each in theirs.state_dict().items()
    }
    save_file(weights, tmp_path / "diffusion_pytorch_model.safetensors")
    told = {"_class_name": "LTXVideoTransformer3DModel", **THEIRS}
    (tmp_path / "config.json").write_text(json.dumps(told))
    loaded = load_model(read_checkpoint(str(tmp_path)), torch.float32, CPU)
    assert isinstance(loaded, LTXVideo)
    assert loaded.heads == 3
    assert all(torch.equal(each, model.state_dict()[key]) for key, each in loaded.state_dict().items())
    tensors = {key: TensorInfo("F32", tuple(each.shape)) for key, each in weights.items()}
    with torch.device("meta"):
        assert LTXVideo(from_diffusers("here", told, tensors)).head_width == 16


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("audio_proj_in", "audio_patchify_proj"),
        ("time_embed.linear", "adaln_single.linear"),
        ("av_cross_attn_video_a2v_gate.linear", "av_ca_a2v_gate_adaln_single.linear"),
        ("transformer_blocks.1.audio_to_video_attn.to_q", "transformer_blocks.1.audio_to_video_attn.to_q"),
        ("transformer_blocks.0.audio_ff.net.0.proj", "transformer_blocks.0.audio_ff.net.0.proj"),
    ],
)
def test_a_lora_in_diffusers_names_finds_its_layer(theirs: str, ours: str) -> None:
    config = detect({}, LTX2.tiny)[1]
    shapes = LTX2.shapes(config)
    outputs, inputs = shapes[f"{ours}.weight"]
    file = {
        f"transformer.{theirs}.lora_B.weight": torch.randn(outputs, 2),
        f"transformer.{theirs}.lora_A.weight": torch.randn(2, inputs),
    }
    assert read_lora(file, LTX2.lora_layout(config), shapes, 1.0, LTX2.spellings).keys() == {f"{ours}.weight"}


# --- forwards ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "left_out"),
    [
        ("ltxv_t2v", "attention_mask"),
        ("ltxv_t2v", "frame_rate"),
        ("ltxv_guides", "guide_attention_entries"),
        ("ltxv_guides", "generated_keyframes"),
        ("ltxv_hidden_guide", "guide_attention_entries"),
        ("ltx23_av", "ref_audio"),
        ("ltx23_av", "guide_attention_entries"),
        ("ltx25_av", "guide_attention_entries"),
        ("ltx2_mask_in_frames", "denoise_mask"),
        ("ltx2_unattended", "stg_self_attn_blocks"),
        ("ltx2_apart", "a2v_cross_attn"),
        ("ltx2_apart", "v2a_cross_attn"),
        ("ltx2_video_only", "run_ax"),
        ("ltx2_before", "reads_video"),
    ],
)
def test_what_a_golden_is_given_counts(name: str, left_out: str) -> None:
    golden = read_golden(name)
    other = replace(golden, inputs={key: each for key, each in golden.inputs.items() if key != left_out})
    assert other.error(SequenceParallel()) > 1e-4


@pytest.mark.parametrize("name", ["ltxv_i2v", "ltxv_guides"])
def test_tokens_that_are_removed_come_out_as_zeros(name: str) -> None:
    golden = read_golden(name)
    assert isinstance(golden.out, Tensor)
    removed = (golden.inputs["denoise_mask"][0] < 0).any(dim=0)
    assert removed.any()
    assert (golden.out[:, :, removed] == 0).all()
    assert (golden.out[:, :, ~removed] != 0).all()


def states(name: str) -> tuple[Tensor, Tensor]:
    """What a golden's text encoder gave, and the context that ComfyUI made of it."""
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        key = "pre.cross_attn" if "pre.cross_attn" in file.keys() else "pre.context"  # noqa: SIM118
        return file.get_tensor(key), file.get_tensor("in.context")


@pytest.mark.parametrize("name", ["ltx2", "ltx2_av", "ltx23_av", "ltx25_av", "ltx2_linear"])
def test_contexts_of_texts_are_comfyuis(name: str) -> None:
    text, context = states(name)
    model = read_golden(name).model()
    assert isinstance(model, LTX2)
    with torch.inference_mode():
        made = model.methods()["preprocess_text_embeds"].run(context=text, unprocessed=True)
        assert relative_error(made, context) <= FP32
        assert torch.equal(model.preprocess(context), context), "it is one already"


def test_states_of_another_text_encoder_are_refused() -> None:
    with pytest.raises(ArgumentError, match=r"^context: its tokens are 5 wide"):
        LTX2(LTX2.tiny).preprocess(torch.randn(1, 3, 5))


def test_one_time_is_the_same_for_each_token() -> None:
    golden = read_golden("ltx2_av")
    video, sound = golden.inputs["x"]
    times = [each[:, None, None] for each in golden.inputs["timestep"]]
    times = [times[0].expand(-1, video[0, 0].numel(), -1), times[1].expand(-1, sound.shape[2], -1)]
    other = replace(golden, inputs={**golden.inputs, "timestep": [each.contiguous() for each in times]})
    assert other.error(SequenceParallel()) <= FP32


def test_timesteps_of_tokens_are_few_where_masks_are() -> None:
    """Modulations are of the different timesteps, not of the tokens."""
    golden = read_golden("ltxv_guides")
    prepared = golden.arguments(golden.model())
    assert prepared["timestep"].shape == (2, 4)
    assert prepared["rows"].shape == prepared["kept"].shape == (prepared["tokens"],)


def made(kind: Any, **more: Any) -> Any:
    return kind({**kind.tiny, **more}).eval().requires_grad_(False)


def served(model: DiT, inputs: Inputs) -> None:
    """What is done before a forward begins."""
    model.lengths(inputs)
    model.prepare(inputs)


def given(frames: int = 3, **more: Any) -> dict[str, Any]:
    x = torch.randn(1, 4, frames, 2, 3)
    return {"x": x, "timestep": torch.tensor([0.7]), "context": torch.randn(1, 5, 16), **more}


PLACE = torch.zeros(1, 3, 6, 2, dtype=torch.int64)
ENTRY = {"pre_filter_count": 6, "strength": 0.5, "latent_shape": [1, 2, 3]}


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"keyframe_idxs": torch.zeros(1, 3, 7, 2, dtype=torch.int64)}, r"^keyframe_idxs: it is for 7 tokens"),
        ({"keyframe_idxs": torch.zeros(1, 3, 24, 2, dtype=torch.int64)}, r"^keyframe_idxs: it is for 24 tokens"),
        (
            {"keyframe_idxs": PLACE, "guide_attention_entries": [{**ENTRY, "pre_filter_count": 5}]},
            r"^guide_attention_entries: they are for 5 tokens",
        ),
        (
            {"keyframe_idxs": PLACE, "guide_attention_entries": [{**ENTRY, "pre_filter_count": 5.5}]},
            r"^guide_attention_entries\[0\]: expected whole numbers",
        ),
        (
            {"keyframe_idxs": PLACE, "guide_attention_entries": [ENTRY, {**ENTRY, "latent_shape": [1, 2]}]},
            r"^guide_attention_entries\[1\]: expected whole numbers",
        ),
        ({"timestep": torch.rand(1, 7, 1)}, r"^timestep: its N is 7, but there are 18 tokens"),
        (
            {"keyframe_idxs": PLACE, "denoise_mask": torch.full((1, 1, 3, 2, 3), -1.0)},
            r"^denoise_mask: it removes every token",
        ),
        ({"attention_mask": torch.zeros(1, 5, dtype=torch.bool)}, r"^attention_mask: it hides all"),
    ],
)
def test_guides_that_dont_fit_are_refused(more: dict[str, Any], told: str) -> None:
    model = made(LTXVideo)
    inputs = Inputs(given(**more), model.arguments())
    with pytest.raises(ArgumentError, match=told):
        served(model, inputs)


@pytest.mark.parametrize("markers", [{"tokens_per_frame": 6}, {"tokens_per_frame": 6.5}, {"tokens_per_frame": 5}, {}])
def test_generated_keyframes_that_dont_fit_are_refused(markers: dict[str, float]) -> None:
    model = made(LTXVideo, use_keyframes_abs_pos_embedding=True)
    rest = {"first_latent_frame": 1, "num_keyframes": 1} if markers.get("tokens_per_frame") != 6 else {}
    with pytest.raises(ArgumentError, match=r"^generated_keyframes: "):
        model.lengths(given(generated_keyframes={**markers, **rest}))


def refuse(model: DiT, golden: Golden) -> None:
    """Check a request as the ranks do."""
    with mock.patch.object(type(model), "prepare", lambda self, inputs: inputs):
        inputs = golden.arguments(model)
    served(model, inputs)


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("guide_attention_entries", [{**ENTRY, "strength": "1"}], r"^guide_attention_entries\[0\]\.strength: expected"),
        ("guide_attention_entries", [{"strength": 1.0}], r"^guide_attention_entries\[0\]\.pre_filter_count: missing"),
        ("guide_attention_entries", ENTRY, r"^guide_attention_entries: expected a list of maps"),
        ("keyframe_idxs", torch.zeros(1, 3, 7, 2, dtype=torch.int64), r"^keyframe_idxs: its G\*H\*W is 7; .* of 15"),
        ("keyframe_idxs", torch.full((1, 3, 15, 2), 1 << 20), r"^keyframe_idxs: expected whole numbers from 0"),
        ("ref_audio", {"tokens": torch.randn(1, 5, 64)}, r"^ref_audio\.tokens: expected shape"),
        ("ref_audio", {"tokens": torch.randn(2, 5, 128)}, r"^ref_audio\.tokens: it is for 2 images"),
        ("run_ax", "no", r"^run_ax: 'no' is none of False, True"),
        ("reads_video", "never", r"^reads_video: 'never' is none of 'after', 'before'"),
        ("stg_self_attn_blocks", [-1], r"^stg_self_attn_blocks: expected a list of numbers"),
        ("frame_rate", 0, r"^frame_rate: expected a number"),
    ],
)
def test_arguments_of_another_kind_are_refused(key: str, value: Any, told: str) -> None:
    golden = read_golden("ltx25_av")
    model, other = golden.model(), replace(golden, inputs={**golden.inputs, key: value})
    with pytest.raises(ArgumentError, match=told):
        refuse(model, other)


def test_guides_have_no_place_in_a_run() -> None:
    model = made(LTXVideo)
    values = given(keyframe_idxs=PLACE)
    del values["timestep"]
    with pytest.raises(ArgumentError, match=r"^keyframe_idxs: .* which sample doesn't give"):
        model.lengths(values)


def test_a_voice_without_a_sound_is_refused() -> None:
    # ComfyUI's network has the video attend to the reference then.
    golden = read_golden("ltx2_without_sound")
    voice = {"tokens": torch.randn(1, 5, 128)}
    with pytest.raises(ArgumentError, match=r"^ref_audio: it is a voice for a sound"):
        refuse(golden.model(), replace(golden, inputs={**golden.inputs, "ref_audio": voice}))


def test_a_video_without_sound_gives_one_without() -> None:
    golden = read_golden("ltx2_without_sound")
    model = golden.model()
    with torch.inference_mode():
        out = model.run(SequenceParallel(), golden.arguments(model))
    assert isinstance(out, list)
    assert [tuple(each.shape) for each in out] == [(2, 6, 3, 3, 5)]


# --- attention to guides ----------------------------------------------------------------------------------------------

BIASES = [
    ([-0.5, -0.5, -0.5, 0.3, 0.3], [(3, -0.5), (2, 0.3)]),
    ([-0.5, -1.5, -torch.inf, 0.0, 0.3], [(5, None)]),
    ([-torch.inf, -torch.inf, 0.0, -0.25, 0.5], [(2, -torch.inf), (1, 0.0), (2, None)]),
    ([-torch.inf] * 5, [(5, None)]),
]


@pytest.mark.parametrize("cut", [0, 3, 9, 11, 14])
@pytest.mark.parametrize("case", range(len(BIASES)))
def test_a_bias_between_groups_is_a_mask_of_all_pairs(case: int, cut: int) -> None:
    """Also if the ranks of a ring hold the tokens before ``cut`` and those from it on."""
    values, runs = BIASES[case]
    start, count = 9, 14
    bias = GroupBias(start, torch.tensor(values), runs)
    q, k, v = torch.randn(3, 2, 3, count, 8)
    mask = torch.zeros(count, count)
    mask[:start, start:], mask[start:, :start] = bias.values, bias.values[:, None]
    expected = functional.scaled_dot_product_attention(q, k, v, mask)
    for first, last in ((0, cut), (cut, count)):
        parts = [
            attend_biased(q[:, :, first:last], k[:, :, begin:end], v[:, :, begin:end], first, begin, bias)
            for begin, end in ((0, cut), (cut, count))
        ]
        assert torch.allclose(merge(*parts)[0], expected[:, :, first:last], atol=1e-6)

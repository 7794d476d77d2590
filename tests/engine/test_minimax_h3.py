"""What only MiniMax-H3 knows: two latents, what is given beside them, masks, and noise levels of a sound."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import FP32, GOLDEN, Golden, in_diffusers, read_golden, relative_error
from made_up import engine_of
from rank_worker import LAYOUTS, Ranks
from safetensors import safe_open
from safetensors.torch import save_file

from tacod.checkpoint import TensorInfo, read_checkpoint
from tacod.rank.comm.group import Group
from tacod.rank.families import detect, from_diffusers, minimax_h3_modulation
from tacod.rank.families.base import Output
from tacod.rank.families.inputs import Inputs
from tacod.rank.families.minimax_h3 import MiniMaxH3
from tacod.rank.families.minimax_h3_layout import Layout, Run
from tacod.rank.families.minimax_h3_times import mask_levels, shifted
from tacod.rank.forward.run import equal
from tacod.rank.forward.warmup import usual_inputs
from tacod.rank.parallel.sequence import SequenceParallel
from tacod.rank.parallel.topology import Topology
from tacod.rank.weights.load import get_weight, load_model, set_weight
from tacod.rank.weights.streaming import Streaming
from tacod_client.errors import ArgumentError, ModelUnsupported
from tacod_client.exchange import pack
from tacod_client.tensors import from_wire

CPU = torch.device("cpu")
GOLDENS = ("minimax_h3_t2v", "minimax_h3_i2v", "minimax_h3_r2v", "minimax_h3_mask", "minimax_h3_mixed")
KEYFRAMES, REFERENCES, MASKED, MIXED = GOLDENS[1:]
PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "full": ({"timestep_input_dim": 256, "time_embed_hidden_size": 5376, "time_embed_dim": 2688}, 33_122_992_912),
    "pruned": ({"adaln_curve_grid": 1025, "time_embed_dim": 8}, 20_111_438_744),
}
SIZES = {
    "image_model": "minimax_h3",
    "num_layers": 50,
    "token_refiner_num_layers": 2,
    "hidden_size": 5376,
    "latents_dim": 24,
    "audio_latents_dim": 32,
    "attention_head_dim": 128,
    "num_attention_heads": 56,
    "ffn_hidden_size": 14336,
    "text_dim": 5120,
    "rope_inv_freq_len": 16,
}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def changed(golden: Golden, **inputs: Any) -> Golden:
    """The golden with other arguments; None takes one away."""
    return replace(golden, inputs={k: v for k, v in {**golden.inputs, **inputs}.items() if v is not None})


def repaid(golden: Golden, **fields: Any) -> Golden:
    """The golden with other fields of its payload; None takes one away."""
    payload = {**golden.inputs["minimax_payload"], **fields}
    return changed(golden, minimax_payload={k: v for k, v in payload.items() if v is not None})


def forward(golden: Golden) -> Output:
    model = golden.model()
    with torch.inference_mode():
        return model.run(SequenceParallel(), golden.arguments(model))


def lengths(golden: Golden) -> tuple[int, ...]:
    """As the ranks find them, after they have checked the arguments."""
    model = golden.model()
    return model.lengths(golden.arguments(model))


# --- files ------------------------------------------------------------------------------------------------------------


def header(model: MiniMaxH3) -> dict[str, TensorInfo]:
    return {name: TensorInfo("BF16", tuple(tensor.shape)) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_are_detected(name: str) -> None:
    """From the header alone; parameters are counted as ComfyUI's own network has them."""
    config = {**SIZES, **PUBLISHED[name][0]}
    with torch.device("meta"):
        model = MiniMaxH3(config)
    tensors = header(model)
    shapes = {
        "video_patch_proj.weight": (5376, 96),
        "audio_patch_proj.weight": (5376, 32),
        "rope.inv_freq": (16,),
        "token_refiner.blocks.1.attn.qkv_proj.weight": (21504, 5376),
        "blocks.49.attn.out_proj.weight": (5376, 7168),
        "blocks.49.mlp.fc1.weight": (28672, 5376),
        "blocks.49.adaln_proj.linear.weight": (18 * 5376, config["time_embed_dim"]),
        "final_layer.adaln_proj.linear.weight": (2 * 5376, config["time_embed_dim"]),
    }
    assert {key: tensors[key].shape for key in shapes} == shapes
    assert sum(tensor.numel() for tensor in model.state_dict().values()) == PUBLISHED[name][1]
    assert detect(tensors) == (MiniMaxH3, config)
    assert (model.heads, model.width, model.hidden) == (56, 7168, 5376)


@pytest.mark.parametrize("name", GOLDENS)
def test_a_golden_is_detected_by_its_tensors_alone(name: str) -> None:
    golden = read_golden(name)
    tensors = {key: TensorInfo("F32", tuple(tensor.shape)) for key, tensor in golden.weights.items()}
    family, config = detect(tensors)
    assert family is MiniMaxH3
    assert {key: config[key] for key in golden.config if key in config} == {
        key: value for key, value in golden.config.items() if key in config
    }
    with torch.device("meta"):
        assert header(MiniMaxH3(config)) == header(MiniMaxH3(golden.config))


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (
            {"final_layer.video_out.weight": (8 * 16, 64), "final_layer.video_out.bias": (8 * 16,)},
            r"'head_bank' is 8: ",
        ),
        ({"blocks.0.attn.to_gate_compress.weight": (3, 64)}, "'gate_compress'"),
    ],
)
def test_a_file_of_a_later_comfyui_is_refused_by_what_it_has(more: Mapping[str, Any], told: str) -> None:
    """ComfyUI 0.38 has banks of output heads, and weights for sparse attention."""
    tensors = header(MiniMaxH3(MiniMaxH3.tiny)) | {name: TensorInfo("BF16", shape) for name, shape in more.items()}
    family, config = detect(tensors)
    with torch.device("meta"), pytest.raises(ModelUnsupported, match=told):
        family(config)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("patch_size", [1, 4, 4]),
        ("norm_eps", 1e-6),
        ("qk_norm_eps", 1e-6),
        ("final_norm_eps", 1e-6),
        ("rope_inv_freq_len", 3),
        ("adaln_curve_grid", 1),
        ("sigma_shift_video", 0),
        ("sigma_shift_audio", "3"),
        ("num_layers", 0),
        ("rope_theta", -1),
    ],
)
def test_an_impossible_configuration_is_refused_by_its_key(key: str, value: Any) -> None:
    with torch.device("meta"), pytest.raises(ModelUnsupported, match=f"'{key}'"):
        MiniMaxH3({**MiniMaxH3.tiny, key: value})


THEIRS: dict[str, Any] = {
    "num_attention_heads": 3,
    "attention_head_dim": 16,
    "hidden_size": 64,
    "num_layers": 2,
    "num_refiner_layers": 1,
    "ffn_dim": 80,
    "in_channels": 4,
    "audio_in_channels": 6,
    "text_dim": 32,
    "freq_dim": 32,
    "time_embed_hidden_dim": 48,
    "time_embed_dim": 16,
    "rope_freq_dim": 2,
    "rope_theta": 5000.0,
}


def test_a_diffusers_folder_is_the_same_model(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.MiniMaxH3Transformer3DModel(**THEIRS)
    model = MiniMaxH3({**MiniMaxH3.tiny, "rope_theta": 5000.0})
    weights = in_diffusers(model)
    assert {key: each.shape for key, each in weights.items()} == {
        key: each.shape for key, each in theirs.state_dict().items()
    }
    save_file(weights, tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": type(theirs).__name__, **THEIRS}))
    loaded = load_model(read_checkpoint(str(tmp_path)), torch.float32, CPU)
    assert isinstance(loaded, MiniMaxH3)
    assert (loaded.heads, loaded.frequencies, loaded.theta) == (3, 2, 5000.0)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(each, model.state_dict()[key]) for key, each in loaded.state_dict().items())


def test_a_diffusers_network_gives_the_same_halves_of_its_gates(tmp_path: Path) -> None:
    """Its gate is the second half of the rows: the two feed-forward parts agree on the same weights."""
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.MiniMaxH3Transformer3DModel(**THEIRS).eval()
    save_file(theirs.state_dict(), tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": type(theirs).__name__, **THEIRS}))
    ours = load_model(read_checkpoint(str(tmp_path)), torch.float32, CPU)
    assert isinstance(ours, MiniMaxH3)
    x = torch.randn(1, 5, 32)
    with torch.inference_mode():
        expected = theirs.token_refiner(theirs.context_embedder(x))
        refined = ours.methods()["preprocess_text_embeds"].run(context=x)
    assert relative_error(refined, expected) <= FP32


@pytest.mark.parametrize("key", ["patch_size", "norm_eps"])
def test_a_diffusers_model_of_another_kind_is_refused_by_its_key(key: str) -> None:
    tensors = {
        name: TensorInfo("F32", tuple(each.shape)) for name, each in in_diffusers(MiniMaxH3(MiniMaxH3.tiny)).items()
    }
    told = {"_class_name": "MiniMaxH3Transformer3DModel", **THEIRS, key: [1, 4, 4] if key == "patch_size" else 1e-6}
    with torch.device("meta"), pytest.raises(ModelUnsupported, match=key):
        MiniMaxH3(from_diffusers("here", told, tensors))


@pytest.mark.parametrize(
    ("name", "in_fp32"),
    [
        (
            "minimax_h3_t2v",
            ("adaln_t_table", "blocks.1.adaln_proj.linear.weight", "final_layer.adaln_proj.linear.bias"),
        ),
        (KEYFRAMES, ("time_embedder.proj_in.weight", "time_embedder.proj_out.bias")),
    ],
)
def test_what_files_have_in_fp32_stays_so(tmp_path: Path, name: str, in_fp32: Sequence[str]) -> None:
    """A model of bf16, and one whose weights were patched."""
    golden = read_golden(name)
    golden.save(tmp_path / "model.safetensors")
    model = load_model(read_checkpoint(str(tmp_path / "model.safetensors")), torch.bfloat16, CPU)
    always = "rope.inv_freq", "video_patch_proj.weight", "audio_patch_proj.bias", "final_layer.video_out.weight"
    fp32 = {key for key, tensor in model.state_dict().items() if tensor.dtype == torch.float32}
    assert {*always, *in_fp32} <= fp32
    assert all(torch.equal(get_weight(model, key), golden.weights[key]) for key in fp32)
    others = {*golden.weights} - fp32
    assert {"condition_proj.weight", "blocks.0.attn.qkv_proj.weight", "final_layer.norm.weight"} <= others
    assert ("blocks.1.adaln_proj.linear.weight" in others) == (name == KEYFRAMES)
    assert {get_weight(model, key).dtype for key in others} == {model.dtype} == {torch.bfloat16}
    for key in ("final_layer.audio_out.weight", "blocks.0.mlp.fc1.weight"):
        before = get_weight(model, key)
        set_weight(model, key, before.float() + 1e-5)
        assert get_weight(model, key).dtype == before.dtype
    assert not torch.equal(
        get_weight(model, "final_layer.audio_out.weight"), golden.weights["final_layer.audio_out.weight"]
    )


# --- forwards ---------------------------------------------------------------------------------------------------------


def raw_text(name: str) -> torch.Tensor:
    """The text of a golden before it was refined."""
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        text: torch.Tensor = file.get_tensor("pre.cross_attn")
    return text


@pytest.mark.parametrize("name", GOLDENS)
def test_a_text_is_refined_before_a_run_or_in_each_forward(name: str) -> None:
    golden, raw = read_golden(name), raw_text(name)
    refine = golden.model().methods()["preprocess_text_embeds"].run
    with torch.inference_mode():
        refined = refine(context=raw)
        assert relative_error(refined, golden.inputs["context"]) <= FP32
        assert refine(context=refined) is refined
    assert relative_error(forward(changed(golden, context=raw)), golden.out) <= FP32


def test_a_text_of_another_width_is_refused() -> None:
    golden = read_golden("minimax_h3_t2v")
    with pytest.raises(ArgumentError, match=r"^context: expected shape \[B, L, 44\] or of 40 channels, .*41"):
        changed(golden, context=torch.randn(1, 13, 41)).arguments(golden.model())


@pytest.mark.parametrize(
    ("name", "left_out"),
    [
        ("minimax_h3_t2v", "minimax_payload"),
        (MASKED, "denoise_mask"),
        (MASKED, "audio_denoise_mask"),
        (MIXED, "denoise_mask"),
        (MIXED, "minimax_h3_sigma_shift_video"),
        (MIXED, "minimax_h3_sigma_shift_audio"),
    ],
)
def test_what_a_golden_is_given_counts(name: str, left_out: str) -> None:
    assert changed(read_golden(name), **{left_out: None}).error(SequenceParallel()) > 1e-3


LISTS: dict[str, Any] = {"cond_video_latents": None, "cond_audio_latents": None}


@pytest.mark.parametrize(
    ("name", "fields", "least"),
    [
        (KEYFRAMES, {"text_token_tags": None}, 1e-3),
        (KEYFRAMES, {"keyframes": None, **LISTS}, 1e-3),
        (KEYFRAMES, {"audio_scale": 1.0}, 1e-3),
        (KEYFRAMES, {"seed": 1235}, 1e-5),
        (REFERENCES, {"refs": None, **LISTS}, 1e-3),
        (MIXED, {"visual_cond_noise_aug": None}, 1e-3),
        (MIXED, {"audio_cond_noise_aug": None}, 1e-3),
        (MIXED, {"seed": 0}, 1e-3),
    ],
)
def test_what_its_payload_holds_counts(name: str, fields: dict[str, Any], least: float) -> None:
    assert repaid(read_golden(name), **fields).error(SequenceParallel()) > least


@pytest.mark.parametrize("name", [KEYFRAMES, REFERENCES, MIXED])
def test_latents_that_are_there_twice_may_be_left_out(name: str) -> None:
    golden = read_golden(name)
    assert repaid(golden, **LISTS, layout=[1], _text_token_tags_list=[1]).error(SequenceParallel()) <= FP32
    told = ("latent_t", "latent_h", "latent_w", "ref_audio_t")
    refs = [{k: v for k, v in ref.items() if k not in told} for ref in golden.inputs["minimax_payload"].get("refs", [])]
    assert repaid(golden, refs=refs).error(SequenceParallel()) <= FP32


def test_of_latents_that_are_there_twice_the_list_counts_as_in_comfyui() -> None:
    golden = read_golden(KEYFRAMES)
    other = [torch.zeros_like(each) for each in golden.inputs["minimax_payload"]["cond_video_latents"]]
    frames = [
        {**each, "latent": torch.zeros_like(each["latent"])} if "latent" in each else each
        for each in golden.inputs["minimax_payload"]["keyframes"]
    ]
    outs = [forward(repaid(golden, cond_video_latents=other)), forward(repaid(golden, keyframes=frames, **LISTS))]
    assert relative_error(*outs) <= FP32
    assert relative_error(outs[0], golden.out) > 1e-3


def test_a_mask_that_hides_nothing_is_none() -> None:
    golden = read_golden(MASKED)
    video, sound = (torch.full_like(golden.inputs[name], 0.9995) for name in ("denoise_mask", "audio_denoise_mask"))
    arguments = changed(golden, denoise_mask=video, audio_denoise_mask=sound).arguments(golden.model())
    assert not {name for name in arguments if "mask" in name or "levels" in name}
    outs = [
        forward(changed(golden, denoise_mask=one, audio_denoise_mask=other))
        for one, other in ((video, sound), (None, None))
    ]
    assert relative_error(*outs) == 0


def test_a_mask_has_the_largest_value_of_each_patch_once() -> None:
    mask = torch.zeros(1, 1, 2, 3, 4)
    mask[0, 0, 0, 1, 1], mask[0, 0, 1, 2, 3] = 0.5, 0.25
    levels, rows = mask_levels({"denoise_mask": mask})["denoise_mask"]
    assert levels is not None
    assert rows is not None
    assert levels.tolist() == [0, 0.25, 0.5]
    assert rows.tolist() == [2, 0, 0, 0, 0, 0, 0, 1]


# --- modulations ------------------------------------------------------------------------------------------------------


def soft(name: str = MASKED, video: bool = True, sound: bool = True) -> Golden:
    """A golden with masks of more values than `SHARED`, and of more than most ranks have tokens."""
    golden = read_golden(name)
    _, _, *sides = golden.inputs["x"][0].shape
    masks = {
        "denoise_mask": torch.rand(1, 1, *sides) if video else None,
        "audio_denoise_mask": torch.rand(1, 1, *golden.inputs["x"][1].shape[2:]) if sound else None,
    }
    return changed(golden, **masks)


@pytest.mark.parametrize(("video", "sound"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("name", [MASKED, REFERENCES])
def test_modulations_are_the_same_by_whomever_they_are_computed(
    monkeypatch: pytest.MonkeyPatch, name: str, video: bool, sound: bool
) -> None:
    golden = soft(name, video, sound)
    for shared in (0, 1 << 20):
        monkeypatch.setattr(minimax_h3_modulation, "SHARED", shared)
        ours = forward(golden)
        if not shared:
            own = ours
    assert relative_error(own, ours) <= FP32


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout[0] == 1], ids=str)
@pytest.mark.parametrize("masks", [["denoise_mask", "audio_denoise_mask"], ["denoise_mask"], ["audio_denoise_mask"]])
def test_a_token_may_have_a_time_of_its_own(ranks: Ranks, layout: tuple[int, ...], masks: Sequence[str]) -> None:
    case = {"batch": 1, "text": 3, "optional": masks, "shared": False, "sharing": False, "seed": 0}
    errors = ranks.run(layout, "forward", family="minimax_h3", sides=(5, 9), **case)
    assert max(errors) <= FP32


def test_a_block_fetches_its_modulations_where_they_are_no_ranks(tmp_path: Path) -> None:
    golden = soft()
    path = tmp_path / "model.safetensors"
    golden.save(path)
    plain = load_model(read_checkpoint(str(path)), torch.float32, CPU)
    with Streaming(Group(), CPU, "host", [None], True, smallest=0) as streaming:
        model = load_model(read_checkpoint(str(path)), torch.float32, CPU, streaming=streaming)
    with torch.inference_mode():
        outs = [each.run(SequenceParallel(), golden.arguments(plain)) for each in (plain, model, model)]
    assert all(equal(out, outs[0]) for out in outs)


@pytest.mark.parametrize("seed", [0, 2**63 + 5, 2**64 - 1])
def test_runs_of_other_seeds_are_one_cuda_graph(seed: int) -> None:
    """Noise on what is given is drawn before it, from all 64 bits."""
    golden = read_golden(MIXED)
    model, other = golden.model(), repaid(golden, seed=seed)
    assert golden.arguments(model).key == other.arguments(model).key
    payload = other.inputs["minimax_payload"]
    raw = Inputs({**other.inputs, "minimax_payload": payload}, model.arguments())
    with torch.inference_mode():
        unprepared = model.run(SequenceParallel(), raw)
    assert relative_error(forward(other), unprepared) <= FP32
    assert relative_error(forward(other), golden.out) > 1e-3


def test_images_of_a_batch_are_each_as_alone() -> None:
    """ComfyUI takes one at a time."""
    golden = read_golden(REFERENCES)
    several = {
        "x": [torch.randn(2, *each.shape[1:]) for each in golden.inputs["x"]],
        "context": torch.randn(2, *golden.inputs["context"].shape[1:]),
        "timestep": torch.tensor([900.0, 120.0]),
    }
    both = forward(changed(golden, **several))
    for image in range(2):
        part = slice(image, image + 1)
        alone = {k: [each[part] for each in v] if isinstance(v, list) else v[part] for k, v in several.items()}
        assert relative_error(forward(changed(golden, **alone)), [each[part] for each in both]) <= FP32


# --- refusals ---------------------------------------------------------------------------------------------------------

PICTURE, TRACK = torch.zeros(1, 24, 1, 6, 8), torch.zeros(1, 32, 2, 5)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"nothing": 1}, r"minimax_payload\.nothing: minimax_h3 takes no such argument"),
        ({"seed": -1}, r"minimax_payload\.seed: expected a number"),
        ({"seed": "1"}, r"minimax_payload\.seed: expected a number"),
        ({"visual_cond_noise_aug": 1.5}, r"minimax_payload\.visual_cond_noise_aug: expected a number from 0 to 1"),
        (
            {"text_token_tags": torch.ones(18, dtype=torch.int64)},
            r"minimax_payload\.text_token_tags: 18 tags.* 19 tokens",
        ),
        ({"text_token_tags": torch.full((19,), 3)}, r"text_token_tags: expected whole numbers from 0 to 2"),
        ({"text_token_tags": torch.ones(19)}, r"text_token_tags: expected a tensor of whole numbers"),
        ({"keyframes": {}}, r"minimax_payload\.keyframes: expected a list of maps .*; got dict"),
        ({"keyframes": [3]}, r"minimax_payload\.keyframes\[0\]: expected a map .*; got int"),
        ({"keyframes": [{"latent": PICTURE}]}, r"keyframes\[0\]\.resolved_frame_index: missing"),
        (
            {"keyframes": [{"resolved_frame_index": 0, "latent": PICTURE[..., :6]}], **LISTS},
            r"minimax_payload\.keyframes\[0\]\.latent: its sides and the video's are 6 by 6 and 6 by 8",
        ),
        ({"keyframes": [{"resolved_frame_index": 0, "latent": TRACK}]}, r"keyframes\[0\]\.latent: expected shape"),
        ({"refs": [{"kind": "picture", "latent": PICTURE}]}, r"refs\[0\]\.kind: 'picture' is none of 'image'"),
        ({"refs": [{"latent": PICTURE}]}, r"refs\[0\]\.kind: missing"),
        ({"refs": [{"kind": "image"}]}, r"refs\[0\]\.latent: missing; a reference of kind 'image'"),
        ({"refs": [{"kind": "audio"}]}, r"refs\[0\]\.audio_latent: missing"),
        ({"refs": [{"kind": "audio", "audio_latent": TRACK, "latent": PICTURE}]}, r"refs\[0\]\.latent: .* has none"),
        ({"refs": [{"kind": "image", "audio_latent": TRACK, "latent": PICTURE}]}, r"audio_latent: .* has none"),
        ({"refs": [{"kind": "image", "latent": PICTURE.repeat(1, 1, 2, 1, 1)}]}, r"refs\[0\]\.latent: .*'video'"),
        ({"refs": [{"kind": "image", "latent": PICTURE, "latent_w": 6}]}, r"refs\[0\]\.latent_w: it is 6, .* has 8"),
        ({"refs": [{"kind": "video", "latent": PICTURE, "ref_audio_t": 3}]}, r"refs\[0\]\.ref_audio_t: it is 3, .* 0"),
        ({"cond_video_latents": [PICTURE]}, r"minimax_payload\.cond_video_latents: expected the latents of keyframes"),
        ({"cond_audio_latents": []}, r"minimax_payload\.cond_audio_latents: expected the latents of keyframes"),
    ],
)
def test_a_payload_that_cant_be_is_refused_by_its_part(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(ArgumentError, match=told) as caught:
        lengths(repaid(read_golden(KEYFRAMES), **fields))
    assert str(caught.value.argument).startswith("minimax_payload.")


@pytest.mark.parametrize("payload", [3, [], "x", torch.zeros(3)])
def test_a_payload_that_is_no_map_is_refused(payload: Any) -> None:
    golden = read_golden(KEYFRAMES)
    with pytest.raises(ArgumentError, match=r"^minimax_payload: expected a map with any of text_token_tags"):
        changed(golden, minimax_payload=payload).arguments(golden.model())


@pytest.mark.parametrize(
    ("name", "mask"), [("denoise_mask", torch.ones(1, 1, 7, 4, 8)), ("audio_denoise_mask", torch.ones(1, 1, 2, 36))]
)
def test_a_mask_of_other_sides_is_refused(name: str, mask: torch.Tensor) -> None:
    golden = read_golden(MASKED)
    model = golden.model()
    inputs = Inputs({**golden.inputs, name: mask}, model.arguments())
    with pytest.raises(ArgumentError, match=f"^{name}: expected the sides of its latent"):
        model.lengths(inputs)


@pytest.mark.parametrize("x", [torch.zeros(1, 24, 2, 4, 4), [torch.zeros(1, 24, 2, 4, 4)]])
def test_a_video_without_its_sound_is_refused(x: Any) -> None:
    golden = read_golden("minimax_h3_t2v")
    with pytest.raises(ArgumentError, match=r"^x: expected a list of"):
        changed(golden, x=x).arguments(golden.model())


# --- sampling runs ----------------------------------------------------------------------------------------------------


def sampled(golden: Golden, steps: int, **other: Any) -> list[torch.Tensor]:
    """A run on one rank of a golden's latents as noise, without guidance."""
    given = {name: value for name, value in golden.inputs.items() if name not in ("x", "timestep")}
    payload = {name: value for name, value in given.pop("minimax_payload", {}).items() if name != "audio_scale"}
    noise = golden.inputs["x"]
    fields = {
        "sampler": "euler",
        "seed": 5,
        "cfg": 1.0,
        "noise": noise,
        "latent": [torch.zeros_like(each) for each in noise],
        "sigmas": levels(steps),
        "positive": {**given, "minimax_payload": payload} | other,
        "negative": None,
    }
    engine = engine_of(golden.model(), Topology())
    sent = {name: value if value is None else pack(value, name, {}, None) for name, value in fields.items()}
    with torch.inference_mode():
        engine.runs["j"] = engine._begin("j", model="m", plan="auto", **sent)
        for step in range(steps):
            done = engine.sample("j", step)
    assert isinstance(done.out, list)
    return [from_wire(each, "torch") for each in done.out]


def levels(steps: int) -> torch.Tensor:
    """Noise levels of the video, as its shift of 12 spaces them."""
    return shifted(torch.linspace(1.0, 0.0, steps + 1), 1.0, 12.0)


@pytest.mark.parametrize("name", [GOLDENS[0], KEYFRAMES])
def test_a_run_brings_the_sound_along_its_own_noise_levels(name: str) -> None:
    """As two integrations by Euler's method do, each along its latent's own levels."""
    golden, steps = read_golden(name), 4
    model = golden.model()
    video, sound = golden.inputs["x"]
    payload = {"seed": 5, **golden.inputs.get("minimax_payload", {}), "audio_scale": 1.0}
    sigmas = levels(steps)
    sounds = shifted(sigmas, 12.0, 3.0)
    with torch.inference_mode():
        for at in range(steps):
            inputs = {**golden.inputs, "minimax_payload": payload, "x": [video, sound]}
            one = replace(golden, inputs={**inputs, "timestep": 1000 * sigmas[at : at + 1]})
            velocity, of_sound = model.run(SequenceParallel(), one.arguments(model))
            video = video + (sigmas[at + 1] - sigmas[at]) * velocity
            sound = sound + (sounds[at + 1] - sounds[at]) * of_sound
    ours = sampled(golden, steps)
    assert relative_error(ours[0], video) <= FP32
    assert relative_error(ours[1], sound) <= FP32


def test_what_is_given_gets_the_noise_of_the_runs_seed() -> None:
    golden = read_golden(KEYFRAMES)
    payload = {k: v for k, v in golden.inputs["minimax_payload"].items() if k not in ("audio_scale", "seed")}
    own, told, other = (
        sampled(golden, 2, minimax_payload={**payload, **seed}) for seed in ({}, {"seed": 5}, {"seed": 6})
    )
    assert equal(own, told)
    assert not equal(own, other)


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"denoise_mask": torch.ones(1, 1, 1, 1, 1)}, r"positive\.denoise_mask: "),
        ({"minimax_payload": {"audio_scale": 2.0}}, r"positive\.minimax_payload\.audio_scale: .* 2 times .* by 4"),
        ({"minimax_h3_sigma_shift_video": 6.0}, r"positive\.minimax_h3_sigma_shift_video: .* 2 times"),
    ],
)
def test_what_a_run_has_no_place_for_is_refused(other: dict[str, Any], told: str) -> None:
    golden = read_golden(GOLDENS[0])
    if "denoise_mask" in other:
        other = {"denoise_mask": torch.ones(1, 1, *golden.inputs["x"][0].shape[2:])}
    with pytest.raises(ArgumentError, match=told):
        sampled(golden, 2, **other)


# --- positions and times ----------------------------------------------------------------------------------------------


def test_positions_are_those_of_a_table_made_by_hand() -> None:
    """A square of 4 by 4 cells goes from 0 to 32; a frame of a latent stands for 1 or 4 frames of 5 / 3 steps."""
    video = Run(sound=False, given=False, origin=10.0, frames=7, sides=(4, 4)).places()
    assert video.shape == (28, 3)
    assert video[:4, 1:].tolist() == [[0, 0], [0, 16], [16, 0], [16, 16]]
    frames = torch.tensor([0, 1, 5, 9, 13, 17, 18])
    assert torch.allclose(video[::4, 0], 10 + frames.double() * 5 / 3, rtol=1e-15)
    wide = Run(sound=False, given=False, origin=0.0, frames=1, sides=(2, 8)).places()
    assert wide[:, 2].tolist() == [-16, 0, 16, 32]
    assert wide[:, 1].tolist() == [8] * 4
    sound = Run(sound=True, given=False, origin=3.0, frames=2, sides=(2, 8)).places()
    assert sound.tolist() == [[3, 0, -16], [4, 0, -16], [3, 0, 32], [4, 0, 32]]


def test_what_is_made_begins_behind_all_references() -> None:
    video, sound = torch.zeros(1, 4, 2, 4, 4), torch.zeros(1, 6, 2, 3)
    clip, track = torch.zeros(1, 4, 2, 4, 4), torch.zeros(1, 6, 2, 20)
    refs = [
        {"kind": "image", "latent": clip[:, :, :1]},
        {"kind": "video_audio", "latent": clip, "audio_latent": track},
        {"kind": "audio", "audio_latent": track},
        {"kind": "video", "latent": clip},
    ]
    layout = Layout(
        11, [video, sound], {"refs": refs, "keyframes": [{"resolved_frame_index": 3, "audio_latent": track}]}
    )
    begins = 11 + 1 + 20 + 20 + 5 * 5 / 3
    assert layout.video.origin == layout.sound.origin == pytest.approx(begins)
    assert [(run.sound, run.origin) for run, _ in layout.given] == [
        (True, pytest.approx(begins + 5)),
        (False, 11),
        (True, 12),
        (False, 12),
        (True, 32),
        (False, 52),
    ]


def test_times_are_those_of_a_table_made_by_hand() -> None:
    model = MiniMaxH3(MiniMaxH3.tiny)
    assert model.timestep(torch.tensor([0.25])) == 250
    # Half of the noise at shift 12 is a thirteenth of the way, which is a fifth of the noise at shift 3.
    assert torch.allclose(shifted(torch.tensor([0.5, 1.0]), 12.0, 3.0), torch.tensor([0.2, 1.0]))
    assert shifted(torch.tensor([0.5, 1.0]), 0.0, 3.0).equal(torch.ones(2))


def test_a_usual_forward_is_taken() -> None:
    model = MiniMaxH3(MiniMaxH3.tiny)
    usual = usual_inputs(model, CPU)
    assert usual is not None
    assert model.lengths(usual) == (512, 7 * 24 * 42 + 2 * 37)

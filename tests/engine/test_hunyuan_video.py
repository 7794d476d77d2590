"""What only HunyuanVideo's family knows: its kinds of models, names, masks, first frames and what goes with a text."""

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
from tacod.rank.families.hunyuan_video import HunyuanVideo
from tacod.rank.families.inputs import Inputs
from tacod.rank.parallel.sequence import SequenceParallel
from tacod.rank.sampling.sampling import check_samples
from tacod.rank.weights.load import load_model
from tacod.rank.weights.lora import read_lora
from tacod_client.errors import ArgumentError, ModelUnsupported

CPU = torch.device("cpu")
PLAIN = ("meanflow", "byt5", "byt5_in_dim", "byt5_hidden_dim", "vision_in_dim", "use_cond_type_embedding")
TINY = {key: value for key, value in HunyuanVideo.tiny.items() if key not in PLAIN}
MORE = {key: HunyuanVideo.tiny[key] for key in PLAIN}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def made(**more: Any) -> HunyuanVideo:
    return HunyuanVideo({**TINY, **more}).eval().requires_grad_(False)


def inputs(model: HunyuanVideo, batch: int = 2, **more: Any) -> dict[str, Any]:
    return {
        "x": torch.randn(batch, model.channels, 3, 4, 6),
        "timestep": torch.tensor([737.0, 200.0])[:batch],
        "context": torch.randn(batch, 7, 16),
        "y": torch.randn(batch, 16),
        "guidance": torch.tensor([6.0, 3.5])[:batch],
        **more,
    }


def forward(model: HunyuanVideo, given: dict[str, Any]) -> Tensor:
    with torch.inference_mode():
        out = model.run(SequenceParallel(), model.prepare(Inputs(given, model.arguments())))
    assert isinstance(out, Tensor)
    return out


# --- files ------------------------------------------------------------------------------------------------------------


def published(**more: Any) -> dict[str, Any]:
    return {
        "image_model": "hunyuan_video",
        "in_channels": 16,
        "patch_size": [1, 2, 2],
        "out_channels": 16,
        "vec_in_dim": 768,
        "axes_dim": [16, 56, 56],
        "meanflow": False,
        "context_in_dim": 4096,
        "hidden_size": 3072,
        "mlp_ratio": 4.0,
        "num_heads": 24,
        "depth": 20,
        "depth_single_blocks": 40,
        "theta": 256,
        "qkv_bias": True,
        "byt5": False,
        "guidance_embed": True,
        "use_cond_type_embedding": False,
        "vision_in_dim": None,
        "meanflow_sum": False,
        **more,
    }


BYT5 = {"vec_in_dim": None, "context_in_dim": 3584, "byt5": True, "byt5_in_dim": 1472, "byt5_hidden_dim": 2048}
SEEING = {**BYT5, "vision_in_dim": 1152, "use_cond_type_embedding": True, "meanflow_sum": True, "guidance_embed": False}
SEEING |= {"patch_size": [1, 1, 1], "in_channels": 65, "out_channels": 32, "hidden_size": 2048, "num_heads": 16}
SEEING |= {"depth": 54, "depth_single_blocks": 0}
IMAGE = {**BYT5, "patch_size": [1, 1], "in_channels": 64, "out_channels": 64, "hidden_size": 3584, "num_heads": 28}
IMAGE |= {"axes_dim": [64, 64], "guidance_embed": False}
REFINER = {"vec_in_dim": None, "context_in_dim": 3584, "patch_size": [1, 1, 1], "in_channels": 128, "out_channels": 64}
REFINER |= {"hidden_size": 3328, "num_heads": 26, "meanflow": True}
PUBLISHED = {
    "t2v": (published(), 12_821_012_544),
    "i2v_concat": (published(in_channels=33, guidance_embed=False), 12_810_991_680),
    "skyreels_i2v": (published(in_channels=32, guidance_embed=False), 12_810_979_392),
    "1.5": (published(**SEEING), 8_326_608_160),
    "1.5_distilled": (published(**SEEING, meanflow=True), 8_331_330_848),
    "1.5_sr": (published(**{**SEEING, "in_channels": 98}), 8_326_675_744),
    "image_2.1": (published(**IMAGE), 17_425_795_520),
    "image_2.1_distilled": (published(**{**IMAGE, "guidance_embed": True}, meanflow=True), 17_453_334_976),
    "image_2.1_refiner": (published(**REFINER), 15_038_946_368),
}


def header(model: HunyuanVideo) -> dict[str, TensorInfo]:
    return {name: TensorInfo("BF16", tuple(tensor.shape)) for name, tensor in model.state_dict().items()}


AUTHORS = (
    ("_mod.lin.", "_mod.linear."),
    (".modulation.lin.", ".modulation.linear."),
    ("_attn.qkv.", "_attn_qkv."),
    ("_attn.proj.", "_attn_proj."),
    ("_attn.norm.query_norm.scale", "_attn_q_norm.weight"),
    ("_attn.norm.key_norm.scale", "_attn_k_norm.weight"),
    (".norm.query_norm.scale", ".q_norm.weight"),
    (".norm.key_norm.scale", ".k_norm.weight"),
    ("mlp.0.", "mlp.fc1."),
    ("mlp.2.", "mlp.fc2."),
    ("txt_in.c_embedder.in_layer.", "txt_in.c_embedder.linear_1."),
    ("txt_in.c_embedder.out_layer.", "txt_in.c_embedder.linear_2."),
    ("txt_in.t_embedder.in_layer.", "txt_in.t_embedder.mlp.0."),
    ("txt_in.t_embedder.out_layer.", "txt_in.t_embedder.mlp.2."),
    *((f"{name}_in.in_layer.", f"{name}_in.mlp.0.") for name in ("time", "time_r", "guidance")),
    *((f"{name}_in.out_layer.", f"{name}_in.mlp.2.") for name in ("time", "time_r", "guidance")),
)
"""Names in ComfyUI, and those of the authors' files."""


def as_authors(name: str) -> str:
    for ours, theirs in AUTHORS:
        name = name.replace(ours, theirs)
    return name


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_are_detected(name: str) -> None:
    """From the header alone, in each spelling; parameters are counted as ComfyUI's own network has them."""
    config, parameters = PUBLISHED[name]
    with torch.device("meta"):
        model = HunyuanVideo(config)
    tensors, width = header(model), config["hidden_size"]
    shapes = {
        "img_in.proj.weight": (width, config["in_channels"], *config["patch_size"]),
        "txt_in.individual_token_refiner.blocks.1.self_attn.qkv.weight": (3 * width, width),
        "txt_in.individual_token_refiner.blocks.0.adaLN_modulation.1.bias": (2 * width,),
        "double_blocks.0.txt_mod.lin.weight": (6 * width, width),
        "double_blocks.0.img_mlp.2.weight": (width, 4 * width),
        "double_blocks.0.img_attn.norm.key_norm.scale": (128,),
    }
    assert {key: tensors[key].shape for key in shapes} == shapes
    assert sum(tensor.numel() for tensor in model.state_dict().values()) == parameters
    spellings = {
        "published": tensors,
        "authors'": {as_authors(key): info for key, info in tensors.items()},
        "ComfyUI's": {key.replace("_norm.scale", "_norm.weight"): info for key, info in tensors.items()},
    }
    for spelled in spellings.values():
        assert detect(spelled) == (HunyuanVideo, config)
        assert {HunyuanVideo.canonical(key) for key in spelled} == tensors.keys()


@pytest.mark.parametrize(
    ("name", "scale", "downscale"),
    [("t2v", 0.476986, 8), ("1.5", 1.03682, 16), ("image_2.1", 0.75289, 32), ("image_2.1_refiner", None, 16)],
)
def test_latents_of_each_kind(name: str, scale: float | None, downscale: int) -> None:
    with torch.device("meta"):
        model = HunyuanVideo(PUBLISHED[name][0])
    assert model.downscale == downscale
    assert (model.latent_format and model.latent_format.scale) == scale
    if name == "t2v" or name == "image_2.1":
        assert check_samples(model) == (model.latent_format,)
    else:
        with pytest.raises(ArgumentError, match=r"^model"):
            check_samples(model)


def test_a_distilled_model_is_not_sampled() -> None:
    with torch.device("meta"), pytest.raises(ArgumentError, match="timestep_r"):
        check_samples(HunyuanVideo(PUBLISHED["image_2.1_distilled"][0]))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_heads", 5),
        ("patch_size", 2),
        ("patch_size", [2, 2]),
        ("patch_size", [2, 2, 2]),
        ("patch_size", [1, 2, 1]),
        ("patch_size", [1, 0, 0]),
        ("axes_dim", [4, 6, 8]),
        ("axes_dim", [8, 8]),
        ("meanflow", 1),
        ("byt5", "yes"),
        ("vec_in_dim", 0),
        ("refiner_depth", 3),
        ("qk_norm", "layer_norm"),
        ("in_channels", None),
    ],
)
def test_an_impossible_configuration_is_refused_by_its_key(key: str, value: Any) -> None:
    told = "axes_dim" if value == [2, 2] else key
    with torch.device("meta"), pytest.raises(ModelUnsupported, match=f"'{told}'"):
        made(**{key: value})


THEIRS: dict[str, Any] = {"num_attention_heads": 3, "attention_head_dim": 16, "num_layers": 2, "mlp_ratio": 2.0}
THEIRS |= {"in_channels": 5, "out_channels": 4, "text_embed_dim": 16, "rope_axes_dim": [4, 6, 6]}
FOLDERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "HunyuanVideoTransformer3DModel": ({}, {"num_single_layers": 1, "pooled_projection_dim": 16}),
    "HunyuanVideo15Transformer3DModel": (
        {**MORE, "vec_in_dim": None, "patch_size": [1, 1, 1], "depth_single_blocks": 0, "guidance_embed": False}
        | {"byt5_hidden_dim": 2048, "meanflow_sum": True},
        {"text_embed_2_dim": 16, "image_embed_dim": 32, "use_meanflow": True},
    ),
    "HunyuanImageTransformer2DModel": (
        {"vec_in_dim": None, "patch_size": [1, 1], "axes_dim": [8, 8], "byt5": True, "byt5_in_dim": 16}
        | {"byt5_hidden_dim": 2048, "meanflow": True},
        {"num_single_layers": 1, "text_embed_2_dim": 16, "guidance_embeds": True, "use_meanflow": True}
        | {"rope_axes_dim": [8, 8]},
    ),
}
"""diffusers' classes, with the tiny model of each and what its ``config.json`` says besides."""


@pytest.mark.parametrize("name", FOLDERS)
def test_a_diffusers_folder_is_the_same_model(tmp_path: Path, name: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    ours, more = FOLDERS[name]
    told = {**THEIRS, **more}
    theirs = getattr(diffusers, name)(**told)
    model = made(**ours)
    weights = in_diffusers(model)
    assert {key: each.shape for key, each in weights.items()} == {
        key: each.shape for key, each in theirs.state_dict().items()
    }
    save_file(weights, tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": name, **told}))
    loaded = load_model(read_checkpoint(str(tmp_path)), torch.float32, CPU)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert isinstance(loaded, HunyuanVideo)
    assert (loaded.heads, loaded.axes, loaded.meanflow_sum) == (model.heads, model.axes, model.meanflow_sum)
    assert all(torch.equal(each, model.state_dict()[key]) for key, each in loaded.state_dict().items())


@pytest.mark.parametrize(
    ("key", "value"), [("num_refiner_layers", 3), ("qk_norm", "layer_norm"), ("rope_axes_dim", 16), ("rope_theta", 0)]
)
def test_a_diffusers_model_of_another_kind_is_refused_by_its_key(key: str, value: Any) -> None:
    name = "HunyuanVideoTransformer3DModel"
    tensors = {each: TensorInfo("F32", tuple(tensor.shape)) for each, tensor in in_diffusers(made()).items()}
    told = {"num_refiner_layers": "refiner_depth", "rope_axes_dim": "axes_dim", "rope_theta": "theta"}.get(key, key)
    with torch.device("meta"), pytest.raises(ModelUnsupported, match=f"'{told}'"):
        HunyuanVideo(
            from_diffusers("here", {"_class_name": name, **THEIRS, "num_single_layers": 1, key: value}, tensors)
        )


@pytest.mark.parametrize("prefix", ["transformer.", "diffusion_model.", ""])
def test_a_lora_in_the_authors_names_is_that_in_comfyuis(tmp_path: Path, prefix: str) -> None:
    """As diffusion-pipe writes it."""
    model = made()
    layers = [
        "double_blocks.0.img_attn.qkv",
        "double_blocks.1.txt_mod.lin",
        "double_blocks.0.txt_mlp.2",
        "single_blocks.0.modulation.lin",
        "single_blocks.0.linear1",
        "txt_in.individual_token_refiner.blocks.1.self_attn.proj",
        "txt_in.individual_token_refiner.blocks.0.mlp.0",
    ]
    weights = model.state_dict()
    files: list[dict[str, Tensor]] = [{}, {}]
    for layer in layers:
        outputs, channels = weights[f"{layer}.weight"].shape
        for factor, tensor in {"A": torch.randn(2, channels), "B": torch.randn(outputs, 2)}.items():
            files[0][f"diffusion_model.{layer}.lora_{factor}.weight"] = tensor
            files[1][f"{prefix}{as_authors(f'{layer}.')}lora_{factor}.weight"] = tensor
    assert all(key.removeprefix(prefix).removeprefix("diffusion_model.") for key in files[1])
    layout, shapes = model.lora_layout(TINY), model.shapes(TINY)
    read = [read_lora(each, layout, shapes, 0.7, model.spellings) for each in files]
    assert sorted(read[0]) == sorted(f"{layer}.weight" for layer in layers)
    assert read[0].keys() == read[1].keys()


# --- forwards ---------------------------------------------------------------------------------------------------------

GOLDENS = {
    "hunyuan_video_t2v": ("attention_mask", "guidance"),
    "hunyuan_video_i2v": ("guidance",),
    "hunyuan_video_i2v_replace": ("guiding_frame_index", "guidance"),
    "hunyuan_video_image_first": ("joint_order", "ref_latent"),
    "hunyuan_video_beside": ("ref_latent",),
    "hunyuan_video_replace_beside": ("guiding_frame_index", "ref_latent"),
    "hunyuan_video_15": ("txt_byt5", "clip_fea"),
    "hunyuan_video_15_distilled": ("timestep_r", "clip_fea"),
    "hunyuan_image_21": ("txt_byt5",),
    "hunyuan_image_distilled": ("timestep_r", "guidance"),
    "hunyuan_image_refiner": ("guidance",),
}
"""Each golden, with the optional arguments that count in it."""


@pytest.mark.parametrize(
    ("name", "left_out"), [(name, argument) for name, arguments in GOLDENS.items() for argument in arguments]
)
def test_what_a_golden_is_given_counts(name: str, left_out: str) -> None:
    golden = read_golden(name)
    assert left_out in golden.inputs
    other = replace(golden, inputs={key: each for key, each in golden.inputs.items() if key != left_out})
    assert other.error(SequenceParallel()) > 1e-3


def test_tokens_that_a_mask_hides_are_left_out_but_for_the_mean() -> None:
    golden = read_golden("hunyuan_video_t2v")
    model = golden.model()
    given = golden.arguments(model)
    seen = golden.inputs["attention_mask"].bool()
    assert "attention_mask" not in given
    assert given["context"].shape[1] == int(seen.sum()) < seen.shape[1]
    assert torch.equal(given["text_mean"], golden.inputs["context"].mean(dim=1))
    assert len(model.lengths(given)) == 2


def test_each_image_of_a_batch_has_its_own_mask() -> None:
    """ComfyUI's network takes masks for one image at a time."""
    model = made(**MORE)
    mask = torch.tensor([[True, False, True, True, False, True, False], [True] * 3 + [False] * 4])
    given = inputs(model, attention_mask=mask, txt_byt5=torch.randn(2, 4, 16), clip_fea=torch.randn(2, 3, 32))
    whole = forward(model, given)
    for image in range(2):
        alone = {key: each[image : image + 1] for key, each in given.items()}
        assert relative_error(whole[image : image + 1], forward(model, alone)) <= FP32
        other = {**alone, "context": alone["context"].clone()}
        # Moved against each other, so that the mean stays.
        hidden = (~mask[image]).nonzero().flatten()[:2]
        other["context"][0, hidden] += torch.tensor([[1.0], [-1.0]])
        assert relative_error(forward(model, other), forward(model, alone)) <= FP32


def test_a_mask_that_hides_all_of_a_text_is_refused() -> None:
    model = made()
    mask = torch.tensor([[True] * 7, [False] * 7])
    with pytest.raises(ArgumentError, match=r"^attention_mask: it hides all of a text"):
        forward(model, inputs(model, attention_mask=mask))


def test_a_mask_that_hides_nothing_is_none() -> None:
    model = made()
    given = inputs(model)
    assert torch.equal(
        forward(model, {**given, "attention_mask": torch.ones(2, 7, dtype=torch.bool)}), forward(model, given)
    )


def test_the_first_frames_modulation_goes_to_the_text_in_newer_versions() -> None:
    """In the single blocks to as many of the first tokens as a frame has."""
    model = made()
    given = inputs(model, guiding_frame_index=torch.zeros(2))
    newer = forward(model, given)
    assert torch.equal(forward(model, {**given, "joint_order": "text_first"}), newer)
    assert relative_error(forward(model, {**given, "joint_order": "image_first"}), newer) > 1e-3
    double = made(depth_single_blocks=0)
    same = [forward(double, {**given, "joint_order": order}) for order in ("text_first", "image_first")]
    assert torch.equal(*same)


@pytest.mark.parametrize("sides", [(3, 5, 6), (3, 4, 7)])
def test_latents_that_comfyui_cant_put_together_are_refused(sides: tuple[int, ...]) -> None:
    model = made()
    with pytest.raises(ArgumentError, match=r"^x: its latents are .* multiples of 16 pixels$"):
        model.lengths(inputs(model, x=torch.randn(2, 5, *sides)))


def test_latents_of_any_size_where_a_patch_is_a_cell() -> None:
    model = made(patch_size=[1, 1, 1])
    out = forward(model, inputs(model, x=torch.randn(2, 5, 1, 3, 7)))
    assert out.shape == (2, 4, 1, 3, 7)


def test_a_reference_may_have_any_size() -> None:
    model = made()
    given = inputs(model, ref_latent=torch.randn(2, 5, 1, 5, 3))
    assert model.lengths(given) == (7, 3 * 2 * 3 + 3 * 2)
    assert forward(model, given).shape == (2, 4, 3, 4, 6)


def test_timesteps_are_thousandths() -> None:
    assert made().timestep(torch.tensor([0.25])) == 250

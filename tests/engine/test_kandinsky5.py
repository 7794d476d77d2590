"""What only Kandinsky 5 knows: what is given of a video, images, and how positions are stretched."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import FP32, assert_same_model, in_diffusers, read_golden, relative_error
from safetensors.torch import save_file
from torch import Tensor

from tacod.checkpoint import TensorInfo, read_checkpoint
from tacod.rank.families import detect, from_diffusers, kandinsky5
from tacod.rank.families.inputs import Inputs
from tacod.rank.families.kandinsky5 import Kandinsky5
from tacod.rank.families.latents import FLUX, HUNYUAN_VIDEO
from tacod.rank.forward.warmup import usual_inputs
from tacod.rank.parallel.sequence import SequenceParallel
from tacod.rank.sampling.sampling import check_samples
from tacod.rank.weights.load import load_model
from tacod.rank.weights.lora import read_lora
from tacod_client.errors import ArgumentError, ModelUnsupported

CPU = torch.device("cpu")
TINY = dict(Kandinsky5.tiny)
IMAGE = {"visual_embed_dim": 16}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def made(**more: Any) -> Kandinsky5:
    return Kandinsky5({**TINY, **more}).eval().requires_grad_(False)


def inputs(model: Kandinsky5, *sides: int, **more: Any) -> dict[str, Any]:
    return {
        "x": torch.randn(2, model.channels, *(sides or (3, 6, 8))),
        "timestep": torch.tensor([737.0, 200.0]),
        "context": torch.randn(2, 7, 16),
        "y": torch.randn(2, 16),
        **more,
    }


def forward(model: Kandinsky5, given: dict[str, Any]) -> Tensor:
    with torch.inference_mode():
        out = model.run(SequenceParallel(), Inputs(given, model.arguments()))
    assert isinstance(out, Tensor)
    return out


# --- files ------------------------------------------------------------------------------------------------------------


def published(width: int, hidden: int, time: int, text: int, layers: int, **more: Any) -> dict[str, Any]:
    return {
        "image_model": "kandinsky5",
        "model_dim": width,
        "axes_dims": [16, 24, 24] if width == 1792 else [32, 48, 48],
        "time_dim": time,
        "ff_dim": hidden,
        "visual_embed_dim": 132,
        "out_visual_dim": 16,
        "in_text_dim": 3584,
        "in_text_dim2": 768,
        "num_text_blocks": text,
        "num_visual_blocks": layers,
        **more,
    }


PUBLISHED = {
    "lite": (published(1792, 7168, 512, 2, 32), 28, 2_007_702_848),
    "pro": (published(4096, 16384, 1024, 4, 60), 32, 19_311_325_248),
    "image": (
        published(2560, 10240, 512, 2, 50, visual_embed_dim=64, rope_scale_factor=[1.0, 1.0, 1.0]),
        20,
        6_022_080_576,
    ),
}


def header(model: Kandinsky5) -> dict[str, TensorInfo]:
    return {name: TensorInfo("BF16", tuple(tensor.shape)) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_are_detected(name: str) -> None:
    """From the header alone; parameters are counted as ComfyUI's own network has them."""
    config, heads, parameters = PUBLISHED[name]
    with torch.device("meta"):
        model = Kandinsky5(config)
    tensors, width, time = header(model), config["model_dim"], config["time_dim"]
    shapes = {
        "time_embeddings.in_layer.weight": (time, width),
        "text_embeddings.norm.bias": (width,),
        "pooled_text_embeddings.in_layer.weight": (time, 768),
        "visual_embeddings.in_layer.weight": (width, config["visual_embed_dim"]),
        "text_transformer_blocks.0.text_modulation.out_layer.weight": (6 * width, time),
        "visual_transformer_blocks.0.visual_modulation.out_layer.bias": (9 * width,),
        "visual_transformer_blocks.0.cross_attention.to_key.bias": (width,),
        "visual_transformer_blocks.0.cross_attention.key_norm.weight": (width // heads,),
        "visual_transformer_blocks.0.feed_forward.in_layer.weight": (config["ff_dim"], width),
        "out_layer.modulation.out_layer.weight": (2 * width, time),
        "out_layer.out_layer.weight": (64, width),
    }
    assert {key: tensors[key].shape for key in shapes} == shapes
    assert sum(tensor.numel() for tensor in model.state_dict().values()) == parameters
    assert detect(tensors) == (Kandinsky5, config)
    assert model.heads == heads
    assert model.latent_format is (FLUX if name == "image" else HUNYUAN_VIDEO)
    assert model.sampling()["latent"] == ["B", 16, *(("H", "W") if name == "image" else ("T", "H", "W"))]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("axes_dims", [4, 4, 6]),
        ("axes_dims", [0, 0, 0]),
        ("axes_dims", [16, 16]),
        ("axes_dims", "4, 6, 6"),
        ("patch_size", [2, 2, 2]),
        ("rope_scale_factor", [1.0, 2.0]),
        ("rope_scale_factor", [1.0, 2.0, 0.0]),
        ("rope_scale_factor", 2.0),
        ("visual_embed_dim", 34),
        ("model_dim", "48"),
        ("num_visual_blocks", 0),
        ("time_dim", 0),
    ],
)
def test_an_impossible_configuration_is_refused_by_its_key(key: str, value: Any) -> None:
    with torch.device("meta"), pytest.raises(ModelUnsupported, match=f"'{key}'"):
        made(**{key: value})


def test_a_file_that_lacks_a_tensor_is_refused_by_its_name() -> None:
    lacking = {name: info for name, info in header(made()).items() if not name.startswith("pooled_text")}
    with pytest.raises(ModelUnsupported, match=r"^pooled_text_embeddings\.in_layer\.weight: .*missing"):
        detect(lacking)


THEIRS: dict[str, Any] = {
    "in_visual_dim": 4,
    "out_visual_dim": 4,
    "in_text_dim": 16,
    "in_text_dim2": 16,
    "time_dim": 32,
    "model_dim": 48,
    "ff_dim": 80,
    "num_text_blocks": 1,
    "num_visual_blocks": 2,
    "axes_dims": [4, 6, 6],
    "visual_cond": True,
}


@pytest.mark.parametrize("ours", [{}, IMAGE], ids=["video", "image"])
def test_a_diffusers_folder_is_the_same_model(tmp_path: Path, ours: dict[str, Any]) -> None:
    diffusers = pytest.importorskip("diffusers")
    told = {**THEIRS, "visual_cond": not ours}
    theirs = diffusers.Kandinsky5Transformer3DModel(**told)
    model = made(**ours)
    weights = in_diffusers(model)
    assert {key: each.shape for key, each in weights.items()} == {
        key: each.shape for key, each in theirs.state_dict().items()
    }
    save_file(weights, tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "Kandinsky5Transformer3DModel", **told}))
    loaded = load_model(read_checkpoint(str(tmp_path)), torch.float32, CPU)
    assert isinstance(loaded, Kandinsky5)
    assert (loaded.axes, loaded.is_image) == (model.axes, model.is_image)
    given = inputs(model, *((6, 8) if ours else (3, 6, 8)))
    assert_same_model(loaded, model, forward(loaded, given), forward(model, given))


@pytest.mark.parametrize(("key", "value"), [("patch_size", [1, 1, 1]), ("axes_dims", [16, 24, 24])])
def test_a_diffusers_model_of_another_kind_is_refused_by_its_key(key: str, value: Any) -> None:
    tensors = {each: TensorInfo("F32", tuple(tensor.shape)) for each, tensor in in_diffusers(made()).items()}
    config = {"_class_name": "Kandinsky5Transformer3DModel", **THEIRS, key: value}
    with torch.device("meta"), pytest.raises(ModelUnsupported, match=key):
        Kandinsky5(from_diffusers("here", config, tensors))


@pytest.mark.parametrize("prefix", ["", "transformer.", "diffusion_model.", "lora_unet_"])
def test_a_lora_is_read_by_comfyuis_names(prefix: str) -> None:
    """ComfyUI takes them as they are and behind ``transformer.``, too."""
    module = "visual_transformer_blocks.1.cross_attention.to_key"
    spelt = prefix + (module.replace(".", "_") if prefix.endswith("_") else module)
    lora = {f"{spelt}.lora_A.weight": torch.randn(2, 48), f"{spelt}.lora_B.weight": torch.randn(48, 2)}
    shapes = {name: tuple(tensor.shape) for name, tensor in made().state_dict().items()}
    assert list(read_lora(lora, Kandinsky5.lora_layout(TINY), shapes, 1.0, {})) == [f"{module}.weight"]


# --- forwards ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "left_out"), [("kandinsky5_i2v", "time_dim_replace"), ("kandinsky5_stretched", "rope_options")]
)
def test_what_a_golden_is_given_counts(name: str, left_out: str) -> None:
    golden = read_golden(name)
    other = replace(golden, inputs={key: each for key, each in golden.inputs.items() if key != left_out})
    assert other.error(SequenceParallel()) > 1e-3


def test_an_empty_map_of_positions_leaves_out_the_networks_own_factors() -> None:
    """ComfyUI's looks whether there is one, and then for what is in it."""
    golden = read_golden("kandinsky5")
    model = golden.model()
    plain, empty, usual = (
        forward(model, {**golden.inputs, **given})
        for given in ({}, {"rope_options": {}}, {"rope_options": {"scale_t": 1.0, "scale_y": 1.0, "shift_x": 0.0}})
    )
    assert empty.equal(usual)
    assert relative_error(plain, empty) > 1e-3


def test_what_is_given_takes_the_place_of_the_first_frames() -> None:
    """The caller's latents stay as they are."""
    model = made()
    given = inputs(model)
    start = torch.randn(1, 4, 2, 6, 8)
    replaced = given["x"].clone()
    replaced[:, :4, :2] = start
    before = given["x"].clone()
    assert torch.equal(forward(model, {**given, "time_dim_replace": start}), forward(model, {**given, "x": replaced}))
    assert torch.equal(given["x"], before)


def test_more_frames_than_the_video_has_are_refused() -> None:
    model = made()
    with pytest.raises(ArgumentError, match=r"^time_dim_replace: it has 4 frames and x has 3"):
        model.lengths(inputs(model, time_dim_replace=torch.randn(2, 4, 4, 6, 8)))


@pytest.mark.parametrize(("ours", "sides"), [({}, (3, 5, 8)), ({}, (3, 6, 7)), (IMAGE, (5, 5))])
def test_odd_sides_are_refused(ours: dict[str, Any], sides: Sequence[int]) -> None:
    """ComfyUI pads them, and then fails for it doesn't cut the output."""
    model = made(**ours)
    with pytest.raises(ArgumentError, match=r"^x: its latents are 5 by|^x: its latents are 6 by 7; both must be even"):
        model.lengths(inputs(model, *sides))


def test_an_image_is_a_video_of_one_frame() -> None:
    model = made(**IMAGE)
    given = inputs(model, 6, 8)
    video = made(out_visual_dim=5, **IMAGE)
    for name, ours in model.state_dict().items():
        theirs = video.state_dict()[name]
        theirs[: len(ours)] = ours
    out = forward(video, {**given, "x": given["x"].unsqueeze(2)})
    assert out.shape == (2, 5, 1, 6, 8)
    assert relative_error(out[:, :4, 0], forward(model, given)) <= FP32


def test_positions_are_closer_by_a_factor() -> None:
    """As ComfyUI has them by width: Pro's by another factor in large frames, and options in place of any."""
    grid = kandinsky5.kit.Grid(torch.empty(1, 1, 2, 6, 8, device="meta"), (1, 2, 2))
    large = kandinsky5.kit.Grid(torch.empty(1, 1, 1, 110, 128, device="meta"), (1, 2, 2))

    def last(model: Kandinsky5, grid: Any, options: Any = None) -> list[float]:
        found: list[float] = model._positions(grid, options, CPU)[-1].tolist()
        return found

    model, image = made(), made(rope_scale_factor=[1.0, 1.0, 1.0])
    assert last(model, grid) == [1.0, 1.0, 1.5]
    assert last(image, grid) == [1.0, 2.0, 3.0]
    assert last(model, grid, {"scale_x": 2.0, "shift_t": 3.0}) == [4.0, 2.0, 6.0]
    assert last(model, large) == [0.0, 27.0, 31.5]
    model.width = 4096
    assert last(model, grid) == [1.0, 1.0, 1.5]
    assert last(model, large) == pytest.approx([0.0, 54 / 3.16, 63 / 3.16], rel=1e-6)
    smaller = kandinsky5.kit.Grid(torch.empty(1, 1, 1, 110, 126, device="meta"), (1, 2, 2))
    assert last(model, smaller) == [0.0, 27.0, 31.0]


ATTENTIONS = (
    "text_transformer_blocks.0.self_attention",
    "visual_transformer_blocks.1.self_attention",
    "visual_transformer_blocks.1.cross_attention",
)


@pytest.mark.parametrize("name", ATTENTIONS)
def test_the_epsilon_of_norms_counts_in_every_attention(name: str) -> None:
    model, attended = made(), []
    given = inputs(model)
    for other, module in model.named_modules():
        if other == f"{name}.out_layer":
            module.register_forward_pre_hook(lambda _, given: attended.append(given[0]))
        elif other.endswith("attention.out_layer"):
            module.get_parameter("weight").zero_()
    for epsilon in ({}, {"qk_norm_eps": torch.finfo(torch.float32).eps}, {"qk_norm_eps": 0.01}):
        forward(model, {**given, **epsilon})
    assert torch.equal(attended[0], attended[1])
    assert relative_error(attended[2], attended[0]) > 1e-5


@pytest.mark.parametrize("ours", [{}, IMAGE], ids=["video", "image"])
def test_both_kinds_have_a_usual_forward(ours: dict[str, Any]) -> None:
    model = made(**ours)
    usual = usual_inputs(model, CPU)
    assert usual is not None
    assert model.lengths(usual) == ((1 if ours else 3) * 32 * 48,)


def test_images_are_sampled_and_videos_need_what_is_given() -> None:
    assert check_samples(made(**IMAGE)) == (FLUX,)
    with pytest.raises(ArgumentError, match="its x has 9 channels and its output 4"):
        check_samples(made())


def test_timesteps_are_thousandths() -> None:
    assert made().timestep(torch.tensor([0.25])) == 250

"""What only Cosmos-Predict2 and Anima know: times of frames, stretched positions, tensors beside the network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import FP32, animas_text, assert_same_model, in_diffusers, read_golden, relative_error
from safetensors.torch import save_file
from torch import Tensor

from tacod.checkpoint import TensorInfo, read_checkpoint
from tacod.rank.families import detect, from_diffusers
from tacod.rank.families.cosmos_predict2 import CosmosPredict2
from tacod.rank.families.inputs import Inputs
from tacod.rank.families.latents import WAN21
from tacod.rank.parallel.sequence import SequenceParallel
from tacod.rank.weights.load import load_model
from tacod.rank.weights.lora import read_lora
from tacod_client.errors import ArgumentError, ModelUnsupported

TINY = dict(CosmosPredict2.tiny)
RATIOS = tuple(f"rope_{axis}_extrapolation_ratio" for axis in "thw")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def made(**more: Any) -> CosmosPredict2:
    return CosmosPredict2({**TINY, **more}).eval().requires_grad_(False)


def inputs(frames: int = 3, height: int = 6, width: int = 8) -> dict[str, Any]:
    return {
        "x": torch.randn(2, 5, frames, height, width),
        "timestep": torch.tensor([0.737, 0.2]),
        "context": torch.randn(2, 7, 16),
    }


def forward(model: CosmosPredict2, given: dict[str, Any]) -> Tensor:
    with torch.inference_mode():
        out = model.run(SequenceParallel(), Inputs(given, model.arguments()))
    assert isinstance(out, Tensor)
    return out


# --- files ------------------------------------------------------------------------------------------------------------


def published(kind: str, width: int, blocks: int, channels: int, ratios: tuple[float, ...]) -> dict[str, Any]:
    return {
        "image_model": kind,
        "in_channels": channels,
        "out_channels": 16,
        "model_channels": width,
        "num_heads": width // 128,
        "num_blocks": blocks,
        "mlp_ratio": 4.0,
        "crossattn_emb_channels": 1024,
        "adaln_lora_dim": 256,
        "concat_padding_mask": True,
        "extra_per_block_abs_pos_emb": False,
        **dict(zip(RATIOS, ratios, strict=True)),
    }


PUBLISHED = {
    "cosmos_predict2_2B_t2i": (published("cosmos_predict2", 2048, 28, 16, (1.0, 4.0, 4.0)), 1_956_405_248),
    "cosmos_predict2_14B_t2i": (published("cosmos_predict2", 5120, 36, 16, (1.0, 4.0, 4.0)), 14_265_265_152),
    "cosmos_predict2_2B_video2world": (published("cosmos_predict2", 2048, 28, 17, (1.0, 3.0, 3.0)), 1_956_413_440),
    "cosmos_predict2_14B_video2world": (published("cosmos_predict2", 5120, 36, 17, (5 / 6, 2.0, 2.0)), 14_265_285_632),
    "anima": (
        {
            **published("anima", 2048, 28, 16, (1.0, 4.0, 4.0)),
            "llm_adapter": {"words": 32128, "width": 1024, "heads": 16, "layers": 6, "source_width": 1024},
        },
        2_091_068_928,
    ),
}


def header(model: CosmosPredict2) -> dict[str, TensorInfo]:
    return {name: TensorInfo("BF16", tuple(tensor.shape)) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_are_detected(name: str) -> None:
    """From the header alone; parameters are counted as ComfyUI's own network has them."""
    config, parameters = PUBLISHED[name]
    with torch.device("meta"):
        model = CosmosPredict2(config)
    tensors, width, channels = header(model), config["model_channels"], config["in_channels"]
    shapes = {
        "x_embedder.proj.1.weight": (width, 4 * (channels + 1)),
        "t_embedder.1.linear_2.weight": (3 * width, width),
        "t_embedding_norm.weight": (width,),
        "blocks.0.adaln_modulation_cross_attn.1.weight": (256, width),
        "blocks.0.adaln_modulation_cross_attn.2.weight": (3 * width, 256),
        "blocks.0.cross_attn.v_proj.weight": (width, 1024),
        "blocks.0.self_attn.k_norm.weight": (128,),
        "blocks.0.mlp.layer2.weight": (width, 4 * width),
        "final_layer.adaln_modulation.2.weight": (2 * width, 256),
        "final_layer.linear.weight": (64, width),
    }
    assert {key: tensors[key].shape for key in shapes} == shapes
    assert sum(tensor.numel() for tensor in model.state_dict().values()) == parameters
    assert detect(tensors) == (CosmosPredict2, config)


def test_a_file_loads_without_what_is_for_others(tmp_path: Path) -> None:
    """What Cosmos' authors left in their files; a tensor that nobody knows is refused."""
    model = made()
    others = {
        "pos_embedder.seq": torch.zeros(4),
        "accum_iteration": torch.zeros(1, dtype=torch.int64),
    }
    path = tmp_path / "anima.safetensors"
    weights = {f"net.{key}": value for key, value in {**model.state_dict(), **others}.items()}
    save_file(weights, path, {"tacod.config": json.dumps(TINY)})
    loaded = load_model(read_checkpoint(str(path)), torch.float32, torch.device("cpu"))
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert isinstance(loaded, CosmosPredict2)
    given = inputs()
    assert_same_model(loaded, model, forward(loaded, given), forward(model, given))
    save_file({**weights, "net.other_adapter.weight": torch.zeros(4)}, path, {"tacod.config": json.dumps(TINY)})
    with pytest.raises(ModelUnsupported, match=r"other_adapter\.weight"):
        load_model(read_checkpoint(str(path)), torch.float32, torch.device("cpu"))


ADAPTER = {"words": 97, "width": 24, "heads": 3, "layers": 2, "source_width": 20}


def test_an_adapter_is_told_by_its_tensors_and_gives_the_goldens_context() -> None:
    golden = read_golden("anima")
    shapes = {name: TensorInfo("BF16", tuple(each.shape)) for name, each in golden.weights.items()}
    _, config = detect(shapes, golden.config)
    assert config["llm_adapter"] == ADAPTER
    given, expected = animas_text()
    with torch.inference_mode():
        out = golden.model().methods()["preprocess_text_embeds"].run(**given)
    assert isinstance(out, Tensor)
    assert relative_error(out, expected) <= FP32
    lacking = {name: info for name, info in shapes.items() if "cross_attn.k_proj" not in name}
    with pytest.raises(ModelUnsupported, match=r"llm_adapter\.blocks\.0\.cross_attn\.k_proj"):
        detect(lacking)


@pytest.mark.parametrize("key", ADAPTER)
def test_impossible_sizes_of_an_adapter_are_refused_by_their_keys(key: str) -> None:
    with torch.device("meta"), pytest.raises(ModelUnsupported, match=f"'{key}'"):
        made(llm_adapter={**ADAPTER, key: 0})


def test_a_network_without_an_adapter_has_no_method_of_it() -> None:
    assert made().methods() == {}
    assert list(made(llm_adapter=ADAPTER).methods()) == ["preprocess_text_embeds"]


def test_a_lora_of_the_adapter_is_read_by_its_names() -> None:
    """Without an adapter it is refused."""
    module = "diffusion_model.llm_adapter.blocks.0.mlp.0"
    lora = {f"{module}.lora_A.weight": torch.randn(2, 24), f"{module}.lora_B.weight": torch.randn(96, 2)}
    shapes = {name: tuple(tensor.shape) for name, tensor in made(llm_adapter=ADAPTER).state_dict().items()}
    assert list(read_lora(lora, {}, shapes, 1.0, {})) == ["llm_adapter.blocks.0.mlp.0.weight"]
    shapes = {name: tuple(tensor.shape) for name, tensor in made().state_dict().items()}
    with pytest.raises(ModelUnsupported, match=r"llm_adapter\.blocks\.0\.mlp\.0"):
        read_lora(lora, {}, shapes, 1.0, {})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("concat_padding_mask", False),
        ("extra_per_block_abs_pos_emb", True),
        ("rope_enable_fps_modulation", True),
        ("use_adaln_lora", False),
        ("patch_temporal", 2),
        ("pos_emb_cls", "sincos"),
        ("num_heads", 5),
        ("num_heads", 6),
        ("rope_h_extrapolation_ratio", 0),
        ("mlp_ratio", "4"),
        ("in_channels", None),
    ],
)
def test_an_impossible_configuration_is_refused_by_its_key(key: str, value: Any) -> None:
    with torch.device("meta"), pytest.raises(ModelUnsupported, match=f"'{key}'"):
        CosmosPredict2({**TINY, key: value})


def test_a_diffusers_folder_is_the_same_model(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    told = {
        "in_channels": 5,
        "out_channels": 4,
        "num_attention_heads": 3,
        "attention_head_dim": 16,
        "num_layers": 2,
        "text_embed_dim": 16,
        "adaln_lora_dim": 16,
        "rope_scale": [0.8, 2.0, 3.0],
        "extra_pos_embed_type": None,
    }
    theirs = diffusers.CosmosTransformer3DModel(**told)
    ours = made()
    weights = in_diffusers(ours)
    shapes = {name: tensor.shape for name, tensor in theirs.state_dict().items()}
    assert {name: tensor.shape for name, tensor in weights.items()} == shapes
    save_file(weights, tmp_path / "diffusion_pytorch_model.safetensors")
    config = {"_class_name": "CosmosTransformer3DModel", **told}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = load_model(read_checkpoint(str(tmp_path)), torch.float32, torch.device("cpu"))
    assert isinstance(loaded, CosmosPredict2)
    given = inputs()
    assert_same_model(loaded, ours, forward(loaded, given), forward(ours, given))


@pytest.mark.parametrize(("key", "value"), [("extra_pos_embed_type", "learnable"), ("concat_padding_mask", False)])
def test_a_diffusers_model_of_another_kind_is_refused_by_its_key(key: str, value: Any) -> None:
    """Cosmos 1 has the same class."""
    tensors = {name: TensorInfo("F32", tuple(tensor.shape)) for name, tensor in in_diffusers(made()).items()}
    config = {"_class_name": "CosmosTransformer3DModel", "num_layers": 2, "extra_pos_embed_type": None, key: value}
    family, found = detect({}, from_diffusers("here", config, tensors))
    ours = {"extra_pos_embed_type": "extra_per_block_abs_pos_emb"}.get(key, key)
    with pytest.raises(ModelUnsupported, match=ours):
        family(found)


@pytest.mark.parametrize("scale", [None, 2.0, "1.0", {}, [], [1.0, 1.0], [1.0, 1.0, 1.0, 1.0], [1.0, 1.0, "x"]])
def test_scales_of_places_must_be_three_numbers(scale: Any) -> None:
    tensors = {name: TensorInfo("F32", tuple(tensor.shape)) for name, tensor in in_diffusers(made()).items()}
    config = {"_class_name": "CosmosTransformer3DModel", "num_layers": 2, "extra_pos_embed_type": None}
    with pytest.raises(ModelUnsupported, match=r"rope_scale|rope_w_extrapolation_ratio"):
        CosmosPredict2(detect({}, from_diffusers("here", {**config, "rope_scale": scale}, tensors))[1])


# --- forwards ---------------------------------------------------------------------------------------------------------


def test_one_time_is_the_same_for_each_frame() -> None:
    model, given = made(), inputs()
    out = forward(model, given)
    each = forward(model, {**given, "timestep": given["timestep"][:, None].repeat(1, 3)})
    assert relative_error(each, out) <= FP32
    first = given["timestep"][:, None].repeat(1, 3)
    first[:, 0] = 0
    assert relative_error(forward(model, {**given, "timestep": first}), out) > 1e-2


@pytest.mark.parametrize("shape", [(1, 3), (1,), (1, 2, 1), ()])
def test_times_of_other_frames_are_refused(shape: tuple[int, ...]) -> None:
    """The golden has two frames."""
    golden = read_golden("cosmos_predict2_v2w")
    golden.inputs["timestep"] = torch.zeros(shape)
    if shape == (1,):
        assert golden.arguments(golden.model())["timestep"].shape == (1,)
        return
    with pytest.raises(ArgumentError, match=r"^timestep: (expected shape \[B\] or \[B, T\]|its T is 3)"):
        golden.arguments(golden.model())


@pytest.mark.parametrize("axis", range(3))
def test_each_axis_of_positions_is_stretched_by_itself(axis: int) -> None:
    given, weights = inputs(), made().state_dict()
    outs = []
    for ratio in (1.0, 5.0):
        model = made(**{RATIOS[axis]: ratio})
        model.load_state_dict(weights)
        outs.append(forward(model, given))
    assert relative_error(*outs) > 1e-4


def test_tokens_are_fp32_where_all_else_is_fp16() -> None:
    """They grow beyond what fp16 holds (65504), though no branch does."""
    model, given = made(), inputs()
    for block in model.blocks:
        block.mlp.get_submodule("layer2").weight.mul_(1000)
        block.adaln_modulation_mlp.get_submodule("2").weight[-48:].mul_(300)
    expected = forward(model, given)
    model, largest = model.half(), []
    for block in model.blocks:
        block.register_forward_hook(lambda _, given, out: largest.append(float(given[0].image.tokens.abs().max())))
    out = forward(model, {name: value if name == "timestep" else value.half() for name, value in given.items()})
    assert max(largest) > 65504
    assert out.dtype == torch.float16
    assert relative_error(out, expected) <= 1e-2


def test_timesteps_are_noise_levels() -> None:
    model = made()
    assert model.timestep(torch.tensor([0.25])) == 0.25
    assert model.latent_format is WAN21

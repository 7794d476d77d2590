"""Weights from every kind of file into the same model; what is kept in few bits, and how weights are changed."""

from __future__ import annotations

import copy
import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_files import Stored, as_stored, random_blocks, write
from helpers import FLUX, SD3, Tiny, assert_same_model, in_diffusers, relative_error
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tacod.checkpoint import TensorInfo, locate, read_checkpoint
from tacod.checkpoint.header import BLOCKS
from tacod.rank.families import detect, from_diffusers
from tacod.rank.families.base import DiT
from tacod.rank.ops.packed.base import PackedLinear
from tacod.rank.parallel.sequence import SequenceParallel
from tacod.rank.weights.load import choose_dtype, get_weight, load_model, set_weight, share, weight_bytes
from tacod_client.errors import ModelCorrupt, ModelError, ModelNotAllowed, ModelNotFound, ModelUnsupported

CPU = torch.device("cpu")
FP32 = 1e-6
"""Stored weights against the same numbers in fp32."""

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "flux": (
        "FluxTransformer2DModel",
        {
            "in_channels": 16,
            "num_layers": 2,
            "num_single_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 5,
            "joint_attention_dim": 8,
            "pooled_projection_dim": 6,
            "guidance_embeds": True,
            "axes_dims_rope": (4, 6, 6),
        },
    ),
    "flux_schnell": (
        "FluxTransformer2DModel",
        {
            "in_channels": 24,
            "out_channels": 16,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 8,
            "pooled_projection_dim": 6,
            "axes_dims_rope": (4, 6, 6),
        },
    ),
    "sd35_medium": (
        "SD3Transformer2DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 3,
            "attention_head_dim": 64,
            "num_attention_heads": 3,
            "joint_attention_dim": 8,
            "caption_projection_dim": 192,
            "pooled_projection_dim": 6,
            "pos_embed_max_size": 12,
            "sample_size": 12,
            "qk_norm": "rms_norm",
            "dual_attention_layers": (0, 2),
        },
    ),
    "sd3_medium": (
        "SD3Transformer2DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 64,
            "num_attention_heads": 2,
            "joint_attention_dim": 8,
            "caption_projection_dim": 128,
            "pooled_projection_dim": 6,
            "pos_embed_max_size": 12,
            "sample_size": 12,
        },
    ),
    "pixart_sigma": (
        "PixArtTransformer2DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 24,
            "num_layers": 2,
            "cross_attention_dim": 48,
            "caption_channels": 8,
            "use_additional_conditions": False,
        },
    ),
    "pixart_alpha": (
        "PixArtTransformer2DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 24,
            "num_layers": 1,
            "cross_attention_dim": 48,
            "caption_channels": 8,
        },
    ),
}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def theirs(name: str) -> Any:
    """A tiny model of diffusers' own."""
    # The import takes seconds, also of workers that only collect.
    import diffusers

    kind, config = CONFIGS[name]
    model = getattr(diffusers, kind)(**config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def load(path: Path, dtype: torch.dtype = torch.float32, **options: Any) -> DiT:
    return load_model(read_checkpoint(str(path)), dtype, CPU, **options)


def same(one: nn.Module, other: nn.Module) -> bool:
    """Whether all weights are equal, bit for bit."""
    ours, others = one.state_dict(), other.state_dict()
    return ours.keys() == others.keys() and all(torch.equal(ours[key], others[key]) for key in ours)


def run(model: DiT, inputs: dict[str, Any]) -> Tensor:
    with torch.inference_mode():
        out: Tensor = model(SequenceParallel(), **inputs)
    return out


# --- diffusers' folders -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_layout_has_a_place_for_every_parameter(name: str) -> None:
    """By the names and sizes of diffusers' own class."""
    model = theirs(name)
    given = {key: TensorInfo("F32", tuple(tensor.shape)) for key, tensor in model.state_dict().items()}
    told = from_diffusers("here", {**model.config, "_class_name": type(model).__name__}, given)
    family, config = detect({}, told)
    with torch.device("meta"):
        ours = {key: tuple(tensor.shape) for key, tensor in family(config).state_dict().items()}
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    layout = family.diffusers_layout(config)
    assert layout.keys() == shapes.keys()
    for key, place in layout.items():
        rows = place.rows or (0, ours[place.key][0])
        assert shapes[key] == (rows[1], *ours[place.key][1:])


def flux_forward(model: Any, inputs: dict[str, Any]) -> Tensor:
    batch, channels, height, width = inputs["x"].shape
    rows, columns = height // 2, width // 2
    tokens = inputs["x"].reshape(batch, channels, rows, 2, columns, 2).permute(0, 2, 4, 1, 3, 5)
    places = torch.zeros(rows, columns, 3)
    places[..., 1] += torch.arange(rows)[:, None]
    places[..., 2] += torch.arange(columns)
    out = model(
        hidden_states=tokens.reshape(batch, rows * columns, -1),
        encoder_hidden_states=inputs["context"],
        pooled_projections=inputs["y"],
        timestep=inputs["timestep"],
        guidance=inputs["guidance"],
        img_ids=places.reshape(-1, 3),
        txt_ids=torch.zeros(inputs["context"].shape[1], 3),
    ).sample
    out = out.reshape(batch, rows, columns, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return out.reshape(batch, channels, height, width)


def sd3_forward(model: Any, inputs: dict[str, Any]) -> Tensor:
    out: Tensor = model(
        hidden_states=inputs["x"],
        encoder_hidden_states=inputs["context"],
        pooled_projections=inputs["y"],
        timestep=inputs["timestep"],
    ).sample
    return out


@pytest.mark.parametrize(
    ("name", "tiny", "forward"),
    [("flux", FLUX, flux_forward), ("sd35_medium", SD3, sd3_forward), ("sd3_medium", SD3, sd3_forward)],
)
def test_folder_computes_what_diffusers_computes(
    name: str, tiny: Tiny, forward: Callable[[Any, dict[str, Any]], Tensor], tmp_path: Path
) -> None:
    model = theirs(name)
    model.save_pretrained(tmp_path / "m")
    inputs = tiny.inputs(size=(8, 12), text=7)
    with torch.inference_mode():
        expected = forward(model, inputs)
    assert relative_error(run(load(tmp_path / "m"), inputs), expected) <= 1e-6


def test_pixart_folder_is_read(tmp_path: Path) -> None:
    model = theirs("pixart_sigma")
    model.save_pretrained(tmp_path / "m")
    loaded = load(tmp_path / "m")
    assert loaded.family == "pixart"
    assert sum(p.numel() for p in loaded.parameters()) == sum(p.numel() for p in model.parameters())


def save_folder(model: DiT, config: dict[str, Any], folder: Path, shards: int = 1) -> Path:
    """Write a single file's weights as diffusers would."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = in_diffusers(model)
    stem = "diffusion_pytorch_model"
    if shards == 1:
        save_file(tensors, folder / f"{stem}.safetensors")
        return folder
    weight_map = {}
    for shard in range(shards):
        name = f"{stem}-{shard + 1:05}-of-{shards:05}.safetensors"
        mine = {key: tensors[key] for key in list(tensors)[shard::shards]}
        save_file(mine, folder / name)
        weight_map |= dict.fromkeys(mine, name)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
    return folder


FLUX_JSON = {"_class_name": "FluxTransformer2DModel", **CONFIGS["flux"][1]}
SD3_JSON = {"_class_name": "SD3Transformer2DModel", **CONFIGS["sd35_medium"][1]}


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize(("tiny", "config"), [(FLUX, FLUX_JSON), (SD3, SD3_JSON)], ids=["flux", "sd3"])
def test_folder_is_the_single_file_bit_for_bit(tiny: Tiny, config: Any, shards: int, tmp_path: Path) -> None:
    folder = save_folder(tiny.model, config, tmp_path / "m", shards)
    assert same(load(folder), load(tiny.save(tmp_path)))
    inputs = tiny.inputs()
    loaded = load(folder)
    assert_same_model(loaded, tiny.model, run(loaded, inputs), tiny.forward(**inputs))


def test_pipeline_folder_is_read_by_its_transformer(tmp_path: Path) -> None:
    save_folder(FLUX.model, FLUX_JSON, tmp_path / "pipe" / "transformer", 2)
    (tmp_path / "pipe" / "model_index.json").write_text("{}")
    assert locate("pipe", [str(tmp_path)]) == str(tmp_path / "pipe")
    assert same(load(tmp_path / "pipe"), FLUX.model)
    assert read_checkpoint(str(tmp_path / "pipe")).parameters == sum(p.numel() for p in FLUX.model.parameters())


def test_shards_may_be_symlinks_inside_the_roots(tmp_path: Path) -> None:
    """As huggingface_hub's cache has them."""
    folder = save_folder(FLUX.model, FLUX_JSON, tmp_path / "hub" / "snapshots" / "m", 2)
    (tmp_path / "hub" / "blobs").mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        blob = tmp_path / "hub" / "blobs" / str(number)
        path.rename(blob)
        path.symlink_to(os.path.relpath(blob, folder))
    assert locate("hub/snapshots/m", [str(tmp_path)])
    assert same(load(folder), FLUX.model)
    with pytest.raises(ModelNotAllowed, match="blobs"):
        locate(str(folder), [str(folder)])


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return save_folder(FLUX.model, FLUX_JSON, tmp_path / "m", 3)


def shard_of(folder: Path, number: int) -> Path:
    return sorted(folder.glob("*.safetensors"))[number]


def change_index(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = next(folder.glob("*.index.json"))
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


def refused(folder: Path, error: type[ModelError], match: str) -> None:
    """By the supervisor and by the ranks."""
    with pytest.raises(error, match=match):
        read_checkpoint(locate(str(folder), [str(folder.parent)]))
    with pytest.raises(error, match=match):
        load(folder)


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "..\\x.safetensors"]
)
def test_index_that_leads_out_of_its_folder_is_refused(sharded: Path, name: str) -> None:
    (sharded.parent / "outside.safetensors").write_bytes(shard_of(sharded, 0).read_bytes())
    change_index(sharded, lambda index: index["weight_map"].update({"x_embedder.weight": name}))
    refused(sharded, ModelNotAllowed, "leads out of the folder")


def test_shard_that_is_a_link_out_of_the_roots_is_refused(
    sharded: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    outside = tmp_path_factory.mktemp("outside") / "shard.safetensors"
    shard_of(sharded, 1).rename(outside)
    (sharded / "diffusion_pytorch_model-00002-of-00003.safetensors").symlink_to(outside)
    with pytest.raises(ModelNotAllowed, match=str(outside)):
        locate(str(sharded), [str(sharded.parent)])


@pytest.mark.parametrize("value", [3, None, [], {}, "pickle.bin", "a\0.safetensors", ["x.safetensors"]])
def test_index_must_name_shards(sharded: Path, value: Any) -> None:
    if value == ["x.safetensors"]:
        change_index(sharded, lambda index: index.update(weight_map=value))
        refused(sharded, ModelCorrupt, "weight_map")
    else:
        change_index(sharded, lambda index: index["weight_map"].update({"x_embedder.weight": value}))
        refused(sharded, ModelUnsupported, "the index names")


def test_index_that_is_no_text_is_corrupt(sharded: Path) -> None:
    change_index(sharded, lambda index: index["weight_map"].update({"x_embedder.weight": "\ud800.safetensors"}))
    refused(sharded, ModelCorrupt, "is not a JSON object")


def test_missing_shard_is_named(sharded: Path) -> None:
    shard_of(sharded, 1).unlink()
    refused(sharded, ModelCorrupt, "lacks the shard .*00002-of-00003")


def test_truncated_shard_is_named(sharded: Path) -> None:
    path = shard_of(sharded, 2)
    os.truncate(path, path.stat().st_size - 1)
    refused(sharded, ModelCorrupt, "00003-of-00003.safetensors is truncated")


def test_shard_without_what_the_index_places_there_is_corrupt(sharded: Path) -> None:
    change_index(sharded, lambda index: index["weight_map"].update({"x_embedder.weight": shard_of(sharded, 2).name}))
    refused(sharded, ModelCorrupt, "lacks 'x_embedder.weight'")


def test_two_shards_with_one_tensor_are_corrupt(sharded: Path) -> None:
    first, second = shard_of(sharded, 0), shard_of(sharded, 1)
    save_file({**load_file(first), **load_file(second)}, second)
    refused(sharded, ModelCorrupt, "two shards hold")


def test_missing_tensor_of_a_fused_one_is_named(sharded: Path) -> None:
    path, key = shard_of(sharded, 0), "transformer_blocks.0.attn.to_k.weight"
    for number in range(3):
        path = shard_of(sharded, number)
        tensors = load_file(path)
        if tensors.pop(key, None) is not None:
            save_file(tensors, path)
    change_index(sharded, lambda index: index["weight_map"].pop(key))
    with pytest.raises(ModelCorrupt, match=key):
        load(sharded)


def test_unknown_tensor_of_a_folder_is_named(sharded: Path) -> None:
    path = shard_of(sharded, 0)
    save_file({**load_file(path), "controlnet_x_embedder.weight": torch.zeros(2, 2)}, path)
    with pytest.raises(ModelUnsupported, match=r"controlnet_x_embedder\.weight"):
        load(sharded)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"_class_name": "UNet2DConditionModel"}, ModelUnsupported, "UNet2DConditionModel.*FluxTransformer2DModel"),
        ({"_class_name": ["x"]}, ModelUnsupported, "_class_name"),
        ({"num_layers": "2"}, ModelUnsupported, "num_layers"),
        ({"num_layers": 10**9}, ModelUnsupported, "num_layers"),
        ({"axes_dims_rope": 3}, ModelUnsupported, "axes_dim"),
        ({"guidance_embeds": None}, ModelUnsupported, "guidance_embed"),
        ({"num_layers": 3}, ModelCorrupt, r"lacks transformer_blocks\.2"),
        ({"num_layers": 1}, ModelUnsupported, r"doesn't use: transformer_blocks\.1"),
    ],
)
def test_config_that_does_not_fit_is_refused(
    sharded: Path, change: dict[str, Any], error: type[ModelError], match: str
) -> None:
    (sharded / "config.json").write_text(json.dumps({**FLUX_JSON, **change}))
    with pytest.raises(error, match=match):
        load(sharded)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, "\xff"])
def test_config_must_be_json(sharded: Path, text: str) -> None:
    (sharded / "config.json").write_bytes(text.encode("latin1"))
    refused(sharded, ModelCorrupt, "config.json is not a JSON object")


def test_folder_with_pickles_only_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(FLUX_JSON))
    (folder / "diffusion_pytorch_model.bin").touch()
    refused(folder, ModelUnsupported, "has neither")


def test_identity_covers_every_file(sharded: Path) -> None:
    seen = {read_checkpoint(str(sharded)).identity}
    for path in [*sharded.glob("*.safetensors")]:
        os.utime(path, ns=(10**18, 10**18))
        seen.add(read_checkpoint(str(sharded)).identity)
    (sharded / "config.json").write_text(json.dumps(FLUX_JSON, indent=1))
    seen.add(read_checkpoint(str(sharded)).identity)
    change_index(sharded, lambda index: index.update(metadata={}))
    seen.add(read_checkpoint(str(sharded)).identity)
    assert len(seen) == 6


# --- 8-bit floats -----------------------------------------------------------------------------------------------------


def describe(tiny: Tiny) -> dict[str, str]:
    return {"tacod.config": json.dumps(tiny.config)}


def is_matrix(key: str, tensor: Tensor) -> bool:
    return tensor.ndim == 2 and key.endswith(".weight")


def save_fp8(tiny: Tiny, path: Path, names: tuple[str, str] | None, prefix: str = "") -> dict[str, Tensor]:
    """Matrices in 8 bits, the rest in bf16; returns all as numbers. ``names`` are the scales', of weight and input."""
    tensors, numbers = {}, {}
    for key, tensor in tiny.model.state_dict().items():
        tensor = tensor.clone()
        if not is_matrix(key, tensor):
            tensors[key] = tensor.bfloat16()
            numbers[key] = tensors[key].float()
        elif names is None:
            tensors[key] = tensor.to(torch.float8_e4m3fn)
            numbers[key] = tensors[key].float()
        else:
            layer, scale = key.removesuffix(".weight"), tensor.abs().max() / 448
            tensors[key] = (tensor / scale).to(torch.float8_e4m3fn)
            tensors[f"{layer}.{names[0]}"] = scale
            tensors[f"{layer}.{names[1]}"] = torch.tensor(0.5)
            numbers[key] = tensors[key].float() * scale
    if names is not None:
        tensors["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    save_file({prefix + key: tensor for key, tensor in tensors.items()}, path, metadata=describe(tiny))
    return numbers


def filled(tiny: Tiny, numbers: dict[str, Tensor]) -> DiT:
    """The model with these numbers as plain weights."""
    model = copy.deepcopy(tiny.model)
    model.load_state_dict(numbers)
    return model


def check_stored(model: DiT, expected: DiT, inputs: dict[str, Any]) -> None:
    """Every linear layer is stored, its numbers are right, and so is a forward."""
    kinds = {type(module) for module in model.modules()}
    assert any(issubclass(kind, PackedLinear) for kind in kinds)
    assert nn.Linear not in kinds
    for key, tensor in expected.state_dict().items():
        assert torch.equal(get_weight(model, key), tensor), key
    assert model.dtype == torch.float32
    assert relative_error(run(model, inputs), run(expected, inputs)) <= FP32


@pytest.mark.parametrize(
    "names", [None, ("scale_weight", "scale_input"), ("weight_scale", "input_scale")], ids=["plain", "old", "new"]
)
@pytest.mark.parametrize("tiny", [FLUX, SD3], ids=lambda tiny: tiny.name)
def test_8_bit_floats_are_kept_and_cast_where_they_are_used(
    tiny: Tiny, names: tuple[str, str] | None, tmp_path: Path
) -> None:
    numbers = save_fp8(tiny, tmp_path / "m.safetensors", names)
    check_stored(load(tmp_path / "m.safetensors"), filled(tiny, numbers), tiny.inputs())


def test_scaled_file_inside_a_checkpoint_is_read(tmp_path: Path) -> None:
    numbers = save_fp8(FLUX, tmp_path / "m", ("scale_weight", "scale_input"), "model.diffusion_model.")
    check_stored(load(tmp_path / "m"), filled(FLUX, numbers), FLUX.inputs())


def test_scale_of_a_weight_that_is_not_stored_counts_too(tmp_path: Path) -> None:
    weights = {**FLUX.model.state_dict(), "img_in.scale_weight": torch.tensor([0.5])}
    save_file(weights, tmp_path / "m", metadata=describe(FLUX))
    assert torch.equal(get_weight(load(tmp_path / "m"), "img_in.weight"), 0.5 * weights["img_in.weight"])


def test_8_bit_folder_is_kept_in_8_bits(tmp_path: Path) -> None:
    numbers = save_fp8(FLUX, tmp_path / "single.safetensors", None)
    model = copy.deepcopy(FLUX.model)
    for key, tensor in load_file(tmp_path / "single.safetensors").items():
        owner = model.get_submodule(key.rpartition(".")[0])
        setattr(owner, key.rpartition(".")[2], nn.Parameter(tensor, requires_grad=False))
    folder = save_folder(model, FLUX_JSON, tmp_path / "m", 2)
    check_stored(load(folder), filled(FLUX, numbers), FLUX.inputs())


@pytest.mark.parametrize("shape", [(80,), (80, 1), (0,)])
def test_scale_of_a_weight_that_is_not_stored_must_be_one_number(tmp_path: Path, shape: tuple[int, ...]) -> None:
    weights = {**FLUX.model.state_dict(), "img_in.weight_scale": torch.ones(shape)}
    save_file(weights, tmp_path / "m", metadata=describe(FLUX))
    with pytest.raises(ModelUnsupported, match=r"tensors that this family doesn't use: img_in\.weight_scale"):
        load(tmp_path / "m")


@pytest.mark.parametrize(
    ("name", "size"),
    [
        *(("img_in.weight_scale_2", 1), ("img_in.norm", 1), ("double_blocks.0.img_attn.scale", 0)),
        *(("img_out.weight", 1), ("img_out.bias", 1), ("bias", 0), ("__x0__", 0)),
        *(("lora.up", 2), ("model_type.Flux", 2)),
    ],
)
def test_unknown_tensors_are_refused_by_name(tmp_path: Path, name: str, size: int) -> None:
    save_file({**FLUX.model.state_dict(), name: torch.ones(size)}, tmp_path / "m", metadata=describe(FLUX))
    with pytest.raises(ModelUnsupported, match=name):
        load(tmp_path / "m")


@pytest.mark.parametrize("value", [torch.ones(1), torch.ones(()), torch.ones(0), torch.ones(1, 1, dtype=torch.int64)])
@pytest.mark.parametrize("name", ["model_type.SkyReels-V2-T2V-14B-540P", "version", "trainer.step"])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_notes_of_whoever_saved_the_file_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, prefix: str, name: str, value: Tensor
) -> None:
    weights = {prefix + key: each for key, each in {**FLUX.model.state_dict(), name: value}.items()}
    save_file(weights, tmp_path / "m", metadata=describe(FLUX))
    with caplog.at_level(logging.INFO):
        assert same(load(tmp_path / "m"), FLUX.model)
    assert f"1 tensors are no weights, and left out: {name}" in caplog.text


def test_unknown_dtype_is_refused_by_name(tmp_path: Path) -> None:
    weights = {**FLUX.model.state_dict(), "img_in.weight": torch.zeros(80, 16, dtype=torch.int8)}
    save_file(weights, tmp_path / "m", metadata=describe(FLUX))
    with pytest.raises(ModelUnsupported, match=r"img_in\.weight is I8"):
        load(tmp_path / "m")


# --- GGUF -------------------------------------------------------------------------------------------------------------

WIDE = Tiny(
    "wide_flux",
    {
        **FLUX.config,
        "in_channels": 64,
        "out_channels": 4,
        "hidden_size": 256,
        "num_heads": 16,
        "context_in_dim": 256,
        "vec_in_dim": 256,
        "depth": 1,
        "depth_single_blocks": 1,
    },
)
"""Its rows are whole blocks of 256."""


def wide_inputs() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"x": (1, 64, 8, 6), "context": (1, 9, 256), "y": (1, 256)}
    inputs: dict[str, Any] = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    return {**inputs, "timestep": torch.tensor([0.7373]), "guidance": torch.tensor([3.5])}


def save_gguf(tiny: Tiny, path: Path, kind: str, prefix: str = "") -> dict[str, Tensor]:
    """Matrices in random blocks, the rest in fp32, a bias in fp16 and one in bf16; returns all as numbers."""
    plain, tensors = {"img_in.bias": "F16", "txt_in.bias": "BF16"}, {}
    for seed, (key, tensor) in enumerate(tiny.model.state_dict().items()):
        if is_matrix(key, tensor):
            tensors[key] = Stored(random_blocks(kind, *tensor.shape, seed), kind)
        else:
            tensors[key] = as_stored(tensor, plain.get(key, "F32"))
    write(path, {prefix + key: stored for key, stored in tensors.items()}, json.dumps(tiny.config))
    return {key: stored.numbers for key, stored in tensors.items()}


@pytest.mark.parametrize(("kind", "prefix"), [("Q4_K", "model.diffusion_model."), *((kind, "") for kind in BLOCKS)])
def test_gguf_is_kept_and_dequantized_where_it_is_used(kind: str, prefix: str, tmp_path: Path) -> None:
    numbers = save_gguf(WIDE, tmp_path / "m.gguf", kind, prefix)
    assert locate("m.gguf", [str(tmp_path)])
    checkpoint = read_checkpoint(str(tmp_path / "m.gguf"))
    assert checkpoint.tensors["img_in.weight"] == TensorInfo(kind, (256, 256))
    assert checkpoint.parameters == sum(p.numel() for p in WIDE.model.parameters())
    check_stored(load(tmp_path / "m.gguf"), filled(WIDE, numbers), wide_inputs())


def test_family_is_detected_from_gguf_s_names_and_sizes(tmp_path: Path) -> None:
    save_gguf(WIDE, tmp_path / "m.gguf", "Q8_0")
    checkpoint = read_checkpoint(str(tmp_path / "m.gguf"))
    family, found = detect(checkpoint.tensors)
    assert family is type(WIDE.model)
    assert (found["hidden_size"], found["in_channels"], found["depth"]) == (256, 64, 1)


def test_truncated_gguf_is_corrupt_wherever_it_ends(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    save_gguf(WIDE, path, "Q4_K")
    whole = path.read_bytes()
    header = whole.index(b"single_blocks.0.linear1.weight") + 100
    for size in [*range(0, header, 37), header, len(whole) // 2, len(whole) - 4 * 1024]:
        path.write_bytes(whole[:size])
        with pytest.raises(ModelCorrupt):
            read_checkpoint(str(path))


# --- memory, progress, alteration -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One model in every kind of file."""
    folder = tmp_path_factory.mktemp("kinds")
    files = {kind: folder / f"{kind}.gguf" for kind in BITS if kind in BLOCKS}
    for kind, path in files.items():
        save_gguf(WIDE, path, kind)
    save_fp8(WIDE, folder / "fp8.safetensors", None)
    save_fp8(WIDE, folder / "scaled.safetensors", ("scale_weight", "scale_input"))
    weights = {key: value.bfloat16() for key, value in WIDE.model.state_dict().items()}
    save_file(weights, folder / "bf16.safetensors", metadata=describe(WIDE))
    return {
        "bf16": folder / "bf16.safetensors",
        "fp8": folder / "fp8.safetensors",
        "scaled": folder / "scaled.safetensors",
        **files,
    }


BITS = {"bf16": 16, "fp8": 8, "scaled": 8, "Q8_0": 8.5, "Q6_K": 6.5625, "Q5_1": 6, "Q4_K": 4.5, "IQ4_NL": 4.5}


@pytest.mark.parametrize("name", BITS)
def test_memory_is_what_the_file_takes(kinds: dict[str, Path], name: str) -> None:
    """Matrices in the file's bits, a scale of 4 bytes where there is one, and the rest in the compute dtype."""
    model = load(kinds[name], torch.bfloat16)
    shapes = [(key, tensor) for key, tensor in WIDE.model.state_dict().items()]
    matrices = [tensor.numel() for key, tensor in shapes if is_matrix(key, tensor)]
    rest = sum(tensor.numel() for key, tensor in shapes if not is_matrix(key, tensor))
    scales = 4 * len(matrices) if name == "scaled" else 0
    assert weight_bytes(model) == sum(matrices) * BITS[name] / 8 + 2 * rest + scales
    # What the daemon tells about a model doesn't depend on how it is stored.
    state = model.state_dict()
    assert {key: value.shape for key, value in state.items()} == {key: value.shape for key, value in shapes}
    assert sum(value.numel() for value in state.values()) == sum(matrices) + rest


def test_compute_dtype_is_as_asked_or_the_device_s(kinds: dict[str, Path]) -> None:
    cuda = torch.device("cuda")
    for path in kinds.values():
        checkpoint = read_checkpoint(str(path))
        assert choose_dtype(checkpoint, None, CPU) == "fp32"
        assert choose_dtype(checkpoint, None, cuda) == "bf16"
        assert choose_dtype(checkpoint, "fp16", cuda) == "fp16"
    assert load(kinds["Q4_K"], torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("name", BITS)
def test_progress_counts_to_the_end(kinds: dict[str, Path], name: str) -> None:
    seen: list[tuple[int, int]] = []
    load(kinds[name], progress=lambda done, total: seen.append((done, total)))
    totals = {total for _, total in seen}
    done = [done for done, _ in seen]
    assert len(totals) == 1
    assert done == sorted(done)
    assert done[-1] == totals.pop()
    assert 0.8 * kinds[name].stat().st_size < done[-1] < kinds[name].stat().st_size


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-8, os.SEEK_END)
        file.write(b"altered!")


def lengthen(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x")


@pytest.mark.parametrize("alter", [truncate, overwrite, lengthen])
@pytest.mark.parametrize("during", [False, True], ids=["before", "during"])
def test_file_that_is_altered_while_it_is_loaded_is_corrupt(
    kinds: dict[str, Path], tmp_path: Path, alter: Callable[[Path], None], during: bool
) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(kinds["Q4_K"].read_bytes())
    os.utime(path, ns=(10**18, 10**18))
    checkpoint = read_checkpoint(str(path))
    calls: Iterator[int] = iter(range(10**6))

    def progress(done: int, total: int) -> None:
        if next(calls) == 3:
            alter(path)

    if not during:
        alter(path)
    with pytest.raises(ModelCorrupt, match="changed while it was being loaded"):
        load_model(checkpoint, torch.float32, CPU, progress if during else None)


def test_file_that_goes_before_it_is_loaded_is_corrupt(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(str(FLUX.save(tmp_path)))
    Path(checkpoint.path).unlink()
    with pytest.raises(ModelCorrupt, match="went while"):
        load_model(checkpoint, torch.float32, CPU)


def test_file_may_change_once_it_is_loaded(tmp_path: Path) -> None:
    path = FLUX.save(tmp_path)
    model = load(path)
    path.write_bytes(bytes(path.stat().st_size))
    assert same(model, FLUX.model)


def test_no_file_stays_open(kinds: dict[str, Path]) -> None:
    before = len([*Path("/proc/self/fd").iterdir()])
    load(kinds["Q4_K"])
    assert len([*Path("/proc/self/fd").iterdir()]) == before


def test_folder_without_permission_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound):
        read_checkpoint(str(tmp_path / "none"))


# --- changing weights -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BITS)
def test_shared_model_is_the_same_tensors(kinds: dict[str, Path], name: str) -> None:
    model = load(kinds[name])
    twin = share(model)
    assert type(twin) is type(model)
    assert twin is not model
    assert weight_bytes(model, twin) == weight_bytes(twin) == weight_bytes(model)
    ours, others = ([*each.parameters(), *each.buffers()] for each in (model, twin))
    assert all(one is other for one, other in zip(ours, others, strict=True))
    assert not set(map(id, model.modules())) & set(map(id, twin.modules()))
    assert torch.equal(run(model, wide_inputs()), run(twin, wide_inputs()))


def test_compiled_blocks_are_shared_as_they_were_before(kinds: dict[str, Path]) -> None:
    """A compiled module's call is bound to the module, and so to its weights."""
    model = load(kinds["bf16"])
    block = model.get_submodule("double_blocks.0")
    block._compiled_call_impl = block._call_impl  # as block.compile() does
    twin = share(model)
    assert block._compiled_call_impl is not None
    assert twin.get_submodule("double_blocks.0")._compiled_call_impl is None


@pytest.mark.parametrize("name", BITS)
def test_to_set_a_weight_changes_one_model_only(kinds: dict[str, Path], name: str) -> None:
    key, bias = "double_blocks.0.img_attn.qkv.weight", "double_blocks.0.img_attn.qkv.bias"
    model = load(kinds[name], torch.bfloat16)
    before, size = get_weight(model, key).clone(), weight_bytes(model)
    twin = share(model)
    patched = torch.randn(768, 256)
    set_weight(twin, key, patched)
    set_weight(twin, "final_layer.linear.bias", torch.ones(16))
    assert torch.equal(get_weight(twin, key), patched.bfloat16())
    assert torch.equal(get_weight(model, key), before)
    assert get_weight(twin, bias) is get_weight(model, bias)
    assert type(twin.get_submodule(key.removesuffix(".weight"))) is nn.Linear
    assert weight_bytes(model) == size
    assert weight_bytes(model, twin) == size + 2 * (768 * 256 + 16)
    inputs = {k: v.bfloat16() if v.ndim > 1 else v for k, v in wide_inputs().items()}
    assert not torch.equal(run(model, inputs), run(twin, inputs))


def test_patched_stored_layer_computes_what_a_plain_one_does(kinds: dict[str, Path]) -> None:
    model = load(kinds["Q4_K"])
    before = run(model, wide_inputs())
    for key in model.state_dict():
        set_weight(model, key, get_weight(model, key))
    assert not any(isinstance(module, PackedLinear) for module in model.modules())
    assert relative_error(run(model, wide_inputs()), before) <= FP32


def test_own_dtype_is_kept_by_what_is_not_stored(kinds: dict[str, Path]) -> None:
    model = load(kinds["fp8"], torch.bfloat16)
    assert get_weight(model, "img_in.weight").dtype == torch.float32
    assert get_weight(model, "img_in.bias").dtype == torch.bfloat16


@pytest.mark.parametrize("key", ["none", "img_in.none", "none.weight", "img_in.data", "img_in", ""])
def test_unknown_weight_is_a_key_error(kinds: dict[str, Path], key: str) -> None:
    model = load(kinds["fp8"])
    with pytest.raises(KeyError):
        get_weight(model, key)
    with pytest.raises(KeyError):
        set_weight(model, key, torch.zeros(1))


def test_weight_of_another_shape_is_refused(kinds: dict[str, Path]) -> None:
    model = load(kinds["Q4_K"])
    for key in ("img_in.weight", "img_in.bias"):
        with pytest.raises(ValueError, match=key):
            set_weight(model, key, torch.zeros(3, 3))


def test_layers_compile(kinds: dict[str, Path]) -> None:
    """Stored layers trace without a break, so that compiled blocks stay whole."""
    for name in BITS:
        module = load(kinds[name]).get_submodule("img_in")
        traced = torch.export.export(module, (torch.randn(3, 256),)).module()
        x = torch.randn(3, 256)
        assert torch.allclose(traced(x), module(x))

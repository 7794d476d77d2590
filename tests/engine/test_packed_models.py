"""Whole quantized models against ComfyUI's forwards of the same files, and files that aren't right."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import FLUX, quantized_golden_names, read_golden, relative_error
from rank_worker import WORLD, Ranks
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tacod.checkpoint import read_checkpoint
from tacod.rank.families.base import DiT
from tacod.rank.families.names import Place
from tacod.rank.ops.packed.base import PackedLinear
from tacod.rank.ops.packed.float8 import Float8Linear, Mxfp8Linear, Nvfp4Linear
from tacod.rank.ops.packed.integers import Int8Linear, W4A8Linear
from tacod.rank.parallel.sequence import SequenceParallel
from tacod.rank.weights.load import load_model, weight_bytes
from tacod_client.errors import ModelCorrupt, ModelUnsupported

CPU = torch.device("cpu")
FLUX_JSON: dict[str, Any] = {
    "_class_name": "FluxTransformer2DModel",
    "axes_dims_rope": FLUX.config["axes_dim"],
    "guidance_embeds": FLUX.config["guidance_embed"],
    "num_attention_heads": FLUX.config["num_heads"],
    "num_layers": FLUX.config["depth"],
    "num_single_layers": FLUX.config["depth_single_blocks"],
}
GOLDENS = quantized_golden_names()
KINDS: dict[str, type] = {
    "float8_e4m3fn": Float8Linear,
    "mxfp8": Mxfp8Linear,
    "nvfp4": Nvfp4Linear,
    "int8_tensorwise": Int8Linear,
    "asym_w4a8_int8": W4A8Linear,
}
FLOATS = ("quantised/z_image_fp8", "quantised/flux2_klein_nvfp4", "quantised/z_image_mxfp8")


@pytest.mark.parametrize("name", GOLDENS)
def test_equals_comfyui(name: str) -> None:
    golden = read_golden(name)
    assert golden.packed
    assert golden.error(SequenceParallel()) <= golden.fp32


@pytest.mark.parametrize("layout", [(1, 2, 1), (1, 3, 1), (1, 1, 2)], ids=str)
@pytest.mark.parametrize("name", GOLDENS)
def test_equals_comfyui_on_several_ranks(ranks: Ranks, name: str, layout: tuple[int, ...]) -> None:
    errors = ranks.run(layout, "golden", name=name, sharing=False)
    assert len(errors) == WORLD
    assert max(errors) <= read_golden(name).fp32


def wide(model: DiT, key: str, weight: Tensor) -> bool:
    return weight.dtype == torch.bfloat16 and model.dtype_of(key, torch.bfloat16) == torch.float32


@pytest.mark.parametrize("name", GOLDENS)
def test_what_is_packed_stays_packed(name: str) -> None:
    golden = read_golden(name)
    model = golden.model(torch.bfloat16)
    told = Counter(
        KINDS[json.loads(bytes(golden.weights[key].numpy()))["format"]]
        for key in golden.weights
        if key.endswith("comfy_quant")
    )
    found = kinds(model)
    assert found == told
    stored = sum(each.nbytes for key, each in golden.weights.items() if not key.endswith("comfy_quant"))
    # Those that are fp32 in any compute dtype.
    stored += sum(2 * each.numel() for key, each in golden.weights.items() if wide(model, key, each))
    # nvfp4 has a table of 16 levels for each layer.
    assert weight_bytes(model) <= stored + 64 * sum(found.values())


@pytest.mark.parametrize("name", FLOATS)
def test_is_near_comfyui_in_bf16(name: str) -> None:
    assert read_golden(name).error(SequenceParallel(), torch.bfloat16) <= 1.5e-2


def test_activations_of_whole_numbers_stay_as_they_are_if_asked(tmp_path: Path) -> None:
    golden = read_golden("quantised/krea2_int8_convrot")
    path = tmp_path / "model.safetensors"
    golden.save(path)
    model = load_model(read_checkpoint(str(path)), torch.float32, CPU, weight_only=True)
    with torch.inference_mode():
        out = model.run(SequenceParallel(), golden.arguments(model))
    with safe_open(
        Path(__file__).parents[1] / "data" / "golden" / "quantised/krea2_int8_convrot.safetensors", "pt"
    ) as file:
        told = float(file.metadata()["error_dequantised"])
    assert isinstance(out, torch.Tensor)
    assert 0.7 * told < relative_error(out, golden.out) < 1.4 * told


def kinds(model: Any) -> Counter[type]:
    """How many packed layers there are of which class."""
    return Counter(type(each) for each in model.modules() if isinstance(each, PackedLinear))


def whole(name: str) -> dict[str, torch.Tensor]:
    return dict(read_golden(name).weights)


def load(tmp_path: Path, name: str, weights: dict[str, torch.Tensor], **metadata: Any) -> Any:
    path = tmp_path / "model.safetensors"
    texts = {
        "tacod.config": json.dumps(read_golden(name).config),
        **{key: json.dumps(each) for key, each in metadata.items()},
    }
    save_file(weights, path, metadata=texts)
    return load_model(read_checkpoint(str(path)), torch.float32, CPU)


INT8 = "quantised/krea2_int8_convrot"
W4A8 = "quantised/krea2_asym_w4a8_int8"
NVFP4 = "quantised/flux2_klein_nvfp4"
MXFP8 = "quantised/z_image_mxfp8"
FP8 = "quantised/z_image_fp8"


def first(weights: dict[str, torch.Tensor], leaf: str) -> str:
    return next(key for key in sorted(weights) if key.endswith(f".{leaf}"))


@pytest.mark.parametrize(
    ("name", "leaf"),
    [
        (INT8, "weight_scale"),
        (W4A8, "weight_s_rel"),
        (W4A8, "weight_s_channel"),
        (NVFP4, "weight_scale"),
        (NVFP4, "weight_scale_2"),
        (MXFP8, "weight_scale"),
        (FP8, "weight_scale"),
    ],
)
def test_a_scale_that_is_missing_of_another_shape_or_no_number(tmp_path: Path, name: str, leaf: str) -> None:
    weights = whole(name)
    key = first(weights, leaf)
    good = weights[key]
    layer = key.rpartition(".")[0]
    with pytest.raises(ModelCorrupt, match=f"lacks {key}, and {layer} is packed as"):
        load(tmp_path, name, {each: tensor for each, tensor in weights.items() if each != key})
    with pytest.raises(ModelCorrupt, match=f"{key} is .*, but the layer is packed as"):
        load(
            tmp_path,
            name,
            {
                **weights,
                key: torch.cat((good.reshape(-1).view(torch.uint8).clone(), torch.zeros(9, dtype=torch.uint8))).view(
                    torch.uint8
                ),
            },
        )
    bad = good.clone()
    if bad.dtype.itemsize == 1:
        bad.view(torch.uint8).view(-1)[0] = 0xFF
    else:
        bad.view(-1)[0] = float("nan")
    with pytest.raises(ModelCorrupt, match=f"{key} holds numbers that aren't finite"):
        load(tmp_path, name, {**weights, key: bad})


def described(said: Any) -> torch.Tensor:
    raw = said if isinstance(said, bytes) else json.dumps(said).encode()
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("said", "error", "words"),
    [
        ({"format": "int3_odd"}, ModelUnsupported, "is packed as 'int3_odd'; this version reads float8_e4m3fn"),
        ({}, ModelUnsupported, "is packed as None"),
        (b"{", ModelCorrupt, "is not JSON"),
        (b"[1]", ModelCorrupt, "is no JSON object"),
        ({"format": "nvfp4"}, ModelCorrupt, "whose weights are matrices of U8"),
        ({"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 24}, ModelCorrupt, "no groups of 24"),
        ({"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": "x"}, ModelCorrupt, "which is no size"),
        ({"format": "int8_tensorwise", "num_experts": 4}, ModelUnsupported, "by experts"),
    ],
)
def test_a_description_that_isnt_right_is_refused_by_layer(
    tmp_path: Path, said: Any, error: type[Exception], words: str
) -> None:
    weights = whole(INT8)
    key = first(weights, "comfy_quant")
    with pytest.raises(error, match=words) as caught:
        load(tmp_path, INT8, {**weights, key: described(said)})
    assert key.rpartition(".")[0] in str(caught.value)


@pytest.mark.parametrize("said", [{"format": "int3_odd"}, b"{"], ids=["another format", "no JSON"])
@pytest.mark.parametrize("name", GOLDENS)
def test_a_model_is_found_beside_one_that_is_packed_in_another_way(tmp_path: Path, name: str, said: Any) -> None:
    golden = read_golden(name)
    weights = {f"denoiser.{key}": each for key, each in golden.weights.items()}
    layer = "text_encoders.words.0"
    text = {f"{layer}.weight": torch.zeros(8, 4, dtype=torch.uint8), f"{layer}.comfy_quant": described(said)}
    model = load(tmp_path, name, {**weights, **text})
    with torch.inference_mode():
        out = model.run(SequenceParallel(), golden.arguments(model))
    assert relative_error(out, golden.out) <= golden.fp32


def test_a_weight_without_a_description_is_refused(tmp_path: Path) -> None:
    weights = whole(INT8)
    key = first(weights, "comfy_quant")
    del weights[key]
    with pytest.raises(ModelUnsupported, match=key.rpartition(".")[0]):
        load(tmp_path, INT8, weights)


def test_the_metadata_says_it_too_and_goes_first(tmp_path: Path) -> None:
    golden, weights = read_golden(INT8), whole(INT8)
    names = [key for key in weights if key.endswith(".comfy_quant")]
    said = {key.removesuffix(".comfy_quant"): json.loads(bytes(weights[key].numpy())) for key in names}
    bare = {key: each for key, each in weights.items() if key not in names}
    wrong = {key: described({"format": "int3_odd"}) for key in names}
    for given in (bare, {**bare, **wrong}):
        model = load(tmp_path, INT8, given, _quantization_metadata={"format_version": "1.0", "layers": said})
        with torch.inference_mode():
            out = model.run(SequenceParallel(), golden.arguments(model))
        assert relative_error(out, golden.out) <= golden.fp32


def test_a_model_behind_a_prefix(tmp_path: Path) -> None:
    golden = read_golden(W4A8)
    weights = {f"model.diffusion_model.{key}": each for key, each in golden.weights.items()}
    model = load(tmp_path, W4A8, weights)
    with torch.inference_mode():
        out = model.run(SequenceParallel(), golden.arguments(model))
    assert relative_error(out, golden.out) <= golden.fp32


def packed_folder(folder: Path, by_row: bool) -> tuple[Path, Path]:
    """Flux.1 in int8, as one file under the authors' names, and as a folder under diffusers'; in that order."""
    tensors: dict[str, torch.Tensor] = {}
    for key, tensor in FLUX.model.state_dict().items():
        if tensor.ndim != 2 or "block" not in key:
            tensors[key] = tensor
            continue
        largest = tensor.abs().amax(dim=1, keepdim=True) if by_row else tensor.abs().max()
        tensors[key] = (tensor / largest * 127).round().to(torch.int8)
        tensors[key.replace(".weight", ".weight_scale")] = largest / 127
        tensors[key.replace(".weight", ".comfy_quant")] = described({"format": "int8_tensorwise"})
    single, theirs = folder / "single.safetensors", folder / "diffusers"
    save_file(tensors, single, metadata={"tacod.config": json.dumps(FLUX.config)})
    theirs.mkdir()
    renamed: dict[str, torch.Tensor] = {}
    for name, place in type(FLUX.model).diffusers_layout(FLUX.config).items():

        def part(key: str, place: Place = place) -> torch.Tensor:
            rows = tensors[key]
            if place.rows is not None and rows.ndim and len(rows) > 1:
                rows = rows.narrow(0, *place.rows)
            return torch.cat(rows.chunk(2)[::-1]).contiguous() if place.swap else rows.contiguous()

        renamed[name] = part(place.key)
        if tensors[place.key].dtype == torch.int8:
            layer, ours = name.removesuffix(".weight"), place.key.removesuffix(".weight")
            renamed[f"{layer}.weight_scale"] = part(f"{ours}.weight_scale")
            renamed[f"{layer}.comfy_quant"] = tensors[f"{ours}.comfy_quant"]
    renamed = {name: each.clone() for name, each in renamed.items()}
    save_file(renamed, theirs / "diffusion_pytorch_model.safetensors")
    (theirs / "config.json").write_text(json.dumps(FLUX_JSON))
    return single, theirs


def test_a_diffusers_folder_with_a_scale_for_each_row_is_the_single_file(tmp_path: Path) -> None:
    single, theirs = (
        load_model(read_checkpoint(str(path)), torch.float32, CPU) for path in packed_folder(tmp_path, True)
    )
    assert kinds(single) == kinds(theirs)
    assert set(kinds(single)) == {Int8Linear}
    inputs = FLUX.inputs()
    with torch.inference_mode():
        one, other = (model(SequenceParallel(), **inputs) for model in (single, theirs))
    assert torch.equal(one, other)


def test_a_diffusers_folder_with_one_scale_a_layer_cant_be_put_together(tmp_path: Path) -> None:
    _, theirs = packed_folder(tmp_path, False)
    with pytest.raises(ModelUnsupported, match=r"weight_scale.* can't be put together in .*qkv"):
        load_model(read_checkpoint(str(theirs)), torch.float32, CPU)


@pytest.mark.parametrize(
    ("name", "leaf"),
    [(INT8, "pre_quant_scale"), (FP8, "pre_quant_scale"), (MXFP8, "weight_scale_2"), (NVFP4, "weight_codebook")],
)
def test_what_a_format_has_no_use_for_is_refused_and_not_dropped(tmp_path: Path, name: str, leaf: str) -> None:
    weights = whole(name)
    layer = first(weights, "comfy_quant").rpartition(".")[0]
    with pytest.raises(ModelUnsupported, match=rf"{layer}\.{leaf} isn't read for the format"):
        load(tmp_path, name, {**weights, f"{layer}.{leaf}": torch.ones(())})


def test_an_input_scale_beside_whole_numbers_isnt_used(tmp_path: Path) -> None:
    golden, weights = read_golden(INT8), whole(INT8)
    layer = first(weights, "comfy_quant").rpartition(".")[0]
    model = load(tmp_path, INT8, {**weights, f"{layer}.input_scale": torch.tensor(7.0)})
    with torch.inference_mode():
        out = model.run(SequenceParallel(), golden.arguments(model))
    assert relative_error(out, golden.out) <= golden.fp32


def test_a_codebook_of_any_shape(tmp_path: Path) -> None:
    golden, weights = read_golden(W4A8), whole(W4A8)
    key = first(weights, "weight_codebook")
    model = load(tmp_path, W4A8, {**weights, key: weights[key].reshape(1, 16)})
    with torch.inference_mode():
        out = model.run(SequenceParallel(), golden.arguments(model))
    assert relative_error(out, golden.out) <= golden.fp32


def flux_output(path: Path) -> torch.Tensor:
    model = load_model(read_checkpoint(str(path)), torch.float32, CPU)
    with torch.inference_mode():
        out: torch.Tensor = model(SequenceParallel(), **FLUX.inputs())
    return out


def test_shards_may_each_describe_their_own_layers(tmp_path: Path) -> None:
    single, theirs = packed_folder(tmp_path, True)
    whole_file = theirs / "diffusion_pytorch_model.safetensors"
    tensors = load_file(whole_file)
    whole_file.unlink()
    said = {
        key.removesuffix(".comfy_quant"): json.loads(bytes(tensors.pop(key).numpy()))
        for key in sorted(tensors)
        if key.endswith(".comfy_quant")
    }
    placed: dict[str, str] = {}
    for at in range(2):
        shard = f"diffusion_pytorch_model-0000{at + 1}-of-00002.safetensors"
        # A layer's tensors may be in different shards.
        own = {key: tensors[key] for key in sorted(tensors)[at::2]}
        text = json.dumps({"layers": {layer: said[layer] for layer in sorted(said)[at::2]}})
        save_file(own, theirs / shard, metadata={"_quantization_metadata": text})
        placed |= dict.fromkeys(own, shard)
    (theirs / f"{whole_file.name}.index.json").write_text(json.dumps({"weight_map": placed}))
    assert torch.equal(flux_output(theirs), flux_output(single))


def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Add tensors to a folder's weights or replace them; None takes one out."""
    path = folder / "diffusion_pytorch_model.safetensors"
    weights = {**load_file(path), **tensors}
    save_file({name: each for name, each in weights.items() if each is not None}, path)


def test_scales_that_are_put_together_are_of_one_dtype(tmp_path: Path) -> None:
    single, theirs = packed_folder(tmp_path, True)
    scales = load_file(theirs / "diffusion_pytorch_model.safetensors")
    name = "transformer_blocks.0.attn.to_q.weight_scale"
    # With and without a dimension of one.
    change(theirs, **{name: scales[name].flatten()})
    assert torch.equal(flux_output(theirs), flux_output(single))
    name = "transformer_blocks.0.attn.to_k.weight_scale"
    change(theirs, **{name: scales[name].bfloat16()})
    with pytest.raises(ModelUnsupported, match=rf"{name}.* are not of one dtype"):
        flux_output(theirs)


@pytest.mark.parametrize("leaf", ["weight_scale", "pre_quant_scale", "input_scale"])
def test_what_lies_beside_a_plain_weight_of_a_folder_isnt_dropped(tmp_path: Path, leaf: str) -> None:
    _, theirs = packed_folder(tmp_path, True)
    change(theirs, **{f"x_embedder.{leaf}": torch.full((2,), 3.0)})
    with pytest.raises(ModelUnsupported, match=rf"doesn't use: x_embedder\.{leaf}"):
        flux_output(theirs)


def test_an_input_scale_beside_plain_fp8_in_a_folder_isnt_used(tmp_path: Path) -> None:
    _, theirs = packed_folder(tmp_path, True)
    weights = load_file(theirs / "diffusion_pytorch_model.safetensors")
    change(theirs, **{"x_embedder.weight": weights["x_embedder.weight"].to(torch.float8_e4m3fn)})
    before = flux_output(theirs)
    change(theirs, **{"x_embedder.input_scale": torch.tensor(3.0)})
    assert torch.equal(flux_output(theirs), before)

"""The same model from every kind of file, on two ranks."""

from __future__ import annotations

import json
import os
from pathlib import Path

import gguf
import pytest
import torch
from helpers import FLUX, FP32, relative_error
from safetensors.torch import save_file
from torch import Tensor

from tacod.rank.parallel.sequence import SequenceParallel
from tacod_client import Client

CONFIG = {
    "_class_name": "FluxTransformer2DModel",
    "num_attention_heads": 5,
    "attention_head_dim": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "in_channels": 16,
    "joint_attention_dim": 8,
    "pooled_projection_dim": 6,
    "guidance_embeds": True,
    "axes_dims_rope": [4, 6, 6],
}


def check(client: Client, path: str, weights: dict[str, Tensor]) -> None:
    """The file's model on the ranks is the one with these weights in one process."""
    inputs = FLUX.inputs()
    model = type(FLUX.model)(FLUX.config)
    model.load_state_dict(weights)
    with torch.inference_mode():
        wanted = model(SequenceParallel(), **inputs)
    assert relative_error(client.load(path).forward(**inputs), wanted) <= FP32


def in_diffusers() -> dict[str, Tensor]:
    weights = FLUX.model.state_dict()
    tensors = {}
    for name, place in FLUX.model.diffusers_layout(FLUX.config).items():
        first, count = place.rows or (0, len(weights[place.key]))
        tensor = weights[place.key][first : first + count]
        tensors[name] = (torch.cat(tensor.chunk(2)[::-1]) if place.swap else tensor).contiguous()
    return tensors


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_diffusers_names_in_one_file(client: Client, models: Path, prefix: str) -> None:
    path = models / f"diffusers{prefix}safetensors"
    tensors = {prefix + name: tensor.clone() for name, tensor in in_diffusers().items()}
    save_file(tensors, path, metadata={"tacod.config": json.dumps(FLUX.config)})
    check(client, path.name, FLUX.model.state_dict())


@pytest.mark.parametrize("prefix", ["model.", "trainer.wrapped."])
def test_a_prefix(client: Client, models: Path, prefix: str) -> None:
    path = models / f"{prefix}safetensors"
    tensors = {prefix + name: tensor for name, tensor in FLUX.model.state_dict().items()}
    save_file(tensors, path, metadata={"tacod.config": json.dumps(FLUX.config)})
    check(client, path.name, FLUX.model.state_dict())
    (told,) = (each for each in client.models() if each["name"] == path.name)
    assert told["parameters"] == sum(tensor.numel() for tensor in tensors.values())


def test_a_diffusers_folder(client: Client, models: Path) -> None:
    weights = FLUX.model.state_dict()
    tensors = in_diffusers()
    folder = models / "in_diffusers_layout"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    half = len(tensors) // 2
    shards = {"a.safetensors": list(tensors)[:half], "b.safetensors": list(tensors)[half:]}
    for file, names in shards.items():
        save_file({name: tensors[name] for name in names}, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, names in shards.items() for name in names}}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    check(client, folder.name, weights)


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
def test_fp8(client: Client, models: Path, scaled: bool) -> None:
    stored, weights = {}, {}
    for name, tensor in FLUX.model.state_dict().items():
        if tensor.dim() < 2:
            stored[name] = weights[name] = tensor
            continue
        scale = tensor.abs().max() / 448 if scaled else torch.tensor(1.0)
        stored[name] = (tensor / scale).to(torch.float8_e4m3fn)
        weights[name] = stored[name].float() * scale
        if scaled:
            stored[name.removesuffix("weight") + "scale_weight"] = scale
    if scaled:
        stored["scaled_fp8"] = torch.empty(2, dtype=torch.float8_e4m3fn)
    path = models / f"fp8-{scaled}.safetensors"
    save_file(stored, path, metadata={"tacod.config": json.dumps(FLUX.config)})
    check(client, path.name, weights)


def in_hubs_cache(models: Path, blob: Path, name: str) -> Path:
    """A link to a file without a suffix, as a hub's cache has it."""
    link = models / "models--a--b" / "snapshots" / "0abc" / name
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(os.path.relpath(blob, link.parent))
    return link


@pytest.mark.parametrize("linked", [False, True], ids=["file", "linked"])
def test_gguf(client: Client, models: Path, linked: bool) -> None:
    path = models / ("0f1e2d3c" if linked else "quantized.gguf")
    writer = gguf.GGUFWriter(path, "flux")
    writer.add_string("tacod.config", json.dumps(FLUX.config))
    weights = {}
    for name, tensor in FLUX.model.state_dict().items():
        kind = gguf.GGMLQuantizationType.Q8_0
        if tensor.dim() == 2 and tensor.shape[1] % 32 == 0:
            data = gguf.quants.quantize(tensor.numpy(), kind)
            writer.add_tensor(name, data, raw_dtype=kind)
            weights[name] = torch.from_numpy(gguf.quants.dequantize(data, kind))
        else:
            writer.add_tensor(name, tensor.numpy())
            weights[name] = tensor
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert any(not torch.equal(weights[name], tensor) for name, tensor in FLUX.model.state_dict().items())
    named = in_hubs_cache(models, path, "flux-Q8_0.gguf") if linked else path
    check(client, str(named), weights)
    assert named.name in [told["name"] for told in client.models()]


def test_links_of_a_hubs_cache(client: Client, models: Path) -> None:
    """A model and a LoRA; the daemon tells the name that was asked for."""
    blob, lora = models / "1a2b", models / "3c4d"
    other = {name: tensor + 0.01 for name, tensor in FLUX.model.state_dict().items()}
    save_file(other, blob, metadata={"tacod.config": json.dumps(FLUX.config)})
    named = in_hubs_cache(models, blob, "flux-tuned.safetensors")
    check(client, str(named), other)
    diff = torch.full((80, 16), 0.1)
    save_file({"diffusion_model.img_in.diff": diff}, lora)
    patches = [{"path": str(in_hubs_cache(models, lora, "style.safetensors")), "strength": 1.0}]
    patched = client.load(str(named), patches=patches)
    assert patched.name == named.name
    inputs = FLUX.inputs()
    by_hand = client.load(blob.name, patches=[{"key": "img_in.weight", "kind": "diff", "diff": diff}])
    assert relative_error(patched.forward(**inputs), by_hand.forward(**inputs)) <= FP32

"""LoRA files of every family in the spellings that its trainers write: each gives the weights that a sum gives.

A change of a module by its diffusers' name is added to that module where diffusers' names hold the weights, and that
file is loaded; so where it lies in ours isn't taken from the reader of LoRAs.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conformance import CPU, FAMILIES, tiny
from helpers import FP32, in_diffusers, relative_error
from safetensors.torch import save_file
from torch import Tensor, nn

from tacod.checkpoint import read_checkpoint
from tacod.rank.families import detect
from tacod.rank.families.base import DiT
from tacod.rank.families.qwen_image_21 import QwenImage21
from tacod.rank.weights.load import load_model
from tacod.rank.weights.lora import read_lora
from tacod.rank.weights.patches import apply
from tacod_client.errors import ModelUnsupported

RANK = 3
ALPHA = 1.5
STRENGTH = 0.7

Tensors = dict[str, Tensor]
Made = tuple[Tensors, Tensor]
"""A change's tensors by what follows a module's name, and what it adds to a weight at strength 1."""


def lora(up: str, down: str, alpha: bool) -> Callable[..., Made]:
    """Low-rank factors under these names."""

    def make(rows: int, inputs: int, draw: Callable[..., Tensor]) -> Made:
        a, b = draw(rows, RANK), draw(RANK, inputs)
        tensors = {up: a, down: b}
        return ({**tensors, "alpha": torch.tensor(ALPHA)}, ALPHA / RANK * a @ b) if alpha else (tensors, a @ b)

    return make


def loha(rows: int, inputs: int, draw: Callable[..., Tensor]) -> Made:
    """A Hadamard product of two low-rank matrices."""
    one, two = (draw(rows, RANK), draw(RANK, inputs)), (draw(rows, RANK), draw(RANK, inputs))
    tensors = {"hada_w1_a": one[0], "hada_w1_b": one[1], "hada_w2_a": two[0], "hada_w2_b": two[1]}
    change = ALPHA / RANK * (one[0] @ one[1]) * (two[0] @ two[1])
    return {**tensors, "alpha": torch.tensor(ALPHA)}, change


def lokr(rows: int, inputs: int, draw: Callable[..., Tensor]) -> Made:
    """A Kronecker product with a small matrix; the other one has low rank, as LyCORIS makes it."""
    parts, columns = math.gcd(rows, 2), math.gcd(inputs, 4)
    one, a, b = draw(parts, columns), draw(rows // parts, RANK), draw(RANK, inputs // columns)
    tensors = {"lokr_w1": one, "lokr_w2_a": a, "lokr_w2_b": b, "alpha": torch.tensor(ALPHA)}
    return tensors, torch.kron(one, ALPHA / RANK * a @ b)


def whole_lokr(rows: int, inputs: int, draw: Callable[..., Tensor]) -> Made:
    """A Kronecker product of two whole matrices, whose alpha is a huge number without meaning, as ai-toolkit's."""
    parts, columns = math.gcd(rows, 4), math.gcd(inputs, 2)
    one, two = draw(parts, columns), draw(rows // parts, inputs // columns)
    return {"lokr_w1": one, "lokr_w2": two, "alpha": torch.tensor(1e10)}, torch.kron(one, two)


KOHYA = lora("lora_up.weight", "lora_down.weight", True)
PEFT = lora("lora_B.weight", "lora_A.weight", False)
ADAPTER = lora("lora_B.default.weight", "lora_A.default.weight", False)


class Spelling(NamedTuple):
    """How a trainer writes a module and its change."""

    prefix: str
    flat: bool
    """Whether dots are underscores."""
    make: Callable[..., Made]


OWN = {
    "kohya": Spelling("lora_unet_", True, KOHYA),
    "Wan-Fun": Spelling("lora_unet__", True, KOHYA),
    "kohya's LoHa": Spelling("lora_unet_", True, loha),
    "kohya's LoKr": Spelling("lora_unet_", True, lokr),
    "ai-toolkit": Spelling("diffusion_model.", False, PEFT),
    "ai-toolkit's LoKr": Spelling("diffusion_model.", False, whole_lokr),
    "PEFT": Spelling("base_model.model.", False, PEFT),
    "with alpha": Spelling("diffusion_model.", False, lora("lora_B.weight", "lora_A.weight", True)),
    "LyCORIS": Spelling("lycoris_", True, lokr),
    "OneTrainer": Spelling("transformer.", False, KOHYA),
    "no prefix": Spelling("", False, ADAPTER),
}
"""In the model's own names, which are those of the authors' single file."""
DIFFUSERS = {
    "diffusers": Spelling("transformer.", False, PEFT),
    "PEFT": Spelling("base_model.model.", False, ADAPTER),
    "DiffSynth": Spelling("", False, ADAPTER),
    "ai-toolkit": Spelling("diffusion_model.", False, PEFT),
    "OneTrainer": Spelling("transformer.", False, KOHYA),
    "OneTrainer, older": Spelling("lora_transformer_", True, KOHYA),
    "OneTrainer's LoHa": Spelling("transformer.", False, loha),
    "musubi-tuner": Spelling("lora_unet_", True, KOHYA),
    "SimpleTuner's LyCORIS": Spelling("lycoris_", True, lokr),
}
"""In diffusers' names, in which layers are apart that the single file fuses."""
NAMED = [name for name, family in FAMILIES.items() if family.names]


def written(modules: Mapping[str, tuple[int, int]], spelling: Spelling) -> tuple[Tensors, Tensors]:
    """A file that changes these modules, of so many outputs and inputs, and what it adds to each."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    file, changes = {}, {}
    for module, (rows, inputs) in modules.items():
        tensors, changes[module] = spelling.make(rows, inputs, draw)
        name = spelling.prefix + (module.replace(".", "_") if spelling.flat else module)
        file |= {f"{name}.{part}": tensor for part, tensor in tensors.items()}
    return file, changes


def merged(dit: DiT, file: Tensors, config: Mapping[str, Any] | None = None, notes: list[str] | None = None) -> Tensors:
    """The weights that a LoRA file changes, with it."""
    weights = dit.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    layout = type(dit).lora_layout(detect({}, dict(config or dit.tiny))[1])
    patches = read_lora(file, layout, shapes, STRENGTH, dit.spellings, notes=notes)
    return {key: apply(weights[key], each, key) for key, each in patches.items()}


def check(found: Tensors, expected: Tensors) -> None:
    assert found
    assert max(relative_error(found[key], expected[key]) for key in found) <= FP32


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("family", FAMILIES)
def test_its_own_names(family: str, name: str) -> None:
    dit = tiny(family)
    weights = dit.state_dict()
    layers = {name: layer for name, layer in dit.named_modules() if isinstance(layer, nn.Linear)}
    file, changes = written({name: tuple(layer.weight.shape) for name, layer in layers.items()}, OWN[name])
    expected = {f"{module}.weight": weights[f"{module}.weight"] + STRENGTH * each for module, each in changes.items()}
    found = merged(dit, file)
    assert found.keys() == expected.keys()
    check(found, expected)


@pytest.mark.parametrize("name", DIFFUSERS)
@pytest.mark.parametrize("family", NAMED)
def test_diffusers_names(family: str, name: str, tmp_path: Path) -> None:
    dit = tiny(family)
    theirs, before = in_diffusers(dit), dit.state_dict()
    linear = {f"{name}.weight" for name, layer in dit.named_modules() if isinstance(layer, nn.Linear)}
    layout = dit.names.layout({key: tensor.shape for key, tensor in before.items()})
    modules = {
        key.removesuffix(".weight"): tuple(tensor.shape) for key, tensor in theirs.items() if layout[key].key in linear
    }
    file, changes = written(modules, DIFFUSERS[name])
    for module, change in changes.items():
        theirs[f"{module}.weight"] = theirs[f"{module}.weight"] + STRENGTH * change
    path = tmp_path / "m.safetensors"
    save_file(theirs, path, {"tacod.config": json.dumps(dit.tiny)})
    expected = load_model(read_checkpoint(str(path)), torch.float32, CPU).state_dict()
    found = merged(dit, file)
    assert found.keys() == {key for key in before if not torch.equal(before[key], expected[key])}
    check(found, expected)


# --- names that LoRA files alone have ---------------------------------------------------------------------------------

FUSED = QwenImage21({**QwenImage21.tiny, "fused_mlp": True}).eval().requires_grad_(False)
QKV = [("attn.to_q", 0, 48), ("attn.to_k", 48, 48), ("attn.to_v", 96, 48)]
BLOCK, SINGLE = "transformer_blocks.1", "single_transformer_blocks.0"
OTHERS: list[tuple[str, str, str, int, int]] = [
    *(("chroma_radiance", f"{BLOCK}.{name}", "double_blocks.1.img_attn.qkv", *rows) for name, *rows in QKV),
    *(("chroma_radiance", f"{SINGLE}.{name}", "single_blocks.0.linear1", *rows) for name, *rows in QKV),
    ("chroma_radiance", f"{SINGLE}.proj_mlp", "single_blocks.0.linear1", 144, 96),
    ("chroma_radiance", f"{BLOCK}.attn.to_add_out", "double_blocks.1.txt_attn.proj", 0, 48),
    ("chroma_radiance", "context_embedder", "txt_in", 0, 48),
    ("chroma", f"{BLOCK}.ff.linear_in", "double_blocks.1.img_mlp.0", 0, 96),
    ("flux", f"{BLOCK}.ff_context.linear_out", "double_blocks.1.txt_mlp.2", 0, 48),
    ("flux", f"{SINGLE}.attn.to_qkv_mlp_proj", "single_blocks.0.linear1", 0, 336),
    ("flux", f"{SINGLE}.attn.to_out", "single_blocks.0.linear2", 0, 48),
    *(("flux2", f"{SINGLE}.{name}", "single_blocks.0.linear1", *rows) for name, *rows in QKV),
    ("flux2", f"{BLOCK}.ff.net.0.proj", "double_blocks.1.img_mlp.0", 0, 96),
    ("flux2", f"{SINGLE}.proj_out", "single_blocks.0.linear2", 0, 48),
    ("krea2", f"{BLOCK}.attn.to_out", "blocks.1.attn.wo", 0, 96),
    ("krea2", "text_fusion.refiner_blocks.0.attn.to_out", "txtfusion.refiner_blocks.0.attn.wo", 0, 16),
    ("fused", f"{BLOCK}.img_mlp.gate_layer", f"{BLOCK}.img_mlp.gate_up", 0, 96),
    ("fused", f"{BLOCK}.img_mlp.proj", f"{BLOCK}.img_mlp.gate_up", 96, 96),
]
"""A family, a module's name, our layer, and the rows that it is there: the first one, and how many."""


@pytest.mark.parametrize(("family", "module", "layer", "first", "rows"), OTHERS)
@pytest.mark.parametrize("name", ["diffusers", "SimpleTuner's LyCORIS", "OneTrainer, older"])
def test_names_of_loras_alone(family: str, module: str, layer: str, first: int, rows: int, name: str) -> None:
    dit: DiT = FUSED if family == "fused" else tiny(family)
    config = {**dit.tiny, "fused_mlp": True} if family == "fused" else None
    weight = copy.deepcopy(dit.get_parameter(f"{layer}.weight").data)
    file, changes = written({module: (rows, weight.shape[1])}, DIFFUSERS[name])
    weight[first : first + rows] += STRENGTH * changes[module]
    found = merged(dit, file, config)
    assert found.keys() == {f"{layer}.weight"}
    check(found, {f"{layer}.weight": weight})


def one_layer(dit: DiT, spelling: Spelling, *strange: str) -> Tensors:
    """A file that changes one layer, and layers that the model lacks."""
    name, layer = next((name, layer) for name, layer in dit.named_modules() if isinstance(layer, nn.Linear))
    return written({name: tuple(layer.weight.shape), **dict.fromkeys(strange, (4, 4))}, spelling)[0]


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_matches_no_layer_is_left_out_by_name(family: str, name: str) -> None:
    dit, notes = tiny(family), list[str]()
    alone, file = one_layer(dit, OWN[name]), one_layer(dit, OWN[name], "no.such.layer")
    check(merged(dit, file, notes=notes), merged(dit, alone))
    [note] = notes
    strange = next(name for name in file if name not in alone)
    share = f"{len(file) - len(alone)} of {len(file)} tensors"
    assert note == f"the LoRA: {share} match nothing in this model, {strange} among them"


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_lora_most_of_whose_layers_match_nothing_is_refused_by_name(family: str, name: str) -> None:
    dit = tiny(family)
    with pytest.raises(ModelUnsupported, match=r"no[._]such[._]layer") as caught:
        merged(dit, one_layer(dit, OWN[name], "no.such.layer", "nor.such.layer"))
    assert all("such" in each for each in caught.value.details["unmatched"])

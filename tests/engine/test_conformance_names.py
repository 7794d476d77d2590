"""What is asked of every family about its weights, under its own names and under others."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from conformance import CPU, FAMILIES, tiny
from helpers import FP32, in_diffusers, relative_error
from safetensors.torch import save_file
from torch import Tensor, nn

from tacod.checkpoint import TensorInfo, read_checkpoint
from tacod.rank.families import detect
from tacod.rank.families.base import DiT
from tacod.rank.weights.load import load_model
from tacod.rank.weights.lora import read_lora
from tacod.rank.weights.patches import apply
from tacod_client.errors import ModelUnsupported

FAMILY = pytest.mark.parametrize("family", FAMILIES)
NAMED = pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if family.names])


def header(dit: DiT) -> dict[str, TensorInfo]:
    return {name: TensorInfo("F32", tuple(tensor.shape)) for name, tensor in dit.state_dict().items()}


@FAMILY
def test_a_model_is_detected_as_itself(family: str) -> None:
    """From its tensors, and from what its configuration says that shapes don't tell."""
    dit = tiny(family)
    kind = type(dit)
    tensors = header(dit)
    found, detected = detect(tensors)
    assert found is kind
    for key in (key for key, value in kind.tiny.items() if detected.get(key, value) != value):
        with torch.device("meta"), suppress(ModelUnsupported):
            assert header(kind({**kind.tiny, key: detected[key]})) == tensors, f"shapes tell another {key}"
    found, config = detect(tensors, kind.tiny)
    with torch.device("meta"):
        again = found(config)
    assert (found, header(again)) == (kind, tensors)
    assert (again.heads, again.width, again.arguments()) == (dit.heads, dit.width, dit.arguments())
    assert detect(header(again), kind.tiny) == (kind, config)


@NAMED
def test_diffusers_names_are_a_bijection(family: str) -> None:
    """Each parameter has one name, or one for each part of its rows, without gap or overlap."""
    dit = tiny(family)
    shapes = {name: tuple(parameter.shape) for name, parameter in dit.named_parameters()}
    layout = dit.names.layout(shapes)
    assert layout == dit.diffusers_layout(detect({}, dit.tiny)[1])
    rows: dict[str, list[int]] = {}
    theirs = {}
    for name, place in layout.items():
        first, count = place.rows or (0, shapes[place.key][0])
        theirs[name] = (count, *shapes[place.key][1:])
        rows.setdefault(place.key, []).extend(range(first, first + count))
    assert {name: sorted(each) for name, each in rows.items()} == {name: [*range(s[0])] for name, s in shapes.items()}
    assert all(map(dit.names.knows, theirs))
    assert dit.names.ours(theirs) == shapes


@NAMED
def test_weights_under_diffusers_names_are_the_same_bits(family: str, tmp_path: Path) -> None:
    dit = tiny(family)
    path = tmp_path / "m.safetensors"
    save_file(in_diffusers(dit), path, {"tacod.config": json.dumps(dit.tiny)})
    loaded = load_model(read_checkpoint(str(path)), torch.float32, CPU)
    ours = dit.state_dict()
    assert loaded.state_dict().keys() == ours.keys()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in loaded.state_dict().items())


@FAMILY
def test_a_lora_is_the_same_in_every_naming(family: str) -> None:
    """In the model's own names, in kohya's underscores, and in diffusers' names, where parts are patched apart."""
    dit = tiny(family)
    weights = dit.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    layout = dit.diffusers_layout(detect({}, dit.tiny)[1])
    generator = torch.Generator().manual_seed(0)
    factors = {
        f"{name}.weight": [torch.randn(*size, generator=generator) for size in ((n, 2), (2, layer.in_features))]
        for name, layer in dit.named_modules()
        if isinstance(layer, nn.Linear) and (n := layer.out_features)
    }
    own, kohya, diffusers = {}, {}, {}
    for key, (up, down) in factors.items():
        module = key.removesuffix(".weight")
        own |= {f"diffusion_model.{module}.lora_B.weight": up, f"diffusion_model.{module}.lora_A.weight": down}
        flat = f"lora_unet_{module.replace('.', '_')}"
        kohya |= {f"{flat}.lora_up.weight": up, f"{flat}.lora_down.weight": down}
    for name, place in layout.items():
        if place.key in factors:
            up, down = factors[place.key]
            part = up if place.rows is None else up[place.rows[0] : sum(place.rows)]
            part = torch.cat(part.chunk(2)[::-1]) if place.swap else part
            module = f"transformer.{name.removesuffix('.weight')}"
            diffusers |= {f"{module}.lora_B.weight": part, f"{module}.lora_A.weight": down}

    def patched(file: Mapping[str, Tensor]) -> dict[str, Tensor]:
        patches = read_lora(file, layout, shapes, 0.7, dit.spellings)
        assert patches.keys() == factors.keys()
        return {key: apply(weights[key], each, key) for key, each in patches.items()}

    expected = {key: weights[key] + 0.7 * up @ down for key, (up, down) in factors.items()}
    for file in filter(None, (own, kohya, diffusers)):
        found = patched(file)
        assert max(relative_error(found[key], expected[key]) for key in expected) <= FP32

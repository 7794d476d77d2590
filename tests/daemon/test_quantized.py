"""Quantized files through the daemon: loaded, told of, patched, and refused whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import FLUX, Daemon, quantized_golden_names, read_golden, relative_error
from safetensors.torch import save_file
from torch.nn import functional

from tacod.rank.parallel.sequence import SequenceParallel
from tacod_client import Client, ModelCorrupt, ModelUnsupported

INT8 = "quantised/krea2_int8_convrot"
KEY = "blocks.0.mlp.gate.weight"


@pytest.mark.parametrize("name", [INT8, "quantised/flux_dev_nvfp4", "quantised/z_image_fp8"])
def test_a_file_is_computed_as_comfyui_does(daemons: Callable[[int], Daemon], models: Path, name: str) -> None:
    assert name in quantized_golden_names()
    golden = read_golden(name)
    golden.save(models / "packed.safetensors")
    with daemons(2).client() as client:
        model = client.load("packed.safetensors")
        out = model.forward(**golden.inputs)
        assert relative_error(out, golden.out) <= golden.fp32
        (told,) = [each for each in client.status()["models"] if each["id"] == model.id]
        assert told["quantization"] == model.quantization
        assert sum(model.quantization.values()) == sum(key.endswith(".comfy_quant") for key in golden.weights)
        assert told["parameters"] == golden_parameters(name)
        other = client.load("packed.safetensors", dtype="fp32_weight_only")
        assert other.id != model.id
        assert (other.dtype, other.quantization) == ("fp32_weight_only", model.quantization)
        nearer = relative_error(other.forward(**golden.inputs), golden.out)
        assert nearer <= golden.fp32 if name != INT8 else nearer > golden.fp32
        for each in (model, other):
            client.unload(each.id)


def test_plain_weights_have_no_format_whatever_multiplies_them(client: Client, models: Path) -> None:
    model = client.load(FLUX.file, dtype="fp8")
    assert model.quantization == {}
    client.unload(model.id)


def golden_parameters(name: str) -> int:
    """The numbers of the model that was quantized."""
    golden = read_golden(name)
    return sum(each.numel() for key, each in golden.model().state_dict().items() if key in golden.weights)


def test_a_lora_is_added_beside_a_packed_layer(daemons: Callable[[int], Daemon], models: Path) -> None:
    golden = read_golden(INT8)
    golden.save(models / "packed.safetensors")
    shape = golden.model().state_dict()[KEY].shape
    generator = torch.Generator().manual_seed(0)
    up, down = (torch.randn(*size, generator=generator) for size in ((shape[0], 2), (2, shape[1])))
    lora = {"key": f"diffusion_model.{KEY}", "kind": "lora", "up": up, "down": down, "alpha": 1.0}
    with daemons(2).client() as client:
        base = client.load("packed.safetensors")
        before = base.forward(**golden.inputs)
        weak, strong = (
            client.load("packed.safetensors", patches=[{**lora, "strength": strength}]) for strength in (0.01, 1.0)
        )
        sizes = {each["id"]: each["weight_bytes"] for each in client.status()["models"]}
        assert sizes[strong.id] == 4 * 2 * (shape[0] + shape[1]), "of its own it has the two factors, in fp32"
        moved = [relative_error(each.forward(**golden.inputs), before) for each in (weak, strong)]
        assert 0 < moved[0] < 0.2 * moved[1]
        # Merged by hand into the numbers, the layer no longer packed.
        by_hand = golden.model()
        layer = by_hand.get_submodule(KEY.removesuffix(".weight"))
        packed = layer.forward
        layer.forward = lambda x: packed(x) + functional.linear(functional.linear(x, down), 0.5 * up)  # type: ignore[method-assign]
        with torch.inference_mode():
            wanted = by_hand.run(SequenceParallel(), golden.arguments(by_hand))
        assert isinstance(wanted, torch.Tensor)
        assert relative_error(strong.forward(**golden.inputs), wanted) <= golden.fp32
        assert torch.equal(base.forward(**golden.inputs), before)
        client.unload(base.id)


def test_a_file_that_isnt_right_is_refused_and_leaves_nothing(daemons: Callable[[int], Daemon], models: Path) -> None:
    golden = read_golden(INT8)
    golden.save(models / "good.safetensors")
    path = models / "bad.safetensors"
    scale = next(key for key in sorted(golden.weights) if key.endswith(".weight_scale"))
    with daemons(2).client() as client:
        model = client.load("good.safetensors")
        before = [each["id"] for each in client.status()["models"]]
        damaged = golden.weights[scale].clone()
        damaged.view(-1)[0] = float("nan")
        metadata = {"tacod.config": json.dumps(golden.config)}
        save_file({**golden.weights, scale: damaged}, path, metadata=metadata)
        with pytest.raises(ModelCorrupt, match=f"{scale} holds numbers that aren't finite"):
            client.load("bad.safetensors")
        raw = (models / "good.safetensors").read_bytes()
        path.write_bytes(raw[:-100])
        with pytest.raises(ModelCorrupt, match="truncated"):
            client.load("bad.safetensors")
        odd = torch.frombuffer(bytearray(b'{"format": "int2_new"}'), dtype=torch.uint8)
        name = scale.replace("weight_scale", "comfy_quant")
        save_file({**golden.weights, name: odd}, path, metadata=metadata)
        with pytest.raises(ModelUnsupported, match=f"{name.rpartition('.')[0]} is packed as 'int2_new'"):
            client.load("bad.safetensors")
        path.unlink()
        assert [each["id"] for each in client.status()["models"]] == before
        assert relative_error(model.forward(**golden.inputs), golden.out) <= golden.fp32
        client.unload(model.id)

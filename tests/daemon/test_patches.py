"""Weight patches through the daemon: merged on every rank, only what they touch is made anew."""

from __future__ import annotations

import copy
import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import FLUX, FP32, Daemon, Tiny, relative_error
from safetensors.torch import save_file
from torch import Tensor

from tacod.rank.parallel.sequence import SequenceParallel
from tacod_client import ArgumentError, Client, ModelUnsupported

QKV = "double_blocks.0.img_attn.qkv.weight"
MLP = "double_blocks.1.txt_mlp.0.weight"
RANK = 4


def factors(key: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    rows, columns = FLUX.model.state_dict()[key].shape
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, RANK, generator=generator), torch.randn(RANK, columns, generator=generator)


def lora(key: str, strength: float, seed: int = 0) -> dict[str, Any]:
    up, down = factors(key, seed)
    return {"key": f"diffusion_model.{key}", "kind": "lora", "up": up, "down": down, "alpha": 2.0, "strength": strength}


def expected(inputs: dict[str, Any], *changes: tuple[str, float, int]) -> Tensor:
    """One forward in this process, of a model whose weights were changed by hand."""
    model = copy.deepcopy(FLUX.model)
    weights = model.state_dict()
    for key, strength, seed in changes:
        up, down = factors(key, seed)
        weights[key] = weights[key] + strength * (2.0 / RANK) * (up @ down)
    model.load_state_dict(weights)
    with torch.inference_mode():
        out: Tensor = model(SequenceParallel(), **inputs)
    return out


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_patched_equals_weights_patched_by_hand(daemons: Callable[[int], Daemon], ranks: int) -> None:
    inputs = FLUX.inputs()
    with daemons(ranks).client() as client:
        patched = client.load(FLUX.file, patches=[lora(QKV, 0.8), lora(MLP, -0.5, 1), lora(QKV, 0.3, 2)])
        wanted = expected(inputs, (QKV, 0.8, 0), (MLP, -0.5, 1), (QKV, 0.3, 2))
        assert relative_error(patched.forward(**inputs), wanted) <= FP32
        FLUX.check(client.load(FLUX.file))


def test_strength_zero_is_no_patch_bit_for_bit(client: Client) -> None:
    inputs = FLUX.inputs()
    plain = client.load(FLUX.file).forward(**inputs)
    assert torch.equal(client.load(FLUX.file, patches=[lora(QKV, 0.0)]).forward(**inputs), plain)


def test_the_id_is_a_function_of_file_and_patches(client: Client) -> None:
    one, same, other = (client.load(FLUX.file, patches=[lora(QKV, strength)]).id for strength in (0.5, 0.5, 0.6))
    assert one == same != other
    assert client.load(FLUX.file, patches=[]).id == client.load(FLUX.file).id


def test_another_strength_takes_memory_for_its_layers_only(client: Client) -> None:
    plain, patched = client.load(FLUX.file), client.load(FLUX.file, patches=[lora(QKV, 0.71)])
    held = {told["id"]: told["weight_bytes"] for told in client.models()}
    weights = FLUX.model.state_dict()
    assert held[plain.id] == sum(weight.nbytes for weight in weights.values())
    assert held[patched.id] == weights[QKV].nbytes


@pytest.mark.parametrize("naming", ["kohya", "peft", "native"])
def test_a_lora_file_is_the_same_patch(client: Client, models: Path, naming: str) -> None:
    up, down = factors(MLP)
    module = MLP.removesuffix(".weight")
    names = {
        "kohya": (f"lora_unet_{module.replace('.', '_')}.lora_up.weight", "lora_down.weight", "alpha"),
        "peft": ("transformer.transformer_blocks.1.ff_context.net.0.proj.lora_B.weight", "lora_A.weight", "alpha"),
        "native": (f"diffusion_model.{module}.lora_B.weight", "lora_A.weight", "alpha"),
    }
    first, second, third = names[naming]
    base = first.rsplit(".", 2)[0]
    tensors = {first: up, f"{base}.{second}": down, f"{base}.{third}": torch.tensor(2.0)}
    save_file(tensors, models / f"{naming}.safetensors")
    patched = client.load(FLUX.file, patches=[{"path": f"{naming}.safetensors", "strength": 0.7}])
    inputs = FLUX.inputs()
    assert relative_error(patched.forward(**inputs), expected(inputs, (MLP, 0.7, 0))) <= FP32


def test_a_key_that_matches_nothing_is_listed(client: Client, models: Path) -> None:
    save_file({"lora_unet_nowhere.lora_up.weight": torch.ones(2, 2)}, models / "stranger.safetensors")
    with pytest.raises(ModelUnsupported, match="lora_unet_nowhere"):
        client.load(FLUX.file, patches=[{"path": "stranger.safetensors", "strength": 1.0}])


def test_what_is_left_out_is_told_of(client: Client, models: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As ComfyUI does on its console: the other layers are merged."""
    up, down = factors(MLP)
    good = {f"{MLP.removesuffix('weight')}lora_B.weight": up, f"{MLP.removesuffix('weight')}lora_A.weight": down}
    wide = {f"single_blocks.{i}.linear2.diff": torch.ones(80, 401) for i in range(2)}
    save_file({**good, **wide, "img_in.alpha": torch.tensor(1.0)}, models / "partly.safetensors")
    patches: list[dict[str, Any]] = [{"path": "partly.safetensors", "strength": 0.7}]
    with caplog.at_level(logging.WARNING):
        patched = client.load(FLUX.file, patches=patches)
    inputs = FLUX.inputs()
    model = copy.deepcopy(FLUX.model)
    weights = model.state_dict()
    weights[MLP] = weights[MLP] + 0.7 * (up @ down)
    model.load_state_dict(weights)
    assert relative_error(patched.forward(**inputs), model(SequenceParallel(), **inputs)) <= FP32
    (told,) = (each for each in client.models() if each["id"] == patched.id)
    assert len(patched.notes) == 3
    assert told["notes"] == list(patched.notes)
    for words in ("single_blocks.0.linear2", "single_blocks.1.linear2", "img_in"):
        assert any(words in note for note in patched.notes)
        assert words in caplog.text
    assert client.load(FLUX.file).notes == ()


def test_many_that_are_left_out_are_counted(client: Client) -> None:
    one = torch.ones(2, 2)
    weights = [key for key, weight in FLUX.model.state_dict().items() if weight.ndim == 2]
    patches = [lora(QKV, 0.5), *({"key": key, "kind": "diff", "diff": one} for key in weights)]
    notes = client.load(FLUX.file, patches=patches).notes
    assert len(notes) == 9
    assert notes[-1] == f"and {len(weights) - 8} more"


def test_patches_of_which_none_fits_are_refused(client: Client) -> None:
    before = {told["id"] for told in client.models()}
    with pytest.raises(ArgumentError, match=r"patches\[0\]: img_in\.weight: .*\[2, 2\].*\[80, 16\]"):
        client.load(FLUX.file, patches=[{"key": "img_in.weight", "kind": "diff", "diff": torch.ones(2, 2)}])
    model = client.load(FLUX.file)
    FLUX.check(model)
    assert {told["id"] for told in client.models()} <= before | {model.id}


def test_a_patched_model_outlives_its_ranks_and_its_unloading(daemon: Daemon, client: Client) -> None:
    """The store keeps a loaded model's patches, and the client has them if even the daemon forgot."""
    inputs = FLUX.inputs()
    wanted = expected(inputs, (QKV, 0.9, 0))
    # Of all models, new ranks load those again that there were.
    daemon.empty()
    patched = client.load(FLUX.file, patches=[lora(QKV, 0.9)])
    os.kill(daemon.rank_pids()[1], signal.SIGKILL)
    assert relative_error(patched.forward(**inputs), wanted) <= FP32
    client.unload(patched.id)
    assert relative_error(patched.forward(**inputs), wanted) <= FP32


def test_the_least_recently_used_model_makes_room(daemon: Daemon, client: Client, models: Path) -> None:
    others = [Tiny(f"room{seed}", FLUX.config, seed) for seed in range(3)]
    for other in others:
        other.save(models)
    size = sum(t.nbytes for t in FLUX.model.state_dict().values())
    daemon.empty()
    with daemon.changed({"models.memory_bytes": int(2.5 * size)}):
        first, second, third = (client.load(other.file) for other in others)
        assert [told["id"] for told in client.models()] == [second.id, third.id]
        others[1].check(second)
        others[0].check(first)  # which loads itself again, in the place of the third
        assert {told["id"] for told in client.models()} == {second.id, first.id}
        others[2].check(third)

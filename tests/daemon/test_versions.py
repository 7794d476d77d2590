"""Where versions of ComfyUI mean different things by the same call: each is computed as that version does.

``flux_versions.safetensors`` holds what 0.8.0 and 0.33.0 computed in fp32 on a CPU, with the same weights and inputs.
Queries and keys are near zero there, so that what their norms add to the mean square counts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import FP32, Daemon, relative_error
from safetensors import safe_open
from safetensors.torch import save_file

from tacod_client import ArgumentError, Client, ModelCorrupt

PATH = Path(__file__).parents[1] / "data" / "flux_versions.safetensors"
MEANINGS: dict[str, dict[str, Any]] = {
    "0.8.0": {"rope_options_for": "image"},
    "0.33.0": {"rope_options_for": "all", "qk_norm_eps": torch.finfo(torch.float32).eps},
}
"""What a client with this ComfyUI says."""
METHODS = ("offset", "index", "uxo")

with safe_open(PATH, "pt") as _file:
    CONFIG = json.loads(_file.metadata()["config"])
    ROPE_OPTIONS = json.loads(_file.metadata()["rope_options"])
    TENSORS = {key: _file.get_tensor(key) for key in _file.keys()}  # noqa: SIM118
WEIGHTS = {key.removeprefix("weights."): each for key, each in TENSORS.items() if key.startswith("weights.")}
NAMES = ("x", "timestep", "context", "y", "guidance")
INPUTS = {name: TENSORS[f"in.{name}"] for name in NAMES}
REFERENCES = [TENSORS["in.ref_latents.0"], TENSORS["in.ref_latents.1"]]


def renamed(name: str) -> str:
    """What ComfyUI 0.14 and later call a weight."""
    return name.replace("_norm.scale", "_norm.weight")


def save(folder: Path, name: str, weights: Mapping[str, torch.Tensor]) -> str:
    save_file(dict(weights), folder / name, metadata={"tacod.config": json.dumps(CONFIG)})
    return name


@pytest.fixture(scope="module")
def file(models: Path) -> str:
    return save(models, "flux_versions.safetensors", WEIGHTS)


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("version", MEANINGS)
@pytest.mark.parametrize("method", [None, *METHODS])
def test_equals_that_version(
    daemons: Callable[[int], Daemon], file: str, version: str, method: str | None, ranks: int
) -> None:
    told = dict(MEANINGS[version])
    if method is None:
        del told["rope_options_for"]
    else:
        told |= {"ref_latents": REFERENCES, "ref_latents_method": method, "rope_options": ROPE_OPTIONS}
    with daemons(ranks).client() as client:
        model = client.load(file, plan={"sequence_parallel_degree": ranks, "cfg_parallel": False})
        out = model.forward(**INPUTS, **told)
    assert relative_error(out, TENSORS[f"out.{version}.{method or 'plain'}"]) <= FP32
    (other,) = (each for each in MEANINGS if each != version)
    assert relative_error(out, TENSORS[f"out.{other}.{method or 'plain'}"]) > 1e3 * FP32, "versions differ here"


@pytest.mark.parametrize("value", [-1e-9, 0.5, float("nan"), True, "1e-6", [1e-6]], ids=str)
def test_what_is_no_epsilon(client: Client, file: str, value: Any) -> None:
    with pytest.raises(ArgumentError, match=r"^qk_norm_eps: expected a number from 0 to 0\.01, got "):
        client.load(file).forward(**INPUTS, qk_norm_eps=value)


def test_a_method_of_other_models_is_offset(client: Client, file: str) -> None:
    """As Flux.1 of ComfyUI up to 0.16 takes that word of its menu; any other word is refused."""
    model = client.load(file)
    outs = [
        model.forward(**INPUTS, ref_latents=REFERENCES, ref_latents_method=method)
        for method in ("offset", "index_timestep_zero", "index")
    ]
    assert torch.equal(outs[0], outs[1])
    assert relative_error(outs[2], outs[0]) > FP32
    with pytest.raises(ArgumentError, match=r"^ref_latents_method: 'offest' is none of 'offset', 'index', 'uxo'"):
        model.forward(**INPUTS, ref_latents=REFERENCES, ref_latents_method="offest")


def test_options_for_something_else(client: Client, file: str) -> None:
    with pytest.raises(ArgumentError, match=r"^rope_options_for: 'text' is none of 'all', 'image'"):
        client.load(file).forward(**INPUTS, rope_options_for="text")


def test_a_file_with_comfyuis_newer_names(client: Client, models: Path, file: str) -> None:
    """As its ModelSave writes them, and as it sends what it has no file for."""
    saved = save(models, "flux_renamed.safetensors", {renamed(name): each for name, each in WEIGHTS.items()})
    assert saved != file
    assert torch.equal(client.load(saved).forward(**INPUTS), client.load(file).forward(**INPUTS))


def test_a_file_with_both_names(client: Client, models: Path) -> None:
    name = "double_blocks.0.img_attn.norm.key_norm.scale"
    saved = save(models, "flux_both.safetensors", {**WEIGHTS, renamed(name): 2 * WEIGHTS[name]})
    with pytest.raises(ModelCorrupt, match=r"has both .*key_norm\.scale and .*key_norm\.weight, which are the same"):
        client.load(saved)


def test_patches_by_either_name(client: Client, models: Path, file: str) -> None:
    """BFL's control LoRAs and diffusers' set these norms."""
    name = "single_blocks.0.norm.query_norm.scale"
    value = 1.5 * WEIGHTS[name].float()
    outs = [
        client.load(file, patches=[{"key": key, "kind": "set", "value": value}]).forward(**INPUTS)
        for key in (name, renamed(name))
    ]
    # The same by a LoRA file that the daemon reads.
    path = models / "loras_versions.safetensors"
    save_file({f"diffusion_model.{renamed(name).removesuffix('.weight')}.set_weight": value}, path)
    outs.append(client.load(file, patches=[{"path": path.name}]).forward(**INPUTS))
    assert all(torch.equal(out, outs[0]) for out in outs)
    assert relative_error(outs[0], client.load(file).forward(**INPUTS)) > 1e-4

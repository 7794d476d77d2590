"""Folders in diffusers' layout as trainers and hubs leave them: subclasses, variants, a pipeline's parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import FLUX
from safetensors.torch import save_file
from test_other_names import PIXART, in_diffusers, is_plain, load

from tacod.checkpoint import TensorInfo, locate, read_checkpoint
from tacod.rank.families import from_diffusers
from tacod.rank.weights.remap import identify
from tacod_client.errors import ModelCorrupt, ModelError, ModelNotAllowed, ModelUnsupported

CONFIG: dict[str, Any] = {
    "_class_name": "FluxTransformer2DModel",
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 5,
    "joint_attention_dim": 8,
    "pooled_projection_dim": 6,
    "guidance_embeds": True,
    "axes_dims_rope": [4, 6, 6],
}
STEM = "diffusion_pytorch_model"


def make(folder: Path, name: str = f"{STEM}.safetensors", **config: Any) -> Path:
    """A folder with all weights in a file of this name."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    save_file({key: tensor.contiguous() for key, tensor in in_diffusers(FLUX).items()}, folder / name)
    return folder


def make_sharded(folder: Path, stem: str, index: str) -> Path:
    """A folder with the weights in two files, and an index of this name."""
    make(folder).joinpath(f"{STEM}.safetensors").unlink()
    tensors, weight_map = in_diffusers(FLUX), {}
    for number in range(2):
        mine = {key: tensors[key].contiguous() for key in list(tensors)[number::2]}
        save_file(mine, folder / f"{stem}-0000{number + 1}-of-00002.safetensors")
        weight_map |= dict.fromkeys(mine, f"{stem}-0000{number + 1}-of-00002.safetensors")
    (folder / index).write_text(json.dumps({"weight_map": weight_map}))
    return folder


def refused(path: Path, error: type[ModelError], match: str) -> None:
    """By the supervisor and by the ranks."""
    with pytest.raises(error, match=match):
        read_checkpoint(locate(str(path), [str(path.parents[1])]))
    with pytest.raises(error, match=match):
        load(path)


@pytest.mark.parametrize("name", ["FluxTransformer2DModelWithMasking", "MyFluxTransformer2DModel"])
def test_a_subclass_is_its_class(name: str, tmp_path: Path) -> None:
    assert is_plain(load(make(tmp_path / "m", _class_name=name)), FLUX)


@pytest.mark.parametrize("name", ["MochiTransformer3DModel", "FluxControlNetModel", "Transformer2DModel", "flux", None])
def test_another_class_is_refused_by_its_name(name: str | None, tmp_path: Path) -> None:
    refused(make(tmp_path / "m", _class_name=name), ModelUnsupported, f"_class_name is {name!r}")


@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        ("FluxTransformer2DModel", {"patch_size": 2}, "patch_size is 2; this version runs 1"),
        ("SD3Transformer2DModel", {"attention_head_dim": 72}, "attention_head_dim is 72; this version runs 64"),
        ("FluxTransformer2DModel", {"num_layers": -1}, "num_layers is -1; expected a whole number"),
        ("PixArtTransformer2DModel", {"sample_size": "128"}, "sample_size is '128'; expected a whole number"),
    ],
)
def test_a_value_that_no_family_runs_is_refused_by_its_key(name: str, change: dict[str, Any], match: str) -> None:
    with pytest.raises(ModelUnsupported, match=f"config.json: {match}"):
        from_diffusers("here", {"_class_name": name, **change}, {})


def test_what_was_identified_is_identified_alike_again(tmp_path: Path) -> None:
    """Its heads of 16 are not what its shapes alone would tell."""
    family, config, checkpoint = identify(read_checkpoint(str(make(tmp_path / "m"))))
    assert identify(checkpoint) == (family, config, checkpoint)
    assert config["axes_dim"] == CONFIG["axes_dims_rope"]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, "pixart_alpha"),
        ({"sample_size": 64}, "pixart_sigma"),
        ({"use_additional_conditions": False}, "pixart_sigma"),
        ({"use_additional_conditions": True, "sample_size": 64}, "pixart_alpha"),
    ],
)
def test_pixart_by_what_diffusers_says_of_it(config: dict[str, Any], expected: str) -> None:
    tensors = {name: TensorInfo("F32", tuple(each.shape)) for name, each in in_diffusers(PIXART).items()}
    found = from_diffusers("here", {"_class_name": "PixArtTransformer2DModel", **config}, tensors)
    assert (found["image_model"], found["pred_sigma"]) == (expected, True)
    assert found["micro_condition"] == (expected == "pixart_alpha")


@pytest.mark.parametrize("lost", ["single_transformer_blocks.1.", "transformer_blocks.1.", "x_embedder."])
def test_a_folder_that_lacks_something_is_no_smaller_model(lost: str, tmp_path: Path) -> None:
    """Its config.json says how many blocks there are."""
    folder = make(tmp_path / "m")
    kept = {key: each for key, each in in_diffusers(FLUX).items() if not key.startswith(lost)}
    save_file({key: tensor.contiguous() for key, tensor in kept.items()}, folder / f"{STEM}.safetensors")
    with pytest.raises(ModelCorrupt, match=rf"lacks {lost}.*download it again"):
        load(folder)


def test_pixart_by_the_name_that_it_was_published_under(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    config = {
        "_class_name": "Transformer2DModel",
        "norm_type": "ada_norm_single",
        "num_attention_heads": 16,
        "attention_head_dim": 6,
        "num_layers": 2,
        "caption_channels": 8,
        "sample_size": 64,
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file({key: each.contiguous() for key, each in in_diffusers(PIXART).items()}, folder / f"{STEM}.safetensors")
    assert is_plain(load(folder), PIXART)


@pytest.mark.parametrize("name", [f"{STEM}.fp16.safetensors", f"{STEM}.bf16.safetensors", "model.safetensors"])
def test_a_variant_that_is_alone_is_meant(name: str, tmp_path: Path) -> None:
    folder = make(tmp_path / "m", name)
    (folder / f"{STEM}.bin").touch()
    assert is_plain(load(folder), FLUX)
    assert locate("m", [str(tmp_path)]) == str(folder)


@pytest.mark.parametrize(
    ("stem", "index"),
    [
        (f"{STEM}.fp16", f"{STEM}.fp16.safetensors.index.json"),
        (f"{STEM}.fp16", f"{STEM}.safetensors.index.fp16.json"),
        (STEM, f"{STEM}.safetensors.index.json"),
    ],
)
def test_a_variant_may_have_shards(stem: str, index: str, tmp_path: Path) -> None:
    folder = make_sharded(tmp_path / "m", stem, index)
    assert is_plain(load(folder), FLUX)
    assert is_plain(load(folder / index), FLUX)
    refused(folder / f"{stem}-00001-of-00002.safetensors", ModelUnsupported, "one of several files.* give their folder")


def test_the_plain_file_goes_before_variants(tmp_path: Path) -> None:
    folder = make(tmp_path / "m")
    (folder / f"{STEM}.fp16.safetensors").write_bytes(bytes(100))
    assert is_plain(load(folder), FLUX)


def test_of_several_variants_one_is_to_be_named(tmp_path: Path) -> None:
    folder = make(make(tmp_path / "m", f"{STEM}.bf16.safetensors"), f"{STEM}.fp16.safetensors")
    refused(folder, ModelUnsupported, r"has .*\.bf16\.safetensors, .*\.fp16\.safetensors.*give the path of the file")
    for name in ("bf16", "fp16"):
        path = folder / f"{STEM}.{name}.safetensors"
        assert is_plain(load(Path(locate(str(path), [str(tmp_path)]))), FLUX)


def test_the_configuration_beside_a_file_is_part_of_it(tmp_path: Path) -> None:
    """Where shapes don't tell: the tiny model's heads and axes are nobody else's."""
    path = make(tmp_path / "m") / f"{STEM}.safetensors"
    before = read_checkpoint(str(path)).identity
    assert is_plain(load(path), FLUX)
    make(tmp_path / "m", guidance_embeds=False)
    assert read_checkpoint(str(path)).identity != before


def test_the_configuration_beside_a_file_lies_in_the_roots(tmp_path: Path) -> None:
    folder = make(tmp_path / "roots" / "m")
    (folder / "config.json").rename(tmp_path / "config.json")
    (folder / "config.json").symlink_to(tmp_path / "config.json")
    with pytest.raises(ModelNotAllowed, match=r"config\.json lies outside"):
        locate(str(folder / f"{STEM}.safetensors"), [str(tmp_path / "roots")])


@pytest.mark.parametrize("indexed", [True, False])
def test_the_transformer_within_a_folder_is_meant(indexed: bool, tmp_path: Path) -> None:
    """A pipeline's folder, and a trainer's, which has no index of its parts."""
    make(tmp_path / "m" / "transformer", f"{STEM}.bf16.safetensors")
    (tmp_path / "m" / "transformer_ema").mkdir()
    if indexed:
        (tmp_path / "m" / "model_index.json").write_text("{}")
    assert is_plain(load(tmp_path / "m"), FLUX)

"""LoRA layers of rank 0, of another size, and in parts: what ComfyUI leaves out is left out and told of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import FLUX, FP32, relative_error
from safetensors.torch import save_file
from test_patches import comfyuis_weights, expected, layout_of, patched_weights, randn, read, shapes_of
from torch import Tensor

from tacod.rank.changes import Change, LoHa, LoKr, LoRA
from tacod.rank.lora import read_lora
from tacod.rank.misfit import Misfit
from tacod.rank.patch_request import parse_patches
from tacod.rank.patches import Patch, apply
from tacod_client.errors import ArgumentError, ModelCorrupt, ModelUnsupported, TacodError

GOOD = "diffusion_model.double_blocks.0.img_attn.proj"
OTHER = "diffusion_model.single_blocks.1.linear2"


def good() -> dict[str, Tensor]:
    return {f"{GOOD}.lora_up.weight": randn(80, 4), f"{GOOD}.lora_down.weight": randn(4, 80)}


def other(**parts: Tensor) -> dict[str, Tensor]:
    """A second layer, whose weight is [80, 400]."""
    return {f"{OTHER}.{name.replace('__', '.')}": tensor for name, tensor in parts.items()}


# --- rank 0 -----------------------------------------------------------------------------------------------------------

NOTHING = {
    "lora": lambda **more: LoRA(up=randn(24, 0), down=randn(0, 12), **more),
    "lora on a convolution": lambda **more: LoRA(up=randn(24, 0, 1, 1), down=randn(0, 12, 1, 1), **more),
    "loha": lambda **more: LoHa(w1_a=randn(24, 0), w1_b=randn(0, 12), w2_a=randn(24, 0), w2_b=randn(0, 12), **more),
    "lokr": lambda **more: LoKr(w1=randn(4, 4), w2_a=randn(6, 0), w2_b=randn(0, 3), **more),
    "lokr, both": lambda **more: LoKr(w1_a=randn(4, 0), w1_b=randn(0, 4), w2_a=randn(6, 0), w2_b=randn(0, 3), **more),
}


@pytest.mark.parametrize("alpha", [None, 0.0, 4.0])
@pytest.mark.parametrize("kind", NOTHING)
def test_rank_zero_changes_nothing(kind: str, alpha: float | None) -> None:
    weight = randn(24, 12)
    made: Change = NOTHING[kind](alpha=alpha)
    assert apply(weight, [Patch(made, 0.7)], "a") is weight
    assert torch.equal(apply(weight, [Patch(made, 0.7, 0.5)], "a"), 0.5 * weight)


def test_rank_zero_with_magnitudes_brings_rows_to_them() -> None:
    weight, magnitude = randn(24, 12), 1 + torch.rand(24, 1)
    out = apply(weight, [Patch(NOTHING["lora"](dora_scale=magnitude))], "a")
    assert relative_error(out, magnitude * weight / weight.norm(dim=1, keepdim=True)) <= FP32


def test_rank_zero_must_fit_too() -> None:
    with pytest.raises(Misfit):
        apply(randn(24, 13), [Patch(NOTHING["lora"](), strength_model=2.0)], "a")


def test_alpha_zero_changes_nothing() -> None:
    weight = randn(24, 12)
    assert torch.equal(apply(weight, [Patch(LoRA(up=randn(24, 2), down=randn(2, 12), alpha=0.0))], "a"), weight)


@pytest.mark.parametrize("tensors", [other(lora_up__weight=torch.zeros(80, 0), lora_down__weight=torch.zeros(0, 400))])
@pytest.mark.parametrize("alpha", [None, 4.0])
def test_a_file_with_a_layer_of_rank_zero(tensors: dict[str, Tensor], alpha: float | None, tmp_path: Path) -> None:
    file, notes = good(), list[str]()
    more = {} if alpha is None else {f"{OTHER}.alpha": torch.tensor(alpha)}
    path = tmp_path / "lora.safetensors"
    save_file({**file, **tensors, **more}, path)
    found = read_lora(str(path), layout_of(FLUX), shapes_of(FLUX), notes=notes)
    out, wanted = (patched_weights(FLUX, each) for each in (found, read(FLUX, file)))
    assert all(torch.equal(out[key], wanted[key]) for key in wanted)
    assert notes == []


# --- left out ---------------------------------------------------------------------------------------------------------

LEFT_OUT: dict[str, tuple[dict[str, Tensor], str]] = {
    "more columns": (other(lora_up__weight=torch.ones(80, 4), lora_down__weight=torch.ones(4, 401)), "[80, 401]"),
    "fewer rows": (other(lora_up__weight=torch.ones(64, 4), lora_down__weight=torch.ones(4, 400)), "[64, 400]"),
    "two ranks": (other(lora_up__weight=torch.ones(80, 4), lora_down__weight=torch.ones(3, 400)), "no whole lora"),
    "down alone": (other(lora_down__weight=torch.ones(4, 400)), "no whole lora"),
    "alpha alone": (other(alpha=torch.tensor(1.0)), "alpha and nothing"),
    "magnitudes alone": (other(dora_scale=torch.ones(80, 1)), "dora_scale and nothing"),
    "three of four": (
        other(hada_w1_b=torch.ones(2, 400), hada_w2_a=torch.ones(80, 2), hada_w2_b=torch.ones(2, 400)),
        "no whole loha",
    ),
    "a larger product": (other(lokr_w1=torch.ones(4, 4), lokr_w2=torch.ones(20, 101)), "[80, 404]"),
    "a larger difference": (other(diff=torch.ones(80, 401)), "[80, 401]"),
    "a difference the other way": (other(diff=torch.ones(400, 80)), "[400, 80]"),
    "an empty difference": (other(diff=torch.ones(0, 400)), "[0, 400]"),
    "magnitudes of others": (
        other(lora_up__weight=torch.ones(80, 4), lora_down__weight=torch.ones(4, 400), dora_scale=torch.ones(79, 1)),
        "dora_scale has shape [79, 1]",
    ),
}


@pytest.mark.parametrize("case", LEFT_OUT)
def test_a_layer_that_does_not_fit_is_left_out_and_told_of(case: str) -> None:
    tensors, words = LEFT_OUT[case]
    file, notes = good(), list[str]()
    found = read_lora({**file, **tensors}, layout_of(FLUX), shapes_of(FLUX), notes=notes)
    assert found.keys() == read(FLUX, file).keys()
    [note] = notes
    assert OTHER.removeprefix("diffusion_model.") in note
    assert words in note


@pytest.mark.parametrize("case", LEFT_OUT)
def test_a_file_of_which_nothing_fits_is_refused(case: str) -> None:
    with pytest.raises((ModelUnsupported, ModelCorrupt), match=r"single_blocks\.1\.linear2"):
        read(FLUX, LEFT_OUT[case][0])


REFUSED: dict[str, tuple[dict[str, Tensor], type[TacodError]]] = {
    "up alone": (other(lora_up__weight=torch.ones(80, 4)), ModelCorrupt),
    "one of four": (other(hada_w1_a=torch.ones(80, 2)), ModelCorrupt),
    "half a product": (other(lokr_w1=torch.ones(4, 4)), ModelCorrupt),
    "as many numbers": (
        other(lora_up__weight=torch.ones(400, 4), lora_down__weight=torch.ones(4, 80)),
        ModelUnsupported,
    ),
    "another weight": (other(set_weight=torch.ones(80, 401)), ModelUnsupported),
    "whole numbers": (other(diff=torch.ones(80, 400, dtype=torch.int8)), ModelCorrupt),
    "no layer of the model": ({"diffusion_model.double_blocks.7.img_attn.proj.diff": torch.ones(1)}, ModelUnsupported),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_comfyui_fails_with_or_merges_otherwise_is_refused(case: str) -> None:
    tensors, error = REFUSED[case]
    with pytest.raises(error, match=r"single_blocks\.1\.linear2|double_blocks\.7"):
        read(FLUX, {**good(), **tensors})


@pytest.mark.comfyui
@pytest.mark.parametrize("case", list(LEFT_OUT))
def test_comfyui_leaves_out_the_same(case: str, comfy: Any) -> None:
    file = {**good(), **LEFT_OUT[case][0]}
    wanted, out = comfyuis_weights(comfy, FLUX, file, 0.8), patched_weights(FLUX, read(FLUX, file, 0.8))
    assert [key for key in out if not torch.equal(out[key], wanted[key])] == []


def test_single_patches_are_left_out_alike() -> None:
    shapes = {"a.weight": (2, 2), "b.weight": (3, 2)}
    fitting = {"key": "a.weight", "kind": "diff", "diff": torch.ones(2, 2)}
    wide = {"key": "b.weight", "kind": "lora", "up": randn(4, 1), "down": randn(1, 2)}
    odd = {"key": "b.weight", "kind": "lora", "up": randn(3, 2), "down": randn(1, 2)}
    notes: list[str] = []
    assert list(parse_patches([wide, fitting, odd], shapes=shapes, notes=notes)) == ["a.weight"]
    assert [note.split(":")[0] for note in notes] == ["patches[0]", "patches[2]"]
    with pytest.raises(ArgumentError, match=r"patches\[0\]: b\.weight") as caught:
        parse_patches([wide, odd], shapes=shapes)
    assert caught.value.to_wire()["code"] == "ArgumentError"
    # What it is put on would be scaled all the same.
    with pytest.raises(ArgumentError, match=r"patches\[1\]: b\.weight"):
        parse_patches([fitting, {**wide, "strength_model": 0.5}], shapes=shapes)


# --- dtypes and places ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2], ids=str
)
@pytest.mark.parametrize(
    "alpha", [torch.tensor(2), torch.tensor([2.0]), torch.tensor([[2]]), torch.tensor(2.0, dtype=torch.bfloat16)]
)
def test_factors_of_any_dtype(dtype: torch.dtype, alpha: Tensor, tmp_path: Path) -> None:
    file = {name: tensor.to(dtype) for name, tensor in good().items()}
    save_file({**file, f"{GOOD}.alpha": alpha}, tmp_path / "lora.safetensors")
    [(key, [patch])] = read(FLUX, str(tmp_path / "lora.safetensors")).items()
    wide = [tensor.float() for tensor in file.values()]
    same = Patch(LoRA(up=wide[0], down=wide[1], alpha=2.0))
    weight = FLUX.model.state_dict()[key]
    assert relative_error(apply(weight, [patch], key), expected(weight, [same]).float()) <= FP32


@pytest.mark.parametrize("name", ["lora.sft", "0f1e2d3c", "lora.safetensors"])
def test_a_file_may_have_any_name(name: str, tmp_path: Path) -> None:
    """As in a hub's cache, whose links are resolved before a file is opened."""
    save_file(good(), tmp_path / name)
    assert len(read(FLUX, str(tmp_path / name))) == 1


def test_other_kinds_of_files_are_refused_by_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(ModelUnsupported, match="is a folder"):
        read(FLUX, str(tmp_path))
    (tmp_path / "lora.safetensors").write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(ModelUnsupported, match="is a GGUF file"):
        read(FLUX, str(tmp_path / "lora.safetensors"))

"""LoRA layers of rank 0, of another size, and in parts: what ComfyUI leaves out is left out and told of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import FLUX, FP32, relative_error
from safetensors.torch import save_file
from test_patches import comfyuis_weights, expected, layout_of, patched_weights, randn, read, shapes_of
from torch import Tensor

from tacod.rank.weights.changes import Change, LoHa, LoKr, LoRA
from tacod.rank.weights.lora import read_lora
from tacod.rank.weights.misfit import Misfit
from tacod.rank.weights.patch_request import parse_patches
from tacod.rank.weights.patches import Patch, apply
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
    "two products of other shapes": (
        other(
            hada_w1_a=torch.ones(80, 2),
            hada_w1_b=torch.ones(2, 400),
            hada_w2_a=torch.ones(80, 2),
            hada_w2_b=torch.ones(2, 399),
        ),
        "no whole loha",
    ),
    "two products of other rows": (
        other(
            hada_w1_a=torch.ones(79, 2),
            hada_w1_b=torch.ones(2, 400),
            hada_w2_a=torch.ones(80, 3),
            hada_w2_b=torch.ones(3, 400),
        ),
        "no whole loha",
    ),
    "a larger difference": (other(diff=torch.ones(80, 401)), "[80, 401]"),
    "a difference the other way": (other(diff=torch.ones(400, 80)), "[400, 80]"),
    "an empty difference": (other(diff=torch.ones(0, 400)), "[0, 400]"),
    "a part that nothing has": (other(diff_m=torch.ones(1, 6, 80)), "match nothing in this model"),
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
    "a product that spreads over the other": (
        other(
            hada_w1_a=torch.ones(80, 2),
            hada_w1_b=torch.ones(2, 400),
            hada_w2_a=torch.ones(80, 2),
            hada_w2_b=torch.ones(2, 1),
        ),
        ModelCorrupt,
    ),
    "factors of one product apart": (
        other(
            hada_w1_a=torch.ones(80, 2),
            hada_w1_b=torch.ones(3, 400),
            hada_w2_a=torch.ones(80, 2),
            hada_w2_b=torch.ones(2, 400),
        ),
        ModelCorrupt,
    ),
    "complex numbers": (other(diff=torch.ones(80, 400, dtype=torch.cfloat)), ModelCorrupt),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_comfyui_fails_with_or_merges_otherwise_is_refused(case: str) -> None:
    tensors, error = REFUSED[case]
    with pytest.raises(error, match=r"single_blocks\.1\.linear2"):
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


# --- one layer under several names ------------------------------------------------------------------------------------

LAYER = "double_blocks.0.img_attn.proj"
FLAT = LAYER.replace(".", "_")
THEIRS = "transformer_blocks.0.attn.to_out.0"
TWICE = [
    (LAYER, f"diffusion_model.{LAYER}"),
    (FLAT, f"lora_unet_{FLAT}"),
    (f"transformer.{LAYER}", f"lora_unet_{FLAT}"),
    (f"lora_unet_{FLAT}", f"diffusion_model.{LAYER}"),
    (f"diffusion_model.{LAYER}", f"transformer.{THEIRS}"),
    (f"lora_unet_{FLAT}", f"transformer.{THEIRS}"),
    (LAYER, f"lora_unet_{FLAT}", f"diffusion_model.{LAYER}", f"transformer.{THEIRS}"),
]
"""The names of one layer, in the order in which ComfyUI reads them; the last one's counts."""


def each_under(names: tuple[str, ...]) -> dict[str, Tensor]:
    file = {}
    for name in names:
        file |= {f"{name}.lora_up.weight": randn(80, 2), f"{name}.lora_down.weight": randn(2, 80)}
        file[f"{name}.alpha"] = torch.rand(())
    return file


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("names", TWICE, ids="-".join)
def test_of_one_layer_under_several_names_the_last_counts(names: tuple[str, ...], backwards: bool) -> None:
    """Last by ComfyUI's list of names; in the file they may have any order."""
    file, notes = each_under(names), list[str]()
    if backwards:
        file = dict(reversed(file.items()))
    found = read_lora(file, layout_of(FLUX), shapes_of(FLUX), notes=notes)
    wanted = read(FLUX, {name: tensor for name, tensor in file.items() if name.startswith(f"{names[-1]}.")})
    out, expected_weights = patched_weights(FLUX, found), patched_weights(FLUX, wanted)
    assert all(torch.equal(out[key], expected_weights[key]) for key in out)
    assert sorted(notes) == [f"the LoRA: {name}: {names[-1]} patches the same" for name in sorted(names[:-1])]


@pytest.mark.comfyui
@pytest.mark.parametrize("names", TWICE, ids="-".join)
def test_comfyui_reads_the_same_last(names: tuple[str, ...], comfy: Any) -> None:
    file = dict(reversed(each_under(names).items()))
    wanted, out = comfyuis_weights(comfy, FLUX, file, 0.8), patched_weights(FLUX, read(FLUX, file, 0.8))
    assert [key for key in out if not torch.equal(out[key], wanted[key])] == []


def test_one_that_counts_and_does_not_fit_is_not_replaced() -> None:
    """Nor is it in ComfyUI, which has forgotten the other by then."""
    names = TWICE[0]
    file = {**each_under(names[:1]), **each_under(names[1:])}
    file[f"{names[1]}.lora_down.weight"] = randn(2, 81)
    with pytest.raises(ModelUnsupported, match=r"\[80, 81\]"):
        read(FLUX, file)
    notes: list[str] = []
    file |= {f"{OTHER}.diff": randn(80, 400)}
    assert list(read_lora(file, layout_of(FLUX), shapes_of(FLUX), notes=notes)) == ["single_blocks.1.linear2.weight"]
    assert len(notes) == 2


@pytest.mark.parametrize(
    "names",
    [
        # Which of these it reads last depends on the family.
        (f"transformer.{THEIRS}", f"lora_transformer_{THEIRS.replace('.', '_')}"),
        (f"unet.{LAYER}", f"diffusion_model.{LAYER}"),
    ],
)
def test_one_layer_under_names_of_no_known_order_is_refused(names: tuple[str, ...]) -> None:
    with pytest.raises(ModelUnsupported, match="more than once"):
        read(FLUX, each_under(names))


# --- one layer's several changes --------------------------------------------------------------------------------------

NAME = f"diffusion_model.{LAYER}"
CHANGES: dict[str, Callable[[], dict[str, Tensor]]] = {
    "another adapter": lambda: {".lora_A.other.weight": randn(2, 80), ".lora_B.other.weight": randn(80, 2)},
    "adapter": lambda: {".lora_A.default.weight": randn(2, 80), ".lora_B.default.weight": randn(80, 2)},
    "transformers": lambda: {
        ".lora_linear_layer.down.weight": randn(2, 80),
        ".lora_linear_layer.up.weight": randn(80, 2),
    },
    "without weight": lambda: {".lora_A": randn(2, 80), ".lora_B": randn(80, 2)},
    "diffusers, old": lambda: {".lora.down.weight": randn(2, 80), ".lora.up.weight": randn(80, 2)},
    "PEFT": lambda: {".lora_A.weight": randn(2, 80), ".lora_B.weight": randn(80, 2)},
    "diffusers, older": lambda: {"_lora.down.weight": randn(2, 80), "_lora.up.weight": randn(80, 2)},
    "kohya": lambda: {".lora_down.weight": randn(2, 80), ".lora_up.weight": randn(80, 2)},
    "LoHa": lambda: {
        ".hada_w1_a": randn(80, 2),
        ".hada_w1_b": randn(2, 80),
        ".hada_w2_a": randn(80, 2),
        ".hada_w2_b": randn(2, 80),
    },
    "LoKr": lambda: {".lokr_w1": randn(4, 4), ".lokr_w2": randn(20, 20)},
    "norm": lambda: {".w_norm": randn(80, 80)},
    "difference": lambda: {".diff": randn(80, 80)},
    "another weight": lambda: {".set_weight": randn(80, 80)},
}
"""What follows a layer's name, in the order in which ComfyUI reads it: each replaces those before it."""
BOTH = [(first, last) for index, last in enumerate(CHANGES) for first in list(CHANGES)[:index]]


def spelled(*changes: str) -> dict[str, Tensor]:
    """A layer with these changes, and with what goes with any of them."""
    file = {NAME + part: tensor for change in changes for part, tensor in CHANGES[change]().items()}
    return file | {f"{NAME}.alpha": torch.tensor(3.0), f"{NAME}.dora_scale": 1 + torch.rand(80, 1)}


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize(("first", "last"), BOTH)
def test_of_one_layers_changes_the_last_counts(first: str, last: str, backwards: bool) -> None:
    """Last by ComfyUI's order; in the file they may have any."""
    file, notes = spelled(first, last), list[str]()
    replaced, counting = (
        [name for name in file if name.removeprefix(NAME) in CHANGES[each]()] for each in (first, last)
    )
    if backwards:
        file = dict(reversed(file.items()))
    found = read_lora(file, layout_of(FLUX), shapes_of(FLUX), notes=notes)
    wanted = read(FLUX, {name: tensor for name, tensor in file.items() if name not in replaced})
    out, expected_weights = patched_weights(FLUX, found), patched_weights(FLUX, wanted)
    assert all(torch.equal(out[key], expected_weights[key]) for key in out)
    [note] = notes
    assert note in {f"the LoRA: {left}: {right} patches the same" for left in replaced for right in counting}


@pytest.mark.comfyui
@pytest.mark.parametrize(("first", "last"), BOTH)
def test_comfyui_reads_the_same_change_last(first: str, last: str, comfy: Any) -> None:
    file = dict(reversed(spelled(first, last).items()))
    wanted, out = comfyuis_weights(comfy, FLUX, file, 0.8), patched_weights(FLUX, read(FLUX, file, 0.8))
    assert [key for key in out if not torch.equal(out[key], wanted[key])] == []


def test_adapters_of_names_that_comfyui_does_not_know_are_refused_together() -> None:
    file = spelled("another adapter")
    file |= {name.replace(".other.", ".third."): tensor for name, tensor in file.items()}
    with pytest.raises(ModelUnsupported, match=r"lora_A\.other\.weight and .*lora_A\.third\.weight patch"):
        read(FLUX, file)
    assert len(read(FLUX, {**file, **spelled("adapter")})) == 1


def test_a_change_that_comfyui_does_not_see_replaces_none() -> None:
    file, notes = spelled("PEFT"), list[str]()
    more = {f"{NAME}.lora_down.weight": randn(2, 80), f"{NAME}.hada_w2_a": randn(80, 2)}
    found = read_lora({**more, **file}, layout_of(FLUX), shapes_of(FLUX), notes=notes)
    out, wanted = patched_weights(FLUX, found), patched_weights(FLUX, read(FLUX, file))
    assert all(torch.equal(out[key], wanted[key]) for key in wanted)
    assert len(notes) == 2


def test_factors_of_two_spellings_are_not_put_together() -> None:
    with pytest.raises(ModelCorrupt, match="no whole lora"):
        read(FLUX, {f"{NAME}.lora_up.weight": randn(80, 2), f"{NAME}.lora_A.weight": randn(2, 80)})


def test_of_a_biass_changes_the_last_counts() -> None:
    value = randn(80)
    others = {f"{NAME}.b_norm": randn(80), f"{NAME}.diff_b": randn(80), f"{NAME}.bias.diff": randn(80)}
    [(key, [patch])] = read(FLUX, {f"{NAME}.bias.set_weight": value, **others}).items()
    assert (key, patch.change.kind) == (f"{LAYER}.bias", "set")
    [(_, [patch])] = read(FLUX, others).items()
    assert torch.equal(patch.change.contents()["diff"], others[f"{NAME}.bias.diff"])


def test_one_tensor_under_two_names_is_refused() -> None:
    name = "double_blocks.0.processor.proj_lora1"
    file = {f"{name}.up.weight": randn(80, 2), f"{name}.down.weight": randn(2, 80)}
    with pytest.raises(ModelUnsupported, match="which are the same tensor"):
        read(FLUX, {**file, f"{LAYER}.lora_up.weight": randn(80, 2)})


# --- dtypes and places ------------------------------------------------------------------------------------------------

WHOLE = {
    "lora": lambda: other(lora_up__weight=whole(80, 4), lora_down__weight=whole(4, 400)),
    "dora": lambda: other(lora_up__weight=randn(80, 4), lora_down__weight=randn(4, 400), dora_scale=whole(80, 1) + 1),
    "loha": lambda: other(
        hada_w1_a=whole(80, 2), hada_w1_b=whole(2, 400), hada_w2_a=whole(80, 2), hada_w2_b=whole(2, 400)
    ),
    "lokr": lambda: other(lokr_w1=whole(4, 4), lokr_w2=whole(20, 100)),
    "diff": lambda: other(diff=whole(80, 400)),
    "set": lambda: other(set_weight=whole(80, 400)),
}


def whole(*shape: int) -> Tensor:
    return torch.randint(0, 3, shape)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("kind", WHOLE)
def test_whole_numbers_are_cast(kind: str, dtype: torch.dtype) -> None:
    file = WHOLE[kind]()
    integers = {name: tensor if tensor.is_floating_point() else tensor.to(dtype) for name, tensor in file.items()}
    floats = {name: tensor.float() for name, tensor in file.items()}
    out, wanted = (patched_weights(FLUX, read(FLUX, each, 0.8)) for each in (integers, floats))
    assert all(torch.equal(out[key], wanted[key]) for key in wanted)
    assert not torch.equal(
        out["single_blocks.1.linear2.weight"], FLUX.model.state_dict()["single_blocks.1.linear2.weight"]
    )


@pytest.mark.comfyui
@pytest.mark.parametrize("kind", WHOLE)
def test_comfyui_casts_whole_numbers(kind: str, comfy: Any) -> None:
    file = {
        name: tensor if tensor.is_floating_point() else tensor.to(torch.int8) for name, tensor in WHOLE[kind]().items()
    }
    wanted, out = comfyuis_weights(comfy, FLUX, file, 0.8), patched_weights(FLUX, read(FLUX, file, 0.8))
    assert [key for key in out if not torch.equal(out[key], wanted[key])] == []


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

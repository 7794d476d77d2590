"""Weight patches: each kind against its formula and against ComfyUI's own code; LoRA files in every trainer's names."""

from __future__ import annotations

import logging
import math
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import FLUX, FP32, SD3, Tiny, relative_error
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils import parametrize

from tacod.rank.families.names import Place
from tacod.rank.parallel.sequence import SequenceParallel
from tacod.rank.weights.changes import Change, Diff, LoHa, LoKr, LoRA, Set
from tacod.rank.weights.lora import is_text_encoders, read_lora
from tacod.rank.weights.patch_request import parse_patches
from tacod.rank.weights.patches import SWAP, Patch, apply
from tacod_client.errors import ArgumentError, ModelCorrupt, ModelNotFound, ModelUnsupported, TacodError


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def randn(*shape: int) -> Tensor:
    return torch.randn(shape)


# --- formulas ---------------------------------------------------------------------------------------------------------


def low_rank(a: Tensor, b: Tensor, core: Tensor | None) -> Tensor:
    if core is None:
        return a @ b
    out = torch.zeros(a.shape[1], b.shape[1], *core.shape[2:], dtype=core.dtype)
    for r in range(core.shape[0]):
        for s in range(core.shape[1]):
            out += a[r][:, None, None, None] * b[s][None, :, None, None] * core[r, s]
    return out


def difference(change: Change) -> tuple[Tensor, float]:
    """A factored change in fp64, and its scale, as the papers have them."""
    v = {name: x.double() if isinstance(x, Tensor) else x for name, x in change.contents().items()}
    alpha = v["alpha"]
    if isinstance(change, LoRA):
        up, down = v["up"].flatten(1), v["down"].flatten(1)
        delta = up @ down if v["mid"] is None else low_rank(up.T, down, v["mid"])
        rank = len(down)
    elif isinstance(change, LoHa):
        delta = low_rank(v["w1_a"], v["w1_b"], v["t1"]) * low_rank(v["w2_a"], v["w2_b"], v["t2"])
        rank = len(v["w1_b"])
    else:
        first = v["w1"] if v["w1"] is not None else v["w1_a"] @ v["w1_b"]
        second = v["w2"] if v["w2"] is not None else low_rank(v["w2_a"], v["w2_b"], v["t2"])
        rows = [torch.cat([a * second for a in row], dim=1) for row in first]
        delta = torch.cat(rows, dim=0)
        rank = next((len(v[name]) for name in ("w2_b", "w1_b") if v[name] is not None), alpha or 1)
    return delta, 1 if alpha is None else alpha / rank


def expected(weight: Tensor, patches: list[Patch]) -> Tensor:
    """What patches make of a weight, in fp64."""
    weight = weight.double().clone()
    for patch in patches:
        dim, start, length = patch.offset or (0, 0, weight.shape[0])
        rows = weight.narrow(dim, start, length)
        base = patch.strength_model * rows
        if isinstance(patch.change, Set):
            rows.copy_(patch.change.value)
            continue
        delta, scale = (patch.change.diff.double(), 1.0) if isinstance(patch.change, Diff) else difference(patch.change)
        delta = scale * delta.reshape(base.shape)
        if patch.function:
            half = len(delta) // 2
            delta = torch.cat((delta[half:], delta[:half]))
        magnitude = getattr(patch.change, "dora_scale", None)
        if magnitude is not None:
            moved = base + delta
            by_rows = magnitude.shape[0] == len(base)
            others = tuple(i for i in range(base.ndim) if i != (0 if by_rows else 1))
            norm = (base if by_rows else moved).square().sum(others, keepdim=True).sqrt()
            wide = [-1 if i == (0 if by_rows else 1) else 1 for i in range(base.ndim)]
            delta = moved * magnitude.double().reshape(wide) / norm - base
        rows.copy_(base + patch.strength * delta)
    return weight


SHAPE = (24, 12)
CONV = (24, 12, 3, 3)
CHANGES: dict[str, tuple[tuple[int, ...], Callable[[], Change]]] = {
    "lora": (SHAPE, lambda: LoRA(up=randn(24, 4), down=randn(4, 12))),
    "lora, alpha": (SHAPE, lambda: LoRA(up=randn(24, 4), down=randn(4, 12), alpha=3.0)),
    "lora, bf16": (SHAPE, lambda: LoRA(up=randn(24, 4).bfloat16(), down=randn(4, 12).bfloat16(), alpha=1.0)),
    "lora on a bias": ((24,), lambda: LoRA(up=randn(24, 4), down=randn(4, 1))),
    "lora on a convolution": (CONV, lambda: LoRA(up=randn(24, 4, 1, 1), down=randn(4, 12, 3, 3), alpha=2.0)),
    "lora with a core": (
        CONV,
        lambda: LoRA(up=randn(24, 4, 1, 1), down=randn(4, 12, 1, 1), mid=randn(4, 4, 3, 3), alpha=2.0),
    ),
    "dora of rows": (SHAPE, lambda: LoRA(up=randn(24, 4), down=randn(4, 12), alpha=2.0, dora_scale=randn(24, 1))),
    "dora of columns": (SHAPE, lambda: LoRA(up=randn(24, 4), down=randn(4, 12), alpha=2.0, dora_scale=randn(1, 12))),
    "dora of a convolution's rows": (
        CONV,
        lambda: LoRA(up=randn(24, 4, 1, 1), down=randn(4, 12, 3, 3), dora_scale=randn(24, 1, 1, 1)),
    ),
    "dora of a convolution's columns": (
        CONV,
        lambda: LoRA(up=randn(24, 4, 1, 1), down=randn(4, 12, 3, 3), dora_scale=randn(1, 12, 1, 1)),
    ),
    "loha": (
        SHAPE,
        lambda: LoHa(w1_a=randn(24, 4), w1_b=randn(4, 12), w2_a=randn(24, 2), w2_b=randn(2, 12), alpha=3.0),
    ),
    "loha with cores": (
        CONV,
        lambda: LoHa(
            w1_a=randn(4, 24),
            w1_b=randn(4, 12),
            t1=randn(4, 4, 3, 3),
            w2_a=randn(2, 24),
            w2_b=randn(2, 12),
            t2=randn(2, 2, 3, 3),
            alpha=3.0,
        ),
    ),
    "loha with dora": (
        SHAPE,
        lambda: LoHa(
            w1_a=randn(24, 4), w1_b=randn(4, 12), w2_a=randn(24, 4), w2_b=randn(4, 12), dora_scale=randn(1, 12)
        ),
    ),
    "lokr, whole": (SHAPE, lambda: LoKr(w1=randn(4, 3), w2=randn(6, 4), alpha=7.0)),
    "lokr, second low": (SHAPE, lambda: LoKr(w1=randn(4, 3), w2_a=randn(6, 2), w2_b=randn(2, 4), alpha=3.0)),
    "lokr, first low": (SHAPE, lambda: LoKr(w1_a=randn(4, 2), w1_b=randn(2, 3), w2=randn(6, 4), alpha=3.0)),
    "lokr, both low": (
        SHAPE,
        lambda: LoKr(w1_a=randn(4, 2), w1_b=randn(2, 3), w2_a=randn(6, 3), w2_b=randn(3, 4), alpha=3.0),
    ),
    "lokr on a convolution": (CONV, lambda: LoKr(w1=randn(4, 3), w2=randn(6, 4, 3, 3))),
    "lokr with a core": (
        CONV,
        lambda: LoKr(w1=randn(4, 3), w2_a=randn(2, 6), w2_b=randn(2, 4), t2=randn(2, 2, 3, 3), alpha=3.0),
    ),
    "lokr with dora": (SHAPE, lambda: LoKr(w1=randn(4, 3), w2=randn(6, 4), dora_scale=randn(24, 1))),
    "diff": (SHAPE, lambda: Diff(diff=randn(24, 12))),
    "diff, bf16": (SHAPE, lambda: Diff(diff=randn(24, 12).bfloat16())),
    "set": (SHAPE, lambda: Set(value=randn(24, 12))),
}
PLACEMENTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "half": {"strength": 0.5},
    "negative": {"strength": -1.3},
    "base scaled": {"strength": 0.7, "strength_model": 0.4},
    "only base scaled": {"strength": 0.0, "strength_model": 0.4},
    "slice": {"strength": 0.7, "offset": 12},
    "slice, base scaled": {"strength": 0.7, "strength_model": 0.4, "offset": 12},
    "swapped": {"strength": 0.7, "function": SWAP},
}


def placed(change: Change, shape: tuple[int, ...], placement: Mapping[str, Any]) -> tuple[Tensor, Patch]:
    """A weight and a patch of it; an offset is so many rows before and after the slice."""
    options = dict(placement)
    margin = options.pop("offset", 0)
    if margin:
        options["offset"] = (0, margin, shape[0])
    return randn(shape[0] + 2 * margin, *shape[1:]), Patch(change, **options)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", CHANGES)
def test_each_kind_equals_its_formula(name: str, placement: str) -> None:
    shape, make = CHANGES[name]
    weight, patch = placed(make(), shape, PLACEMENTS[placement])
    before = weight.clone()
    out = apply(weight, [patch], "w")
    assert torch.equal(weight, before)
    assert out.dtype == torch.float32
    assert relative_error(out, expected(weight, [patch]).float()) < FP32


def test_patches_are_put_on_in_order() -> None:
    weight = randn(*SHAPE)
    patches = [Patch(make(), 0.5, 0.9) for shape, make in CHANGES.values() if shape == SHAPE]
    assert relative_error(apply(weight, patches, "w"), expected(weight, patches).float()) < FP32
    late = apply(weight, [patches[0], Patch(Set(value=weight))], "w")
    early = apply(weight, [Patch(Set(value=weight)), patches[0]], "w")
    assert torch.equal(late, weight)
    assert not torch.equal(early, weight)


SIZES = st.integers(1, 6)
STRENGTHS = st.floats(-2, 2).filter(lambda x: x == 0 or abs(x) > 1e-3)


@st.composite
def patched(draw: st.DrawFn) -> tuple[Tensor, Patch]:
    """A weight of any shape, and any kind of patch on any slice of it."""
    kind = draw(st.sampled_from(["lora", "loha", "lokr", "diff", "set"]))
    alpha = draw(st.none() | st.floats(0.5, 8))
    a, b, c, d, r, s = (draw(SIZES) for _ in range(6))
    height = draw(st.sampled_from([None, 1, 3]))
    torch.manual_seed(draw(st.integers(0, 1 << 16)))
    kernel = () if height is None else (height, 2)
    rows, columns = a, b
    if kind == "lora":
        mid = randn(r, r, *kernel) if kernel and draw(st.booleans()) else None
        ones = (1,) * len(kernel)
        change: Change = LoRA(
            up=randn(a, r, *ones), down=randn(r, b, *(ones if mid is not None else kernel)), mid=mid, alpha=alpha
        )
    elif kind == "loha":
        change = LoHa(
            w1_a=randn(r, a) if kernel else randn(a, r),
            w1_b=randn(r, b),
            t1=randn(r, r, *kernel) if kernel else None,
            w2_a=randn(s, a) if kernel else randn(a, s),
            w2_b=randn(s, b),
            t2=randn(s, s, *kernel) if kernel else None,
            alpha=alpha,
        )
    elif kind == "lokr":
        rows, columns = a * c, b * d
        first = {"w1": randn(a, b)} if draw(st.booleans()) else {"w1_a": randn(a, r), "w1_b": randn(r, b)}
        second = {"w2": randn(c, d, *kernel)}
        if draw(st.booleans()):
            core = {"t2": randn(s, s, *kernel)} if kernel else {}
            second = {"w2_a": randn(s, c) if kernel else randn(c, s), "w2_b": randn(s, d), **core}
        change = LoKr(**first, **second, alpha=alpha)
    else:
        value = randn(a, b, *kernel)
        change = Diff(diff=value) if kind == "diff" else Set(value=value)
    before, after = draw(st.integers(0, 3)), draw(st.integers(0, 3))
    offset = (0, before, rows) if before + after else None
    function = draw(st.sampled_from([None, SWAP])) if rows % 2 == 0 else None
    patch = Patch(change, draw(STRENGTHS), draw(st.just(1.0) | STRENGTHS), offset, function)
    return randn(before + rows + after, columns, *kernel), patch


@settings(deadline=None, max_examples=150)
@given(patched())
def test_any_shape_on_any_slice(drawn: tuple[Tensor, Patch]) -> None:
    weight, patch = drawn
    before = weight.clone()
    out = apply(weight, [patch], "w")
    wanted = expected(weight, [patch])
    assert out.shape == weight.shape
    assert torch.equal(weight, before)
    # What cancels is small: measure against what was added up.
    size = wanted.norm() + before.norm() + 1
    assert float((out - wanted).norm() / size) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [name for name in CHANGES if name != "set"])
def test_at_strength_zero_nothing_changes(name: str, dtype: torch.dtype) -> None:
    shape, make = CHANGES[name]
    weight = randn(*shape).to(dtype)
    weight.view(-1)[:2] = torch.tensor([-0.0, 1e-7])
    assert apply(weight, [Patch(make(), 0.0), Patch(make(), -0.0)], "w") is weight
    assert apply(weight, [], "w") is weight


def test_a_set_ignores_its_strength_and_function() -> None:
    """As in ComfyUI."""
    value = randn(4, 3)
    for patch in (Patch(Set(value=value), 0.0), Patch(Set(value=value), 0.5, 0.5, None, SWAP)):
        assert torch.equal(apply(randn(4, 3), [patch], "w"), value)


def test_a_diff_pads_only_where_it_is_told_to() -> None:
    weight, diff = randn(4, 3), randn(6, 5)
    out = apply(weight, [Patch(Diff(diff=diff, pad_weight=True), 0.5)], "w")
    assert torch.equal(out, torch.nn.functional.pad(weight, (0, 2, 0, 2)) + 0.5 * diff)
    grown = apply(weight, [Patch(Diff(diff=diff, pad_weight=True), 0.0)], "w")
    assert torch.equal(grown, torch.nn.functional.pad(weight, (0, 2, 0, 2)))
    for other in (randn(3, 9), randn(6, 5, 1)):
        with pytest.raises(ArgumentError, match=r"w: .*\[4, 3\]"):
            apply(weight, [Patch(Diff(diff=other, pad_weight=True))], "w")


@pytest.mark.parametrize(
    "patch",
    [
        Patch(LoRA(up=torch.ones(24, 2), down=torch.ones(2, 11))),
        Patch(LoRA(up=torch.ones(12, 2), down=torch.ones(2, 24))),
        Patch(LoRA(up=torch.ones(24, 2), down=torch.ones(2, 12), dora_scale=torch.ones(12, 1))),
        Patch(LoHa(w1_a=torch.ones(2, 1), w1_b=torch.ones(1, 2), w2_a=torch.ones(2, 1), w2_b=torch.ones(1, 2))),
        Patch(LoKr(w1=torch.ones(2, 2), w2=torch.ones(24, 12))),
        Patch(Diff(diff=torch.ones(12, 24))),
        Patch(Diff(diff=torch.ones(24, 12)), offset=(0, 0, 12)),
        Patch(Diff(diff=torch.ones(24, 12)), offset=(0, 1, 24)),
        Patch(Diff(diff=torch.ones(24, 12)), offset=(2, 0, 1)),
        Patch(Set(value=torch.ones(1, 12))),
    ],
)
def test_what_does_not_fit_is_named_with_both_shapes(patch: Patch) -> None:
    with pytest.raises(ArgumentError, match=r"some\.key: .*\[(24|12), 12\]") as caught:
        apply(randn(24, 12), [patch], "some.key")
    assert caught.value.argument == "patches"


def test_factors_that_do_not_go_together_are_refused() -> None:
    for make in (
        lambda: LoRA(up=randn(4, 2), down=randn(3, 5)),
        lambda: LoRA(up=randn(4), down=randn(4, 5)),
        lambda: LoRA(up=randn(4, 2), down=randn(2, 5), mid=randn(2, 3, 3, 3)),
        lambda: LoHa(w1_a=randn(4, 2), w1_b=randn(2, 5), w2_a=randn(4, 2), w2_b=randn(2, 6)),
        lambda: LoHa(w1_a=randn(2, 4), w1_b=randn(2, 5), w2_a=randn(4, 2), w2_b=randn(2, 5), t1=randn(2, 2, 1, 1)),
        lambda: LoKr(w1=randn(2, 2)),
        lambda: LoKr(w1=randn(2, 2), w2=randn(2, 2), w2_a=randn(2, 2), w2_b=randn(2, 2)),
        lambda: LoKr(w1_a=randn(2, 2), w2=randn(2, 2)),
        lambda: Diff(diff=torch.ones(2, 2, dtype=torch.cfloat)),
        lambda: Set(value=randn(0, 2)),
        lambda: LoRA(up=randn(4, 2), down=randn(2, 5), alpha=math.inf),
        lambda: Patch(Diff(diff=randn(1)), math.nan),
        lambda: Patch(Diff(diff=randn(1)), offset=(0, -1, 2)),
    ):
        with pytest.raises(ArgumentError):
            make()
    with pytest.raises(ModelUnsupported, match="transpose"):
        Patch(Diff(diff=randn(1)), function="transpose")


# --- ComfyUI's own ----------------------------------------------------------------------------------------------------


def comfyuis(comfy: Any, patch: Patch) -> tuple[Any, ...]:
    """A patch as ComfyUI's patcher holds it."""
    v = patch.change.contents()
    adapters = comfy.weight_adapter
    kinds: dict[type[Change], Callable[[], Any]] = {
        LoRA: lambda: adapters.LoRAAdapter(set(), (v["up"], v["down"], v["alpha"], v["mid"], v["dora_scale"], None)),
        LoHa: lambda: adapters.LoHaAdapter(
            set(), tuple(v[name] for name in ("w1_a", "w1_b", "alpha", "w2_a", "w2_b", "t1", "t2", "dora_scale"))
        ),
        LoKr: lambda: adapters.LoKrAdapter(
            set(),
            tuple(v[name] for name in ("w1", "w2", "alpha", "w1_a", "w1_b", "w2_a", "w2_b", "t2", "dora_scale")),
        ),
        Diff: lambda: ("diff", (v["diff"], {"pad_weight": v["pad_weight"]})),
        Set: lambda: ("set", (v["value"],)),
    }
    function = comfy.utils.swap_scale_shift if patch.function else None
    return patch.strength, kinds[type(patch.change)](), patch.strength_model, patch.offset, function


CORED = "lokr with a core"
"""What ComfyUI can't merge: torch.kron refuses the strides of a factor with a core, and it logs that and goes on."""


def copies(change: Change) -> Change:
    """The same with tensors of its own: ComfyUI may write into what it is given."""
    return type(change)(**{k: v.clone() if isinstance(v, Tensor) else v for k, v in change.contents().items()})


@pytest.mark.comfyui
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", [name for name in CHANGES if name != CORED])
def test_each_kind_has_comfyuis_bits(name: str, placement: str, dtype: torch.dtype, comfy: Any) -> None:
    """In fp32, as ComfyUI merges on a CPU, and in fp16, as on NVIDIA GPUs."""
    shape, make = CHANGES[name]
    weight, patch = placed(make(), shape, PLACEMENTS[placement])
    theirs = comfyuis(comfy, Patch(copies(patch.change), *(getattr(patch, f) for f in _PUT)))
    wanted = comfy.lora.calculate_weight([theirs], weight.to(dtype, copy=True), "w")
    out = apply(weight, [patch], "w", dtype)
    assert out.dtype == wanted.dtype == dtype
    assert torch.equal(out, wanted), relative_error(out, wanted)


_PUT = ("strength", "strength_model", "offset", "function")


@pytest.mark.comfyui
def test_what_comfyui_cannot_merge(comfy: Any) -> None:
    """If this fails, ComfyUI has learnt it: then `CORED` is to be compared like the others."""
    shape, make = CHANGES[CORED]
    weight, patch = placed(make(), shape, {})
    theirs = comfy.lora.calculate_weight([comfyuis(comfy, patch)], weight.clone(), "w")
    assert torch.equal(theirs, weight)
    assert not torch.equal(apply(weight, [patch], "w"), weight)


@pytest.mark.comfyui
def test_many_patches_have_comfyuis_bits(comfy: Any) -> None:
    weight = randn(*SHAPE)
    patches = [Patch(make(), 0.5, 0.9) for shape, make in CHANGES.values() if shape == SHAPE]
    patches += [Patch(Diff(diff=randn(30, 12), pad_weight=True), 0.5), Patch(LoRA(up=randn(30, 2), down=randn(2, 12)))]
    theirs = [comfyuis(comfy, Patch(copies(p.change), *(getattr(p, f) for f in _PUT))) for p in patches]
    wanted = comfy.lora.calculate_weight(theirs, weight.clone(), "w")
    assert torch.equal(apply(weight, patches, "w"), wanted)


@pytest.mark.comfyui
@settings(deadline=None, max_examples=150)
@given(drawn=patched())
def test_any_shape_is_comfyuis(comfy: Any, drawn: tuple[Tensor, Patch]) -> None:
    weight, patch = drawn
    assume(not isinstance(patch.change, LoKr) or patch.change.t2 is None)
    theirs = comfyuis(comfy, Patch(copies(patch.change), *(getattr(patch, f) for f in _PUT)))
    wanted = comfy.lora.calculate_weight([theirs], weight.clone(), "w")
    assert torch.equal(apply(weight, [patch], "w").float(), wanted)


# --- the wire ---------------------------------------------------------------------------------------------------------


def entry(**more: Any) -> dict[str, Any]:
    return {"key": "diffusion_model.a.weight", "kind": "diff", "diff": torch.ones(2, 2), **more}


def test_entries_become_patches_in_order() -> None:
    body = [
        entry(strength=0.5, strength_model=1, offset=[0, 2, 2], function=SWAP),
        {"key": "b.weight", "kind": "lora", "up": randn(2, 1), "down": randn(1, 2), "alpha": 2, "mid": None},
        entry(key="a.weight", strength=2, offset=None, function=None, reshape=None, pad_weight=None),
    ]
    found = parse_patches(body)
    assert list(found) == ["a.weight", "b.weight"]
    first, second = found["a.weight"]
    assert (first.strength, first.strength_model, first.offset, first.function) == (0.5, 1.0, (0, 2, 2), SWAP)
    assert (second.strength, second.strength_model, second.offset, second.function) == (2.0, 1.0, None, None)
    assert isinstance(found["b.weight"][0].change, LoRA)
    assert found["b.weight"][0].change.alpha == 2.0
    assert parse_patches(None) == parse_patches([]) == {}


@pytest.mark.parametrize("name", CHANGES)
def test_every_kind_survives_the_wire(name: str) -> None:
    _, make = CHANGES[name]
    patch = Patch(make(), 0.3, 0.9)
    contents = patch.change.contents()
    body = [{"key": "w", "kind": patch.change.kind, "strength": 0.3, "strength_model": 0.9, **contents}]
    (parsed,) = parse_patches(body)["w"]
    assert (parsed.change.kind, parsed.strength, parsed.strength_model) == (patch.change.kind, 0.3, 0.9)
    for key, value in patch.change.contents().items():
        came = parsed.change.contents()[key]
        assert torch.equal(came, value) if isinstance(value, Tensor) else came == value


LORA = {"kind": "lora", "diff": None}


@pytest.mark.parametrize(
    ("body", "error", "message"),
    [
        ({}, ArgumentError, "patches: expected a list"),
        ([3], ArgumentError, r"patches\[0\]: expected a map, got int"),
        ([entry(), {}], ArgumentError, r"patches\[1\].key: expected a string, got None"),
        ([entry(key=7)], ArgumentError, r"patches\[0\].key: expected a string, got 7"),
        ([entry(key="")], ArgumentError, r"patches\[0\].key"),
        ([entry(kind=None)], ArgumentError, r"patches\[0\].kind: expected a string"),
        ([entry(strength="1")], ArgumentError, r"patches\[0\].strength: '1' is not a finite number"),
        ([entry(strength=True)], ArgumentError, r"patches\[0\].strength: True"),
        ([entry(strength=math.nan)], ArgumentError, r"patches\[0\].strength: nan"),
        ([entry(strength=10**400)], ArgumentError, r"patches\[0\].strength: 1000"),
        ([entry(strength_model=math.inf)], ArgumentError, r"patches\[0\].strength_model: inf"),
        ([entry(offset=[0, 1])], ArgumentError, r"patches\[0\].offset"),
        ([entry(offset=[0, 1, True])], ArgumentError, r"patches\[0\].offset"),
        ([entry(offset=[0, -1, 2])], ArgumentError, r"patches\[0\]: a.weight \(diff\): offset"),
        ([entry(diff=None)], ArgumentError, r"patches\[0\].diff: expected a tensor, got NoneType"),
        ([entry(diff=[1.0])], ArgumentError, r"patches\[0\].diff: expected a tensor, got list"),
        (
            [entry(diff=torch.ones(2, dtype=torch.cfloat))],
            ArgumentError,
            r"patches\[0\]: .*diff: expected real numbers",
        ),
        ([entry(pad_weight=1)], ArgumentError, r"patches\[0\].pad_weight: expected true or false"),
        ([entry(up=torch.ones(2, 2))], ArgumentError, r"patches\[0\].up: no such field"),
        ([entry(alpha="x", **LORA)], ArgumentError, r"patches\[0\].(diff|alpha)"),
        ([{"path": "a", "strenght": 1}], ArgumentError, r"patches\[0\].strenght: no such field"),
        ([{"path": 3}], ArgumentError, r"patches\[0\].path: expected a string"),
        ([{"path": "a"}], ArgumentError, r"patches\[0\].path: files of patches can't be read here"),
        ([entry(function="f")], ModelUnsupported, r"patches\[0\]: a.weight \(diff\): function 'f'"),
        ([entry(kind="oft")], ModelUnsupported, r"patches\[0\]: a.weight has a patch of kind 'oft'"),
        ([entry(kind="model_as_lora")], ModelUnsupported, "kind 'model_as_lora'"),
        ([entry(kind="merge")], ModelUnsupported, "kind 'merge'"),
        ([entry(reshape=[4, 4])], ModelUnsupported, "kind 'diff' that reshapes"),
    ],
)
def test_a_bad_entry_is_named(body: Any, error: type[TacodError], message: str) -> None:
    with pytest.raises(error, match=message):
        parse_patches(body)


def test_shapes_are_checked_before_anything_is_merged() -> None:
    assert parse_patches([entry()], shapes={"a.weight": (2, 2)})
    assert parse_patches([entry(diff=torch.ones(4, 4), pad_weight=True)], shapes={"a.weight": (2, 2)})
    with pytest.raises(ArgumentError, match=r"patches\[0\].key: the model has no weight 'a.weight'"):
        parse_patches([entry()], shapes={"b.weight": (2, 2)})
    whole = {"key": "a.weight", "kind": "set", "value": torch.ones(2, 2)}
    with pytest.raises(ArgumentError, match=r"patches\[1\]: a.weight: .*\[2, 2\].*\[3, 2\]"):
        parse_patches([entry(diff=torch.ones(3, 2)), whole], shapes={"a.weight": (3, 2)})
    with pytest.raises(ArgumentError, match=r"patches\[0\]: a.weight: .*\[2, 2\].*\[3, 2\]"):
        parse_patches([entry()], shapes={"a.weight": (3, 2)})


def test_files_stand_among_the_others_in_order() -> None:
    def read(path: str, strength: float) -> dict[str, list[Patch]]:
        assert (path, strength) == ("x.safetensors", 0.5)
        return {"a.weight": [Patch(Set(value=torch.zeros(2, 2)), strength)]}

    found = parse_patches([entry(), {"path": "x.safetensors", "strength": 0.5}, entry()], read)
    assert [patch.change.kind for patch in found["a.weight"]] == ["diff", "set", "diff"]


# --- files ------------------------------------------------------------------------------------------------------------


def layout_of(tiny: Tiny) -> dict[str, Place]:
    return type(tiny.model).diffusers_layout(tiny.config)


def shapes_of(tiny: Tiny) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in tiny.model.state_dict().items()}


def read(tiny: Tiny, tensors: Mapping[str, Tensor] | str, strength: float = 1.0) -> dict[str, list[Patch]]:
    return read_lora(tensors, layout_of(tiny), shapes_of(tiny), strength)


def patched_weights(tiny: Tiny, patches: Mapping[str, list[Patch]]) -> dict[str, Tensor]:
    return {key: apply(weight, patches.get(key, []), key) for key, weight in tiny.model.state_dict().items()}


def check_same(tiny: Tiny, tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor], least: int = 1) -> None:
    """The file changes so many weights, to what is wanted."""
    out = patched_weights(tiny, read(tiny, tensors))
    original = tiny.model.state_dict()
    assert sum(not torch.equal(out[key], original[key]) for key in out) >= least
    for key, value in wanted.items():
        assert relative_error(out[key], value) < 1e-6, key


def three(name: str) -> list[str]:
    return [name.format(which) for which in "qkv"]


MODULES = {
    "flux": {
        "double_blocks.0.img_attn.qkv": three("transformer_blocks.0.attn.to_{}"),
        "double_blocks.1.img_attn.proj": ["transformer_blocks.1.attn.to_out.0"],
        "double_blocks.1.txt_attn.qkv": three("transformer_blocks.1.attn.add_{}_proj"),
        "double_blocks.0.txt_mlp.2": ["transformer_blocks.0.ff_context.net.2"],
        "single_blocks.1.linear1": [
            *three("single_transformer_blocks.1.attn.to_{}"),
            "single_transformer_blocks.1.proj_mlp",
        ],
        "single_blocks.0.linear2": ["single_transformer_blocks.0.proj_out"],
        "single_blocks.0.modulation.lin": ["single_transformer_blocks.0.norm.linear"],
        "img_in": ["x_embedder"],
        "final_layer.linear": ["proj_out"],
    },
    "sd3": {
        "joint_blocks.0.x_block.attn.qkv": three("transformer_blocks.0.attn.to_{}"),
        "joint_blocks.0.x_block.attn2.qkv": three("transformer_blocks.0.attn2.to_{}"),
        "joint_blocks.1.context_block.attn.qkv": three("transformer_blocks.1.attn.add_{}_proj"),
        "joint_blocks.1.context_block.attn.proj": ["transformer_blocks.1.attn.to_add_out"],
        "joint_blocks.1.x_block.mlp.fc1": ["transformer_blocks.1.ff.net.0.proj"],
        "x_embedder.proj": ["pos_embed.proj"],
        "context_embedder": ["context_embedder"],
    },
}
"""Modules of the single file, and what diffusers has for them; the last of four takes the rows that are left."""
SWAPPED = {
    "flux": {"final_layer.adaLN_modulation.1": "norm_out.linear"},
    "sd3": {
        "final_layer.adaLN_modulation.1": "norm_out.linear",
        "joint_blocks.2.context_block.adaLN_modulation.1": "transformer_blocks.2.norm1_context.linear",
    },
}

Factors = dict[str, tuple[Tensor, Tensor]]
"""Module → up and down."""


def factors(tiny: Tiny) -> tuple[Factors, Factors]:
    """One LoRA in the single file's modules, and the same in diffusers'."""
    shapes, family = shapes_of(tiny), tiny.config["image_model"]
    fused: Factors = {}
    split: Factors = {}
    for module, names in MODULES[family].items():
        rows, columns, *kernel = shapes[f"{module}.weight"]
        sizes = {1: [rows], 3: [columns] * 3, 4: [*[columns] * 3, rows - 3 * columns]}[len(names)]
        ups, downs = [randn(size, 2) for size in sizes], [randn(2, columns, *kernel) for _ in names]
        ones = [1] * len(kernel)
        for name, up, down in zip(names, ups, downs, strict=True):
            split[name] = (up.reshape(*up.shape, *ones), down)
        whole = torch.block_diag(*ups)
        fused[module] = (whole.reshape(*whole.shape, *ones), torch.cat(downs))
    for module, name in SWAPPED[family].items():
        rows, columns = shapes[f"{module}.weight"]
        up, down = randn(rows, 2), randn(2, columns)
        split[name] = (up, down)
        fused[module] = (torch.cat((up[rows // 2 :], up[: rows // 2])), down)
    return fused, split


def file_of(pairs: Factors, name: Callable[[str], str], up: str, down: str, alpha: float | None) -> dict[str, Tensor]:
    """A LoRA file in some trainer's names; ``alpha`` is per rank."""
    tensors = {}
    for module, (first, second) in pairs.items():
        tensors[name(module) + up] = first
        tensors[name(module) + down] = second
        if alpha is not None:
            tensors[name(module) + ".alpha"] = torch.tensor(alpha * len(second))
    return tensors


def dotted(prefix: str) -> Callable[[str], str]:
    return lambda module: prefix + module


def flat(prefix: str) -> Callable[[str], str]:
    return lambda module: prefix + module.replace(".", "_")


KOHYA = (".lora_up.weight", ".lora_down.weight")
PEFT = (".lora_B.weight", ".lora_A.weight")
FORMATS: dict[str, tuple[str, Callable[[str], str], str, str]] = {
    "kohya": ("fused", flat("lora_unet_"), *KOHYA),
    "ai-toolkit": ("fused", dotted("diffusion_model."), *PEFT),
    "the file's names, kohya's parts": ("fused", dotted("diffusion_model."), *KOHYA),
    "the file's names, bare": ("fused", dotted(""), *PEFT),
    "diffusers": ("split", dotted("transformer."), *PEFT),
    "diffusers, old": ("split", dotted("transformer."), ".lora.up.weight", ".lora.down.weight"),
    "diffusers, older": ("split", dotted("transformer."), "_lora.up.weight", "_lora.down.weight"),
    "transformers": ("split", dotted("transformer."), ".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight"),
    "peft": ("split", dotted("base_model.model."), *PEFT),
    "peft, named": ("split", dotted("base_model.model."), ".lora_B.default.weight", ".lora_A.default.weight"),
    "peft, bare": ("split", dotted(""), *PEFT),
    "peft, without weight": ("split", dotted("unet.base_model.model."), ".lora_B", ".lora_A"),
    "onetrainer": ("split", flat("lora_transformer_"), *KOHYA),
    "simpletuner": ("split", flat("lycoris_"), *KOHYA),
}
OURS = {
    "flux": ["the file's names, bare", "peft", "peft, named", "peft, bare", "peft, without weight"],
    "sd3": ["the file's names, bare", "peft, bare", "peft, without weight"],
}
"""Names that some ComfyUI doesn't read for this family, and we do."""


@pytest.mark.parametrize("tiny", [FLUX, SD3], ids=["flux", "sd3"])
@pytest.mark.parametrize("name", FORMATS)
def test_every_trainers_names_give_the_same_weights(name: str, tiny: Tiny) -> None:
    fused, split = factors(tiny)
    layout, *names = FORMATS[name]
    wanted = tiny.model.state_dict()
    for module, (up, down) in fused.items():
        weight = wanted[f"{module}.weight"]
        wanted[f"{module}.weight"] = weight + 0.5 * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
    file = file_of(fused if layout == "fused" else split, *names, 0.5)
    check_same(tiny, file, wanted, least=len(fused))


def comfyuis_weights(comfy: Any, tiny: Tiny, tensors: Mapping[str, Tensor], strength: float) -> dict[str, Tensor]:
    """What ComfyUI's own loader makes of a file."""
    base = getattr(comfy.model_base, {"flux": "Flux", "sd3": "SD3"}[tiny.config["image_model"]])
    weights = {f"diffusion_model.{key}": value.clone() for key, value in tiny.model.state_dict().items()}
    model = base()
    model.state_dict = lambda: weights
    model.model_config = types.SimpleNamespace(unet_config=tiny.config)
    keys = comfy.lora.model_lora_keys_unet(model, {})
    loaded = comfy.lora.load_lora(comfy.lora_convert.convert_lora(dict(tensors)), keys, log_missing=False)
    patches: dict[str, list[Any]] = {}
    for target, value in loaded.items():
        key, *rest = (target,) if isinstance(target, str) else target
        offset, function = (*rest, None, None)[:2]
        patches.setdefault(key, []).append((strength, value, 1.0, offset, function))
    for key, each in patches.items():
        weights[key] = comfy.lora.calculate_weight(each, weights[key], key)
    return {key.removeprefix("diffusion_model."): value for key, value in weights.items()}


@pytest.mark.comfyui
@pytest.mark.parametrize("tiny", [FLUX, SD3], ids=["flux", "sd3"])
@pytest.mark.parametrize("name", FORMATS)
def test_files_have_comfyuis_bits(name: str, tiny: Tiny, comfy: Any) -> None:
    fused, split = factors(tiny)
    layout, *names = FORMATS[name]
    file = file_of(fused if layout == "fused" else split, *names, 0.5)
    wanted = comfyuis_weights(comfy, tiny, file, 0.8)
    out = patched_weights(tiny, read(tiny, file, 0.8))
    if all(torch.equal(wanted[key], value) for key, value in tiny.model.state_dict().items()):
        assert name in OURS[tiny.config["image_model"]]
        return
    different = [key for key in out if not torch.equal(out[key], wanted[key])]
    assert not different, {key: relative_error(out[key], wanted[key]) for key in different}
    assert sum(not torch.equal(out[key], value) for key, value in tiny.model.state_dict().items()) == len(fused)


def lycoris() -> dict[str, Tensor]:
    """Everything but LoRA, on the tiny Flux, whose width is 80."""
    return {
        "lycoris_transformer_blocks_0_attn_to_k.lokr_w1": randn(4, 4),
        "lycoris_transformer_blocks_0_attn_to_k.lokr_w2_a": randn(20, 2),
        "lycoris_transformer_blocks_0_attn_to_k.lokr_w2_b": randn(2, 20),
        "lycoris_transformer_blocks_0_attn_to_k.alpha": torch.tensor(1.0),
        "lora_unet_double_blocks_1_img_attn_proj.hada_w1_a": randn(80, 3),
        "lora_unet_double_blocks_1_img_attn_proj.hada_w1_b": randn(3, 80),
        "lora_unet_double_blocks_1_img_attn_proj.hada_w2_a": randn(80, 3),
        "lora_unet_double_blocks_1_img_attn_proj.hada_w2_b": randn(3, 80),
        "lora_unet_double_blocks_1_img_attn_proj.alpha": torch.tensor(1.0),
        "lora_unet_double_blocks_1_img_attn_proj.dora_scale": randn(1, 80),
        "lora_unet_double_blocks_1_txt_attn_proj.lora_up.weight": randn(80, 3),
        "lora_unet_double_blocks_1_txt_attn_proj.lora_down.weight": randn(3, 80),
        "lora_unet_double_blocks_1_txt_attn_proj.dora_scale": randn(80, 1),
        "diffusion_model.img_in.diff": randn(80, 16),
        "diffusion_model.img_in.diff_b": randn(80),
        "lora_unet_txt_in.diff_b": randn(80),
        "diffusion_model.final_layer.linear.set_weight": randn(16, 80),
        "diffusion_model.double_blocks.0.img_attn.norm.key_norm.scale.diff": randn(16),
        "diffusion_model.single_blocks.0.norm.key_norm.scale.set_weight": randn(16),
        "transformer.single_transformer_blocks.0.proj_out.w_norm": randn(80, 400),
        "transformer.single_transformer_blocks.0.proj_out.b_norm": randn(80),
    }


def test_lycoris_diffs_and_sets_reach_their_weights() -> None:
    file = lycoris()
    out = read(FLUX, file)
    assert {key: patch.change.kind for key, [patch] in out.items()} == {
        "double_blocks.0.img_attn.qkv.weight": "lokr",
        "double_blocks.1.img_attn.proj.weight": "loha",
        "double_blocks.1.txt_attn.proj.weight": "lora",
        "img_in.weight": "diff",
        "img_in.bias": "diff",
        "txt_in.bias": "diff",
        "final_layer.linear.weight": "set",
        "double_blocks.0.img_attn.norm.key_norm.scale": "diff",
        "single_blocks.0.norm.key_norm.scale": "set",
        "single_blocks.0.linear2.weight": "diff",
        "single_blocks.0.linear2.bias": "diff",
    }
    assert out["double_blocks.0.img_attn.qkv.weight"][0].offset == (0, 80, 80)
    weights = patched_weights(FLUX, out)
    original = FLUX.model.state_dict()
    for key, [patch] in out.items():
        assert relative_error(weights[key], expected(original[key], [patch]).float()) < FP32


@pytest.mark.comfyui
def test_lycoris_diffs_and_sets_have_comfyuis_bits(comfy: Any) -> None:
    file = lycoris()
    wanted = comfyuis_weights(comfy, FLUX, file, 0.8)
    out = patched_weights(FLUX, read(FLUX, file, 0.8))
    assert [key for key in out if not torch.equal(out[key], wanted[key])] == []


@pytest.mark.parametrize("tiny", [FLUX, SD3], ids=["flux", "sd3"])
def test_every_parameter_is_found_by_each_of_its_names(tiny: Tiny) -> None:
    shapes = shapes_of(tiny)
    names = {**{key: Place(key) for key in shapes}, **layout_of(tiny)}
    for name, place in names.items():
        rows = place.rows[1] if place.rows else shapes[place.key][0]
        diff = torch.ones(rows, *shapes[place.key][1:])
        module, part = name.removesuffix(".weight"), "diff"
        if module.endswith(".bias"):
            module, part = module.removesuffix(".bias"), "diff_b"
        prefixes = ("diffusion_model.", "") if name in shapes else ("transformer.", "base_model.model.", "")
        for spelled in [*(prefix + module for prefix in prefixes), "lora_unet_" + module.replace(".", "_")]:
            [(key, [patch])] = read(tiny, {f"{spelled}.{part}": diff}).items()
            offset = (0, *place.rows) if place.rows else None
            assert (key, patch.offset, patch.function) == (place.key, offset, SWAP if place.swap else None), spelled


def test_a_bias_of_diffusers_fused_one_is_a_slice() -> None:
    diff = randn(80)
    [(key, [patch])] = read(FLUX, {"transformer.transformer_blocks.0.attn.to_v.diff_b": diff}).items()
    assert key == "double_blocks.0.img_attn.qkv.bias"
    assert patch.offset == (0, 160, 80)


def test_x_flux_names() -> None:
    q = (randn(240, 2), randn(2, 80))
    p = (randn(80, 2), randn(2, 400))
    file = {}
    for stream in "12":
        file[f"double_blocks.0.processor.qkv_lora{stream}.up.weight"] = q[0]
        file[f"double_blocks.0.processor.qkv_lora{stream}.down.weight"] = q[1]
    file["single_blocks.0.processor.qkv_lora.up.weight"] = q[0]
    file["single_blocks.0.processor.qkv_lora.down.weight"] = q[1]
    file["single_blocks.0.processor.proj_lora.up.weight"] = p[0]
    file["single_blocks.0.processor.proj_lora.down.weight"] = p[1]
    found = read(FLUX, file)
    assert {key: patch.offset for key, [patch] in found.items()} == {
        "double_blocks.0.img_attn.qkv.weight": None,
        "double_blocks.0.txt_attn.qkv.weight": None,
        "single_blocks.0.linear1.weight": (0, 0, 240),
        "single_blocks.0.linear2.weight": None,
    }


def test_text_encoders_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    names = [
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight",
        "lora_te_text_model_encoder_layers_0_mlp_fc1.alpha",
        "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight",
        "text_encoder_2.text_model.encoder.layers.0.mlp.fc1.lora_A.weight",
        "text_encoders.clip_l.transformer.text_model.lora_A.weight",
        "bundle_emb.me.string_to_param.*",
    ]
    assert all(map(is_text_encoders, names))
    assert not is_text_encoders("lora_transformer_context_embedder.alpha")
    file = dict.fromkeys(names, torch.ones(1)) | {"img_in.diff": randn(80, 16)}
    with caplog.at_level(logging.INFO):
        assert list(read(FLUX, file)) == ["img_in.weight"]
    assert "6 tensors are for text encoders" in caplog.text
    with pytest.raises(ModelUnsupported, match="nothing in it for a diffusion model"):
        read(FLUX, dict.fromkeys(names, torch.ones(1)))


def test_what_matches_nothing_is_listed() -> None:
    stray = [f"diffusion_model.double_blocks.{i}.img_attn.proj.lora_{x}.weight" for i in (7, 8) for x in "AB"]
    file = dict.fromkeys(stray, randn(80, 80)) | {"img_in.diff": randn(80, 16), "img_in.odd": randn(1)}
    with pytest.raises(ModelUnsupported, match="5 of 6 tensors match nothing in this model: diffusion_model") as caught:
        read(FLUX, file)
    assert caught.value.details["unmatched"] == [*stray, "img_in.odd"]
    assert all(name in caught.value.message for name in stray)


@pytest.mark.parametrize(
    ("names", "family"),
    [
        (["lora_unet_down_blocks_0_attentions_0_proj_in"], "UNet"),
        (["lora_unet_input_blocks_4_1_proj_in", "lora_unet_middle_block_1_proj_in"], "UNet"),
        (["lora_unet_joint_blocks_0_x_block_attn_qkv"], "SD3"),
        (["transformer.single_transformer_blocks.40.attn.to_q"], "Flux"),
        (["diffusion_model.blocks.0.cross_attn.q"], "Wan"),
        (["transformer.transformer_blocks.9.img_mlp.net.2"], "Qwen-Image"),
        (["diffusion_model.noise_refiner.0.attention.qkv"], "Z-Image, Lumina 2"),
    ],
)
def test_another_familys_lora_is_told(names: list[str], family: str) -> None:
    file = {f"{name}.lora_{part}.weight": randn(4, 4) for name in names for part in ("up", "down")}
    with pytest.raises(ModelUnsupported, match=f"look like those of .*{family}"):
        read(FLUX, file)


def test_a_lora_of_other_widths_is_told() -> None:
    file = {"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": randn(2, 64)}
    file["transformer.transformer_blocks.0.attn.to_q.lora_B.weight"] = randn(64, 2)
    with pytest.raises(ModelUnsupported, match=r"to_q: double_blocks.0.img_attn.qkv.weight: .*\[64, 64\].*\[80, 80\]"):
        read(FLUX, file)


@pytest.mark.parametrize(
    ("file", "error", "message"),
    [
        ({"img_in.lora_A.weight": (2, 16)}, ModelCorrupt, r"img_in has down \[2, 16\], which make no whole lora"),
        ({"img_in.lora_A.weight": (2, 16), "img_in.lora_B.weight": (80, 3)}, ModelCorrupt, "no whole lora"),
        ({"img_in.lokr_w1": (4, 4)}, ModelCorrupt, "no whole lokr"),
        ({"img_in.alpha": ()}, ModelCorrupt, "nothing that they are for"),
        (
            {"img_in.lora_A.weight": (2, 16), "img_in.lora_B.weight": (80, 2), "img_in.alpha": (2,)},
            ModelCorrupt,
            "alpha has shape",
        ),
        ({"img_in.diff": (80, 16), "x_embedder.diff": (80, 16)}, ModelUnsupported, "img_in and x_embedder patch"),
        ({"img_in.oft_blocks": (2, 2, 2)}, ModelUnsupported, "OFT"),
        ({"img_in.a1.weight": (2, 2)}, ModelUnsupported, "GLoRA"),
        ({"img_in.reshape_weight": (2,)}, ModelUnsupported, "reshapes"),
        ({"img_in.lora_magnitude_vector": (80,)}, ModelUnsupported, "PEFT's DoRA"),
        ({"img_in.lora_B.bias": (80,)}, ModelUnsupported, "control LoRAs"),
        ({}, ModelUnsupported, "nothing in it"),
    ],
)
def test_a_bad_file_is_named(file: dict[str, tuple[int, ...]], error: type[TacodError], message: str) -> None:
    with pytest.raises(error, match=message):
        read(FLUX, {name: torch.ones(shape) for name, shape in file.items()})


def test_files_are_read_from_disk(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    file = lycoris()
    save_file(file, path)
    from_path, from_tensors = (patched_weights(FLUX, read(FLUX, source, 0.7)) for source in (str(path), file))
    assert all(torch.equal(from_path[key], from_tensors[key]) for key in from_tensors)
    assert read(FLUX, str(path), 0.0) == {}
    with pytest.raises(ModelNotFound):
        read(FLUX, str(tmp_path / "none.safetensors"))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelCorrupt):
        read(FLUX, str(path))


# --- a model ----------------------------------------------------------------------------------------------------------


class Beside(torch.nn.Module):
    """A weight and its low-rank path."""

    def __init__(self, up: torch.Tensor, down: torch.Tensor) -> None:
        super().__init__()
        self.up, self.down = up, down

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + 0.1 * 0.5 * (self.up @ self.down)


def test_a_patched_model_equals_one_with_patched_weights() -> None:
    """A forward with low-rank paths added where a weight is used, and one with weights merged."""
    fused, split = factors(FLUX)
    inputs = FLUX.inputs()
    merged = type(FLUX.model)(FLUX.config)
    merged.load_state_dict(patched_weights(FLUX, read(FLUX, file_of(split, dotted("transformer."), *PEFT, 0.5), 0.1)))
    beside = type(FLUX.model)(FLUX.config)
    beside.load_state_dict(FLUX.model.state_dict())
    for module, (up, down) in fused.items():
        parametrize.register_parametrization(beside.get_submodule(module), "weight", Beside(up, down))
    with torch.inference_mode():
        out = merged(SequenceParallel(), **inputs)
        assert relative_error(out, beside(SequenceParallel(), **inputs)) < FP32
    assert relative_error(out, FLUX.forward(**inputs)) > 1e-3

"""Other attention kernels: what a plan may ask for, what is refused and how, and what forwards by them give.

The kernels here are made up and compute on the CPU; tests/gpu has the real ones.
"""

from __future__ import annotations

import copy
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fake_kernels import EightBits, fakes, rounded
from helpers import FLUX, SD3, read_golden, relative_error
from rank_worker import LAYOUTS, WORLD, Ranks
from torch import Tensor
from torch.nn import functional

from tacod.plan import IN_PARTS, AttentionPolicy, Layout, Plan, Request, Shape, make_plan, parse_request
from tacod.rank.families.base import DiT
from tacod.rank.families.inputs import Inputs
from tacod.rank.forward.graphs import Forwards
from tacod.rank.forward.run import Call, plan_for
from tacod.rank.ops import attention_kernels
from tacod.rank.ops.attention_kernels import KERNELS, FlashAttention3, Int8Attention, Kernel, Obstacle, SageAttention
from tacod.rank.ops.group_bias import GroupBias
from tacod.rank.ops.sdpa import attend, attend_part
from tacod.rank.parallel.topology import Topology
from tacod_client.dtypes import ATTENTIONS
from tacod_client.errors import ArgumentError

CPU = torch.device("cpu")


@pytest.fixture
def made_up() -> Iterator[None]:
    with fakes():
        yield


def forward(dit: DiT, inputs: dict[str, Any], forwards: Forwards | None = None, **request: Any) -> Tensor:
    """On one rank, by a plan with these keys."""
    given = Inputs(inputs, dit.arguments())
    plan = plan_for(dit, parse_request(request, 1) if request else Request(), 1, given)
    with torch.inference_mode():
        out = (forwards or Forwards(Topology()))(Call(dit, plan, given))
    assert isinstance(out, Tensor)
    return out


# --- what a plan may ask for ---------------------------------------------------------------------------------------


def test_one_registry_has_all_that_a_plan_may_ask_for() -> None:
    assert ("exact", *KERNELS) == ATTENTIONS
    assert ("exact", *(name for name, kernel in KERNELS.items() if kernel.tells_lse)) == IN_PARTS
    assert all(name == kernel.name for name, kernel in KERNELS.items())


@pytest.mark.parametrize("value", ["sage2", "", None, True, 1, ["sage"], {"sage": 1}])
def test_other_names_are_refused_with_the_list(value: Any) -> None:
    with pytest.raises(ArgumentError, match="attention: expected 'exact' or 'sage' or 'int8' or 'fa3', got") as caught:
        parse_request({"attention": value}, 3)
    assert caught.value.argument == "plan"


def test_plain_kernels_and_another_one_exclude_each_other() -> None:
    with pytest.raises(ArgumentError, match="attention 'sage' and flash_attention false exclude each other"):
        parse_request({"attention": "sage", "flash_attention": False}, 3)
    assert parse_request({"attention": "exact", "flash_attention": False}, 3).flash_attention is False


@pytest.mark.parametrize("name", ATTENTIONS)
def test_the_plan_tells_it_and_has_a_ring_only_for_parts_that_merge(name: str) -> None:
    shape = Shape(3, 96, 1, (8,))
    asked = parse_request({"attention": name}, 4)
    plan = make_plan(asked, 4, shape)
    assert plan.attention == AttentionPolicy(kernel=name)
    assert ("attention " + name in str(plan)) == (name != "exact")
    if name in IN_PARTS:
        assert make_plan(parse_request({"attention": name, "ring": 2}, 4), 4, shape).layout.ring == 2
        return
    assert plan.layout.ring == 1
    with pytest.raises(ArgumentError, match=f"ring 2 needs another attention than '{name}'.*ask for ulysses"):
        parse_request({"attention": name, "ring": 2}, 4)


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KERNELS)
def test_on_a_cpu_all_are_refused_by_name(name: str) -> None:
    title, half = KERNELS[name].title, copy.deepcopy(FLUX.model).bfloat16()
    with pytest.raises(ArgumentError, match=f"^plan: attention '{name}' .*bf16 and fp16 only.*or ask for 'exact'$"):
        forward(FLUX.model, FLUX.inputs(), attention=name)
    with pytest.raises(ArgumentError) as caught:
        forward(half, {key: each.bfloat16() for key, each in FLUX.inputs().items()}, attention=name)
    assert str(caught.value).startswith(f"plan: attention '{name}' ({title}): this device can't run it: it needs")
    assert caught.value.argument == "plan"


def package(kernel: Kernel, **functions: Any) -> Any:
    """A module in the place of a kernel's package."""
    module = types.ModuleType(kernel.package)
    vars(module).update(functions)
    return module


def sageattn(q: Tensor, k: Tensor, v: Tensor, tensor_layout: str, is_causal: bool, return_lse: bool = False) -> Any:
    """As SageAttention 2's, exact."""
    assert (tensor_layout, is_causal) == ("HND", False)
    out, lse = attend_part(q, k, v)
    return (out.to(q.dtype), lse) if return_lse else out.to(q.dtype)


def int8_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: Any = None, attn_mask: Tensor | None = None) -> Tensor:
    """As comfy-kitchen's, exact."""
    return attend(q, k, v, attn_mask)


def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, return_attn_probs: bool = False) -> Any:
    """As FlashAttention 3's, exact: tokens before heads."""
    out, lse = attend_part(*(each.transpose(1, 2) for each in (q, k, v)))
    out = out.to(q.dtype).transpose(1, 2)
    return (out, lse) if return_attn_probs else out


def first_flash_attn_func(q: Tensor, k: Tensor, v: Tensor) -> Any:
    """As its first versions', which always tell the log-sum-exp."""
    return flash_attn_func(q, k, v, True)


KINDS = [
    (SageAttention, {"sageattn": sageattn}),
    (Int8Attention, {"int8_attention": int8_attention}),
    (FlashAttention3, {"flash_attn_func": flash_attn_func}),
    (FlashAttention3, {"flash_attn_func": first_flash_attn_func}),
]


@pytest.mark.parametrize(("kind", "functions"), KINDS)
def test_a_package_is_called_as_it_wants_to_be(
    monkeypatch: pytest.MonkeyPatch, kind: type[Kernel], functions: dict[str, Any]
) -> None:
    monkeypatch.setattr(kind, "suits", lambda self, device: True)
    kernel = kind()
    monkeypatch.setitem(sys.modules, kernel.package, package(kernel, **functions))
    assert kernel.obstacle(CPU, torch.bfloat16, 64) == Obstacle.NONE
    q, k, v = torch.randn(3, 2, 3, 9, 16)
    assert relative_error(kernel.attend(q, k, v), attend(q, k, v)) <= 1e-6
    assert kernel.attend(q[:, :0], k[:, :0], v[:, :0]).shape == (2, 0, 9, 16)
    if kernel.takes_masks:
        keys = torch.tensor([True, False, True] * 3)[None, None, None]
        assert relative_error(kernel.attend(q, k, v, keys), attend(q, k, v, keys)) <= 1e-6
    if kernel.tells_lse:
        for mine, expected in zip(kernel.attend_part(q, k, v), attend_part(q, k, v), strict=True):
            assert torch.allclose(mine, expected)
        _, nothing = kernel.attend_part(q, k[:, :, :0], v[:, :, :0])
        assert (nothing == -torch.inf).all()


def old_sageattn(q: Tensor, k: Tensor, v: Tensor, tensor_layout: str = "HND", **kwargs: Any) -> Tensor:
    """As version 1's."""
    return attend(q, k, v)


def broken(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
    raise ValueError("Unsupported CUDA architecture: sm75")


def off(q: Tensor, k: Tensor, v: Tensor, *, attn_mask: Tensor | None = None) -> Tensor:
    return 1.2 * attend(q, k, v, attn_mask)


def deaf(q: Tensor, k: Tensor, v: Tensor, *, attn_mask: Tensor | None = None) -> Tensor:
    """Knows masks and doesn't heed them."""
    return attend(q, k, v)


def shifted(q: Tensor, k: Tensor, v: Tensor, return_attn_probs: bool = False) -> Any:
    """Its log-sum-exp is of another base."""
    out, lse = flash_attn_func(q, k, v, True)
    return (out, 1.44 * lse) if return_attn_probs else out


@pytest.mark.parametrize(
    ("kind", "functions", "obstacle", "logged"),
    [
        (SageAttention, None, Obstacle.PACKAGE, "ModuleNotFoundError"),
        (SageAttention, {"sageattn": old_sageattn}, Obstacle.VERSION, "has no SageAttention 2"),
        (Int8Attention, {}, Obstacle.VERSION, "comfy_kitchen has no"),
        (FlashAttention3, {}, Obstacle.VERSION, "flash_attn_interface has no"),
        (FlashAttention3, {"flash_attn_func": broken}, Obstacle.FAILS, "Unsupported CUDA architecture"),
        (FlashAttention3, {"flash_attn_func": shifted}, Obstacle.FAILS, "differs by"),
        (Int8Attention, {"int8_attention": off}, Obstacle.FAILS, "differs by"),
        (Int8Attention, {"int8_attention": deaf}, Obstacle.FAILS, "differs by"),
    ],
)
def test_what_keeps_a_kernel_from_running(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    kind: type[Kernel],
    functions: dict[str, Any] | None,
    obstacle: Obstacle,
    logged: str,
) -> None:
    monkeypatch.setattr(kind, "suits", lambda self, device: True)
    kernel = kind()
    # None in its place makes an import fail.
    module = None if functions is None else package(kernel, **functions)
    monkeypatch.setitem(sys.modules, kernel.package, module)
    assert kernel.obstacle(CPU, torch.bfloat16, 64) == obstacle
    assert logged in caplog.text
    assert kernel.install in kernel.advice(obstacle)


@pytest.mark.parametrize(
    ("name", "capability", "suits"),
    [
        ("sage", (7, 5), False),
        ("sage", (8, 0), True),
        ("sage", (12, 0), True),
        ("int8", (7, 0), False),
        ("int8", (7, 5), True),
        ("fa3", (8, 9), False),
        ("fa3", (9, 0), True),
        ("fa3", (10, 0), False),
    ],
)
def test_cards(monkeypatch: pytest.MonkeyPatch, name: str, capability: tuple[int, int], suits: bool) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert KERNELS[name].suits(torch.device("cuda", 0)) is suits
    assert not KERNELS[name].suits(CPU)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert not KERNELS[name].suits(torch.device("cuda", 0))


def test_heads_that_are_too_wide() -> None:
    with pytest.raises(ArgumentError, match="its heads have at most 128 channels, and this model's have 160"):
        KERNELS["sage"].check(torch.bfloat16, 160)
    KERNELS["fa3"].check(torch.bfloat16, 160)


def test_masks(made_up: None) -> None:
    """A mask needs a kernel that takes it; the bias of guides none does."""
    inputs = FLUX.inputs()
    tokens = sum(FLUX.model.lengths(Inputs(inputs, FLUX.model.arguments())))
    generator = torch.Generator().manual_seed(3)
    masked = {**inputs, "attention_mask": torch.randn(1, tokens, tokens, generator=generator)}
    forwards = Forwards(Topology())
    for name in ("sage", "fa3"):
        with pytest.raises(ArgumentError, match=rf"attention '{name}' .*it takes no such mask.*\(Tensor\)"):
            forward(FLUX.model, masked, forwards, attention=name)
    exact = forward(FLUX.model, masked)
    assert 1e-6 < relative_error(forward(FLUX.model, masked, forwards, attention="int8"), exact) <= 5e-2
    assert relative_error(exact, forward(FLUX.model, inputs)) > 1e-3, "the mask does something"
    for name in KERNELS:
        with pytest.raises(ArgumentError, match=r"it takes no such mask.*GroupBias"):
            KERNELS[name].check(torch.float32, 16, GroupBias(0, torch.zeros(1), ((1, 0.0),)))


def test_what_was_kept_of_another_attention_is_not_used(made_up: None) -> None:
    """The attention is part of what a graph, a prefix and a step cache are known by."""
    shape = Shape(1, 16)
    plans = [make_plan(parse_request({"attention": name}, 1), 1, shape) for name in ATTENTIONS]
    assert len({plan.attention for plan in plans}) == len({hash(plan) for plan in plans}) == len(ATTENTIONS)


# --- what forwards give --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tiny", [FLUX, SD3], ids=lambda tiny: tiny.name)
def test_the_blocks_attend_by_it(made_up: None, tiny: Any) -> None:
    exact, eight = (forward(tiny.model, tiny.inputs(), attention=name) for name in ("exact", "sage"))
    assert torch.equal(exact, forward(tiny.model, tiny.inputs()))
    assert 1e-5 < relative_error(eight, exact) <= 5e-2


@pytest.mark.parametrize(
    ("name", "kernel"), [("flux_dev", "sage"), ("wan21_t2v", "sage"), ("lumina2", "fa3"), ("qwen_image", "int8")]
)
def test_every_layout_gives_the_same(ranks: Ranks, name: str, kernel: str) -> None:
    """8 bits with a scale for each token: no layout may change what is rounded. Qwen-Image's forward has a mask."""
    golden = read_golden(name)
    errors = {}
    rings = [(1, 1, 3), (1, 2, 2)] if kernel in IN_PARTS else []
    for layout in [(1, 1, 1), (1, 3, 1), *rings]:
        assert layout in LAYOUTS
        for sharing in (False, True):
            measured = ranks.run(layout, "golden", name=name, kernel=kernel, sharing=sharing)
            assert len(measured) == WORLD
            errors[layout, sharing] = max(measured)
    assert golden.fp32 < min(errors.values()), "it is not exact attention"
    assert max(errors.values()) <= 5e-2
    assert max(errors.values()) - min(errors.values()) <= 1e-3 * max(errors.values())


def test_if_one_rank_can_not_all_refuse_with_one_reason(ranks: Ranks) -> None:
    said = ranks.run((1, 3, 1), "unlike", kernel="sage", ranks=[1, 3])
    assert len(said) == WORLD
    assert len(set(said)) == 1
    assert said[0].startswith("plan: attention 'sage' (fake attention): rank 1: this device can't run it: it needs ")
    assert "; rank 3: the package none is missing: nothing; or ask for 'exact'" in said[0]


@pytest.mark.parametrize("layout", [(1, 1, 1), (1, 2, 1), (2, 2, 1), (1, 1, 5)], ids=str)
def test_ranks_that_are_left_idle_hear_of_a_mask_that_the_kernel_refuses(ranks: Ranks, layout: Any) -> None:
    said = ranks.run(layout, "masked", kernel="sage")
    assert len(said) == WORLD
    assert len(set(said)) == 1
    assert said[0].startswith("plan: plan: attention 'sage' (fake attention): it takes no such mask")
    assert " and " not in said[0]


def test_another_kernel_is_asked_for_once(made_up: None, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(EightBits, "obstacle", lambda self, *kind: asked.append(kind) or Obstacle.NONE)
    forwards = Forwards(Topology())
    for _ in range(3):
        forward(SD3.model, SD3.inputs(), forwards, attention="sage")
    assert asked == [(CPU, torch.float32, SD3.model.width // SD3.model.heads)]


def test_splitting_keys_is_for_exact_attention(made_up: None, monkeypatch: pytest.MonkeyPatch) -> None:
    split = []
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    monkeypatch.setattr(
        "tacod.rank.forward.graphs.run",
        lambda call, *rest, **more: split.append(call.plan.attention.split_kv) or call.inputs.latents[0],
    )
    given = Inputs({"x": torch.zeros(3), "timestep": torch.zeros(1)}, FLUX.model.arguments())
    for name in ("exact", "sage"):
        plan = Plan(Layout(1, 1, 1), 1, Shape(1, 16), AttentionPolicy(kernel=name))
        Forwards(Topology())(Call(FLUX.model, plan, given))
    assert split == [True, False]


def test_the_fake_is_no_exact_attention() -> None:
    q, k, v = torch.randn(3, 1, 2, 40, 16, generator=torch.Generator().manual_seed(0))
    expected = functional.scaled_dot_product_attention(rounded(q), rounded(k), v)
    assert relative_error(EightBits("sage", False, True).attend(q, k, v), expected) <= 1e-6
    assert relative_error(expected, attend(q, k, v)) > 1e-4
    assert attention_kernels.find_kernel("exact") is None

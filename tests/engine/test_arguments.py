"""What a forward takes besides plain tensors: residuals, masks and stretched positions, checked and read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import FLUX, SD3, Tiny, relative_error
from hypothesis import given
from hypothesis import strategies as st

from tacod.rank.arguments import Kept, check_arguments, check_tokens, load_arguments
from tacod.rank.families.inputs import Argument, Number, Residuals, Spec
from tacod_client import wire
from tacod_client.errors import ArgumentError
from tacod_client.exchange import each_once, pack
from tacod_client.tensors import to_wire

BATCH, TOKENS = 2, 35


def tensor(*shape: int, dtype: str = "F32") -> wire.Tensor:
    return wire.Tensor(dtype, shape, None)


def check(tiny: Tiny, **more: Any) -> None:
    """As the ranks do, for two images of 35 tokens (9 by 14)."""
    sent = {**pack(tiny.inputs(batch=BATCH), "arguments", {}, None), **more}
    specs = tiny.model.arguments()
    check_arguments(sent, specs, tiny.name)
    check_tokens(sent, specs, tiny.model.lengths(sent)[-1])


GOOD = tensor(BATCH, TOKENS, 80)


@pytest.mark.parametrize(
    ("control", "named", "told"),
    [
        (3, "control", "map"),
        ({"input": [None]}, "control", "list of tensors"),
        ({"tensors": [GOOD], "input": 3}, "control", "control.input: expected a list"),
        ({"tensors": [GOOD], "nowhere": 3}, "control", "control.nowhere: expected a list"),
        ({"tensors": [GOOD], "nowhere": [0]}, "control", "input, output, middle"),
        ({"tensors": [GOOD], "input": [1]}, "control", "indexes"),
        ({"tensors": [GOOD], "input": [-1]}, "control", "indexes"),
        ({"tensors": [GOOD], "input": [True]}, "control", "indexes"),
        ({"tensors": [GOOD], "input": ["0"]}, "control", "indexes"),
        ({"tensors": ["GOOD"], "input": [0]}, "control.input[0]", "expected a tensor"),
        ({"tensors": [tensor(2, 35, 81)], "input": [None, 0]}, "control.input[1]", "shape"),
        ({"tensors": [GOOD, tensor(2, 35)], "output": [None, 0, None, 1]}, "control.output[3]", "shape"),
        ({"tensors": [tensor(2, 35, 80, dtype="I32")], "output": [0]}, "control.output[0]", "floating"),
        ({"tensors": [tensor(3, 35, 80)], "input": [None, None, None, 0]}, "control.input[3]", "x has 2"),
        ({"tensors": [tensor(2, 36, 80)], "output": [None, 0]}, "control.output[1]", "36 tokens.* 35"),
        ({"tensors": [tensor(2, 36, 80)]}, "control.tensors[0]", "36 tokens.* 35"),
    ],
)
def test_residuals_are_refused_by_their_place(control: Any, named: str, told: str) -> None:
    with pytest.raises(ArgumentError, match=told) as caught:
        check(FLUX, control=control)
    assert caught.value.argument == named


def test_residuals_for_some_tokens_are_fluxs_alone() -> None:
    check(FLUX, control={"tensors": [tensor(1, 7, 80)], "output": [None, 0, 0]})
    check(SD3, control={"tensors": [tensor(1, TOKENS, 192)], "output": [0, 0]})
    for n in (1, TOKENS - 1, TOKENS + 1):
        with pytest.raises(ArgumentError, match=r"control\.output\[1\]: it is for"):
            check(SD3, control={"tensors": [tensor(1, n, 192)], "output": [None, 0]})


@pytest.mark.parametrize(
    ("tiny", "argument", "value", "told"),
    [
        (SD3, "rope_options", {"scale_x": 2.0}, "takes no such argument"),
        (SD3, "attention_mask", tensor(1, 3, 3), "takes no such argument"),
        (FLUX, "rope_options", [1.0], "map of numbers"),
        (FLUX, "rope_options", {"scale_z": 1.0}, "scale_z"),
        (FLUX, "rope_options", {"scale_x": "2"}, "scale_x"),
        (FLUX, "rope_options", {"scale_x": True}, "scale_x"),
        (FLUX, "rope_options", {"scale_x": float("nan")}, "scale_x"),
        (FLUX, "attention_mask", tensor(129 + 35, 129 + 35), "expected shape"),
        (FLUX, "attention_mask", tensor(1, 164, 163), "must agree"),
        (FLUX, "attention_mask", tensor(1, 163, 163), "164"),
        (FLUX, "attention_mask", tensor(3, 164, 164), "x has 2 images"),
        (FLUX, "attention_mask", tensor(1, 164, 164, dtype="I64"), "floating"),
        (FLUX, "context", tensor(2, 129, 8, dtype="BOOL"), "floating"),
    ],
)
def test_masks_and_options_are_refused_by_name(tiny: Tiny, argument: str, value: Any, told: str) -> None:
    with pytest.raises(ArgumentError, match=told) as caught:
        check(tiny, **{argument: value})
    assert caught.value.argument == argument


def test_a_boolean_mask_hides_where_it_is_false() -> None:
    inputs = FLUX.inputs(batch=BATCH)
    seen = torch.rand(BATCH, 164, 164) < 0.5
    seen.diagonal(dim1=1, dim2=2).fill_(True)
    sent = pack({**inputs, "attention_mask": seen}, "arguments", {}, None)
    check(FLUX, attention_mask=sent["attention_mask"])
    values = load_arguments(sent, FLUX.model.arguments(), torch.float32, torch.device("cpu"))
    scores = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)
    assert torch.equal(values["attention_mask"], scores)
    assert relative_error(FLUX.forward(**inputs, attention_mask=scores), FLUX.forward(**inputs)) > 1e-4


def test_what_repeats_travels_once() -> None:
    one, two = torch.zeros(1, 2, 80), torch.ones(1, 2, 80)
    sent = each_once({"input": [one, one, None, two], "output": [two], "middle": []})
    assert sent["input"] == [0, 0, None, 1]
    assert sent["output"] == [1]
    assert [each is kept for each, kept in zip(sent["tensors"], (one, two), strict=True)] == [True, True]


@pytest.mark.parametrize("control", [[], {"input": None}, {"input": ["a"]}])
def test_what_is_no_control_is_refused_here(control: Any) -> None:
    with pytest.raises(ArgumentError, match="control"):
        each_once(control)


def test_what_comes_by_digest_is_put_on_the_device_once() -> None:
    inputs = {name: to_wire(value, name) for name, value in FLUX.inputs().items()}
    sent = {**inputs, "context": inputs["context"].with_digest()}
    kept = Kept()
    first, second = (
        load_arguments(sent, FLUX.model.arguments(), torch.bfloat16, torch.device("cpu"), kept) for _ in range(2)
    )
    assert first["context"] is second["context"]
    assert first["x"] is not second["x"], "it changes with every step, and has no digest"
    assert [(key[0], value.dtype) for key, value in kept._named.items()] == [(sent["context"].digest, torch.bfloat16)]
    other = load_arguments(sent, FLUX.model.arguments(), torch.float32, torch.device("cpu"), kept)
    assert other["context"].dtype == torch.float32


FAULTS: list[tuple[dict[str, Any], str]] = [
    ({"x": tensor(2, 3, 9, 14)}, "x: expected shape [B, 4, H, W], got shape [2, 3, 9, 14]"),
    ({"x": None}, "x: missing; flux needs it, as shape [B, 4, H, W]"),
    ({"context": tensor(3, 129, 8)}, "context: its B is 3, but that of x is 2; they must agree"),
    ({"ref_latents": [tensor(1, 4, 2, 2)]}, "ref_latents: its B is 1, but that of x is 2; they must agree"),
    (
        {"control": {"tensors": [tensor(3, 35, 80)], "input": [0]}},
        "control.input[0]: it is for 3 images, but x has 2 images; make it 2, or 1 for all",
    ),
    (
        {"attention_mask": tensor(3, 164, 164)},
        "attention_mask: it is for 3 images, but x has 2 images; make it 2, or 1 for all",
    ),
]


@given(st.permutations(list(FLUX.model.arguments())), st.sampled_from(FAULTS))
def test_the_order_of_specs_has_no_meaning(order: list[str], fault: tuple[dict[str, Any], str]) -> None:
    spoiled, told = fault
    sent = {**pack(FLUX.inputs(batch=BATCH), "arguments", {}, None), **spoiled}
    specs = FLUX.model.arguments()
    with pytest.raises(ArgumentError) as caught:
        check_arguments(sent, {name: specs[name] for name in order}, "flux")
    assert caught.value.message == told


@pytest.mark.parametrize(
    "spec", [Number(0, 1, required=True), Residuals(80, {"input": 2}, required=True), Argument(None, choices=("a",))]
)
def test_whatever_is_missing_is_named(spec: Spec) -> None:
    with pytest.raises(ArgumentError, match="n: missing; f needs it, as") as caught:
        check_arguments({}, {"n": spec}, "f")
    assert caught.value.argument == "n"


def test_what_stays_fp32_is_said_by_its_spec() -> None:
    """A timestep for each frame is no other kind of number than one for each image."""
    specs: dict[str, Spec] = {
        "timestep": Argument(("B", "T"), fp32=True),
        "weights": Argument(("B",)),
        "sigmas": Argument(("T",), fp32=True),
    }
    sent = {"timestep": tensor(2, 3), "weights": tensor(2), "sigmas": tensor(3)}
    sent = {name: to_wire(torch.full(each.shape, 1000 / 3), name) for name, each in sent.items()}
    values = load_arguments(sent, specs, torch.bfloat16, torch.device("cpu"))
    assert {name: value.dtype for name, value in values.items()} == {
        "timestep": torch.float32,
        "weights": torch.bfloat16,
        "sigmas": torch.float32,
    }


def test_images_are_taken_along_the_axis_that_the_spec_names() -> None:
    mine, value = slice(1, 2), torch.arange(12.0).view(2, 2, 3)
    assert torch.equal(Argument(("B", "L", 3)).images(value, mine), value[1:2])
    assert torch.equal(Argument(("L", "B", 3)).images(value, mine), value[:, 1:2])
    assert Argument(("L", "M", 3)).images(value, mine) is value, "it has no batch, whatever its sizes"
    assert torch.equal(Argument(("B", 2, 3), many=True).images([value], mine)[0], value[1:2])
    one = value[:1]
    assert Argument(("B", "L", 3), shared=True).images(one, mine) is one
    assert torch.equal(Argument(("B", "L", 3), shared=True).images(value, mine), value[1:2])


@pytest.mark.parametrize("value", [1, 0, 0.0, "True", None, [True]])
def test_a_number_is_no_switch(value: Any) -> None:
    """In Python 1 == True."""
    specs: dict[str, Spec] = {"run": Argument(None, required=True, choices=(False, True))}
    check_arguments({"run": True}, specs, "a family")
    with pytest.raises(ArgumentError, match="run: ") as caught:
        check_arguments({"run": value}, specs, "a family")
    assert caught.value.argument == "run"

"""What is remembered of checked and planned forwards, and of small tensors on the device, is right for the next one."""

from __future__ import annotations

import copy
import gc
import weakref
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from helpers import FLUX, SD3

from tacod.plan import Request
from tacod.rank import arguments as arguments_module
from tacod.rank import plans as plans_module
from tacod.rank.arguments import SMALL_BYTES, SMALL_TENSORS, Kept, check_arguments, load_arguments
from tacod.rank.families.inputs import Anything, Argument
from tacod.rank.plans import KINDS, Plans
from tacod.shares import EQUAL
from tacod_client.errors import ArgumentError
from tacod_client.exchange import pack
from tacod_client.tensors import to_wire
from tacod_client.wire import Tensor

CPU = torch.device("cpu")


def sent(seed: int = 0, **options: Any) -> dict[str, Any]:
    """The arguments of a forward as they come."""
    packed: dict[str, Any] = pack(FLUX.inputs(seed, **options), "arguments", {}, None)
    return packed


def tensor(*shape: int, dtype: str = "F32") -> Tensor:
    return Tensor(dtype, shape, None)


def test_a_forward_of_the_same_kind_is_planned_once() -> None:
    plans = Plans(2)
    first = plans.find(FLUX.model, "auto", sent(0))
    with mock.patch.object(plans_module, "check_arguments", side_effect=AssertionError("checked again")):
        assert plans.find(FLUX.model, "auto", sent(1)) is first
    placed = {**sent(2), "x": Tensor("F32", (1, 4, 9, 14), None, offset=64)}
    assert plans.find(FLUX.model, "auto", placed)[2] == first[2]
    assert first[2] == Plans(2).find(FLUX.model, "auto", sent(3))[2]


@pytest.mark.parametrize(
    ("asked", "more"),
    [
        ("auto", {"x": tensor(1, 4, 9, 16)}),
        ("auto", {"x": tensor(1, 4, 9, 14, dtype="BF16")}),
        ("auto", {"x": tensor(1, 4, 126)}),
        ("auto", {"context": tensor(1, 130, 8)}),
        ("auto", {"context": None}),
        ("auto", {"guidance": 1}),
        ("auto", {"qk_norm_eps": 1e-5}),
        ("auto", {"qk_norm_eps": True}),
        ("auto", {"qk_norm_eps": "1e-5"}),
        ("auto", {"rope_options": {}}),
        ("auto", {"rope_options": {"scale_x": 2.0}}),
        ("auto", {"ref_latents": [tensor(1, 4, 4, 4)]}),
        ("auto", {"ref_latents": []}),
        ("auto", {"colour": 1}),
        ({"ulysses": 2}, {}),
        ({"ulysses": True}, {}),
        ({"ulysses": 3}, {}),
        ({"cfg_parallel": 1}, {}),
        ({"step_cache": 0.1}, {}),
        ({"exchange": "int8"}, {}),
        (["auto"], {}),
    ],
)
def test_another_kind_is_checked_as_if_nothing_were_remembered(asked: Any, more: dict[str, Any]) -> None:
    plans = Plans(2)
    plans.find(FLUX.model, "auto", sent())
    plans.find(FLUX.model, "auto", {**sent(), "qk_norm_eps": 1.0e-3})

    def outcome(plans: Plans) -> Any:
        try:
            _, request, plan = plans.find(FLUX.model, asked, {**sent(), **more})
        except ArgumentError as error:
            return error.message
        return request, plan

    assert outcome(plans) == outcome(plans) == outcome(Plans(2))


def test_another_model_is_another_matter() -> None:
    plans = Plans(1)
    plans.find(FLUX.model, "auto", sent())
    with pytest.raises(ArgumentError, match="guidance"):
        plans.find(SD3.model, "auto", sent())


def test_it_goes_with_its_model_and_keeps_few() -> None:
    plans = Plans(1)
    model = copy.deepcopy(FLUX.model)
    for width in range(KINDS + 5):
        plans.find(model, "auto", {**sent(), "x": tensor(1, 4, 8, 2 + width)})
    assert len(plans._made[model]) == KINDS
    left = weakref.ref(model)
    del model
    gc.collect()
    assert left() is None
    assert len(plans._made) == 0


def test_a_network_of_others_gets_no_latents_that_may_change() -> None:
    specs = {"x": Anything(True, tensor=True)}
    check_arguments({"x": Tensor("F32", (1, 4), (bytes(16),))}, specs, "comfyui")
    placed = Tensor("F32", (1, 4), None, offset=0)
    for x in (placed, [placed]):
        with pytest.raises(ArgumentError) as caught:
            check_arguments({"x": x}, specs, "comfyui")
        assert caught.value.argument == "memory"


class Others:
    """A network that isn't ours."""

    family = "comfyui"
    rates = None
    heads = width = 4
    shares = EQUAL
    hosts = ()
    shares_tokens = True
    is_ours = False

    def specs_for(self, given: Any) -> dict[str, Any]:
        return {"x": Anything(True, tensor=True)}

    def limited(self, asked: Request, arguments: Any) -> Request:
        return asked if self.shares_tokens else replace(asked, sequence_parallel_degree=1)

    def lengths(self, arguments: Any) -> tuple[int, ...]:
        return (9,)


def test_that_is_so_too_after_a_forward_of_the_same_kind_came_as_frames() -> None:
    plans, network = Plans(1), Others()
    plans.find(network, "auto", {"x": Tensor("F32", (1, 4), (bytes(16),))})  # type: ignore[arg-type]
    with pytest.raises(ArgumentError) as caught:
        plans.find(network, "auto", {"x": Tensor("F32", (1, 4), None, offset=0)})  # type: ignore[arg-type]
    assert caught.value.argument == "memory"


def test_small_tensors_are_known_by_their_contents() -> None:
    kept = Kept()
    specs = {**FLUX.model.arguments(), "y": Argument(("B", "N"))}
    y = torch.arange(6.0).reshape(1, 6)
    given = {**sent(), "y": to_wire(y, "y")}

    def load(dtype: torch.dtype = torch.bfloat16, **more: Any) -> Any:
        return load_arguments({**given, **more}, specs, dtype, CPU, kept)

    with mock.patch.object(arguments_module, "_on_device", wraps=arguments_module._on_device) as put:
        first, second = load(), load(y=to_wire(y.clone(), "y"))
        assert second["y"] is first["y"]
        assert second["guidance"] is first["guidance"]
        # The latents are never kept, and the context is large and came without its digest.
        assert put.call_count == len(given) + 2
        assert second["x"] is not first["x"]
        assert second["timestep"] is first["timestep"]
        assert load(timestep=to_wire(torch.tensor([0.25]), "timestep"))["timestep"].tolist() == [0.25]
    for other in (y + 1, y.double(), y.reshape(1, 3, 2)[:, :, 0], y.to(torch.float16)):
        assert torch.equal(load(y=to_wire(other, "y"))["y"], other.to(torch.bfloat16))
    assert load(torch.float32)["y"].dtype == torch.float32


def test_few_small_tensors_are_kept_and_large_ones_by_name_alone() -> None:
    kept = Kept()
    made = []

    def find(tensor: Tensor) -> None:
        kept.find(tensor, torch.float32, lambda: made.append(tensor) or torch.empty(0))

    for number in range(2 * SMALL_TENSORS):
        find(Tensor("U8", (2,), (number.to_bytes(2, "big"),)))
    assert len(kept._small) == SMALL_TENSORS
    large = Tensor("U8", (SMALL_BYTES + 1,), (bytes(SMALL_BYTES + 1),))
    for _ in range(2):
        find(large)
    assert made[-2:] == [large, large]
    named = large.with_digest()
    for _ in range(2):
        find(named)
    assert made.count(named) == 1
    assert named.digest is not None
    kept.drop(named.digest)
    find(named)
    assert made.count(named) == 2
    kept.clear()
    assert not kept._small
    assert not kept._named


def test_a_network_that_stops_sharing_tokens_is_planned_anew() -> None:
    """A call may misfit a table that the small forwards fitted."""
    plans, network = Plans(2), Others()
    arguments = {"x": Tensor("F32", (1, 4), (bytes(16),))}
    assert plans.find(network, "auto", arguments)[2].layout.sequence == 2  # type: ignore[arg-type]
    network.shares_tokens = False
    assert plans.find(network, "auto", arguments)[2].layout.sequence == 1  # type: ignore[arg-type]

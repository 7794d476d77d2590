"""What a sampling run takes, checked before its first step; and its conditions, stacked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import FILL, FLUX, PIXART, SD3, Tiny, relative_error
from torch import Tensor

from tacod.plan import AUTO
from tacod.rank.families.base import DiT
from tacod.rank.families.inputs import Argument, Inputs, Spec
from tacod.rank.forward.graphs import Forwards
from tacod.rank.parallel.topology import Topology
from tacod.rank.sampling.sampling import SampleRequest, begin
from tacod_client.errors import ArgumentError
from tacod_client.exchange import pack
from tacod_client.tensors import to_wire

Change = Callable[[dict[str, Any]], dict[str, Any]]


def request(tiny: Tiny, change: Change = lambda good: {}, **options: Any) -> SampleRequest:
    """A good request, and what is changed of it. Its conditions are maps that a change may fill anew."""
    given = tiny.inputs(batch=2, size=(34, 36) if tiny is PIXART else (9, 14), text=5)
    noise = given.pop("x")
    del given["timestep"]
    good = {
        "sampler": "euler",
        "seed": 0,
        "cfg": 1.0,
        "noise": noise,
        "latent": torch.zeros_like(noise),
        "sigmas": torch.tensor([1.0, 0.5, 0.0]),
        "positive": given,
        "negative": None,
        **options,
    }
    sent = {**good, **change(good)}
    for name in ("noise", "latent", "sigmas"):
        sent[name] = to_wire(sent[name], name)
    for name in ("positive", "negative"):
        sent[name] = None if sent[name] is None else pack(sent[name], name, {}, None)
    return SampleRequest(**sent)


def start(tiny: Tiny, asked: SampleRequest, model: DiT | None = None) -> Any:
    dit = model or tiny.model
    asked.check(dit)
    return begin(asked, dit, AUTO, Forwards(Topology()), torch.device("cpu"))


def with_condition(**more: Any) -> Change:
    return lambda good: {"positive": {**good["positive"], **more}}


IMAGE = torch.ones(2, 4, 9, 14)
REFUSED: list[tuple[str, str, Change]] = [
    ("positive.x", "the run gives it", with_condition(x=IMAGE)),
    ("positive.timestep", "the run gives it", with_condition(timestep=torch.ones(2))),
    ("positive.noise", "beside the conditions", with_condition(noise=IMAGE)),
    ("positive.latent", "beside the conditions", with_condition(latent=IMAGE)),
    ("positive.control", "every step", with_condition(control={"input": [IMAGE]})),
    ("positive.sequence", "takes no such", with_condition(sequence=IMAGE)),
    ("positive.step_cache", "takes no such", with_condition(step_cache="a")),
    ("positive.self", "takes no such", with_condition(self="a")),
    ("negative.x", "the run gives it", lambda good: {"negative": {**good["positive"], "x": IMAGE}, "cfg": 3.0}),
    ("positive.context", "that of noise is 2", with_condition(context=torch.ones(1, 5, 8))),
    ("positive.context", "missing", with_condition(context=None)),
    ("positive.y", "floating", with_condition(y=torch.ones(2, 6).int())),
    ("positive.attention_mask", "noise has 2 images", with_condition(attention_mask=torch.zeros(3, 40, 40))),
    ("positive.attention_mask", "40 tokens", with_condition(attention_mask=torch.zeros(2, 39, 39))),
    ("positive.ref_latents", "channels|shape", with_condition(ref_latents=[torch.ones(2, 3, 4, 4)])),
    ("negative", "missing", lambda good: {"cfg": 2.0}),
    ("noise", "NaN", lambda good: {"noise": good["noise"] / 0}),
    ("latent", "NaN", lambda good: {"latent": good["latent"] * torch.nan}),
    ("noise", "NaN", lambda good: {"noise": good["noise"].double() * 1e300}),
    ("noise", "expected shape", lambda good: {"noise": good["noise"][:0], "latent": good["latent"][:0]}),
    ("latent", "that of noise", lambda good: {"latent": good["latent"][:1]}),
    ("latent", "that of noise", lambda good: {"latent": good["latent"][..., :-1]}),
    ("sigmas", "floating", lambda good: {"sigmas": torch.tensor([1, 0])}),
    ("sigmas", "fall", lambda good: {"sigmas": torch.tensor([1.0, 1.0 - 1e-9, 0.0]).double()}),
    ("sigmas", "fall", lambda good: {"sigmas": torch.tensor([1.0, 0.0, 0.0])}),
    ("sigmas", "uni_pc", lambda good: {"sigmas": torch.tensor([1.0, 0.001, 0.0]), "sampler": "uni_pc"}),
]


@pytest.mark.parametrize(("argument", "told", "change"), REFUSED)
def test_refused_before_its_first_step(argument: str, told: str, change: Change) -> None:
    with pytest.raises(ArgumentError, match=told) as caught:
        start(FLUX, request(FLUX, change))
    assert caught.value.argument == argument
    assert caught.value.message.startswith(f"{argument}: ")


@pytest.mark.parametrize("channels", [4, 9])
def test_a_model_that_takes_more_than_the_latent(channels: int) -> None:
    shape = torch.zeros(2, channels, 9, 14)
    with pytest.raises(ArgumentError, match=r"x has 9 channels and its output 4.*call forward") as caught:
        start(FILL, request(FILL, noise=shape, latent=shape))
    assert caught.value.argument == "model"
    assert FILL.model.sampling()["channels"] == 4


def test_a_family_without_a_latent_format() -> None:
    class Bare(type(SD3.model)):  # type: ignore[misc]
        latent_format = None

    with pytest.raises(ArgumentError, match="call forward") as caught:
        start(SD3, request(SD3), Bare(SD3.config))
    assert caught.value.argument == "model"


def test_a_latent_that_the_family_has_no_place_for() -> None:
    large = torch.zeros(2, 4, 40, 40)
    with pytest.raises(ArgumentError, match="noise: this model takes latents of at most 24 by 24") as caught:
        start(SD3, request(SD3, noise=large, latent=large))
    assert caught.value.argument == "noise"
    odd = torch.zeros(2, 4, 35, 36)
    with pytest.raises(ArgumentError, match="noise: its latents are 35 by 36"):
        start(PIXART, request(PIXART, noise=odd, latent=odd))
    small = torch.zeros(1, 4, 1, 5)
    wide = Tiny("wide", {**SD3.config, "patch_size": 4})
    with pytest.raises(ArgumentError, match="x: its latents are 1 by 5, too small for patches of 4"):
        wide.model.lengths({"x": small, "context": torch.zeros(1, 5, 8)})
    patches = Tiny("patches", {**FLUX.config, "patch_size": 4})
    with pytest.raises(ArgumentError, match="ref_latents: its latents are 1 by 5"):
        patches.model.lengths({"x": IMAGE, "context": torch.zeros(2, 5, 8), "ref_latents": [small]})


@pytest.mark.parametrize("tiny", [FLUX, SD3, PIXART], ids=lambda tiny: tiny.name)
def test_conditions_of_other_sizes_are_run_one_by_one(tiny: Tiny) -> None:
    longer = {"context": torch.randn(2, 9, 8, generator=torch.Generator().manual_seed(4))}

    def asked(given: dict[str, Any], cfg: float, **more: Any) -> Tensor:
        run = start(tiny, request(tiny, lambda good: {"positive": {**good["positive"], **given}, **more}, cfg=cfg))
        return [*run.steps][-1]

    good = request(tiny)
    negative = {name: torch.zeros(each.shape) for name, each in good.positive.items()}
    guided = asked(longer, 3.0, negative=negative)
    assert guided.isfinite().all()
    assert relative_error(guided, asked(longer, 1.0)) > 1e-3


def test_what_has_no_batch_is_stacked_only_if_it_is_the_same() -> None:
    specs: dict[str, Spec] = {
        "context": Argument(("B", "L", 8)),
        "last": Argument(("L", "B")),
        "frames": Argument(("T",)),
        "mask": Argument(("B", 3, 3), shared=True),
    }
    one: dict[str, Any] = {
        "context": torch.ones(2, 5, 8),
        "last": torch.ones(5, 2),
        "frames": torch.ones(4),
        "mask": torch.ones(1, 3, 3),
    }

    def stack(other: dict[str, Any]) -> Inputs | None:
        return Inputs.stack([Inputs(one, specs), Inputs(other, specs)], images=2)

    joint = stack(dict(one))
    assert joint is not None
    assert {name: tuple(value.shape) for name, value in joint.items()} == {
        "context": (4, 5, 8),
        "last": (5, 4),
        "frames": (4,),
        "mask": (4, 3, 3),
    }
    assert stack({**one, "frames": torch.zeros(4)}) is None
    assert stack({**one, "frames": torch.ones(5)}) is None

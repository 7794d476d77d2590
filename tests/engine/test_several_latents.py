"""Sampling runs of a model of two latents, against steps on each latent by themselves."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import made_up_plain
import pytest
import torch
from helpers import FP32, relative_error
from made_up import engine_of, inputs, model
from torch import Tensor

from tacod.group.arena import Arena
from tacod.group.work import Sample
from tacod.rank.engine import Engine
from tacod.rank.families.inputs import Argument
from tacod.rank.forward.watch import Watch
from tacod.rank.parallel.topology import Topology
from tacod.rank.sampling.packed import Packing
from tacod.rank.sampling.samplers import SAMPLERS
from tacod.rank.sampling.sampling import _for_each
from tacod_client.errors import ArgumentError
from tacod_client.exchange import pack
from tacod_client.tensors import from_wire

SIGMAS = torch.tensor([1.0, 0.7, 0.4, 0.0])
SHIFTS = torch.tensor([0.1, 0.2, 0.3, 0.4]).view(1, 4, 1, 1, 1)
"""Of the video's latent format, whose scale is 0.5; the sound's are 0 and 2."""


def asked(**other: Any) -> dict[str, Any]:
    """A run with guidance; each image has a text of its own."""
    given, noise = inputs("pair_bare"), inputs("pair_bare", seed=5)["x"]
    good = {
        "plan": "auto",
        "sampler": "euler",
        "seed": 3,
        "cfg": 2.5,
        "noise": noise,
        "latent": [0.3 * each for each in given["x"]],
        "sigmas": SIGMAS,
        "positive": {"context": given["context"]},
        "negative": {"context": 0.5 * given["context"].flip(1)},
    }
    return {**good, **other}


def result(run: dict[str, Any], engine: Engine | None = None) -> list[Tensor]:
    """What an engine of one rank gives."""
    engine = engine or engine_of(model("pair"), Topology())
    inputs = {name: pack(value, name, {}, None) for name, value in run.items()}
    with torch.inference_mode():
        engine.runs["j"] = engine._begin("j", model="m", **inputs)
        for step in range(len(run["sigmas"]) - 1):
            done = engine.sample("j", step)
    assert isinstance(done.out, list)
    return [from_wire(each, "torch") for each in done.out]


def into_model(latents: list[Tensor]) -> list[Tensor]:
    return [(latents[0] - SHIFTS) * 0.5, latents[1] * 2.0]


def out_of_model(latents: list[Tensor]) -> list[Tensor]:
    return [latents[0] / 0.5 + SHIFTS, latents[1] / 2.0]


def by_hand(run: dict[str, Any], noisy: bool) -> list[Tensor]:
    """The run's Euler steps, on each latent alone; ``noisy`` ones are ancestral."""
    weights = dict(model("pair").state_dict())
    sigmas = run["sigmas"]
    latents = [
        sigmas[0] * noise + (1 - sigmas[0]) * latent
        for noise, latent in zip(run["noise"], into_model(run["latent"]), strict=True)
    ]
    # Fresh noise is drawn for all latents together, as ComfyUI draws it; on a CPU its seed is one higher.
    fresh = torch.Generator().manual_seed(run["seed"] + 1)
    sizes = [each[0].numel() for each in latents]
    for s, t in pairwise(sigmas):
        time = s.expand(len(latents[0]))
        outs = []
        for name in ("negative", "positive"):
            outs.append(made_up_plain.pair(weights, latents, [time, time], run[name]["context"]))
        clean = []
        for x, negative, positive in zip(latents, *outs, strict=True):
            clean.append(x - s * (negative + run["cfg"] * (positive - negative)))
        if not noisy or t == 0:
            latents = [x + (t - s) * (x - x0) / s for x, x0 in zip(latents, clean, strict=True)]
            continue
        down = t * t / s
        signal = (1 - t) / (1 - down)
        drawn = torch.randn(len(latents[0]), 1, sum(sizes), generator=fresh).split(sizes, dim=-1)
        spread = (t**2 - (signal * down) ** 2).sqrt()
        latents = [
            signal * (x0 + down / s * (x - x0)) + spread * noise.reshape(x.shape)
            for x, x0, noise in zip(latents, clean, drawn, strict=True)
        ]
    return out_of_model(latents)


@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral"])
def test_a_run_moves_each_latent(sampler: str) -> None:
    run = asked(sampler=sampler)
    for one, other in zip(result(run), by_hand(run, sampler != "euler"), strict=True):
        assert relative_error(one, other) <= 10 * FP32


def test_an_empty_latent_of_one_is_no_canvas_of_the_other() -> None:
    """Zeros are no latent of the video's format, and stay zeros."""
    run = asked(sigmas=torch.tensor([0.6, 0.0]))
    run["latent"][0] = torch.zeros_like(run["latent"][0])
    empty = {**run, "latent": [SHIFTS.expand_as(run["latent"][0]), run["latent"][1]]}
    for one, other in zip(result(run), by_hand(empty, noisy=False), strict=True):
        assert relative_error(one, other) <= 10 * FP32


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m", "uni_pc", "lms"])
def test_any_sampler_takes_them(sampler: str) -> None:
    """What one latent comes to depends on the other, and on the sampler."""
    run = asked(sampler=sampler)
    video, sound = result(run)
    assert video.shape == run["noise"][0].shape
    assert sound.shape == run["noise"][1].shape
    assert video.isfinite().all()
    louder = {**run, "noise": [run["noise"][0], 2 * run["noise"][1]]}
    assert relative_error(result(louder)[0], video) > 1e-3


@pytest.mark.parametrize(
    ("change", "argument", "told"),
    [
        ({"noise": inputs("pair")["x"][0]}, "noise", "expected a list of tensors"),
        ({"noise": inputs("pair")["x"][:1]}, "noise", "expected a list of 2 tensors"),
        ({"latent": inputs("pair")["x"][::-1]}, "latent", "expected shape"),
        ({"latent": [each[:, :, :2] for each in inputs("pair")["x"]]}, "latent", "its T is 2, but that of noise is 3"),
        ({"noise": [each / 0 for each in inputs("pair")["x"]]}, "noise", "NaN"),
        ({"positive": {"context": torch.ones(3, 7, 6)}}, "positive.context", "that of noise is 2"),
    ],
)
def test_refused_before_its_first_step(change: dict[str, Any], argument: str, told: str) -> None:
    with pytest.raises(ArgumentError, match=told) as caught:
        result(asked(**change))
    assert caught.value.argument == argument


def test_what_a_client_is_told_of_its_latents() -> None:
    told = model("pair").sampling()
    assert told["latent"] == ["B", 4, "T", "H", "W"]
    assert told["latents"] == [told["latent"], ["B", 3, "S", 4]]
    assert "latents" not in model("video").sampling()


def test_packed_latents_are_unpacked_as_they_were() -> None:
    latents = inputs("pair")["x"]
    packing = Packing.of(latents)
    packed = packing.pack(latents)
    assert packed.shape == (2, 1, sum(each[0].numel() for each in latents))
    for one, other in zip(packing.unpack(torch.cat((packed, packed))), latents, strict=True):
        assert torch.equal(one, torch.cat((other, other)))
    assert Packing.of(latents[0]).pack(latents[0]) is latents[0]


@pytest.mark.parametrize(("fewest", "latents", "times"), [(0, 1, 2), (0, 2, 2), (1, 1, 1), (1, 2, 2)])
def test_latents_that_are_left_out_may_have_timesteps(fewest: int, latents: int, times: int) -> None:
    spec = Argument(("B",), fp32=True, many=True, others=(("B",),), fewest=fewest)
    x, timestep = [torch.zeros(3, 1)] * latents, torch.ones(3)
    told = _for_each(x, timestep, spec)
    assert isinstance(told, list)
    assert len(told) == times
    assert _for_each(x[0], timestep, Argument(("B",))) is timestep


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_a_run_goes_on_behind_any_step_to_the_same_bits(sampler: str) -> None:
    """With all that the sampler remembers, and the noise that it draws: it makes the steps before again."""
    run = asked(sampler=sampler, sigmas=torch.tensor([1.0, 0.8, 0.6, 0.4, 0.2, 0.0]))
    sent = {name: pack(value, name, {}, None) for name, value in run.items()}
    steps = len(run["sigmas"]) - 1
    arena, record, kept = Arena(), [], []
    engine = engine_of(model("pair"), Topology())
    engine.forwards.watch = Watch(arena.board, 1, 0, 1, on_gpu=False)
    with torch.inference_mode():
        for step in range(steps):
            done = engine.sample("j", step, Sample("m", **sent) if step == 0 else None)
            kept.append(list(record))
            record += done.record
        whole = [from_wire(each, "torch") for each in done.out]
        for lost in range(1, steps):
            again = engine_of(model("pair"), Topology())
            for step in range(lost, steps):
                first = step == lost
                done = again.sample("j", step, Sample("m", **sent) if first else None, kept[lost] if first else ())
                assert done.forwards > 0 or step == steps - 1
            for one, other in zip(done.out, whole, strict=True):
                assert torch.equal(from_wire(one, "torch"), other), lost
    arena.close()

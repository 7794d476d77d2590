"""Samplers against ComfyUI's runs, and against a flow whose solution is known."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from helpers import GOLDEN, read_golden
from safetensors import safe_open
from torch import Tensor

from tacod.rank.families import families
from tacod.rank.families.base import LatentFormat
from tacod.rank.families.latents import WAN22
from tacod.rank.families.noise import Flow
from tacod.rank.families.sd3 import SD3
from tacod.rank.parallel.sequence import SequenceParallel
from tacod.rank.sampling.samplers import (
    SAMPLERS,
    Denoise,
    check_levels,
    find,
    guide,
    needs_negative,
    noise_source,
)
from tacod_client.errors import ArgumentError

RUNS = [
    "euler|normal",
    "euler|simple",
    "euler|beta",
    "heun|normal",
    "dpm_2|normal",
    "lms|normal",
    "dpmpp_2m|normal",
    "dpmpp_2m|sgm_uniform",
    "ddim|normal",
    "uni_pc|normal",
    "deis|normal",
    "ipndm|normal",
    "res_multistep|simple",
    "gradient_estimation|normal",
    "euler_ancestral|normal",
]
DETERMINISTIC = sorted(set(SAMPLERS) - {"euler_ancestral"})


@pytest.fixture(scope="module")
def runs() -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(GOLDEN / "sampling" / "sd35_large.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


@pytest.fixture(scope="module")
def denoise(runs: tuple[dict[str, Tensor], dict[str, str]]) -> Denoise:
    """The golden runs' SD3 with its conditioning and guidance."""
    model: Any = read_golden("sd35_large").model()
    conditioning = {
        key: torch.cat([runs[0][f"negative.{key}"], runs[0][f"positive.{key}"]]) for key in ("context", "y")
    }
    cfg = float(runs[1]["cfg"])

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        x = torch.cat([x, x])
        with torch.inference_mode():
            velocity = model(SequenceParallel(), x, timestep=(sigma * 1000).expand(len(x)), **conditioning)
        negative, positive = (x - sigma * velocity).chunk(2)
        return guide(positive, negative, cfg)

    return denoise


def test_every_golden_run_is_looked_at(runs: tuple[dict[str, Tensor], dict[str, str]]) -> None:
    assert json.loads(runs[1]["runs"]) == RUNS
    assert {run.split("|")[0] for run in RUNS} == set(SAMPLERS)


@pytest.mark.parametrize("run", RUNS)
def test_equals_comfyui(run: str, runs: tuple[dict[str, Tensor], dict[str, str]], denoise: Denoise) -> None:
    tensors, metadata = runs
    name = run.split("|")[0]
    sigmas = tensors[f"{run}.sigmas"]
    latents = SD3.latent_format
    x = SD3.process.start(tensors["noise"], latents.into_model(tensors["latent"]), sigmas[0])
    *_, x = find(name)(denoise, x, sigmas, noise_source(int(metadata["seed"]), x))
    out, expected = latents.out_of_model(SD3.process.finish(x, sigmas[-1])), tensors[f"{run}.out"]
    error = float((out - expected).norm() / expected.norm())
    assert error <= 1e-5, f"{run}: {error:.2e}"


MEAN, SPREAD = 0.7, 0.4


def gaussian(x: Tensor, sigma: Tensor) -> Tensor:
    """E[x0 | x] where x0 is normal with `MEAN` and `SPREAD`."""
    gain = SPREAD**2 * (1 - sigma) / (SPREAD**2 * (1 - sigma) ** 2 + sigma**2)
    return MEAN + gain * (x - (1 - sigma) * MEAN)


def gaussian_flow(z: Tensor, sigma: float) -> Tensor:
    """Where that flow takes ``z``, which is x at sigma = 1, at ``sigma``."""
    return (1 - sigma) * MEAN + math.sqrt(SPREAD**2 * (1 - sigma) ** 2 + sigma**2) * z


def no_noise() -> Tensor:
    raise AssertionError("a deterministic sampler asked for noise")


def run(name: str, sigmas: Tensor, z: Tensor, denoise: Denoise = gaussian) -> list[Tensor]:
    return list(find(name)(denoise, z, sigmas, no_noise))


@pytest.mark.parametrize(
    ("name", "order"),
    # The multistep ones begin with an Euler step and uni_pc ends with one: a single error of order 2, which stays.
    [
        ("euler", 1),
        ("ddim", 1),
        ("gradient_estimation", 1),
        ("heun", 2),
        ("dpm_2", 2),
        ("dpmpp_2m", 2),
        ("res_multistep", 2),
        ("lms", 2),
        ("ipndm", 2),
        ("deis", 2),
        ("uni_pc", 2),
    ],
)
def test_halving_the_steps_divides_the_error(name: str, order: int) -> None:
    z = torch.linspace(-2, 2, 9, dtype=torch.float64)

    def error(steps: int) -> float:
        sigmas = torch.linspace(1, 0.2, steps + 1, dtype=torch.float64)
        return float((run(name, sigmas, z)[-1] - gaussian_flow(z, 0.2)).abs().max())

    errors = [error(steps) for steps in (64, 128, 256)]
    assert errors[0] < 0.01
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15), errors


def test_lms_on_even_steps_is_ipndm() -> None:
    z, sigmas = torch.linspace(-2, 2, 9, dtype=torch.float64), torch.linspace(1, 0.2, 9, dtype=torch.float64)
    assert torch.allclose(torch.stack(run("lms", sigmas, z)), torch.stack(run("ipndm", sigmas, z)), atol=1e-12)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_arrives_at_the_data(name: str) -> None:
    z = torch.linspace(-2, 2, 9, dtype=torch.float64)
    sigmas = torch.cat([torch.linspace(1, 0.005, 200, dtype=torch.float64), torch.zeros(1)])
    assert torch.allclose(run(name, sigmas, z)[-1], gaussian_flow(z, 0), atol=0.01)


@pytest.mark.parametrize("name", sorted(SAMPLERS))
@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_yields_once_a_step_and_keeps_its_input(name: str, steps: int) -> None:
    x, sigmas = torch.randn(1, 4, 3, 5), torch.linspace(1, 0, steps + 1)
    before = x.clone(), sigmas.clone()
    yields = list(find(name)(gaussian, x, sigmas, noise_source(0, x)))
    assert len(yields) == steps
    assert all(y.shape == x.shape and y.dtype == x.dtype and y.isfinite().all() for y in yields)
    assert torch.equal(x, before[0])
    assert torch.equal(sigmas, before[1])


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_forwards_per_step(name: str) -> None:
    seen: list[float] = []

    def counting(x: Tensor, sigma: Tensor) -> Tensor:
        assert sigma.shape == ()
        assert sigma.dtype == torch.float32
        seen.append(float(sigma))
        return gaussian(x, sigma)

    x, sigmas = torch.randn(4), torch.linspace(1, 0, 7)
    list(find(name)(counting, x, sigmas, noise_source(0, x)))
    assert len(seen) == (11 if name in ("heun", "dpm_2") else 6)
    assert all(sigma > 0 for sigma in seen)


@pytest.mark.parametrize("name", sorted(set(SAMPLERS) - {"uni_pc"}))
def test_last_step_is_the_denoised_latent(name: str) -> None:
    x, sigmas = torch.randn(6), torch.tensor([0.9, 0.6, 0.3, 0.1, 0.0])
    *_, before, last = find(name)(gaussian, x, sigmas, noise_source(0, x))
    assert torch.allclose(last, gaussian(before, sigmas[-2]), atol=1e-6)


def test_ancestral_is_reproducible_by_seed_and_keeps_the_spread() -> None:
    x, sigmas = torch.randn(20_000, generator=torch.Generator().manual_seed(3)), torch.linspace(1, 0, 51)

    def last(seed: int) -> Tensor:
        *_, x_last = find("euler_ancestral")(gaussian, x, sigmas, noise_source(seed, x))
        return x_last

    assert torch.equal(last(7), last(7))
    assert not torch.allclose(last(7), last(8), atol=0.1)
    assert float(last(7).mean()) == pytest.approx(MEAN, abs=0.02)
    assert float(last(7).std()) == pytest.approx(SPREAD, abs=0.03)


def test_noise_is_one_seed_on_and_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    like = torch.zeros(2, 3)
    noise = noise_source(42, like)
    first, second = noise(), noise()
    generator = torch.Generator().manual_seed(43)
    assert torch.equal(first, torch.randn(2, 3, generator=generator))
    assert torch.equal(second, torch.randn(2, 3, generator=generator))
    assert torch.equal(torch.get_rng_state(), state)
    assert noise_source(2**64 - 1, like)().shape == like.shape


def test_unknown_sampler_is_refused_with_the_list() -> None:
    with pytest.raises(ArgumentError) as caught:
        find("dpmpp_2m_sde")
    assert caught.value.argument == "sampler"
    assert "dpmpp_2m_sde" in caught.value.message
    assert all(name in caught.value.message for name in SAMPLERS)


def test_start_and_finish() -> None:
    noise, latent, sigma = torch.randn(3), torch.randn(3), torch.tensor(0.25)
    flow = Flow()
    assert torch.allclose(flow.start(noise, latent, sigma), 0.25 * noise + 0.75 * latent)
    assert torch.equal(flow.start(noise, latent, torch.tensor(1.0)), noise)
    assert torch.allclose(flow.finish(flow.start(torch.zeros(3), latent, sigma), sigma), latent)
    assert torch.equal(flow.finish(latent, torch.tensor(0.0)), latent)


def test_guidance() -> None:
    positive, negative = torch.tensor([1.0, 2.0]), torch.tensor([0.0, 4.0])
    assert torch.equal(guide(positive, negative, 3.0), torch.tensor([3.0, -2.0]))
    assert torch.equal(guide(positive, None, 1.0), positive)
    assert [needs_negative(cfg) for cfg in (1.0, 1 + 1e-12, 0.0, 4.5)] == [False, False, True, True]


FORMATS = {
    f"{family.family}{number or ''}": each
    for family in families()
    for number, each in enumerate(
        family.latent_format if isinstance(family.latent_format, tuple) else [family.latent_format]
    )
    if each is not None
}


@pytest.mark.parametrize("latents", [*FORMATS.values(), WAN22], ids=[*FORMATS, "wan22"])
def test_latent_format(latents: LatentFormat) -> None:
    channels = len(latents.shift) if isinstance(latents.shift, tuple) else 16
    latent, zeros = torch.randn(1, channels, 2, 2), torch.zeros(1, channels, 2, 2)
    assert torch.allclose(latents.out_of_model(latents.into_model(latent)), latent, atol=1e-6)
    assert torch.equal(latents.into_model(zeros), zeros)
    shift = torch.tensor(latents.shift).view(1, -1, 1, 1)
    assert torch.allclose(latents.out_of_model(zeros), shift.expand_as(zeros))


@pytest.mark.parametrize(
    "levels",
    [
        [1.0, 0.001, 0.0],
        [1.0, 0.0005, 0.0],
        [1.0, 1e-30, 0.0],
        [0.001, 0.0],
        [1.0, 1e-5, 1e-6],
    ],
)
@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_levels_that_a_sampler_cant_step_between(name: str, levels: list[float]) -> None:
    """A sampler takes them and comes to a number, or they are refused beforehand."""
    sigmas = torch.tensor(levels)
    if name == "uni_pc":
        with pytest.raises(ArgumentError, match="uni_pc can't step from") as caught:
            check_levels(name, sigmas)
        assert caught.value.argument == "sigmas"
        return
    check_levels(name, sigmas)
    x = torch.ones(1, 1, 2, 2)
    steps = list(find(name)(lambda x, sigma: x - sigma * x / 2, x, sigmas, lambda: torch.zeros_like(x)))
    assert len(steps) == len(levels) - 1
    assert steps[-1].isfinite().all()

"""ComfyUI's forwards and sampler runs through daemon and client, on one to four ranks in turn.

tests/engine/test_spread.py has every golden in each kind of layout.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import FP32, GOLDEN, Daemon, Golden, golden_names, read_golden, relative_error
from safetensors import safe_open
from torch import Tensor

from tacod_client import Client, Model, Progress

FLUX = ["flux_dev", "flux_dev_odd", "flux_kontext", "flux_schnell"]
RUNS = GOLDEN / "sampling" / "sd35_large.safetensors"
RANKS = [1, 2, 3, 4]
SAMPLERS = ["euler", "heun", "dpmpp_2m", "ddim", "lms", "res_multistep", "euler_ancestral"]
BF16 = 1e-2
RUN = 1e-5

Load = Callable[..., tuple[Model, Golden]]


@pytest.fixture
def load(models: Path) -> Load:
    """A golden's model from a client, and the golden."""

    def load(client: Client, name: str, **options: str) -> tuple[Model, Golden]:
        golden = read_golden(name)
        file = models / f"{name}.safetensors"
        if not file.exists():
            golden.save(file)
        return client.load(file.name, **options), golden

    return load


@pytest.mark.parametrize(
    ("name", "ranks"),
    [(name, RANKS[place % len(RANKS)]) for place, name in enumerate(golden_names())],
)
def test_equals_comfyui_at_any_rank_count(daemons: Callable[[int], Daemon], load: Load, name: str, ranks: int) -> None:
    with daemons(ranks).client() as client:
        model, golden = load(client, name)
        out = model.forward(**golden.inputs)
        # Of a list of one latent it is a tensor.
        outs, latents, wanted = (
            each if isinstance(each, list) else [each] for each in (out, golden.inputs["x"], golden.out)
        )
        assert all(each.dtype == latent.dtype for each, latent in zip(outs, latents, strict=True))
        assert relative_error(outs, wanted) <= FP32
        assert model.stats.ranks == ranks
        # Each load collects garbage among all models that are there.
        client.unload(model.id)


@pytest.mark.parametrize(("name", "ranks"), [*zip(FLUX, RANKS, strict=True)])
def test_bf16_stays_close_to_comfyui(daemons: Callable[[int], Daemon], load: Load, name: str, ranks: int) -> None:
    with daemons(ranks).client() as client:
        model, golden = load(client, name, dtype="bf16")
        assert relative_error(model.forward(**golden.inputs), golden.out) <= BF16


@pytest.mark.parametrize("name", ["flux_kontext", "sd35_large"])
def test_numpy_in_numpy_out(client: Client, load: Load, name: str) -> None:
    model, golden = load(client, name)

    def as_numpy(value: Tensor | list[Tensor]) -> object:
        return [each.numpy() for each in value] if isinstance(value, list) else value.numpy()

    out = model.forward(**{key: as_numpy(value) for key, value in golden.inputs.items()})
    assert isinstance(out, np.ndarray)
    assert out.dtype == np.float32
    assert relative_error(torch.from_numpy(out), golden.out) <= FP32


def runs() -> list[str]:
    """The golden runs of those samplers that are looked at here."""
    with safe_open(RUNS, "pt") as file:
        return [run for run in json.loads(file.metadata()["runs"]) if run.split("|")[0] in SAMPLERS]


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("run", runs())
def test_sampler_equals_comfyui(daemons: Callable[[int], Daemon], load: Load, run: str, ranks: int) -> None:
    with safe_open(RUNS, "pt") as file:
        given = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    sigmas = given[f"{run}.sigmas"]
    with daemons(ranks).client() as client:
        model, _ = load(client, "sd35_large")
        job = model.sample(
            noise=given["noise"],
            latent=given["latent"],
            sigmas=sigmas,
            positive={key: given[f"positive.{key}"] for key in ("context", "y")},
            negative={key: given[f"negative.{key}"] for key in ("context", "y")},
            cfg=4.5,
            sampler=run.split("|")[0],
            seed=42,
        )
        events: list[Progress] = list(job)
        assert relative_error(job.result(), given[f"{run}.out"]) <= RUN
    assert [event.step for event in events] == list(range(1, len(sigmas)))
    assert {event.total for event in events} == {job.total} == {len(sigmas) - 1}
    assert [event.sigma for event in events] == pytest.approx(sigmas[1:].tolist())
    assert [event.elapsed_s for event in events] == sorted(event.elapsed_s for event in events)

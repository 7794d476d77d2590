"""A step of several forwards may take longer than `group.step_timeout_s`, and none of them is taken for a hang."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from helpers import SD3, Daemon

from tacod_client import Model

IMAGES, SIDE = 64, 24
FORWARDS = 4
"""Of a guided step of Heun's, whose conditions can't be stacked."""


def sample(model: Model, **more: object) -> float:
    """One step, without its retries; returns how long it took."""
    inputs = SD3.inputs(batch=IMAGES, size=(SIDE, SIDE))
    noise, _ = inputs.pop("x"), inputs.pop("timestep")
    sigmas = torch.tensor([1.0, 0.5])
    started = time.monotonic()
    model.sample(noise=noise, latent=0 * noise, sigmas=sigmas, positive=inputs, **more).result()
    return time.monotonic() - started


def test_a_step_of_several_forwards(models: Path) -> None:
    with Daemon(2, [models], {"group.step_timeout_s": 60.0}) as daemon, daemon.client() as client:
        model = client.load(SD3.file)
        # The first one has what comes once.
        took_s = max([sample(model) for _ in range(4)][1:])
        other = SD3.inputs(batch=IMAGES, text=65, size=(SIDE, SIDE))
        negative = {name: other[name] for name in ("context", "y")}
        limit_s = 2.5 * took_s
        text = daemon.config.read_text()
        daemon.config.write_text(text.replace("group.step_timeout_s = 60.0", f"group.step_timeout_s = {limit_s}"))
        client.reload()
        longest_s = max(sample(model, sampler="heun", cfg=3.0, negative=negative) for _ in range(2))
        assert longest_s > took_s
        stats = client.stats()
        assert (stats["group_restarts"], stats["retried_forwards"]) == (0, 0), (
            f"{longest_s:.2f} s, {limit_s:.2f} s each"
        )
        assert stats["forwards_total"] == 4 + 2 * FORWARDS

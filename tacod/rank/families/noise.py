"""Noise processes: what a model's output means, and how noise and signal mix at a noise level."""

from __future__ import annotations

import abc
from typing import Any, ClassVar

import torch
from torch import Tensor

__all__ = ["Epsilon", "Flow", "Process"]


class Process(abc.ABC):
    """Latents are in the model's space, in fp32; ``sigma`` is a scalar."""

    sigma_max: ClassVar[float]
    """The largest noise level."""

    @abc.abstractmethod
    def describe(self) -> dict[str, Any]:
        """What clients need to make noise levels: ``prediction``, and a training schedule's terms as in diffusers."""

    @abc.abstractmethod
    def start(self, noise: Tensor, latent: Tensor, sigma: Tensor) -> Tensor:
        """The first x of a run: ``latent`` with standard normal ``noise`` of level ``sigma``."""

    @abc.abstractmethod
    def finish(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The latent at the end of a run that ended at ``sigma``."""

    @abc.abstractmethod
    def scale(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The model's input for the noisy latent ``x``."""

    @abc.abstractmethod
    def clean(self, x: Tensor, sigma: Tensor, out: Tensor) -> Tensor:
        """The clean latent for the model's output ``out``."""


class Flow(Process):
    """Rectified flow (Liu et al., arXiv:2209.03003): x = (1 - sigma) * x0 + sigma * noise, the output is noise - x0."""

    sigma_max = 1.0

    def describe(self) -> dict[str, Any]:
        """See `Process.describe`."""
        return {"prediction": "flow"}

    def start(self, noise: Tensor, latent: Tensor, sigma: Tensor) -> Tensor:
        """See `Process.start`."""
        return sigma * noise + (1 - sigma) * latent

    def finish(self, x: Tensor, sigma: Tensor) -> Tensor:
        """See `Process.finish`; it is `start` with zero noise, undone."""
        return x / (1 - sigma)

    def scale(self, x: Tensor, sigma: Tensor) -> Tensor:
        """See `Process.scale`; a flow's model takes x as it is."""
        return x

    def clean(self, x: Tensor, sigma: Tensor, out: Tensor) -> Tensor:
        """See `Process.clean`."""
        return x - sigma * out


class Epsilon(Process):
    """Noise prediction (Ho et al., arXiv:2006.11239) in Karras' terms: x = x0 + sigma * noise, the output is noise.

    Training's steps had betas that rise linearly from ``beta_start`` to ``beta_end``.
    """

    sigma_max = 1e9
    """Far above any schedule's; squares of it are within fp32."""

    def __init__(self, beta_start: float, beta_end: float, steps: int = 1000) -> None:
        self.betas = beta_start, beta_end
        signal = (1 - torch.linspace(beta_start, beta_end, steps, dtype=torch.float64, device="cpu")).cumprod(0)
        self.levels = ((1 - signal) / signal).sqrt()
        """The noise levels of training, fp64 [steps]."""
        self.terminal_sigma = self.levels[-1].float().item()
        """The highest of them: a run from there begins with noise alone."""

    def describe(self) -> dict[str, Any]:
        """See `Process.describe`."""
        start, end = self.betas
        return {
            "prediction": "epsilon",
            "beta_schedule": "linear",
            "beta_start": start,
            "beta_end": end,
            "num_train_timesteps": len(self.levels),
        }

    def start(self, noise: Tensor, latent: Tensor, sigma: Tensor) -> Tensor:
        """See `Process.start`; from the terminal level noise alone, with the variance that the model knows there."""
        if sigma.item() >= self.terminal_sigma * (1 - 1e-5):
            return noise * (1 + sigma**2).sqrt() + latent
        return latent + sigma * noise

    def finish(self, x: Tensor, sigma: Tensor) -> Tensor:
        """See `Process.finish`."""
        return x

    def scale(self, x: Tensor, sigma: Tensor) -> Tensor:
        """See `Process.scale`: to unit variance."""
        return x / (sigma**2 + 1).sqrt()

    def clean(self, x: Tensor, sigma: Tensor, out: Tensor) -> Tensor:
        """See `Process.clean`."""
        return x - sigma * out

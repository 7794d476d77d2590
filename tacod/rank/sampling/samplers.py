"""Samplers for rectified flows: x = (1 - sigma) * x0 + sigma * noise, walked from sigma = 1 down to 0.

A flow's dx/dsigma = (x - x0) / sigma is also that of Karras et al. (arXiv:2206.00364), so their samplers run on it as
they stand. Each is a generator: it gets ``denoise``, the noisy latent ``x`` (fp32) at ``sigmas[0]``, the noise levels
``sigmas`` [steps + 1] (fp32, strictly falling, on the CPU or on x's device) and fresh noise, and yields x after every
step. The last step to sigma = 0 is the denoised latent itself, whatever the order before.

Results equal ComfyUI 0.8's on the same ``sigmas``. Its KSampler makes one level more and drops the last but one for
dpm_2 and uni_pc; here that is the caller's part.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from tacod_client.errors import ArgumentError

__all__ = [
    "FLOW_ONLY",
    "SAMPLERS",
    "Denoise",
    "Noise",
    "Sampler",
    "check_levels",
    "find",
    "guide",
    "needs_negative",
    "noise_source",
]

Denoise = Callable[[Tensor, Tensor], Tensor]
"""(x, sigma as a scalar tensor) -> the predicted clean latent x0, guidance included."""
Noise = Callable[[], Tensor]
"""Fresh standard normal noise of x's shape, dtype and device."""
Sampler = Callable[[Denoise, Tensor, Tensor, Noise], Iterator[Tensor]]


def guide(positive: Tensor, negative: Tensor | None, cfg: float) -> Tensor:
    """Classifier-free guidance (Ho & Salimans, arXiv:2207.12598); without a negative, the positive alone."""
    return positive if negative is None else negative + cfg * (positive - negative)


def needs_negative(cfg: float) -> bool:
    """Whether `guide` at this scale looks at the negative; at 1 it cancels out, so its forward is spared."""
    return not math.isclose(cfg, 1.0)


def noise_source(seed: int, like: Tensor) -> Noise:
    """Noise for the samplers that add some, drawn on ``like``'s device from a generator of its own.

    On the CPU the seed is one higher, since the first noise of a run comes from ``seed`` on the CPU.
    """
    generator = torch.Generator(like.device)
    generator.manual_seed((seed + 1) % 2**64 if like.device.type == "cpu" else seed)
    return lambda: torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)


def euler(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Tensor]:
    """Euler steps (Karras et al., arXiv:2206.00364, algorithm 2 without its correction); for a flow, DDIM too."""
    for s, t in pairwise(sigmas):
        d = (x - denoise(x, s)) / s
        x = x + (t - s) * d
        yield x


def heun(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Tensor]:
    """Heun's second-order steps, two forwards each (Karras et al., arXiv:2206.00364, algorithm 2 without churn)."""
    for s, t in pairwise(sigmas):
        d = (x - denoise(x, s)) / s
        end = x + (t - s) * d
        if t > 0:
            d = (d + (end - denoise(end, t)) / t) / 2
        x = x + (t - s) * d
        yield x


def dpm_2(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Tensor]:
    """DPM-Solver-2 (Lu et al., arXiv:2206.00927): the slope halfway in log sigma, two forwards a step."""
    for s, t in pairwise(sigmas):
        d = (x - denoise(x, s)) / s
        if t > 0:
            middle = (s * t).sqrt()
            half = x + (middle - s) * d
            d = (half - denoise(half, middle)) / middle
        x = x + (t - s) * d
        yield x


def euler_ancestral(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Tensor]:
    """Euler steps past the next level and fresh noise back up to it (DDIM's eta = 1, arXiv:2010.02502, for a flow).

    A step of s -> t goes down to t * t / s; there the signal is scaled to weigh 1 - t again, and noise fills the rest.
    """
    for s, t in pairwise(sigmas):
        x0 = denoise(x, s)
        if t > 0:
            down = t * t / s
            signal = (1 - t) / (1 - down)
            x = signal * (x0 + down / s * (x - x0)) + (t**2 - (signal * down) ** 2).sqrt() * noise()
        else:
            x = x0
        yield x


def dpmpp_2m(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Tensor]:
    """DPM-Solver++(2M) (Lu et al., arXiv:2211.01095, algorithm 2), with lambda = -log sigma."""
    before: tuple[Tensor, Tensor] | None = None
    for s, t in pairwise(sigmas):
        x0 = denoise(x, s)
        h = (s / t).log()
        d = x0
        if before is not None and t > 0:
            x0_before, h_before = before
            r = h_before / h
            d = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * x0_before
        x = t / s * x - torch.expm1(-h) * d
        before = x0, h
        yield x


def res_multistep(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Tensor]:
    """The refined exponential solver, second-order multistep (Zhang et al., arXiv:2308.02157), lambda = -log sigma."""
    before: tuple[Tensor, Tensor] | None = None
    for s, t in pairwise(sigmas):
        x0 = denoise(x, s)
        h = (s / t).log()
        if before is None or t == 0:
            x = x0 + t / s * (x - x0)
        else:
            x0_before, h_before = before
            phi1 = torch.expm1(-h) / -h
            phi2 = (phi1 - 1) / -h
            b2 = phi2 / (-h_before / h)
            x = t / s * x + h * ((phi1 - b2) * x0 + b2 * x0_before)
        before = x0, h
        yield x


Weights = Callable[[Sequence[float], float], Sequence[float]]
"""(levels of the slopes at hand, newest first; the next level) -> how much each slope adds to x."""


def _multistep(denoise: Denoise, x: Tensor, sigmas: Tensor, order: int, weights: Weights) -> Iterator[Tensor]:
    """The explicit linear multistep method: x moves by a weighted sum of the latest ``order`` slopes."""
    levels = sigmas.tolist()
    slopes: deque[Tensor] = deque(maxlen=order)
    for i, (s, t) in enumerate(pairwise(sigmas)):
        x0 = denoise(x, s)
        slopes.appendleft((x - x0) / s)
        if t > 0:
            for weight, slope in zip(weights(levels[i::-1][: len(slopes)], levels[i + 1]), slopes, strict=True):
                x = x + weight * slope
        else:
            x = x0
        yield x


def _lagrange(nodes: Sequence[float], j: int, at: Tensor) -> Tensor:
    """The polynomial that is 1 at ``nodes[j]`` and 0 at the other nodes."""
    value = torch.ones_like(at)
    for k, node in enumerate(nodes):
        if k != j:
            value = value * (at - node) / (nodes[j] - node)
    return value


def lms(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Tensor]:
    """Adams-Bashforth of order 4 on uneven steps (Hairer, Nørsett & Wanner, Solving ODEs I, III.5)."""

    def weights(levels: Sequence[float], t: float) -> list[float]:
        # Gauss's rule of two points, exact for the cubics that are integrated here
        middle, half = (levels[0] + t) / 2, (t - levels[0]) / 2
        points = middle + half / math.sqrt(3) * torch.tensor([-1, 1], dtype=torch.float64)
        return [half * float(_lagrange(levels, j, points).sum()) for j in range(len(levels))]

    yield from _multistep(denoise, x, sigmas, 4, weights)


def ipndm(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Tensor]:
    """IPNDM of order 4 (Zhang & Chen, arXiv:2204.13902, appendix): Adams-Bashforth as if all steps were equal."""
    rows = (1,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24)

    def weights(levels: Sequence[float], t: float) -> list[float]:
        return [(t - levels[0]) * c for c in rows[len(levels) - 1]]

    yield from _multistep(denoise, x, sigmas, 4, weights)


def gradient_estimation(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Tensor]:
    """Gradient estimation, gamma = 2 (Permenter & Yuan, arXiv:2306.04848, algorithm 2): Euler on 2 d - d_before."""

    def weights(levels: Sequence[float], t: float) -> list[float]:
        return [(t - levels[0]) * c for c in ((1,), (2, -1))[len(levels) - 1]]

    yield from _multistep(denoise, x, sigmas, 2, weights)


def deis(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Tensor]:
    """tAB-DEIS of order 3 (Zhang & Chen, arXiv:2204.13902): slopes extrapolated by polynomials in VP time.

    VP time u has sigma^2 + 1 = exp(beta_d u^2 / 2 + beta_min u), with sigma(1e-3) = 0.002 and sigma(1) = 80. A slope
    weighs the integral of its Lagrange polynomial over d sigma, as a mean over 10,000 points like ComfyUI's.
    """
    first, last = math.log1p(0.002**2), math.log1p(80**2)
    beta_d = 2 * (last - first / 1e-3) / (1 - 1e-3)
    beta_min = last - beta_d / 2

    def time(sigma: float) -> float:
        return (math.sqrt(beta_min**2 + 2 * beta_d * math.log1p(sigma**2)) - beta_min) / beta_d

    def weights(levels: Sequence[float], t: float) -> list[float]:
        if len(levels) == 1:
            return [t - levels[0]]
        nodes, end = [time(level) for level in levels], time(t)
        u = torch.linspace(nodes[0], end, 10_000, dtype=torch.float64)
        variance = torch.expm1(beta_d * u**2 / 2 + beta_min * u)
        rate = (beta_d * u + beta_min) * (variance + 1) / (2 * variance.sqrt())
        return [float((rate * _lagrange(nodes, j, u)).mean()) * (end - nodes[0]) for j in range(len(nodes))]

    yield from _multistep(denoise, x, sigmas, 3, weights)


def uni_pc(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Tensor]:
    """UniPC-3, B1(h) = h, on data predictions (Zhao et al., arXiv:2302.04867), with lambda = -log sigma.

    The forward at a step's end corrects that step and predicts the next, so there is one a step. As in ComfyUI, a run
    to 0 stops at 0.001 and is scaled by what `finish` divides by there.
    """
    zero = bool(sigmas[-1] == 0)
    sigmas, lambdas = _unipc_levels(sigmas)
    steps = len(sigmas) - 1
    history = deque([denoise(x, sigmas[0])], maxlen=3)
    for i in range(steps):
        order = min(i + 1, 3, steps - i)
        x0, h = history[0], lambdas[i + 1] - lambdas[i]
        r = [(lambdas[i - k] - lambdas[i]) / h for k in range(1, order)]
        d = [(history[k] - x0) / r[k - 1] for k in range(1, order)]
        first = math.exp(-h) * x - math.expm1(-h) * x0
        x = first + h * sum(w * e for w, e in zip(_unipc_weights(r, h), d, strict=True))
        if i + 1 < steps:
            history.appendleft(denoise(x, sigmas[i + 1]))
            r, d = [*r, 1.0], [*d, history[0] - x0]
            x = first + h * sum(w * e for w, e in zip(_unipc_weights(r, h), d, strict=True))
        elif zero:
            x = x / (1 - sigmas[-1])
        yield x


def _unipc_levels(sigmas: Tensor) -> tuple[Tensor, list[float]]:
    """The noise levels of a run, 0 as 0.001, and the lambda of each."""
    if sigmas[-1] == 0:
        sigmas = torch.cat([sigmas[:-1], sigmas.new_full((1,), 0.001)])
    # -log sigma by way of VP's alpha^2: in fp32 that makes 0.001 a 0.00098, as it does in ComfyUI
    square = 1 / (1 + sigmas**2)
    return sigmas, ((square / (1 - square)).log() / 2).tolist()


def _unipc_weights(ratios: Sequence[float], h: float) -> list[float]:
    """The solution of R a = b, the paper's order conditions; with one unknown it is taken as 1/2."""
    if len(ratios) < 2:
        return [0.5] * len(ratios)
    phi, b, factorial = math.expm1(-h) / -h - 1, [], 1
    for n in range(1, len(ratios) + 1):
        factorial *= n
        b.append(phi * factorial / -h)
        phi = phi / -h - 1 / (factorial * (n + 1))
    r = torch.tensor([[ratio**n for ratio in ratios] for n in range(len(ratios))], dtype=torch.float64)
    return [float(weight) for weight in torch.linalg.solve(r, torch.tensor(b, dtype=torch.float64))]


SAMPLERS: dict[str, Sampler] = {
    "ddim": euler,
    "deis": deis,
    "dpm_2": dpm_2,
    "dpmpp_2m": dpmpp_2m,
    "euler": euler,
    "euler_ancestral": euler_ancestral,
    "gradient_estimation": gradient_estimation,
    "heun": heun,
    "ipndm": ipndm,
    "lms": lms,
    "res_multistep": res_multistep,
    "uni_pc": uni_pc,
}
"""Every sampler by the name that ComfyUI gives it."""


FLOW_ONLY = frozenset({"euler_ancestral", "uni_pc"})
"""Those whose steps use the flow's 1 - sigma; the others see noise levels alone."""


def find(name: str) -> Sampler:
    """The sampler of this name; raises `ArgumentError` with the known ones."""
    try:
        return SAMPLERS[name]
    except KeyError:
        known = ", ".join(SAMPLERS)
        raise ArgumentError(f"there is no sampler {name!r}; use one of {known}", argument="sampler") from None


def check_levels(name: str, sigmas: Tensor) -> None:
    """Raise `ArgumentError` for noise levels, falling ones, that this sampler can't step between."""
    if SAMPLERS[name] is not uni_pc:
        return
    levels, lambdas = _unipc_levels(sigmas)
    for index, (before, after) in enumerate(pairwise(lambdas)):
        if not before < after < math.inf:
            raise ArgumentError(
                f"sigmas: {name} can't step from {levels[index]:g} to {levels[index + 1]:g}, as it counts in "
                "1 / (1 + sigma^2), and 0 as 0.001; leave one of the two out, or take another sampler",
                argument="sigmas",
            )

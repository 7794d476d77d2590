"""A sampling run: its request, the guided denoiser, and its state between two steps."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tacod.plan import Plan, Request
from tacod.rank.arguments import check_arguments, check_names, digest, load_arguments
from tacod.rank.families.base import DiT, LatentFormat, Output
from tacod.rank.families.inputs import Argument, Inputs, Spec
from tacod.rank.families.noise import Flow
from tacod.rank.forward.graphs import Forwards
from tacod.rank.forward.run import Call, plan_for
from tacod.rank.forward.step_cache import StepCache
from tacod.rank.sampling import samplers
from tacod.rank.sampling.packed import Packing
from tacod_client import wire
from tacod_client.errors import ArgumentError
from tacod_client.tensors import from_wire

__all__ = ["Run", "SampleRequest", "begin", "go_on"]

Latents = wire.Tensor | list[wire.Tensor]
"""A latent, or a list where the model has several."""


@dataclass(frozen=True)
class SampleRequest:
    """The inputs of `Model.sample`, as they came over the wire."""

    sampler: str
    seed: int
    cfg: float
    noise: Latents
    latent: Latents
    sigmas: wire.Tensor
    positive: dict[str, Any]
    negative: dict[str, Any] | None

    @property
    def guided(self) -> dict[str, dict[str, Any]]:
        """The conditions of a step, the negative first, as ComfyUI stacks them."""
        if not samplers.needs_negative(self.cfg):
            return {"positive": self.positive}
        if self.negative is None:
            raise ArgumentError(
                f"negative: missing; cfg = {self.cfg:g} needs it (cfg = 1 does not)", argument="negative"
            )
        return {"negative": self.negative, "positive": self.positive}

    def check(self, dit: DiT) -> None:
        """Check every input before the first step.

        Raises `ArgumentError`, naming the argument.
        """
        check_samples(dit)
        samplers.find(self.sampler)
        if self.sampler in samplers.FLOW_ONLY and not isinstance(dit.process, Flow):
            raise ArgumentError(
                f"sampler: {self.sampler!r} is for flows, and {dit.family} is none; use euler, heun or dpmpp_2m",
                argument="sampler",
            )
        first, *others = dit.latents
        latent = Argument(first, many=bool(others), others=tuple(others), fewest=dit.fewest_latents)
        canvas: dict[str, Spec] = {"noise": latent, "latent": latent}
        given = {"noise": self.noise, "latent": self.latent}
        check_arguments({**given, "sigmas": self.sigmas}, {**canvas, "sigmas": Argument(("steps + 1",))}, dit.family)
        shapes = [[each.shape for each in _each(value)] for value in given.values()]
        if shapes[0] != shapes[1]:
            told = " and ".join(str([list(shape) for shape in each]) for each in shapes)
            raise ArgumentError(f"latent: noise and latent differ in shape, {told}; they must agree", argument="latent")
        for name, value in given.items():
            if not all(from_wire(each, "torch").float().isfinite().all() for each in _each(value)):
                raise ArgumentError(f"{name}: it holds NaN or infinity, and so would the result", argument=name)
        for name, condition in self.guided.items():
            self._check_condition(dit, name, condition, canvas)

    def _check_condition(self, dit: DiT, name: str, given: Mapping[str, Any], latents: Mapping[str, Spec]) -> None:
        """Check what a step's forward gets beside the run's own ``x`` and ``timestep``, and that it fits the noise."""
        for argument, reason in _NO_CONDITIONS.items():
            if given.get(argument) is not None:
                raise ArgumentError(f"{name}.{argument}: {reason}", argument=f"{name}.{argument}")
        specs = condition_specs(dit)
        canvas = {"noise": self.noise, "latent": self.latent}
        try:
            check_names(given, specs, dit.family)
            check_arguments({**given, **canvas}, {**specs, **latents}, dit.family)
            dit.lengths({**given, "x": self.noise})
        except ArgumentError as error:
            if error.argument == "x":
                raise ArgumentError(f"noise: {error.message.removeprefix('x: ')}", argument="noise") from None
            raise ArgumentError(f"{name}.{error.message}", argument=f"{name}.{error.argument}") from None


_NO_CONDITIONS = {
    **dict.fromkeys(("x", "timestep"), "the run gives it itself, from noise, latent and sigmas; leave it out"),
    **dict.fromkeys(("noise", "latent"), "it is of the whole run, beside the conditions; leave it out"),
    "control": "a ControlNet's residuals change with every step; use forward with them",
}
"""What a condition may not hold, and why."""


def condition_specs(dit: DiT) -> dict[str, Spec]:
    """What a condition of a run may hold: a forward's arguments, but for those that the run gives."""
    return {name: spec for name, spec in dit.arguments().items() if name not in _NO_CONDITIONS}


def _each(latents: Latents) -> list[wire.Tensor]:
    return latents if isinstance(latents, list) else [latents]


def check_samples(dit: DiT) -> tuple[LatentFormat, ...]:
    """See that a model can be sampled, and return what each of its latents is.

    Raises `ArgumentError` for one whose forwards take more than a noisy latent as ``x``, or what only the caller
    knows of each step, or of a family that tells nothing of latents.
    """
    if dit.unsampled:
        raise ArgumentError(
            f"model: its forwards take {dit.unsampled}, which sample doesn't give; call forward for each step",
            argument="model",
        )
    latents = dit.latents
    for canvas, latent in zip(dit.canvases, latents, strict=True):
        if canvas[1] != latent[1]:
            raise ArgumentError(
                f"model: its x has {canvas[1]} channels and its output {latent[1]}: beside the noisy latent it takes "
                "an image or a mask at every step, which sample has no place for; call forward for each step",
                argument="model",
            )
    if dit.latent_format is None:
        raise ArgumentError(
            f"model: {dit.family} doesn't describe its latents, which sample needs; call forward for each step",
            argument="model",
        )
    formats = dit.latent_format if isinstance(dit.latent_format, tuple) else (dit.latent_format,)
    for latent, known in zip(latents, formats, strict=True):
        if known.channels not in (None, latent[1]):
            raise ArgumentError(
                f"model: its latents have {latent[1]} channels, and those of {dit.family} {known.channels}; call "
                "forward for each step",
                argument="model",
            )
    return formats


@dataclass
class Run:
    """The state of a run between two steps."""

    denoise: Denoiser
    steps: Iterator[Tensor]
    sigmas: list[float]
    finish: Callable[[Tensor], Output]
    """From the sampler's last x to the client's latents."""
    model: str = ""
    """Its model's id."""
    cached: dict[tuple[Hashable, ...], StepCache] = field(default_factory=dict)
    """Its step caches, while its model is evicted."""


def begin(
    request: SampleRequest, dit: DiT, asked: Request, forwards: Forwards, device: torch.device, job: str = ""
) -> Run:
    """Start a checked run; nothing is computed before its first step. The step cache knows it as ``job``.

    Raises `ArgumentError` if it can't be split as ``asked``.
    """
    formats = check_samples(dit)
    levels = _levels(request.sigmas, dit.process.sigma_max).to(device)
    samplers.check_levels(request.sampler, levels)
    specs = dit.arguments()
    loaded = [load_arguments(given, specs, dit.dtype, device) for given in request.guided.values()]
    told = [_of_run(dit, name, each, request.seed) for name, each in zip(request.guided, loaded, strict=True)]
    conditions = [dit.prepare(each) for each in told]

    def put(given: Latents) -> Output:
        tensors = [from_wire(each, "torch").to(device, torch.float32) for each in _each(given)]
        return tensors if isinstance(given, list) else tensors[0]

    def each_by(change: Callable[[LatentFormat, Tensor], Tensor], latents: Output) -> Output:
        if isinstance(latents, list):
            return list(map(change, formats, latents))
        return change(formats[0], latents)

    noise = put(request.noise)
    packing = Packing.of(noise)
    latent = packing.pack(each_by(LatentFormat.into_model, put(request.latent)))
    x = dit.process.start(packing.pack(noise), latent, levels[0])
    digests: list[Hashable] = [None] * len(told)
    if dit.has_prefix:
        digests = list(map(digest, request.guided.values()))
        if any(one is not other for one, other in zip(told, loaded, strict=True)):
            # The family may have put the seed into them.
            digests = [(each, request.seed) for each in digests]
    denoise = Denoiser(dit, asked, forwards, conditions, digests, packing, len(x), request.cfg, job)
    denoise.prepare(x)
    steps = samplers.find(request.sampler)(denoise, x, levels, samplers.noise_source(request.seed, x))

    def finish(x: Tensor) -> Output:
        # By way of the denoiser: the model may have been loaded anew meanwhile.
        done = packing.unpack(denoise.dit.process.finish(x, levels[-1]))
        return each_by(LatentFormat.out_of_model, done)

    return Run(denoise, steps, levels.tolist(), finish)


def _of_run(dit: DiT, name: str, condition: Inputs, seed: int) -> Inputs:
    """See `DiT.of_run`; errors name the condition too."""
    try:
        return dit.of_run(condition, seed)
    except ArgumentError as error:
        raise ArgumentError(f"{name}.{error.message}", argument=f"{name}.{error.argument}") from None


def go_on(run: Run, step: int, record: Sequence[Tensor]) -> None:
    """Bring a run that has just begun to where an earlier one was before ``step``, to the bit.

    ``record`` is what `Denoiser.record` was in all steps before, on any device: the sampler makes these steps again,
    without forwards.
    """
    run.denoise.replay.extend(record)
    for _ in range(step):
        next(run.steps)
    assert not run.denoise.replay, "a record of other steps"
    assert not run.denoise.record, "a record of fewer steps"


class Denoiser:
    """A model as the samplers need it: it predicts the clean latent, guidance included."""

    def __init__(
        self,
        dit: DiT,
        asked: Request,
        forwards: Forwards,
        conditions: list[Inputs],
        digests: list[Hashable],
        packing: Packing,
        images: int,
        cfg: float,
        job: str,
    ) -> None:
        self.model: DiT | None = dit
        """None while the model has made room for others: then no step is asked for."""
        self.asked = asked
        self.run = forwards
        self.world_size = forwards.topology.world_size
        self.cfg = cfg
        self.job = job
        self.conditions = conditions
        self.digests = digests
        """For the prefix: what tells each condition from others; None in a family without one."""
        self.packing = packing
        self.joint = Inputs.stack(conditions, images)
        self.forwards = 0
        self.record: list[Tensor] = []
        """What it has predicted since the step began."""
        self.replay: deque[Tensor] = deque()
        """What it predicted before the ranks were lost: a run that goes on is given these, and computes nothing."""
        self.plan: Plan
        """The last forward's plan."""

    @property
    def dit(self) -> DiT:
        """The model."""
        assert self.model is not None, "a step of a run whose model isn't here"
        return self.model

    def prepare(self, x: Tensor) -> None:
        """Plan the forwards on ``x``, so that an impossible one is refused before the first."""
        many = 1 if self.joint is None else len(self.conditions)
        for condition in [self.joint] if self.joint is not None else self.conditions:
            canvas = x.expand(many, *x.shape).flatten(0, 1)
            latents = self.packing.unpack(canvas)
            self.plan = plan_for(self.dit, self.asked, self.world_size, {"x": latents, **condition})

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """``x`` [B, C, H, W], or several latents packed, in fp32 at the noise level ``sigma`` → the clean ones."""
        if self.replay:
            # A sampler may look at it in later steps, when the memory that it came in is another command's.
            return self.replay.popleft().to(x.device, copy=True)
        clean = self._predict(x, sigma)
        self.record.append(clean)
        return clean

    def _predict(self, x: Tensor, sigma: Tensor) -> Tensor:
        if self.joint is not None:
            many = len(self.conditions)
            outs = self._forward(torch.cat([x] * many), sigma, self.joint, tuple(self.digests)).chunk(many)
        else:
            each = enumerate(zip(self.conditions, self.digests, strict=True))
            outs = tuple(self._forward(x, sigma, condition, digest, index) for index, (condition, digest) in each)
        clean = [self.dit.process.clean(x, sigma, out) for out in outs]
        return samplers.guide(clean[-1], clean[0] if len(clean) > 1 else None, self.cfg)

    def _forward(self, x: Tensor, sigma: Tensor, condition: Inputs, conditioning: Hashable, index: int = 0) -> Tensor:
        self.forwards += 1
        timestep = self.dit.timestep(sigma).float().expand(x.shape[0]).contiguous()
        latents = self.packing.unpack(self.dit.process.scale(x, sigma).to(self.dit.dtype))
        inputs = condition.replace(x=latents, timestep=_for_each(latents, timestep, condition.specs["timestep"]))
        self.plan = plan_for(self.dit, self.asked, self.world_size, inputs)
        out = self.run(Call(self.dit, self.plan, inputs, (self.job, index), conditioning))
        return self.packing.pack(out).float()


def _for_each(latents: Output, timestep: Tensor, spec: Spec) -> Output:
    """A timestep as a model takes it: as one, or as a list of one for each latent.

    A model some of whose latents may be left out either takes the others' timesteps all the same, or leaves them out.
    """
    if not isinstance(spec, Argument) or not spec.many:
        return timestep
    return [timestep] * (len(latents) if spec.fewest else len(spec.members or ()))


def _levels(sigmas: wire.Tensor, highest: float) -> Tensor:
    """The noise levels, fp32: at least two, falling, from at most ``highest`` to at least 0."""
    levels: Tensor = from_wire(sigmas, "torch").float()
    values = levels.tolist()
    # Also on the logarithmic scale on which samplers step.
    falling = bool((levels[:-1] / levels[1:] > 1).all())
    if len(values) < 2 or not falling or not all(map(math.isfinite, values)) or values[0] > highest or values[-1] < 0:
        raise ArgumentError(
            f"sigmas: expected at least 2 levels that fall from at most {highest:g} to at least 0, "
            f"got {str(values[:8])[:80]}",
            argument="sigmas",
        )
    return levels

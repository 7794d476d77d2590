"""``tacoctl sample``: a sampling run with conditions from a file; its latent goes into another file."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from tacod_client.cli import loaded, show
from tacod_client.cli.output import Output, document
from tacod_client.client import Client
from tacod_client.errors import RequestError
from tacod_client.model import Model

if TYPE_CHECKING:
    import torch

__all__ = ["latent_shape", "noise_levels", "run"]

KNOWN = {"noise", "latent", "sigmas"}
SHIFT = 3.0
DOWNSCALE = 8
"""Pixels per latent cell, if an older daemon doesn't say."""


def run(args: argparse.Namespace) -> None:
    """Run it. Whether the files can be read and written is checked before."""
    from safetensors.torch import save

    given, quiet = _read(args.inputs), "json" in args
    with Output(args.output) as output, Client(getattr(args, "endpoint", None)) as client:
        model = loaded.find_or_load(client, args.model, quiet)
        inputs = _inputs(args, given, model, client)
        if args.attention != "exact":
            model = model.with_plan({"attention": args.attention})
        job = model.sample(**inputs, cfg=args.cfg, sampler=args.sampler, seed=args.seed)
        show.progress(job, quiet)
        output.write(save(_named(job.result())))
    answer = {"job": job.id, "output": args.output, "steps": job.total, "seconds": model.stats.seconds}
    if quiet:
        document(answer)
    else:
        show.out(f"{args.output}: {job.total} steps in {model.stats.seconds:.2f} s")


def _read(path: str) -> dict[str, torch.Tensor]:
    from safetensors.torch import load

    try:
        with open(path, "rb") as file:
            given: dict[str, torch.Tensor] = load(file.read())
    except OSError as error:
        raise RequestError(f"{path}: {error.strerror or error}; name a .safetensors file") from None
    except MemoryError:
        raise
    except Exception as error:  # safetensors raises half a dozen classes for what it can't read
        raise RequestError(f"{path} is no safetensors file ({error}); name one with positive.context, …") from None
    prefixes = "positive.", "negative.", "noise.", "latent."
    odd = [key for key in given if key not in KNOWN and not key.startswith(prefixes)]
    if odd:
        raise RequestError(
            f"{path}: {odd[0]!r} is none of noise, latent, sigmas, positive.*, negative.*, nor noise.0, noise.1, … and "
            "latent.0, … for a model of several latents"
        )
    if not _under("positive.", given):
        raise RequestError(f"{path}: no positive.*; a run needs at least positive.context")
    return given


def _inputs(args: argparse.Namespace, given: dict[str, torch.Tensor], model: Model, client: Client) -> dict[str, Any]:
    """What `Model.sample` takes."""
    import torch

    positive = _under("positive.", given)
    sigmas = given.get("sigmas")
    if sigmas is None:
        sigmas = noise_levels(model, args.steps, args.shift)
    noise, latent = (_latents(name, given) for name in ("noise", "latent"))
    if noise is None:
        batch = max((value.shape[0] for value in positive.values() if value.ndim), default=1)
        shape = latent_shape(model, batch, args.size, args.channels, args.frames)
        loaded.check_size(client, [shape, shape])
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(args.seed))
    if latent is None:
        latent = list(map(torch.zeros_like, noise)) if isinstance(noise, list) else torch.zeros_like(noise)
    return {
        "noise": noise,
        "latent": latent,
        "sigmas": sigmas,
        "positive": positive,
        "negative": _under("negative.", given) or None,
    }


def _latents(name: str, given: dict[str, torch.Tensor]) -> torch.Tensor | list[torch.Tensor] | None:
    """The tensor of this name, or those of a model of several latents: ``noise.0``, ``noise.1`` and so on."""
    several = _under(f"{name}.", given)
    if not several:
        return given.get(name)
    order = [str(index) for index in range(len(several))]
    if name in given or set(order) != several.keys():
        raise RequestError(f"{name}: expected {name} alone, or {name}.0 to {name}.{len(several) - 1}")
    return [several[index] for index in order]


def _named(latents: torch.Tensor | list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """A run's result as a file has it."""
    if not isinstance(latents, list):
        return {"latent": latents.contiguous()}
    return {f"latent.{index}": each.contiguous() for index, each in enumerate(latents)}


def _under(prefix: str, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key.removeprefix(prefix): value for key, value in given.items() if key.startswith(prefix)}


def latent_shape(
    model: Model, batch: int, size: tuple[int, int], channels: int | None = None, frames: int = 1
) -> tuple[int, ...]:
    """The shape of the latents of ``batch`` pictures of ``size`` (width and height in pixels).

    Where latents have frames, there are so many. ``channels`` replaces the model's own.

    Raises `RequestError` if the daemon doesn't say enough about the model, or if latents have no frames to be several.
    """
    sampling = model.sampling
    if len(sampling.get("latents", ())) > 1:
        raise RequestError(
            f"{model.name}: it has latents of the shapes {', '.join(map(str, sampling['latents']))}; put noise.0, "
            "noise.1, … of your sizes into the inputs"
        )
    shape: list[int | str | None] = list(sampling.get("latent") or ("B", sampling.get("channels"), "H", "W"))
    if frames != 1 and "T" not in shape:
        raise RequestError(f"{model.name}: --frames is for videos, and {model.family} makes none; leave it out")
    width, height = (side // sampling.get("downscale", DOWNSCALE) for side in size)
    sizes = {"B": batch, "T": frames, "H": height, "W": width}
    shape[1] = channels or shape[1]
    if shape[1] is None:
        raise RequestError(f"{model.name}: the daemon doesn't tell how many channels it has; give --channels")
    known = [sizes.get(side) if isinstance(side, str) else side for side in shape]
    if None in known:
        raise RequestError(
            f"{model.name}: latents of the shape {shape} are new to this tacoctl; put noise into the inputs"
        )
    return tuple(side for side in known if side is not None)


def noise_levels(model: Model, steps: int, shift: float | None = None) -> torch.Tensor:
    """The noise levels [steps + 1] of a run, down to 0, by the noise process that the daemon reports for the model.

    For a flow they are even in time, shifted. For a model of betas they are ComfyUI's "normal" schedule: even steps
    between the last step of training and the first. Raises `RequestError` for an unknown process.
    """
    import torch

    process = model.sampling
    kind = process.get("prediction")
    if kind == "flow":
        even, shift = torch.linspace(1, 0, steps + 1), SHIFT if shift is None else shift
        return shift * even / (1 + (shift - 1) * even)
    if shift is not None:
        raise RequestError(f"{model.name}: --shift is for flows, and {model.family} is none; leave it out")
    if kind != "epsilon" or process.get("beta_schedule") != "linear":
        raise RequestError(
            f"{model.name}: which noise levels {model.family} takes is not known to this tacoctl; put sigmas "
            "[steps + 1] into the inputs"
        )
    count = process["num_train_timesteps"]
    betas = torch.linspace(process["beta_start"], process["beta_end"], count, dtype=torch.float64)
    signal = (1 - betas).cumprod(0)
    logs = ((1 - signal) / signal).sqrt().log()
    at = torch.linspace(count - 1, 0, steps, dtype=torch.float64)
    low, high = at.floor().long(), at.ceil().long()
    levels = torch.lerp(logs[low], logs[high], at - low).exp().float()
    return torch.cat((levels, torch.zeros(1)))

"""``tacoctl plan``: how a model's forwards would be split over ranks, from the file's header alone.

Errors of the file are reported before torch is imported, which takes seconds.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tacod.checkpoint import Checkpoint, read_checkpoint
from tacod.plan import AUTO, cost
from tacod.shares import EQUAL, MOST, Shares
from tacod.tools.contents import HALF_BYTES, contents
from tacod_client import units, wire
from tacod_client.cli import show
from tacod_client.cli.ending import guarded
from tacod_client.cli.output import document
from tacod_client.errors import ArgumentError, ModelCorrupt, ModelUnsupported

if TYPE_CHECKING:
    from tacod.rank.families.base import DiT

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the plan; returns the exit code."""
    return guarded(lambda: _plan(argv))


def _plan(argv: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(prog="tacoctl plan")
    parser.add_argument("file")
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--size", default="1024x1024")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--text", type=int, help="text tokens; by default those of the family's usual forward")
    parser.add_argument("--memory", help="GiB of weights on each rank, or one number for each: 24,24,8")
    parser.add_argument("--shares", help="how much each rank takes, a whole number for each: 2,1,1")
    parser.add_argument("--comfyui", help="the folder of the ComfyUI whose networks run where no family does")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    checkpoint = read_checkpoint(os.path.realpath(args.file))
    try:
        return _of_file(args, checkpoint)
    except (ModelUnsupported, ModelCorrupt) as error:
        if args.comfyui is None:
            raise
        return _of_network(args, checkpoint, error.message)


def _of_network(args: argparse.Namespace, checkpoint: Checkpoint, refusal: str) -> int:
    """The same for a network of ComfyUI's: where its weights lie. Its forwards are planned when they come.

    Raises `ArgumentError` for shares, which its ranks don't take.
    """
    import torch

    from tacod.rank.comfyui.installation import Installation
    from tacod.rank.comfyui.loading import plan_weights
    from tacod.rank.weights.placement import Links, choose

    if args.shares is not None:
        raise ArgumentError("--shares: ranks take equal shares of ComfyUI's networks; leave it out", argument="shares")
    installation = Installation(os.path.realpath(args.comfyui), torch.device("cpu"))
    network, weights = plan_weights(installation, checkpoint, refusal, torch.bfloat16)
    placement = choose("auto", weights, _budgets(args.memory, args.ranks), reaches=args.ranks > 1)
    if args.json:
        report = {
            "family": network.family,
            "network": network.name,
            "parameters": checkpoint.parameters,
            "weight_bytes": weights.total,
            "quantization": checkpoint.formats,
            "plan": None,
            "weights": placement.kind,
            "resident_bytes": list(placement.device_bytes),
            "streamed_bytes": list(placement.streamed_bytes),
            "fetch_s": Links().seconds(placement),
        }
        document(report)
    else:
        held = f"{units.short(checkpoint.parameters)} parameters, {units.size(weights.total)}"
        show.out(f"ComfyUI's {network.name}, {held}; its forwards are planned by their arguments")
        if args.memory is not None:
            show.out(placement.describe(weights, Links()))
    return 0


def _of_file(args: argparse.Namespace, checkpoint: Checkpoint) -> int:
    import torch

    from tacod.rank.families.inputs import Argument
    from tacod.rank.forward.run import plan_for
    from tacod.rank.weights.placement import Links, choose
    from tacod.rank.weights.remap import identify
    from tacod.rank.weights.sizes import sizes_of
    from tacod.rank.weights.unfilled import Unfilled

    with Unfilled():
        family, config, checkpoint = identify(checkpoint)
        with torch.device("meta"):
            model = family(config)
    width, height = (int(side) // family.downscale for side in args.size.split("x"))
    text = family.usual["L"] if args.text is None else args.text
    sizes = {**family.usual, "B": args.batch, "H": height, "W": width, "L": text}

    def described(spec: Argument) -> wire.Tensor:
        assert spec.shape is not None
        return wire.Tensor("F32", tuple(sizes.get(str(size), size) for size in spec.shape), None)

    given = {
        name: [described(each) for each in spec.members or [spec]] if spec.many else described(spec)
        for name, spec in model.arguments().items()
        if isinstance(spec, Argument) and spec.required and spec.shape is not None
    }
    model.shares = _shares(args.shares, args.ranks)
    plan = plan_for(model, AUTO, args.ranks, given)
    weights = sizes_of(model, checkpoint, torch.bfloat16)
    placement = choose("auto", weights, _budgets(args.memory, args.ranks), reaches=args.ranks > 1)
    # Of its blocks, on GPUs as `tacod.plan` assumes them.
    compute_s = cost(plan.layout, plan.shape, shares=plan.shares) * len(weights.blocks)
    if args.json:
        report = {
            "family": family.family,
            "parameters": checkpoint.parameters,
            "weight_bytes": checkpoint.weight_bytes(HALF_BYTES),
            "quantization": checkpoint.formats,
            "plan": str(plan),
            "batch": plan.layout.batch,
            "ulysses": plan.layout.ulysses,
            "ring": plan.layout.ring,
            "tokens": plan.tokens,
            "shares": list(plan.shares.each),
            "text": text,
            "downscale": family.downscale,
            "usual": family.usual,
            "arguments": _arguments(model),
            "weights": placement.kind,
            "resident_bytes": list(placement.device_bytes),
            "streamed_bytes": list(placement.streamed_bytes),
            "fetch_s": Links().seconds(placement),
            "compute_s": compute_s,
        }
        document(report)
    else:
        show.out(f"{family.family}, {units.short(checkpoint.parameters)} parameters, {contents(checkpoint)}: {plan}")
        if args.memory is not None:
            show.out(placement.describe(weights, Links(), compute_s))
    return 0


def _budgets(memory: str | None, ranks: int) -> Sequence[int | None]:
    """Bytes for weights on each rank, from GiB: one number for all, or one for each.

    Raises `ArgumentError` for anything else.
    """
    if memory is None:
        return [None] * ranks
    try:
        given = [float(each) for each in memory.split(",")]
    except ValueError:
        given = []
    if len(given) not in (1, ranks) or not all(0 < each < math.inf for each in given):
        raise ArgumentError(
            f"--memory {memory}: expected GiB above 0, one number for all ranks or {ranks} numbers with commas",
            argument="memory",
        )
    return [int(each * 2**30) for each in given] * (ranks // len(given))


def _shares(shares: str | None, ranks: int) -> Shares:
    """The ranks' shares. Raises `ArgumentError` for anything but a whole number for each."""
    if shares is None:
        return EQUAL
    given = [int(each) if each.isascii() and each.isdecimal() and len(each) < 5 else 0 for each in shares.split(",")]
    if len(given) != ranks or not all(0 < each <= MOST for each in given):
        raise ArgumentError(
            f"--shares {shares:.80}: expected {ranks} whole numbers from 1 to {MOST} with commas, one for each rank",
            argument="shares",
        )
    return Shares.of(given)


def _arguments(model: DiT) -> dict[str, Any]:
    """The tensors that a forward takes: shapes, whether a usual forward has them, and values of what isn't noise.

    Of a list of tensors, such as several latents, ``shape`` is that of the first, and ``shapes`` has all.
    """
    import torch

    from tacod.rank.families.inputs import Argument
    from tacod.rank.forward.warmup import SIGMA

    report: dict[str, Any] = {
        name: {"shape": spec.shape, "required": spec.required, "usual": spec.required or name in model.usual_optional}
        for name, spec in model.arguments().items()
        if isinstance(spec, Argument) and spec.shape is not None and not spec.mask and (spec.others or not spec.many)
    }
    for name, spec in model.arguments().items():
        if name in report and isinstance(spec, Argument) and spec.members:
            report[name]["shapes"] = [each.shape for each in spec.members]
    for name in report.keys() & model.usual_values.keys():
        report[name]["value"] = model.usual_values[name]
    report["timestep"]["value"] = model.timestep(torch.tensor(SIGMA)).item()
    return report


if __name__ == "__main__":
    sys.exit(main())

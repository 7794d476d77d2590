"""``tacoctl plan``: how a model file would be spread over ranks, from its header alone."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence

import torch

from tacod.checkpoint import read_checkpoint
from tacod.plan import AUTO
from tacod.rank.families import detect
from tacod.rank.families.base import Argument
from tacod.rank.spread import plan_for
from tacod_client import wire
from tacod_client.errors import TacodError

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the plan; returns the exit code."""
    parser = argparse.ArgumentParser(prog="tacoctl plan")
    parser.add_argument("file")
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--size", default="1024x1024")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--text", type=int, default=512)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    try:
        checkpoint = read_checkpoint(os.path.realpath(args.file))
        family, config = detect(checkpoint.tensors, checkpoint.config)
        with torch.device("meta"):
            model = family(config)
        width, height = (int(side) // 8 for side in args.size.split("x"))
        sizes = {"B": args.batch, "H": height, "W": width, "L": args.text}
        given = {
            name: wire.Tensor("F32", tuple(sizes.get(str(size), size) for size in spec.shape), None)
            for name, spec in model.arguments().items()
            if isinstance(spec, Argument) and spec.required and spec.shape is not None
        }
        plan = plan_for(model, AUTO, args.ranks, given)
    except TacodError as error:
        print(f"tacoctl: {error.message}", file=sys.stderr)
        return 1
    if args.json:
        told = {
            "family": family.family,
            "parameters": checkpoint.parameters,
            "plan": str(plan),
            "batch": plan.layout.batch,
            "ulysses": plan.layout.ulysses,
            "ring": plan.layout.ring,
            "tokens": plan.tokens,
            "arguments": {
                name: {"shape": spec.shape, "required": spec.required}
                for name, spec in model.arguments().items()
                if isinstance(spec, Argument) and spec.shape is not None and not (spec.many or spec.mask)
            },
        }
        print(json.dumps(told, indent=2))
    else:
        print(f"{family.family}, {checkpoint.parameters / 1e9:.2f} B parameters: {plan}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

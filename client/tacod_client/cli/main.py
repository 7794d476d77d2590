"""Entry point of ``tacoctl``."""

from __future__ import annotations

from collections.abc import Sequence

from tacod_client.cli import verbs
from tacod_client.cli.ending import guarded
from tacod_client.cli.parser import parser

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``tacoctl``; returns the exit code."""
    return guarded(lambda: verbs.run(parser().parse_args(argv)))

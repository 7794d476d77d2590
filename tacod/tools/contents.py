"""What a model's file contains, in words."""

from __future__ import annotations

from tacod.checkpoint import Checkpoint
from tacod_client.units import size

__all__ = ["HALF_BYTES", "contents"]

HALF_BYTES = 2
"""Of a number in bf16 or fp16."""


def contents(checkpoint: Checkpoint) -> str:
    """The formats of its weights, and the memory that they take on a device where plain ones are in bf16 or fp16."""
    formats = [f"{count} weights in {name}" for name, count in checkpoint.formats.items()]
    return ", ".join([*formats, f"{size(checkpoint.weight_bytes(HALF_BYTES))} on each device"])

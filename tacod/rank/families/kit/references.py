"""Positions of an image and of the reference images beside it, as Flux.1 Kontext and its kin have them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from tacod.rank.families.kit.grid import Grid

__all__ = ["REFERENCE_METHODS", "ROPE_OPTIONS", "image_positions", "origin_and_scale", "reference_origins"]

REFERENCE_METHODS = ("offset", "index", "uxo")
"""Where references lie: beside each other on a plane of their own, as Kontext was trained; each on its own plane; or
diagonally behind the image's corner, in its plane."""
ROPE_OPTIONS = ("scale_x", "scale_y", "scale_t", "shift_x", "shift_y", "shift_t")
"""How ComfyUI's ScaleROPE stretches and shifts positions."""


def image_positions(
    grids: Sequence[Grid], method: str, index_scale: float, options: Sequence[Mapping[str, float]], device: torch.device
) -> Tensor:
    """The (index, row, column) of each patch of an image and of its references: [N, 3] in fp32.

    Args:
        grids: Of the image, then of each reference.
        method: One of `REFERENCE_METHODS`.
        index_scale: The distance of planes for ``"index"``.
        options: The `ROPE_OPTIONS` of each grid; what is absent changes nothing.
        device: Where the positions are made.
    """
    positions = []
    origins = [(0.0, 0, 0), *reference_origins(grids, method, index_scale)]
    for grid, (index, top, left), each in zip(grids, origins, options, strict=True):
        origin = top + each.get("shift_y", 0.0), left + each.get("shift_x", 0.0)
        places = grid.positions(origin, (each.get("scale_y", 1.0), each.get("scale_x", 1.0)), device)
        positions.append(functional.pad(places, (1, 0), value=index + each.get("shift_t", 0.0)))
    return torch.cat(positions)


def origin_and_scale(options: Mapping[str, float]) -> tuple[list[float], list[float]]:
    """Where the positions of a video begin and how far apart they are (frame, row, column), by its `ROPE_OPTIONS`."""
    origin = [options.get(f"shift_{axis}", 0.0) for axis in "tyx"]
    return origin, [options.get(f"scale_{axis}", 1.0) for axis in "tyx"]


def reference_origins(grids: Sequence[Grid], method: str, index_scale: float) -> list[tuple[float, int, int]]:
    """Of each reference its index, and the row and column of its first patch.

    Of ``grids``, the image's first, the last two sides count. See `image_positions` for the rest.
    """
    patch = grids[0].patch[-1]
    rows, columns = grids[0].counts[-2:]
    origins: list[tuple[float, int, int]] = []
    tall, wide = (rows * patch, columns * patch) if method == "uxo" else (0, 0)
    for number, reference in enumerate(grids[1:], start=1):
        height, width = reference.sides[-2:]
        if method == "index":
            origins.append((index_scale * number, 0, 0))
            continue
        top, left = tall, wide
        if method == "uxo":
            tall, wide = tall + height, wide + width
        else:
            below = height + tall <= width + wide
            top, left = (tall, 0) if below else (0, wide)
            tall, wide = max(tall, top + height), max(wide, left + width)
        origins.append((0.0 if method == "uxo" else 1.0, (top + patch // 2) // patch, (left + patch // 2) // patch))
    return origins

"""Did the model draw what the sentence says? Image analysis against a scene: colours, places, count and shapes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from training.shapes_data import COLOURS, KINDS, SHAPES, Scenes, distances

STEP = 2
"""Connected parts are found on a grid of every second pixel in both directions."""
TOLERANCE = 0.12
"""How far a shape's centre may be from where it should be, in picture widths; places are 0.28 apart."""

_PALETTE = np.array(list(COLOURS.values()), np.float32)


def classes(picture: Tensor) -> np.ndarray:
    """uint8 RGB [H, W, 3] to the index of each pixel's nearest colour [H, W]."""
    pixels = picture.numpy().astype(np.float32)
    nearest: np.ndarray = np.stack([((pixels - colour) ** 2).sum(-1) for colour in _PALETTE]).argmin(0)
    return nearest


def _components(mask: np.ndarray) -> list[np.ndarray]:
    """The 4-connected parts of a mask; lines one cell thin, which antialiased edges make, don't count."""
    blocks = mask[:-1, :-1] & mask[1:, :-1] & mask[:-1, 1:] & mask[1:, 1:]
    padded = np.pad(blocks, 1)
    mask = padded[1:, 1:] | padded[:-1, 1:] | padded[1:, :-1] | padded[:-1, :-1]
    left, parts = mask.copy(), []
    for start in np.argwhere(mask):
        if not left[tuple(start)]:
            continue
        part = np.zeros_like(mask)
        stack = [tuple(start)]
        left[stack[0]] = False
        while stack:
            row, column = stack.pop()
            part[row, column] = True
            for near in ((row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)):
                if 0 <= near[0] < len(mask) and 0 <= near[1] < mask.shape[1] and left[near]:
                    left[near] = False
                    stack.append(near)
        parts.append(part)
    return parts


def things(picture: Tensor, least: int = 48) -> tuple[int, list[tuple[int, float, float, np.ndarray]]]:
    """The background's colour, and (colour, x, y, mask) of each thing of at least ``least`` cells of the grid.

    x and y are the middle of the thing's bounding box, in picture widths.
    """
    pixels = classes(picture)
    grid = pixels[STEP // 2 :: STEP, STEP // 2 :: STEP]
    border = np.concatenate([grid[0], grid[-1], grid[:, 0], grid[:, -1]])
    background = int(np.bincount(border).argmax())
    found = []
    for colour in range(len(COLOURS)):
        if colour == background or not (grid == colour).any():
            continue
        for part in _components(grid == colour):
            if part.sum() < least:
                continue
            rows, columns = np.nonzero(part)
            x, y = ((c.min() + c.max() + 1) / 2 / len(grid) for c in (columns, rows))
            box = tuple(slice(max(0, (c.min() - 2) * STEP), (c.max() + 3) * STEP) for c in (rows, columns))
            mask = np.zeros(pixels.shape, bool)
            mask[box] = pixels[box] == colour
            found.append((colour, float(x), float(y), mask))
    return background, found


def _templates() -> np.ndarray:
    axis = (torch.arange(256) + 0.5) / 128 - 1
    x, y = torch.meshgrid(axis * 1.3, -axis * 1.3, indexing="xy")
    return np.stack([_normal((d <= 0).numpy()) for d in distances(x, y, torch.ones(1, 1))])


def _normal(mask: np.ndarray) -> np.ndarray:
    """A mask's bounding box, stretched to 32 x 32."""
    rows, columns = np.nonzero(mask)
    box = mask[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    rows, columns = (((np.arange(32) + 0.5) / 32 * n).astype(int) for n in box.shape)
    return box[np.ix_(rows, columns)]


def shape_of(mask: np.ndarray) -> int:
    """The index in SHAPES of the shape that overlaps most with a thing's mask, both stretched to one size."""
    overlap = [(t & _normal(mask)).sum() / (t | _normal(mask)).sum() for t in _TEMPLATES]
    return int(np.argmax(overlap))


_TEMPLATES = _templates()


def verdict(picture: Tensor, scene: Scenes) -> tuple[bool, bool]:
    """For a picture, uint8 RGB [H, W, 3], and a scene of one row: is it right, and are the shapes right as well?

    Right: the background's colour, and as many things as the scene has, each of its colour and at its place.
    """
    background, found = things(picture)
    expected = [
        (int(scene.colour[0, k]), float(scene.x[0, k]), float(scene.y[0, k]), int(scene.shape[0, k]))
        for k in range(scene.colour.shape[1])
        if scene.colour[0, k] >= 0
    ]
    hole = False
    if KINDS[int(scene.kind[0])] == "inside":
        hole = expected[1][3] == SHAPES.index("ring")  # the outer shape shows through it
        found.sort(key=lambda thing: -thing[3].sum())
        if len(found) > 1 and expected[0][3] != SHAPES.index("ring"):  # the inner one cuts a hole into the outer
            found[0] = (*found[0][:3], np.any([thing[3] for thing in found], 0))
    right, shapes = background == int(scene.background[0]) and 0 <= len(found) - len(expected) <= hole, True
    for colour, x, y, shape in expected:
        near = [t for t in found if t[0] == colour and abs(t[1] - x) <= TOLERANCE and abs(t[2] - y) <= TOLERANCE]
        right &= bool(near)
        shapes &= bool(near) and shape_of(min(near, key=lambda t: abs(t[1] - x) + abs(t[2] - y))[3]) == shape
    return right, right and shapes


def describe(picture: Tensor) -> str:
    """What is in the picture, in words; for a test's message."""
    background, found = things(picture)
    names = list(COLOURS)
    parts = [f"{names[c]} {SHAPES[shape_of(mask)]} at ({x:.2f}, {y:.2f})" for c, x, y, mask in found]
    return f"{', '.join(parts) or 'nothing'} on {names[background]}"

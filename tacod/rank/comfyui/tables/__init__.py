"""How the tokens of ComfyUI's networks are split: a table of a few lines for a family.

docs/comfyui-networks.md lists them.
"""

from __future__ import annotations

from torch import nn

from tacod.rank.comfyui.tables.base import Table
from tacod.rank.comfyui.tables.images import IMAGES
from tacod.rank.comfyui.tables.pixels import PIXELS
from tacod.rank.comfyui.tables.shapes import SHAPES
from tacod.rank.comfyui.tables.sounds import SOUNDS
from tacod.rank.comfyui.tables.videos import VIDEOS

__all__ = ["TABLES", "table_of"]

TABLES: tuple[Table, ...] = (*IMAGES, *PIXELS, *VIDEOS, *SHAPES, *SOUNDS)
"""One for each class."""
_PREFIX = "comfy.ldm."


def table_of(network: nn.Module) -> Table | None:
    """The table of a network by its class; None if there is none."""
    kind = type(network)
    name = f"{kind.__module__}.{kind.__qualname__}"
    return next((each for each in TABLES if f"{_PREFIX}{each.network}" == name), None)

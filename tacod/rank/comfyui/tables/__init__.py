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

__all__ = ["TABLES", "TOGETHER", "keeps_together", "table_of"]

TABLES: tuple[Table, ...] = (*IMAGES, *PIXELS, *VIDEOS, *SHAPES, *SOUNDS)
"""One for each class."""
_PREFIX = "comfy.ldm."


TOGETHER = frozenset(
    {
        # The timbres of a batch all go to its first song.
        "ace.ace_step15.AceStepConditionGenerationModel",
        # They exchange the halves of a batch.
        "hunyuan3dv2_1.hunyuandit.HunYuanDiTPlain",
        "seedvr.model.NaDiT",
    }
)
"""Classes that look at several images of a batch at once, so that these can't be shared out."""


def table_of(network: nn.Module) -> Table | None:
    """The table of a network by its class; None if there is none."""
    name = _name(network)
    return next((each for each in TABLES if each.network == name), None)


def keeps_together(network: nn.Module) -> bool:
    """Whether the images of a batch must stay together."""
    return _name(network) in TOGETHER


def _name(network: nn.Module) -> str:
    kind = type(network)
    return f"{kind.__module__}.{kind.__qualname__}".removeprefix(_PREFIX)

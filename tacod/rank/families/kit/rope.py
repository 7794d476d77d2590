"""Rotary positions (Su et al., 2021, arXiv:2104.09864)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tacod.rank.ops.qkv import Rotation

__all__ = ["rope"]


def rope(positions: Tensor, axes: Sequence[int], theta: float, halves: bool = False) -> Rotation:
    """The rotation of tokens at ``positions`` [S, axes] or [B, S, axes].

    Each axis turns as many channels of a head as ``axes`` says; channels after them stay. ``halves`` pairs a channel of
    the first half of those that turn with one of the second half, else neighbours are pairs. Angles are computed in
    fp64, and their cosines and sines given in fp32.
    """
    angles = []
    for axis, width in enumerate(axes):
        exponents = torch.arange(0, width, 2, device=positions.device, dtype=torch.float64) / width
        angles.append(positions[..., axis, None].double() * theta**-exponents)
    angle = torch.cat(angles, dim=-1)
    return Rotation(angle.cos().float(), angle.sin().float(), halves)

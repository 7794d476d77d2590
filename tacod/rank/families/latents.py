"""Latent spaces that several families share."""

from __future__ import annotations

from tacod.rank.families.base import LatentFormat

__all__ = ["WAN21"]

_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
_DEVIATION = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip

WAN21 = LatentFormat(tuple(1 / deviation for deviation in _DEVIATION), _MEAN)
"""Of the VAE of Wan 2.1 (16 channels, 8 pixels a cell), which Qwen-Image has too."""

"""Attention kernels that compute on a CPU, in the place of those that need a GPU and a package."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tacod.rank.ops.attention_kernels import KERNELS, Kernel, Obstacle
from tacod.rank.ops.sdpa import Part, attend_part


class EightBits(Kernel):
    """Queries and keys of 8 bits with a scale for each token, the rest as exact attention computes it.

    A token's scale doesn't depend on who has it, so all layouts give the same.
    """

    title = "fake attention"
    package = "none"
    install = "nothing"
    cards = "any device"
    widest = 128
    dtypes = (torch.float32, torch.bfloat16)

    def __init__(self, name: str, masks: bool, lse: bool) -> None:
        self.name, self.takes_masks, self.tells_lse = name, masks, lse  # type: ignore[misc]

    def suits(self, device: torch.device) -> bool:
        return True

    def find(self, module: Any) -> Callable[..., Any] | None:
        raise AssertionError("there is no module")

    def obstacle(self, device: torch.device, dtype: torch.dtype, width: int) -> Obstacle:
        return Obstacle.NONE

    def compute(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return attend_part(rounded(q), rounded(k), v, mask)[0].to(q.dtype)

    def compute_part(self, q: Tensor, k: Tensor, v: Tensor) -> Part:
        assert self.tells_lse
        return attend_part(rounded(q), rounded(k), v)


def rounded(x: Tensor) -> Tensor:
    """To 8 bits and back."""
    scale = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / 127
    return ((x / scale).round() * scale).to(x.dtype)


@contextmanager
def fakes() -> Iterator[None]:
    """A context with fake kernels: they merge and mask as the real ones of these names do."""
    made = {name: EightBits(name, each.takes_masks, each.tells_lse) for name, each in KERNELS.items()}
    with mock.patch.dict(KERNELS, made):
        yield

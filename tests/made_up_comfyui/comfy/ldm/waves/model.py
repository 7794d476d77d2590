"""A network of sounds, which no table knows."""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from comfy.ops import Linear
from torch import Tensor, nn


class Waves(nn.Module):
    """Latents of three dimensions; its blocks look at a whole sound."""

    def __init__(self, dim: int, channels: int, blocks: int, dtype: Any = None) -> None:
        super().__init__()
        self.embed = Linear(channels, dim, bias=False, dtype=dtype)
        self.layers = nn.ModuleList(Linear(dim, dim, bias=False, dtype=dtype) for _ in range(blocks))
        self.out = Linear(dim, channels, bias=False, dtype=dtype)
        self.register_buffer("places", torch.arange(64.0), persistent=False)

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Any = None,
        lyrics: Any = None,
        strength: float = 1.0,
        refs: Any = None,
        mood: str = "calm",
        transformer_options: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        """The latents' change. Moods other than calm are faults on purpose."""
        if mood == "exit":
            sys.exit(3)
        if mood == "hang":
            time.sleep(3600)
        if mood == "hungry":
            torch.ones(1 << 50)
        if mood == "angry":
            raise ValueError("this network is angry")
        tokens = self.embed(x.movedim(1, -1)) + timestep[:, None, None] + self.places[: x.shape[-1], None]
        if lyrics is not None:
            tokens = tokens + strength * lyrics.mean(dim=1)[:, None]
        for ref in refs or ():
            tokens = tokens + ref[:, None]
        factors = (transformer_options or {}).get("factors", {"tone": 1.0})
        for layer in self.layers:
            tokens = tokens + factors["tone"] * layer(tokens.cumsum(dim=1)).sin()
        return self.out(tokens).movedim(-1, 1)

"""A network with the outside of AuraFlow's, and another inside."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy.ops import Linear
from torch import Tensor, nn


class Attention(nn.Module):
    """Over one sequence."""

    def __init__(self, dim: int, n_heads: int, **factory: Any) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.qkv = Linear(dim, 3 * dim, **factory)
        self.out = Linear(dim, dim, **factory)

    def forward(self, x: Tensor, transformer_options: Any = None) -> Tensor:
        """The tokens after it."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        attended: Tensor = self.out(optimized_attention(q, k, v, self.n_heads, transformer_options=transformer_options))
        return attended


class Double(nn.Module):
    """Text and image with layers of their own."""

    def __init__(self, dim: int, n_heads: int, **factory: Any) -> None:
        super().__init__()
        self.attn = Attention(dim, n_heads, **factory)
        self.text, self.image = (Linear(dim, dim, **factory) for _ in range(2))

    def forward(self, c: Tensor, x: Tensor, global_cond: Tensor, transformer_options: Any = None) -> Any:
        """Both, one block further."""
        both = self.attn(torch.cat((c, x), dim=1) + global_cond[:, None], transformer_options=transformer_options)
        text, image = both.split((c.shape[1], x.shape[1]), dim=1)
        return c + self.text(text).sin(), x + self.image(image).sin()


class Single(nn.Module):
    """Text and image as one sequence."""

    def __init__(self, dim: int, n_heads: int, **factory: Any) -> None:
        super().__init__()
        self.attn = Attention(dim, n_heads, **factory)

    def forward(self, cx: Tensor, global_cond: Tensor, transformer_options: Any = None) -> Tensor:
        """It, one block further."""
        return cx + self.attn(cx * global_cond[:, None], transformer_options=transformer_options)


class MMDiT(nn.Module):
    """The network."""

    def __init__(self, dim: int, cond_seq_dim: int, blocks: Sequence[int], n_heads: int = 5, dtype: Any = None) -> None:
        super().__init__()
        factory = {"bias": False, "dtype": dtype}
        self.patch_size = 2
        self.init_x_linear = Linear(4 * 4, dim, **factory)
        self.cond_seq_linear = Linear(cond_seq_dim, dim, **factory)
        self.t_embedder = Linear(1, dim, **factory)
        self.double_layers = nn.ModuleList(Double(dim, n_heads, **factory) for _ in range(blocks[0]))
        self.single_layers = nn.ModuleList(Single(dim, n_heads, **factory) for _ in range(blocks[1]))
        self.final_linear = Linear(dim, 4 * 4, **factory)

    def forward(
        self, x: Tensor, timestep: Tensor, context: Any, transformer_options: Any = None, **kwargs: Any
    ) -> Tensor:
        """The latents' change."""
        height, width = x.shape[2] // 2, x.shape[3] // 2
        tokens = x.reshape(len(x), 4, height, 2, width, 2).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        places = torch.arange(height * width, dtype=x.dtype, device=x.device)[:, None].sin()
        image, text = self.init_x_linear(tokens) + places, self.cond_seq_linear(context)
        vector = self.t_embedder(timestep[:, None].to(x.dtype))
        for block in self.double_layers:
            text, image = block(text, image, vector, transformer_options=transformer_options)
        both = torch.cat((text, image), dim=1)
        for block in self.single_layers:
            both = block(both, vector, transformer_options=transformer_options)
        out = self.final_linear(both[:, text.shape[1] :])
        return out.reshape(len(x), height, width, 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(x.shape)

"""What HunyuanVideo's network has beside the blocks of Flux.1: the refiner of its text, and the mapper of ByT5's."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from tacod.rank.families import kit
from tacod.rank.families.stream import ForwardPass, Stream
from tacod.rank.ops.norm import Norm

__all__ = ["EMBEDDER", "ByT5Mapper", "TokenRefiner"]

EMBEDDER = "in_layer", "out_layer"
"""The layers of `kit.MLPEmbedder` in ComfyUI's names."""
_EPSILON = 1e-6


class RefinerBlock(nn.Module):
    """Self-attention and MLP over a text alone, each with a gate and without shift and scale."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.adaLN_modulation = kit.AdaLN(width, 2 * width)
        self.norm1, self.norm2 = nn.LayerNorm(width, _EPSILON), nn.LayerNorm(width, _EPSILON)
        self.self_attn = kit.SelfAttention(width, heads)
        self.mlp = kit.MLP(width, 4 * width, ("0", "2"), "silu")

    def forward(self, f: ForwardPass, text: Stream, mask: Tensor | None) -> None:
        """The text one block further; ``mask`` is what `SequenceParallel.in_order_of_ranks` gives."""
        gate, mlp_gate = f.modulation(self.adaLN_modulation.linear, 2)
        first, second = (Norm("layer", _EPSILON, norm.weight, norm.bias) for norm in (self.norm1, self.norm2))
        normed = text.normed(norm=first)
        (attended,) = f.attend((text, lambda: self.self_attn(normed)), mask=mask).wait()
        text.add(gate, self.self_attn.project(attended))
        text.add(mlp_gate, self.mlp(text.normed(norm=second)))


class TokenRefiner(nn.Module):
    """Embeds a text, and refines it with the time and its own mean (Kong et al., 2024, arXiv:2412.03603)."""

    def __init__(self, inputs: int, width: int, heads: int, blocks: int) -> None:
        super().__init__()
        self.input_embedder = nn.Linear(inputs, width)
        self.t_embedder = kit.MLPEmbedder(256, width, EMBEDDER)
        self.c_embedder = kit.MLPEmbedder(inputs, width, EMBEDDER)
        self.individual_token_refiner = nn.Module()
        self.individual_token_refiner.blocks = nn.ModuleList(RefinerBlock(width, heads) for _ in range(blocks))

    @property
    def blocks(self) -> Any:
        """The blocks in order."""
        return self.individual_token_refiner.blocks

    def forward(
        self, f: ForwardPass, context: Tensor, mean: Tensor, timestep: Tensor, mask: Tensor | None = None
    ) -> Stream:
        """A stream of the refined text ``context`` [B, L, inputs].

        ``mean`` [B, inputs] is the mean of all tokens that there were. ``mask`` [B, L] is boolean: true for the tokens
        that others attend to, at least one of each text.
        """
        conditioning = self.t_embedder.numbers(timestep, context.dtype) + self.c_embedder(mean)
        layers = [block.adaLN_modulation.linear for block in self.blocks]
        f.modulate(layers, functional.silu(conditioning))
        text = f.shard(context, self.input_embedder)
        ordered = None if mask is None else f.sequence.in_order_of_ranks(mask, text.lengths)
        for block in self.blocks:
            block(f, text, ordered)
        return text


class ByT5Mapper(nn.Module):
    """Brings the tokens of ByT5, which spell what is to be written in the picture, to the width of the others."""

    def __init__(self, inputs: int, hidden: int, width: int) -> None:
        super().__init__()
        self.layernorm = nn.LayerNorm(inputs)
        self.fc1, self.fc2, self.fc3 = nn.Linear(inputs, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, S, inputs] to [B, S, width]."""
        hidden = functional.gelu(self.fc1(self.layernorm(tokens)))
        out: Tensor = self.fc3(functional.gelu(self.fc2(hidden)))
        return out

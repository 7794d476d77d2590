"""What families are made of. Each part works on any number of ranks and, where it helps, with kernels on a GPU."""

from tacod.rank.families.kit.attention import (
    CrossAttention,
    QKNormWeights,
    SelfAttention,
    attend_replicated,
    attend_sharded,
)
from tacod.rank.families.kit.embed import MLPEmbedder, sinusoid
from tacod.rank.families.kit.grid import Grid, PatchEmbed, line
from tacod.rank.families.kit.masks import drop_hidden
from tacod.rank.families.kit.mlp import MLP, feed_forward
from tacod.rank.families.kit.mmdit import DoubleBlock, SingleBlock, after_attention, join_streams
from tacod.rank.families.kit.modulation import AdaLN, FinalLayer, Modulation, drawn
from tacod.rank.families.kit.references import (
    REFERENCE_METHODS,
    ROPE_OPTIONS,
    image_positions,
    origin_and_scale,
    reference_origins,
)
from tacod.rank.families.kit.rope import rope

__all__ = [
    "MLP",
    "REFERENCE_METHODS",
    "ROPE_OPTIONS",
    "AdaLN",
    "CrossAttention",
    "DoubleBlock",
    "FinalLayer",
    "Grid",
    "MLPEmbedder",
    "Modulation",
    "PatchEmbed",
    "QKNormWeights",
    "SelfAttention",
    "SingleBlock",
    "after_attention",
    "attend_replicated",
    "attend_sharded",
    "drawn",
    "drop_hidden",
    "feed_forward",
    "image_positions",
    "join_streams",
    "line",
    "origin_and_scale",
    "reference_origins",
    "rope",
    "sinusoid",
]

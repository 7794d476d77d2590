"""How the tokens of ComfyUI's networks are split: a table of a few lines for a family."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from tacod.rank.comfyui.split import Blocks, Cut, Ones, Table

__all__ = ["TABLES", "table_of"]

_PREFIX = "comfy.ldm."
Shapes = Mapping[str, tuple[int, ...]]


def _patches(shape: tuple[int, ...], *sizes: int) -> int:
    """How many patches of these sizes a latent has, along its last dimensions."""
    count = 1
    for side, size in zip(shape[-len(sizes) :], sizes, strict=True):
        count *= -(-side // size)
    return count


def _in(layer: Any) -> int:
    """The input channels of a linear layer."""
    channels: int = layer.in_features
    return channels


TABLES: tuple[Table, ...] = (
    Table(
        network="aura.mmdit.MMDiT",
        blocks=(Blocks("double_layers"), Blocks("single_layers")),
        tokens={"c": Cut(1, ("text",)), "x": Cut(1, ("image",))},
        gather=("final_linear", ("image",)),
        heads=lambda net: int(net.double_layers[0].attn.n_heads),
        width=lambda net: int(net.final_linear.in_features),
        lengths=lambda net, shapes: (shapes["context"][1] + 8, _patches(shapes["x"], net.patch_size, net.patch_size)),
        probe=lambda net: {
            "x": (1, net.init_x_linear.in_features // net.patch_size**2, 14, 22),
            "context": (1, 9, _in(net.cond_seq_linear)),
        },
    ),
    Table(
        network="boogu.model.BooguTransformer2DModel",
        blocks=(
            Blocks(
                "double_stream_layers",
                along={"joint_rotary_emb": Cut(1, ("text", "image")), "img_rotary_emb": Cut(1, ("image",))},
                attention={"img_self_attn": ("image",)},
            ),
            Blocks("single_stream_layers", along={"image_rotary_emb": Cut(1, ("text", "image"))}),
        ),
        tokens={"img_hidden_states": Cut(1, ("image",)), "instruct_hidden_states": Cut(1, ("text",))},
        gather=("norm_out", ("text", "image")),
        heads=lambda net: int(net.single_stream_layers[0].attn.heads),
        width=lambda net: int(net.hidden_size),
        lengths=lambda net, shapes: (shapes["context"][1], _patches(shapes["x"], net.patch_size, net.patch_size)),
        probe=lambda net: {
            "x": (1, _in(net.x_embedder) // net.patch_size**2, 14, 22),
            "context": (1, 9, _in(net.time_caption_embed.caption_embedder[1])),
            "num_tokens": 9,
        },
    ),
    Table(
        network="cogvideo.model.CogVideoXTransformer3DModel",
        blocks=(Blocks("blocks", along={"image_rotary_emb": Cut(0, ("image",))}),),
        tokens={"encoder_hidden_states": Cut(1, ("text",)), "hidden_states": Cut(1, ("image",))},
        gather=("proj_out", ("image",)),
        heads=lambda net: int(net.num_attention_heads),
        width=lambda net: int(net.dim),
        lengths=lambda net, shapes: (
            shapes["context"][1],
            _patches(shapes["x"], net.patch_size_t or 1, net.patch_size, net.patch_size),
        ),
        probe=lambda net: {
            "x": (1, net.in_channels, 2, 14, 22),
            "context": (1, 9, _in(net.patch_embed.text_proj)),
        },
    ),
    Table(
        network="ernie.model.ErnieImageModel",
        blocks=(Blocks("layers", along={"rotary_pos_emb": Cut(1, ("all",))}),),
        tokens={"x": Cut(1, ("all",))},
        gather=("final_linear", ("all",)),
        heads=lambda net: int(net.num_heads),
        width=lambda net: int(net.hidden_size),
        lengths=lambda net, shapes: (shapes["context"][1] + _patches(shapes["x"], net.patch_size, net.patch_size),),
        probe=lambda net: {
            "x": (1, net.x_embedder.proj.in_channels, 7, 11),
            "context": (1, 9, net.hidden_size if net.text_proj is None else _in(net.text_proj)),
        },
        attention_names=("ernie.model.optimized_attention",),
    ),
    Table(
        network="hydit.models.HunYuanDiT",
        blocks=(Blocks("blocks", along={"freq_cis_img": Cut(0, ("image",))}, attention={"attn2": None}),),
        tokens={"x": Cut(1, ("image",))},
        gather=("final_layer", ("image",)),
        heads=lambda net: int(net.num_heads),
        width=lambda net: int(net.hidden_size),
        lengths=lambda net, shapes: (_patches(shapes["x"], net.patch_size, net.patch_size),),
        probe=lambda net: {
            "x": (1, net.in_channels, 14, 22),
            "context": (1, net.text_len, net.text_states_dim),
            "text_embedding_mask": Ones((1, net.text_len)),
            "encoder_hidden_states_t5": (1, net.text_len_t5, net.text_states_dim_t5),
            "text_embedding_mask_t5": Ones((1, net.text_len_t5)),
            "image_meta_size": (1, 6),
        },
        attention_names=("hydit.attn_layers.optimized_attention",),
    ),
    Table(
        network="ideogram4.model.Ideogram4Transformer2DModel",
        blocks=(Blocks("layers", along={"freqs_cis": Cut(1, ("all",))}),),
        tokens={"x": Cut(1, ("all",))},
        gather=("final_layer", ("all",)),
        heads=lambda net: int(net.layers[0].attention.num_heads),
        width=lambda net: int(net.layers[0].attention.hidden_size),
        lengths=lambda net, shapes: (shapes["context"][1] + _patches(shapes["x"], 1, 1),),
        probe=lambda net: {"x": (1, net.in_channels, 7, 11), "context": (1, 9, _in(net.llm_cond_proj))},
    ),
    Table(
        network="joyimage.model.JoyImageTransformer3DModel",
        blocks=(Blocks("double_blocks", along={"image_rotary_emb": Cut(1, ("image",))}),),
        tokens={"hidden_states": Cut(1, ("image",)), "encoder_hidden_states": Cut(1, ("text",))},
        gather=("proj_out", ("image",)),
        heads=lambda net: int(net.double_blocks[0].attn.num_attention_heads),
        width=lambda net: _in(net.proj_out),
        lengths=lambda net, shapes: (shapes["context"][1], _patches(shapes["x"], *net.patch_size)),
        probe=lambda net: {
            "x": (1, net.img_in.in_channels, net.patch_size[0], 14, 22),
            "context": (1, 9, _in(net.condition_embedder.text_embedder.linear_1)),
        },
    ),
    Table(
        network="lens.model.LensTransformer2DModel",
        blocks=(
            Blocks(
                "transformer_blocks",
                along={"freqs_cis": Cut(2, ("image", "text")), "attention_mask": Cut(3, ("image", "text"))},
            ),
        ),
        tokens={"hidden_states": Cut(1, ("image",)), "encoder_hidden_states": Cut(1, ("text",))},
        gather=("proj_out", ("image",)),
        heads=lambda net: int(net.transformer_blocks[0].attn.heads),
        width=lambda net: int(net.inner_dim),
        lengths=lambda net, shapes: (shapes["context"][1], _patches(shapes["x"], 1, 1)),
        probe=lambda net: {"x": (1, net.in_channels, 7, 11), "context": (1, 9, _in(net.txt_in))},
    ),
    Table(
        network="mage_flow.model.MageFlowTransformer2DModel",
        blocks=(Blocks("transformer_blocks", along={"image_rotary_emb": Cut(2, ("text", "image"))}),),
        tokens={"hidden_states": Cut(1, ("image",)), "encoder_hidden_states": Cut(1, ("text",))},
        gather=("proj_out", ("image",)),
        heads=lambda net: int(net.transformer_blocks[0].attn.heads),
        width=lambda net: int(net.inner_dim),
        lengths=lambda net, shapes: (shapes["context"][1], _patches(shapes["x"], 1, 1)),
        probe=lambda net: {"x": (1, net.in_channels, 7, 11), "context": (1, 9, _in(net.txt_in))},
    ),
    Table(
        network="omnigen.omnigen2.OmniGen2Transformer2DModel",
        blocks=(Blocks("layers", along={"image_rotary_emb": Cut(1, ("all",))}),),
        tokens={"hidden_states": Cut(1, ("all",))},
        gather=("norm_out", ("all",)),
        heads=lambda net: int(net.layers[0].attn.heads),
        width=lambda net: int(net.hidden_size),
        lengths=lambda net, shapes: (shapes["context"][1] + _patches(shapes["x"], net.patch_size, net.patch_size),),
        probe=lambda net: {
            "x": (1, _in(net.x_embedder) // net.patch_size**2, 14, 22),
            "context": (1, 9, _in(net.time_caption_embed.caption_embedder[1])),
            "num_tokens": 9,
        },
    ),
)
"""One for each class; docs/comfyui-networks.md lists them."""


def table_of(network: nn.Module) -> Table | None:
    """The table of a network by its class; None if there is none."""
    kind = type(network)
    name = f"{kind.__module__}.{kind.__qualname__}"
    return next((each for each in TABLES if f"{_PREFIX}{each.network}" == name), None)

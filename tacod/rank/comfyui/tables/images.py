"""Tables of networks for images."""

from __future__ import annotations

from typing import Any

from tacod.rank.comfyui.tables.base import Added, Blocks, Cut, Mask, Shapes, Table, Whole, any_of, patches, width_in

__all__ = ["IMAGES"]


def _image(net: Any, shapes: Shapes, *sizes: int) -> int:
    """Tokens of the image and of its references, in patches of these sizes."""
    return sum(patches(shape, *sizes) for shape in (shapes["x"], *shapes.get("ref_latents", ())))


def _text(shapes: Shapes) -> int:
    """Tokens of the text."""
    return int(shapes["context"][1]) if "context" in shapes else 0


def _references(net: Any) -> tuple[Any, ...]:
    """OmniGen2's and Boogu's."""
    channels = width_in(net.x_embedder) // net.patch_size**2
    return ({"ref_latents": [(1, channels, 10, 12), (1, channels, 14, 12)]},)


_HIDREAM_O1_IMAGE = 151655
"""The token that stands for a piece of a reference image in HiDream-O1's texts."""


def _hidream_o1_text(text: int, image: int) -> dict[str, Any]:
    """What HiDream-O1 is told of so many tokens."""
    return {
        "input_ids": Mask((1, text), hidden=2),
        "position_ids": (1, 3, text + image),
        "token_types": Mask((1, text + image)),
        # Which tokens become images.
        "vinput_mask": Whole(((*[0] * text, *[1] * image),)),
        "ar_len": text - 1,
    }


def _hidream_o1_reference(net: Any) -> dict[str, Any]:
    """HiDream-O1's arguments with a reference image of four tokens of the text."""
    side = 2 * int(net.visual.spatial_merge_size)
    return {
        **_hidream_o1_text(13, 15 + 6),
        "input_ids": Whole(((1, 1, 1, *[_HIDREAM_O1_IMAGE] * 4, 1, 1, 1, 1, 0, 0),)),
        "ref_pixel_values": (1, side**2, net.visual.patch_embed.proj.weight[0].numel()),
        "ref_image_grid_thw": Whole((((1, side, side),),)),
        "ref_patches": (1, 6, net.in_channels * net.patch_size**2),
    }


def _joint(network: str, blocks: Blocks, gather: str = "proj_out", **others: Any) -> Table:
    """Of networks in which image and text are streams of their own that attend together."""
    return Table(
        network=network,
        blocks=(blocks,),
        tokens={"hidden_states": Cut(1, ("image",)), "encoder_hidden_states": Cut(1, ("text",))},
        gather=(gather, ("image",)),
        width=lambda net: width_in(net.proj_out),
        **others,
    )


IMAGES: tuple[Table, ...] = (
    Table(
        network="aura.mmdit.MMDiT",
        blocks=(Blocks("double_layers"), Blocks("single_layers")),
        tokens={"c": Cut(1, ("text",)), "x": Cut(1, ("image",))},
        gather=("final_linear", ("image",)),
        heads=lambda net: int(net.double_layers[0].attn.n_heads),
        width=lambda net: int(net.final_linear.in_features),
        lengths=lambda net, shapes: (shapes["context"][1] + 8, patches(shapes["x"], net.patch_size, net.patch_size)),
        probe=lambda net: {
            "x": (1, net.init_x_linear.in_features // net.patch_size**2, 14, 22),
            "context": (1, 9, width_in(net.cond_seq_linear)),
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
        lengths=lambda net, shapes: (_text(shapes), _image(net, shapes, net.patch_size, net.patch_size)),
        probe=lambda net: {
            "x": (1, width_in(net.x_embedder) // net.patch_size**2, 14, 22),
            "context": (1, 9, width_in(net.time_caption_embed.caption_embedder[1])),
            "num_tokens": 9,
        },
        further=_references,
    ),
    Table(
        network="ernie.model.ErnieImageModel",
        blocks=(Blocks("layers", along={"rotary_pos_emb": Cut(1, ("all",))}),),
        tokens={"x": Cut(1, ("all",))},
        gather=("final_linear", ("all",)),
        heads=lambda net: int(net.num_heads),
        width=lambda net: int(net.hidden_size),
        lengths=lambda net, shapes: (shapes["context"][1] + patches(shapes["x"], net.patch_size, net.patch_size),),
        probe=lambda net: {
            "x": (1, net.x_embedder.proj.in_channels, 7, 11),
            "context": (1, 9, net.hidden_size if net.text_proj is None else width_in(net.text_proj)),
        },
        attention_names=("ernie.model.optimized_attention",),
    ),
    Table(
        network="hidream_o1.model.HiDreamO1Transformer",
        blocks=(
            Blocks(
                "language_model.layers",
                along={"freqs_cis": Cut(1, ("text", "image"))},
                causal="optimized_attention",
            ),
        ),
        tokens={"x": Cut(1, ("text", "image"))},
        leading=lambda net, arguments: arguments["ar_len"],
        gather=("language_model.layers", ("text", "image")),
        heads=lambda net: int(net.text_config.num_attention_heads),
        width=lambda net: int(net.hidden_size),
        # The last token of the text, which tells the time, attends as the image does.
        lengths=lambda net, shapes: (
            shapes["input_ids"][1] - 1,
            1 + patches(shapes["x"], net.patch_size, net.patch_size) + shapes.get("ref_patches", (0, 0))[1],
        ),
        probe=lambda net: {
            "x": (1, net.in_channels, 3 * net.patch_size, 5 * net.patch_size),
            **_hidream_o1_text(9, 15),
        },
        further=lambda net: tuple(
            {**reference, **text}
            for reference in ({}, _hidream_o1_reference(net))
            for text in ({}, {"context": (1, 9, 1)})
            if reference or text
        ),
    ),
    Table(
        network="hydit.models.HunYuanDiT",
        blocks=(Blocks("blocks", along={"freq_cis_img": Cut(0, ("image",))}, attention={"attn2": None}),),
        tokens={"x": Cut(1, ("image",))},
        gather=("final_layer", ("image",)),
        heads=lambda net: int(net.num_heads),
        width=lambda net: int(net.hidden_size),
        lengths=lambda net, shapes: (patches(shapes["x"], net.patch_size, net.patch_size),),
        probe=lambda net: {
            "x": (1, net.in_channels, 14, 22),
            "context": (1, net.text_len, net.text_states_dim),
            "text_embedding_mask": Mask((1, net.text_len)),
            "encoder_hidden_states_t5": (1, net.text_len_t5, net.text_states_dim_t5),
            "text_embedding_mask_t5": Mask((1, net.text_len_t5)),
            "image_meta_size": (1, 6),
        },
        attention_names=("hydit.attn_layers.optimized_attention",),
        control=Added("output", lambda net: int(net.depth) - int(net.depth) // 2 - 1, whole=True),
    ),
    Table(
        network="ideogram4.model.Ideogram4Transformer2DModel",
        blocks=(Blocks("layers", along={"freqs_cis": Cut(1, ("all",))}),),
        tokens={"x": Cut(1, ("all",))},
        gather=("final_layer", ("all",)),
        heads=lambda net: int(net.layers[0].attention.num_heads),
        width=lambda net: int(net.layers[0].attention.hidden_size),
        lengths=lambda net, shapes: (_text(shapes) + patches(shapes["x"], 1, 1),),
        probe=lambda net: {"x": (1, net.in_channels, 7, 11), "context": (1, 9, width_in(net.llm_cond_proj))},
        further=lambda net: ({"attention_mask": Mask((1, 9), hidden=2)}, {"context": None}),
    ),
    _joint(
        "joyimage.model.JoyImageTransformer3DModel",
        Blocks("double_blocks", along={"image_rotary_emb": Cut(1, ("image",))}),
        # References are left out behind the blocks.
        gather="double_blocks",
        heads=lambda net: int(net.double_blocks[0].attn.num_attention_heads),
        lengths=lambda net, shapes: (_text(shapes), _image(net, shapes, *net.patch_size)),
        probe=lambda net: {
            "x": (1, net.img_in.in_channels, net.patch_size[0], 14, 22),
            "context": (1, 9, width_in(net.condition_embedder.text_embedder.linear_1)),
        },
        further=lambda net: (
            {"ref_latents": [(1, net.img_in.in_channels, net.patch_size[0], side, 12) for side in (10, 14)]},
        ),
    ),
    _joint(
        "lens.model.LensTransformer2DModel",
        Blocks(
            "transformer_blocks",
            along={"freqs_cis": Cut(2, ("image", "text")), "attention_mask": Cut(3, ("image", "text"), mask=True)},
        ),
        heads=lambda net: int(net.transformer_blocks[0].attn.heads),
        lengths=lambda net, shapes: (_text(shapes), patches(shapes["x"], 1, 1)),
        probe=lambda net: {"x": (1, net.in_channels, 7, 11), "context": (1, 9, width_in(net.txt_in))},
        further=lambda net: ({"attention_mask": Mask((1, 9), hidden=2)},),
        control=Added("input", lambda net: len(net.transformer_blocks)),
    ),
    _joint(
        "mage_flow.model.MageFlowTransformer2DModel",
        Blocks(
            "transformer_blocks",
            along={
                "image_rotary_emb": Cut(2, ("text", "image")),
                "encoder_hidden_states_mask": Cut(1, ("text",), mask=True),
            },
        ),
        heads=lambda net: int(net.transformer_blocks[0].attn.heads),
        lengths=lambda net, shapes: (_text(shapes), _image(net, shapes, 1, 1)),
        probe=lambda net: {"x": (1, net.in_channels, 7, 11), "context": (1, 9, width_in(net.txt_in))},
        further=lambda net: any_of(
            attention_mask=Mask((1, 9), hidden=2),
            ref_latents=[(1, net.in_channels, 5, 6), (1, net.in_channels, 7, 6)],
        ),
        control=Added("input", lambda net: len(net.transformer_blocks)),
    ),
    Table(
        network="omnigen.omnigen2.OmniGen2Transformer2DModel",
        blocks=(Blocks("layers", along={"image_rotary_emb": Cut(1, ("all",))}),),
        tokens={"hidden_states": Cut(1, ("all",))},
        gather=("norm_out", ("all",)),
        heads=lambda net: int(net.layers[0].attn.heads),
        width=lambda net: int(net.hidden_size),
        lengths=lambda net, shapes: (_text(shapes) + _image(net, shapes, net.patch_size, net.patch_size),),
        probe=lambda net: {
            "x": (1, width_in(net.x_embedder) // net.patch_size**2, 14, 22),
            "context": (1, 9, width_in(net.time_caption_embed.caption_embedder[1])),
            "num_tokens": 9,
        },
        further=_references,
    ),
)

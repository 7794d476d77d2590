"""Tables of networks for music and other sound."""

from __future__ import annotations

from typing import Any

from tacod.rank.comfyui.tables.base import Blocks, Cut, LinearAttention, Mask, Shapes, Table, Window, patches, width_in

__all__ = ["SOUNDS"]


def _stable_audio_tokens(net: Any, shapes: Shapes) -> int:
    """Stable Audio's, without those before the sound."""
    return int(shapes["x"][2]) // int(net.patch_size)


def _ace_step_length(net: Any) -> int:
    """How long the sound of a small forward is: near tokens must not be all of them."""
    widest = max(layer.self_attn.sliding_window or 0 for layer in net.decoder.layers)
    return int(net.decoder.patch_size) * 2 * int(widest) + 37


SOUNDS: tuple[Table, ...] = (
    Table(
        network="ace.model.ACEStepTransformer2DModel",
        blocks=(
            Blocks(
                "transformer_blocks",
                along={"rotary_freqs_cis": Cut(0, ("sound",))},
                attention={"attn": LinearAttention(), "cross_attn": None},
                convolutions=("ff.depth_conv.conv",),
            ),
        ),
        tokens={"hidden_states": Cut(1, ("sound",))},
        gather=("transformer_blocks", ("sound",)),
        heads=lambda net: int(net.num_attention_heads),
        width=lambda net: int(net.inner_dim),
        lengths=lambda net, shapes: (patches(shapes["x"], *net.patch_size),),
        probe=lambda net: {
            "x": (1, net.in_channels, net.patch_size[0], 37 * net.patch_size[1]),
            "context": (1, 9, width_in(net.genre_embedder)),
            # Tokens are whole numbers, as a mask is.
            "lyric_token_idx": Mask((1, 7), hidden=2),
            "speaker_embeds": (1, width_in(net.speaker_embedder)),
            "lyrics_strength": 0.9,
        },
    ),
    Table(
        network="ace.ace_step15.AceStepConditionGenerationModel",
        blocks=(
            Blocks(
                "decoder.layers",
                along={"position_embeddings": Cut(0, ("sound",))},
                attention={"self_attn": Window("sliding_window"), "cross_attn": None},
            ),
        ),
        tokens={"hidden_states": Cut(1, ("sound",))},
        gather=("decoder.layers", ("sound",)),
        heads=lambda net: int(net.decoder.layers[0].self_attn.num_heads),
        width=lambda net: int(net.decoder.layers[0].self_attn.hidden_size),
        lengths=lambda net, shapes: (-(-shapes["x"][2] // net.decoder.patch_size),),
        probe=lambda net: {
            "x": (1, width_in(net.tokenizer.audio_acoustic_proj), _ace_step_length(net)),
            "context": (1, 9, width_in(net.encoder.text_projector)),
            "lyric_embed": (1, 7, width_in(net.encoder.lyric_encoder.embed_tokens)),
            "refer_audio": (1, width_in(net.tokenizer.audio_acoustic_proj), _ace_step_length(net)),
        },
        further=lambda net: tuple(
            {**source, **text}
            # Codes are whole numbers, as a mask is.
            for source in ({"is_covers": True}, {"is_covers": False}, {"audio_codes": Mask((1, 8))})
            for text in ({}, {"replace_with_null_embeds": True})
        ),
        attention_names=("ace.ace_step15.optimized_attention",),
    ),
    Table(
        network="audio.dit.AudioDiffusionTransformer",
        blocks=(
            Blocks(
                "transformer.layers",
                along={"rotary_pos_emb": Cut(0, ("all",)), "local_add_cond": Cut(1, ("all",), tail=True)},
                attention={"cross_attn": None},
            ),
        ),
        tokens={"x": Cut(1, ("all",))},
        gather=("transformer.layers", ("all",)),
        heads=lambda net: int(net.transformer.layers[0].self_attn.num_heads),
        width=lambda net: int(net.transformer.dim),
        lengths=lambda net, shapes: (net.transformer.num_memory_tokens + _stable_audio_tokens(net, shapes),),
        probe=lambda net: {
            "x": (1, net.postprocess_conv.in_channels, 37 * net.patch_size),
            "context": (1, 9, net.cond_token_dim),
            "global_embed": (1, width_in(net.to_global_embed[0])),
        },
        further=lambda net: (
            ()
            if net.transformer.layers[0].to_local_embed is None
            else ({"local_add_cond": (1, width_in(net.transformer.layers[0].to_local_embed[0]), 37)},)
        ),
        unfit=lambda net, shapes: (
            "there is more to add than sound"
            if shapes.get("local_add_cond", (0, 0, 0))[2] > _stable_audio_tokens(net, shapes)
            else ""
        ),
    ),
)

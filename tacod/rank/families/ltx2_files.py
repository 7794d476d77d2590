"""What tells LTX-2's models: tensors, and names of layers in LoRA files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tacod.checkpoint import TensorInfo
from tacod.rank.families.config import count_blocks, shape_of
from tacod.rank.families.names import Names
from tacod_client.errors import ModelUnsupported

__all__ = ["LORA_NAMES", "check_described", "detect_config"]

_DESCRIBED = (
    "rope_type",
    "frequencies_precision",
    "causal_temporal_positioning",
    "use_middle_indices_grid",
    "timestep_scale_multiplier",
)
"""Keys that only a file's metadata has; published files have several of them."""
LORA_NAMES = Names("""
    proj_in                                                      patchify_proj
    audio_proj_in                                                audio_patchify_proj
    time_embed.linear                                            adaln_single.linear
    audio_time_embed.linear                                      audio_adaln_single.linear
    time_embed.emb.timestep_embedder.linear_{1,2}                adaln_single.emb.timestep_embedder.linear_{1,2}
    audio_time_embed.emb.timestep_embedder.linear_{1,2}          audio_adaln_single.emb.timestep_embedder.linear_{1,2}
    av_cross_attn_video_scale_shift.linear                       av_ca_video_scale_shift_adaln_single.linear
    av_cross_attn_audio_scale_shift.linear                       av_ca_audio_scale_shift_adaln_single.linear
    av_cross_attn_video_a2v_gate.linear                          av_ca_a2v_gate_adaln_single.linear
    av_cross_attn_audio_v2a_gate.linear                          av_ca_v2a_gate_adaln_single.linear
""")
"""See `DiT.lora_names`: names of diffusers' class where they differ."""


def detect_config(tensors: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """What a file's tensors tell of ComfyUI's ``unet_config``."""
    first = "transformer_blocks.0"
    width, context = shape_of(tensors, f"{first}.attn2.to_k.weight", 2)
    sound_width, sound_context = shape_of(tensors, f"{first}.audio_attn2.to_k.weight", 2)
    connector, sound_connector = (
        shape_of(tensors, f"{name}_embeddings_connector.learnable_registers", 2)[1] for name in ("video", "audio")
    )
    heads = _heads_of(tensors, "video_embeddings_connector.transformer_1d_blocks.0.attn1", max(connector // 128, 1))
    video_heads, sound_heads = (_heads_of(tensors, f"{first}.{name}", 32) for name in ("attn1", "audio_attn1"))
    config: dict[str, Any] = {
        "image_model": "ltxav",
        "num_layers": count_blocks(tensors, "transformer_blocks"),
        "num_attention_heads": video_heads,
        "attention_head_dim": width // video_heads,
        "cross_attention_dim": context,
        "in_channels": shape_of(tensors, "patchify_proj.weight", 2)[1],
        "audio_num_attention_heads": sound_heads,
        "audio_attention_head_dim": sound_width // sound_heads,
        "audio_cross_attention_dim": sound_context,
        "apply_gated_attention": f"{first}.attn1.to_gate_logits.weight" in tensors,
        "cross_attention_adaln": f"{first}.prompt_scale_shift_table" in tensors,
        "caption_proj_before_connector": "caption_projection.linear_2.weight" not in tensors,
        "caption_projection_first_linear": "caption_projection.linear_1.weight" in tensors,
        "connector_num_attention_heads": heads,
        "connector_attention_head_dim": connector // heads,
        "connector_num_layers": count_blocks(tensors, "video_embeddings_connector.transformer_1d_blocks"),
        "connector_apply_gated_attention": (
            "video_embeddings_connector.transformer_1d_blocks.0.attn1.to_gate_logits.weight" in tensors
        ),
        "ff_bias": f"{first}.ff.net.2.bias" in tensors,
        "audio_ff_bias": f"{first}.audio_ff.net.2.bias" in tensors,
        "use_keyframes_abs_pos_embedding": "keyframes_abs_pos_embedding" in tensors,
    }
    if sound_connector != connector:
        heads = _heads_of(tensors, "audio_embeddings_connector.transformer_1d_blocks.0.attn1", heads)
        config["audio_connector_num_attention_heads"] = heads
        config["audio_connector_attention_head_dim"] = sound_connector // heads
    if "caption_projection.linear_1.weight" in tensors:
        config["caption_channels"] = shape_of(tensors, "caption_projection.linear_1.weight", 2)[1]
    return config


def _heads_of(tensors: Mapping[str, TensorInfo], attention: str, usual: int) -> int:
    """The heads of an attention, as its gates tell; where it has none, as many as published models have."""
    gates = f"{attention}.to_gate_logits.weight"
    return shape_of(tensors, gates, 2)[0] if gates in tensors else usual


def check_described(config: Mapping[str, Any]) -> None:
    """Raise `ModelUnsupported` if nothing tells the kind of positions: a file without the published one's metadata.

    ComfyUI then takes what no published model has, and makes noise.
    """
    if not any(key in config for key in _DESCRIBED):
        raise ModelUnsupported(
            f"config has none of {', '.join(_DESCRIBED)}: the file lacks the metadata (config) of the published one, "
            "which says where tokens stand; load a file that has it"
        )

"""What MiniMax-H3's files tell: sizes by their tensors, and diffusers' names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tacod.checkpoint import TensorInfo
from tacod.checkpoint.diffusers import DiffusersConfig
from tacod.rank.families.config import count_blocks, shape_of
from tacod.rank.families.minimax_h3_parts import PATCH
from tacod.rank.families.names import Names

__all__ = ["NAMES", "detect_config", "of_diffusers"]

NAMES = Names("""
    {,audio_}proj_in                                      {video,audio}_patch_proj
    context_embedder                                      condition_proj
    time_embedder.linear_{1,2}                            time_embedder.proj_{in,out}
    token_refiner.refiner_blocks.*.norm{1,2}              token_refiner.blocks.*.norm{1,2}
    token_refiner.refiner_blocks.*.attn.to_{q,k,v}        token_refiner.blocks.*.attn.qkv_proj[0/3,1/3,2/3]
    token_refiner.refiner_blocks.*.attn.norm_{q,k}        token_refiner.blocks.*.attn.{q,k}_norm
    token_refiner.refiner_blocks.*.attn.to_out.0          token_refiner.blocks.*.attn.out_proj
    token_refiner.refiner_blocks.*.ff.net.0.proj          token_refiner.blocks.*.mlp.fc1~~
    token_refiner.refiner_blocks.*.ff.net.2               token_refiner.blocks.*.mlp.fc2
    token_refiner.final_norm
    transformer_blocks.*.{norm1,norm2,adaln_proj.linear}  blocks.*.{norm1,norm2,adaln_proj.linear}
    transformer_blocks.*.attn.to_{q,k,v}                  blocks.*.attn.qkv_proj[0/3,1/3,2/3]
    transformer_blocks.*.attn.norm_{q,k}                  blocks.*.attn.{q,k}_norm
    transformer_blocks.*.attn.to_out.0                    blocks.*.attn.out_proj
    transformer_blocks.*.ff.net.0.proj                    blocks.*.mlp.fc1~~
    transformer_blocks.*.ff.net.2                         blocks.*.mlp.fc2
    norm_out.{norm,linear}                                final_layer.{norm,adaln_proj.linear}
    {,audio_}proj_out                                     final_layer.{video,audio}_out
""")
"""See `DiT.names`."""


def detect_config(tensors: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """ComfyUI's ``unet_config`` of a file with these tensors.

    ``head_bank`` and ``gate_compress`` tell files that ComfyUI 0.38 runs and this version doesn't.
    """
    hidden, inputs = shape_of(tensors, "video_patch_proj.weight", 2)
    outputs, _ = shape_of(tensors, "final_layer.video_out.weight", 2)
    (head_width,) = shape_of(tensors, "blocks.0.attn.q_norm.weight", 1)
    config: dict[str, Any] = {
        "image_model": "minimax_h3",
        "num_layers": count_blocks(tensors, "blocks"),
        "token_refiner_num_layers": count_blocks(tensors, "token_refiner.blocks"),
        "hidden_size": hidden,
        "latents_dim": inputs // 4,
        "audio_latents_dim": shape_of(tensors, "audio_patch_proj.weight", 2)[1],
        "attention_head_dim": head_width,
        "num_attention_heads": shape_of(tensors, "blocks.0.attn.qkv_proj.weight", 2)[0] // max(3 * head_width, 1),
        "ffn_hidden_size": shape_of(tensors, "blocks.0.mlp.fc1.weight", 2)[0] // 2,
        "text_dim": shape_of(tensors, "condition_proj.weight", 2)[1],
    }
    if "adaln_t_table" in tensors:
        config["adaln_curve_grid"], config["time_embed_dim"] = shape_of(tensors, "adaln_t_table", 2)
    else:
        first = shape_of(tensors, "time_embedder.proj_in.weight", 2)
        config["time_embed_hidden_size"], config["timestep_input_dim"] = first
        config["time_embed_dim"] = shape_of(tensors, "time_embedder.proj_out.weight", 2)[0]
    if "rope.inv_freq" in tensors:
        (config["rope_inv_freq_len"],) = shape_of(tensors, "rope.inv_freq", 1)
    if any(name.startswith("blocks.0.attn.to_gate_compress.") for name in tensors):
        config["gate_compress"] = True
    if outputs > inputs:
        config["head_bank"] = outputs // max(inputs, 1)
    return config


def of_diffusers(c: DiffusersConfig) -> dict[str, Any]:
    """What shapes don't tell, of a configuration of diffusers'."""
    return {
        "num_layers": c.whole("num_layers", 50),
        "token_refiner_num_layers": c.whole("num_refiner_layers", 2),
        "patch_size": c.items("patch_size", PATCH),
        "rope_inv_freq_len": c.whole("rope_freq_dim", 16),
        "rope_theta": c.get("rope_theta", 10000.0),
        **{name: c.get(name, 1e-5) for name in ("norm_eps", "qk_norm_eps", "final_norm_eps")},
    }

"""What tells Wan's kinds of models: tensors, configurations, and diffusers' names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tacod.checkpoint import TensorInfo
from tacod.checkpoint.diffusers import DiffusersConfig
from tacod.rank.families.config import choice, count_blocks, shape_of
from tacod.rank.families.names import Names
from tacod.rank.families.wan_animate import detect_face
from tacod.rank.families.wan_parts import PATCH, PIXELS
from tacod_client.errors import ModelUnsupported

__all__ = [
    "NAMES",
    "OPTIONAL_LAYERS",
    "POSED",
    "SEEING",
    "detect_config",
    "of_diffusers",
    "of_diffusers_vace",
    "read_kind",
    "vace_distance",
]

_KINDS = ("t2v", "i2v", "vace", "camera", "camera_2.2", "animate", "scail", "scail2")
_OTHERS = {
    "s2v": "Wan 2.2 S2V",
    "humo": "HuMo",
    "animate2": "Wan Animate 2",
    "wandancer": "WanDancer",
    "flow_rvs": "FlowRVS",
}
"""The values of ``model_type`` for networks that ComfyUI has and this version doesn't run."""
_INSTEAD = "which this version doesn't run; run it in ComfyUI without the TACO-DiT nodes"
_MARKS = {
    "vace_patch_embedding.weight": "vace",
    "control_adapter.conv.weight": "camera_2.2",
    "casual_audio_encoder.encoder.final_linear.weight": "s2v",
    "audio_proj.audio_proj_glob_1.layer.bias": "humo",
    "face_adapter.fuser_blocks.0.k_norm.weight": "animate",
    "patch_embedding_mask.weight": "scail2",
    "patch_embedding_pose.weight": "scail",
    "patch_embedding_global.weight": "wandancer",
}
"""The tensors that tell kinds of networks from ``t2v``, in the order in which ComfyUI looks for them."""
_WITH_CLIP = {"t2v": "i2v", "camera_2.2": "camera"}
"""What these kinds are called where they see an image through CLIP."""
POSED = ("scail", "scail2")
"""The kinds whose poses are tokens behind the video's."""
SEEING = (*_WITH_CLIP.values(), "animate", *POSED)
"""The kinds that see an image through CLIP."""
_ACROSS_HEADS = "rms_norm_across_heads"
"""What diffusers calls norms of queries and keys over a whole row."""
NAMES = Names("""
    patch_embedding
    vace_patch_embedding
    condition_embedder.text_embedder.linear_{1,2}                 text_embedding.{0,2}
    condition_embedder.time_embedder.linear_{1,2}                 time_embedding.{0,2}
    condition_embedder.time_proj                                  time_projection.1
    condition_embedder.image_embedder.{norm1,norm2}               img_emb.proj.{0,4}
    condition_embedder.image_embedder.ff.net.{0.proj,2}           img_emb.proj.{1,3}
    condition_embedder.image_embedder.pos_embed                   img_emb.emb_pos
    proj_out                                                      head.head
    scale_shift_table                                             head.modulation
    {blocks,vace_blocks}.*.scale_shift_table                      {blocks,vace_blocks}.*.modulation
    {blocks,vace_blocks}.*.norm2                                  {blocks,vace_blocks}.*.norm3
    {blocks,vace_blocks}.*.attn1.{to_q,to_k,to_v,to_out.0}        {blocks,vace_blocks}.*.self_attn.{q,k,v,o}
    {blocks,vace_blocks}.*.attn2.{to_q,to_k,to_v,to_out.0}        {blocks,vace_blocks}.*.cross_attn.{q,k,v,o}
    {blocks,vace_blocks}.*.attn1.norm_{q,k}                       {blocks,vace_blocks}.*.self_attn.norm_{q,k}
    {blocks,vace_blocks}.*.attn2.norm_{q,k}                       {blocks,vace_blocks}.*.cross_attn.norm_{q,k}
    {blocks,vace_blocks}.*.ffn.net.{0.proj,2}                     {blocks,vace_blocks}.*.ffn.{0,2}
    blocks.*.attn2.add_{k,v}_proj                                 blocks.*.cross_attn.{k,v}_img
    blocks.*.attn2.norm_added_k                                   blocks.*.cross_attn.norm_k_img
    vace_blocks.*.{proj_in,proj_out}                              vace_blocks.*.{before_proj,after_proj}
""")
"""See `DiT.names`."""
OPTIONAL_LAYERS = frozenset(
    f"condition_embedder.image_embedder.{name}" for name in ("norm1", "norm2", "ff.net.0.proj", "ff.net.2", "pos_embed")
) | {"vace_patch_embedding"}
"""Layers outside of blocks that some of them lack, by diffusers' names."""


def detect_config(tensors: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """ComfyUI's ``unet_config`` of a file with these tensors, and what its classes have fixed.

    That is ``clip_dim``, and Animate's ``pose_dim`` and ``face``.
    """
    width = shape_of(tensors, "head.modulation", 3)[-1]
    kind = next((kind for mark, kind in _MARKS.items() if mark in tensors), "t2v")
    config: dict[str, Any] = {
        "image_model": "wan2.1",
        "dim": width,
        "out_dim": shape_of(tensors, "head.head.weight", 2)[0] // 4,
        "num_heads": max(width // 128, 1),
        "ffn_dim": shape_of(tensors, "blocks.0.ffn.0.weight", 2)[0],
        "num_layers": count_blocks(tensors, "blocks"),
        "in_dim": shape_of(tensors, "patch_embedding.weight", 5)[1],
        "text_dim": shape_of(tensors, "text_embedding.0.weight", 2)[1],
        "model_type": kind,
    }
    if "img_emb.proj.0.bias" in tensors:
        config["model_type"] = _WITH_CLIP.get(kind, kind)
        config["clip_dim"] = shape_of(tensors, "img_emb.proj.0.bias", 1)[0]
    if "img_emb.emb_pos" in tensors:
        config["flf_pos_embed_token_number"] = shape_of(tensors, "img_emb.emb_pos", 3)[1]
    if "ref_conv.weight" in tensors:
        config["in_dim_ref_conv"] = shape_of(tensors, "ref_conv.weight", 4)[1]
    if kind == "vace":
        config["vace_in_dim"] = shape_of(tensors, "vace_patch_embedding.weight", 5)[1]
        config["vace_layers"] = count_blocks(tensors, "vace_blocks")
    if kind == "camera_2.2":
        config["in_dim_control_adapter"] = shape_of(tensors, "control_adapter.conv.weight", 4)[1] // PIXELS**2
    if kind == "animate":
        config["pose_dim"] = shape_of(tensors, "pose_patch_embedding.weight", 5)[1]
        config["face"] = detect_face(tensors)
    if kind == "scail2":
        config["mask_in_dim"] = shape_of(tensors, "patch_embedding_mask.weight", 5)[1]
    return config


def read_kind(config: Mapping[str, Any]) -> str:
    """The kind of network. Raises `ModelUnsupported`, naming it, for one that this version doesn't run."""
    kind = config.get("model_type", "t2v")
    if config.get("causal_ar"):
        raise ModelUnsupported(f"config key 'causal_ar': Causal Forcing's network, {_INSTEAD}")
    if isinstance(kind, str) and kind in _OTHERS:
        raise ModelUnsupported(f"config key 'model_type' is {kind!r}: {_OTHERS[kind]}, {_INSTEAD}")
    return str(choice(config, "model_type", *_KINDS))


def vace_distance(layers: int, count: int) -> int:
    """How many of ``layers`` blocks there are to each of VACE's ``count`` blocks, as ComfyUI deals them out.

    Raises `ModelUnsupported`, naming the key, where ComfyUI would need more of VACE's blocks.
    """
    every = layers // count
    if not every or -(-layers // every) > count:
        raise ModelUnsupported(
            f"config key 'vace_layers' is {count}; it must divide 'num_layers', which is {layers}, nearly evenly"
        )
    return every


def of_diffusers(c: DiffusersConfig) -> dict[str, Any]:
    """What shapes don't tell, of a configuration of diffusers'."""
    return {
        "num_heads": c.whole("num_attention_heads", 40),
        "num_layers": c.whole("num_layers", 40),
        "patch_size": c.items("patch_size", PATCH),
        "freq_dim": c.whole("freq_dim", 256),
        "eps": c.get("eps", 1e-6),
        "cross_attn_norm": c.get("cross_attn_norm", True),
        "qk_norm": c.get("qk_norm", _ACROSS_HEADS) == _ACROSS_HEADS,
    }


def of_diffusers_vace(c: DiffusersConfig) -> dict[str, Any]:
    """The same of VACE, whose blocks must follow those that ComfyUI has them follow."""
    config = of_diffusers(c)
    places = c.items("vace_layers", list(range(0, 40, 5)))
    layers = config["num_layers"]
    if not isinstance(places, list) or not places or places != list(range(0, layers, layers // len(places) or 1)):
        raise ModelUnsupported(f"config.json: vace_layers is {places!r:.80}; expected block numbers at even distances")
    return {**config, "vace_layers": len(places)}

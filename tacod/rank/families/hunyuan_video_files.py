"""What tells HunyuanVideo's kinds of models: tensors, the names of their authors, and diffusers' names."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tacod.checkpoint import TensorInfo
from tacod.checkpoint.diffusers import DiffusersConfig
from tacod.rank.families.base import LatentFormat
from tacod.rank.families.config import count_blocks, shape_of
from tacod.rank.families.latents import HUNYUAN_VIDEO
from tacod.rank.families.names import Names
from tacod_client.errors import ModelUnsupported

__all__ = [
    "NAMES",
    "OPTIONAL_LAYERS",
    "QK_NORM",
    "SPELLINGS",
    "detect_config",
    "latents_of",
    "of_diffusers",
    "of_diffusers_15",
    "of_diffusers_image",
    "read_patch",
]

_MARKS = "txt_in.individual_token_refiner.blocks.0.norm1.weight", "img_in.proj.weight"
QK_NORM = "rms_norm"
"""What diffusers calls norms of queries and keys over a head."""
_LAYERS = {
    "_mod.linear": "_mod.lin",
    ".modulation.linear": ".modulation.lin",
    "_attn_qkv": "_attn.qkv",
    "_attn_proj": "_attn.proj",
    "mlp.fc1": "mlp.0",
    "mlp.fc2": "mlp.2",
    "_in.mlp.0": "_in.in_layer",
    "_in.mlp.2": "_in.out_layer",
    "t_embedder.mlp.0": "t_embedder.in_layer",
    "t_embedder.mlp.2": "t_embedder.out_layer",
    "c_embedder.linear_1": "c_embedder.in_layer",
    "c_embedder.linear_2": "c_embedder.out_layer",
}
"""Ends of layers' names in the authors' files (Tencent-Hunyuan/HunyuanVideo), and ComfyUI's, which are used here."""
SPELLINGS = {
    **{f"{theirs}.{kind}": f"{ours}.{kind}" for theirs, ours in _LAYERS.items() for kind in ("weight", "bias")},
    **{
        f"{theirs.format(short)}.weight": f"{ours}{whole}_norm.scale"
        for short, whole in (("q", "query"), ("k", "key"))
        for theirs, ours in (("_attn_{}_norm", "_attn.norm."), (".{}_norm", ".norm."))
    },
    # ComfyUI's from 0.14 on, and so in what its nodes save or send.
    **{f".{part}_norm.weight": f".{part}_norm.scale" for part in ("query", "key")},
}
"""See `DiT.spellings`."""
_REFINER = "context_embedder.token_refiner.refiner_blocks.*", "txt_in.individual_token_refiner.blocks.*"
_COMMON = """
    x_embedder.proj                                                      img_in.proj
    context_embedder.proj_in                                             txt_in.input_embedder
    context_embedder.time_text_embed.timestep_embedder.linear_{1,2}      txt_in.t_embedder.{in,out}_layer
    context_embedder.time_text_embed.text_embedder.linear_{1,2}          txt_in.c_embedder.{in,out}_layer
    THEIRS.norm{1,2}                                                     OURS.norm{1,2}
    THEIRS.attn.to_{q,k,v}                                               OURS.self_attn.qkv[0,1,2]
    THEIRS.attn.to_out.0                                                 OURS.self_attn.proj
    THEIRS.ff.net.{0.proj,2}                                             OURS.mlp.{0,2}
    THEIRS.norm_out.linear                                               OURS.adaLN_modulation.1
    context_embedder_2.{norm,linear_1,linear_2,linear_3}                 byt5_in.{layernorm,fc1,fc2,fc3}
    transformer_blocks.*.{norm1,norm1_context}.linear                    double_blocks.*.{img,txt}_mod.lin
    transformer_blocks.*.attn.to_{q,k,v}                                 double_blocks.*.img_attn.qkv[0,1,2]
    transformer_blocks.*.attn.add_{q,k,v}_proj                           double_blocks.*.txt_attn.qkv[0,1,2]
    transformer_blocks.*.attn.norm_{q,k}.weight         double_blocks.*.img_attn.norm.{query,key}_norm.scale
    transformer_blocks.*.attn.norm_added_{q,k}.weight   double_blocks.*.txt_attn.norm.{query,key}_norm.scale
    transformer_blocks.*.attn.{to_out.0,to_add_out}                      double_blocks.*.{img,txt}_attn.proj
    transformer_blocks.*.{ff,ff_context}.net.{0.proj,2}                  double_blocks.*.{img,txt}_mlp.{0,2}
    single_transformer_blocks.*.norm.linear                              single_blocks.*.modulation.lin
    single_transformer_blocks.*.attn.to_{q,k,v}                          single_blocks.*.linear1[0,1,2]
    single_transformer_blocks.*.proj_mlp                                 single_blocks.*.linear1[3:]
    single_transformer_blocks.*.attn.norm_{q,k}.weight                   single_blocks.*.norm.{query,key}_norm.scale
    single_transformer_blocks.*.proj_out                                 single_blocks.*.linear2
    norm_out.linear                                                      final_layer.adaLN_modulation.1~
    proj_out                                                             final_layer.linear
""".replace("THEIRS", _REFINER[0]).replace("OURS", _REFINER[1])
_EMBEDDERS = {
    "timestep_embedder": "time_in",
    "timestep_embedder_r": "time_r_in",
    "text_embedder": "vector_in",
    "guidance_embedder": "guidance_in",
}
_SEEN = """
    image_embedder.{norm_in,linear_1,linear_2,norm_out}                  vision_in.proj.{0,1,3,4}
    cond_type_embed                                                      cond_type_embedding
"""
_FOLDERS = {
    "time_text_embed": ("timestep_embedder", "text_embedder", "guidance_embedder"),
    "time_guidance_embed": ("timestep_embedder", "timestep_embedder_r", "guidance_embedder"),
    "time_embed": tuple(_EMBEDDERS),
}
"""Where diffusers' classes of HunyuanVideo, HunyuanImage 2.1 and 1.5 have which of them.

A model's table is the first of those that have most of its layers. So that of 1.5, which alone sees images, may have
layers that 1.5 lacks.
"""


def _table(folder: str) -> str:
    lines = [f"{folder}.{name}.linear_{{1,2}} {_EMBEDDERS[name]}.{{in,out}}_layer" for name in _FOLDERS[folder]]
    return "\n".join([_COMMON, *lines, _SEEN if folder == "time_embed" else ""])


NAMES = Names(*map(_table, _FOLDERS))
"""See `DiT.names`."""
OPTIONAL_LAYERS = frozenset(
    {
        "cond_type_embed",
        *(f"context_embedder_2.{name}" for name in ("norm", "linear_1", "linear_2", "linear_3")),
        *(f"image_embedder.{name}" for name in ("norm_in", "linear_1", "linear_2", "norm_out")),
        *(
            f"{folder}.{name}.linear_{number}"
            for folder in _FOLDERS
            for name in _EMBEDDERS
            for number in (1, 2)
            if name != "timestep_embedder" and (folder, name) != ("time_text_embed", "text_embedder")
        ),
    }
)
"""Layers outside of blocks that some of them lack, by diffusers' names."""


def detect_config(tensors: Mapping[str, TensorInfo]) -> dict[str, Any] | None:
    """ComfyUI's ``unet_config`` of a file with these tensors, and the sizes of ByT5's mapper; None for another's."""
    if any(mark not in tensors for mark in _MARKS):
        return None
    patched = tensors["img_in.proj.weight"].shape
    width, channels, *patch = shape_of(tensors, "img_in.proj.weight", 4 if len(patched) == 4 else 5)
    (head_width,) = shape_of(tensors, "double_blocks.0.img_attn.norm.key_norm.scale", 1)
    outputs, _ = shape_of(tensors, "final_layer.linear.weight", 2)
    hidden, _ = shape_of(tensors, "double_blocks.0.img_mlp.0.weight", 2)
    pooled = "vector_in.in_layer.weight" in tensors
    vision = "vision_in.proj.0.weight" in tensors
    config: dict[str, Any] = {
        "image_model": "hunyuan_video",
        "in_channels": channels,
        "patch_size": patch,
        "out_channels": outputs // max(math.prod(patch), 1),
        "vec_in_dim": shape_of(tensors, "vector_in.in_layer.weight", 2)[1] if pooled else None,
        "axes_dim": [64, 64] if len(patch) == 2 else [16, 56, 56],
        "meanflow": "time_r_in.in_layer.weight" in tensors,
        "context_in_dim": shape_of(tensors, "txt_in.input_embedder.weight", 2)[1],
        "hidden_size": width,
        "mlp_ratio": hidden / max(width, 1),
        "num_heads": width // max(head_width, 1),
        "depth": count_blocks(tensors, "double_blocks"),
        "depth_single_blocks": count_blocks(tensors, "single_blocks"),
        "theta": 256,
        "qkv_bias": True,
        "byt5": "byt5_in.fc1.weight" in tensors,
        "guidance_embed": "guidance_in.in_layer.weight" in tensors,
        "use_cond_type_embedding": "cond_type_embedding.weight" in tensors,
        "vision_in_dim": shape_of(tensors, "vision_in.proj.0.weight", 1)[0] if vision else None,
        "meanflow_sum": vision,
    }
    if config["byt5"]:
        config["byt5_hidden_dim"], config["byt5_in_dim"] = shape_of(tensors, "byt5_in.fc1.weight", 2)
    return config


def of_diffusers(c: DiffusersConfig) -> dict[str, Any]:
    """What shapes don't tell, of a configuration of diffusers' for HunyuanVideo."""
    return _told(c, 24, 20, c.whole("num_single_layers", 40), (16, 56, 56))


def of_diffusers_15(c: DiffusersConfig) -> dict[str, Any]:
    """The same for HunyuanVideo 1.5."""
    return _told(c, 16, 54, 0, (16, 56, 56))


def of_diffusers_image(c: DiffusersConfig) -> dict[str, Any]:
    """The same for HunyuanImage 2.1."""
    return _told(c, 28, 20, c.whole("num_single_layers", 40), (64, 64))


def _told(c: DiffusersConfig, heads: int, depth: int, single: int, axes: Sequence[int]) -> dict[str, Any]:
    return {
        "num_heads": c.whole("num_attention_heads", heads),
        "depth": c.whole("num_layers", depth),
        "depth_single_blocks": single,
        "refiner_depth": c.whole("num_refiner_layers", 2),
        "axes_dim": c.items("rope_axes_dim", axes),
        "theta": c.get("rope_theta", 256.0),
        "qk_norm": c.get("qk_norm", QK_NORM),
    }


def read_patch(config: Mapping[str, Any]) -> tuple[int, ...]:
    """The sides of a patch; raises `ModelUnsupported`, naming the key."""
    patch = config.get("patch_size")
    if not isinstance(patch, list) or len(patch) not in (2, 3) or any(type(n) is not int or n < 1 for n in patch):
        raise ModelUnsupported(
            f"config key 'patch_size' is {patch!r:.80}; expected two whole numbers for images, or three for videos"
        )
    if patch[-1] != patch[-2] or (len(patch) == 3 and patch[0] != 1):
        raise ModelUnsupported(f"config key 'patch_size' is {patch}; this version runs squares, of one frame")
    return tuple(patch)


def latents_of(sides: int, channels: int) -> tuple[LatentFormat | None, int]:
    """What the latents of published models are, of so many sides and channels, and the pixels of a cell.

    The refiner's are no affine map of its VAE's.
    """
    kinds: dict[tuple[int, int], tuple[LatentFormat | None, int]] = {
        (2, 64): (LatentFormat(0.75289, 0.0), 32),
        (3, 16): (HUNYUAN_VIDEO, 8),
        (3, 32): (LatentFormat(1.03682, 0.0), 16),
        (3, 64): (None, 16),
    }
    return kinds.get((sides, channels), (None, 8))

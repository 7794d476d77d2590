"""Tables of networks for videos."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tacod.rank.comfyui.tables.base import Blocks, Cut, Heads, Mask, Shapes, Table, any_of, patches, width_in

__all__ = ["VIDEOS"]


def _wan_frame(net: Any, shapes: Shapes) -> int:
    """Tokens of a frame of Wan's."""
    return patches(shapes["x"], *net.patch_size[1:])


def _wan_tokens(net: Any, shapes: Shapes) -> int:
    """Those of the video, and of the reference behind it."""
    frames: int = shapes["x"][2] + (shapes["reference_latent"][2] if "reference_latent" in shapes else 0)
    return frames * _wan_frame(net, shapes)


def _wan_unfit(shapes: Shapes, sounds: int, frames: int) -> str:
    """Why frames of a call aren't alike: the network would take tokens of one frame for those of another."""
    if "audio_embed" in shapes and sounds != frames:
        return "there are not as many pieces of sound as frames"
    reference = shapes.get("reference_latent")
    if reference is not None and (reference[3:] != shapes["x"][3:] or any(side % 2 for side in reference[3:])):
        return "the reference isn't as large as a frame"
    return ""


def _music(net: Any, fps: float) -> Mapping[str, Any]:
    """WanDancer's music."""
    return {"audio_embed": (1, 11, width_in(net.music_projection)), "fps": fps, "audio_inject_scale": 0.7}


def _seedvr2_call(net: Any, conditions: list[int]) -> Mapping[str, Any]:
    """A call of SeedVR2 for images of these conditions; it exchanges the halves of those that are of both."""
    images, channels = len(conditions), width_in(net.vid_in.proj) // math.prod(net.vid_in.patch_size)
    text = width_in(net.txt_in) if hasattr(net.txt_in, "in_features") else width_in(net.emb_in.proj_hid)
    latent = net.vid_out.proj.out_features // math.prod(net.vid_out.patch_size)
    # Large enough for several windows along each side.
    return {
        "x": (images, latent, 3, 40, 44),
        "timestep": (images,),
        "condition": (images, channels - latent, 3, 40, 44),
        "context": (images, 9, text),
        "transformer_options": {"cond_or_uncond": conditions},
    }


VIDEOS: tuple[Table, ...] = (
    Table(
        network="cogvideo.model.CogVideoXTransformer3DModel",
        blocks=(Blocks("blocks", along={"image_rotary_emb": Cut(0, ("image",))}),),
        tokens={"encoder_hidden_states": Cut(1, ("text",)), "hidden_states": Cut(1, ("image",))},
        gather=("proj_out", ("image",)),
        heads=lambda net: int(net.num_attention_heads),
        width=lambda net: int(net.dim),
        lengths=lambda net, shapes: (
            shapes["context"][1],
            patches(shapes["x"], net.patch_size_t or 1, net.patch_size, net.patch_size),
        ),
        probe=lambda net: {
            "x": (1, net.in_channels, 2, 14, 22),
            "context": (1, 9, width_in(net.patch_embed.text_proj)),
        },
        further=lambda net: ({"ofs": (1,)},) if net.ofs_proj_dim else (),
    ),
    Table(
        network="cosmos.model.GeneralDIT",
        blocks=(Blocks("blocks", along={"rope_emb_L_1_1_D": Cut(0, ("video",))}, attention={"blocks.1": None}),),
        tokens={"x": Cut(0, ("video",), dims=3)},
        gather=("blocks", ("video",)),
        heads=lambda net: int(net.num_heads),
        width=lambda net: int(net.model_channels),
        lengths=lambda net, shapes: (patches(shapes["x"], net.patch_temporal, net.patch_spatial, net.patch_spatial),),
        probe=lambda net: {
            "x": (1, net.in_channels, 2 * net.patch_temporal, 14, 22),
            "context": (1, 9, width_in(net.blocks["block0"].blocks[1].block.attn.to_k[0])),
        },
        further=lambda net: any_of(attention_mask=Mask((1, 9), hidden=2), fps=24.0),
        # Each block gets positions added to its tokens.
        between=True,
    ),
    Table(
        network="genmo.joint_model.asymm_models_joint.AsymmDiTJoint",
        blocks=(
            Blocks(
                "blocks",
                along={"rope_cos": Cut(0, ("video",)), "rope_sin": Cut(0, ("video",))},
                counts={"crop_y": "text"},
            ),
        ),
        tokens={"x": Cut(1, ("video",)), "y": Cut(1, ("text",), crop="crop_y")},
        gather=("final_layer", ("video",)),
        heads=lambda net: int(net.num_heads),
        width=lambda net: int(net.hidden_size_x),
        lengths=lambda net, shapes: (
            shapes["context"][1],
            shapes["x"][2] * patches(shapes["x"], net.patch_size, net.patch_size),
        ),
        probe=lambda net: {
            "x": (1, net.in_channels, 2, 14, 22),
            "context": (1, 11, net.t5_feat_dim),
            "attention_mask": Mask((1, 11), hidden=2),
            "num_tokens": 9,
        },
    ),
    Table(
        network="seedvr.model.NaDiT",
        blocks=(
            Blocks(
                "blocks",
                # Its windows are of all tokens, and other ones in each block; its text is on each rank.
                attention={"attn": Heads("proj_qkv", "proj_out", "heads")},
                within=(Blocks("ada", counts={"hid_len.vid": "video"}),),
            ),
        ),
        tokens={"vid": Cut(0, ("video",))},
        gather=("vid_out.proj", ("video",)),
        heads=lambda net: int(net.blocks[0].attn.heads),
        width=lambda net: int(net.vid_out.proj.in_features),
        lengths=lambda net, shapes: (patches(shapes["x"], *net.vid_in.patch_size),),
        probe=lambda net: _seedvr2_call(net, [0]),
        further=lambda net: (_seedvr2_call(net, [1, 0]),),
    ),
    Table(
        network="wan.model.HumoWanModel",
        blocks=(
            Blocks(
                "blocks",
                along={"freqs": Cut(1, ("video",))},
                attention={"cross_attn": None, "audio_cross_attn_wrapper": None},
            ),
        ),
        tokens={"x": Cut(1, ("video",))},
        gather=("head", ("video",)),
        heads=lambda net: int(net.num_heads),
        width=lambda net: int(net.dim),
        lengths=lambda net, shapes: (_wan_tokens(net, shapes),),
        probe=lambda net: {"x": (1, net.patch_embedding.in_channels, 2, 14, 22), "context": (1, 9, net.text_dim)},
        further=lambda net: any_of(
            audio_embed=(1, 2, 8, 5, 1280), reference_latent=(1, net.patch_embedding.in_channels, 1, 14, 22)
        ),
        frame=_wan_frame,
        unfit=lambda net, shapes: _wan_unfit(shapes, shapes.get("audio_embed", (0, 0))[1], shapes["x"][2]),
    ),
    Table(
        network="wan.model.WanModel_S2V",
        blocks=(
            Blocks("blocks", along={"freqs": Cut(1, ("video",))}, attention={"cross_attn": None}),
            Blocks("audio_injector", counts={"seq_len": "video"}),
        ),
        tokens={"x": Cut(1, ("video",))},
        gather=("head", ("video",)),
        heads=lambda net: int(net.num_heads),
        width=lambda net: int(net.dim),
        lengths=lambda net, shapes: (_wan_tokens(net, shapes),),
        probe=lambda net: {"x": (1, 16, 2, 14, 22), "context": (1, 9, net.text_dim)},
        further=lambda net: any_of(
            audio_embed=(1, 25, net.casual_audio_encoder.encoder.conv1_local.conv.in_channels, 8),
            reference_latent=(1, 16, 1, 14, 22),
            control_video=(1, 16, 2, 14, 22),
        ),
        frame=_wan_frame,
        # Of four pieces of sound it makes one for each frame.
        unfit=lambda net, shapes: _wan_unfit(
            shapes, min(shapes.get("audio_embed", (0, 0, 0, 0))[3], 4 * shapes["x"][2]), 4 * shapes["x"][2]
        ),
    ),
    Table(
        network="wan.model_wandancer.WanDancerModel",
        blocks=(
            Blocks("blocks", along={"freqs": Cut(1, ("video",))}, attention={"cross_attn": None}),
            Blocks("music_injector", counts={"seq_len": "video"}),
        ),
        tokens={"x": Cut(1, ("video",))},
        # There are two heads, for two frame rates.
        gather=("blocks", ("video",)),
        heads=lambda net: int(net.num_heads),
        width=lambda net: int(net.dim),
        lengths=lambda net, shapes: (_wan_tokens(net, shapes),),
        probe=lambda net: {
            "x": (1, net.patch_embedding.in_channels, 2, 16, 24),
            "context": (1, 9, net.text_dim),
            "clip_fea": (1, 17, 1280),
        },
        further=lambda net: tuple(
            {**reference, **music}
            for reference in ({}, {"clip_fea_ref": (1, 17, 1280)})
            for music in ({}, _music(net, 30.0), _music(net, 24.0))
            if reference or music
        ),
        # Each frame hears eight pieces of music, each an eighth of its tokens.
        frame=lambda net, shapes: _wan_frame(net, shapes) // 8 if "audio_embed" in shapes else 0,
        unfit=lambda net, shapes: (
            "a frame isn't of eight parts" if "audio_embed" in shapes and _wan_frame(net, shapes) % 8 else ""
        ),
    ),
)

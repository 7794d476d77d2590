"""Tiny networks of ComfyUI's for which this version has tables: a configuration, and the arguments of a call."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

__all__ = ["CASES", "NetworkCase"]

Shape = tuple[int, ...] | list[tuple[int, ...]]
"""Of noise, or of each tensor in a list."""


@dataclass(frozen=True)
class NetworkCase:
    """One network."""

    network: str
    """The class: its module under ``comfy.ldm``, and its name."""
    config: dict[str, Any]
    inputs: dict[str, Shape]
    """Shapes of noise for two images, and lists of such."""
    masks: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Lengths of masks, and how many of the last tokens they hide."""
    numbers: dict[str, float] = field(default_factory=dict)
    control: dict[str, list[tuple[int, ...] | None]] = field(default_factory=dict)
    """Shapes of a ControlNet's residuals, by the name of ComfyUI's list."""
    whole: dict[str, Any] = field(default_factory=dict)
    """Whole numbers, in lists within each other."""
    exact: bool = True
    """Whether ComfyUI computes the same to the bit in its own torch, which may be another version, by one thread."""
    beside: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """What ComfyUI needs of a file beside the network."""
    conditions: bool = False
    """Whether it is told which condition each image of a batch is of."""
    prefix: str = ""
    """What the names in published files begin with."""


SEEDVR2: dict[str, Any] = {"image_model": "seedvr2", "vid_dim": 24, "txt_in_dim": 32, "heads": 5, "head_dim": 16}
SEEDVR2 |= {"num_layers": 4, "mm_layers": 2, "rope_dim": 12, "norm_eps": 1e-5, "mlp_type": "swiglu", "expand_ratio": 2}
SEEDVR2 |= {"vid_out_norm": True}
SEEDVR2_CALL: dict[str, Shape] = {
    "x": (2, 16, 4, 42, 44),
    "condition": (2, 17, 4, 42, 44),
    "context": (2, 13, 32),
}
SEEDVR2_NAMES: dict[str, tuple[int, ...]] = {"blocks.31.mlp.all.proj_in_gate.weight": (1, 1)}
"""By which ComfyUI knows a file; the network has fewer blocks."""

CASES: dict[str, NetworkCase] = {
    "auraflow": NetworkCase(
        "aura.mmdit.MMDiT",
        {"max_seq": 144, "cond_seq_dim": 2048, "n_double_layers": 2, "n_layers": 4, "dim": 40, "n_heads": 5}
        | {"global_conddim": 40},
        {"x": (2, 4, 9, 14), "context": (2, 13, 2048)},
    ),
    "boogu": NetworkCase(
        "boogu.model.BooguTransformer2DModel",
        {"image_model": "boogu", "hidden_size": 48, "num_layers": 2, "num_double_stream_layers": 2}
        | {"num_refiner_layers": 1, "num_attention_heads": 6, "num_kv_heads": 2, "multiple_of": 16}
        | {"axes_dim_rope": [4, 2, 2], "axes_lens": [64, 64, 64], "instruction_feat_dim": 24},
        {"x": (2, 16, 10, 14), "context": (2, 13, 24)},
        numbers={"num_tokens": 13},
    ),
    "cogvideox": NetworkCase(
        "cogvideo.model.CogVideoXTransformer3DModel",
        {"image_model": "cogvideox", "num_attention_heads": 5, "attention_head_dim": 16, "in_channels": 16}
        | {"out_channels": 16, "time_embed_dim": 32, "text_embed_dim": 24, "num_layers": 2, "sample_width": 14}
        | {
            "use_rotary_positional_embeddings": True,
            "max_text_seq_length": 13,
            "sample_height": 10,
            "sample_frames": 9,
        },
        {"x": (2, 16, 3, 10, 14), "context": (2, 13, 24)},
    ),
    "cogvideox_ofs": NetworkCase(
        "cogvideo.model.CogVideoXTransformer3DModel",
        {"image_model": "cogvideox", "num_attention_heads": 5, "attention_head_dim": 16, "in_channels": 16}
        | {"out_channels": 16, "time_embed_dim": 32, "text_embed_dim": 24, "num_layers": 2, "sample_width": 14}
        | {"use_rotary_positional_embeddings": True, "max_text_seq_length": 13, "sample_height": 10}
        | {"sample_frames": 9, "patch_size_t": 2, "ofs_embed_dim": 32},
        {"x": (2, 16, 4, 10, 14), "context": (2, 13, 24), "ofs": (2,)},
    ),
    "ernie_image": NetworkCase(
        "ernie.model.ErnieImageModel",
        {"image_model": "ernie", "hidden_size": 96, "num_attention_heads": 3, "num_layers": 2, "in_channels": 128}
        | {"ffn_hidden_size": 64, "out_channels": 128, "text_in_dim": 24, "rope_axes_dim": [8, 12, 12]},
        {"x": (2, 128, 5, 7), "context": (2, 13, 24)},
    ),
    "hidream_o1": NetworkCase(
        "hidream_o1.model.HiDreamO1Transformer",
        {
            "image_model": "hidream_o1",
            "text_config_overrides": {"vocab_size": 151656, "hidden_size": 48, "intermediate_size": 64, "head_dim": 8}
            | {"num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2, "rope_dims": [2, 1, 1]},
            "vision_config_overrides": {"hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "depth": 1}
            | {"num_position_embeddings": 16},
        },
        # Of all images the positions are the same.
        {"x": (2, 3, 96, 160), "position_ids": (1, 3, 28)},
        masks={"input_ids": (13, 4), "token_types": (28, 0)},
        numbers={"ar_len": 12},
        whole={"vinput_mask": [[0] * 13 + [1] * 15] * 2},
        exact=False,
    ),
    "hunyuan_dit": NetworkCase(
        "hydit.models.HunYuanDiT",
        {"image_model": "hydit", "depth": 6, "hidden_size": 40, "num_heads": 5, "mlp_ratio": 2.0, "text_len": 11}
        | {"text_states_dim": 24, "text_states_dim_t5": 32, "text_len_t5": 13},
        {
            "x": (2, 4, 10, 14),
            "context": (2, 11, 24),
            "encoder_hidden_states_t5": (2, 13, 32),
            "image_meta_size": (2, 6),
        },
        masks={"text_embedding_mask": (11, 0), "text_embedding_mask_t5": (13, 0)},
    ),
    "ideogram4": NetworkCase(
        "ideogram4.model.Ideogram4Transformer2DModel",
        {"image_model": "ideogram4", "in_channels": 128, "num_layers": 2, "num_attention_heads": 3, "adaln_dim": 16}
        | {"attention_head_dim": 32, "intermediate_size": 64, "llm_features_dim": 24, "mrope_section": [6, 5, 5]},
        {"x": (2, 128, 5, 7), "context": (2, 13, 24)},
    ),
    "joyimage": NetworkCase(
        "joyimage.model.JoyImageTransformer3DModel",
        {"image_model": "joyimage", "hidden_size": 48, "num_attention_heads": 3, "text_dim": 24, "num_layers": 2}
        | {"rope_dim_list": [4, 6, 6], "in_channels": 16, "theta": 10000},
        {"x": (2, 16, 1, 10, 14), "context": (2, 13, 24)},
    ),
    "lens": NetworkCase(
        "lens.model.LensTransformer2DModel",
        {"image_model": "lens", "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 3}
        | {"enc_hidden_dim": 24, "axes_dims_rope": [4, 6, 6], "selected_layer_index": [0, 1]},
        {"x": (2, 128, 5, 7), "context": (2, 13, 48)},
    ),
    "mage_flow": NetworkCase(
        "mage_flow.model.MageFlowTransformer2DModel",
        {"image_model": "mage_flow", "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 3}
        | {"joint_attention_dim": 2560, "axes_dims_rope": [4, 6, 6]},
        {"x": (2, 128, 5, 7), "context": (2, 13, 2560)},
    ),
    "omnigen2": NetworkCase(
        "omnigen.omnigen2.OmniGen2Transformer2DModel",
        {"image_model": "omnigen2", "axes_dim_rope": [2, 2, 4], "axes_lens": [64, 64, 64], "hidden_size": 40}
        | {"in_channels": 16, "multiple_of": 16, "num_attention_heads": 5, "num_kv_heads": 1, "num_layers": 2}
        | {"ffn_dim_multiplier": None, "num_refiner_layers": 2, "text_feat_dim": 24, "timestep_scale": 1000.0},
        {"x": (2, 16, 10, 14), "context": (2, 13, 24)},
        numbers={"num_tokens": 13},
    ),
    "mochi": NetworkCase(
        "genmo.joint_model.asymm_models_joint.AsymmDiTJoint",
        {"depth": 2, "num_heads": 3, "hidden_size_x": 48, "hidden_size_y": 24, "mlp_ratio_x": 256.0}
        | {"learn_sigma": False, "in_channels": 12, "qk_norm": True, "qkv_bias": False, "use_t5": True}
        | {"t5_feat_dim": 32, "t5_token_length": 13, "timestep_scale": 1000.0},
        {"x": (2, 12, 3, 10, 14), "context": (2, 13, 32)},
        masks={"attention_mask": (13, 4)},
        numbers={"num_tokens": 9},
    ),
    "cosmos": NetworkCase(
        "cosmos.model.GeneralDIT",
        {"image_model": "cosmos", "max_img_h": 32, "max_img_w": 32, "max_frames": 8, "in_channels": 16}
        | {"out_channels": 16, "patch_spatial": 2, "patch_temporal": 1, "model_channels": 48, "num_blocks": 3}
        | {"num_heads": 3, "crossattn_emb_channels": 24, "pos_emb_cls": "rope3d", "block_x_format": "THWBD"}
        | {"affline_emb_norm": True, "use_adaln_lora": True, "adaln_lora_dim": 8}
        | {"extra_per_block_abs_pos_emb": True, "extra_per_block_abs_pos_emb_type": "learnable"}
        | {f"{name}_{side}_extrapolation_ratio": 2.0 for name in ("rope", "extra") for side in "hwt"},
        {"x": (2, 16, 3, 10, 14), "context": (2, 13, 24)},
        numbers={"fps": 24.0},
        exact=False,
    ),
    "humo": NetworkCase(
        "wan.model.HumoWanModel",
        {"dim": 48, "ffn_dim": 64, "text_dim": 24, "num_heads": 3, "num_layers": 2, "freq_dim": 32} | {"text_len": 13},
        {
            "x": (2, 16, 3, 10, 14),
            "context": (2, 13, 24),
            "audio_embed": (2, 3, 8, 5, 1280),
            "reference_latent": (2, 16, 1, 10, 14),
        },
    ),
    "seedvr2": NetworkCase("seedvr.model.NaDiT", SEEDVR2, SEEDVR2_CALL, conditions=True, beside=SEEDVR2_NAMES),
    "seedvr2_rope3d": NetworkCase(
        "seedvr.model.NaDiT",
        {**SEEDVR2, "rope_type": "rope3d", "mlp_type": "normal", "vid_out_norm": None, "mm_layers": 4},
        SEEDVR2_CALL,
        conditions=True,
        beside=SEEDVR2_NAMES,
    ),
    "wan_s2v": NetworkCase(
        "wan.model.WanModel_S2V",
        {"dim": 48, "ffn_dim": 64, "text_dim": 24, "num_heads": 3, "num_layers": 3, "freq_dim": 32}
        | {"text_len": 13, "audio_dim": 40, "audio_inject_layers": [0, 2], "framepack_drop_mode": "padd"},
        {
            "x": (2, 16, 3, 10, 14),
            "context": (2, 13, 24),
            "audio_embed": (2, 25, 40, 12),
            "reference_latent": (2, 16, 1, 10, 14),
            "control_video": (2, 16, 3, 10, 14),
        },
    ),
    "wandancer": NetworkCase(
        "wan.model_wandancer.WanDancerModel",
        {"dim": 48, "ffn_dim": 64, "text_dim": 24, "num_heads": 3, "num_layers": 3, "freq_dim": 32, "in_dim": 36}
        | {"text_len": 13, "audio_inject_layers": [0, 2], "music_dim": 32, "music_heads": 2, "music_latent_dim": 32},
        {
            "x": (2, 36, 3, 12, 16),
            "context": (2, 13, 24),
            "clip_fea": (2, 7, 1280),
            "clip_fea_ref": (2, 7, 1280),
            "audio_embed": (2, 11, 35),
        },
        numbers={"fps": 24.0, "audio_inject_scale": 0.7},
        exact=False,
    ),
    "hunyuan3d2": NetworkCase(
        "hunyuan3d.model.Hunyuan3Dv2",
        {"in_channels": 8, "context_in_dim": 24, "hidden_size": 40, "num_heads": 5, "depth": 2}
        | {"depth_single_blocks": 2, "guidance_embed": True},
        {"x": (2, 8, 35), "context": (2, 13, 24), "guidance": (1,)},
    ),
    "hunyuan3d2_1": NetworkCase(
        "hunyuan3dv2_1.hunyuandit.HunYuanDiTPlain",
        {"in_channels": 8, "hidden_size": 48, "context_dim": 24, "depth": 4, "num_heads": 3, "num_moe_layers": 2}
        | {"guidance_cond_proj_dim": None, "num_experts": 4, "image_model": "hunyuan3d2_1"},
        {"x": (2, 8, 35), "context": (2, 13, 24), "guidance": (1,)},
        exact=False,
    ),
    "triposplat": NetworkCase(
        "triposplat.model.LatentSeqMMFlowModel",
        {"image_model": "triposplat", "q_token_length": 29, "in_channels": 8, "model_channels": 48}
        | {"cond_channels": 24, "out_channels": 8, "num_blocks": 2, "num_refiner_blocks": 1, "num_head_channels": 16}
        | {"cond2_channels": 16},
        {"x": [(2, 29, 8), (2, 1, 5)], "context": (2, 13, 24), "ref_latents": [(2, 16, 3, 3)]},
    ),
    "pixeldit": NetworkCase(
        "pixeldit.model.PixDiT_T2I",
        {"num_groups": 3, "hidden_size": 48, "pixel_hidden_size": 8, "pixel_attn_hidden_size": 32}
        | {"image_model": "pixeldit_t2i", "pixel_num_groups": 2, "patch_depth": 2, "pixel_depth": 2, "patch_size": 4}
        | {"txt_embed_dim": 24, "txt_max_length": 16},
        {"x": (2, 3, 20, 28), "context": (2, 13, 24)},
        exact=False,
        prefix="core.",
    ),
    "pid": NetworkCase(
        "pixeldit.pid.PidNet",
        {"num_groups": 3, "hidden_size": 48, "pixel_hidden_size": 8, "pixel_attn_hidden_size": 32}
        | {"image_model": "pid", "pixel_num_groups": 2, "patch_depth": 3, "pixel_depth": 1, "patch_size": 16}
        | {"txt_embed_dim": 24, "txt_max_length": 16, "lq_latent_channels": 4, "lq_hidden_dim": 16}
        | {"lq_num_res_blocks": 1, "lq_interval": 2, "sr_scale": 4, "latent_spatial_down_factor": 8},
        {"x": (2, 3, 80, 112), "context": (2, 13, 24), "lq_latent": (2, 4, 5, 7), "degrade_sigma": (1,)},
        exact=False,
    ),
    "zimage_pixel": NetworkCase(
        "lumina.model.NextDiTPixelSpace",
        {"image_model": "zimage_pixel", "patch_size": 4, "in_channels": 3, "dim": 48, "n_layers": 2, "n_heads": 3}
        | {"n_refiner_layers": 1, "n_kv_heads": 3, "multiple_of": 16, "qk_norm": True, "cap_feat_dim": 24}
        | {"axes_dims": [4, 6, 6], "pad_tokens_multiple": 4, "use_x0": True}
        | {"decoder_hidden_size": 32, "decoder_num_res_blocks": 2, "decoder_in_channels": 48},
        {"x": (2, 3, 20, 28), "context": (2, 13, 24)},
        numbers={"num_tokens": 13},
    ),
    "ace_step": NetworkCase(
        "ace.model.ACEStepTransformer2DModel",
        {"audio_model": "ace", "inner_dim": 40, "attention_head_dim": 8, "num_attention_heads": 5, "num_layers": 3}
        | {"mlp_ratio": 2.5, "speaker_embedding_dim": 12, "text_embedding_dim": 24, "lyric_encoder_vocab_size": 9}
        | {"ssl_latent_dims": [8, 8], "max_position": 64},
        {"x": (2, 8, 16, 41), "context": (2, 13, 24), "speaker_embeds": (2, 12)},
        masks={"lyric_token_idx": (7, 3)},
        numbers={"lyrics_strength": 0.8},
        exact=False,
    ),
    "ace_step15": NetworkCase(
        "ace.ace_step15.AceStepConditionGenerationModel",
        {"audio_model": "ace1.5", "in_channels": 24, "hidden_size": 48, "text_hidden_dim": 24}
        | {"timbre_hidden_dim": 8, "audio_acoustic_hidden_dim": 8, "num_dit_layers": 2, "num_lyric_layers": 1}
        | {"num_timbre_layers": 1, "num_tokenizer_layers": 1, "num_heads": 6, "num_kv_heads": 2, "head_dim": 8}
        | {"intermediate_size": 64, "sliding_window": 3, "fsq_dim": 40, "encoder_hidden_size": 40}
        | {"encoder_intermediate_size": 64, "encoder_num_heads": 4},
        {"x": (2, 8, 41), "context": (2, 13, 24), "lyric_embed": (2, 7, 24), "refer_audio": (2, 8, 41)},
        numbers={"is_covers": True},
        exact=False,
    ),
    "stable_audio": NetworkCase(
        "audio.dit.AudioDiffusionTransformer",
        {"audio_model": "dit1.0", "io_channels": 8, "embed_dim": 96, "cond_token_dim": 32, "global_cond_dim": 24}
        | {"project_cond_tokens": True, "depth": 2, "num_heads": 3, "global_cond_type": "adaLN"}
        | {"num_memory_tokens": 5, "local_add_cond_dim": 9, "norm_type": "rms_norm", "global_cond_shared_embed": True}
        | {"timestep_features_type": "expo", "attn_kwargs": {"qk_norm": "rms", "differential": True}},
        {"x": (2, 8, 35), "context": (2, 13, 32), "global_embed": (2, 24), "local_add_cond": (2, 9, 35)},
        beside={
            "conditioner.conditioners.seconds_total.embedder.embedding.1.weight": (768, 256),
            "conditioner.conditioners.seconds_total.embedder.embedding.1.bias": (768,),
        },
    ),
}
CASES["hidream_o1_edit"] = replace(
    CASES["hidream_o1"],
    inputs={
        "x": (2, 3, 96, 160),
        "position_ids": (1, 3, 38),
        "ref_pixel_values": (1, 24, 1536),
        "ref_patches": (2, 6, 3072),
    },
    masks={"token_types": (38, 0)},
    numbers={"ar_len": 16},
    whole={
        "input_ids": [[1, 1, 0, *[151655] * 6, 1, 0, 1, 1, 0, 1, 0, 1]] * 2,
        "ref_image_grid_thw": [[[1, 4, 6]]],
        "vinput_mask": [[0] * 17 + [1] * 21] * 2,
    },
)
MORE: tuple[tuple[str, str, dict[str, Shape], dict[str, tuple[int, int]]], ...] = (
    ("boogu", "edit", {"ref_latents": [(2, 16, 9, 8), (2, 16, 6, 11)]}, {}),
    ("ideogram4", "mask", {}, {"attention_mask": (13, 4)}),
    ("ideogram4", "image", {"context": ()}, {}),
    ("joyimage", "edit", {"ref_latents": [(2, 16, 1, 9, 8), (2, 16, 1, 6, 11)]}, {}),
    ("lens", "mask", {}, {"attention_mask": (13, 4)}),
    ("mage_flow", "edit", {"ref_latents": [(2, 128, 4, 3), (2, 128, 3, 5)]}, {"attention_mask": (13, 4)}),
    ("omnigen2", "edit", {"ref_latents": [(2, 16, 9, 8), (2, 16, 6, 11)]}, {}),
)
"""What editing models are called with, references and masks: other shapes, none for what is left out, and masks."""
for name, more, inputs, masks in MORE:
    shapes = {key: shape for key, shape in {**CASES[name].inputs, **inputs}.items() if shape}
    CASES[f"{name}_{more}"] = replace(CASES[name], inputs=shapes, masks={**CASES[name].masks, **masks})

CONTROLLED: tuple[tuple[str, str, dict[str, list[tuple[int, ...] | None]]], ...] = (
    ("hunyuan_dit", "control", {"output": [(2, 35, 40), (2, 35, 40)]}),
    ("lens", "control", {"input": [(2, 35, 48), None]}),
    ("lens_mask", "control", {"input": [(2, 17, 48), (2, 35, 48)]}),
    ("mage_flow_edit", "control", {"input": [(2, 35, 48), (2, 9, 48)]}),
)
"""Networks with the residuals of a ControlNet, some of which are for the first tokens alone."""
for name, more, control in CONTROLLED:
    CASES[f"{name}_{more}"] = replace(CASES[name], control=control)

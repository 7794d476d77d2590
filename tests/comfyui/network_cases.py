"""Tiny networks of ComfyUI's for which this version has tables: a configuration, and the arguments of a call."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["CASES", "NetworkCase"]


@dataclass(frozen=True)
class NetworkCase:
    """One network."""

    network: str
    """The class: its module under ``comfy.ldm``, and its name."""
    config: dict[str, Any]
    inputs: dict[str, tuple[int, ...]]
    """Shapes of noise for two images."""
    masks: dict[str, int] = field(default_factory=dict)
    """Lengths of masks that hide nothing."""
    numbers: dict[str, int] = field(default_factory=dict)


CASES = {
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
    "ernie_image": NetworkCase(
        "ernie.model.ErnieImageModel",
        {"image_model": "ernie", "hidden_size": 96, "num_attention_heads": 3, "num_layers": 2, "in_channels": 128}
        | {"ffn_hidden_size": 64, "out_channels": 128, "text_in_dim": 24, "rope_axes_dim": [8, 12, 12]},
        {"x": (2, 128, 5, 7), "context": (2, 13, 24)},
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
        masks={"text_embedding_mask": 11, "text_embedding_mask_t5": 13},
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
}

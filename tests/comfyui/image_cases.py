"""Tiny models of the image families that came after Flux.1, SD3 and PixArt, as graphs of a ComfyUI use them.

Models are the goldens', but for a few: in ComfyUI Z-Image embeds times in 256 channels, HiDream's experts have widths
that follow from the model's, and LongCat-Image is known by the width of its text.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from comfyui_graphs import WEAKER
from comfyui_server import PATH, has
from helpers import Golden, Tiny, read_golden
from safetensors.torch import save_file

__all__ = ["CASES", "Case", "Sizes", "named", "write"]

WORDS = "llm_adapter.embed.weight"


@dataclass(frozen=True)
class Case:
    """A golden's model in a graph."""

    golden: str
    module: str
    """Of ComfyUI's network, under ``comfy/ldm``; empty if the tests' pack makes up for it where it lacks."""
    channels: int = 16
    size: tuple[int, int] = (13, 10)
    """Height and width of the latent."""
    lora: tuple[str, ...] = ()
    """Layers with a LoRA."""
    method: str = ""
    """How a reference is placed, in the words of ComfyUI's node, or ``default``; empty if the model takes none."""
    frames: int = 0
    """Of a reference's latent; 0 for one that has no such axis."""
    text: dict[str, int] = field(default_factory=dict)
    """What else the test's conditioning takes, or takes in another size than the golden."""
    config: dict[str, Any] = field(default_factory=dict)
    """Of a model that is not the golden's."""

    @property
    def has_frames(self) -> bool:
        """Whether its latent has an axis of frames."""
        latent = read_golden(self.golden).inputs["x"]
        return bool((latent[0] if isinstance(latent, list) else latent).ndim == 5)

    @property
    def file(self) -> str:
        """The model's, and its LoRA's."""
        return f"{self.golden}.safetensors"

    def model(self) -> Golden:
        """Weights and configuration."""
        golden = read_golden(self.golden)
        if WORDS in golden.weights:
            # ComfyUI's class has a fixed number of words.
            words = torch.randn(32128, golden.weights[WORDS].shape[1], generator=torch.Generator().manual_seed(0))
            golden.weights[WORDS] = words.bfloat16()
        if not self.config:
            return golden
        config = {**golden.config, **self.config}
        weights = dict(Tiny(self.golden, config).model.state_dict())
        if self.golden == "longcat_edit":
            # ComfyUI renames Flux.1's norms, and not LongCat-Image's, whose files have its own names.
            weights = {key.replace("_norm.scale", "_norm.weight"): value for key, value in weights.items()}
        return replace(golden, config=config, weights=weights)


CASES = [
    Case(
        "z_image",
        "lumina",
        lora=("layers.0.attention.qkv", "context_refiner.0.feed_forward.w2"),
        config={"dim": 256, "n_heads": 4, "n_kv_heads": 4, "axes_dims": [16, 24, 24]},
    ),
    Case("lumina2", "lumina", lora=("layers.1.attention.out", "noise_refiner.0.feed_forward.w1")),
    Case(
        "qwen_image",
        "qwen_image",
        lora=("transformer_blocks.0.attn.to_q", "transformer_blocks.1.img_mlp.net.2"),
        method="index",
        frames=1,
    ),
    Case("qwen_edit", "qwen_image", lora=("transformer_blocks.0.txt_mlp.net.0.proj",), method="default", frames=1),
    Case("qwen_edit_2511", "qwen_image", lora=("transformer_blocks.0.attn.add_k_proj",), method="index", frames=1),
    Case(
        "qwen_layered",
        "qwen_image",
        lora=("transformer_blocks.1.img_mlp.net.0.proj",),
        method="default",
        frames=1,
        config={"in_channels": 64, "out_channels": 16},
    ),
    Case("flux2_klein", "flux", 128, (5, 8), ("double_blocks.0.img_attn.qkv",), "index"),
    Case("flux2_dev", "flux", 128, (5, 8), ("single_blocks.0.linear1",), "index_timestep_zero"),
    Case("chroma", "chroma", lora=("double_blocks.0.img_attn.qkv", "single_blocks.0.linear2")),
    Case(
        "longcat_edit",
        "flux",
        lora=("double_blocks.1.img_mlp.0", "single_blocks.2.linear1"),
        method="index",
        text={"width": 3584},
        config={"in_channels": 16, "out_channels": 16, "context_in_dim": 3584},
    ),
    Case("chroma_radiance", "chroma_radiance", 3, (51, 80), ("double_blocks.0.txt_attn.proj",)),
    Case("krea2", "krea2", lora=("blocks.0.attn.wq", "blocks.1.mlp.down"), method="index_timestep_zero", frames=1),
    Case("cosmos_predict2_t2i", "cosmos", lora=("blocks.0.self_attn.q_proj",)),
    Case(
        "qwen_image_21",
        "",
        64,
        (9, 6),
        ("transformer_blocks.0.attn.to_q", "transformer_blocks.1.img_mlp.gate_layer"),
    ),
    Case("qwen_image_21_edit", "", 64, (8, 7), ("transformer_blocks.1.img_mlp.gate_up",)),
    Case(
        "anima",
        "anima",
        lora=("blocks.0.self_attn.q_proj", "llm_adapter.blocks.1.cross_attn.k_proj"),
        text={"width": 20, "t5_ids": 14},
    ),
    Case(
        "hidream",
        "hidream",
        lora=(
            "double_stream_blocks.0.block.attn1.to_q_t",
            "double_stream_blocks.1.block.ff_i.shared_experts.w2",
            "single_stream_blocks.1.block.ff_i.experts.2.w2",
        ),
        text={"llama_layers": 3, "llama_width": 28},
        config={"attention_head_dim": 16, "num_attention_heads": 3, "axes_dims_rope": [8, 4, 4]},
    ),
]


_AV = "comfy/ldm/lightricks/av_model.py"
NEWER = {
    "chroma_radiance": ("comfy/ldm/chroma_radiance/model.py", "use_sequential_txt_ids"),
    "cosmos_predict2_t2i": ("comfy/ldm/cosmos/predict2.py", "pad_to_patch_size"),
    "hunyuan_video_i2v_replace": ("comfy/ldm/flux/layers.py", "d[2]:d[2] + 1"),
    "longcat_edit": ("comfy/supported_models.py", "class LongCatImage"),
    "ltx23_av": (_AV, "preprocess_text_embeds"),
    "ltx25_av": (_AV, "preprocess_text_embeds"),
    "qwen_layered": ("comfy/ldm/qwen_image/model.py", "use_additional_t_cond"),
}
"""What a case needs of ComfyUI's networks that they haven't always had: an option of its config, odd sizes, a batch."""


def named(*goldens: str) -> list[Case]:
    """The cases of these goldens."""
    return [case for case in CASES if case.golden in goldens]


def write(case: Case, models: Path, file: str = "", golden: Golden | None = None) -> None:
    """A model's file where ComfyUI looks for it, with a LoRA; unless it is there.

    Args:
        case: The model.
        models: The folder of ComfyUI's models.
        file: What both files are called, if not as the case says.
        golden: Weights and configuration, if not the case's.
    """
    if not Path(PATH, "comfy/ldm", case.module).is_dir():
        pytest.skip(f"this version of ComfyUI has no {case.module}")
    for name, (source, word) in NEWER.items():
        if case.golden == name and not has(source, word):
            pytest.skip(f"this version of ComfyUI lacks {word} in {source}")
    file = file or case.file
    path = models / "diffusion_models" / file
    if path.exists():
        return
    golden = golden or case.model()
    _save(golden, path)
    (models / "loras").mkdir(exist_ok=True)
    random = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in case.lora:
        outputs, inputs = golden.weights[f"{layer}.weight"].shape
        tensors[f"diffusion_model.{layer}.lora_B.weight"] = 0.1 * torch.randn(outputs, 4, generator=random)
        tensors[f"diffusion_model.{layer}.lora_A.weight"] = 0.1 * torch.randn(4, inputs, generator=random)
    save_file(tensors, models / "loras" / file)


def _save(golden: Golden, path: Path) -> None:
    """The last layer's weights are smaller: a run of several steps then doesn't amplify the last bit of fp32."""
    last = (
        *("final_layer.video_out", "final_layer.audio_out", "final_layer.linear", "proj_out", "audio_proj_out"),
        *("last.linear", "head.head", "out_layer.out_layer"),
    )
    for name in (f"{layer}.weight" for layer in last):
        if name in golden.weights:
            golden.weights[name] = WEAKER * golden.weights[name]
    golden.save(path)


class Sizes:
    """What a graph asks of a `TinyModel`."""

    def __init__(self, case: Case) -> None:
        given = read_golden(case.golden).inputs
        self.tiny, self.width = case, case.text.get("width", given["context"].shape[-1])
        self.pooled = given["y"].shape[-1] if "y" in given else 0
        self.channels, self.size = case.channels, case.size

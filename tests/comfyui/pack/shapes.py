"""tacod's small model of coloured shapes as a checkpoint that ComfyUI's own loader opens, text encoder and VAE too."""

from __future__ import annotations

from typing import Any

import nodes
import torch

from tacod import embedded

NAME = "shapes.safetensors"


class Clip:
    """What CLIPTextEncode uses of a text encoder."""

    def tokenize(self, text: str) -> str:
        return text

    def encode_from_tokens_scheduled(self, text: str) -> Any:
        context, pooled = embedded.encode(text)
        return [[context, {"pooled_output": pooled}]]


class VAE:
    """What VAEDecode uses of a VAE."""

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        return embedded.decode(latent).float() / 255


_load = nodes.CheckpointLoaderSimple.load_checkpoint


def load_checkpoint(self: Any, ckpt_name: str) -> Any:
    """ComfyUI's, with the file's own text encoder and VAE."""
    if ckpt_name != NAME:
        return _load(self, ckpt_name)
    import comfy.sd
    import folder_paths

    return comfy.sd.load_diffusion_model(folder_paths.get_full_path_or_raise("checkpoints", NAME)), Clip(), VAE()


nodes.CheckpointLoaderSimple.load_checkpoint = load_checkpoint

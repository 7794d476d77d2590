"""The numbers of MiniMax-H3's tokens, of videos and sounds, before they are embedded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tacod.rank.families import kit
from tacod.rank.families.minimax_h3_layout import MOST_SEED, Run
from tacod.rank.families.minimax_h3_parts import PATCH
from tacod.rank.families.minimax_h3_times import PICTURE_TIME, SOUND_TIME

__all__ = ["given_rows", "padded", "sound_rows"]


def given_rows(run: Run, latent: Tensor, payload: Mapping[str, Any]) -> Tensor:
    """The numbers of given tokens with a little noise, [1, N, inputs] in fp32.

    Each has the same noise, of the run's seed, drawn on the CPU as ComfyUI does it.
    """
    rows = sound_rows(latent) if run.sound else kit.Grid(latent, PATCH).patches(latent)
    name, usual = ("audio_cond_noise_aug", SOUND_TIME) if run.sound else ("visual_cond_noise_aug", PICTURE_TIME)
    clean: float = payload.get(name, usual)
    if clean >= 1:
        return rows
    seed = (int(payload.get("seed", 0)) + run.sound) & MOST_SEED
    noise = torch.randn(rows.shape[1:], generator=torch.Generator("cpu").manual_seed(seed), dtype=torch.float32)
    return clean * rows + (1.0 - clean) * noise.to(rows.device)


def sound_rows(sound: Tensor) -> Tensor:
    """A sound [B, C, 2, A] as tokens [B, 2 * A, C], one channel after the other."""
    return sound.permute(0, 2, 3, 1).flatten(1, 2)


def padded(parts: Sequence[Tensor], width: int, device: torch.device) -> Tensor:
    """Tokens of several runs [B, N, inputs] one after the other, with zeros behind the shorter ones: [B, N, width]."""
    if not parts:
        return torch.empty(1, 0, width, device=device)
    return torch.cat([functional.pad(each, (0, width - each.shape[-1])) for each in parts], dim=1)

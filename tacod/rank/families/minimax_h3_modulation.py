"""Who computes which modulations of MiniMax-H3's tokens.

A block has modulations for each time that tokens have and for each modality, and a layer of half a gigabyte makes them.
Of few times the ranks share the layers out, as in other families. A mask may give each token a time of its own: then
every rank computes what its own tokens need, in each block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tacod.rank.families.minimax_h3_layout import MODALITIES, TIMES
from tacod.rank.families.stream import ForwardPass
from tacod.rank.ops.linear import split_outputs

__all__ = ["OwnTimes", "block_rows", "final_rows", "modulate"]

SHARED = 16
"""Of more times, each rank computes the modulations of its own tokens."""


@dataclass(frozen=True)
class OwnTimes:
    """What the modulations of this rank's tokens are made of: [B, M, W] for the `TIMES`, and of each mask."""

    common: Tensor
    video: Tensor
    sound: Tensor

    @property
    def of_modalities(self) -> list[Tensor]:
        """For pictures, text and sound those that their tokens may have."""
        return [torch.cat((self.common, self.video), 1), self.common[:, :1], torch.cat((self.common, self.sound), 1)]


def modulate(
    f: ForwardPass,
    layers: Sequence[Any],
    times: Tensor,
    masked: Sequence[int],
    embed: Callable[[Tensor], Tensor],
    segments: Tensor,
    made: Sequence[int],
) -> None:
    """Compute modulations, or what blocks need for them, and give each token its row.

    Args:
        f: The forward; ``f.joint`` and ``f.image`` get their segments.
        layers: All layers of modulations.
        times: All times, [B, M]: the `TIMES`, then those of the video's mask and of the sound's.
        masked: How many times each of these masks has.
        embed: What modulations are made of, for times.
        segments: For each of this rank's tokens its time's place times `MODALITIES`, and its modality, int64.
        made: How many tokens of sound and of video this rank has; they are the last.
    """
    f.own_times = None
    if times.shape[1] <= SHARED:
        f.modulate(layers, embed(times))
        f.joint.segments = segments
        # The last layer's modulations are the same for all modalities.
        f.image.segments = segments[len(segments) - sum(made) :] // MODALITIES
        return
    place, modality = segments // MODALITIES, segments % MODALITIES
    sound, video = torch.split(place[len(place) - sum(made) :], list(made))
    known = torch.split(times, [TIMES, *masked], dim=1)
    (of_video, video), (of_sound, sound) = (
        _own(each, mine, first)
        for each, mine, first in zip(known[1:], (video, sound), (TIMES, TIMES + masked[0]), strict=True)
    )
    f.own_times = OwnTimes(embed(known[0]), embed(of_video), embed(of_sound))
    pictures, others = TIMES + of_video.shape[1], place[: len(place) - sum(made)]
    rows = torch.cat((others, sound, video))
    # Rows of pictures, one row of text, and rows of sound.
    f.joint.segments = rows + torch.where(modality == 0, 0, pictures + modality // 2)
    f.image.segments = torch.cat((torch.where(sound < TIMES, sound, sound + of_video.shape[1]), video))


def block_rows(f: ForwardPass, layer: Any) -> Tensor:
    """The rows of a block's modulations, of this rank's tokens or of all: [B, M, 6 * hidden]."""
    if f.own_times is None:
        return torch.unflatten(f.modulation(layer, 1)[0], -1, (MODALITIES, -1)).flatten(1, 2)
    with f.beside(layer) as linear:
        size = linear.out_features // MODALITIES
        parts = zip(split_outputs(linear, size, size), f.own_times.of_modalities, strict=True)
        return torch.cat([part(times) for part, times in parts], dim=1)


def final_rows(f: ForwardPass, layer: Any) -> Tensor:
    """The rows of the last layer's modulations: [B, M, 2 * hidden]."""
    if f.own_times is None:
        return f.modulation(layer, 1)[0]
    own: OwnTimes = f.own_times
    with f.beside(layer) as linear:
        rows: Tensor = linear(torch.cat((own.common, own.video, own.sound), dim=1))
    return rows


def _own(times: Tensor, mine: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """The times of a mask that this rank's tokens have, and their places among the common times and these.

    ``times`` [B, M] are the mask's, whose places begin at ``first``, and ``mine`` are those of the tokens. Where there
    are more times than tokens here, each token gets its own.
    """
    if not times.shape[1]:
        return times, mine
    if len(mine) < times.shape[1]:
        return times[:, mine - first], TIMES + torch.arange(len(mine), device=mine.device)
    return times, mine - first + TIMES

"""The guides of LTX's videos: which tokens there are, when each is, and how much tokens and guides see of each other.

A guide is a picture or a video whose latent frames stand behind those of the video. Its tokens have positions of their
own; where a guide is coarser than the video, tokens between those that it has are removed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tacod.rank.families import kit
from tacod.rank.families.inputs import Argument, Inputs, Number, Record, Spec
from tacod.rank.ops.group_bias import GroupBias
from tacod_client.errors import ArgumentError

__all__ = [
    "GUIDE_ARGUMENTS",
    "check_guides",
    "check_times",
    "distinct",
    "guide_bias",
    "spans_of",
    "tokens_of",
    "varies_in_a_frame",
]

_FARTHEST = 1 << 16
"""Positions of guides, in pixels and frames, are below this."""
_SIDES = 3
_PER_TOKEN = 3
"""Dimensions of a tensor with a timestep for each token; prepared ones have fewer."""
_ENTRIES = Record(
    {
        "pre_filter_count": Number(0, 1 << 24, required=True),
        "strength": Number(-1e3, 1e3, required=True),
        "pixel_mask": Argument(("M", 1, "F", "PH", "PW"), required=False, fp32=True),
        "latent_shape": Number(1, 1 << 16, many=True),
    },
    many=True,
)
GUIDE_ARGUMENTS: Mapping[str, Spec] = {
    "keyframe_idxs": Argument(("B", 3, "G*H*W", 2), required=False, rows=_FARTHEST, shared=True),
    "guide_attention_entries": _ENTRIES,
}
"""Where the guides' tokens begin and end in time, rows and columns, and for each guide how many tokens it had, how
strong it is, and where."""


def check_guides(arguments: Mapping[str, Any]) -> None:
    """Raise `ArgumentError` for guides that don't fit the video; looks at shapes and numbers only."""
    guides = arguments.get("keyframe_idxs")
    if guides is None or "tokens" in arguments:
        return
    x = arguments["x"]
    frames, rows, columns = (x[0] if isinstance(x, list) else x).shape[2:]
    if "timestep" not in arguments:
        raise ArgumentError(
            "keyframe_idxs: each token of a video with guides has a timestep of its own, which sample doesn't give; "
            "call forward for each step",
            argument="keyframe_idxs",
        )
    count = guides.shape[2]
    if count % (rows * columns) or count > frames * rows * columns:
        raise ArgumentError(
            f"keyframe_idxs: it is for {count} tokens, but x has {frames} frames of {rows * columns} tokens each; crop "
            "the guides before the latents change their size",
            argument="keyframe_idxs",
        )
    entries = arguments.get("guide_attention_entries") or ()
    for at, entry in enumerate(entries):
        shape = entry.get("latent_shape") or [1] * _SIDES
        if len(shape) != _SIDES or any(each % 1 for each in (entry["pre_filter_count"], *shape)):
            raise ArgumentError(
                f"guide_attention_entries[{at}]: expected whole numbers as pre_filter_count, and three as latent_shape",
                argument="guide_attention_entries",
            )
    total = sum(int(entry["pre_filter_count"]) for entry in entries)
    if entries and total != count:
        raise ArgumentError(
            f"guide_attention_entries: they are for {total} tokens (pre_filter_count), and keyframe_idxs for {count}",
            argument="guide_attention_entries",
        )


def check_times(times: Any, tokens: int, name: str = "timestep") -> None:
    """Raise `ArgumentError` if timesteps [B, N, 1] are for another number of tokens."""
    if times is not None and len(times.shape) == _PER_TOKEN and times.shape[1] != tokens:
        raise ArgumentError(
            f"{name}: its N is {times.shape[1]}, but there are {tokens} tokens; they must agree", argument=name
        )


def tokens_of(inputs: Inputs, video: Tensor) -> tuple[Tensor | None, dict[str, Any]]:
    """Which tokens of a video [B, C, T, H, W] there are, int64 [K] or None for all; and what to replace in the inputs.

    That is how many tokens there are, the guides' positions of those, and their biases. Raises `ArgumentError`.
    """
    guides = inputs.get("keyframe_idxs")
    tokens = math.prod(video.shape[2:])
    changes: dict[str, Any] = {"denoise_mask": None, "guide_attention_entries": None, "tokens": tokens}
    if guides is None:
        return None, changes
    there, mask = None, inputs.get("denoise_mask")
    if mask is not None:
        # As in ComfyUI the first image's mask is for all.
        there = ~(mask[0] < 0).any(dim=0).flatten()
        if there.all():
            there = None
        elif not there.any():
            raise ArgumentError(
                "denoise_mask: it removes every token; give one with a value of 0 or more", argument="denoise_mask"
            )
    among = None if there is None else there[-guides.shape[2] :]
    changes |= _biases(inputs.get("guide_attention_entries") or (), among, guides.device)
    if len(guides) > 1 and bool((guides == guides[:1]).all()):
        guides = guides[:1]
    if there is None:
        return None, changes | {"keyframe_idxs": guides}
    kept = there.nonzero().flatten()
    return kept, changes | {"keyframe_idxs": guides[:, :, among], "kept": kept, "tokens": len(kept)}


def _biases(entries: Sequence[Mapping[str, Any]], there: Tensor | None, device: torch.device) -> dict[str, Any]:
    """What `guide_bias` makes a bias of, as arguments of a forward; none if no guide is weaker or stronger than 1."""
    weights: list[Tensor] = []
    runs: list[list[Any]] = []
    begin = 0
    for entry in entries:
        count, strength = int(entry["pre_filter_count"]), float(entry["strength"])
        left = count if there is None else int(there[begin : begin + count].sum())
        begin += count
        mask, shape = entry.get("pixel_mask"), entry.get("latent_shape")
        if mask is not None and shape is not None:
            # A mask for fewer tokens than a guide has leaves the last guides without one, as in ComfyUI.
            each = _by_token(mask[:1], [int(side) for side in shape])[:left] * strength
            value: float | None = None
        else:
            each = torch.full((left,), strength, device=device)
            value = math.log(strength) if strength > 0 else -math.inf
        if len(each):
            weights.append(each)
            runs.append([len(each), value])
    joint = torch.cat(weights) if weights else torch.ones(0, device=device)
    if bool((joint == 1).all()):
        return {}
    total = begin if there is None else int(there.sum())
    joint = functional.pad(joint, (0, total - len(joint)), value=1.0)
    runs.append([total - sum(length for length, _ in runs), 0.0])
    bias = torch.where(joint > 0, joint.clamp(min=torch.finfo(torch.float32).tiny).log(), -torch.inf)
    return {"guide_bias": bias, "guide_runs": runs}


def _by_token(mask: Tensor, shape: Sequence[int]) -> Tensor:
    """A mask of pixels [1, 1, F, H, W] as one number for each token of a latent of these frames, rows and columns."""
    frames, rows, columns = shape
    # Not by a transpose: with that, PyTorch's pooling on a GPU takes one frame's stride for another's (2.11).
    small = functional.interpolate(mask[0, 0].unsqueeze(1), size=(rows, columns), mode="area")[:, 0].flatten(1)
    first, rest = small[:1], small[1:]
    if frames == 1:
        return first.flatten()
    if not len(rest):
        return first.expand(frames, -1).flatten()
    # The first latent frame is one of pixels, and the others are as many each.
    each = len(rest) // (frames - 1)
    if each:
        rest = torch.unflatten(rest[: each * (frames - 1)], 0, (frames - 1, each)).mean(dim=1)
    else:
        rest = functional.interpolate(rest.t().unsqueeze(1), size=frames - 1, mode="nearest")[:, 0].t()
    return torch.cat((first, rest)).flatten()


def guide_bias(arguments: Mapping[str, Any], tokens: int) -> GroupBias | None:
    """The bias between a video's tokens and its guides, of prepared arguments."""
    values = arguments.get("guide_bias")
    if values is None:
        return None
    runs = [(length, value) for length, value in arguments["guide_runs"]]
    return GroupBias(tokens - len(values), values, runs)


def spans_of(
    grid: kit.Grid, factors: Sequence[int], causal: bool, arguments: Mapping[str, Any], device: torch.device
) -> Tensor:
    """Where tokens begin and end in frames, rows and columns of pixels: int64 [K, B or 1, 3, 2], of prepared arguments.

    ``factors`` are pixels of a latent cell. With ``causal`` the first latent frame is one frame of pixels.
    """
    ends = []
    for end in (0, 1):
        lines = [(torch.arange(n, device=device) + end) * size for n, size in zip(grid.counts, factors, strict=True)]
        ends.append(torch.stack(torch.meshgrid(*lines, indexing="ij"), dim=-1).flatten(0, -2))
    spans = torch.stack(ends, dim=-1)
    if causal:
        spans[:, 0] = (spans[:, 0] + 1 - factors[0]).clamp(min=0)
    kept, guides = arguments.get("kept"), arguments.get("keyframe_idxs")
    spans = spans[:, None] if kept is None else spans[kept, None]
    if guides is None or not guides.shape[2]:
        return spans
    own = spans[: len(spans) - guides.shape[2]]
    return torch.cat((own.expand(-1, len(guides), -1, -1), guides.permute(2, 0, 1, 3)))


def varies_in_a_frame(mask: Tensor | None) -> bool:
    """Whether a mask [B, C, T, H, W] differs within a frame; the first image's first channel is for all."""
    if mask is None:
        return False
    frames = mask[0, 0].flatten(1)
    return bool((frames.amin(dim=1) != frames.amax(dim=1)).any())


def distinct(timestep: Tensor) -> tuple[Tensor, Tensor | None]:
    """The different timesteps [B, M] among those of tokens [B, N], and int64 [N] which one each has; None if M is 1."""
    if timestep.shape[1] == 1:
        return timestep, None
    values, rows = torch.unique(timestep, dim=1, return_inverse=True)
    return values, None if values.shape[1] == 1 else rows

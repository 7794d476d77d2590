"""The sequence of MiniMax-H3 behind its text: what is given, then the sound and the video that it makes.

Everything here depends on shapes and plain numbers alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tacod.rank.families.inputs import Argument, Number, Record, Spec, Unread
from tacod.rank.parallel.sequence import SequenceParallel
from tacod_client.errors import ArgumentError

__all__ = [
    "MODALITIES",
    "MOST_SEED",
    "TEXT_TAG",
    "TIMES",
    "Layout",
    "Run",
    "modulated",
    "payload_spec",
    "shares",
]

MOST_SEED = (1 << 64) - 1
TIMES = 4
"""The times of a forward, which tokens have by what they are; a text's is the video's."""
_VIDEO, _SOUND, _GIVEN_PICTURE, _GIVEN_SOUND = range(TIMES)
MODALITIES = 3
"""Kinds of tokens with modulations of their own: pictures, text, and sound."""
_PICTURE_TAG, TEXT_TAG, _SOUND_TAG = range(MODALITIES)
_PATCH = 2
_SCALE = 32.0
"""What the two sides of a square go up to, as positions."""
_STEP = 5.0 / 3.0
"""Steps of sound for each frame of pixels."""
_FRAMES = (1, 4, 4, 4, 4)
"""Frames of pixels in each frame of a latent, over and over."""
_PAYLOAD = "minimax_payload"


def payload_spec(channels: int, sound_channels: int) -> Record:
    """ComfyUI's ``minimax_payload``: what each token of the text is, and what is given.

    ``cond_video_latents`` and ``cond_audio_latents`` have the latents of ``keyframes`` and ``refs`` once more.
    """
    latent, track = (1, channels, "frames", "rows", "columns"), (1, sound_channels, 2, "steps")
    picture, sound = (Argument(shape, required=False, fp32=True) for shape in (latent, track))
    size, share = Number(0, 1 << 20), Number(0, 1)
    keyframe: dict[str, Spec] = {
        "resolved_frame_index": Number(0, 1 << 20, required=True),
        "latent": Argument((*latent[:3], "H", "W"), required=False, fp32=True),
        "audio_latent": sound,
    }
    reference: dict[str, Spec] = {
        "kind": Argument(None, choices=("image", "audio", "video", "video_audio")),
        "latent": picture,
        "audio_latent": sound,
        **dict.fromkeys(("latent_t", "latent_h", "latent_w", "ref_audio_t"), size),
    }
    return Record(
        {
            "text_token_tags": Argument(("L",), required=False, rows=MODALITIES),
            "keyframes": Record(keyframe, many=True),
            "refs": Record(reference, many=True),
            "cond_video_latents": Argument(latent, required=False, fp32=True, many=True),
            "cond_audio_latents": Argument(track, required=False, fp32=True, many=True),
            "seed": Number(0, MOST_SEED),
            "audio_scale": Number(1e-3, 1e3),
            "visual_cond_noise_aug": share,
            "audio_cond_noise_aug": share,
            "layout": Unread(),
            "_text_token_tags_list": Unread(),
        }
    )


@dataclass(frozen=True)
class Run:
    """Neighbouring tokens of one kind."""

    sound: bool
    given: bool
    origin: float
    """The time at which it begins, as a position."""
    frames: int
    """Frames of a video's latent, or steps of a sound."""
    sides: tuple[int, int]
    """Rows and columns of its video's latent, or of the video that a sound belongs to; both are even."""

    @property
    def count(self) -> int:
        """How many tokens there are: of a sound, one for each step of both channels."""
        return 2 * self.frames if self.sound else self.frames * self.sides[0] * self.sides[1] // _PATCH**2

    @property
    def time(self) -> int:
        """Which of the `TIMES` times its tokens have."""
        if self.sound:
            return _GIVEN_SOUND if self.given else _SOUND
        return _GIVEN_PICTURE if self.given else _VIDEO

    @property
    def tag(self) -> int:
        """Which of the `MODALITIES` it is of."""
        return _SOUND_TAG if self.sound else _PICTURE_TAG

    def places(self) -> Tensor:
        """Each token's position in time, row and column, [count, 3] in fp64 on the CPU."""
        rows, columns = (_axis(side, math.sqrt(self.sides[0] * self.sides[1])) for side in self.sides)
        if self.sound:
            places = torch.zeros(2, self.frames, 3, dtype=torch.float64)
            places[..., 0] = self.origin + torch.arange(self.frames, dtype=torch.float64)
            # The left channel is at the left edge, the right one at the right edge.
            places[0, :, 2], places[1, :, 2] = columns[0], columns[-1]
            return places.flatten(0, 1)
        lengths = torch.tensor(_spans(self.frames - 1), dtype=torch.float64)
        times = self.origin + torch.cat([torch.zeros(1, dtype=torch.float64), lengths.cumsum(0)])
        return torch.stack(torch.meshgrid(times, rows, columns, indexing="ij"), dim=-1).flatten(0, -2)


class Layout:
    """The runs of a forward's latents, in the order of the sequence."""

    def __init__(self, text: int, latents: Sequence[Any], payload: Mapping[str, Any]) -> None:
        """Lay out ``latents``, a video [B, C, T, H, W] and a sound [B, C, 2, A], behind a text of so many tokens.

        Raises `ArgumentError`, naming the part of the payload, for what contradicts itself or has no place.
        """
        video, sound = latents
        self.given: list[tuple[Run, Any]] = []
        """What is given, with the latent of each."""
        sides = _even(video)
        references = [
            _Reference(f"{_PAYLOAD}.refs[{i}]", each, sides) for i, each in enumerate(payload.get("refs") or ())
        ]
        start = float(text)
        for reference in references:
            start += reference.span
        for index, keyframe in enumerate(payload.get("keyframes") or ()):
            origin = start + _STEP * keyframe["resolved_frame_index"]
            picture, track = keyframe.get("latent"), keyframe.get("audio_latent")
            if picture is not None:
                if tuple(picture.shape[3:]) != tuple(video.shape[3:]):
                    name = f"{_PAYLOAD}.keyframes[{index}].latent"
                    told = " and ".join(" by ".join(map(str, each.shape[3:])) for each in (picture, video))
                    raise ArgumentError(f"{name}: its sides and the video's are {told}; make them equal", argument=name)
                self.given.append((Run(False, True, origin, picture.shape[2], sides), picture))
            if track is not None:
                self.given.append((Run(True, True, origin, track.shape[-1], sides), track))
        place = float(text)
        for reference in references:
            self.given += reference.runs(place)
            place += reference.span
        self._repeated(payload)
        self.sound = Run(True, False, start, sound.shape[-1], sides)
        self.video = Run(False, False, start, video.shape[2], sides)

    @property
    def made(self) -> tuple[Run, Run]:
        """What the forward makes: sound and video."""
        return self.sound, self.video

    def _repeated(self, payload: Mapping[str, Any]) -> None:
        """Take the latents that ComfyUI's payload has once more, in two lists, from these."""
        for name, sound in (("cond_video_latents", False), ("cond_audio_latents", True)):
            again = payload.get(name)
            if again is None:
                continue
            wanted = [tuple(latent.shape) for run, latent in self.given if run.sound == sound]
            if [tuple(each.shape) for each in again] != wanted:
                where = f"{_PAYLOAD}.{name}"
                raise ArgumentError(
                    f"{where}: expected the latents of keyframes and refs in their order, of shapes "
                    f"{[list(each) for each in wanted]}; leave it out, or give these",
                    argument=where,
                )
            latents = iter(again)
            self.given = [(run, next(latents) if run.sound == sound else latent) for run, latent in self.given]


class _Reference:
    """A picture, sound, or video with or without a sound, that the prompt may speak of."""

    def __init__(self, name: str, told: Mapping[str, Any], sides: tuple[int, int]) -> None:
        """``sides`` are those of the video that is made."""
        kind = told["kind"]
        self.picture, self.track = told.get("latent"), told.get("audio_latent")
        for field, latent, needed, allowed in (
            ("latent", self.picture, kind != "audio", kind != "audio"),
            ("audio_latent", self.track, kind == "audio", kind != "image"),
        ):
            if latent is None and needed:
                raise ArgumentError(f"{name}.{field}: missing; a reference of kind {kind!r} has one", argument=name)
            if latent is not None and not allowed:
                raise ArgumentError(f"{name}.{field}: a reference of kind {kind!r} has none", argument=name)
        facts: dict[str, int] = {"ref_audio_t": 0 if self.track is None else self.track.shape[-1]}
        self.sides = sides
        if self.picture is not None:
            facts |= zip(("latent_t", "latent_h", "latent_w"), self.picture.shape[2:], strict=True)
            self.sides = _even(self.picture)
        for field, fact in facts.items():
            if told.get(field, fact) != fact:
                raise ArgumentError(
                    f"{name}.{field}: it is {told[field]}, but its latent has {fact}; leave it out", argument=name
                )
        self.steps, self.frames, self._image = facts["ref_audio_t"], facts.get("latent_t", 0), kind == "image"
        if self._image and self.frames != 1:
            raise ArgumentError(
                f"{name}.latent: an image has one frame, and this has {self.frames}; its kind is 'video'",
                argument=name,
            )

    @property
    def span(self) -> float:
        """How much time it takes, as positions."""
        return 1.0 if self._image else max(float(self.steps), sum(_spans(self.frames)))

    def runs(self, origin: float) -> list[tuple[Run, Any]]:
        """Its tokens, from this time on: a video's sound stands before it."""
        runs = []
        if self.track is not None:
            runs.append((Run(True, True, origin, self.steps, self.sides), self.track))
        if self.picture is not None:
            runs.append((Run(False, True, origin, self.frames, self.sides), self.picture))
        return runs


def _even(video: Any) -> tuple[int, int]:
    height, width = (-(-side // _PATCH) * _PATCH for side in video.shape[3:])
    return height, width


def _axis(side: int, root: float) -> Tensor:
    """Positions along a side of a picture, whose area's root is ``root``: the same for any number of pixels."""
    ratio, count = side / root, side // _PATCH
    return (torch.arange(count, dtype=torch.float64) * (ratio / count) + (1.0 - ratio) / 2.0) * _SCALE


def _spans(frames: int) -> list[float]:
    """How much time each frame of a latent takes, as positions."""
    return [_STEP * _FRAMES[frame % len(_FRAMES)] for frame in range(frames)]


def modulated(runs: Sequence[Run], device: torch.device, *times: Tensor | None) -> tuple[Tensor, Tensor]:
    """Of the tokens of runs, their places [N, 3] on the CPU and the rows of their modulations [N].

    ``times`` are those of each run's tokens, where they have several.
    """
    rows = []
    for run, time in zip(runs, times or [None] * len(runs), strict=True):
        each = torch.full((run.count,), run.time, device=device) if time is None else time
        rows.append(each * MODALITIES + run.tag)
    return torch.cat([run.places() for run in runs]), torch.cat(rows)


def shares(sequence: SequenceParallel, chunk: Tensor, runs: Sequence[Run]) -> list[Tensor]:
    """This rank's tokens [B, S, C] of some runs, for each run; it may have none of one."""
    first, last = sequence.place(sum(run.count for run in runs))
    parts, start = [], 0
    for run in runs:
        begin, end = (min(max(each, first), last) - first for each in (start, start + run.count))
        parts.append(chunk[:, begin:end])
        start += run.count
    return parts

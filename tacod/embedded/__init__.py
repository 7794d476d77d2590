"""A small text-to-image model that comes with tacod: flat shapes on a flat background.

``PATH`` is a checkpoint in SD3's single-file layout, which tacod, ComfyUI and diffusers read. The same file holds the
word tables and the latent decoder that stand in for a text encoder and a VAE; `encode` and `decode` use them on the
CPU in fp32. It is made for pictures of 256 by 256, so latents [B, 16, 32, 32], the schedule shift 3 that SD3 has,
guidance around 3 and 10 Euler steps or more. What it draws, and how well, is in MODEL_CARD.md.
"""

from __future__ import annotations

import difflib
import functools
import json
import re
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from tacod.embedded.modules import Decoder, Text, state

__all__ = ["PATH", "PROMPTS", "decode", "encode", "vocabulary"]

PATH = Path(__file__).with_name("shapes.safetensors")
PROMPTS = (
    "a red circle above a blue square",
    "a yellow star inside a purple heart on a black background",
    "three green triangles below a pink ring on a white background",
    "a large orange heart in the bottom right on a cyan background",
)
"""Sentences that the model can draw; the first is the demo's."""

_ALIASES = {
    "beneath": "below",
    "big": "large",
    "centre": "center",
    "gray": "grey",
    "little": "small",
    "middle": "center",
    "one": "a",
    "tiny": "small",
    "turquoise": "cyan",
    "violet": "purple",
}
_SCALE, _SHIFT = 1.5305, 0.0609  # SD3's latent format: a VAE's latents are the model's / scale + shift


@functools.cache
def _load() -> tuple[tuple[str, ...], Text, Decoder]:
    with safe_open(PATH, "pt") as file:
        words = tuple(json.loads(file.metadata()["tacod.vocabulary"]))
        tensors = {key: file.get_tensor(key) for key in file.keys() if key.startswith(("text.", "decoder."))}  # noqa: SIM118
    text = Text(len(words), *tensors["text.position.weight"].shape)
    text.load_state_dict(state(tensors, "text."))
    decoder = Decoder()
    decoder.load_state_dict(state(tensors, "decoder."))
    return words, text.eval().requires_grad_(False), decoder.eval().requires_grad_(False)


def vocabulary() -> tuple[str, ...]:
    """The words that `encode` knows."""
    return _load()[0][1:]


def encode(prompt: str) -> tuple[Tensor, Tensor]:
    """A sentence to ``context`` [1, L, D] and ``y`` [1, D]; case and punctuation don't matter.

    An empty sentence is the negative for guidance. `ValueError` for a word that the model has never seen, and for a
    sentence of more than L words.
    """
    words, text, _ = _load()
    known = {word: index for index, word in enumerate(words)}
    ids = []
    for word in re.findall(r"\w+", prompt.lower()):
        word = _ALIASES.get(word, word)
        if word not in known:
            near = difflib.get_close_matches(word, words[1:], 1, 0.0)[0]
            raise ValueError(f"the embedded model has no word {word!r}; nearest: {near!r}; all: {', '.join(words[1:])}")
        ids.append(known[word])
    length = text.position.num_embeddings
    if len(ids) > length:
        raise ValueError(f"the embedded model reads {length} words at most, and this prompt has {len(ids)}")
    context, y = text(torch.tensor([ids + [0] * (length - len(ids))]))
    return context, y


def decode(latent: Tensor) -> Tensor:
    """What a sampler's result holds, [B, 16, h, w] in SD3's VAE space, to pictures, uint8 RGB [B, 8h, 8w, 3]."""
    _, _, decoder = _load()
    pictures: Tensor = decoder((latent.to("cpu", torch.float32) - _SHIFT) * _SCALE)
    return ((pictures.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()

"""The embedded model: its file, its words, and whether it draws what a sentence says."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from tacod import embedded
from tacod.checkpoint import read_checkpoint
from tacod.rank.families.base import DiT
from tacod.rank.families.sd3 import SD3
from tacod.rank.weights.load import load_model
from training.measure import describe, verdict
from training.shapes_data import Scenes, draw_scenes, held_pair
from training.train_shapes import CONFIG, sample

PREFIX = "model.diffusion_model."
CFG, STEPS = 3.0, 16


@pytest.fixture(scope="module")
def model() -> DiT:
    return load_model(read_checkpoint(str(embedded.PATH)), torch.float32, torch.device("cpu"))


def draw(model: DiT, prompts: list[str], seed: int, size: int = 256, steps: int = STEPS) -> Tensor:
    """Pictures, uint8 RGB [B, size, size, 3]."""
    noise = torch.randn((len(prompts), 16, size // 8, size // 8), generator=torch.Generator().manual_seed(seed))
    context, y = (torch.cat(parts) for parts in zip(*map(embedded.encode, prompts), strict=True))
    x = sample(model, noise, (context, y), embedded.encode(""), CFG, steps)
    return embedded.decode(x / 1.5305 + 0.0609)


def test_file_is_small_and_in_sd3_layout() -> None:
    assert embedded.PATH.stat().st_size <= 12_000_000
    with safe_open(embedded.PATH, "pt") as file:
        metadata = file.metadata()
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        assert {file.get_slice(key).get_dtype() for key in shapes} == {"BF16"}
    assert {key.split(".")[0] for key in shapes} == {"model", "text", "decoder"}
    assert json.loads(metadata["tacod.config"]) == CONFIG
    assert metadata["license"] == "Apache-2.0"
    assert shapes[PREFIX + "joint_blocks.2.x_block.attn.qkv.weight"] == (576, 192)
    assert shapes[PREFIX + "joint_blocks.2.context_block.attn.ln_q.weight"] == (64,)


def test_shapes_alone_tell_the_configuration() -> None:
    detected = SD3.detect(read_checkpoint(str(embedded.PATH)).tensors)
    assert detected is not None
    assert detected == {"context_processor_layers": None} | CONFIG


def test_token_counts_do_not_divide_by_three() -> None:
    context, y = embedded.encode(embedded.PROMPTS[0])
    assert context.shape == (1, 22, 96)
    assert y.shape == (1, 96)
    assert all(tokens % 3 for tokens in (22, 256, 22 + 256))


@torch.no_grad()
def test_draws_held_out_sentences(model: DiT) -> None:
    scenes = draw_scenes(24, torch.Generator().manual_seed(7), held_out=True)
    prompts = scenes.prompts()
    # Fewer steps are no easier for the model.
    pictures = draw(model, prompts, seed=11, steps=8)
    wrong = []
    for i, prompt in enumerate(prompts):
        if not verdict(pictures[i], scenes[i : i + 1])[0]:
            wrong.append(f"{prompt}: {describe(pictures[i])}")
    assert len(wrong) <= 2, "\n".join(wrong)


@torch.no_grad()
def test_draws_its_own_prompts(model: DiT) -> None:
    pictures = draw(model, list(embedded.PROMPTS), seed=1)
    found = [describe(picture) for picture in pictures]
    assert re.fullmatch(r"red circle at \(0.\d+, 0.[12]\d\), blue square at \(0.\d+, 0.[78]\d\) on white", found[0])
    assert re.fullmatch(r"(?=.*yellow star)(?=.*purple heart).* on black", found[1])
    assert found[2].count("green triangle") == 3
    assert "pink ring" in found[2]
    assert "orange heart" in found[3]


@torch.no_grad()
def test_same_seed_same_picture(model: DiT) -> None:
    one, two, other = (draw(model, [embedded.PROMPTS[0]], seed, size=128, steps=4) for seed in (5, 5, 6))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_encode_forgives_case_punctuation_and_spelling() -> None:
    plain = embedded.encode("a grey circle at the center, and a red star on the left")
    other = embedded.encode("A GRAY circle at the centre; and a red star on the left!")
    assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))


def test_encode_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match=r"no word 'cirkle'; nearest: 'circle'; all: .*square"):
        embedded.encode("a red cirkle")
    with pytest.raises(ValueError, match="22 words at most"):
        embedded.encode("red " * 23)


def test_decode_takes_any_size_and_batch() -> None:
    picture = embedded.decode(torch.zeros(2, 16, 20, 36))
    assert picture.shape == (2, 160, 288, 3)
    assert picture.dtype == torch.uint8


def test_training_data_is_the_same_again_and_without_held_out_pairs() -> None:
    def pairs(scenes: Scenes) -> Tensor:
        thing = scenes.colour * 6 + scenes.shape
        two = scenes.colour[:, 1] >= 0
        return held_pair[thing[:, 0][two], thing[:, 1][two]][scenes.kind[two] == 1]

    one, two = (draw_scenes(2000, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one.words, two.words)
    assert torch.equal(one.x, two.x)
    assert not pairs(one).any()
    assert pairs(draw_scenes(200, torch.Generator().manual_seed(3), held_out=True)).all()
    assert held_pair[0, 31]  # a red circle and a blue square, the demo's

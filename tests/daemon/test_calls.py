"""What a network does outside of a forward: Anima's text adapter, by the daemon, equal to what ComfyUI computed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import FLUX, FP32, animas_text, read_golden, relative_error
from safetensors.torch import save_file

from tacod_client import ArgumentError, Client, Model

METHOD = "preprocess_text_embeds"
NAME = "anima_call.safetensors"
LAYER = "llm_adapter.blocks.1.cross_attn.k_proj"


@pytest.fixture(scope="module")
def file(models: Path) -> str:
    read_golden("anima").save(models / NAME)
    return NAME


@pytest.fixture
def model(client: Client, file: str) -> Iterator[Model]:
    model = client.load(file)
    yield model
    client.unload(model.id)


def test_it_gives_what_comfyui_computed(model: Model, client: Client) -> None:
    before = client.stats()
    given, expected = animas_text()
    out = model.call(METHOD, **given)
    assert out.dtype == torch.float32
    assert relative_error(out, expected) <= FP32
    array = model.call(METHOD, **{name: value.numpy() for name, value in given.items()})
    assert torch.equal(torch.from_numpy(array), out)
    halved = model.call(METHOD, **{**given, "context": given["context"].bfloat16()})
    assert (halved.dtype, halved.shape) == (torch.bfloat16, out.shape)
    after = client.stats()
    # It is a job, and no forward.
    assert after["forwards_total"] == before["forwards_total"]
    assert after["jobs_total"]["result"] == before["jobs_total"]["result"] + 3
    assert model.stats.forwards == 0


def test_words_count_as_much_as_they_are_said_to(model: Model) -> None:
    given, _ = animas_text()
    plain = model.call(METHOD, **{**given, "t5xxl_weights": None})
    ones = model.call(METHOD, **{**given, "t5xxl_weights": torch.ones_like(given["t5xxl_weights"])})
    assert torch.equal(plain, ones)
    twice = model.call(METHOD, **{**given, "t5xxl_weights": 2 * torch.ones_like(given["t5xxl_weights"])})
    assert relative_error(twice, 2 * plain) <= FP32


def test_a_long_text_travels_by_content_and_isn_t_cut(model: Model, client: Client) -> None:
    context, ids = torch.randn(2, 300, 20), torch.randint(0, 97, (2, 600))
    hits = client.stats()["store"]["hits"]
    outs = [model.call(METHOD, context=context, t5xxl_ids=ids) for _ in range(2)]
    assert client.stats()["store"]["hits"] > hits
    assert outs[0].shape == (2, 600, 24)
    assert torch.equal(*outs)
    one = model.call(METHOD, context=context[1:], t5xxl_ids=ids[1:])
    assert relative_error(outs[0][1:], one) <= FP32


def test_patches_act_on_it(client: Client, file: str, models: Path) -> None:
    """By tensors and by a LoRA's file; the layer is none of a forward's."""
    torch.manual_seed(0)
    up, down = torch.randn(24, 3), torch.randn(3, 20)
    lora = {f"diffusion_model.{LAYER}.lora_B.weight": up, f"diffusion_model.{LAYER}.lora_A.weight": down}
    save_file(lora, models / "anima_call_lora.safetensors")
    given, _ = animas_text()
    plain = client.load(file).call(METHOD, **given)
    by_tensors = client.load(file, [{"key": f"{LAYER}.weight", "kind": "lora", "up": up, "down": down}])
    by_file = client.load(file, [{"path": "anima_call_lora.safetensors", "strength": 1.0}])
    outs = [each.call(METHOD, **given) for each in (by_tensors, by_file)]
    assert relative_error(*outs) <= FP32
    assert relative_error(outs[0], plain) > 1e-3
    client.unload(client.load(file).id)


def test_the_model_loads_itself_for_it(client: Client, file: str) -> None:
    model = client.load(file)
    given, expected = animas_text()
    client.unload(model.id)
    assert relative_error(model.call(METHOD, **given), expected) <= FP32
    client.unload(model.id)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"context": None}, "context: missing"),
    ({"context": torch.zeros(1, 15, 21)}, r"context: expected shape \[B, L, 20\]"),
    ({"t5xxl_ids": None}, "t5xxl_ids: missing"),
    ({"t5xxl_ids": torch.zeros(1, 11)}, "t5xxl_ids: expected a tensor of whole numbers"),
    ({"t5xxl_ids": torch.full((1, 11), 97)}, "t5xxl_ids: expected whole numbers from 0 to 96"),
    ({"t5xxl_ids": torch.zeros(2, 11, dtype=torch.int64)}, "they must agree"),
    ({"t5xxl_weights": torch.ones(1, 12, 1)}, "they must agree"),
    ({"timestep": torch.zeros(1)}, "timestep: preprocess_text_embeds takes no such argument"),
]


@pytest.mark.parametrize(("change", "said"), BAD, ids=lambda value: value if isinstance(value, str) else "")
def test_a_bad_argument_is_refused_by_its_name(model: Model, change: dict[str, Any], said: str) -> None:
    given, expected = animas_text()
    with pytest.raises(ArgumentError, match=said):
        model.call(METHOD, **{**given, **change})
    assert relative_error(model.call(METHOD, **given), expected) <= FP32


def test_a_method_that_the_network_lacks(model: Model, client: Client) -> None:
    with pytest.raises(ArgumentError, match="method: cosmos_predict2 has no 'forward_orig'; it has preprocess_text"):
        model.call("forward_orig", context=torch.zeros(1, 1, 20))
    with pytest.raises(ArgumentError, match="method: flux has no 'preprocess_text_embeds'; this model has none"):
        client.load(FLUX.file).call(METHOD, context=torch.zeros(1, 1, 8))

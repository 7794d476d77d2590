"""Residuals, masks and stretched positions through daemon and client, at any number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import FLUX, FP32, SD3, Daemon, Tiny, relative_error

from tacod.rank.arguments import load_arguments
from tacod_client import ArgumentError, Client
from tacod_client.exchange import each_once, pack

TEXT, TOKENS = 129, 35


def expected(tiny: Tiny, inputs: dict[str, Any]) -> torch.Tensor:
    sent = {**inputs, "control": each_once(inputs["control"])}
    specs = tiny.model.arguments()
    return tiny.forward(**load_arguments(pack(sent, "", {}, None), specs, torch.float32, torch.device("cpu")))


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_forward_with_all_of_them_is_right(daemons: Callable[[int], Daemon], ranks: int) -> None:
    torch.manual_seed(ranks)
    with daemons(ranks).client() as client:
        for tiny, width in ((FLUX, 80), (SD3, 192)):
            inputs = tiny.inputs(batch=2)
            one, two = torch.randn(2, 2, TOKENS, width)
            inputs["control"] = {"input": [], "output": [one, one, two], "middle": []}
            if tiny is FLUX:
                inputs["control"]["input"] = [None, two[:, :20]]
                inputs["attention_mask"] = torch.rand(1, TEXT + TOKENS, TEXT + TOKENS) < 0.7
                inputs["rope_options"] = {"scale_x": 0.5, "shift_t": 1.0}
            model = client.load(tiny.file)
            assert relative_error(model.forward(**inputs), expected(tiny, inputs)) <= FP32
            held = client.stats()["store"]["bytes"]
            one.mul_(2.0)
            assert relative_error(model.forward(**inputs), expected(tiny, inputs)) <= FP32
            assert client.stats()["store"]["bytes"] == held, "residuals are not kept"


def test_a_residual_that_does_not_fit_is_refused_by_its_place(client: Client) -> None:
    model = client.load(FLUX.file)
    good, bad = torch.zeros(1, TOKENS, 80), torch.zeros(1, TOKENS + 1, 80)
    with pytest.raises(ArgumentError, match="36 tokens") as caught:
        model.forward(**FLUX.inputs(), control={"input": [good, None, None, bad], "output": []})
    assert caught.value.argument == "control.input[3]"
    FLUX.check(model)


def test_sampling_refuses_residuals_and_takes_masks(client: Client) -> None:
    inputs = FLUX.inputs()
    noise, mask = inputs.pop("x"), torch.zeros(1, TEXT + TOKENS, TEXT + TOKENS)
    del inputs["timestep"]
    run = {"noise": noise, "latent": torch.zeros_like(noise), "sigmas": torch.linspace(1, 0, 3)}
    model = client.load(FLUX.file)
    plain = model.sample(**run, positive=inputs).result()
    masked = model.sample(**run, positive={**inputs, "attention_mask": mask, "rope_options": {}}).result()
    assert relative_error(masked, plain) <= FP32
    with pytest.raises(ArgumentError) as caught:
        model.sample(**run, positive={**inputs, "control": {"tensors": []}}).result()
    assert caught.value.argument == "positive.control"
    with pytest.raises(ArgumentError) as caught:
        model.sample(**run, positive={**inputs, "attention_mask": mask[:, 1:, 1:]}).result()
    assert "attention_mask" in str(caught.value.argument)

"""Baselines: forwards of one kind are compared with each other, and the memory of them is bounded."""

from __future__ import annotations

from typing import Any

from tacod.observe.baselines import KINDS, Baselines, shapes_of
from tacod_client.wire import Tensor


def shapes(size: int, tokens: int = 8) -> Any:
    context = Tensor("F32", (1, tokens, 4), None, b"\0" * 32)
    return shapes_of({"x": Tensor("F32", (1, 16, size, size), None), "context": context, "ref_latents": [context]})


def test_a_forward_is_compared_with_the_last_like_it() -> None:
    baselines = Baselines()
    assert baselines.of("m", shapes(64)) is None
    baselines.note("m", shapes(64), 3.0)
    baselines.note("m", shapes(64), 2.0)
    assert baselines.of("m", shapes(64)) == 2.0
    for model, other in (("n", shapes(64)), ("m", shapes(32)), ("m", shapes(64, 9))):
        assert baselines.of(model, other) is None


def test_what_is_remembered_is_bounded() -> None:
    baselines = Baselines()
    for size in range(KINDS + 1):
        baselines.note("m", shapes(size), 1.0)
    assert baselines.of("m", shapes(0)) is None
    assert baselines.of("m", shapes(1)) == 1.0

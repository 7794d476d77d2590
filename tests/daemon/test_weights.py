"""Weights that the ranks of a daemon hold together, or that lie in the host's memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import FLUX, FP32, Daemon, relative_error

from daemon.test_patches import MLP, QKV, expected, lora
from tacod_client import Client, OutOfMemory

BUDGET = 2_200_000


@pytest.fixture(scope="module")
def small(models: Path) -> Iterator[Daemon]:
    """Three ranks with less memory for weights than the 2.9 MB of the tiny Flux."""
    with Daemon(3, [models], {"models.memory_bytes": BUDGET}) as daemon:
        yield daemon


def described(client: Client, model: str) -> dict[str, Any]:
    return next(each for each in client.status()["models"] if each["id"] == model)


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("weights", ["sharded", "host"])
def test_results_are_the_same_to_the_bit(daemons: Callable[[int], Daemon], weights: str, ranks: int) -> None:
    inputs = FLUX.inputs()
    with daemons(ranks).client() as client:
        whole, apart = client.load(FLUX.file), client.load(FLUX.file, weights=weights)
        assert whole.id != apart.id
        for _ in range(2):
            assert apart.forward(**inputs).equal(whole.forward(**inputs))
        told, other = described(client, apart.id), described(client, whole.id)
        assert other["weights"] == "replicated"
        assert other["streamed_bytes"] == [0] * ranks
        assert told["weights"] == (weights if ranks > 1 or weights == "host" else "replicated")
        if told["weights"] != "replicated":
            assert max(told["resident_bytes"]) == told["weight_bytes"] < other["weight_bytes"]
            assert min(told["streamed_bytes"]) > 0
        client.unload(apart.id)


@pytest.mark.parametrize("weights", ["sharded", "host"])
def test_patches_are_fetched_too(daemons: Callable[[int], Daemon], weights: str) -> None:
    inputs = FLUX.inputs()
    with daemons(3).client() as client:
        patches = [lora(QKV, 0.8), lora(MLP, -0.5, 1)]
        patched = client.load(FLUX.file, patches=patches, weights=weights)
        wanted = expected(inputs, (QKV, 0.8, 0), (MLP, -0.5, 1))
        assert relative_error(patched.forward(**inputs), wanted) <= FP32
        assert patched.forward(**inputs).equal(client.load(FLUX.file, patches=patches).forward(**inputs))
        # Its base is as it was, and another strength reads nothing again.
        FLUX.check(client.load(FLUX.file, weights=weights))
        weaker = client.load(FLUX.file, patches=[lora(QKV, 0.3)], weights=weights)
        assert relative_error(weaker.forward(**inputs), expected(inputs, (QKV, 0.3, 0))) <= FP32
        assert relative_error(patched.forward(**inputs), wanted) <= FP32
        changed = sum(FLUX.model.state_dict()[key].nbytes for key in (QKV, MLP))
        assert described(client, patched.id)["weight_bytes"] <= changed
        client.unload(client.load(FLUX.file, weights=weights).id)


def test_as_much_stays_whole_as_the_budget_allows(small: Daemon) -> None:
    with small.client() as client:
        model = client.load(FLUX.file)
        FLUX.check(model)
        told = described(client, model.id)
        assert told["weights"] in ("sharded", "host")
        assert max(told["resident_bytes"]) <= BUDGET
        assert min(told["streamed_bytes"]) > 0
        # Another model makes it go, and it comes back at its turn.
        other = client.load(FLUX.file, dtype="fp16")
        assert [each["id"] for each in client.models()] == [other.id]
        FLUX.check(model)


def test_what_cannot_fit_is_refused_and_says_how_much_would(models: Path) -> None:
    with Daemon(2, [models], {"models.memory_bytes": 1000}) as daemon, daemon.client() as client:
        with pytest.raises(OutOfMemory, match=r"models\.memory_bytes"):
            client.load(FLUX.file)
        assert client.models() == []

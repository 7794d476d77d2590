"""A request that needs more memory than there is.

The ranks hold fewer blocks of its model and try again. Where they hold as few as they can, it gets `OutOfMemory`, with
what was asked, what is free and what would help.
"""

from __future__ import annotations

from typing import Any

import pytest
from daemon.test_patches import QKV, lora
from helpers import FLUX, SD3, Daemon, eventually

from tacod_client import Client, Model, OutOfMemory

from .conftest import STEP_TIMEOUT_S, Inject

ASKED = r"tried to allocate \d+\.\d GiB, and \d+\.\d GiB are free: \d+\.\d GiB lack; use a smaller image"
LEAST = rf"{ASKED}.*can't be less: it fetches all of its blocks"


def load_alone(client: Client, file: str, weights: str = "auto") -> Model:
    """The model, and no other: one that nobody uses would make room for it, and the step be done again."""
    for model in client.status()["models"]:
        client.unload(model["id"])
    return client.load(file, weights=weights)


def held(client: Client, model: Model) -> dict[str, Any]:
    return next(each for each in client.status()["models"] if each["id"] == model.id)


def test_on_all_ranks_the_work_runs_again_with_a_block_less(sturdy: Daemon, client: Client, inject: Inject) -> None:
    """They agree, so they stay."""
    model = load_alone(client, FLUX.file)
    inputs = FLUX.inputs()
    expected, before = model.forward(**inputs), held(client, model)
    pids, restarts = sturdy.rank_pids(), client.status()["group"]["restarts"]
    inject(kind="out_of_memory")
    begin = len(sturdy.log)
    assert model.forward(**inputs).equal(expected)
    after = held(client, model)
    assert (before["weights"], max(before["streamed_bytes"])) == ("replicated", 0)
    assert max(after["resident_bytes"]) < min(before["resident_bytes"])
    assert min(after["streamed_bytes"]) > 0
    assert "loading it again with 1 block fewer on each rank" in sturdy.log[begin:]
    assert model.forward(**inputs).equal(expected)
    assert sturdy.rank_pids() == pids
    assert client.status()["group"]["restarts"] == restarts
    assert model.stats.retries == 0
    # Who loads it anew gets as much as there is room for.
    client.unload(model.id)
    assert held(client, client.load(FLUX.file))["weights"] == "replicated"


def test_the_error_comes_when_nothing_is_left_to_give_up(sturdy: Daemon, client: Client, inject: Inject) -> None:
    model = load_alone(client, FLUX.file)
    pids = sturdy.rank_pids()
    inject(kind="out_of_memory", always=True)
    with pytest.raises(OutOfMemory, match=LEAST) as caught:
        FLUX.check(model)
    assert caught.value.details["lacking_bytes"] > 1 << 40
    inject(kind="slow", seconds=0.01)
    # Others don't have to put up with a model that fetches everything.
    FLUX.check(model)
    assert held(client, model)["weights"] == "replicated"
    assert sturdy.rank_pids() == pids


@pytest.mark.parametrize("weights", ["replicated", "sharded"])
def test_where_weights_lie_as_asked_the_error_says_what_would_take_less(
    sturdy: Daemon, client: Client, inject: Inject, weights: str
) -> None:
    model = load_alone(client, FLUX.file, weights)
    inject(kind="out_of_memory")
    with pytest.raises(
        OutOfMemory, match=rf'{ASKED}.*The model takes 2\.\d MiB of each device: .*weights="host" takes '
    ):
        FLUX.check(model)
    assert held(client, model)["weights"] == weights
    FLUX.check(model)


def test_in_the_middle_of_a_run(sturdy: Daemon, client: Client, inject: Inject) -> None:
    model = load_alone(client, SD3.file)
    expected, pids = SD3.sample(model, 8).result(), sturdy.rank_pids()
    inject(kind="out_of_memory", at="sample", skip=3)
    assert SD3.sample(model, 8).result().equal(expected)
    assert max(held(client, model)["streamed_bytes"]) > 0
    assert sturdy.rank_pids() == pids


def test_with_patches(sturdy: Daemon, client: Client, inject: Inject) -> None:
    """What others made of the same model goes first, and comes back at its turn."""
    base, inputs = load_alone(client, FLUX.file), FLUX.inputs()
    models = [base, *(client.load(FLUX.file, patches=[lora(QKV, strength)]) for strength in (0.8, 0.3))]
    expected = [model.forward(**inputs) for model in models]
    # Two of them make room, then the ranks hold a block less.
    inject(kind="out_of_memory", times=3)
    for model, wanted in zip(models, expected, strict=True):
        assert model.forward(**inputs).equal(wanted)
        assert max(held(client, base)["streamed_bytes"]) > 0


def test_on_one_rank_while_another_waits_for_it(sturdy: Daemon, client: Client, inject: Inject) -> None:
    """The other is stuck and is replaced; new ranks hold a block less."""
    model = load_alone(client, FLUX.file)
    inputs = FLUX.inputs()
    expected, before = model.forward(**inputs), client.status()["group"]["restarts"]
    inject(kind="out_of_memory", rank=1)
    begin = len(sturdy.log)
    assert model.forward(**inputs).equal(expected)
    eventually(lambda: client.status()["group"]["restarts"] == before + 1, STEP_TIMEOUT_S, "one restart")
    assert "loading it again with 1 block fewer" in sturdy.log[begin:]
    assert max(held(client, model)["streamed_bytes"]) > 0


def test_on_one_rank_where_nothing_can_be_given_up(sturdy: Daemon, client: Client, inject: Inject) -> None:
    """To ask for the same memory again would be of no use."""
    model = load_alone(client, FLUX.file, "host")
    before = client.status()["group"]["restarts"]
    inject(kind="out_of_memory", rank=1)
    begin = len(sturdy.log)
    with pytest.raises(OutOfMemory, match=ASKED):
        FLUX.check(model)
    eventually(lambda: client.status()["group"]["restarts"] == before + 1, STEP_TIMEOUT_S, "one restart")
    assert "another rank reported: host out of memory" in sturdy.log[begin:]

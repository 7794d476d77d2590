"""Conditioning travels once, by content, and comes again when the store had to drop it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from helpers import SD3, Daemon

from tacod_client import Client, QueueFull, TacodError

CONTEXT_BYTES = 129 * 8 * 4


def test_the_second_forward_with_the_same_context_sends_less(client: Client) -> None:
    model = client.load(SD3.file)

    def forward() -> tuple[int, int, int]:
        before = client.stats()
        SD3.check(model, seed=4711)
        after = client.stats()
        store = {key: after["store"][key] - before["store"][key] for key in ("hits", "misses")}
        return after["rx_bytes"] - before["rx_bytes"], store["hits"], store["misses"]

    (first_bytes, _, first_misses), (second_bytes, second_hits, second_misses) = forward(), forward()
    assert first_bytes - second_bytes >= CONTEXT_BYTES
    assert (first_misses, second_hits, second_misses) == (1, 1, 0)


def test_a_change_in_place_that_a_glance_overlooks_counts(client: Client) -> None:
    model = client.load(SD3.file)
    inputs = SD3.inputs()
    before = model.forward(**inputs)
    inputs["context"].view(-1)[3] += 1
    after = model.forward(**inputs)
    assert not after.equal(before)
    assert after.equal(client.load(SD3.file).forward(**inputs)), "an object that knows no tensors yet"


@pytest.fixture(scope="module")
def cramped(daemons: Callable[[int], Daemon]) -> Iterator[Daemon]:
    """The daemon with two ranks, while its store holds two contexts, and its ranks keep one."""
    settings = {"limits.store_bytes": 2 * CONTEXT_BYTES + 100, "group.cache_bytes": CONTEXT_BYTES + 100}
    daemon = daemons(2)
    daemon.empty()
    with daemon.changed(settings):
        yield daemon


def test_eviction_changes_no_result(cramped: Daemon) -> None:
    with cramped.client() as client:
        model = client.load(SD3.file)
        for seed in (1, 2, 3, 1, 1, 2, 3):
            SD3.check(model, seed)
        store = client.stats()["store"]
        assert store["bytes"] <= 2 * CONTEXT_BYTES + 100
        assert store["misses"] > 3


def test_a_running_job_keeps_its_tensors(cramped: Daemon) -> None:
    with cramped.client() as one, cramped.client() as other:
        run = SD3.sample(one.load(SD3.file), 60)
        model = other.load(SD3.file)
        for seed in (1, 2, 3):
            SD3.check(model, seed)
        assert run.result().isfinite().all()


def test_a_context_larger_than_the_store_is_refused(cramped: Daemon) -> None:
    with cramped.client() as client:
        model = client.load(SD3.file)
        with pytest.raises(QueueFull, match=r"limits\.store_bytes"):
            model.forward(**SD3.inputs(text=3 * 129))
        SD3.check(model)


def test_contexts_that_never_fit_together_are_refused(cramped: Daemon) -> None:
    inputs, other = SD3.inputs(1, text=200), SD3.inputs(2, text=200)
    condition = {key: inputs[key] for key in ("context", "y")}
    opposite = {key: other[key] for key in ("context", "y")}
    with cramped.client() as client:
        model = client.load(SD3.file)
        with pytest.raises(TacodError, match=r"limits\.store_bytes"):
            model.sample(
                noise=inputs["x"],
                latent=inputs["x"] * 0,
                sigmas=inputs["x"].new_tensor([1.0, 0.0]),
                positive=condition,
                negative=opposite,
                cfg=4.0,
            ).result()
        SD3.check(model)

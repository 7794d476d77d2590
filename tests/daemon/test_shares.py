"""Ranks of a daemon that take unequal shares of each forward, as its configuration says."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from helpers import FLUX, SD3, Daemon

from tacod_client import Client, ConfigInvalid

SHARES = [3, 1, 2]


@pytest.fixture
def unequal(daemons: Callable[[int], Daemon]) -> Iterator[Daemon]:
    daemon = daemons(3)
    daemon.empty()
    with daemon.changed({"group.shares": SHARES}):
        yield daemon
    daemon.empty()


def described(client: Client, model: str) -> dict[str, Any]:
    return next(each for each in client.status()["models"] if each["id"] == model)


def test_the_numbers_are_those_of_one_rank_and_the_plan_says_why(unequal: Daemon) -> None:
    with unequal.client() as client:
        model = client.load(FLUX.file)
        FLUX.check(model)
        told = described(client, model.id)
        assert (told["shares"], told["shares_measured"]) == (SHARES, False)
        assert "rank 0 takes 3 times as much, rank 2 takes 2 times as much" in told["plan"]
        assert "tokens: " in told["plan"]
        assert client.status()["models"][-1]["plan"] == model.stats.plan


def test_new_ranks_and_a_reload_keep_them_and_a_load_takes_others(unequal: Daemon) -> None:
    inputs = SD3.inputs()
    with unequal.client() as client:
        model = client.load(SD3.file)
        before = model.forward(**inputs)
        with unequal.changed({"group.shares": [1, 1, 1]}):
            os.kill(unequal.rank_pids()[1], signal.SIGKILL)
            assert model.forward(**inputs).equal(before), "to the bit, as the shares are the same"
            assert described(client, model.id)["shares"] == SHARES
            client.unload(model.id)
            again = client.load(SD3.file)
            assert described(client, again.id)["shares"] == []
            SD3.check(again)


def test_too_few_are_refused_and_nothing_changes(unequal: Daemon) -> None:
    text = unequal.config.read_text()
    with pytest.raises(ConfigInvalid, match="shares: expected a number for each of 3 ranks, got 2"):
        unequal._reload(text.replace(str(SHARES), "[2, 1]"))
    unequal.config.write_text(text)
    with unequal.client() as client:
        assert described(client, client.load(FLUX.file).id)["shares"] == SHARES

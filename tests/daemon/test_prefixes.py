"""What doesn't change from step to step, through the daemon: it travels once, is computed once, and is told of."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import FP32, START_S, Daemon, eventually, read_golden, relative_error

from tacod_client import Client

NAME = "qwen_image_21_edit"
SIZE = 2 * 4 * 5 * 14 * 2
"""Bytes of a token's keys and values: 5 heads of 14 channels, in 2 blocks, in fp32."""


@pytest.fixture(autouse=True, scope="module")
def _file(models: Path) -> None:
    read_golden(NAME).save(models / f"{NAME}.safetensors")


def step(number: int) -> dict[str, Any]:
    """A step's arguments; the text is long enough to travel by content."""
    given = read_golden(NAME).inputs
    context = torch.cat([given["context"]] * 9, dim=1)
    return {**given, "context": context, "x": given["x"] + number, "timestep": given["timestep"] * 0.9**number}


def told(client: Client) -> dict[str, Any]:
    stats = client.stats()
    return {**stats["prefix"], "uploaded": stats["store"]["misses"], "reused": stats["store"]["hits"]}


@pytest.fixture(params=[1, 2, 3])
def daemon(request: pytest.FixtureRequest, daemons: Callable[[int], Daemon]) -> Iterator[Daemon]:
    daemon = daemons(request.param)
    daemon.empty()
    yield daemon
    daemon.empty()


def test_it_is_computed_at_the_first_step(client: Client) -> None:
    model = client.load(f"{NAME}.safetensors")
    before = told(client)
    outs = [model.forward(**step(n)) for n in range(4)]
    after = told(client)
    assert {key: after[key] - before[key] for key in ("hits", "misses")} == {"hits": 3, "misses": 1}
    # Text and two references: after the upload the client asks again.
    assert {key: after[key] - before[key] for key in ("uploaded", "reused")} == {"uploaded": 3, "reused": 12}
    ranks = client.status()["group"]["ranks"]
    given = step(0)
    tokens = given["context"].shape[1] + sum(each[0, 0].numel() for each in given["ref_latents"])
    assert sum(rank["prefix_bytes"] for rank in ranks) == SIZE * tokens * len(given["x"])
    assert all(rank["prefix_bytes"] for rank in ranks)
    client.unload(model.id)
    assert [rank["prefix_bytes"] for rank in client.status()["group"]["ranks"]] == [0] * len(ranks)
    again = client.load(f"{NAME}.safetensors")
    assert torch.equal(again.forward(**step(3)), outs[3])
    assert told(client)["misses"] == after["misses"] + 1


def test_new_ranks_compute_it_again(daemon: Daemon, client: Client) -> None:
    model = client.load(f"{NAME}.safetensors")
    expected = [model.forward(**step(n)) for n in range(2)]
    before = told(client)
    os.kill(daemon.rank_pids()[-1], signal.SIGKILL)
    assert torch.equal(model.forward(**step(0)), expected[0])
    eventually(lambda: client.status()["state"] == "ready", START_S, "the ranks are back")
    assert torch.equal(model.forward(**step(1)), expected[1])
    after = told(client)
    assert (after["hits"] - before["hits"], after["misses"] - before["misses"]) == (1, 1)


def test_a_golden_is_right_with_what_is_kept(client: Client) -> None:
    golden = read_golden(NAME)
    model = client.load(f"{NAME}.safetensors")
    for number in (2, 1, 0):
        # The last one finds what the others, of other latents and times, have computed.
        out = model.forward(**{**golden.inputs, "x": golden.inputs["x"] + number})
    assert relative_error(out, golden.out) <= FP32

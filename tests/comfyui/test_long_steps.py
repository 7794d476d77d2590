"""Steps that take long, by a fault in each block: the sampler's body shows how far they are, and Cancel stops them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from comfyui_graphs import FLUX, Pair
from comfyui_server import ComfyUI
from helpers import Daemon, eventually

from tacod.config import I_KNOW

FAULT = f"""
[testing]
i_know = "{I_KNOW}"
[[testing.faults]]
kind = "slow"
when = "block"
seconds = 0.6
always = true
"""


@pytest.fixture(scope="module")
def slow(comfyui_models: Path) -> Iterator[Daemon]:
    """A daemon each of whose blocks is slow."""
    with Daemon(2, [comfyui_models], sections=FAULT) as daemon:
        yield daemon


@pytest.fixture
def run(slow: Daemon) -> Pair:
    """A graph whose branch through the daemon is slow."""
    run = Pair(FLUX, {"taco": (2, slow.endpoint)})
    run.load()
    return run


def test_the_samplers_body_shows_blocks(comfyui: ComfyUI, run: Pair, both: Any) -> None:
    run.sample(cfg=1.0, steps=2)
    outcome = both(run)
    said = [text for node, text in outcome.said if node == "sampler_taco"]
    assert any(text.endswith("blocks of this step") for text in said)
    assert said[-1] == "", "the line goes with the step"
    assert not [node for node, _ in outcome.said if node == "sampler_stock"]


def test_cancel_within_a_step(comfyui: ComfyUI, run: Pair, slow: Daemon) -> None:
    """The daemon's ranks stop before the next block; the next prompt is right."""
    run.sample(cfg=1.0, steps=3, seed=77)
    del run.nodes["sampler_stock"], run.nodes["save_stock"]
    with slow.client() as watcher:

        def click() -> None:
            eventually(lambda: any((job["block"] or 0) >= 2 for job in watcher.jobs()), 60, "it is in its blocks")
            done.append(watcher.stats()["forwards_total"])
            comfyui.post("/interrupt", {})
            eventually(lambda: watcher.jobs() == [], 10, "the job is gone")
            done.append(watcher.stats()["forwards_total"])

        done: list[int] = []
        thread = threading.Thread(target=click)
        thread.start()
        outcome = comfyui.run(run.nodes)
        thread.join()
    assert outcome.kind == "interrupted"
    assert len(done) == 2
    assert done[0] == done[1], "the step that was under way is not done"

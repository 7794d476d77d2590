"""What a network that isn't ours keeps between calls, and how a change of it is seen."""

from __future__ import annotations

import random
from typing import Any, ClassVar

import numpy
import pytest
import torch
from made_up_habits import Habit, nothing
from torch import nn

from tacod.rank.forward.state import State

CPU = torch.device("cpu")


class Keeps(nn.Module):
    shared: ClassVar[dict[str, int]] = {}

    def __init__(self) -> None:
        super().__init__()
        self.things: dict[str, Any] = {"list": [1, [2]], "set": {1}, "object": Habit(nothing)}
        self.register_buffer("buffer", torch.zeros(2))
        self.others = (nn.Linear(2, 2),)

    def add(self, x: int, known: list[int] = []) -> None:  # noqa: B006
        known.append(x)


def renewed(net: Keeps) -> None:
    net.buffer = net.buffer.clone()


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda net: net.things["list"][1].append(3), "things.list[1]"),
        (lambda net: net.things["set"].add(2), "things.set"),
        (lambda net: setattr(net.things["object"], "calls", 1), "things.object.calls"),
        (lambda net: net.shared.update(a=1), "test_network_state.Keeps.shared"),
        (lambda net: net.add(1), "test_network_state.Keeps.add.defaults[0]"),
        (lambda net: setattr(net, "new", None), "new"),
        (lambda net: setattr(net, "training", False), "training"),
        (lambda net: setattr(net.others[0], "bias", None), "others[0].bias"),
        (renewed, "buffer"),
    ],
)
def test_changes_of_what_is_kept_are_seen(change: Any, name: str) -> None:
    net = Keeps()
    before = State(net, CPU)
    assert State(net, CPU).changed(before) == ""
    change(net)
    assert name in State(net, CPU).changed(before)
    Keeps.shared.clear()


def test_random_states_of_its_own_are_seen() -> None:
    net = Keeps()
    net.things.update(numpy=numpy.random.default_rng(0), system=random.SystemRandom(), method=Habit(nothing).forward)
    before = State(net, CPU)
    assert State(net, CPU).changed(before) == ""
    net.things["numpy"].random()
    assert "things.numpy" in State(net, CPU).changed(before)
    before = State(net, CPU)
    net.things["method"].__self__.calls = 1
    assert "things.method.object.calls" in State(net, CPU).changed(before)


def test_weights_may_change() -> None:
    """A graph reads them each time: a LoRA's strength is changed in place."""
    net = Keeps()
    before = State(net, CPU)
    net.others[0].weight.data.add_(1)
    assert State(net, CPU).changed(before) == ""

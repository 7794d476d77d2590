"""What the ranks' devices do is looked at again and again."""

from __future__ import annotations

import os
from contextlib import closing

import pytest
from helpers import eventually

from tacod.observe import monitor


def test_a_look_that_fails_is_not_the_last(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """As when there is no descriptor left for a moment."""
    monkeypatch.setattr(monitor, "EVERY_S", 0.01)
    looks = 0

    def ranks() -> monitor.Ranks:
        nonlocal looks
        looks += 1
        if looks <= 3:
            raise OSError(24, "Too many open files")
        return [(os.getpid(), "cpu:0")]

    with closing(monitor.Monitor("cpu", ranks)) as watching:
        eventually(lambda: watching.load(os.getpid()).name == "cpu", 10, "it is measured")
    assert caplog.text.count("can't be looked at") == 1, "told once"

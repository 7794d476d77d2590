"""A daemon for faults that it must survive: short deadlines, and restarts without end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import Daemon

from tacod_client import Client

STEP_TIMEOUT_S = 4.0


@pytest.fixture(scope="session")
def sturdy(models: Path) -> Iterator[Daemon]:
    """Two ranks, replaced as often as need be."""
    settings = {
        "heartbeat_s": 1.0,
        "group.step_timeout_s": STEP_TIMEOUT_S,
        "group.max_restarts": 1000,
        # Many restarts in a short time would be spaced out more and more; here each is the first of its window.
        "group.restart_window_s": 0.001,
    }
    with Daemon(2, [models], settings) as daemon:
        yield daemon


@pytest.fixture
def client(sturdy: Daemon) -> Iterator[Client]:
    """A client of the sturdy daemon."""
    with sturdy.client() as client:
        yield client

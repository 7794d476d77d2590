"""Daemons and models that tests share; each daemon starts when the first test asks for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from helpers import FLUX, SD3, Daemon
from hypothesis import HealthCheck, settings

from tacod_client import Client

# A machine that is busy with something else is no fault of a test's.
settings.register_profile("busy machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy machine")

Daemons = Callable[[int], Daemon]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models' root: two tiny models with random weights. Tests that need more put it there."""
    folder = tmp_path_factory.mktemp("models")
    for tiny in (FLUX, SD3):
        tiny.save(folder)
    return folder


@pytest.fixture(scope="session")
def daemons(models: Path) -> Iterator[Daemons]:
    """The shared daemon with so many CPU ranks."""
    started: dict[int, Daemon] = {}
    with ExitStack() as stack:

        def get(ranks: int) -> Daemon:
            if ranks not in started:
                started[ranks] = stack.enter_context(Daemon(ranks, [models]))
            return started[ranks]

        yield get


@pytest.fixture
def daemon(daemons: Daemons) -> Daemon:
    """The shared daemon with two ranks."""
    return daemons(2)


@pytest.fixture
def client(daemon: Daemon) -> Iterator[Client]:
    """A client of the shared daemon with two ranks."""
    with daemon.client() as client:
        yield client

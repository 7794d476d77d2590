"""Daemons that the tests of this folder share.

Each starts when the first test asks for it, and ends with the folder: an idle one takes 1 to 3 % of a core.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from helpers import OFTEN, Daemon

from tacod_client import Client

Daemons = Callable[[int], Daemon]


@pytest.fixture(scope="package")
def daemons(models: Path) -> Iterator[Daemons]:
    """The shared daemon with so many CPU ranks."""
    started: dict[int, Daemon] = {}
    with ExitStack() as stack:

        def get(ranks: int) -> Daemon:
            if ranks not in started:
                started[ranks] = stack.enter_context(Daemon(ranks, [models], OFTEN))
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

"""Daemons and models that tests share; each daemon starts when the first test asks for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from helpers import FLUX, SD3, Daemon
from hypothesis import HealthCheck, settings

from tacod.rank.cores import usable_cores
from tacod_client import Client

# A machine that is busy with something else is no fault of a test's.
settings.register_profile("busy machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy machine")

TESTS = Path(__file__).parent
ALONE = "faults"
"""The folder whose tests measure how soon something is noticed: they run one after the other on one worker."""


def pytest_configure(config: pytest.Config) -> None:
    """The workers of pytest-xdist share the cores."""
    if (worker := getattr(config, "workerinput", None)) is not None:
        torch.set_num_threads(max(1, int(usable_cores() / worker["workercount"])))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """For pytest-xdist: a file stays on one worker, as its tests share daemons. What takes longest comes first."""
    if hasattr(config, "workerinput"):
        for item in items:
            item.add_marker(pytest.mark.xdist_group(group_of(item)))
        items.sort(key=lambda item: (group_of(item) != ALONE, item.path.relative_to(TESTS).parts[0] == "unit"))


def group_of(item: pytest.Item) -> str:
    """Which tests stay with this one, in its order: those of its file, or of the whole folder `ALONE`."""
    path = item.path.relative_to(TESTS)
    return ALONE if path.parts[0] == ALONE else path.as_posix()


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

"""Models that tests share, and how pytest-xdist shares out the tests."""

from __future__ import annotations

import functools
import gc
import os
from pathlib import Path
from typing import Any

import goldens_cpu  # noqa: F401  # before torch
import pytest
import torch
from helpers import FLUX, SD3
from hypothesis import HealthCheck, settings

from tacod.rank.cores import usable_cores

# A machine that is busy with something else is no fault of a test's.
settings.register_profile("busy machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy machine")

ALONE = "faults"
"""The folder whose tests measure how soon something is noticed: they run one after the other on one worker."""
GIVES_WAY = 5
"""By how much the priority of all other tests is lower (nice(2)), as there is a worker more than cores."""


def pytest_configure(config: pytest.Config) -> None:
    """The workers of pytest-xdist share the cores."""
    if (worker := getattr(config, "workerinput", None)) is not None:
        torch.set_num_threads(max(1, int(usable_cores() / worker["workercount"])))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """For pytest-xdist: what takes longest comes first."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: (folder_of(item.nodeid) != ALONE, folder_of(item.nodeid) == "unit"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """For pytest-xdist: tests of `ALONE`, which come first, go before all others."""
    if hasattr(item.config, "workerinput") and folder_of(item.nodeid) != ALONE:
        give_way()


@functools.cache
def give_way() -> None:
    """From now on, in this process and those that it starts."""
    os.nice(GIVES_WAY)


def pytest_collection_finish() -> None:
    """Collections of garbage pass over what was imported and collected for the tests: it stays to the end.

    Each would take 0.3 s, and every load of a model has one.
    """
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """For pytest-xdist: a file stays on one worker, as its tests share daemons; and so does all of `ALONE`."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return ALONE if folder_of(nodeid) == ALONE else nodeid.partition("::")[0]

    return ByFile(config, log)


def folder_of(nodeid: str) -> str:
    """The folder of a test under tests/."""
    return nodeid.partition("tests/")[2].partition("/")[0]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models' root: two tiny models with random weights. Tests that need more put it there."""
    folder = tmp_path_factory.mktemp("models")
    for tiny in (FLUX, SD3):
        tiny.save(folder)
    return folder

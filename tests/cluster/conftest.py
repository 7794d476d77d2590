"""The cluster that the tests of this folder share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import read_golden
from ray_cluster import GOLDENS, QUIET, Cluster


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A cluster of two hosts with two CPUs each."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'taco-dit[ray]'")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in QUIET.items():
            patch.setenv(name, value)
        made = Cluster()
        try:
            yield made
        finally:
            made.close()


@pytest.fixture(scope="module")
def goldens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the goldens' models."""
    folder = tmp_path_factory.mktemp("goldens")
    for name in GOLDENS:
        read_golden(name).save(folder / f"{name}.safetensors")
    return folder

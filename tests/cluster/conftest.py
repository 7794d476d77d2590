"""The cluster that the tests of this folder share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from ray_cluster import QUIET, Cluster


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

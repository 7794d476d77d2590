"""The ranks come to different ends of one step: none is believed, all are replaced, the step runs again."""

from __future__ import annotations

import pytest
from helpers import FLUX, SD3, Daemon

from tacod_client import Client, OutOfMemory

from .conftest import Inject


def test_one_raises_after_the_last_block(sturdy: Daemon, client: Client, inject: Inject) -> None:
    """Rank 0 has its result by then, and it may not be used."""
    model = client.load(FLUX.file)
    inject(kind="raise", rank=1, when="after")
    begin = len(sturdy.log)
    FLUX.check(model)
    assert model.stats.retries == 1
    assert "rank 1 (cpu:1) raised:" in sturdy.log[begin:]


def test_one_fails_where_the_other_does_not(sturdy: Daemon, client: Client, inject: Inject) -> None:
    """What the one lacked is what the client hears, of weights that lie as asked."""
    model = client.load(SD3.file, weights="replicated")
    inject(kind="out_of_memory", rank=1, when="after")
    begin = len(sturdy.log)
    with pytest.raises(OutOfMemory, match="GiB"):
        SD3.check(model)
    assert "the ranks disagree about one work item (rank 0: done; rank 1: failed)" in sturdy.log[begin:]

"""A rank ends by itself, by a segmentation fault or an exit: found at once, replaced, the same tensor."""

from __future__ import annotations

import pytest
from helpers import FLUX, Daemon

from tacod_client import Client

from .conftest import Inject


@pytest.mark.parametrize(
    ("kind", "rank", "words"),
    [
        ("segfault", 1, ["was killed by SIGSEGV", "Fatal Python error: Segmentation fault", "string_at"]),
        ("exit", 0, ["exited with code 3"]),
    ],
)
def test_in_a_forward(sturdy: Daemon, client: Client, inject: Inject, kind: str, rank: int, words: list[str]) -> None:
    model = client.load(FLUX.file)
    victim = sturdy.rank_pids()[rank]
    inject(kind=kind, rank=rank)
    begin = len(sturdy.log)
    FLUX.check(model)
    assert model.stats.retries == 1
    log = sturdy.log[begin:]
    # The other rank's exchange broke off too; what is told is the cause.
    assert f"rank {rank} (cpu:{rank}, pid {victim}) {words[0]}" in log
    assert all(each in log for each in words)

"""A rank ends by itself, by a segmentation fault or an exit: found at once, replaced, the same tensor."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import FLUX, FP32, Daemon, animas_text, read_golden, relative_error

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


def test_in_a_call(sturdy: Daemon, client: Client, inject: Inject, models: Path) -> None:
    """What a network does outside of a forward is done again, too."""
    read_golden("anima").save(models / "anima_crash.safetensors")
    model = client.load("anima_crash.safetensors")
    inject(kind="exit", at="call", rank=1)
    restarts = client.status()["group"]["restarts"]
    given, expected = animas_text()
    assert relative_error(model.call("preprocess_text_embeds", **given), expected) <= FP32
    assert client.status()["group"]["restarts"] == restarts + 1
    client.unload(model.id)

"""When a forward is where, as benchmarks/hops.py tells it from notes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def hops(monkeypatch: pytest.MonkeyPatch) -> object:
    """The program as a module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import hops

    yield hops
    del sys.modules["hops"]


def test_messages_beside_a_call_count_for_nothing(hops: object, tmp_path: Path) -> None:
    """A client that waits for long pings, and after a call there is talk of other things."""
    names = list(hops.HOPS)
    notes = []
    for call in range(3):
        begin = call * 2_000_000_000
        notes += [(begin + number * 1_000_000, number) for number in range(len(names))]
        for name in ("taken in", "checked and queued", "noted", "back"):
            for at in (510_000_000, 1_900_000_000):
                notes.append((begin + at, names.index(name)))
        # Of this one the answer came later.
        for name in names[names.index("answered by all ranks") :]:
            notes.append((begin + 600_000_000 + names.index(name) * 1_000_000, names.index(name)))
    for number, (at, hop) in enumerate(notes):
        with (tmp_path / str(number % 3)).open("a") as file:
            file.write(f"{at} {hop}\n")
    told = hops.read(tmp_path, 0, 6_000_000_000)
    assert list(told) == names
    answered = names.index("answered by all ranks")
    assert [told[name] for name in names[:answered]] == list(range(answered))
    assert all(told[name] >= 600 for name in names[answered:])
    times = list(told.values())
    assert times == sorted(times)

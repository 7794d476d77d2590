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
    numbers = {name: number for number, name in enumerate(hops.HOPS)}
    names = [name for name in numbers if name not in ("completed", "back")]
    notes = []
    for call in range(3):
        begin = call * 2_000_000_000
        notes += [(begin + place * 1_000_000, numbers[name]) for place, name in enumerate(names)]
        for name in ("taken in", "checked and queued", "noted", "answer back"):
            for at in (510_000_000, 1_900_000_000):
                notes.append((begin + at, numbers[name]))
        # Of this one the answer came later.
        for name in names[names.index("answered by all ranks") :]:
            notes.append((begin + 600_000_000 + numbers[name] * 1_000_000, numbers[name]))
    told = read(hops, tmp_path, notes)
    assert list(told) == names
    answered = names.index("answered by all ranks")
    assert [told[name] for name in names[:answered]] == list(range(answered))
    assert all(told[name] >= 600 for name in names[answered:])
    times = list(told.values())
    assert times == sorted(times)


def test_the_answer_behind_a_completion_is_that_of_its_call(
    hops: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It comes when the next call is under way."""
    numbers = {name: number for number, name in enumerate(hops.HOPS)}
    way = [name for name in numbers if name not in (*hops.ANSWER, "answer back")]
    notes = []
    for call in range(3):
        begin = call * 450_000_000
        notes += [(begin + place * 40_000_000, numbers[name]) for place, name in enumerate(way)]
        completed = begin + way.index("completed") * 40_000_000
        for place, name in enumerate((*hops.ANSWER, "answer back")):
            notes.append((completed + 500_000 + place * 40_000_000, numbers[name]))
    told = read(hops, tmp_path, notes)
    assert set(told) == {*way, *hops.ANSWER}
    assert [told[name] for name in way] == [40 * place for place in range(len(way))]
    behind = [told[name] - told["completed"] for name in hops.ANSWER]
    assert behind == [0.5 + 40 * place for place in range(len(behind))]
    assert told["noted"] > 450, "the next call has begun"
    hops.show(told)
    shown = [line.split()[-1] for line in capsys.readouterr().out.splitlines()[1:]]
    assert shown == ["0.000", *["40.000"] * (len(way) - 1), "0.500", *["40.000"] * (len(behind) - 1)]


def read(hops: object, folder: Path, notes: list[tuple[int, int]]) -> dict[str, float]:
    """What is told of three calls by these notes, which several processes have made."""
    for number, (at, hop) in enumerate(notes):
        with (folder / str(number % 3)).open("a") as file:
            file.write(f"{at} {hop}\n")
    told: dict[str, float] = hops.read(folder, 0, 6_000_000_000)
    return told

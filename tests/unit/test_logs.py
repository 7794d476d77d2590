"""Log lines: priorities for journald, times for a terminal."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator

import pytest

from tacod import logs

log = logging.getLogger("tacod.test")


@pytest.fixture(autouse=True)
def _root_logger_is_restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture
def journal(monkeypatch: pytest.MonkeyPatch) -> None:
    """As systemd starts a service."""
    monkeypatch.setenv("JOURNAL_STREAM", "8:12345")


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a shell starts a program."""
    monkeypatch.delenv("JOURNAL_STREAM", raising=False)


@pytest.mark.usefixtures("journal")
def test_journal_gets_each_level_with_its_priority(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("debug")
    for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR, logging.CRITICAL):
        log.log(level, "said %d", level)
    assert capsys.readouterr().err.splitlines() == [
        "<7>said 10",
        "<6>said 20",
        "<4>said 30",
        "<3>said 40",
        "<2>said 50",
    ]


@pytest.mark.usefixtures("journal")
def test_every_line_of_a_traceback_has_its_priority(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info")
    try:
        raise ValueError("broken")
    except ValueError:
        log.exception("failed")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "<3>failed"
    assert lines[-1] == "<3>ValueError: broken"
    assert all(line.startswith("<3>") for line in lines)


@pytest.mark.usefixtures("journal")
def test_prefix_tells_ranks_apart(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", prefix="rank 2: ")
    log.info("ready")
    assert capsys.readouterr().err == "<6>rank 2: ready\n"


@pytest.mark.usefixtures("terminal")
def test_terminal_gets_time_and_level(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", prefix="rank 2: ")
    log.warning("slow")
    assert re.fullmatch(r"\d\d:\d\d:\d\d\.\d{3} WARNING rank 2: slow\n", capsys.readouterr().err)


@pytest.mark.usefixtures("terminal")
def test_quieter_levels_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("warning")
    log.info("unheard")
    log.error("heard")
    assert "unheard" not in (said := capsys.readouterr().err)
    assert "heard" in said


@pytest.mark.usefixtures("terminal")
def test_configuring_twice_says_things_once(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info")
    logs.configure("info")
    log.info("once")
    assert capsys.readouterr().err.count("once") == 1

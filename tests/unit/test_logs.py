"""Log lines: priorities for journald, times for a terminal."""

from __future__ import annotations

import ast
import contextlib
import itertools
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tacod import logs

log = logging.getLogger("tacod.test")


@pytest.fixture(autouse=True)
def _root_logger_is_restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level, hook = root.handlers[:], root.level, sys.excepthook
    yield
    sys.excepthook = hook
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture
def journal(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """As systemd starts a service."""
    stream = os.fstat(2)
    monkeypatch.setenv("JOURNAL_STREAM", f"{stream.st_dev}:{stream.st_ino}")


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a shell starts a program."""
    # A terminal that a service of the desktop opened inherits the variable.
    monkeypatch.setenv("JOURNAL_STREAM", "8:12345")


@pytest.mark.usefixtures("journal")
def test_journal_gets_each_level_with_its_priority(capfd: pytest.CaptureFixture[str]) -> None:
    logs.configure("debug")
    for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR, logging.CRITICAL):
        log.log(level, "said %d", level)
    assert capfd.readouterr().err.splitlines() == [
        "<7>said 10",
        "<6>said 20",
        "<4>said 30",
        "<3>said 40",
        "<2>said 50",
    ]


@pytest.mark.usefixtures("journal")
def test_every_line_of_a_traceback_has_its_priority(capfd: pytest.CaptureFixture[str]) -> None:
    logs.configure("info")
    try:
        raise ValueError("broken")
    except ValueError:
        log.exception("failed")
    lines = capfd.readouterr().err.splitlines()
    assert lines[0] == "<3>failed"
    assert lines[-1] == "<3>ValueError: broken"
    assert all(line.startswith("<3>") for line in lines)


@pytest.mark.usefixtures("journal")
def test_prefix_tells_ranks_apart(capfd: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", prefix="rank 2: ")
    log.info("ready")
    assert capfd.readouterr().err == "<6>rank 2: ready\n"


@pytest.mark.usefixtures("terminal")
def test_terminal_gets_time_and_level(capfd: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", prefix="rank 2: ")
    log.warning("slow")
    assert re.fullmatch(r"\d\d:\d\d:\d\d\.\d{3} WARNING rank 2: slow\n", capfd.readouterr().err)


@pytest.mark.usefixtures("terminal")
def test_quieter_levels_are_left_out(capfd: pytest.CaptureFixture[str]) -> None:
    logs.configure("warning")
    log.info("unheard")
    log.error("heard")
    assert "unheard" not in (said := capfd.readouterr().err)
    assert "heard" in said


@pytest.mark.usefixtures("terminal")
def test_configuring_twice_says_things_once(capfd: pytest.CaptureFixture[str]) -> None:
    logs.configure("info")
    logs.configure("info")
    log.info("once")
    assert capfd.readouterr().err.count("once") == 1


@pytest.mark.usefixtures("journal")
def test_what_ends_it_is_critical(capfd: pytest.CaptureFixture[str]) -> None:
    logs.configure("info")
    error = ValueError("broken")
    sys.excepthook(ValueError, error, None)
    lines = capfd.readouterr().err.splitlines()
    assert lines == ["<2>ended by an error of its own", "<2>ValueError: broken"]


@pytest.mark.parametrize(("place", "mark"), [("journal", "<3>"), ("terminal", "")])
def test_a_complaint_is_said_as_it_is(
    place: str, mark: str, request: pytest.FixtureRequest, capfd: pytest.CaptureFixture[str]
) -> None:
    request.getfixturevalue(place)
    logs.complain("config.toml:a: unknown\nconfig.toml:b: unknown")
    assert capfd.readouterr().err == f"{mark}config.toml:a: unknown\n{mark}config.toml:b: unknown\n"


@pytest.mark.parametrize("closed", [numbers for n in range(4) for numbers in itertools.combinations(range(3), n)])
def test_closed_streams_lead_nowhere_for_children_too(closed: tuple[int, ...], tmp_path: Path) -> None:
    """Else a socket or a file would get their numbers, and what is printed would go there."""
    told = tmp_path / "told"
    code = (
        "import os, subprocess, sys; from tacod import logs; from tacod_client import streams;"
        "streams.hold(); print('out'); logs.complain('err');"
        "sys.stdin.read(); sys.stdout.flush(); file = open(sys.argv[1], 'w'); assert file.fileno() > 2;"
        "child = [sys.executable, '-c', 'import os; [os.fstat(n) for n in range(3)]'];"
        "file.write(str([subprocess.call(child), [os.path.realpath(f'/proc/self/fd/{n}') for n in range(3)]]))"
    )
    run = f'exec "$0" "$@" {" ".join(f"{number}>&-" for number in closed)}'
    done = subprocess.run(
        ["sh", "-c", run, sys.executable, "-c", code, str(told)],
        input=b"in",
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    code, paths = ast.literal_eval(told.read_text())
    assert code == 0
    assert [path == os.devnull for path in paths] == [number in closed for number in range(3)]
    assert done.stdout == (b"" if 1 in closed else b"out\n")
    assert done.stderr == (b"" if 2 in closed else b"err\n")


@pytest.mark.parametrize("closed", ["2>&-", "0<&- 1>&- 2>&-", ""])
def test_a_complaint_takes_any_text(closed: str) -> None:
    code = "from tacod import logs; from tacod_client import streams; streams.hold(); logs.complain('a \\udcff 模');"
    code += "print('b \\udcff 模')"
    run = f'exec "$0" "$@" {closed}'
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = ["sh", "-c", run, sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == (b"" if closed else b"a \\udcff \\u6a21\n")
    assert done.stdout == (b"" if "1>&-" in closed else b"b \\udcff \\u6a21\n")


def test_complaints_that_nobody_can_read_are_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stderr", full)
        logs.complain("no room")
        monkeypatch.undo()
        with contextlib.suppress(OSError):
            full.close()

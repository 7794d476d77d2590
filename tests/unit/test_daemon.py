"""The command ``tacod``, as far as it goes without ranks: its options, its exit codes, its endpoint."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tacod import __version__, daemon
from tacod.config import load_config


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A sound configuration."""
    path = tmp_path / "config.toml"
    path.write_text(f'endpoint = "ipc://{tmp_path}/t.sock"\n[group]\ndevice = "cpu"\n')
    return path


def test_check_config_says_ok(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert daemon.main(["--config", str(config), "--check-config"]) == 0
    assert capsys.readouterr().out == f"{config}: ok\n"


@pytest.mark.parametrize("option", ["--check-config", "--print-config", "--log-level=debug"])
def test_bad_config_exits_with_78_and_says_why(config: Path, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    config.write_text("colour = 1\n")
    assert daemon.main(["--config", str(config), option]) == 78
    told = capsys.readouterr()
    assert told.err.startswith(f"{config}:colour: unknown key")
    assert told.out == ""


def test_missing_config_exits_with_78(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert daemon.main(["--config", str(tmp_path / "none.toml")]) == 78
    assert "pass --config FILE" in capsys.readouterr().err


def test_print_config_prints_what_it_reads(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert daemon.main(["--config", str(config), "--print-config"]) == 0
    printed = capsys.readouterr().out
    known = load_config(config)
    config.write_text(printed)
    assert load_config(config) == known
    assert "step_timeout_s = 120.0" in printed


def test_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        daemon.main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"tacod {__version__}\n"


@pytest.mark.parametrize("arguments", [["--colour"], ["--log-level", "loud"], ["extra"]])
def test_bad_usage_exits_with_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        daemon.main(arguments)
    assert caught.value.code == 2


def test_preload_outside_the_roots_exits_with_78(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(daemon.logs, "configure", lambda level: None)
    monkeypatch.setenv("TACOD_LOG_LEVEL", "info")
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.chdir(config.parent)
    config.write_text(config.read_text() + '[models]\npreload = ["/etc/passwd"]\n')
    assert daemon.main(["--config", str(config)]) == 78
    assert f"{config}:models.preload: /etc/passwd lies outside models.roots" in capsys.readouterr().err
    assert [path.name for path in config.parent.iterdir()] == ["config.toml"], "nothing is left at the endpoint"


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ('endpoint = "ipc://{path}"', "endpoint"),
        ('endpoint = "ipc://{path}/t.sock"', "endpoint"),
        ('[metrics]\nlisten = "unix:{path}"', "metrics.listen"),
        ('[metrics]\nlisten = "unix:{path}/m.sock"', "metrics.listen"),
        ('[models]\nuploads = "{path}"', "models.uploads"),
        ('[models]\nuploads = "{path}/deep/uploads"', "models.uploads"),
    ],
)
@pytest.mark.parametrize("options", [["--check-config"], []], ids=["checked", "started"])
def test_a_path_that_is_taken_is_refused_with_what_is_there(
    tmp_path: Path,
    section: str,
    key: str,
    options: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(daemon.logs, "configure", lambda level: None)
    monkeypatch.setenv("TACOD_LOG_LEVEL", "info")
    theirs, config = tmp_path / "theirs", tmp_path / "config.toml"
    theirs.write_text("years of work")
    own = "" if key == "endpoint" else f'endpoint = "ipc://{tmp_path}/own.sock"\n'
    config.write_text(own + section.format(path=theirs) + '\n[group]\ndevice = "cpu"\n')
    assert daemon.main(["--config", str(config), *options]) == 78
    told = capsys.readouterr().err
    assert told.startswith(f"{config}:{key}: {theirs}")
    assert "a regular file" in told
    assert theirs.read_text() == "years of work"
    assert sorted(tmp_path.iterdir()) == [config, theirs], "nothing else is left"


def test_the_folder_of_the_start_is_left_and_modules_are_found_still(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "client::/elsewhere")
    daemon._leave_the_folder()
    assert Path.cwd() == Path("/")
    assert os.environ["PYTHONPATH"] == f"{tmp_path}/client:{tmp_path}:/elsewhere"


def test_a_checkout_that_python_m_ran_in_is_where_ranks_look_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkout = str(Path(daemon.__file__).parents[1])
    monkeypatch.setattr(sys, "path", [checkout, *sys.path])
    monkeypatch.chdir(checkout)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setenv("PYTHONPATH", "")
    daemon._leave_the_folder()
    assert os.environ["PYTHONPATH"] == checkout


def test_a_folder_that_is_gone_already_is_left_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gone").mkdir()
    os.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    monkeypatch.setenv("PYTHONPATH", "client")
    daemon._leave_the_folder()
    assert Path.cwd() == Path("/")

"""The command ``tacod``, as far as it goes without ranks: its options, its exit codes, its endpoint."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tacod import __version__, daemon
from tacod.config import ConfigError, load_config


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
    config.write_text(config.read_text() + '[models]\npreload = ["/etc/passwd"]\n')
    assert daemon.main(["--config", str(config)]) == 78
    assert f"{config}:models.preload: /etc/passwd lies outside models.roots" in capsys.readouterr().err
    assert [path.name for path in config.parent.iterdir()] == ["config.toml"], "nothing is left at the endpoint"


def test_endpoint_is_held_by_one_and_named_to_the_other(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "t.sock"
    with daemon._endpoint(path) as folder:
        assert folder.stat().st_mode & 0o777 == 0o700
        with pytest.raises(ConfigError, match=rf"pid {os.getpid()} already serves {path}"), daemon._endpoint(path):
            pytest.fail("two hold one endpoint")
        assert folder.is_dir()
    assert list(path.parent.iterdir()) == []


def test_leavings_of_a_killed_daemon_are_cleared(tmp_path: Path) -> None:
    path = tmp_path / "t.sock"
    (tmp_path / "t.sock.d").mkdir()
    (tmp_path / "t.sock.d" / "rendezvous-0").touch()
    (tmp_path / "t.sock.lock").write_text("99999999\n")
    path.touch()
    with daemon._endpoint(path) as folder:
        assert list(folder.iterdir()) == []
        assert (tmp_path / "t.sock.lock").read_text() == f"{os.getpid()}\n"
    assert list(tmp_path.iterdir()) == []

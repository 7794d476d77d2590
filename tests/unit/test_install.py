"""tacoctl install-service: what it puts in place, what it keeps, what it takes away; and the unit itself."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tacod.config import load_config
from tacod_client import NotAllowed, TacodError
from tacod_client.cli import main
from tacod_client.cli.install import CONFIG, RECORD, UNIT, Service, check_readable, install, uninstall

SOURCE = Path(__file__).parents[2] / "systemd"
TACOD = "/opt/tacod/bin/tacod"


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture(autouse=True)
def _anyone_may_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tacod_client.cli.install.check_readable", lambda command: None)


def files(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_installed_and_taken_away(tmp_path: Path, said: list[str]) -> None:
    install(Service(tmp_path, False, said.append), ["3", "4", "GPU-12ab"], TACOD)
    here = files(tmp_path)
    assert {UNIT, CONFIG, RECORD, "etc/sysusers.d/tacod.conf", "etc/tmpfiles.d/tacod.conf"} < set(here)
    assert f"ExecStart={TACOD} --config /etc/tacod/config.toml" in here[UNIT]
    assert "/usr/bin/tacod" not in "".join(here.values())
    assert load_config(tmp_path / CONFIG).group.gpus == [3, 4, "GPU-12ab"]
    for path in here:
        assert path == RECORD or any(str(tmp_path / path) in line for line in said), "it says what it did"
    uninstall(Service(tmp_path, False, said.append))
    assert files(tmp_path) == {}


def test_a_dry_run_changes_nothing(tmp_path: Path, said: list[str]) -> None:
    install(Service(tmp_path, True, said.append), None, TACOD)
    assert files(tmp_path) == {}
    assert f"would write {tmp_path / UNIT}" in said
    install(Service(tmp_path, False, said.append), None, TACOD)
    before = files(tmp_path)
    uninstall(Service(tmp_path, True, said.append))
    assert files(tmp_path) == before


def test_an_edited_configuration_is_kept(tmp_path: Path, said: list[str]) -> None:
    install(Service(tmp_path, False, said.append), None, TACOD)
    edited = (tmp_path / CONFIG).read_text().replace("roots = []", 'roots = ["/data"]')
    (tmp_path / CONFIG).write_text(edited)
    install(Service(tmp_path, False, said.append), ["0"], TACOD)
    assert (tmp_path / CONFIG).read_text() == edited
    assert load_config(tmp_path / f"{CONFIG}.new").group.gpus == [0]
    assert f"kept     {tmp_path / CONFIG} (edited)" in said
    uninstall(Service(tmp_path, False, said.append))
    assert files(tmp_path) == {CONFIG: edited}


def test_an_unedited_configuration_is_brought_up_to_date(tmp_path: Path, said: list[str]) -> None:
    install(Service(tmp_path, False, said.append), None, TACOD)
    install(Service(tmp_path, False, said.append), ["1"], TACOD)
    assert load_config(tmp_path / CONFIG).group.gpus == [1]
    assert not (tmp_path / f"{CONFIG}.new").exists()


def test_nothing_to_take_away(tmp_path: Path, said: list[str]) -> None:
    with pytest.raises(TacodError, match="nothing of tacod's is recorded"):
        uninstall(Service(tmp_path, False, said.append))


def test_the_running_system_needs_root(monkeypatch: pytest.MonkeyPatch, said: list[str]) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(NotAllowed, match="sudo"):
        Service(Path("/"), False, said.append)
    assert Service(Path("/"), True, said.append).live


def test_an_environment_that_only_root_may_read_is_refused(tmp_path: Path) -> None:
    hidden = tmp_path / "hidden"
    hidden.mkdir(mode=0o700)
    (hidden / "tacod").touch(mode=0o755)
    for parent in (tmp_path, *tmp_path.parents[:-2]):
        parent.chmod(parent.stat().st_mode | 0o011)
    with pytest.raises(TacodError, match=rf"{hidden} is not open to the user tacod \(mode 700\)"):
        check_readable(hidden / "tacod")


def test_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["install-service", "--prefix", str(tmp_path), "--gpus", "3, 4,5"]
    assert main([*arguments, "--dry-run"]) == 0
    assert "would write" in capsys.readouterr().out
    assert main(arguments) == 0
    assert f"ExecStart={Path(sys.executable).parent / 'tacod'} " in (tmp_path / UNIT).read_text()
    assert main(["install-service", "--prefix", str(tmp_path), "--uninstall"]) == 0
    assert main(["install-service", "--prefix", str(tmp_path), "--uninstall"]) == 1


def test_the_shipped_configuration_can_be_used() -> None:
    assert load_config(SOURCE / "config.toml").endpoint == "ipc:///run/tacod/tacod.sock"


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    path = tmp_path / "tacod.service"
    path.write_text((SOURCE / "tacod.service").read_text().replace("/usr/bin/tacod", "/bin/true"))
    return path


def test_systemd_finds_no_fault(unit: Path) -> None:
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.parametrize("example", sorted((SOURCE / "examples").glob("*.conf")), ids=lambda path: path.stem)
def test_systemd_finds_no_fault_with_each_example(unit: Path, example: Path) -> None:
    folder = unit.parent / "tacod.service.d"
    folder.mkdir()
    (folder / example.name).write_text(example.read_text().replace("/usr/bin/tacod", "/bin/true"))
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_the_service_is_exposed_to_little(unit: Path) -> None:
    command = ["systemd-analyze", "security", "--offline=true", "--no-pager", unit]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    level = re.search(r"Overall exposure level for tacod.service: ([\d.]+)", done.stdout)
    assert level is not None, done.stderr
    assert float(level[1]) <= 2.0

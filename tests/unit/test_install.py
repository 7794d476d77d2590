"""tacoctl install-service: what it puts in place, what it keeps, what it takes away; and the unit itself."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from made_up_networks import COMFYUI

from tacod.config import load_config
from tacod_client import NotAllowed, RequestError, TacodError
from tacod_client.cli import main
from tacod_client.cli.install import CONFIG, RECORD, UNIT, Service, _quoted, check_readable, install, uninstall

SOURCE = Path(__file__).parents[2] / "systemd"
TACOD = Path(sys.executable).parent / "tacod"


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def service(tmp_path: Path, said: list[str]) -> Callable[..., Service]:
    """The service under a folder, as a command finds it."""

    def find(dry_run: bool = False) -> Service:
        return Service(tmp_path, dry_run, said.append)

    return find


@pytest.fixture(autouse=True)
def _anyone_may_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests may run from a folder that is root's alone."""
    monkeypatch.setattr("tacod_client.cli.install.check_readable", lambda path: None)


def tree(folder: Path) -> dict[str, str | None]:
    """Everything under a folder: files with what is in them, and folders."""
    return {str(path.relative_to(folder)): path.read_text() if path.is_file() else None for path in folder.rglob("*")}


def test_installed_and_taken_away(tmp_path: Path, said: list[str], service: Callable[..., Service]) -> None:
    (tmp_path / "etc").mkdir()
    before = tree(tmp_path)
    install(service(), ["3", "4", "GPU-12ab"])
    here = {path: text for path, text in tree(tmp_path).items() if text is not None}
    assert {UNIT, CONFIG, RECORD, "etc/sysusers.d/tacod.conf", "etc/tmpfiles.d/tacod.conf"} < set(here)
    assert {f"etc/tacod/examples/{path.name}" for path in (SOURCE / "examples").iterdir()} < set(here)
    assert f"ExecStart={TACOD} --config /etc/tacod/config.toml" in here[UNIT]
    assert "/usr/bin/tacod" not in "".join(here.values())
    assert load_config(tmp_path / CONFIG).groups[0].gpus == [3, 4, "GPU-12ab"]
    for path in here:
        assert path == RECORD or f"wrote    {tmp_path / path}" in said, "it says what it did"
    uninstall(service())
    assert tree(tmp_path) == before
    for path in here:
        assert path == RECORD or f"removed  {tmp_path / path}" in said, "it says what it did"


def test_the_comfyui_whose_networks_run(tmp_path: Path, service: Callable[..., Service]) -> None:
    """It stays when the service is installed again without a word of it."""
    install(service(), ["3"], str(COMFYUI))
    assert load_config(tmp_path / CONFIG).comfyui.path == str(COMFYUI)
    install(service(), ["4"])
    config = load_config(tmp_path / CONFIG)
    assert (config.comfyui.path, config.groups[0].gpus) == (str(COMFYUI), [4])
    for path in ("comfy", str(tmp_path), str(COMFYUI / "comfy")):
        with pytest.raises(RequestError, match="is no ComfyUI; give the absolute path"):
            install(service(), None, path)


def test_what_others_put_there_stays(tmp_path: Path, service: Callable[..., Service]) -> None:
    install(service())
    (tmp_path / "etc/tacod/clients").mkdir()
    (tmp_path / "etc/systemd/system/other.service").write_text("theirs")
    uninstall(service())
    left = {path: text for path, text in tree(tmp_path).items() if path != "etc"}
    assert left == {
        "etc/tacod": None,
        "etc/tacod/clients": None,
        "etc/systemd": None,
        "etc/systemd/system": None,
        "etc/systemd/system/other.service": "theirs",
    }


def test_a_dry_run_changes_nothing(tmp_path: Path, said: list[str], service: Callable[..., Service]) -> None:
    install(service(dry_run=True))
    assert tree(tmp_path) == {}
    assert f"would write {tmp_path / UNIT}" in said
    install(service())
    before = tree(tmp_path)
    (tmp_path / CONFIG).write_text("endpoint = 'ipc:///run/mine'\n")
    edited = tree(tmp_path)
    install(service(dry_run=True), ["3"])
    uninstall(service(dry_run=True))
    assert tree(tmp_path) == edited != before


@pytest.mark.parametrize("path", [UNIT, CONFIG, "etc/sysusers.d/tacod.conf"])
def test_what_was_edited_is_kept(tmp_path: Path, path: str, said: list[str], service: Callable[..., Service]) -> None:
    install(service())
    edited = (tmp_path / path).read_text() + "# mine\n"
    (tmp_path / path).write_text(edited)
    install(service(), ["0"])
    assert (tmp_path / path).read_text() == edited
    assert (tmp_path / f"{path}.new").is_file()
    assert f"kept     {tmp_path / path} (edited); the new one goes beside it" in said
    uninstall(service())
    assert {each: text for each, text in tree(tmp_path).items() if text is not None} == {path: edited}


def test_a_configuration_that_was_there_before_is_kept(tmp_path: Path, service: Callable[..., Service]) -> None:
    (tmp_path / CONFIG).parent.mkdir(parents=True)
    (tmp_path / CONFIG).write_bytes(b"# caf\xe9\n")
    install(service(), ["0"])
    assert (tmp_path / CONFIG).read_bytes() == b"# caf\xe9\n"
    assert load_config(tmp_path / f"{CONFIG}.new").groups[0].gpus == [0]


def test_an_unedited_configuration_is_brought_up_to_date(tmp_path: Path, service: Callable[..., Service]) -> None:
    install(service())
    install(service(), ["1"])
    assert load_config(tmp_path / CONFIG).groups[0].gpus == [1]
    install(service())
    assert load_config(tmp_path / CONFIG).groups[0].gpus == [1], "an upgrade doesn't take other GPUs"
    assert not (tmp_path / f"{CONFIG}.new").exists()


@pytest.mark.parametrize("gpu", ["x", "-1", "3]", "GPU-12 34", "³"])
def test_what_names_no_gpu_is_refused(tmp_path: Path, gpu: str, service: Callable[..., Service]) -> None:
    with pytest.raises(RequestError, match="names no GPU"):
        install(service(), ["0", gpu])
    assert tree(tmp_path) == {}


def test_nothing_to_take_away(service: Callable[..., Service]) -> None:
    with pytest.raises(TacodError, match="nothing of tacod's is recorded"):
        uninstall(service())


@pytest.mark.parametrize("text", ["", "[]", '{"files": 3, "folders": []}', '{"folders": []}'])
def test_a_record_that_is_none(tmp_path: Path, text: str, service: Callable[..., Service]) -> None:
    (tmp_path / RECORD).parent.mkdir(parents=True)
    (tmp_path / RECORD).write_text(text)
    with pytest.raises(TacodError, match="can't be read as a record; remove it"):
        service()


def test_a_file_in_the_way_is_named(tmp_path: Path, said: list[str], service: Callable[..., Service]) -> None:
    (tmp_path / "etc").write_text("a file")
    with pytest.raises(TacodError, match=str(tmp_path / "etc")):
        install(service())
    assert said == []


def test_the_running_system_needs_root(monkeypatch: pytest.MonkeyPatch, said: list[str]) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(NotAllowed, match=f"sudo {TACOD.parent}/tacoctl install-service"):
        Service(Path("/"), False, said.append)
    assert Service(Path("/"), True, said.append).live


def test_the_running_system_needs_systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr("tacod_client.cli.install.BOOTED", tmp_path / "nowhere")
    with pytest.raises(TacodError, match="systemd doesn't run here"):
        Service(Path("/"), False, said.append)


def test_an_environment_without_the_daemon_is_refused(
    monkeypatch: pytest.MonkeyPatch, service: Callable[..., Service]
) -> None:
    monkeypatch.setattr("tacod_client.cli.install.NEEDED", ("tacod", "no_such_module"))
    with pytest.raises(TacodError, match=r"missing: no_such_module.*pip install 'taco-dit\[daemon\]'"):
        install(service(dry_run=True))


def test_an_environment_that_only_root_may_read_is_refused(tmp_path: Path) -> None:
    for parent in (tmp_path, *tmp_path.parents[:-2]):
        parent.chmod(parent.stat().st_mode | 0o011)
    hidden = tmp_path / "hidden"
    hidden.mkdir(mode=0o700)
    (hidden / "tacod").touch(mode=0o755)
    link = tmp_path / "tacod"
    link.symlink_to(hidden / "tacod")
    for path in (hidden / "tacod", link):
        with pytest.raises(TacodError, match=rf"{hidden} is not open to the user tacod \(mode 700\)"):
            check_readable(path)
    hidden.chmod(0o711)
    check_readable(link)


@pytest.mark.parametrize("name", ['a "b"', "it's", "a\\b", "a\nb"])
def test_a_path_that_systemd_would_not_run_is_refused(name: str) -> None:
    with pytest.raises(TacodError, match="systemd runs no command"):
        _quoted(Path("/opt") / name / "tacod")


def test_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["install-service", "--prefix", str(tmp_path / "new"), "--gpus", "3, 4,5"]
    assert main([*arguments, "--dry-run"]) == 0
    assert "would write" in capsys.readouterr().out
    assert main(arguments) == 0
    assert main([*arguments, "--uninstall"]) == 0
    assert tree(tmp_path) == {"new": None}
    assert main([*arguments, "--uninstall"]) == 1


def test_needs_no_torch() -> None:
    code = "import sys, tacod_client.cli.install; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_shipped_configuration_can_be_used() -> None:
    assert load_config(SOURCE / "config.toml").endpoint == "ipc:///run/tacod/tacod.sock"


def test_what_the_shipped_configuration_leaves_out_can_be_put_in(tmp_path: Path) -> None:
    text = re.sub(r"^# (\w+ = )", r"\1", (SOURCE / "config.toml").read_text(), flags=re.MULTILINE)
    (tmp_path / "config.toml").write_text(text)
    config = load_config(tmp_path / "config.toml")
    assert config.groups[0].gpus == [3, 4, 5]
    assert config.models.preload


@pytest.mark.parametrize("example", sorted((SOURCE / "examples").glob("*.conf")), ids=lambda path: path.stem)
def test_the_configuration_that_an_example_wants_can_be_used(tmp_path: Path, example: Path) -> None:
    wanted = "".join(re.findall(r"^#     (?:# )?(.*\n)", example.read_text(), re.MULTILINE))
    (tmp_path / "config.toml").write_text((SOURCE / "config.toml").read_text() + wanted)
    assert (load_config(tmp_path / "config.toml").curve is not None) == (example.stem == "tcp")


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed; on Debian and Ubuntu: apt install systemd")
    path = tmp_path / "tacod.service"
    path.write_text((SOURCE / "tacod.service").read_text().replace("/usr/bin/tacod", "/bin/true"))
    return path


def test_systemd_finds_no_fault(unit: Path) -> None:
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.parametrize("name", ["env", "an env", "100%", "ünï; $HOME #(1)"])
def test_systemd_reads_the_path_as_it_is(unit: Path, tmp_path: Path, name: str) -> None:
    command = tmp_path / name / "tacod"
    command.parent.mkdir()
    command.symlink_to("/bin/true")
    unit.write_text(unit.read_text().replace("ExecStart=/bin/true", f"ExecStart={_quoted(command)}"))
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    command.unlink()
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False)
    assert f"Command {command} is not executable" in done.stderr, "it was that path that was looked at"


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

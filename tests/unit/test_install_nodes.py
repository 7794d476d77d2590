"""tacoctl install-nodes: what it links, what it refuses, what it says is missing, and what it takes away."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tacod_client import NotAllowed, RequestError, TacodError, __version__
from tacod_client.cli import main
from tacod_client.cli import nodes as install_nodes
from tacod_client.cli.nodes import LINK, OLDEST, PROBE, ComfyUI, install, uninstall

SOURCE = Path(__file__).parents[2] / "comfy_nodes"
COMPLETE = {
    "client": __version__,
    "error": None,
    "nodes": None,
    "needs": ["msgpack>=1.0.5"],
    "versions": {"msgpack": "1.1.0", "taco-dit": __version__, "comfyui-frontend-package": "1.40.0"},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that looks like ComfyUI's."""
    folder = tmp_path / "ComfyUI"
    (folder / "comfy").mkdir(parents=True)
    (folder / "custom_nodes").mkdir()
    (folder / "main.py").touch()
    (folder / "comfyui_version.py").write_text('__version__ = "0.33.0"\n')
    return folder


@pytest.fixture
def answers(folder: Path) -> Callable[..., Path]:
    """Give ComfyUI a Python that answers as one with all that is needed would, but for some of it."""

    def answer(**changes: Any) -> Path:
        python = folder / "venv" / "bin" / "python"
        python.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({**COMPLETE, **changes}).replace("'", "'\\''")
        python.write_text(f"#!/bin/sh\necho 'a line of some other package'\necho '{text}'\n")
        python.chmod(0o755)
        return python

    return answer


@pytest.fixture
def comfyui(folder: Path, answers: Callable[..., Path]) -> ComfyUI:
    return ComfyUI(folder, answers())


@pytest.fixture(autouse=True)
def _no_comfyui_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    monkeypatch.delenv("COMFYUI_PYTHON", raising=False)


def ignore(line: str) -> None:
    pass


def test_linked_again_and_removed(comfyui: ComfyUI) -> None:
    said: list[str] = []
    assert install(comfyui, False, said.append) == []
    assert comfyui.link.readlink() == SOURCE
    assert install(comfyui, False, said.append) == []
    uninstall(comfyui, False, said.append)
    assert [line.split()[0] for line in said] == ["linked", "there", "removed", "kept"]
    assert list((comfyui.folder / "custom_nodes").iterdir()) == []
    with pytest.raises(TacodError, match="isn't there"):
        uninstall(comfyui, False, ignore)


def test_dry_run_changes_nothing(comfyui: ComfyUI) -> None:
    said: list[str] = []
    install(comfyui, True, said.append)
    assert not os.path.lexists(comfyui.link)
    install(comfyui, False, ignore)
    uninstall(comfyui, True, said.append)
    assert comfyui.link.is_symlink()
    assert [line.split()[:2] for line in said[:2]] == [["would", "link"], ["would", "remove"]]


def test_nodes_are_those_of_comfyuis_own_client(comfyui: ComfyUI, answers: Callable[..., Path], tmp_path: Path) -> None:
    own = tmp_path / "site-packages" / "tacod_client" / "comfy_nodes"
    own.mkdir(parents=True)
    answers(nodes=str(own))
    install(comfyui, False, ignore)
    assert comfyui.link.readlink() == own
    own.rmdir()  # its environment is gone: the link leads nowhere, and is ours all the same
    answers()
    install(comfyui, False, ignore)
    assert comfyui.link.readlink() == SOURCE


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_what_others_made_is_refused(comfyui: ComfyUI, tmp_path: Path, kind: str) -> None:
    if kind == "folder":
        comfyui.link.mkdir()
    elif kind == "file":
        comfyui.link.touch()
    else:
        comfyui.link.symlink_to(tmp_path)
    for act in (install, uninstall):
        with pytest.raises(NotAllowed, match=rf"{comfyui.link} is .*install-nodes didn't make"):
            act(comfyui, False, ignore)
    assert os.path.lexists(comfyui.link)


def test_nodes_under_another_name_are_refused(comfyui: ComfyUI) -> None:
    other = comfyui.folder / "custom_nodes" / "TACO"
    other.symlink_to(SOURCE)
    with pytest.raises(NotAllowed, match=f"{other} has the TACO-DiT nodes already"):
        install(comfyui, False, ignore)
    assert not os.path.lexists(comfyui.link)
    other.rename(other.with_suffix(".disabled"))
    assert install(comfyui, False, ignore) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"client": None, "error": "no module", "needs": [], "versions": {**COMPLETE["versions"], "taco-dit": None}},
            r"the client is not in (\S+); run `\1 -m pip install \S+`",
        ),
        ({"error": "ImportError: x"}, r"the client can't be imported: ImportError: x; run .*--force-reinstall"),
        ({"client": "0.0.1"}, rf"the client there is 0\.0\.1, and this is {re.escape(__version__)}; run"),
        (
            {"needs": ["msgpack>=1.1.1"]},
            r"has msgpack 1\.1\.0, and the client needs msgpack>=1\.1\.1; run .*'msgpack>=",
        ),
        ({"versions": {**COMPLETE["versions"], "msgpack": None}}, "has no msgpack, and the client needs"),
        ({"versions": {**COMPLETE["versions"], "comfyui-frontend-package": None}}, "another Python.*COMFYUI_PYTHON"),
    ],
)
def test_what_is_missing_is_named(
    comfyui: ComfyUI, answers: Callable[..., Path], changes: dict[str, Any], said: str
) -> None:
    answers(**changes)
    (missing,) = install(comfyui, False, ignore)
    assert re.search(said, missing)
    assert comfyui.link.is_symlink(), "linked all the same: what is missing can come later"


@pytest.mark.parametrize(
    ("text", "said"), [('__version__ = "0.3.63"\n', "0.3.63 is older than 0.3.64"), ("", "tells no version")]
)
def test_an_old_comfyui_is_named(comfyui: ComfyUI, text: str, said: str) -> None:
    (comfyui.folder / "comfyui_version.py").write_text(text)
    (missing,) = install(comfyui, False, ignore)
    assert said in missing


@pytest.mark.parametrize("gone", ["main.py", "comfy", "custom_nodes"])
def test_a_folder_that_is_no_comfyui_is_refused(folder: Path, gone: str) -> None:
    (folder / gone).rename(folder / "elsewhere")
    with pytest.raises(RequestError, match=f"{folder} is no ComfyUI: it has no {gone}"):
        ComfyUI.find(str(folder))


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("exit 3", "ended with 3: it printed nothing"),
        ("echo broken >&2", "ended with 0: broken"),
        ("echo '{'", "ended"),
    ],
)
def test_a_python_that_gives_no_answer_is_refused(comfyui: ComfyUI, script: str, said: str) -> None:
    comfyui.python.write_text(f"#!/bin/sh\n{script}\n")
    with pytest.raises(RequestError, match=f"{said}.*set COMFYUI_PYTHON"):
        install(comfyui, False, ignore)
    assert not os.path.lexists(comfyui.link)


def test_a_python_that_hangs_is_refused(comfyui: ComfyUI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install_nodes, "PATIENCE_S", 0.2)
    comfyui.python.write_text("#!/bin/sh\nexec sleep 60\n")
    with pytest.raises(RequestError, match=r"didn't answer within 0\.2 s"):
        install(comfyui, False, ignore)


def test_which_comfyui_and_which_python(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert ComfyUI.find(str(folder)).python == Path(sys.executable)
    own = folder / ".venv" / "bin" / "python"
    own.parent.mkdir(parents=True)
    own.symlink_to(sys.executable)
    monkeypatch.setenv("COMFYUI_PATH", str(folder))
    assert ComfyUI.find(None) == ComfyUI(folder, own)
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    monkeypatch.chdir(folder)
    assert ComfyUI.find(".").folder == folder, "an argument goes before the variable"
    monkeypatch.setenv("COMFYUI_PYTHON", str(tmp_path / "none"))
    with pytest.raises(RequestError, match="none can't be run; set COMFYUI_PYTHON"):
        ComfyUI.find(".")


def test_what_the_file_system_refuses_is_told(comfyui: ComfyUI, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, target: Path) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "symlink_to", refuse)
    with pytest.raises(NotAllowed, match=f"{comfyui.link}: permission denied"):
        install(comfyui, False, ignore)


def test_a_real_python_answers(folder: Path) -> None:
    done = subprocess.run([sys.executable, "-c", PROBE], cwd=folder, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["client"] == __version__
    assert found["error"] is None
    assert {need.partition(">=")[0] for need in found["needs"]} == {"msgpack", "numpy", "pyzmq", "rich", "shtab"}
    assert all(found["versions"][need.partition(">=")[0]] for need in found["needs"])


def test_by_hand(comfyui: ComfyUI, answers: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["install-nodes", str(comfyui.folder)]
    assert main(arguments) == 0
    assert (comfyui.folder / LINK / "nodes.py").is_file()
    assert capsys.readouterr().out.splitlines()[-1].startswith("next: start ComfyUI again")
    answers(client="0.0.1")
    assert main([*arguments, "--json"]) == 1
    reply = json.loads(capsys.readouterr().out)
    assert reply["done"] == [f"there    {comfyui.link} -> {SOURCE}"]
    assert len(reply["missing"]) == 1
    assert main([*arguments, "--uninstall"]) == 0
    assert main([*arguments, "--remove"]) == 1, "it is removed already"
    assert main(["install-nodes", str(comfyui.folder / "comfy")]) == 1


def test_the_oldest_comfyui_is_the_registrys() -> None:
    assert f'requires-comfyui = ">={OLDEST}"' in (SOURCE / "pyproject.toml").read_text()

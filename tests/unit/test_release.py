"""What is given to users: the wheel, the nodes' archive, what the registry reads of them, and scripts/release."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from zipfile import ZipFile

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
NODES = ROOT / "comfy_nodes"
SCRIPT = ROOT / "scripts" / "release"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
METADATA = tomllib.loads((NODES / "pyproject.toml").read_text())
COMFY = METADATA["tool"]["comfy"]
VERSION = PROJECT["version"]


def tracked(folder: str) -> set[str]:
    """The files of the repository in a folder, relative to it."""
    done = subprocess.run(["git", "ls-files", folder], cwd=ROOT, capture_output=True, text=True, check=True)
    return {str(Path(line).relative_to(folder)) for line in done.stdout.splitlines()}


# --- the wheel --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> ZipFile:
    pytest.importorskip("hatchling", reason="hatchling builds the wheel; `pip install -e .[dev]` brings it")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    (path,) = folder.glob("*.whl")
    return ZipFile(path)


@pytest.mark.parametrize("folder", ["comfy_nodes", "systemd"])
def test_the_wheel_has_the_folder_whole(wheel: ZipFile, folder: str) -> None:
    prefix = f"tacod_client/{folder}/"
    inside = {name.removeprefix(prefix) for name in wheel.namelist() if name.startswith(prefix)}
    assert inside == tracked(folder)


def test_the_wheel_has_daemon_client_and_embedded_model_and_nothing_else(wheel: ZipFile) -> None:
    names = set(wheel.namelist())
    assert {name.split("/")[0] for name in names} == {"tacod", "tacod_client", f"taco_dit-{VERSION}.dist-info"}
    assert {f"tacod/{name}" for name in tracked("tacod")} <= names
    assert {f"tacod_client/{name}" for name in tracked("client/tacod_client")} <= names
    assert not [name for name in names if "__pycache__" in name]


def test_tacoctl_of_the_wheel_installs_service_and_nodes(wheel: ZipFile, tmp_path: Path) -> None:
    """From the unpacked wheel, with no checkout in sight."""
    wheel.extractall(tmp_path / "site")
    comfyui = tmp_path / "ComfyUI"
    for each in ("comfy", "custom_nodes"):
        (comfyui / each).mkdir(parents=True)
    (comfyui / "main.py").touch()
    code = """
import sys
from pathlib import Path
from tacod_client.cli import install, nodes
install.check_readable = lambda path: None
install._daemon = lambda: Path("/opt/tacod/bin/tacod")
install.install(install.Service(Path(sys.argv[1]) / "root", False, print))
versions = dict.fromkeys(["taco-dit", "comfyui-frontend-package"])
nodes._probe = lambda comfyui: {"nodes": None, "error": "none", "versions": versions}
nodes.install(nodes.ComfyUI(Path(sys.argv[1]) / "ComfyUI", Path(sys.executable)), False, print)
"""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    unit = (tmp_path / "root/etc/systemd/system/tacod.service").read_text()
    assert "ExecStart=/opt/tacod/bin/tacod --config /etc/tacod/config.toml" in unit
    link = comfyui / "custom_nodes" / "taco_dit"
    assert link.readlink() == tmp_path / "site" / "tacod_client" / "comfy_nodes"
    assert (link / "example_workflows" / "flux1_basic.json").is_file()


# --- what the registry reads ------------------------------------------------------------------------------------------


def test_the_nodes_are_of_the_packages_version() -> None:
    assert METADATA["project"]["version"] == VERSION
    (needed,) = METADATA["project"]["dependencies"]
    assert needed == f"taco-dit>={VERSION.rpartition('.')[0]}"
    assert (NODES / "requirements.txt").read_text().split() == [needed]


def test_the_registry_finds_what_it_asks_for() -> None:
    """https://docs.comfy.org/registry/specifications"""
    project = METADATA["project"]
    assert re.fullmatch(r"[A-Za-z](?:[-_.]?[A-Za-z0-9])*", project["name"])
    assert len(project["name"]) < 100
    assert "comfyui" not in project["name"].lower()
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["version"])
    assert set(project["license"]) == {"text"}
    assert project["requires-python"] == PROJECT["requires-python"]
    assert all(project["urls"][name].startswith("https://") for name in ("Repository", "Documentation", "Bug Tracker"))
    assert COMFY["PublisherId"]
    assert COMFY["DisplayName"]
    assert re.fullmatch(r">=\d+\.\d+\.\d+", COMFY["requires-comfyui"])
    assert all((NODES / folder).is_dir() for folder in COMFY["includes"])
    assert "web" not in COMFY, "WEB_DIRECTORY says it; with both ComfyUI would load the page's script twice"


@pytest.mark.parametrize(("key", "wide", "high"), [("Icon", 1, 1), ("Banner", 21, 9)])
def test_pictures_are_in_the_repository_in_the_shape_that_the_registry_wants(key: str, wide: int, high: int) -> None:
    owner = METADATA["project"]["urls"]["Repository"].removeprefix("https://github.com/")
    path = COMFY[key].removeprefix(f"https://raw.githubusercontent.com/{owner}/main/")
    assert path.startswith("comfy_nodes/"), "it lies in the repository that Repository names"
    picture = ET.parse(ROOT / path).getroot()
    width, height = int(picture.attrib["width"]), int(picture.attrib["height"])
    assert width * high == height * wide
    assert key != "Icon" or max(width, height) <= 400
    assert picture.attrib["viewBox"] == f"0 0 {width} {height}"
    assert picture.find("{http://www.w3.org/2000/svg}title") is not None


# --- scripts/release --------------------------------------------------------------------------------------------------


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with what the script looks at, tagged as a release."""
    folder = tmp_path / "repository"
    for name in ("pyproject.toml", "comfy_nodes/pyproject.toml", "scripts/release", "CHANGELOG.md", ".gitignore"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((ROOT / name).read_bytes())
    (folder / "scripts" / "release").chmod(0o755)
    (folder / "comfy_nodes" / "nodes.py").write_text("NODES = 1\n")
    text = (folder / "CHANGELOG.md").read_text()
    (folder / "CHANGELOG.md").write_text(text.replace("## [Unreleased]\n", f"## [Unreleased]\n\n## [{VERSION}]\n", 1))
    git(folder, "init", "--quiet")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "release")
    git(folder, "tag", f"v{VERSION}")
    return folder


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=Tester", "-c", "user.email=tester@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


def release(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the script with a Python whose hatchling writes a small file; the real one is tested above."""
    python = folder.parent / "python"
    python.write_text(f"""#!/bin/sh
case "$*" in
  "-m venv "*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
  "-m pip "*) ;;
  "-m hatchling "*) for out; do :; done; echo wheel > "$out/taco_dit.whl"; echo sdist > "$out/taco_dit.tar.gz" ;;
  *) exec {sys.executable} "$@" ;;
esac
""")
    python.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(python), **variables}
    return subprocess.run(
        ["scripts/release", *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def test_a_release_is_built_from_its_tag(repository: Path) -> None:
    done = release(repository, f"v{VERSION}")
    assert done.returncode == 0, done.stderr
    out = repository / "dist" / f"v{VERSION}"
    archive = f"taco-dit-nodes-{VERSION}.zip"
    assert {path.name for path in out.iterdir()} == {"SHA256SUMS", "taco_dit.tar.gz", "taco_dit.whl", archive}
    assert set(ZipFile(out / archive).namelist()) == {"nodes.py", "pyproject.toml"}, "at its root, as ComfyUI wants it"
    sums = dict(line.split("  ")[::-1] for line in (out / "SHA256SUMS").read_text().splitlines())
    files = {path for path in out.iterdir() if path.name != "SHA256SUMS"}
    assert sums == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    again = release(repository, f"v{VERSION}")
    assert (again.returncode, "is there already" in again.stderr) == (1, True)


def test_an_image_is_saved_if_an_engine_is_named(repository: Path) -> None:
    engine = repository.parent / "engine"
    engine.write_text(f"""#!/bin/sh
case "$*" in
  "build --file "*"/containers/Containerfile --tag tacod:{VERSION} "*)
    [ -f "$6/pyproject.toml" ] && [ "$BUILDAH_FORMAT" = docker ] ;;
  "save --output "*" tacod:{VERSION}") echo image > "$3" ;;
  *) exit 5 ;;
esac
""")
    engine.chmod(0o755)
    done = release(repository, f"v{VERSION}", CONTAINER_ENGINE=str(engine))
    assert done.returncode == 0, done.stderr
    out = repository / "dist" / f"v{VERSION}"
    assert (out / f"tacod-image-{VERSION}.tar").read_text() == "image\n"
    assert f"tacod-image-{VERSION}.tar" in (out / "SHA256SUMS").read_text()


def test_a_dirty_tree_is_refused(repository: Path) -> None:
    (repository / "comfy_nodes" / "more.py").touch()
    refused(repository, f"v{VERSION}", "comfy_nodes/more.py")


def test_a_tag_that_is_not_the_version_is_refused(repository: Path) -> None:
    git(repository, "tag", "v9.9.9")
    refused(repository, "v9.9.9", f"pyproject.toml has the version {VERSION}")


def test_nodes_of_another_version_are_refused(repository: Path) -> None:
    path = repository / "comfy_nodes" / "pyproject.toml"
    path.write_text(path.read_text().replace(f'version = "{VERSION}"', 'version = "9.9.9"'))
    retag(repository)
    refused(repository, f"v{VERSION}", "comfy_nodes/pyproject.toml has the version 9.9.9")


def test_a_version_without_changes_is_refused(repository: Path) -> None:
    path = repository / "CHANGELOG.md"
    path.write_text(path.read_text().replace(f"## [{VERSION}]", "## [0.0.0]"))
    retag(repository)
    refused(repository, f"v{VERSION}", f"CHANGELOG.md has no section [{VERSION}]")


def test_a_tag_elsewhere_or_none_is_refused(repository: Path) -> None:
    git(repository, "commit", "--quiet", "--allow-empty", "--message", "later")
    refused(repository, f"v{VERSION}", "isn't what is checked out")
    refused(repository, "v0", "there is no tag v0")
    refused(repository, "", "usage: scripts/release TAG")


def retag(folder: Path) -> None:
    git(folder, "commit", "--quiet", "--all", "--message", "change")
    git(folder, "tag", "--force", f"v{VERSION}")


def refused(folder: Path, tag: str, said: str) -> None:
    done = release(folder, *filter(None, [tag]))
    assert done.returncode != 0
    assert said in done.stderr
    assert not (folder / "dist").exists()

"""``tacoctl install-nodes``: link the nodes into a ComfyUI and check its Python, or remove the link again."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import url2pathname

from tacod_client.cli.files import file_errors, shipped
from tacod_client.errors import NotAllowed, RequestError, TacodError
from tacod_client.version import __version__

__all__ = ["OLDEST", "ComfyUI", "install", "uninstall"]

LINK = Path("custom_nodes/taco_dit")
FOLDER = "comfy_nodes"
PACK = "taco-dit-nodes"
"""The nodes' name in their pyproject.toml, and in ComfyUI's registry."""
OLDEST = "0.3.64"
"""The oldest ComfyUI that the nodes were tested with."""
PATIENCE_S = 60.0
"""For ComfyUI's Python, which imports NumPy and ZeroMQ; from a slow disk that takes seconds."""

PROBE = """
import importlib.metadata, json, os, re
found = {"client": None, "error": None, "nodes": None, "needs": [], "versions": {}}
def version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
try:
    import tacod_client
    import tacod_client.client
    found["client"] = tacod_client.__version__
    nodes = os.path.join(os.path.dirname(tacod_client.__file__), "comfy_nodes")
    found["nodes"] = nodes if os.path.isfile(os.path.join(nodes, "nodes.py")) else None
except Exception as error:
    found["error"] = f"{type(error).__name__}: {error}"
try:
    found["needs"] = [need for need in importlib.metadata.requires("taco-dit") or [] if ";" not in need]
except importlib.metadata.PackageNotFoundError:
    pass
names = [re.match(r"[\\w.-]+", need)[0] for need in found["needs"]] + ["taco-dit", "comfyui-frontend-package"]
found["versions"] = {name: version(name) for name in names}
print("\\n" + json.dumps(found))
"""
"""What ComfyUI's Python runs: it prints what it has, on the last line."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class ComfyUI:
    """A ComfyUI on this machine.

    Args:
        folder: Where its ``main.py`` is.
        python: The interpreter that it runs with.
    """

    folder: Path
    python: Path

    @classmethod
    def find(cls, path: str | None) -> ComfyUI:
        """The ComfyUI in a folder; by default that of ``COMFYUI_PATH``, or the current folder.

        Its Python is that of ``COMFYUI_PYTHON``, or of its own ``venv`` or ``.venv``, or else the one that runs this.
        Raises `RequestError` if there is no ComfyUI or no such interpreter.
        """
        folder = Path(path or os.environ.get("COMFYUI_PATH") or ".").expanduser().absolute()
        missing = next((name for name in ("main.py", "comfy", LINK.parent) if not (folder / name).exists()), None)
        if missing is not None:
            raise RequestError(
                f"{folder} is no ComfyUI: it has no {missing}; give the folder that has ComfyUI's main.py"
            )
        if named := os.environ.get("COMFYUI_PYTHON"):
            python = Path(named).expanduser().absolute()
        else:
            own = (folder / venv / "bin" / "python" for venv in ("venv", ".venv"))
            python = next((path for path in own if path.exists()), Path(sys.executable))
        if not os.access(python, os.X_OK) or python.is_dir():
            raise RequestError(f"{python} can't be run; set COMFYUI_PYTHON to the Python that ComfyUI runs with")
        return cls(folder, python)

    @property
    def link(self) -> Path:
        """Where the nodes belong."""
        return self.folder / LINK

    @property
    def version(self) -> str:
        """As its own file has it; empty if there is none."""
        file = self.folder / "comfyui_version.py"
        found = re.search(r"^__version__ = [\"']([^\"']+)", file.read_text() if file.is_file() else "", re.MULTILINE)
        return found[1] if found else ""


def install(comfyui: ComfyUI, dry_run: bool, say: Say) -> list[str]:
    """Link the nodes into ``custom_nodes``, and check what they need there.

    The link leads to the client in ComfyUI's own Python if that has the nodes, so that both are always of one version;
    else to this installation.

    Args:
        comfyui: Where to.
        dry_run: Say what would be done, and do nothing.
        say: Hears a line for each thing that is done.

    Returns:
        What is still missing, each with what to do; empty if ComfyUI can use the nodes.

    Raises `NotAllowed` if something else has the link's place or the nodes are there under another name, `RequestError`
    if ComfyUI's Python doesn't run, and `TacodError` if the file system refuses.
    """
    with file_errors():
        found = _probe(comfyui)
        nodes = Path(found["nodes"]) if found["nodes"] else shipped(FOLDER, "nodes.py")
        _refuse_others(comfyui)
        _link(comfyui.link, nodes, dry_run, say)
        return list(_missing(comfyui, found))


def uninstall(comfyui: ComfyUI, dry_run: bool, say: Say) -> None:
    """Remove the link that `install` made; the client in ComfyUI's Python stays.

    Raises `NotAllowed` if something else has its place, `TacodError` if nothing is there.
    """
    with file_errors():
        if not os.path.lexists(comfyui.link):
            raise TacodError(f"{comfyui.link} isn't there; were the nodes installed into this ComfyUI?")
        if not _is_ours(comfyui.link):
            raise _not_ours(comfyui.link)
        if not dry_run:
            comfyui.link.unlink()
        say(f"{'would remove' if dry_run else 'removed '} {comfyui.link}")
        say(f"kept     the client in {comfyui.python}; `{comfyui.python} -m pip uninstall taco-dit` removes it")


def _link(link: Path, nodes: Path, dry_run: bool, say: Say) -> None:
    if link.is_symlink() and link.resolve() == nodes.resolve():
        say(f"there    {link} -> {nodes}")
        return
    if os.path.lexists(link):
        if not _is_ours(link):
            raise _not_ours(link)
        if not dry_run:
            link.unlink()
    if not dry_run:
        link.symlink_to(nodes)
    say(f"{'would link' if dry_run else 'linked  '} {link} -> {nodes}")


def _is_ours(link: Path) -> bool:
    """Whether it is a link as `install` makes it: to the nodes of an installed client, or of this checkout."""
    if not link.is_symlink():
        return False
    target = link.parent / link.readlink()
    return target.parts[-2:] == ("tacod_client", FOLDER) or target.resolve() == shipped(FOLDER, "nodes.py").resolve()


def _not_ours(link: Path) -> NotAllowed:
    kind = f"a link to {link.readlink()}" if link.is_symlink() else "no link"
    return NotAllowed(f"{link} is {kind}, which install-nodes didn't make; move it away, and run this again")


def _refuse_others(comfyui: ComfyUI) -> None:
    """Two packs with the same nodes: ComfyUI would take those that it reads last."""
    for other in sorted((comfyui.folder / LINK.parent).iterdir()):
        project = other / "pyproject.toml"
        if other == comfyui.link or other.suffix == ".disabled" or not project.is_file():
            continue
        if re.search(rf"^name = \"{PACK}\"$", project.read_text(errors="replace"), re.MULTILINE):
            raise NotAllowed(f"{other} has the TACO-DiT nodes already; remove it, or keep using that one")


def _probe(comfyui: ComfyUI) -> dict[str, Any]:
    """What ComfyUI's Python has. It runs in ComfyUI's folder, as ComfyUI does."""
    advice = "set COMFYUI_PYTHON to the Python that ComfyUI runs with"
    try:
        done = subprocess.run(
            [comfyui.python, "-c", PROBE],
            cwd=comfyui.folder,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PATIENCE_S,
            check=False,
        )
        found: dict[str, Any] = json.loads("{" + done.stdout.rpartition("\n{")[2])
    except subprocess.TimeoutExpired:
        raise RequestError(f"{comfyui.python} didn't answer within {PATIENCE_S:g} s; {advice}") from None
    except ValueError:
        last = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        raise RequestError(f"{comfyui.python} ended with {done.returncode}: {last}; {advice}") from None
    return found


def _missing(comfyui: ComfyUI, found: dict[str, Any]) -> Iterator[str]:
    """What keeps this ComfyUI from using the nodes, each with what to do."""
    pip = f"{shlex.quote(str(comfyui.python))} -m pip install"
    versions = found["versions"]
    if versions["comfyui-frontend-package"] is None:
        yield (
            f"{comfyui.python} has no comfyui-frontend-package, so ComfyUI may run with another Python; "
            "if so, set COMFYUI_PYTHON to that one and run this again"
        )
    if not comfyui.version:
        yield f"{comfyui.folder} tells no version; the nodes need ComfyUI {OLDEST} or newer"
    elif _number(comfyui.version) < _number(OLDEST):
        yield f"ComfyUI {comfyui.version} is older than {OLDEST}, the oldest that the nodes were tested with; update it"
    if versions["taco-dit"] is None and found["error"] is not None:
        yield f"the client is not in {comfyui.python}; run `{pip} {shlex.quote(_source())}`"
        return
    if found["error"] is not None:
        yield f"the client can't be imported: {found['error']}; run `{pip} --force-reinstall {shlex.quote(_source())}`"
    elif found["client"] != __version__:
        yield f"the client there is {found['client']}, and this is {__version__}; run `{pip} {shlex.quote(_source())}`"
    for need in found["needs"]:
        name, _, least = need.partition(">=")
        if versions[name] is None or _number(versions[name]) < _number(least):
            has = f"{name} {versions[name]}" if versions[name] else f"no {name}"
            yield f"{comfyui.python} has {has}, and the client needs {need}; run `{pip} {shlex.quote(need)}`"


def _number(version: str) -> tuple[int, ...]:
    """A version's release as numbers: 2.1.0rc1 is 2, 1, 0."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()


def _source() -> str:
    """What pip is to install for a client of this version: the file or folder that this one came from, or its name."""
    try:
        record = importlib.metadata.distribution("taco-dit").read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        record = None
    if record is not None:
        url = urlparse(json.loads(record)["url"])
        if url.scheme == "file" and Path(url2pathname(url.path)).exists():
            return url2pathname(url.path)
    return f"taco-dit=={__version__}"

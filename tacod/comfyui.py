"""The user's ComfyUI, whose networks ranks may run: is the folder one, and has this Python what its networks import?

Nothing here imports anything of it: see `tacod.rank.comfyui`.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement

__all__ = ["NEEDED", "fault", "lacking", "version"]

NEEDED: Mapping[str, str] = {
    "comfy-aimdo": "comfy_aimdo",
    "comfy-kitchen": "comfy_kitchen",
    "einops": "einops",
    "numpy": "numpy",
    "pillow": "PIL",
    "psutil": "psutil",
    "safetensors": "safetensors",
    "tqdm": "tqdm",
}
"""What its networks import: each distribution, and its module. A version of ComfyUI may not need all of them."""
_MARK = Path("comfy", "model_detection.py")


def fault(path: str) -> str | None:
    """What keeps a folder from being used as a ComfyUI; None if nothing does."""
    if not os.path.isabs(path) or "\0" in path:
        return f"expected an absolute path, got {path!r}"
    if not os.path.isdir(path):
        return f"{path} is no folder; name the folder of ComfyUI that has main.py and comfy in it"
    if not os.access(Path(path, _MARK), os.R_OK):
        return f"{path} has no {_MARK} that tacod's user can read; name ComfyUI's own folder, which has main.py in it"
    return None


def lacking(path: str) -> list[str]:
    """What pip has to install for the networks of this ComfyUI, as its requirements.txt has it; empty if all is there.

    A package that is there in another version than is asked for is named too.
    """
    wanted = _requirements(path)
    found = []
    for name, module in NEEDED.items():
        asked = wanted.get(name)
        if asked is None:
            continue
        there = importlib.util.find_spec(module) is not None
        with suppress(importlib.metadata.PackageNotFoundError):
            there = there and asked.specifier.contains(importlib.metadata.version(name), prereleases=True)
        if not there:
            found.append(f"{asked.name}{asked.specifier}")
    return found


def version(path: str) -> str:
    """The version, and a digest of the code of its networks, so that a changed one is known."""
    said = ""
    with suppress(OSError):
        found = re.search(r'__version__\s*=\s*"([^"]+)"', Path(path, "comfyui_version.py").read_text("utf-8"))
        said = found[1] if found is not None else ""
    hashed = hashlib.sha256()
    for file in sorted(Path(path, "comfy").rglob("*.py")):
        with suppress(OSError):
            hashed.update(str(file.relative_to(path)).encode(errors="surrogateescape") + b"\0" + file.read_bytes())
    return f"{said or 'of no known version'} ({hashed.hexdigest()[:8]})"


def _requirements(path: str) -> dict[str, Requirement]:
    """What a ComfyUI's requirements.txt asks for, by the distribution's normalized name."""
    wanted = {}
    with suppress(OSError, UnicodeDecodeError):
        for line in Path(path, "requirements.txt").read_text("utf-8").splitlines():
            with suppress(InvalidRequirement):
                asked = Requirement(line.partition("#")[0].strip())
                wanted[re.sub(r"[-_.]+", "-", asked.name).lower()] = asked
    return wanted

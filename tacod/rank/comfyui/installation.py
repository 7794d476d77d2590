"""Imports of a ComfyUI what its networks need: no server, no nodes, no prompts, no text encoders, no samplers.

Only the package ``comfy`` is found in its folder, and nothing there shadows other packages. ComfyUI's detection of
models names text encoders, which it never makes here; these modules are hollow, and so are packages that few networks
need, if this Python lacks them.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import logging
import re
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from tacod import comfyui
from tacod_client.errors import ModelUnsupported

__all__ = ["Installation", "quiet"]

_PACKAGE = "comfy"
_HOLLOW = ("comfy.text_encoders", "comfy.sd1_clip", "comfy.sdxl_clip")
"""Modules that detection imports for what is made of texts."""
_OF_TEXTS = re.compile(r"comfy\.text_encoders\.(\w+)")
"""How networks name them."""
_OPTIONAL = ("torchvision", "torchaudio", "scipy", "kornia", "torchsde", "comfy_aimdo")
"""Packages that ComfyUI's modules import, and that most networks never call. Without dynamic VRAM nothing of
``comfy_aimdo`` is called."""

log = logging.getLogger(__name__)


class Installation:
    """A ComfyUI's folder, from which a rank imports networks at the first load that needs one.

    Args:
        path: The folder, of the daemon's own configuration and never of a client.
        device: This rank's device; ComfyUI is kept from looking for another.
    """

    def __init__(self, path: str, device: torch.device) -> None:
        self.path = path
        self._device = device
        self._version = ""

    @property
    def version(self) -> str:
        """ComfyUI's version, and a digest of its code, as it was imported."""
        return self._version

    def module(self, name: str) -> Any:
        """A module of ComfyUI's, such as ``comfy.ops``.

        Raises `ModelUnsupported` if this is no ComfyUI, or if its networks can't be imported here.
        """
        if not self._version:
            self._prepare()
        try:
            with quiet():
                return importlib.import_module(name)
        except Exception as error:  # whatever a module of theirs raises
            raise ModelUnsupported(
                f"the ComfyUI at {self.path} can't be imported: {name}: {type(error).__name__}: {error}; "
                "`tacoctl doctor` checks its packages"
            ) from error

    def _prepare(self) -> None:
        reason = comfyui.fault(self.path)
        if reason is not None:
            raise ModelUnsupported(f"comfyui.path: {reason}")
        importlib.invalidate_caches()
        lacking = [each for each in comfyui.lacking(self.path) if not each.startswith("comfy-aimdo")]
        if lacking:
            install = " ".join(f"'{each}'" for each in lacking)
            raise ModelUnsupported(
                f"the networks of the ComfyUI at {self.path} need {', '.join(lacking)}: run "
                f"`{sys.executable} -m pip install {install}`"
            )
        if not any(isinstance(finder, _Hollow) for finder in sys.meta_path):
            sys.meta_path.insert(0, _Hollow(_HOLLOW, Path(self.path), _used_by_networks(self.path)))
            # The last one is asked for what nobody else has found.
            sys.meta_path.append(_Hollow(_OPTIONAL))
        if _PACKAGE not in sys.modules:
            package = ModuleType(_PACKAGE)
            package.__path__ = [str(Path(self.path, _PACKAGE))]
            package.__spec__ = ModuleSpec(_PACKAGE, None, is_package=True)
            sys.modules[_PACKAGE] = package
        self._version = comfyui.version(self.path)
        if self._device.type == "cpu":
            # Otherwise it would look for GPUs as it is imported.
            self.module("comfy.cli_args").args.cpu = True
        log.info("networks come from the ComfyUI at %s, version %s", self.path, self._version)


def _used_by_networks(path: str) -> set[str]:
    """The modules for texts of which networks are made too, and those that these import."""
    found: set[str] = set()
    files = list(Path(path, _PACKAGE, "ldm").rglob("*.py"))
    while files:
        text = files.pop().read_text("utf-8", errors="replace")
        for name in _OF_TEXTS.findall(text):
            module = f"{_PACKAGE}.text_encoders.{name}"
            file = Path(path, _PACKAGE, "text_encoders", f"{name}.py")
            if module not in found and file.is_file():
                found.add(module)
                files.append(file)
    return found


@contextmanager
def quiet() -> Iterator[None]:
    """A context in which ComfyUI's logs are warnings and errors alone."""
    root = logging.getLogger()
    before = root.level
    root.setLevel(max(before, logging.WARNING))
    try:
        yield
    finally:
        root.setLevel(before)


class _Hollow:
    """Finds modules of these names that have whatever is asked of them, and can't do any of it."""

    def __init__(self, names: Sequence[str], folder: Path | None = None, but: Collection[str] = ()) -> None:
        """``but`` are modules that aren't hollow, although they lie in a hollow package, in this ``folder``."""
        self._names = names
        self._folder = folder
        self._but = but

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """The spec of a hollow module; None for other names."""
        if name in self._but:
            return None
        if any(name == each or name.startswith(f"{each}.") for each in self._names):
            return ModuleSpec(name, self, is_package=True)  # type: ignore[arg-type]
        return None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """An empty module."""
        return _HollowModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """There is nothing to run."""
        module.__path__ = [] if self._folder is None else [str(self._folder.joinpath(*module.__name__.split(".")))]


class _HollowModule(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        where = f"{self.__name__}.{name}"

        def refuse(cls: type, *args: Any, **kwargs: Any) -> Any:
            package = where.partition(".")[0]
            raise ModelUnsupported(
                f"this network calls {where}, which ranks don't import"
                if package == _PACKAGE
                else f"this network calls {where}: install {package} into the daemon's Python, and restart tacod"
            )

        made = type(name, (), {"__new__": refuse})
        setattr(self, name, made)
        return made

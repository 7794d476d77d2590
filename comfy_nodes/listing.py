"""The model files below ComfyUI's folders, .gguf files among them, which its own lists leave out."""

from __future__ import annotations

import os

from . import hooks
from .names import SAFETENSORS

__all__ = ["model_files"]

_searched: dict[str, tuple[list[str], dict[str, float]]] = {}
"""The .gguf files below a folder, and when each folder in it last changed: to search a network disk takes long."""


def model_files(folder: str) -> list[str]:
    """The names of the files in one of ComfyUI's folders (``diffusion_models``), as its other functions take them."""
    listed = hooks.find("folder_paths.get_filename_list")(folder)
    names = [name for name in listed if name.lower().endswith(SAFETENSORS)]
    roots = hooks.find("folder_paths.get_folder_paths")
    if roots is None or hooks.find("folder_paths.recursive_search") is None:
        return names
    return names + sorted(name for root in roots(folder) if os.path.isdir(root) for name in _gguf_files(root))


def _gguf_files(root: str) -> list[str]:
    names, times = _searched.get(root, ([], {}))
    if not times or any(_changed(path) != at for path, at in times.items()):
        found, times = hooks.find("folder_paths.recursive_search")(root, [".git"])
        names = [name for name in found if name.lower().endswith(".gguf")]
        _searched[root] = names, {path: _changed(path) for path in (root, *times)}
    return names


def _changed(folder: str) -> float:
    """When a folder's entries last changed; 0 for one that is gone."""
    try:
        return os.stat(folder).st_mtime
    except OSError:
        return 0.0

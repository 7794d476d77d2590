"""Where model files may be."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from tacod.checkpoint.folder import is_folders, open_folder
from tacod_client.errors import ModelNotAllowed, ModelNotFound, ModelUnsupported
from tacod_client.text import encodable

__all__ = ["locate"]

_PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl", ".sft.bin")


def locate(name: str, roots: Sequence[str]) -> str:
    """The real path of a model file or folder, given absolutely or relative to one of ``roots``.

    Symlinks are resolved first, those of a folder's own files too. Raises `ModelNotAllowed` for a path outside the
    roots, `ModelNotFound`, `ModelUnsupported` by file type, and for a folder what `open_folder` raises.
    """
    if "\0" in name or not name:
        raise ModelNotFound(f"{name!r} is no file name")
    real_roots = [os.path.realpath(root) for root in roots]
    candidates = [os.path.realpath(os.path.join(root, name)) for root in real_roots] or [os.path.realpath(name)]
    allowed = [path for path in candidates if _inside(path, real_roots)]
    path = next((path for path in allowed if os.path.exists(path)), None)
    if path is not None and encodable(path) != path:
        raise ModelUnsupported(f"{name} leads to {encodable(path)}, whose name is no UTF-8; rename it")
    if path is None and len(allowed) < len(candidates):
        raise _outside(name, roots)
    if path is None:
        raise ModelNotFound(f"{name}: no such file under models.roots ({', '.join(roots)})")
    if is_folders(path):
        try:
            stray = next((file for file in open_folder(path).files if not _inside(file, real_roots)), None)
        except OSError as error:
            raise ModelNotFound(f"{path}: {error.strerror}; tacod's user must be able to read it") from None
        if stray is not None:
            raise _outside(f"{name}: its file {stray}", roots)
        return path
    if not os.path.isfile(path):
        raise ModelUnsupported(f"{name} is no regular file, and opening it could block; name the model's file")
    # The name that was asked for counts too: the hub's cache keeps its files under names without a suffix.
    if name.lower().endswith(_PICKLES) or path.lower().endswith(_PICKLES):
        raise ModelUnsupported(f"{name} is a pickle, which can run code when it is opened; convert it to .safetensors")
    return path


def _inside(path: str, real_roots: Iterable[str]) -> bool:
    return any(Path(path).is_relative_to(root) for root in real_roots)


def _outside(what: str, roots: Sequence[str]) -> ModelNotAllowed:
    return ModelNotAllowed(
        f"{what} lies outside models.roots ({', '.join(roots) or 'none are configured'}); "
        "add its folder to models.roots in tacod's configuration, or move the file"
    )

"""A model's weights as its files' headers describe them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tacod.checkpoint.diffusers import translate
from tacod.checkpoint.folder import open_folder
from tacod.checkpoint.gguf import read_gguf
from tacod.checkpoint.header import PLAIN, File, Header, Part, TensorInfo
from tacod.checkpoint.safetensors import read_safetensors
from tacod_client.errors import ModelCorrupt, ModelNotFound

__all__ = ["PREFIXES", "Checkpoint", "read_checkpoint"]

PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.model.", "net.")
"""Where a diffusion model's keys may lie inside a checkpoint; bare keys otherwise."""


@dataclass(frozen=True)
class Checkpoint:
    """A safetensors file, a GGUF file or a folder in diffusers' layout, as the headers describe it."""

    path: str
    tensors: Mapping[str, TensorInfo]
    """The diffusion model's tensors, their keys without `prefix`; diffusers' own names where `diffusers` is true."""
    prefix: str
    config: Mapping[str, Any] | None
    """What the model says of itself, in ComfyUI's ``unet_config`` vocabulary: a file's ``tacod.config``, or a
    folder's ``config.json`` translated; None if nothing."""
    identity: str = field(repr=False)
    """Changes whenever a file does: a hash of paths, sizes, modification times, headers and samples of contents."""
    files: tuple[File, ...] = field(default=(), repr=False)
    parts: Mapping[str, tuple[Part, ...]] = field(default_factory=dict, repr=False)
    """The bytes of each tensor, in order."""
    diffusers: bool = False
    """Whether the tensors have diffusers' names and order still (see `DiT.diffusers_layout`)."""

    @property
    def parameters(self) -> int:
        """How many numbers the diffusion model's tensors hold."""
        return sum(info.size for info in self.tensors.values())

    def weight_bytes(self, plain_bytes: int | None) -> int:
        """The memory that the weights will take, where those of 16 bits and more are kept in ``plain_bytes`` each.

        None stands for what they take in the file.
        """
        return sum(
            info.size * plain_bytes
            if plain_bytes is not None and info.dtype in PLAIN
            else sum(part.stop - part.start for part in self.parts[name])
            for name, info in self.tensors.items()
        )


def read_checkpoint(path: str) -> Checkpoint:
    """Read and check the headers of a model file or folder, without torch and without the weights.

    Raises `ModelNotFound` if a file can't be opened, `ModelCorrupt` if one is truncated or not what its name says,
    `ModelUnsupported` for a folder or a GGUF file of a kind that isn't read.
    """
    try:
        return _read_folder(path) if os.path.isdir(path) else _read_file(path)
    except OSError as error:
        where = error.filename or path
        raise ModelNotFound(f"{where}: {error.strerror}; tacod's user must be able to read it") from None


def _read_file(path: str) -> Checkpoint:
    header = read_gguf(path) if path.lower().endswith(".gguf") else read_safetensors(path)
    prefix = next((prefix for prefix in PREFIXES if any(key.startswith(prefix) for key in header.entries)), "")
    entries = {key.removeprefix(prefix): entry for key, entry in header.entries.items() if key.startswith(prefix)}
    return Checkpoint(
        path,
        {key: entry.info for key, entry in entries.items()},
        prefix,
        _read_config(path, header.texts),
        _identify(path, b"", [header]),
        (header.file,),
        {key: (entry.part,) for key, entry in entries.items()},
    )


def _read_folder(path: str) -> Checkpoint:
    folder = open_folder(path)
    config = translate(folder.path, folder.config)
    headers, entries = folder.read()
    return Checkpoint(
        path,
        {key: entry.info for key, entry in entries.items()},
        "",
        config,
        _identify(path, folder.raw, headers),
        tuple(header.file for header in headers),
        {key: (entry.part,) for key, entry in entries.items()},
        diffusers=True,
    )


def _identify(path: str, raw: bytes, headers: Iterable[Header]) -> str:
    hashed = hashlib.sha256(path.encode(errors="surrogateescape") + b"\0" + hashlib.sha256(raw).digest())
    for header in headers:
        file = header.file
        state = f"{file.path}\0{file.size}\0{file.mtime_ns}\0"
        hashed.update(state.encode(errors="surrogateescape") + header.digest)
    return hashed.hexdigest()


def _read_config(path: str, texts: Mapping[str, str]) -> Mapping[str, Any] | None:
    text = texts.get("tacod.config")
    if text is None:
        return None
    try:
        config = json.loads(text)
    except (ValueError, TypeError, RecursionError) as error:
        raise ModelCorrupt(f"{path}: the metadata's tacod.config is not JSON ({error})") from None
    if not isinstance(config, dict) or not isinstance(config.get("image_model"), str):
        raise ModelCorrupt(f"{path}: the metadata's tacod.config must be an object with image_model")
    return config

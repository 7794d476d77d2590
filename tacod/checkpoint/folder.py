"""A model as a folder in diffusers' layout: a configuration, and weights in one file or in shards.

Either the transformer's own folder or a pipeline's, which holds it as ``transformer/`` beside ``model_index.json``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tacod.checkpoint.header import Entry, Header
from tacod.checkpoint.safetensors import read_safetensors
from tacod_client.errors import ModelCorrupt, ModelNotAllowed, ModelUnsupported

__all__ = ["Folder", "open_folder"]

MAX_JSON_BYTES = 16 << 20
_WEIGHTS = "diffusion_pytorch_model.safetensors"
_INDEX = f"{_WEIGHTS}.index.json"


@dataclass(frozen=True)
class Folder:
    """A folder's files, real paths all, before the weight files are opened."""

    path: str
    shards: tuple[str, ...]
    config: Mapping[str, Any]
    """What ``config.json`` holds."""
    weight_map: Mapping[str, str] | None
    """The index: which shard holds each tensor; None where there is one file."""
    files: tuple[str, ...]
    """Every file that the model is made of."""
    raw: bytes = field(repr=False)
    """The configuration's and the index's bytes."""

    def read(self) -> tuple[list[Header], dict[str, Entry]]:
        """The shards' headers, and all tensors under their names in diffusers.

        Raises `ModelCorrupt` if a shard is truncated, or the shards are not what the index says.
        """
        headers = [read_safetensors(shard) for shard in self.shards]
        entries: dict[str, Entry] = {}
        for header in headers:
            doubled = next((name for name in header.entries if name in entries), None)
            if doubled is not None:
                raise ModelCorrupt(f"{self.path}: two shards hold {doubled!r}; download the folder again")
            entries.update(header.entries)
        for name, shard in (self.weight_map or {}).items():
            if name not in entries or entries[name].part.file != os.path.realpath(os.path.join(self.path, shard)):
                raise ModelCorrupt(f"{self.path}: {shard} lacks {name!r}, which the index places there")
        return headers, entries


def open_folder(path: str) -> Folder:
    """Read a folder's configuration and index.

    Raises `ModelUnsupported` if it holds no model in diffusers' layout, `ModelNotAllowed` if its index leads out of
    it, `ModelCorrupt` if a file is missing or malformed.
    """
    if os.path.isfile(os.path.join(path, "model_index.json")) and os.path.isdir(os.path.join(path, "transformer")):
        path = os.path.join(path, "transformer")
    config_path, index_path, weights_path = (os.path.join(path, name) for name in ("config.json", _INDEX, _WEIGHTS))
    if not os.path.isfile(config_path):
        raise ModelUnsupported(
            f"{path} is a folder without a config.json; "
            "give a weight file, or a folder in diffusers' layout (a transformer's, or a pipeline's)"
        )
    raw, config = _read_json(config_path)
    if not os.path.lexists(index_path):
        if not os.path.isfile(weights_path):
            raise ModelUnsupported(f"{path} is a folder that has neither {_WEIGHTS} nor {_INDEX}")
        shards = [os.path.realpath(weights_path)]
        return Folder(path, tuple(shards), config, None, (os.path.realpath(config_path), *shards), raw)
    raw_index, index = _read_json(index_path)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelCorrupt(f"{index_path}: weight_map is no object; download it again")
    shards = [_shard(path, name) for name in sorted({*weight_map.values()}, key=str)]
    files = (os.path.realpath(config_path), os.path.realpath(index_path), *shards)
    return Folder(path, tuple(shards), config, weight_map, files, raw + b"\0" + raw_index)


def _read_json(path: str) -> tuple[bytes, dict[str, Any]]:
    if not os.path.isfile(path):
        raise ModelCorrupt(f"{path} is no regular file")
    with open(path, "rb") as file:
        raw = file.read(MAX_JSON_BYTES + 1)
    try:
        value = json.loads(raw.decode()) if len(raw) <= MAX_JSON_BYTES else None
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ModelCorrupt(f"{path} is not a JSON object of at most {MAX_JSON_BYTES >> 20} MiB; download it again")
    return raw, value


def _shard(folder: str, name: Any) -> str:
    if not isinstance(name, str) or "\0" in name or not name.endswith(".safetensors"):
        raise ModelUnsupported(f"{folder}: the index names {name!r:.80}; this version reads .safetensors shards")
    if os.path.basename(name) != name or "\\" in name:
        raise ModelNotAllowed(f"{folder}: the index names {name!r:.200}, which leads out of the folder")
    path = os.path.realpath(os.path.join(folder, name))
    if not os.path.isfile(path):
        raise ModelCorrupt(f"{folder} lacks the shard {name}; download it again")
    return path

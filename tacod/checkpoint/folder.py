"""A model as a folder in diffusers' layout: a configuration, and weights in one file or in shards.

Either the transformer's own folder, or a pipeline's or a trainer's, which holds it as ``transformer/``. The weights may
be a variant, which has its name in the file's (``diffusion_pytorch_model.fp16.safetensors``). The path of such an index
means the folder with that one, and so does that of such a weight file, if its configuration is beside it; a weight file
that has other names than diffusers', or something else beside it, is a file like any other.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tacod.checkpoint.diffusers import check_class, is_known_class
from tacod.checkpoint.header import Entry, Header, check_count
from tacod.checkpoint.json_text import parse_json
from tacod.checkpoint.safetensors import read_safetensors
from tacod_client.errors import ModelCorrupt, ModelError, ModelNotAllowed, ModelUnsupported
from tacod_client.text import encodable

__all__ = ["Folder", "is_folders", "open_folder"]

MAX_JSON_BYTES = 16 << 20
_STEM = "diffusion_pytorch_model"
_WEIGHTS = f"{_STEM}.safetensors"
_INDEX = f"{_WEIGHTS}.index.json"
_ANY_INDEX = re.compile(r".*safetensors.*index.*\.json|.*index.*safetensors.*\.json")
_SHARD = re.compile(r".*-\d+-of-\d+.*")
_BLOCKS = ("transformer_blocks.", "single_transformer_blocks.")
"""What the names of diffusers' blocks begin with; the authors' files call them otherwise."""


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
    names: tuple[str, ...]
    """The names of these in the folder, from which links may lead to files with others."""
    raw: bytes = field(repr=False)
    """The configuration's and the index's bytes."""

    def read(self) -> tuple[list[Header], dict[str, Entry]]:
        """The shards' headers, and all tensors under their names in diffusers.

        Raises `ModelCorrupt` if a shard is truncated, or the shards are not what the index says, `ModelUnsupported` if
        they hold too many tensors.
        """
        headers: list[Header] = []
        entries: dict[str, Entry] = {}
        for shard in self.shards:
            header = read_safetensors(shard)
            headers.append(header)
            doubled = next((name for name in header.entries if name in entries), None)
            if doubled is not None:
                raise ModelCorrupt(f"{self.path}: two shards hold {doubled!r}; download the folder again")
            entries.update(header.entries)
            check_count(self.path, len(entries))
        for name, shard in (self.weight_map or {}).items():
            if name not in entries or entries[name].part.file != os.path.realpath(os.path.join(self.path, shard)):
                raise ModelCorrupt(f"{self.path}: {shard} lacks {name!r}, which the index places there")
        return headers, entries


def is_folders(path: str) -> bool:
    """Whether `open_folder` reads a path: a folder, or a weight file or index that has its configuration beside it.

    What lies beside a weight file may have nothing to do with it, and counts only if file and configuration agree.
    """
    if os.path.isdir(path):
        return True
    folder, name = os.path.split(path)
    config_path = os.path.join(folder, "config.json")
    if not name.startswith(_STEM) or not os.path.isfile(config_path):
        return False
    if _ANY_INDEX.fullmatch(name):
        return True
    if not name.endswith(".safetensors") or not os.path.isfile(path):
        return False
    try:
        known = is_known_class(_read_json(config_path)[1])
        return known and any(each.startswith(_BLOCKS) for each in read_safetensors(path).entries)
    except (OSError, ModelError):
        return False


def open_folder(path: str) -> Folder:
    """Read a folder's configuration and index.

    Raises `ModelUnsupported` if it holds no model in diffusers' layout, or one of a class that no family reads,
    `ModelNotAllowed` if its index leads out of it, `ModelCorrupt` if a file is missing or malformed.
    """
    chosen = ""
    if os.path.isdir(path):
        path = _find_transformer(path)
    else:
        path, chosen = os.path.split(path)
        if _SHARD.fullmatch(chosen):
            raise ModelUnsupported(f"{chosen} is one of several files that make a model; give their folder, {path}")
    config_path = os.path.join(path, "config.json")
    if not os.path.isfile(config_path):
        raise ModelUnsupported(
            f"{path} is a folder without a config.json; "
            "give a weight file, or a folder in diffusers' layout (a transformer's, or a pipeline's)"
        )
    raw, config = _read_json(config_path)
    check_class(path, config)
    weights = os.path.join(path, chosen or _choose(path))
    if weights.endswith(".safetensors"):
        if not os.path.isfile(weights):
            raise ModelCorrupt(f"{weights} is no regular file")
        shards = [os.path.realpath(weights)]
        files = (os.path.realpath(config_path), *shards)
        return Folder(path, tuple(shards), config, None, files, ("config.json", os.path.basename(weights)), raw)
    index_path = weights
    raw_index, index = _read_json(index_path)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelCorrupt(f"{index_path}: weight_map is no object; download it again")
    for name in weight_map.values():
        _check_shard(path, name)
    in_order = sorted({*weight_map.values()})
    shards = [_shard(path, name) for name in in_order]
    files = (os.path.realpath(config_path), os.path.realpath(index_path), *shards)
    names = ("config.json", os.path.basename(index_path), *in_order)
    return Folder(path, tuple(shards), config, weight_map, files, names, raw + b"\0" + raw_index)


def _find_transformer(path: str) -> str:
    """The folder of the transformer itself: this one, or the one in a pipeline's or a trainer's."""
    inner = os.path.join(path, "transformer")
    pipeline = os.path.isfile(os.path.join(path, "model_index.json")) and os.path.isdir(inner)
    alone = os.path.isfile(os.path.join(path, "config.json"))
    return inner if pipeline or (not alone and os.path.isfile(os.path.join(inner, "config.json"))) else path


def _choose(path: str) -> str:
    """The name of a folder's index or weight file: the plain one, or else the only one that there is."""
    with os.scandir(path) as entries:
        names = sorted(entry.name for entry in entries)
    for plain in (_INDEX, _WEIGHTS):
        if plain in names:
            return plain
    whole = [name for name in names if name.endswith(".safetensors") and not _SHARD.fullmatch(name)]
    found = [*filter(_ANY_INDEX.fullmatch, names), *whole]
    found = [name for name in found if name.startswith(_STEM)] or found
    if not found:
        raise ModelUnsupported(f"{path} is a folder that has neither {_WEIGHTS} nor {_INDEX}, nor a variant of one")
    if len(found) > 1:
        several = encodable(", ".join(found[:8]))
        raise ModelUnsupported(f"{path} has {several} and no {_WEIGHTS}; give the path of the file that is meant")
    return found[0]


def _read_json(path: str) -> tuple[bytes, dict[str, Any]]:
    if not os.path.isfile(path):
        raise ModelCorrupt(f"{path} is no regular file")
    with open(path, "rb") as file:
        raw = file.read(MAX_JSON_BYTES + 1)
    try:
        value = parse_json(raw) if len(raw) <= MAX_JSON_BYTES else None
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ModelCorrupt(f"{path} is not a JSON object of at most {MAX_JSON_BYTES >> 20} MiB; download it again")
    return raw, value


def _check_shard(folder: str, name: Any) -> None:
    if not isinstance(name, str) or "\0" in name or not name.endswith(".safetensors"):
        raise ModelUnsupported(f"{folder}: the index names {name!r:.80}; this version reads .safetensors shards")
    if os.path.basename(name) != name or "\\" in name:
        raise ModelNotAllowed(f"{folder}: the index names {name!r:.200}, which leads out of the folder")


def _shard(folder: str, name: str) -> str:
    path = os.path.realpath(os.path.join(folder, name))
    if not os.path.isfile(path):
        raise ModelCorrupt(f"{folder} lacks the shard {name}; download it again")
    return path

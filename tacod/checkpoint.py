"""Model files before any weight is read: where they may lie, what their header says, who they are.

The safetensors header is JSON behind an 8-byte length (https://github.com/huggingface/safetensors#format). Reading it
needs neither torch nor the weights, so the supervisor can refuse a bad file at once.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tacod_client.errors import ModelCorrupt, ModelNotAllowed, ModelNotFound, ModelUnsupported

__all__ = ["Checkpoint", "TensorInfo", "locate", "read_checkpoint"]

MAX_HEADER_BYTES = 100 << 20
MAX_DIMS = 64
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.model.", "net.")
"""Where a diffusion model's keys may lie inside a checkpoint; bare keys otherwise."""

_ITEM_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I8", "U8", "BOOL"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}

_REFUSED_SUFFIXES = {
    **dict.fromkeys(
        (".ckpt", ".pt", ".pth", ".bin", ".pkl", ".sft.bin"),
        "is a pickle, which can run code when it is opened; convert it to .safetensors",
    ),
    ".gguf": "is a GGUF file, which this version doesn't read; use the model's .safetensors file",
}


class TensorInfo(NamedTuple):
    """One tensor of a header."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Checkpoint:
    """A safetensors file as its header describes it."""

    path: str
    tensors: Mapping[str, TensorInfo]
    """The diffusion model's tensors, their keys without `prefix`."""
    prefix: str
    config: Mapping[str, Any] | None
    """The file's own ``tacod.config`` (ComfyUI's ``unet_config`` vocabulary), if it carries one."""
    identity: str = field(repr=False)
    """Changes whenever the file does: a hash of path, size, modification time and header."""

    @property
    def parameters(self) -> int:
        """How many numbers the diffusion model's tensors hold."""
        return sum(math.prod(info.shape) for info in self.tensors.values())


def locate(name: str, roots: Sequence[str]) -> str:
    """The real path of a model file, given absolutely or relative to one of ``roots``; symlinks are resolved first.

    Raises `ModelNotAllowed` for a path outside the roots, `ModelNotFound`, and `ModelUnsupported` by file type.
    """
    if "\0" in name or not name:
        raise ModelNotFound(f"{name!r} is no file name")
    real_roots = [os.path.realpath(root) for root in roots]
    candidates = [os.path.realpath(os.path.join(root, name)) for root in real_roots] or [os.path.realpath(name)]
    allowed = [path for path in candidates if any(_inside(path, root) for root in real_roots)]
    if not allowed:
        raise ModelNotAllowed(
            f"{name} lies outside models.roots ({', '.join(roots) or 'none are configured'}); "
            "add its folder to models.roots in tacod's configuration, or move the file"
        )
    path = next((path for path in allowed if os.path.exists(path)), None)
    if path is None:
        raise ModelNotFound(f"{name}: no such file under models.roots ({', '.join(roots)})")
    if os.path.isdir(path):
        raise ModelUnsupported(f"{name} is a folder; this version reads single .safetensors files")
    if not os.path.isfile(path):
        raise ModelUnsupported(f"{name} is no regular file; to open it could block for ever")
    for suffix, reason in _REFUSED_SUFFIXES.items():
        if path.lower().endswith(suffix):
            raise ModelUnsupported(f"{name} {reason}")
    return path


def _inside(path: str, root: str) -> bool:
    return Path(path).is_relative_to(root)


def read_checkpoint(path: str) -> Checkpoint:
    """Read and check a safetensors header.

    Raises `ModelNotFound` if the file can't be opened and `ModelCorrupt` if it is truncated or no safetensors file.
    """
    try:
        with open(path, "rb") as file:
            stat = os.fstat(file.fileno())
            raw = _read_header(path, file.read(8), file, stat.st_size)
    except OSError as error:
        raise ModelNotFound(f"{path}: {error.strerror}; tacod's user must be able to read it") from None
    header = _parse_header(path, raw, stat.st_size - 8 - len(raw))
    metadata = header.pop("__metadata__", {})
    prefix = next((prefix for prefix in PREFIXES if any(key.startswith(prefix) for key in header)), "")
    tensors = {
        key.removeprefix(prefix): TensorInfo(item["dtype"], tuple(item["shape"]))
        for key, item in header.items()
        if key.startswith(prefix)
    }
    identity = hashlib.sha256(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode() + raw).hexdigest()
    return Checkpoint(path, tensors, prefix, _read_config(path, metadata), identity)


def _read_header(path: str, length: bytes, file: Any, size: int) -> bytes:
    count = struct.unpack("<Q", length)[0] if len(length) == 8 else None
    if count is None or not 2 <= count <= MAX_HEADER_BYTES or 8 + count > size:
        raise ModelCorrupt(f"{path} is no whole safetensors file ({size} bytes); download it again")
    raw: bytes = file.read(count)
    return raw


def _parse_header(path: str, raw: bytes, contents: int) -> dict[str, Any]:
    try:
        header = json.loads(raw.decode())
    except (ValueError, RecursionError) as error:
        raise ModelCorrupt(f"{path}: the header is not JSON ({error}); download the file again") from None
    if not isinstance(header, dict):
        raise ModelCorrupt(f"{path}: the header is not a JSON object; download the file again")
    end = 0
    spans = sorted(_check_entry(path, key, item) for key, item in header.items() if key != "__metadata__")
    for start, stop in spans:
        if start != end:
            raise ModelCorrupt(f"{path}: the header leaves a hole or an overlap at byte {end}; download the file again")
        end = stop
    if end != contents:
        state = "truncated" if end > contents else "longer than its header says"
        raise ModelCorrupt(f"{path} is {state} ({contents} bytes of tensors instead of {end}); download it again")
    return header


def _check_entry(path: str, key: str, item: Any) -> tuple[int, int]:
    """The offsets at which a header entry's tensor begins and ends."""
    try:
        dtype, shape, (start, end) = item["dtype"], item["shape"], item["data_offsets"]
        bits = _ITEM_BITS[dtype]
        # Types and sizes first: a product over what is no size can take any amount of memory.
        fits = type(shape) is list and len(shape) <= MAX_DIMS
        fits = fits and all(type(size) is int and 0 <= size < 1 << 63 for size in [*shape, start, end])
    except (TypeError, KeyError, ValueError):
        fits = False
    if not fits:
        raise ModelCorrupt(f"{path}: the header's entry for {key!r} is malformed; download the file again")
    if (end - start) * 8 != bits * math.prod(shape):
        raise ModelCorrupt(f"{path}: {key!r} is {dtype} {shape}, which its {end - start} bytes don't hold")
    return start, end


def _read_config(path: str, metadata: Any) -> Mapping[str, Any] | None:
    text = metadata.get("tacod.config") if isinstance(metadata, dict) else None
    if text is None:
        return None
    try:
        config = json.loads(text)
    except (ValueError, TypeError, RecursionError) as error:
        raise ModelCorrupt(f"{path}: the metadata's tacod.config is not JSON ({error})") from None
    if not isinstance(config, dict) or not isinstance(config.get("image_model"), str):
        raise ModelCorrupt(f"{path}: the metadata's tacod.config must be an object with image_model")
    return config

"""A model's weights as its files' headers describe them."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from tacod.checkpoint.folder import is_folders, open_folder
from tacod.checkpoint.gguf import is_gguf, read_gguf
from tacod.checkpoint.header import BLOCKS, FLOAT8, PLAIN, SAMPLE_BYTES, File, Header, Part, TensorInfo
from tacod.checkpoint.json_text import parse_json
from tacod.checkpoint.quantization import FLOAT8_FORMATS, FORMATS, Quantization, beside, read_quantization
from tacod.checkpoint.safetensors import read_safetensors
from tacod_client.errors import ModelCorrupt, ModelNotFound, ModelUnsupported

__all__ = ["FEW", "Checkpoint", "read_checkpoint"]

_WRAPPERS = (
    "model",
    "diffusion_model",
    "transformer",
    "unet",
    "dit",
    "net",
    "network",
    "module",
    "base_model",
    "_orig_mod",
    "_fsdp_wrapped_module",
)
"""What programs call the diffusion model in a file of more, and what PyTorch's wrappers call what they wrap."""
_WRAPPED = re.compile(rf"(?:(?:{'|'.join(_WRAPPERS)})\.)+")
_OTHERS = {
    *("vae", "first_stage_model"),
    *("text_encoders", "text_encoder", "text_encoder_2", "text_encoder_3", "cond_stage_model", "conditioner"),
    *("clip_l", "clip_g", "t5xxl", "image_encoder"),
    *("ema", "ema_model", "model_ema", "optimizer"),
}
"""The first names of other modules' tensors, which may stand beside a model without a prefix."""
_BLOCK = re.compile(r".*?\.\d+(?=\.)")
FEW = 5
"""This many keys with a prefix may be strays, in a file with more."""


@dataclass(frozen=True)
class Checkpoint:
    """A safetensors file, a GGUF file or a folder in diffusers' layout, as the headers describe it."""

    path: str
    tensors: Mapping[str, TensorInfo]
    """The diffusion model's tensors, their keys without `prefix`; diffusers' own names where `diffusers` is true."""
    prefix: str
    config: Mapping[str, Any] | None
    """What the model says of itself: a file's ``tacod.config``, in ComfyUI's ``unet_config`` vocabulary, or a folder's
    ``config.json``, in diffusers' vocabulary; None if nothing."""
    identity: str = field(repr=False)
    """Changes whenever a file does: a hash of paths, sizes, modification times, headers and samples of contents."""
    files: tuple[File, ...] = field(default=(), repr=False)
    parts: Mapping[str, tuple[Part, ...]] = field(default_factory=dict, repr=False)
    """The bytes of each tensor, in order."""
    diffusers: bool = False
    """Whether tensors and configuration are diffusers' (see `DiT.diffusers_layout` and `DiT.diffusers`)."""
    others: tuple[str, ...] = field(default=(), repr=False)
    """The names of other modules' tensors that lie beside the model's where these have no prefix."""
    notes: str | None = None
    """JSON that publishers put beside a model (the metadata's ``config``); some families read it."""
    quantization: Mapping[str, Quantization] = field(default_factory=dict, repr=False)
    """How packed weights are packed, by their names. What lies beside them, such as scales, is among `tensors`."""
    contents: str = field(default="", repr=False)
    """The same for a copy elsewhere: a hash of configuration and index, sizes, headers and samples of contents."""

    def sample_tensors(self) -> str:
        """The SHA-256 of 4 KiB from the middle of each tensor: what `contents` doesn't see if a few tensors differ.

        Raises `ModelCorrupt` if a file can't be read.
        """
        hashed = hashlib.sha256()
        with ExitStack() as held:
            opened: dict[str, int] = {}
            for name in sorted(self.parts):
                for part in self.parts[name]:
                    middle = max(part.start, (part.start + part.stop - SAMPLE_BYTES) // 2)
                    try:
                        if part.file not in opened:
                            opened[part.file] = os.open(part.file, os.O_RDONLY | os.O_CLOEXEC)
                            held.callback(os.close, opened[part.file])
                        hashed.update(os.pread(opened[part.file], min(SAMPLE_BYTES, part.stop - middle), middle))
                    except OSError as error:
                        raise ModelCorrupt(f"{part.file} can't be read ({error.strerror}); load it again") from None
        return hashed.hexdigest()

    @property
    def parameters(self) -> int:
        """How many numbers the diffusion model's tensors hold, but for what lies beside packed weights."""
        sides = self.sides
        return sum(info.size for name, info in self.tensors.items() if name not in sides)

    @property
    def formats(self) -> dict[str, int]:
        """How many weights are packed in which format, by the formats' public names; empty for plain weights."""
        sides, packed = self.sides, (*FORMATS, *FLOAT8, *BLOCKS)
        return dict(
            Counter(
                self.quantization[name].label
                if name in self.quantization
                else FLOAT8_FORMATS.get(info.dtype, info.dtype)
                for name, info in self.tensors.items()
                if len(info.shape) > 1 and info.dtype in packed and name not in sides
            )
        )

    @property
    def sides(self) -> set[str]:
        """The names of what lies beside packed weights."""
        return {beside(weight, leaf) for weight, each in self.quantization.items() for leaf in each.sides}

    def weight_bytes(self, plain_bytes: int | None) -> int:
        """The memory that the weights will take, where those of 16 bits and more are kept in ``plain_bytes`` each.

        None stands for what they take in the file.
        """
        return sum(self._bytes_of(name, plain_bytes) for name in self.tensors)

    def block_bytes(self, plain_bytes: int | None) -> list[int]:
        """What of `weight_bytes` each block takes, by the names alone: what has one number in its path is a block."""
        blocks: Counter[str] = Counter()
        for name in self.tensors:
            if (found := _BLOCK.match(name)) is not None:
                blocks[found[0]] += self._bytes_of(name, plain_bytes)
        return list(blocks.values())

    def _bytes_of(self, name: str, plain_bytes: int | None) -> int:
        info = self.tensors[name]
        if plain_bytes is not None and info.dtype in PLAIN:
            return info.size * plain_bytes
        return sum(part.stop - part.start for part in self.parts[name])


def read_checkpoint(path: str, prefix: str | None = None, whole: bool = False) -> Checkpoint:
    """Read and check the headers of a model file or folder, without torch and without the weights.

    A file may hold the model behind a prefix, with other models beside it. By default that is the one which most keys
    have of those that are usual (``model.diffusion_model.``, ``module.``, …). Where it has none, tensors that are other
    modules' by their first names (a VAE's, text encoders', a moving average) are left out, unless ``whole`` is true.
    Packed layers that can't be read are then left as they lie, for they may be another module's.

    Raises `ModelNotFound` if a file can't be opened, `ModelCorrupt` if one is truncated or not what its name says,
    `ModelUnsupported` for a folder or a GGUF file of a kind that isn't read, and for what is neither file nor folder.
    """
    try:
        return _read_folder(path) if is_folders(path) else _read_file(path, prefix, whole)
    except OSError as error:
        where = error.filename or path
        raise ModelNotFound(f"{where}: {error.strerror}; tacod's user must be able to read it") from None


def _read_file(path: str, prefix: str | None, whole: bool) -> Checkpoint:
    if os.path.exists(path) and not os.path.isfile(path):
        raise ModelUnsupported(f"{path} is no regular file, and opening it could block; name the model's file")
    header = read_gguf(path) if is_gguf(path) or path.lower().endswith(".gguf") else read_safetensors(path)
    if prefix is None:
        prefix = _find_prefix(header.entries)
    entries = {key.removeprefix(prefix): entry for key, entry in header.entries.items() if key.startswith(prefix)}
    own = {key: entry for key, entry in entries.items() if prefix or whole or key.partition(".")[0] not in _OTHERS}
    # A file of nothing else has its model among them.
    others = tuple(key for key in entries if key not in own) if own else ()
    entries, quantization = read_quantization(path, own or entries, [header.texts], prefix, strict=not whole)
    return Checkpoint(
        path,
        {key: entry.info for key, entry in entries.items()},
        prefix,
        _read_config(path, header.texts),
        _identify(path, b"", [header]),
        (header.file,),
        {key: (entry.part,) for key, entry in entries.items()},
        others=others,
        notes=header.texts.get("config"),
        quantization=quantization,
        contents=_describe_contents(b"", [header]),
    )


def _find_prefix(keys: Collection[str]) -> str:
    """The usual prefix of the most keys, if these are more than a few or half of all; empty if there is none."""
    counts = Counter(found[0] for key in keys if (found := _WRAPPED.match(key)))
    common = [prefix for prefix, count in counts.items() if count > FEW or 2 * count >= len(keys)]
    # A name that says it goes before numbers: encoders and VAEs lie in modules too.
    return max(common, key=lambda prefix: (prefix.endswith("diffusion_model."), counts[prefix]), default="")


def _read_folder(path: str) -> Checkpoint:
    folder = open_folder(path)
    headers, entries = folder.read()
    entries, quantization = read_quantization(path, entries, [header.texts for header in headers], "")
    return Checkpoint(
        path,
        {key: entry.info for key, entry in entries.items()},
        "",
        folder.config,
        _identify(path, folder.raw, headers),
        tuple(header.file for header in headers),
        {key: (entry.part,) for key, entry in entries.items()},
        diffusers=True,
        quantization=quantization,
        contents=_describe_contents(folder.raw, headers),
    )


def _identify(path: str, raw: bytes, headers: Iterable[Header]) -> str:
    hashed = hashlib.sha256(path.encode(errors="surrogateescape") + b"\0" + hashlib.sha256(raw).digest())
    for header in headers:
        file = header.file
        state = f"{file.path}\0{file.size}\0{file.mtime_ns}\0"
        hashed.update(state.encode(errors="surrogateescape") + header.digest)
    return hashed.hexdigest()


def _describe_contents(raw: bytes, headers: Iterable[Header]) -> str:
    hashed = hashlib.sha256(hashlib.sha256(raw).digest())
    for header in headers:
        # Neither names nor places: the index has the names, and a copy has no links.
        hashed.update(f"{header.file.size}\0".encode() + header.digest)
    return hashed.hexdigest()


def _read_config(path: str, texts: Mapping[str, str]) -> Mapping[str, Any] | None:
    text = texts.get("tacod.config")
    if text is None:
        return None
    try:
        config = parse_json(text)
    except (ValueError, RecursionError) as error:
        raise ModelCorrupt(f"{path}: the metadata's tacod.config is not JSON ({error})") from None
    if not isinstance(config, dict) or not isinstance(config.get("image_model"), str):
        raise ModelCorrupt(f"{path}: the metadata's tacod.config must be an object with image_model")
    return config

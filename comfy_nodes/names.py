"""What ComfyUI calls the weights that a file holds.

ComfyUI renames some as it loads a file; which ones depends on family and version. So its own function is asked: each of
the file's tensors goes through it as an empty one, and comes out under ComfyUI's name.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from safetensors import safe_open

from tacod.checkpoint import Checkpoint, is_gguf, read_checkpoint
from tacod.checkpoint.quantization import Quantization, descriptions
from tacod_client.tensors import TORCH_NAMES

from . import hooks
from .quantized import read_layers

__all__ = ["DTYPES", "SAFETENSORS", "Header", "Names", "is_gguf", "layers_in_file", "names_in_file", "read_header"]

log = logging.getLogger(__name__)

SAFETENSORS = (".safetensors", ".sft")
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, torchs) for name, torchs in TORCH_NAMES.items()}
"""Torch's dtypes by safetensors' names for them."""


@dataclass(frozen=True, eq=False)
class Names(Mapping[str, str]):
    """The file's key for each of ComfyUI's names of a network's weights."""

    keys_in_file: Mapping[str, str] = field(default_factory=dict)
    prefix: str = ""
    """What stands before all of the diffusion model's keys in the file."""

    def __getitem__(self, name: str) -> str:
        return self.keys_in_file[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys_in_file)

    def __len__(self) -> int:
        return len(self.keys_in_file)

    def for_daemon(self, name: str) -> str:
        """The daemon's name of a weight: the file's, without the prefix.

        What the file lacks stands beside the layer's weight in it, or else keeps its own name.
        """
        if name in self.keys_in_file:
            return self.keys_in_file[name].removeprefix(self.prefix)
        layer, _, leaf = name.rpartition(".")
        weight = self.keys_in_file.get(f"{layer}.weight", "")
        return weight.removeprefix(self.prefix).removesuffix("weight") + leaf if weight.endswith(".weight") else name


@dataclass(frozen=True)
class Header:
    """What a file says of its tensors."""

    tensors: Mapping[str, torch.Tensor]
    """By key, each without contents; bytes for a dtype that torch lacks, fp16 for GGUF's kinds."""
    metadata: Mapping[str, str] | None
    layers: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    """The JSON of the diffusion model's quantized layers, by their keys without the prefix."""
    marked: bool = False
    """Whether that is made of ``scaled_fp8``, and no layer has any in the file."""

    @classmethod
    def of_gguf(cls, checkpoint: Checkpoint) -> Header:
        """A GGUF file's."""
        metadata = None if checkpoint.config is None else {"tacod.config": json.dumps(checkpoint.config)}
        kinds = {key: info.dtype if info.dtype in DTYPES else "F16" for key, info in checkpoint.tensors.items()}
        return cls({key: _meta(kinds[key], info.shape) for key, info in checkpoint.tensors.items()}, metadata)

    @cached_property
    def prefix(self) -> str:
        """What stands before the diffusion model's keys, as ComfyUI sees it; empty for bare keys."""
        return _prefix(self.tensors)

    @cached_property
    def bare(self) -> dict[str, torch.Tensor]:
        """The diffusion model's tensors, their keys without the prefix."""
        prefix = self.prefix
        return {key.removeprefix(prefix): each for key, each in self.tensors.items() if key.startswith(prefix)}


def read_header(path: str) -> Header:
    """A safetensors or GGUF file's tensors, without their contents.

    Raises what `safe_open` raises, a `TacodError` for a GGUF file that can't be read, or if what it says of a quantized
    layer can't.
    """
    if is_gguf(path):
        return Header.of_gguf(read_checkpoint(path))
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
        header = Header({key: _meta(each.get_dtype(), each.get_shape()) for key, each in slices.items()}, metadata)
        prefix, sizes = header.prefix, {key: each.numel() for key, each in header.bare.items()}
        said, marked = descriptions(
            path, sizes, [metadata or {}], prefix, lambda name: bytes(file.get_tensor(prefix + name).tolist())
        )
        return replace(header, layers={**said, **marked}, marked=bool(marked) and not said)


def _prefix(tensors: Mapping[str, torch.Tensor]) -> str:
    find = hooks.find("comfy.model_detection.unet_prefix_from_state_dict")
    prefix: str = find(tensors) if find is not None else ""
    return prefix if any(key.startswith(prefix) for key in tensors) else ""


def _meta(dtype: str, shape: Any) -> torch.Tensor:
    return torch.empty(tuple(shape), dtype=DTYPES.get(dtype, torch.uint8), device="meta")


def names_in_file(header: Header, config: Any) -> Names:
    """ComfyUI's names of the weights in a file.

    Args:
        header: The file's.
        config: ComfyUI's ``model_config`` of the MODEL (``comfy.supported_models``).

    What ComfyUI computes from several tensors has no key of its own in the file, and is left out.
    """
    bare = header.bare
    rename = getattr(config, "process_unet_state_dict", None)
    try:
        renamed = rename(dict(bare)) if rename is not None else bare
    except Exception as error:  # a family that looks into the tensors, which are empty here
        log.info("TACO-DiT: %s does not rename empty tensors (%s)", type(config).__name__, error)
        renamed = bare
    marks = {id(each): key for key, each in bare.items()}
    found = {name: marks[id(each)] for name, each in renamed.items() if id(each) in marks}
    return Names({name: header.prefix + key for name, key in found.items()}, header.prefix)


def layers_in_file(header: Header, names: Names) -> dict[str, Quantization]:
    """A file's quantized layers by ComfyUI's names. Raises `Refused` for what the daemon doesn't read."""
    ours = {
        key.removeprefix(names.prefix).removesuffix(".weight"): name.removesuffix(".weight")
        for name, key in names.items()
    }
    return read_layers({ours[key]: said for key, said in header.layers.items() if key in ours})

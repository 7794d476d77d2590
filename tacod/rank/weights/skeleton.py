"""A filled unit of a model without its large tensors, for ranks that haven't read its file.

It travels as msgpack: shapes, dtypes, the bytes of small tensors, and the kinds and settings of packed layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgpack
import torch
from torch import Tensor, nn

from tacod.rank.families.base import DiT
from tacod.rank.ops.packed.base import PackedLinear
from tacod.rank.weights.parts import assign
from tacod.rank.weights.stage import owner_of
from tacod_client.tensors import as_bytes

__all__ = ["Skeleton"]


@dataclass(frozen=True)
class Skeleton:
    """What it takes to make the same layers elsewhere."""

    packed: Mapping[str, Mapping[str, Any]]
    """Layers that take the place of others, by their paths, as `_described`."""
    tensors: Mapping[str, Mapping[str, Any]]
    """All tensors by their paths, as `_told`: the large ones without their bytes. Of a weight with parts its parts."""

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], packed: Mapping[str, PackedLinear], smallest: int) -> Skeleton:
        """Of a unit's tensors and packed layers; tensors of fewer bytes than ``smallest`` are small."""
        return cls(
            {path: _described(layer) for path, layer in packed.items()},
            {name: _told(tensor, tensor.nbytes < smallest) for name, tensor in tensors.items()},
        )

    @staticmethod
    def pack(skeletons: Sequence[Skeleton]) -> bytes:
        """Skeletons as bytes for another rank."""
        packed: bytes = msgpack.packb([[each.packed, each.tensors] for each in skeletons])
        return packed

    @staticmethod
    def unpack(packed: bytes) -> Iterator[Skeleton]:
        """Those that `pack` got, in their order."""
        return (Skeleton(*each) for each in msgpack.unpackb(packed))

    def fill(self, model: DiT, device: torch.device) -> dict[str, Tensor]:
        """Make a model's layers what they are here, with the small tensors; returns all tensors by their paths."""
        for path, described in self.packed.items():
            model.set_submodule(path, _made(described))
        found = {name: _heard(each, device) for name, each in self.tensors.items()}
        for name, tensor in found.items():
            assign(*owner_of(model, name), tensor)
        return found


def _described(layer: PackedLinear) -> dict[str, Any]:
    """A packed layer without its numbers: its kind, its settings, and which tensors it has."""
    settings = {name: value for name, value in vars(layer).items() if name not in _OF_EVERY_MODULE}
    return {
        "kind": type(layer).__name__,
        "settings": {**settings, "dtype": _name(layer.dtype)},
        "parameters": {name: each is not None for name, each in layer._parameters.items()},
        "buffers": {name: each is not None for name, each in layer._buffers.items()},
    }


def _made(described: Mapping[str, Any]) -> PackedLinear:
    """The layer that `_described` has told of; in the places of its tensors are empty ones on the device meta."""
    kind: type[PackedLinear] = _kinds(PackedLinear)[described["kind"]]
    layer = kind.__new__(kind)
    nn.Module.__init__(layer)
    for name, value in described["settings"].items():
        setattr(layer, name, getattr(torch, value) if name == "dtype" else value)
    for name, there in described["parameters"].items():
        empty = nn.Parameter(torch.empty(0, device="meta"), requires_grad=False)
        layer.register_parameter(name, empty if there else None)
    for name, there in described["buffers"].items():
        layer.register_buffer(name, torch.empty(0, device="meta") if there else None, persistent=False)
    return layer


def _told(tensor: Tensor, whole: bool) -> dict[str, Any]:
    """A tensor's shape and dtype, and with ``whole`` its bytes."""
    data = as_bytes(tensor.detach()).cpu().numpy().tobytes() if whole else None
    return {"shape": list(tensor.shape), "dtype": _name(tensor.dtype), "data": data}


def _heard(told: Mapping[str, Any], device: torch.device) -> Tensor:
    """The tensor that `_told` has told of: on ``device``, or without its bytes on the device meta."""
    dtype, data = getattr(torch, told["dtype"]), told["data"]
    if data is None:
        return torch.empty(told["shape"], dtype=dtype, device="meta")
    if not data:
        return torch.empty(told["shape"], dtype=dtype, device=device)
    return torch.frombuffer(bytearray(data), dtype=dtype).reshape(told["shape"]).to(device)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _kinds(base: Any) -> dict[str, Any]:
    """All kinds of packed layers by their names."""
    found = {each.__name__: each for each in base.__subclasses__()}
    return {**found, **{name: kind for each in found.values() for name, kind in _kinds(each).items()}}


_OF_EVERY_MODULE = frozenset(vars(nn.Module()))

"""A filled unit of a model without its large tensors, for ranks that haven't read its file."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tacod.rank.families.base import DiT
from tacod.rank.ops.packed.base import PackedLinear
from tacod.rank.weights.stage import assign, owner_of

__all__ = ["Skeleton"]


@dataclass(frozen=True)
class Skeleton:
    """What it takes to make the same layers elsewhere."""

    packed: Mapping[str, PackedLinear]
    """Layers that have taken the place of others, by their paths; their tensors are on the device meta."""
    tensors: Mapping[str, Tensor]
    """All tensors by their paths: small ones in the host's memory, large ones on the device meta."""

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], packed: Mapping[str, PackedLinear], smallest: int) -> Skeleton:
        """Of a unit's tensors and packed layers; tensors of fewer bytes than ``smallest`` are small."""
        return cls(
            {path: _empty(layer) for path, layer in packed.items()},
            {
                name: tensor.detach().cpu() if tensor.nbytes < smallest else _shape_of(tensor)
                for name, tensor in tensors.items()
            },
        )

    @staticmethod
    def pack(skeletons: Sequence[Skeleton]) -> bytes:
        """Skeletons as bytes for another rank, which trusts this one."""
        packed = io.BytesIO()
        torch.save(list(skeletons), packed)
        return packed.getvalue()

    @staticmethod
    def unpack(packed: bytes) -> Iterator[Skeleton]:
        """Those that `pack` got, in their order."""
        skeletons: list[Skeleton] = torch.load(io.BytesIO(packed), weights_only=False)
        return iter(skeletons)

    def fill(self, model: DiT, device: torch.device) -> dict[str, Tensor]:
        """Make a model's layers what they are here, with the small tensors; returns all tensors by their paths."""
        for path, layer in self.packed.items():
            model.set_submodule(path, layer)
        found = {name: each if each.is_meta else each.to(device) for name, each in self.tensors.items()}
        for name, tensor in found.items():
            assign(*owner_of(model, name), tensor)
        return found


def _empty(layer: PackedLinear) -> PackedLinear:
    """The same layer without its numbers."""
    twin = copy.copy(layer)
    twin._parameters = {
        leaf: None if each is None else nn.Parameter(_shape_of(each), requires_grad=False)
        for leaf, each in layer._parameters.items()
    }
    twin._buffers = {leaf: None if each is None else _shape_of(each) for leaf, each in layer._buffers.items()}
    return twin


def _shape_of(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")

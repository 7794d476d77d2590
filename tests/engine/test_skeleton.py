"""What a rank tells the others of a unit that it has read: they make the same layers of it."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from packed_layers import layers
from torch import nn

from tacod.rank.families.base import DiT
from tacod.rank.ops.packed.base import PackedLinear
from tacod.rank.ops.packed.fp8 import Fp8Linear
from tacod.rank.weights.skeleton import Skeleton

CPU = torch.device("cpu")
SMALL = 1 << 30


def told(layer: PackedLinear, smallest: int) -> tuple[Any, dict[str, Any]]:
    """A model on another rank after it has heard of a layer, and what it has found."""
    tensors = {f"layer.{name}": each for name, each in (*layer.named_parameters(), *layer.named_buffers())}
    packed = Skeleton.pack([Skeleton.of(tensors, {"layer": layer}, smallest)])
    other = nn.Module()
    other.layer = nn.Linear(1, 1, device="meta")
    (skeleton,) = Skeleton.unpack(packed)
    return other, skeleton.fill(cast(DiT, other), CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_kind_of_layer_is_made_again(dtype: torch.dtype) -> None:
    plain = nn.Linear(48, 7, dtype=dtype).requires_grad_(False)
    for name, layer in {**layers(dtype), "fp8 on the fly": Fp8Linear.of(plain)}.items():
        other, _ = told(layer, SMALL)
        assert type(other.layer) is type(layer), name
        x = torch.randn(3, layer.in_features, dtype=dtype)
        # Random scales of blocks may be NaN.
        assert torch.equal(other.layer(x).nan_to_num(), layer(x).nan_to_num()), name
        mine, theirs = (
            {key: str(value) for key, value in vars(each).items() if key[0] != "_"} for each in (layer, other.layer)
        )
        assert mine == theirs, name


def test_large_tensors_are_told_by_their_shapes() -> None:
    layer = layers(torch.float32)["int8, by row"]
    other, found = told(layer, 100)
    assert {name: (each.is_meta, each.shape, each.dtype) for name, each in found.items()} == {
        "layer.data": (True, layer.data.shape, torch.int8),
        "layer.scale": (False, (7, 1), torch.float32),
    }
    assert other.layer.data is found["layer.data"]
    assert torch.equal(other.layer.scale, layer.scale)

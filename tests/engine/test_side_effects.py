"""What is seen of a call of a network that isn't ours, and what of it is against a CUDA graph."""

from __future__ import annotations

import contextlib
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tacod.rank.forward.host_copies import Uncapturable
from tacod.rank.forward.side_effects import SideEffects, ours

CPU = torch.device("cpu")


def seen(function: Any, device: str = "cpu") -> SideEffects:
    """What is seen of a function of a tensor; tensors on the device meta stand for those on a GPU."""
    effects, x = SideEffects(torch.device(device), ()), torch.randn(2, 3, 16).to(device)
    with contextlib.suppress(NotImplementedError, RuntimeError, TypeError), effects.around([x]):
        function(x)
    return effects


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.to("cpu"),
        lambda x: x.cpu(),
        lambda x: x.sum().cpu(),
        lambda x: torch.empty(2, 3, 16).copy_(x),
        lambda x: x[torch.tensor([0, 1])],
        lambda x: x.to(dtype=torch.float16, device="cpu"),
    ],
)
def test_copies_between_devices_are_seen(function: Any) -> None:
    assert seen(function, "meta").reason == "it copies between the host and the device"


@pytest.mark.parametrize(
    "function",
    [
        lambda x: bool(x.any()),
        lambda x: x.tolist() if x.sum().item() else None,
        lambda x: torch.equal(x, x),
        lambda x: torch.allclose(x, x),
        lambda x: x.nonzero(),
        lambda x: x.masked_select(x > 0),
        lambda x: x.unique(),
        lambda x: torch.repeat_interleave(x, torch.tensor([1, 2]), dim=0),
        lambda x: int(x[0, 0, 0]),
        lambda x: torch.where(x > 0),
        lambda x: list(range(x.argmax())),
    ],
)
def test_reads_of_the_host_are_seen(function: Any) -> None:
    assert "the host reads numbers of the device" in seen(function).reason


def test_what_a_graph_may_do() -> None:
    x, weight, table = torch.randn(2, 3, 16), nn.Parameter(torch.randn(16, 16)), torch.randn(16)
    effects = SideEffects(CPU, [weight])
    with effects.around([x]):
        y = nn.functional.linear(x, weight) * torch.tensor(2.0) + table[:8].repeat(2)
        y[0] = 3
        y[:, [0, 1]] += 1
        y.add_(x.to(torch.float64).float()).masked_fill_(y > 0, 1.5)
        nn.functional.scaled_dot_product_attention(y, y, y).clone().view(-1)[torch.arange(3)].zero_()
        torch.repeat_interleave(x, torch.tensor([1, 2]), dim=0, output_size=3)
        x.add_(1)
    assert effects.reason == ""
    assert [each.data_ptr() for each in effects.kept.values() if each.numel() > 2] == [table.data_ptr()]


class Copies:
    """What a network makes on the host for a device, by each way; meta stands for a GPU."""

    def __init__(self) -> None:
        self.first, self.outs = 1.0, list[Tensor]()

    def __call__(self, x: Tensor) -> None:
        host = torch.tensor([self.first, 2.0])
        place = torch.empty(2, device="meta")
        self.outs = [
            host.to("meta"),
            host.to(torch.device("meta"), torch.float16),
            host.to(device="meta", non_blocking=True),
            host.to(x),
            torch.tensor([self.first], device="meta", dtype=torch.float64),
            torch.as_tensor(host, device="meta"),
            x.new_tensor([self.first, 3.0]),
            place.copy_(host),
        ]


class Recorded(TorchDispatchMode):
    """A list of what is done on the device."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.is_meta and "empty" not in func.name():
            self.done.append(func)
        return out


def test_what_the_host_makes_is_a_constant_of_the_graph() -> None:
    make, x, recorded = Copies(), torch.empty(2, 3, 16, device="meta"), Recorded()
    effects = seen(make, "meta")
    assert effects.reason == ""
    noted = make.outs
    with effects.copies.around([]), recorded:
        make(x)
    assert effects.copies.fault == ""
    assert [(each.shape, each.dtype) for each in make.outs] == [(each.shape, each.dtype) for each in noted]
    # Each is a copy, as the network may write to it.
    assert recorded.done == [torch.ops.aten.clone.default] * 7 + [torch.ops.aten.copy_.default]


def test_other_numbers_of_the_host_are_no_constant() -> None:
    make, x = Copies(), torch.empty(2, 3, 16, device="meta")
    effects, fewer = seen(make, "meta"), seen(make, "meta")
    make.first = -1.0
    with effects.copies.around([]), pytest.raises(Uncapturable, match="other tensors to the device"):
        make(x)
    # The network may have caught that.
    assert "other tensors to the device" in effects.copies.fault
    with fewer.copies.around([]):
        pass
    assert "other tensors to the device" in fewer.copies.fault


def test_exchanges_of_ours_write_to_memory_of_theirs() -> None:
    room, table = torch.zeros(4), torch.ones(4)
    effects = SideEffects(CPU, [])
    with effects.around([]):
        with ours(table):
            room.add_(table)
        assert effects.reason == ""
        room.add_(1)
    assert effects.reason == "it writes to a tensor that it keeps"
    assert table.untyped_storage()._cdata in effects.kept


def test_a_refused_call_leaves_nothing_on_the_device() -> None:
    effects = seen(lambda x: torch.tensor([1.0], device="meta") + x, "meta")
    left = weakref.ref(effects.copies)
    gc.disable()
    try:
        del effects
        assert left() is None
    finally:
        gc.enable()

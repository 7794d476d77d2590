"""What a network that isn't ours does within a forward beside computing on the device: most of it no graph does again.

A CUDA graph repeats kernels with the addresses that they had. What the host reads, draws or decides isn't repeated, and
memory that the graph reads but doesn't own has to stay where it is, and as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from tacod.rank.forward.host_copies import HostCopies

__all__ = ["SideEffects", "ours"]

_COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
_PLAIN = (Tensor, nn.Parameter)
_INDEX = torch.ops.aten.index.Tensor
_HOST = torch.device("cpu")
_COMPOSITE = "CompositeImplicitAutograd"

_ours = [0]
"""How many contexts of `ours` there are."""
_active: list[SideEffects] = []
"""Those that look on now."""


@contextmanager
def ours(*read: Tensor) -> Iterator[None]:
    """A context for an exchange of ours within a network: it may write to memory. Tensors that it ``read`` count."""
    for each in _active[-1:]:
        each.reads(read)
    _ours[0] += 1
    try:
        yield
    finally:
        _ours[0] -= 1


class SideEffects(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Looks on at a call of a network, and notes what a replay would not do again, or not in the same way.

    It sees what PyTorch dispatches, and nothing of other kernels. While it does, PyTorch chooses other kernels, so what
    the call gives may differ in the last bit.

    Args:
        device: The device that computes; the host's numbers are no concern of a graph's.
        weights: What the model holds, which may be read and not written.
    """

    captures: ClassVar[bool] = False
    supports_higher_order_operators = True

    def __init__(self, device: torch.device, weights: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.reason = ""
        """The first reason against a graph; empty if there is none."""
        self.copies = HostCopies(device)
        """What the host has made for the device."""
        self.kept: dict[int, Tensor] = {}
        """Tensors that were read and were there before, one for each piece of memory; no inputs and no weights."""
        self._device = device
        self._weights = {_memory(each) for each in weights}
        self._made: set[int] = set()

    @contextmanager
    def around(self, inputs: Iterable[Tensor]) -> Iterator[None]:
        """The context for a call with these inputs. It may write to them, as each replay gets new ones."""
        self._made.update(map(_memory, inputs))
        with self, self.copies.hearing(self._makes):
            yield

    def __enter__(self) -> SideEffects:
        _active.append(self)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        _active.pop()

    def reads(self, tensors: Iterable[Tensor]) -> None:
        """Note which of the tensors that something reads were there before."""
        for each in tensors:
            memory = _memory(each)
            if memory not in self._made and memory not in self._weights:
                self.kept.setdefault(memory, each)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: to keep PyTorch's compiler out of a mode, PyTorch imports it, which takes seconds."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation of PyTorch's, and note what is against it."""
        kwargs = kwargs or {}
        if any(each not in _PLAIN for each in types):
            # Such as a quantized weight, whose own code runs next, and comes here with plain tensors.
            return NotImplemented
        if not isinstance(func, torch._ops.OpOverload):
            self._refuse(f"it uses {func}, of which nothing is known here")
            return func(*args, **kwargs)
        name: str = func.name()  # type: ignore[no-untyped-call]
        if torch._C._dispatch_has_kernel_for_dispatch_key(name, _COMPOSITE):
            # Made of other operations, which are looked at one by one.
            with self:
                return func._op_dk(torch._C.DispatchKey.CompositeImplicitAutograd, *args, **kwargs)
        given = _tensors((args, kwargs))
        if not _ours[0]:
            spared = self._check(func, given, args, kwargs)
            if spared:
                # What it keeps is to be written to once for each call.
                args, kwargs = tree_map(lambda each: spared.get(id(each), each), (args, kwargs))
        out = func(*args, **kwargs)
        known = set(map(_memory, given))
        self._made.update(each for each in map(_memory, _tensors(out)) if each not in known)
        return out

    def _makes(self, tensor: Tensor) -> None:
        self._made.add(_memory(tensor))
        self.kept.pop(_memory(tensor), None)

    def _check(self, func: Any, given: list[Tensor], args: Any, kwargs: Any) -> dict[int, Tensor]:
        """Note what is against an operation; returns what it may not write to, each with a copy that it may."""
        if func is torch.ops.aten.lift_fresh.default:
            # Numbers of Python's have just become this tensor.
            self._made.update(map(_memory, given))
            if not self.copies.copying and any(each.device == self._device != _HOST for each in given):
                self._refuse("it makes a tensor of the host's numbers")
        if self._reads(func, given, args, kwargs):
            self._refuse(f"the host reads numbers of the device ({func.overloadpacket.__name__})")
        if _copies(func, given, kwargs) and not self.copies.copying:
            self._refuse("it copies between the host and the device")
        self.reads(given)
        spared = [each for each in _written(func, args, kwargs) if _memory(each) not in self._made]
        if any(_memory(each) in self._weights for each in spared):
            self._refuse("it writes to its weights")
        elif spared:
            self._refuse("it writes to a tensor that it keeps")
        return {id(each): each.clone() for each in spared}

    def _reads(self, func: Any, given: list[Tensor], args: Any, kwargs: Any) -> bool:
        """Whether the host waits for what the device has computed: a number, or how many there are."""
        if not any(each.device == self._device for each in given):
            return False
        if torch.Tag.data_dependent_output in func.tags:
            return True
        if torch.Tag.dynamic_output_shape not in func.tags:
            return False
        if func is _INDEX:
            return any(each.dtype in (torch.bool, torch.uint8) for each in _tensors(args[1]))
        return kwargs.get("output_size") is None

    def _refuse(self, reason: str) -> None:
        self.reason = self.reason or reason


def _copies(func: Any, given: list[Tensor], kwargs: Any) -> bool:
    """Whether an operation's tensors lie on several devices; a single number of the host's may be part of it."""
    devices = {each.device for each in given if each.ndim or each.device.type != "cpu" or func in _COPIES}
    if func in _COPIES and kwargs.get("device") is not None:
        devices.add(torch.device(kwargs["device"]))
    numbers = {each.index for each in devices if each.index is not None}
    return len({each.type for each in devices}) > 1 or len(numbers) > 1


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The tensors to whose memory an operation writes."""
    if torch.Tag.inplace_view in func.tags:
        return []
    written = [
        args[place] if place < len(args) else kwargs.get(each.name)
        for place, each in enumerate(func._schema.arguments)
        if each.alias_info is not None and each.alias_info.is_write
    ]
    return _tensors(written)


def _tensors(values: Any) -> list[Tensor]:
    return [each for each in tree_leaves(values) if isinstance(each, Tensor)]


def _memory(tensor: Tensor) -> int:
    """What tells the memory of a tensor, and of its views, from others that are there at the same time."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        # One of several parts, such as a sparse one.
        return id(tensor)

"""Tensors that a network makes on the host and copies to the device: constants of its CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tacod_client.tensors import as_bytes

__all__ = ["HostCopies", "Uncapturable"]

_MAKERS = (torch.tensor, torch.as_tensor, torch.asarray)
_OTHERS = "it copies other tensors to the device at each call"


class Uncapturable(RuntimeError):
    """A network's forward can't be a CUDA graph; tells why."""


@dataclass(frozen=True)
class _Copy:
    source: Tensor
    """On the host, as it was."""
    result: Tensor
    """On the device."""


class HostCopies(TorchFunctionMode):
    """A context for a network's code, once to note what it copies to the device, and once to capture it without that.

    What the host makes follows from the call's numbers and from what the network keeps, if it reads nothing of the
    device and draws nothing. So it is the same in each call of a kind. A copy from the host within a graph would read
    that memory at each replay, when it may be something else; the graph copies what the device had got.

    It is no mode of PyTorch's dispatcher: while there is one, PyTorch chooses other kernels.
    """

    captures: ClassVar[bool] = True

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.copying = False
        """Whether a copy is under way."""
        self._hears: Callable[[Tensor], None] | None = None
        self._device = device
        self._copies: list[_Copy] = []
        self._next: int | None = None
        self._is_other = False

    def around(self, inputs: Iterable[Tensor]) -> AbstractContextManager[Any]:
        """The context for a call with these inputs to be captured."""
        self._next = 0
        return self

    @contextmanager
    def hearing(self, made: Callable[[Tensor], None]) -> Iterator[None]:
        """The context for a call to be noted; ``made`` hears of tensors that were made of numbers."""
        self._hears = made
        try:
            with self:
                yield
        finally:
            # Else the two would hold each other, and what a refused call has left would stay on the device.
            self._hears = None

    @property
    def fault(self) -> str:
        """Why what was captured isn't what was noted; empty if it is. The network may have caught `Uncapturable`."""
        missing = self._next is not None and self._next < len(self._copies)
        return _OTHERS if self._is_other or missing else ""

    @property
    def nbytes(self) -> int:
        """Bytes of the copies on the device."""
        return sum(each.result.nbytes for each in self._copies)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one of torch's functions; a copy to the device in its own way."""
        kwargs = kwargs or {}
        source = self._source(func, args, kwargs)
        if source is None or self._next is None:
            out = func(*args, **kwargs) if source is None else self._note(func, args, kwargs, source)
            if self._hears is not None and func in (torch.tensor, Tensor.new_tensor):
                self._hears(out)
            return out
        known = self._copies[self._next] if self._next < len(self._copies) else None
        self._next += 1
        if known is None or not _equal(known.source, source):
            self._is_other = True
            raise Uncapturable(_OTHERS)
        # It may be written to.
        return args[0].copy_(known.result) if func is Tensor.copy_ else known.result.clone()

    def _note(self, func: Any, args: Any, kwargs: Any, source: Tensor) -> Any:
        before = source.clone()
        self.copying = True
        try:
            out = func(*args, **kwargs)
            self._copies.append(_Copy(before, source.to(self._device) if func is Tensor.copy_ else out.clone()))
        finally:
            self.copying = False
        return out

    def _source(self, func: Any, args: Any, kwargs: Any) -> Tensor | None:
        """The host's tensor that a function would copy to the device; None if it does something else."""
        if func in _MAKERS:
            data = args[0] if args else kwargs.get("data", kwargs.get("obj"))
            if not self._is_device(kwargs.get("device")) or (isinstance(data, Tensor) and not _is_on_host(data)):
                return None
            return torch.as_tensor(func(*args, **{**kwargs, "device": "cpu"}))
        if func is Tensor.new_tensor:
            device = kwargs.get("device") or args[0].device
            return torch.tensor(args[1], dtype=kwargs.get("dtype")) if self._is_device(device) else None
        if not args or not isinstance(args[0], Tensor):
            return None
        if func is Tensor.copy_:
            other = args[1] if len(args) > 1 else kwargs.get("src", kwargs.get("other"))
            return other if self._is_device(args[0].device) and _is_on_host(other) else None
        if not _is_on_host(args[0]):
            return None
        if func is Tensor.cuda:
            return args[0] if self._device.type == "cuda" else None
        if func is Tensor.to and any(map(self._is_device, (*args[1:], *kwargs.values()))):
            source: Tensor = args[0]
            return source
        return None

    def _is_device(self, value: Any) -> bool:
        """Whether a value, one of a function's arguments, says that something is to be on the device."""
        if isinstance(value, Tensor):
            value = value.device
        if isinstance(value, int) and not isinstance(value, bool):
            return self._device.type == "cuda"
        if isinstance(value, str):
            value = torch.device(value)
        return isinstance(value, torch.device) and value.type == self._device.type != "cpu"


def _is_on_host(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type == "cpu"


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of the host are equal to the bit."""
    if one.shape != other.shape or one.dtype != other.dtype or one.stride() != other.stride():
        return False
    return as_bytes(one).equal(as_bytes(other))

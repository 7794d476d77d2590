"""Digests of tensors that come again: conditioning is the same at every step, and SHA-256 is slow.

To copy conditioning from a GPU is slow too, so there it is compared with a copy on the same GPU.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from tacod_client.tensors import kind_of, to_wire
from tacod_client.wire import Buffer, Tensor, split

if TYPE_CHECKING:
    import torch

__all__ = ["Copies", "Digests", "Glance"]

KEPT_BYTES = 128 << 20
"""Contents that are remembered; the least recently used go first."""
KEPT_TENSORS = 64
COPIED_BYTES = 64 << 20
"""Most of what is copied on GPUs to recognize conditioning there; the least recently used go first."""
COPIED_TENSORS = 32
GLANCED_WORDS = 64
"""How many words of 8 bytes a glance compares at the beginning of each frame, and as many of the rest."""
GLANCED_HEAD = 512
"""Words at the beginning of a frame, as what differs mostly does so there."""


class Digests:
    """Remembers the contents of the last tensors, each with its digest.

    What is remembered is a copy, and a tensor is recognized only by equal bytes: its caller may change it in place.
    """

    def __init__(self, limit: int = KEPT_BYTES, copies: Copies | None = None) -> None:
        """``copies`` are those of what lies on GPUs, which several may share; its own by default."""
        self.limit = limit
        self.copies = Copies() if copies is None else copies
        self._kept: list[Tensor] = []
        """With their digests, in the order of use; the most recently used is last."""
        self._lock = threading.Lock()

    def address(self, value: Any, name: str) -> Tensor:
        """A torch tensor (any device) or numpy array of a caller's as a wire tensor with its digest.

        Raises `ArgumentError`, naming the argument by ``name``.
        """
        known = self.copies.find(value)
        if known is not None:
            return known
        copy = self.copies.make(value)
        if copy is None:
            return self.of(to_wire(value, name))
        # Of the copy, as another thread may change what was copied.
        known = self.of(to_wire(copy, name))
        self.copies.keep(copy, known)
        return known

    def of(self, tensor: Tensor) -> Tensor:
        """The same tensor with its digest; if it is remembered, with bytes of its own."""
        with self._lock:
            found = next((place for place, each in enumerate(self._kept) if _equal(each, tensor)), None)
            if found is not None:
                return self._use(found)
            if tensor.nbytes > self.limit:
                return tensor.with_digest()
            fresh = Tensor(tensor.dtype, tensor.shape, split(b"".join(tensor.frames or ()))).with_digest()
            self._kept.append(fresh)
            while sum(each.nbytes for each in self._kept) > self.limit or len(self._kept) > KEPT_TENSORS:
                del self._kept[0]
            return fresh

    def like(self, tensor: Tensor) -> Tensor | None:
        """The remembered tensor that this one seems to be, at a glance; None if there is none.

        None also if there are several: a guess among them would often be wrong, and each wrong guess costs a forward.
        """
        with self._lock:
            found = [place for place, each in enumerate(self._kept) if _alike(each, tensor)]
            return self._use(found[0]) if len(found) == 1 else None

    def _use(self, place: int) -> Tensor:
        used = self._kept.pop(place)
        self._kept.append(used)
        return used


class Copies:
    """Copies of conditioning on the GPU where it lies, each with what it is on the wire.

    A client has one for all of its models: what is kept of a GPU's memory is bounded, however many these are.
    """

    def __init__(self, limit: int = COPIED_BYTES) -> None:
        self.limit = limit
        self._kept: list[tuple[torch.Tensor, Tensor]] = []
        """In the order of use; the most recently used is last."""
        self._lock = threading.Lock()

    def find(self, value: Any) -> Tensor | None:
        """What a caller's tensor is on the wire; None if it lies on no GPU, or no copy is known to have its bytes."""
        if not _is_on_gpu(value):
            return None
        import torch

        with self._lock, suppress(torch.cuda.OutOfMemoryError):
            # To compare takes memory too.
            for place, (copy, tensor) in enumerate(self._kept):
                if _same_bytes(copy, value):
                    self._kept.append(self._kept.pop(place))
                    return tensor
        return None

    def make(self, value: Any) -> torch.Tensor | None:
        """A copy of a caller's tensor; None if it lies on no GPU, is too large, or the GPU's memory is short."""
        if not _is_on_gpu(value) or value.nbytes > self.limit:
            return None
        import torch

        try:
            copy: torch.Tensor = value.detach().clone(memory_format=torch.contiguous_format)
        except torch.cuda.OutOfMemoryError:
            return None
        return copy

    def keep(self, copy: torch.Tensor, tensor: Tensor) -> None:
        """Remember a copy, and what it is on the wire."""
        with self._lock:
            self._kept.append((copy, tensor))
            while sum(each.nbytes for _, each in self._kept) > self.limit or len(self._kept) > COPIED_TENSORS:
                del self._kept[0]

    def clear(self) -> None:
        """Let go of all of them."""
        with self._lock:
            self._kept.clear()


class Glance:
    """The digests of one request's tensors; known tensors are recognized at a glance.

    Comparing megabytes takes as long as sending them, so it is done after the request is sent: until `holds` returns,
    digests are guesses.
    """

    def __init__(self, digests: Digests) -> None:
        self._digests = digests
        self._taken: list[tuple[Tensor, Tensor]] = []
        """Pairs of a remembered tensor and the one that was taken for it."""
        self._trusted = True

    def address(self, value: Any, name: str) -> Tensor:
        """As `Digests.address`; of what lies on a CPU only a little is compared, until there was a wrong guess."""
        if not self._trusted or _is_on_gpu(value):
            return self._digests.address(value, name)
        tensor = to_wire(value, name)
        known = self._digests.like(tensor)
        if known is None:
            return self._digests.of(tensor)
        self._taken.append((known, tensor))
        return known

    def holds(self) -> bool:
        """Whether all guesses were right. If not, ask `address` again for every tensor."""
        self._trusted = all(_equal(*pair) for pair in self._taken)
        self._taken.clear()
        return self._trusted


def _is_on_gpu(value: Any) -> bool:
    """Whether a tensor's bytes lie in the memory of a GPU of CUDA's or ROCm's, as they are."""
    if kind_of(value) != "torch" or not value.is_cuda:
        return False
    import torch

    return value.layout is torch.strided and not value.is_neg()


def _same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are alike to the bit, compared on their device: [any shape], of any dtype."""
    import torch

    if (one.dtype, one.shape, one.device) != (other.dtype, other.shape, other.device):
        return False
    # As numbers, 0 would be -0, and NaN not itself.
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    return torch.equal(one.view(whole), other.detach().view(whole))


def _equal(one: Tensor, other: Tensor) -> bool:
    import numpy as np

    return _alike(one, other) and all(
        np.array_equal(np.frombuffer(a, np.uint64), np.frombuffer(b, np.uint64)) and rest == other_rest
        for (a, rest), (b, other_rest) in zip(
            map(_words, one.frames or ()), map(_words, other.frames or ()), strict=True
        )
    )


def _alike(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors seem equal: a few words of each frame are compared, half of them at its beginning."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return all(_glance(a) == _glance(b) for a, b in zip(one.frames or (), other.frames or (), strict=True))


def _glance(frame: Buffer) -> list[memoryview]:
    words, rest = _words(frame)
    parts = words[:GLANCED_HEAD], words[GLANCED_HEAD:]
    return [*(each[:: max(1, len(each) // GLANCED_WORDS)] for each in parts), rest]


def _words(frame: Buffer) -> tuple[memoryview, memoryview]:
    """A frame as words of 8 bytes, and the bytes behind them."""
    raw = memoryview(frame).cast("B")
    whole = len(raw) // 8 * 8
    return raw[:whole].cast("Q"), raw[whole:]

"""Digests of tensors that come again: conditioning is the same at every step, and SHA-256 is slow."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

from tacod_client.wire import Tensor, split

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Digests", "Glance"]

KEPT_BYTES = 128 << 20
"""Contents that are remembered; the least recently used go first."""
KEPT_TENSORS = 64
GLANCED_WORDS = 64
"""How many words of each frame a glance compares, some of them at its beginning."""


class Digests:
    """Remembers the contents of the last tensors, each with its digest.

    What is remembered is a copy, and a tensor is recognized only by equal bytes: its caller may change it in place.
    """

    def __init__(self, limit: int = KEPT_BYTES) -> None:
        self.limit = limit
        self._kept: list[Tensor] = []
        """With their digests, in the order of use; the most recently used is last."""
        self._lock = threading.Lock()

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
            found = [place for place, each in enumerate(self._kept) if _equal(each, tensor, at_a_glance=True)]
            return self._use(found[0]) if len(found) == 1 else None

    def _use(self, place: int) -> Tensor:
        used = self._kept.pop(place)
        self._kept.append(used)
        return used


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

    def of(self, tensor: Tensor) -> Tensor:
        """As `Digests.of`; after a wrong guess it compares all bytes."""
        known = self._digests.like(tensor) if self._trusted else None
        if known is None:
            return self._digests.of(tensor)
        self._taken.append((known, tensor))
        return known

    def holds(self) -> bool:
        """Whether all guesses were right. If not, ask `of` again for every tensor."""
        self._trusted = all(_equal(*pair) for pair in self._taken)
        self._taken.clear()
        return self._trusted


def _equal(one: Tensor, other: Tensor, at_a_glance: bool = False) -> bool:
    import numpy as np

    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    for a, b in zip(_words(one), _words(other), strict=True):
        step = max(1, len(a) // GLANCED_WORDS) if at_a_glance else 1
        if not np.array_equal(a[::step], b[::step]):
            return False
    return True


def _words(tensor: Tensor) -> Iterator[np.ndarray[tuple[int], np.dtype[np.generic]]]:
    """The contents as 8-byte words and a rest: a little of each frame first, for what differs mostly does so there."""
    import numpy as np

    for frame in tensor.frames or ():
        raw = np.frombuffer(frame, np.uint8)
        whole = len(raw) // 8 * 8
        words = raw[:whole].view(np.uint64)
        yield from (words[:512], words[512:], raw[whole:])

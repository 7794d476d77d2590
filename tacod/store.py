"""Client tensors by content: bytes that travelled once and are used many times."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from tacod_client.errors import ArgumentError, QueueFull
from tacod_client.wire import Tensor, map_tensors

__all__ = ["Store", "digests_of", "tensors_of", "without_claims"]


COUNT = 1 << 14
"""Most tensors that a store keeps: small ones cost more than their bytes."""


class Store:
    """A content-addressed store, least recently used out first, bounded by bytes and by count.

    Tensors that a queued or running job refers to are pinned and stay.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.nbytes = 0
        self.hits = 0
        self.misses = 0
        self._tensors: OrderedDict[bytes, Tensor] = OrderedDict()
        self._pins: Counter[bytes] = Counter()

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._tensors

    def missing(self, digests: Iterable[bytes]) -> list[bytes]:
        """Those of ``digests`` that the store lacks; counts hits and misses."""
        absent = []
        for digest in digests:
            if digest in self._tensors:
                self.hits += 1
                self._tensors.move_to_end(digest)
            else:
                self.misses += 1
                absent.append(digest)
        return absent

    def get(self, digest: bytes) -> Tensor:
        """A tensor that is there."""
        return self._tensors[digest]

    def check(self, value: Any) -> None:
        """Check that what a body says of the tensors that it names is true of those that are here.

        Raises `ArgumentError`.
        """
        for said in tensors_of(value):
            known = self._tensors.get(said.digest or b"")
            if said.frames is not None or known is None:
                continue
            if (said.dtype, said.shape) != (known.dtype, known.shape):
                raise ArgumentError(
                    f"a tensor is said to be {said.dtype} {list(said.shape)}, but the one of its digest is "
                    f"{known.dtype} {list(known.shape)}; name it as it was sent, or send this one",
                    argument="tensors",
                )

    def put(self, tensor: Tensor) -> bytes:
        """Keep a tensor, making room if need be; returns its digest, computed here and not taken on trust.

        Raises `QueueFull` if what is pinned leaves no room.
        """
        tensor = Tensor(tensor.dtype, tensor.shape, tensor.frames).with_digest()
        digest = tensor.digest
        assert digest is not None
        if digest not in self._tensors:
            self._make_room(tensor.nbytes)
            self._tensors[digest] = tensor
            self.nbytes += tensor.nbytes
        self._tensors.move_to_end(digest)
        return digest

    def pin(self, digests: Iterable[bytes]) -> None:
        """Keep these until they are unpinned as often."""
        self._pins.update(digests)

    def unpin(self, digests: Iterable[bytes]) -> None:
        """Undo one `pin`."""
        self._pins.subtract(digests)
        self._pins += Counter()

    def _make_room(self, nbytes: int) -> None:
        pinned = sum(self._tensors[digest].nbytes for digest in self._pins)
        if len(self._pins) >= COUNT:
            raise QueueFull(f"queued jobs need all of the {COUNT} tensors that the store keeps; wait for one to end")
        if pinned + nbytes > self.limit:
            raise QueueFull(
                f"the tensor store holds {pinned} bytes that queued jobs need, and {nbytes} more don't fit in "
                f"limits.store_bytes = {self.limit}; wait for a job to end, or raise the limit",
                limit=self.limit,
            )
        for digest in [digest for digest in self._tensors if digest not in self._pins]:
            if self.nbytes + nbytes <= self.limit and len(self._tensors) < COUNT:
                break
            self.nbytes -= self._tensors.pop(digest).nbytes


def tensors_of(value: Any) -> Iterator[Tensor]:
    """All tensors of a message's body."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_of(item)
    elif isinstance(value, list):
        for item in value:
            yield from tensors_of(item)


def without_claims(value: Any) -> Any:
    """A body whose tensors that came with their bytes have no digests: those would be believed untested."""
    return map_tensors(value, lambda each: each if each.frames is None else replace(each, digest=None))


def digests_of(body: Any) -> list[bytes]:
    """The digests, each once, of those tensors that a body names without their bytes."""
    found = (tensor.digest for tensor in tensors_of(body) if tensor.frames is None and tensor.digest is not None)
    return list(dict.fromkeys(found))

"""Client tensors, stored by content: sent once, used many times."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tacod_client.errors import ArgumentError, QueueFull
from tacod_client.wire import Tensor, map_tensors

__all__ = ["Named", "Store", "digests_of", "tensors_of", "without_claims"]


COUNT = 1 << 14
"""Most tensors that a store keeps: small ones cost more than their bytes."""
CLAIM_S = 10.0
"""How long a client may pause while it uploads missing tensors, before others get the room kept for it."""
CLAIM_MOST_S = 120.0
"""How long such an upload may take in all."""


@dataclass
class _Claim:
    """What a client is about to upload for one request."""

    digests: frozenset[bytes]
    begun_s: float
    until_s: float

    def renew(self, now: float) -> None:
        """The client goes on with it."""
        self.until_s = min(now + CLAIM_S, self.begun_s + CLAIM_MOST_S)


class Store:
    """A content-addressed store, least recently used out first, bounded by bytes and by count.

    Tensors that a queued or running job refers to are pinned and stay. Of the rest, those that nobody refers to go
    first, then what `make_way` gives up, then those of loaded models' patches, and last those that other clients are
    uploading for a request. Of clients that upload at the same time, later ones don't disturb earlier ones, so each of
    them finishes.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.nbytes = 0
        self.hits = 0
        self.misses = 0
        self._tensors: OrderedDict[bytes, Tensor] = OrderedDict()
        self._pins: Counter[bytes] = Counter()
        self._brief: Counter[bytes] = Counter()
        """Of the pins, those that end soon."""
        self._held: Counter[bytes] = Counter()
        self._claims: OrderedDict[bytes, _Claim] = OrderedDict()
        """Uploads under way, by client, the oldest first."""
        self.make_way: Callable[[], bool] = lambda: False
        """Unpins something that is kept only while there is room for it; returns whether there was such a thing."""

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

    def lacks(self, digests: Iterable[bytes]) -> bool:
        """Whether any of these is missing; doesn't count as a use."""
        return any(digest not in self._tensors for digest in digests)

    def get(self, digest: bytes) -> Tensor:
        """A tensor that is there."""
        return self._tensors[digest]

    def size_of(self, digests: Iterable[bytes]) -> int:
        """Bytes of those ``digests`` that are stored, each counted once."""
        return sum(self._tensors[digest].nbytes for digest in set(digests) if digest in self._tensors)

    @property
    def room(self) -> int:
        """Bytes that fit in without what is pinned, or held for loaded models, having to go."""
        return self.limit - self.size_of([*self._pins, *self._held])

    def check(self, tensors: Iterable[Tensor]) -> None:
        """Check that stored tensors are described as they are where they are named. Raises `ArgumentError`."""
        for named in tensors:
            known = self._tensors.get(named.digest or b"")
            if known is None:
                continue
            if (named.dtype, named.shape) != (known.dtype, known.shape):
                raise ArgumentError(
                    f"a tensor is said to be {named.dtype} {list(named.shape)}, but the one of its digest is "
                    f"{known.dtype} {list(known.shape)}; name it as it was sent, or send this one",
                    argument="tensors",
                )

    def check_fits(self, sizes: Sequence[int]) -> None:
        """Check that named tensors of these sizes fit into the store together.

        Raises `QueueFull` if they never can.
        """
        if max(sizes, default=0) <= self.limit:
            self._check_fits(sum(sizes))

    def _check_fits(self, nbytes: int) -> None:
        if nbytes > self.limit:
            raise QueueFull(
                f"{nbytes} bytes of tensors at once never fit in the tensor store of limits.store_bytes = "
                f"{self.limit}; send less, or raise the limit",
                limit=self.limit,
            )

    def put(self, tensor: Tensor, owner: bytes = b"", now: float = 0.0) -> bytes:
        """Keep a tensor; see `put_all`."""
        return self.put_all([tensor], owner, now)[0]

    def put_all(self, tensors: Iterable[Tensor], owner: bytes = b"", now: float = 0.0) -> list[bytes]:
        """Store tensors, making room if need be; returns their digests, which are computed here.

        Raises `QueueFull` if pinned tensors, or claims older than ``owner``'s, leave no room; then none is stored.
        """
        known = [Tensor(each.dtype, each.shape, each.frames).with_digest() for each in tensors]
        given = {each.digest: each for each in known if each.digest is not None}
        if owner in self._claims:
            self._claims[owner].renew(now)
        new = {digest: each for digest, each in given.items() if digest not in self._tensors}
        if new:
            self._make_room(sum(each.nbytes for each in new.values()), len(new), set(given), owner, now)
        for digest, each in given.items():
            self._tensors.setdefault(digest, each)
            self._tensors.move_to_end(digest)
        self.nbytes += sum(each.nbytes for each in new.values())
        return [each.digest for each in known if each.digest is not None]

    def claim(self, owner: bytes, digests: Iterable[bytes], now: float) -> None:
        """A client will upload the missing ones of these and ask again; those that are stored stay until then."""
        self._drop_claims(now)
        claim = self._claims.setdefault(owner, _Claim(frozenset(), now, now))
        claim.digests = frozenset(digests)
        claim.renew(now)

    def disclaim(self, owner: bytes) -> None:
        """A client has asked again, or is gone."""
        self._claims.pop(owner, None)

    def pin(self, digests: Sequence[bytes], brief: bool = False) -> None:
        """Keep these until they are unpinned as many times; ``brief``: that will be soon."""
        self._pins.update(digests)
        if brief:
            self._brief.update(digests)

    def unpin(self, digests: Sequence[bytes], brief: bool = False) -> None:
        """Undo one `pin`."""
        self._pins -= Counter(digests)
        if brief:
            self._brief -= Counter(digests)

    def hold(self, digests: Iterable[bytes]) -> None:
        """Evict these only after tensors that nobody holds, until they are released as many times."""
        self._held.update(digests)

    def release(self, digests: Iterable[bytes]) -> None:
        """Undo one `hold`."""
        self._held -= Counter(digests)

    def _drop_claims(self, now: float) -> None:
        for gone in [each for each, claim in self._claims.items() if claim.until_s < now]:
            del self._claims[gone]

    def _make_room(self, nbytes: int, count: int, given: set[bytes], owner: bytes, now: float) -> None:
        """Make room for so many bytes in so many tensors more; those that were ``given`` with them stay."""
        self._check_fits(nbytes)
        if self.nbytes + nbytes <= self.limit and len(self._tensors) + count <= COUNT:
            return
        self._drop_claims(now)
        firm, claimed = self._firm(given, owner)
        kept, many = self.size_of(firm), len(firm) + count > COUNT
        short = many or kept + nbytes > self.limit
        victims = [] if short else self._victims(nbytes, count, firm, claimed)
        if (short or any(each in claimed or each in self._held for each in victims)) and self.make_way():
            self._make_room(nbytes, count, given, owner, now)
            return
        if short:
            lasting = [digest for digest, times in self._pins.items() if times > self._brief[digest]]
            soon = self.size_of(lasting) + nbytes <= self.limit and len(lasting) + count <= COUNT
            what = f"all of the {COUNT} tensors" if many else f"{kept} bytes"
            raise QueueFull(
                f"queued jobs, and uploads that began before, need {what} that the tensor store keeps, and {nbytes} "
                f"bytes more don't fit in limits.store_bytes = {self.limit}; wait for a job to end, or raise the limit",
                limit=self.limit,
                **({"soon": True} if soon else {}),
            )
        for digest in victims:
            self.nbytes -= self._tensors.pop(digest).nbytes

    def _firm(self, given: set[bytes], owner: bytes) -> tuple[set[bytes], set[bytes]]:
        """What stays where ``owner`` makes room, with what was ``given``; and what goes last, as others upload it."""
        firm, claimed = given | set(self._pins), set[bytes]()
        before = True
        for each, claim in self._claims.items():
            (firm if before else claimed).update(claim.digests)
            before = before and each != owner
        return {digest for digest in firm if digest in self._tensors}, claimed

    def _victims(self, nbytes: int, count: int, firm: set[bytes], claimed: set[bytes]) -> list[bytes]:
        """What goes for so many bytes in so many tensors more."""
        going: list[bytes] = []
        nbytes, count = self.nbytes + nbytes, len(self._tensors) + count
        for turn in range(3):
            for digest, tensor in self._tensors.items():
                if nbytes <= self.limit and count <= COUNT:
                    return going
                if digest not in firm and turn == (2 if digest in claimed else digest in self._held):
                    going.append(digest)
                    nbytes -= tensor.nbytes
                    count -= 1
        return going


@dataclass(frozen=True, eq=False)
class Named:
    """The tensors of a request."""

    tensors: Sequence[Tensor]
    """Those that it names by digest."""
    digests: list[bytes]
    """Theirs, each once."""
    sizes: Sequence[int]
    """The bytes of each of ``digests``."""
    nbytes: int
    """Bytes of those that came with it."""

    @staticmethod
    def of(value: Any) -> Named:
        """Those of a body."""
        tensors = list(tensors_of(value))
        named = [each for each in tensors if each.frames is None and each.digest is not None]
        sizes = {each.digest: each.nbytes for each in named if each.digest is not None}
        came = sum(each.nbytes for each in tensors if each.frames is not None)
        return Named(named, [*sizes], [*sizes.values()], came)


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
    """A body in which tensors that came with their bytes have no digests: nobody checked those."""
    return map_tensors(value, lambda each: each if each.frames is None else replace(each, digest=None))


def digests_of(body: Any) -> list[bytes]:
    """The digests of the tensors that a body names without their bytes, each once."""
    return Named.of(body).digests

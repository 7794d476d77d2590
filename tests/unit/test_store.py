"""The tensor store: by content, least recently used out first, within its bounds, its pins kept."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tacod import store as module
from tacod.store import Store, digests_of, tensors_of, without_claims
from tacod_client.errors import ArgumentError, QueueFull
from tacod_client.wire import Tensor, digest_of


def tensor(content: int, size: int = 10) -> Tensor:
    return Tensor("U8", (size,), (bytes([content]) * size,))


def digest(content: int, size: int = 10) -> bytes:
    return digest_of("U8", (size,), [bytes([content]) * size])


def filled(limit: int, *contents: int) -> Store:
    store = Store(limit)
    for content in contents:
        store.put(tensor(content))
    return store


def held(store: Store, *contents: int) -> list[int]:
    return [content for content in contents if digest(content) in store]


def test_what_is_put_is_there_with_its_bytes_and_digest() -> None:
    store = Store(100)
    assert store.put(tensor(1)) == digest(1)
    assert store.get(digest(1)) == Tensor("U8", (10,), (bytes([1]) * 10,), digest(1))
    assert store.nbytes == 10


def test_digest_is_not_taken_on_trust() -> None:
    store = Store(100)
    forged = Tensor("U8", (10,), (b"x" * 10,), digest(1))
    assert store.put(forged) == digest_of("U8", (10,), [b"x" * 10])
    assert digest(1) not in store


def test_same_content_is_kept_once() -> None:
    store = filled(100, 1, 1, 1)
    assert store.nbytes == 10


def test_least_recently_used_goes_first() -> None:
    store = filled(30, 1, 2, 3, 4)
    assert held(store, 1, 2, 3, 4) == [2, 3, 4]
    assert store.nbytes == 30


def test_asking_for_a_tensor_counts_as_use() -> None:
    store = filled(30, 1, 2, 3)
    store.missing([digest(1)])
    store.put(tensor(4))
    assert held(store, 1, 2, 3, 4) == [1, 3, 4]


def test_putting_a_tensor_again_counts_as_use() -> None:
    store = filled(30, 1, 2, 3)
    store.put(tensor(1))
    store.put(tensor(4))
    assert held(store, 1, 2, 3, 4) == [1, 3, 4]


def test_only_as_many_go_as_must() -> None:
    store = filled(30, 1, 2, 3)
    store.put(tensor(4, 11))
    assert held(store, 1, 2, 3) == [3]
    assert store.nbytes == 21


def test_missing_tells_what_lacks_in_order_and_counts() -> None:
    store = filled(100, 1, 2)
    assert store.missing([digest(9), digest(1), digest(8), digest(2)]) == [digest(9), digest(8)]
    assert (store.hits, store.misses) == (2, 2)


def test_pinned_tensors_stay() -> None:
    store = filled(30, 1, 2, 3)
    store.pin([digest(1), digest(2)])
    store.put(tensor(4))
    store.put(tensor(5))
    assert held(store, 1, 2, 3, 4, 5) == [1, 2, 5]


def test_tensor_is_held_until_its_last_pin_is_gone() -> None:
    store = filled(10, 1)
    store.pin([digest(1)])
    store.pin([digest(1)])
    store.unpin([digest(1)])
    with pytest.raises(QueueFull):
        store.put(tensor(2))
    store.unpin([digest(1)])
    store.put(tensor(2))
    assert held(store, 1, 2) == [2]


def test_pins_that_leave_no_room_refuse_and_harm_nothing() -> None:
    store = filled(30, 1, 2, 3)
    store.pin([digest(1), digest(2)])
    with pytest.raises(QueueFull, match=r"limits\.store_bytes") as caught:
        store.put(tensor(4, 11))
    assert caught.value.details == {"limit": 30}
    assert held(store, 1, 2, 3) == [1, 2, 3]
    assert store.nbytes == 30


def test_tensor_larger_than_the_store_is_refused_and_drives_nothing_out() -> None:
    store = filled(30, 1, 2, 3)
    with pytest.raises(QueueFull):
        store.put(tensor(4, 31))
    assert held(store, 1, 2, 3) == [1, 2, 3]


def test_tensor_as_large_as_the_store_fits() -> None:
    store = filled(30, 1, 2, 3)
    store.put(tensor(4, 30))
    assert store.nbytes == 30


def test_empty_tensors_are_bounded_by_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "COUNT", 3)
    store = Store(100)
    digests = [store.put(Tensor("U8", (0, size), ())) for size in range(9)]
    assert [each in store for each in digests] == [False] * 6 + [True] * 3
    store.pin(digests[6:])
    with pytest.raises(QueueFull, match="all of the 3"):
        store.put(tensor(1))


def test_tensors_are_found_wherever_they_stand() -> None:
    one, two, three = tensor(1), tensor(2), tensor(3)
    assert list(tensors_of({"a": one, "b": [two, {"c": three}], "d": 4, "e": None, "f": "text"})) == [one, two, three]


def test_digests_are_those_that_travelled_alone_each_once() -> None:
    whole, stored = tensor(1).with_digest(), tensor(2).with_digest().without_bytes()
    assert digests_of({"a": [stored, whole, stored], "b": {"c": stored}}) == [digest(2)]


class Uses(RuleBasedStateMachine):
    """Puts, pins and questions in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.store = Store(30)
        self.sizes: dict[bytes, int] = {}
        """Of all that was ever put."""
        self.pins: Counter[bytes] = Counter()

    @rule(content=st.integers(0, 9), size=st.integers(0, 20))
    def put(self, content: int, size: int) -> None:
        wanted = digest(content, size)
        fits = wanted in self.store or sum(self.sizes[each] for each in self.pins) + size <= 30
        try:
            self.store.put(tensor(content, size))
        except QueueFull:
            assert not fits
        else:
            assert fits
            assert wanted in self.store
            self.sizes[wanted] = size

    @rule(data=st.data())
    def pin(self, data: st.DataObject) -> None:
        here = sorted(each for each in self.sizes if each in self.store)
        chosen = data.draw(st.lists(st.sampled_from(here), unique=True)) if here else []
        assert self.store.missing(chosen) == []
        self.store.pin(chosen)
        self.pins.update(chosen)

    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        if self.pins:
            chosen = data.draw(st.sampled_from(sorted(self.pins)))
            self.store.unpin([chosen])
            self.pins -= Counter([chosen])

    @invariant()
    def pinned_tensors_are_there(self) -> None:
        assert all(each in self.store for each in self.pins)

    @invariant()
    def bytes_are_counted_and_bounded(self) -> None:
        assert self.store.nbytes == sum(size for each, size in self.sizes.items() if each in self.store) <= 30


TestUses = Uses.TestCase
TestUses.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)


def test_what_is_said_of_a_tensor_must_be_true() -> None:
    store = Store(1000)
    known = Tensor("F32", (2, 3), (bytes(24),)).with_digest()
    store.put(known)
    store.check({"x": [known.without_bytes()], "new": Tensor("F32", (9,), None, b"?" * 32)})
    for dtype, shape in (("F32", (3, 2)), ("I32", (2, 3)), ("F32", (6,))):
        with pytest.raises(ArgumentError, match=r"but the one of its digest is F32 \[2, 3\]"):
            store.check({"x": [Tensor(dtype, shape, None, known.digest)]})


def test_a_digest_beside_bytes_is_not_believed() -> None:
    """A rank would find another client's tensor by it."""
    liar = Tensor("F32", (1,), (bytes(4),), b"1" * 32)
    named = Tensor("F32", (1,), None, b"2" * 32)
    kept = without_claims({"x": [liar, named], "y": 3})
    assert kept == {"x": [Tensor("F32", (1,), (bytes(4),)), named], "y": 3}

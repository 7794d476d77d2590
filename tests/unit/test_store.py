"""The tensor store: by content, least recently used out first, within its bounds, its pins kept."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tacod.execution import store as module
from tacod.execution.store import Named, Store, digests_of, tensors_of, without_claims
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


# --- many users -------------------------------------------------------------------------------------------------------


def test_what_a_model_holds_goes_after_what_nobody_needs() -> None:
    store = filled(30, 1, 2, 3)
    store.hold([digest(1)])
    store.put(tensor(4))
    assert held(store, 1, 2, 3, 4) == [1, 3, 4]
    store.put(tensor(5, 30))
    assert held(store, 1, 2, 3, 4) == [], "and it does go"
    store.release([digest(1)])


def test_what_models_hold_makes_room_by_count_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "COUNT", 5)
    store = Store(1000)
    for first in (0, 2, 4, 6):
        digests = store.put_all([tensor(first), tensor(first + 1)])
        store.hold(digests)
        assert not store.lacks(digests)
    assert held(store, *range(8)) == [3, 4, 5, 6, 7]


def test_tensors_that_come_together_stay_together_or_none_is_kept() -> None:
    store = filled(30, 1, 2, 3)
    assert store.put_all([tensor(1), tensor(4), tensor(5), tensor(4)]) == [digest(each) for each in (1, 4, 5, 4)]
    assert held(store, *range(1, 6)) == [1, 4, 5]
    with pytest.raises(QueueFull, match="never fit"):
        store.put_all([tensor(content) for content in range(6, 10)])
    assert held(store, *range(1, 10)) == [1, 4, 5]


def test_a_store_that_is_full_for_a_short_time_says_so() -> None:
    store = filled(20, 1, 2)
    store.pin([digest(1)], brief=True)
    store.pin([digest(2)], brief=True)
    with pytest.raises(QueueFull) as caught:
        store.put(tensor(3))
    assert caught.value.details == {"limit": 20, "soon": True}
    store.pin([digest(1)])
    store.pin([digest(2)])
    with pytest.raises(QueueFull) as caught:
        store.put(tensor(3))
    assert caught.value.details == {"limit": 20}


def test_of_two_uploads_the_one_that_began_first_is_not_disturbed() -> None:
    store = Store(30)
    mine, yours = [digest(1), digest(2)], [digest(3), digest(4)]
    store.claim(b"me", mine, now=0.0)
    store.claim(b"you", yours, now=1.0)
    store.put(tensor(1), b"me", now=1.0)
    store.put(tensor(3), b"you", now=1.0)
    store.put(tensor(8), b"somebody", now=1.0)
    store.put(tensor(2), b"me", now=1.0)  # in the place of what nobody claims
    with pytest.raises(QueueFull) as caught:
        store.put(tensor(4), b"you", now=1.0)
    assert caught.value.details["soon"]
    assert not store.lacks(mine)
    store.disclaim(b"me")
    store.put(tensor(4), b"you", now=2.0)
    assert not store.lacks(yours)


def test_an_elder_upload_takes_a_younger_ones_room() -> None:
    store = Store(20)
    store.claim(b"me", [digest(1), digest(2)], now=0.0)
    store.claim(b"you", [digest(3)], now=0.0)
    for content, owner in ((3, b"you"), (1, b"me"), (2, b"me")):
        store.put(tensor(content), owner, now=0.0)
    assert held(store, 1, 2, 3) == [1, 2]


def test_an_upload_that_was_given_up_holds_its_room_for_a_while_only() -> None:
    store = Store(20)
    store.claim(b"gone", [digest(1), digest(2)], now=0.0)
    store.put_all([tensor(1), tensor(2)], b"gone", now=0.0)
    with pytest.raises(QueueFull):
        store.put(tensor(3), b"me", now=module.CLAIM_S - 1)
    store.put(tensor(3), b"me", now=module.CLAIM_S + 1)
    assert held(store, 1, 2, 3) == [2, 3]


def test_nobody_claims_room_for_ever() -> None:
    store = Store(10)
    store.claim(b"greedy", [digest(1)], now=0.0)
    now = 0.0
    while now < module.CLAIM_MOST_S:
        store.put(tensor(1), b"greedy", now)
        now += module.CLAIM_S / 2
    store.put(tensor(2), b"me", module.CLAIM_MOST_S + 1)
    assert held(store, 1, 2) == [2]


def test_what_never_fits_together_is_told_before_it_is_sent() -> None:
    store = Store(30)
    store.check_fits(Named.of([tensor(content).with_digest().without_bytes() for content in (1, 2, 3, 3)]).sizes)
    with pytest.raises(QueueFull, match=r"40 bytes .* never fit"):
        store.check_fits(Named.of([tensor(content).with_digest().without_bytes() for content in (1, 2, 3, 4)]).sizes)


def test_tensors_are_found_wherever_they_stand() -> None:
    one, two, three = tensor(1), tensor(2), tensor(3)
    assert list(tensors_of({"a": one, "b": [two, {"c": three}], "d": 4, "e": None, "f": "text"})) == [one, two, three]


def test_digests_are_those_that_travelled_alone_each_once() -> None:
    whole, stored = tensor(1).with_digest(), tensor(2).with_digest().without_bytes()
    shared = Tensor("U8", (7,), None, offset=64)
    body = {"a": [stored, whole, stored], "b": {"c": stored, "d": shared}}
    assert digests_of(body) == [digest(2)]
    named = Named.of(body)
    assert (named.tensors, named.digests, named.sizes, named.nbytes) == ([stored] * 3, [digest(2)], [10], 10)


class Uses(RuleBasedStateMachine):
    """Puts, pins and questions in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.store = Store(30)
        self.sizes: dict[bytes, int] = {}
        """Of all that was ever put."""
        self.pins: Counter[bytes] = Counter()
        self.claimed: list[bytes] = []

    @rule(content=st.integers(0, 9), size=st.integers(0, 20))
    def put(self, content: int, size: int) -> None:
        wanted = digest(content, size)
        kept = {each for each in (*self.pins, *self.claimed) if each in self.store}
        fits = wanted in self.store or sum(self.sizes[each] for each in kept) + size <= 30
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

    @rule(data=st.data())
    def hold(self, data: st.DataObject) -> None:
        """What a model holds hinders nobody."""
        here = sorted(each for each in self.sizes if each in self.store)
        self.store.hold(data.draw(st.lists(st.sampled_from(here), unique=True)) if here else [])

    @rule(data=st.data())
    def claim(self, data: st.DataObject) -> None:
        known = sorted(self.sizes)
        self.claimed = data.draw(st.lists(st.sampled_from(known), unique=True)) if known else []
        self.store.claim(b"somebody", self.claimed, 0.0)

    @rule()
    def disclaim(self) -> None:
        self.claimed = []
        self.store.disclaim(b"somebody")

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
    store.check([known.without_bytes(), Tensor("F32", (9,), None, b"?" * 32)])
    for dtype, shape in (("F32", (3, 2)), ("I32", (2, 3)), ("F32", (6,))):
        with pytest.raises(ArgumentError, match=r"but the one of its digest is F32 \[2, 3\]"):
            store.check([known.without_bytes(), Tensor(dtype, shape, None, known.digest)])


def test_a_digest_beside_bytes_is_not_believed() -> None:
    """A rank would find another client's tensor by it."""
    liar = Tensor("F32", (1,), (bytes(4),), b"1" * 32)
    named = Tensor("F32", (1,), None, b"2" * 32)
    kept = without_claims({"x": [liar, named], "y": 3})
    assert kept == {"x": [Tensor("F32", (1,), (bytes(4),)), named], "y": 3}

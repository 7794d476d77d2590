"""Digests of conditioning that comes again are not computed again, and never wrong."""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tacod_client import Client, wire
from tacod_client.digests import Copies, Digests, Glance
from tacod_client.loading import Loading
from tacod_client.tensors import to_wire
from tacod_client.wire import FRAME_BYTES


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 20), st.integers(0, 3)), max_size=20))
def test_a_digest_is_always_that_of_the_contents(changes: list[tuple[int, int, int]]) -> None:
    digests = Digests(limit=60)
    arrays = [np.zeros(21, np.uint8) for _ in range(4)]
    for which, place, value in changes:
        arrays[which][place] = value
        for array in arrays:
            tensor = to_wire(array, "context")
            known = digests.of(tensor)
            assert known.digest == tensor.with_digest().digest
            assert b"".join(known.frames or ()) == array.tobytes()


def test_equal_contents_are_hashed_once() -> None:
    digests = Digests()
    first, second = torch.randn(2, 300, 41).bfloat16()
    with mock.patch.object(wire, "digest_of", side_effect=wire.digest_of) as hashed:
        for _ in range(3):
            for each in (first, second.clone()):
                digests.of(to_wire(each, "context"))
    assert hashed.call_count == 2


@pytest.mark.parametrize("size", [4096, 4099, FRAME_BYTES + 5])
@pytest.mark.parametrize("place", [0, 4095, -1])
def test_a_change_in_place_is_noticed(size: int, place: int) -> None:
    digests = Digests()
    array = np.zeros(size, np.uint8)
    before = digests.of(to_wire(array, "context"))
    array[place] = 1
    after = digests.of(to_wire(array, "context"))
    assert after.digest != before.digest
    assert b"".join(before.frames or ()) == bytes(size), "what waits to be sent stays what was hashed"


@pytest.mark.parametrize("place", [0, 100, -1])
def test_what_a_glance_overlooks_does_not_hold(place: int) -> None:
    digests = Digests()
    array = np.zeros(1 << 16, np.uint8)
    digests.of(to_wire(array, "context"))
    array[place] = 1
    glance = Glance(digests)
    changed = glance.address(array, "context")
    assert glance.holds() == (place == 0), "the first words are looked at, and then it is another tensor at once"
    if place != 0:
        changed = glance.address(array, "context")
        assert glance.holds()
    assert b"".join(changed.frames or ()) == array.tobytes()
    assert changed.digest == to_wire(array, "context").with_digest().digest


def test_what_comes_again_is_known_at_a_glance() -> None:
    digests = Digests()
    array = np.arange(1 << 16, dtype=np.uint8)
    known = digests.of(to_wire(array, "context"))
    glance = Glance(digests)
    with mock.patch.object(wire, "digest_of") as hashed:
        assert glance.address(array.copy(), "context") is known
    assert glance.holds()
    assert not hashed.called


def test_the_same_bytes_in_another_form_are_another_tensor() -> None:
    digests = Digests()
    array = np.zeros((4, 6), np.float32)
    forms = [array, array.reshape(6, 4), array.view(np.int32)]
    assert len({digests.of(to_wire(form, "context")).digest for form in forms}) == len(forms)


def test_memory_is_bounded() -> None:
    digests = Digests(limit=100)
    for value in range(200):
        digests.of(to_wire(np.full(value % 30 + 1, value, np.uint8), "context"))
    assert sum(tensor.nbytes for tensor in digests._kept) <= 100
    large = np.ones(101, np.uint8)
    assert digests.of(to_wire(large, "context")).digest == to_wire(large, "context").with_digest().digest
    assert sum(tensor.nbytes for tensor in digests._kept) <= 100


def test_threads_do_not_get_each_others_tensors() -> None:
    digests = Digests()
    tensors = [[to_wire(np.full(500, 3 * who + n), "context") for n in range(3)] for who in range(2)]
    wanted = {id(each): each.with_digest().digest for mine in tensors for each in mine}
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(2) as pool:

            def ask(mine: list[wire.Tensor]) -> bool:
                return all(digests.of(each).digest == wanted[id(each)] for _ in range(500) for each in mine)

            assert all(pool.map(ask, tensors))
    finally:
        sys.setswitchinterval(interval)


def test_of_several_that_look_alike_none_is_guessed() -> None:
    digests = Digests()
    arrays = [np.zeros(1 << 16, np.uint8) for _ in range(2)]
    arrays[1][100] = 1
    first, second = (digests.of(to_wire(each, "context")) for each in arrays)
    assert digests.like(to_wire(arrays[0], "context")) is None
    glance = Glance(digests)
    assert [glance.address(each, "context").digest for each in arrays] == [first.digest, second.digest]
    assert glance.holds()


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's tensors on the CPU count as those of a GPU."""
    monkeypatch.setattr("tacod_client.digests._is_on_gpu", lambda value: isinstance(value, torch.Tensor))


@pytest.mark.usefixtures("on_gpu")
def test_what_comes_again_on_a_gpu_is_not_copied_from_it() -> None:
    digests = Digests()
    first, second = torch.randn(2, 300, 41).bfloat16()
    with mock.patch("tacod_client.digests.to_wire", side_effect=to_wire) as read:
        for _ in range(3):
            glance = Glance(digests)
            for each in (first.clone(), second.mT.contiguous().mT):
                assert glance.address(each, "context").digest == to_wire(each, "context").with_digest().digest
            assert glance.holds()
    assert read.call_count == 2


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize(
    "change",
    [
        lambda each: each.index_fill(0, torch.tensor(7), 1.0),
        lambda each: each.index_fill(0, torch.tensor(7), -0.0),
        lambda each: each.view(20, 50),
        lambda each: each.view(torch.int32),
    ],
    ids=["a number", "a sign", "shape", "dtype"],
)
def test_on_a_gpu_every_bit_counts(change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    digests, before = Digests(), torch.zeros(1000)
    digests.address(before, "context")
    after = change(before)
    assert digests.address(after, "context").digest == to_wire(after, "context").with_digest().digest
    unknown = torch.full((1000,), torch.nan)
    assert digests.address(unknown, "context") is digests.address(unknown.clone(), "context")


@pytest.mark.usefixtures("on_gpu")
def test_copies_on_a_gpu_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    copies = Copies(limit=100)
    digests = Digests()
    digests.copies = copies
    for value in range(40):
        digests.address(torch.full((value % 30 + 1,), value, dtype=torch.uint8), "context")
    assert 0 < sum(copy.nbytes for copy, _ in copies._kept) <= 100
    assert copies.make(torch.ones(101, dtype=torch.uint8)) is None
    monkeypatch.setattr(torch.Tensor, "clone", mock.Mock(side_effect=torch.OutOfMemoryError("for the test")))
    short = torch.ones(9, dtype=torch.uint8)
    assert digests.address(short, "context").digest == to_wire(short, "context").with_digest().digest


@pytest.mark.usefixtures("on_gpu")
def test_a_gpu_without_room_to_compare_costs_no_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    digests, tensor = Digests(), torch.ones(9, dtype=torch.uint8)
    known = digests.address(tensor, "context")
    monkeypatch.setattr(torch, "equal", mock.Mock(side_effect=torch.OutOfMemoryError("for the test")))
    assert digests.address(tensor, "context").digest == known.digest


@pytest.mark.usefixtures("on_gpu")
def test_all_models_of_a_client_have_the_same_copies(tmp_path: Path) -> None:
    """Otherwise a GPU's memory would be held for models that nobody uses any more."""
    described = {"id": "m", "name": "m", "family": "flux", "path": "/m", "parameters": 1, "dtype": "fp32", "plan": ""}
    with Client(f"ipc://{tmp_path}/s") as client:
        with mock.patch.object(Loading, "run", return_value=described):
            models = [client.load("m", dtype=dtype) for dtype in ("fp32", "bf16")]
        models.append(models[0].with_plan("auto"))
        tensor = torch.ones(9)
        known = [model._digests.address(tensor, "context") for model in models]
        assert known[0] is known[1] is known[2]
        assert len(client._copies._kept) == 1
    assert client._copies._kept == [], "they go with the client"


def test_what_lies_on_no_gpu_is_not_copied() -> None:
    """Nobody knows whether other devices can compare bits."""
    for device in ("cpu", "meta"):
        value = torch.ones(9, device=device)
        assert Copies().make(value) is Copies().find(value) is None

"""What lies in the uploads' folder is what was announced, and what is under way is bounded."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from unittest import mock

import pytest

from tacod import uploads as module
from tacod.uploads import Uploads
from tacod_client.errors import ArgumentError, Unavailable

PIECES = [bytes([n]) * 8 for n in range(3)]
DIGESTS = [hashlib.sha256(piece).digest() for piece in PIECES]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE_BYTES", 8)


def test_a_piece_that_leaves_a_hole_before_it_is_refused(tmp_path: Path) -> None:
    """Else the last piece alone would make a whole file of zeros, under the name of what was announced."""
    taking = Uploads(str(tmp_path), 100)
    name, _ = taking.begin(24, DIGESTS)
    for offset in (16, 8):
        with pytest.raises(ArgumentError, match="behind what is here") as caught:
            taking.add(name, offset, PIECES[offset // 8])
        assert caught.value.argument == "upload", "so that the client begins again"
    assert [taking.add(name, 8 * n, piece) for n, piece in enumerate(PIECES)] == [8, 16, 24]
    assert taking.path(name).read_bytes() == b"".join(PIECES)


def test_one_whose_beginning_went_to_make_room_begins_again(tmp_path: Path) -> None:
    taking = Uploads(str(tmp_path), 30)
    other = [hashlib.sha256(piece + b"!").digest() for piece in PIECES]
    first, _ = taking.begin(24, DIGESTS)
    taking.add(first, 0, PIECES[0])
    second, _ = taking.begin(24, [*DIGESTS[:1], *other[1:]])
    taking.add(second, 0, PIECES[0])
    with pytest.raises(ArgumentError, match="begin the upload again"):
        taking.add(first, 8, PIECES[1])
    assert taking.begin(24, DIGESTS) == (first, 0)


def test_what_was_announced_is_bounded(tmp_path: Path) -> None:
    taking = Uploads(str(tmp_path), 100)
    names = [taking.begin(8, [n.to_bytes(32, "big")])[0] for n in range(module.PENDING + 1)]
    with pytest.raises(ArgumentError, match="was not announced"):
        taking.add(names[0], 0, PIECES[0])
    with pytest.raises(ArgumentError, match="not what was announced"):
        taking.add(names[1], 0, PIECES[0])


def test_a_folder_that_can_not_be_used_is_told(tmp_path: Path) -> None:
    taking = Uploads(str(tmp_path), 100)
    name, _ = taking.begin(8, DIGESTS[:1])
    taking.add(name, 0, PIECES[0])
    denied = PermissionError(13, "Permission denied")
    with mock.patch.object(os, "utime", side_effect=denied), pytest.raises(Unavailable, match=r"models\.uploads"):
        taking.begin(8, DIGESTS[:1])

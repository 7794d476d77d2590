"""Who makes room for an upload, and who doesn't; what a full folder or disk costs."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest

from tacod.serving import uploads as module
from tacod.serving.uploads import PART, Uploads
from tacod_client.errors import ArgumentError, ModelNotAllowed, TacodError, Unavailable

A, B, C = b"a", b"b", b"c"
"""Clients."""


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE_BYTES", 8)


def content(fill: int, pieces: int) -> list[bytes]:
    return [bytes([fill]) + index.to_bytes(7, "big") for index in range(pieces)]


def begin(taking: Uploads, fill: int, pieces: int, owner: bytes) -> str:
    return taking.begin(8 * pieces, [hashlib.sha256(each).digest() for each in content(fill, pieces)], owner)[0]


def send(taking: Uploads, fill: int, pieces: int = 1, owner: bytes = A, stop: int | None = None) -> Path:
    """Upload so many pieces, or some of them; returns where the file lies at the end."""
    name = begin(taking, fill, pieces, owner)
    for index, piece in list(enumerate(content(fill, pieces)))[:stop]:
        taking.add(name, 8 * index, piece, owner)
    return taking.path(name)


# --- models.upload_bytes ----------------------------------------------------------------------------------------------


def test_what_models_need_is_not_what_makes_room(tmp_path: Path) -> None:
    used: list[str] = []
    taking = Uploads(str(tmp_path), 20, lambda: used)
    first = send(taking, 1)
    used.append(os.path.realpath(first))
    taking.note_load(used)
    second = send(taking, 2, owner=B)
    third = send(taking, 3, owner=B)
    assert (first.exists(), second.exists(), third.exists()) == (True, False, True)
    with pytest.raises(Unavailable, match=r"needed by loaded models; unload a model .*or raise models\.upload_bytes"):
        send(taking, 4, 2, owner=B)
    assert first.exists()
    assert third.exists(), "nothing goes for what can't be"
    used.clear()
    assert send(taking, 4, 2, owner=B).exists()
    assert not first.exists()


def test_a_link_to_the_folder_hides_no_use(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    used: list[str] = []
    taking = Uploads(str(tmp_path / "link"), 10, lambda: used)
    used.append(os.path.realpath(send(taking, 1)))
    with pytest.raises(Unavailable):
        send(taking, 2, owner=A)


def test_what_was_just_sent_stays_until_it_is_loaded(tmp_path: Path) -> None:
    taking = Uploads(str(tmp_path), 10)
    sent = send(taking, 1)
    with pytest.raises(Unavailable, match="upload again later"):
        send(taking, 2, owner=B)
    assert sent.exists()
    taking.note_load([str(sent)])
    assert send(taking, 2, owner=B).exists(), "it was loaded, and is needed no more"
    assert not sent.exists()


def test_a_client_s_own_files_make_room_for_its_next_ones(tmp_path: Path) -> None:
    taking = Uploads(str(tmp_path), 20)
    paths = [send(taking, fill) for fill in range(5)]
    assert [path.exists() for path in paths] == [False] * 3 + [True] * 2


def test_but_after_those_that_nobody_asked_for_lately(tmp_path: Path) -> None:
    taking = Uploads(str(tmp_path), 30)
    old, own, other = send(taking, 1, owner=A), send(taking, 2, owner=B), send(taking, 3, owner=C)
    begin(taking, 1, 1, A)
    taking.release(A)
    send(taking, 4, owner=B)
    assert (old.exists(), own.exists(), other.exists()) == (False, True, True)


@pytest.mark.parametrize("gone", ["the client", "the time"])
def test_nothing_stays_for_a_client_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gone: str) -> None:
    taking = Uploads(str(tmp_path), 20)
    whole, part = send(taking, 1), send(taking, 2, 2, stop=1)
    assert not whole.exists(), "two pieces are reserved"
    with pytest.raises(Unavailable):
        send(taking, 3, 2, owner=B)
    if gone == "the client":
        taking.release(A)
    else:
        now = module.time.monotonic() + max(module.UNDER_WAY_S, module.TO_BE_LOADED_S)
        monkeypatch.setattr(module.time, "monotonic", lambda: now + 1)
    assert send(taking, 3, 2, owner=B).exists()
    assert not part.exists()
    assert list(tmp_path.glob(f"*{PART}")) == []


def test_uploads_at_once_do_not_take_each_other_s_room(tmp_path: Path) -> None:
    """The first one gets it; to let both go on would be to finish neither."""
    taking = Uploads(str(tmp_path), 40)
    first = begin(taking, 1, 3, A)
    taking.add(first, 0, content(1, 3)[0], A)
    with pytest.raises(Unavailable, match="under way"):
        begin(taking, 2, 3, B)
    small = send(taking, 3, 2, owner=B)
    for index in (1, 2):
        taking.add(first, 8 * index, content(1, 3)[index], A)
    assert taking.path(first).exists()
    assert small.exists()
    taking.note_load([str(taking.path(first))])
    assert send(taking, 2, 3, owner=B).exists()


def test_two_clients_of_one_file_need_room_for_one(tmp_path: Path) -> None:
    taking = Uploads(str(tmp_path), 24)
    names = {begin(taking, 1, 3, owner) for owner in (A, B)}
    (name,) = names
    for index, piece in enumerate(content(1, 3)):
        for owner in (A, B) if index < 2 else (A,):
            taking.add(name, 8 * index, piece, owner)
    taking.release(A)
    assert begin(taking, 1, 3, B) == name
    with pytest.raises(Unavailable):
        send(taking, 2, owner=C)
    taking.release(B)
    assert send(taking, 2, owner=C).exists()


def test_another_configuration_goes_on_with_what_is_under_way(tmp_path: Path) -> None:
    taking = Uploads(str(tmp_path / "one"), 100)
    name = begin(taking, 1, 2, A)
    taking.add(name, 0, content(1, 2)[0], A)
    taking.apply_config(str(tmp_path / "one"), 50)
    assert taking.add(name, 8, content(1, 2)[1], A) == 16
    taking.apply_config(str(tmp_path / "two"), 50)
    assert send(taking, 1, 2).parent == tmp_path / "two"
    taking.apply_config(None, 50)
    with pytest.raises(ModelNotAllowed, match="uploads are off"):
        begin(taking, 1, 2, A)
    with pytest.raises(ModelNotAllowed, match="uploads are off"):
        taking.add(name, 0, content(1, 2)[0], A)


def test_a_limit_that_falls_ends_the_upload_that_is_over_it(tmp_path: Path) -> None:
    taking = Uploads(str(tmp_path), 100)
    name = begin(taking, 1, 3, A)
    taking.add(name, 0, content(1, 3)[0], A)
    taking.apply_config(str(tmp_path), 20)
    with pytest.raises(TacodError, match=r"models\.upload_bytes"):
        taking.add(name, 8, content(1, 3)[1], A)
    assert list(tmp_path.iterdir()) == []


# --- the disk ---------------------------------------------------------------------------------------------------------


class Disk:
    """A disk of so many blocks, of which each file takes one per 8 bytes, and its error when it is full."""

    def __init__(self, folder: Path, blocks: int, code: int = errno.ENOSPC) -> None:
        self.folder, self.blocks, self.code = folder, blocks, code
        self._write = os.pwrite

    def taken(self) -> int:
        return sum(-(-path.stat().st_size // 8) for path in self.folder.iterdir())

    def write(self, file: int, data: bytes, offset: int) -> int:
        if self.taken() >= self.blocks and os.fstat(file).st_size < offset + len(data):
            raise OSError(self.code, os.strerror(self.code))
        return self._write(file, bytes(data), offset)


@pytest.fixture
def full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Uploads]:
    """Uploads to a disk that is full after so many pieces, with an error of its own."""

    def make(blocks: int, code: int) -> Uploads:
        monkeypatch.setattr(module.os, "pwrite", Disk(tmp_path, blocks, code).write)
        return Uploads(str(tmp_path), 1 << 20)

    return make


CODES = [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO]


@pytest.mark.parametrize("code", CODES)
def test_what_can_not_be_written_goes_and_says_why(tmp_path: Path, full: Callable[..., Uploads], code: int) -> None:
    taking = full(2, code)
    with pytest.raises(Unavailable, match=os.strerror(code)) as caught:
        send(taking, 1, 5)
    assert str(tmp_path) in caught.value.message
    assert "make room there, or have models.uploads name a folder on another disk" in caught.value.message
    assert list(tmp_path.iterdir()) == []
    assert send(taking, 2, 2).exists(), "the others go on"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_old_uploads_make_room_on_a_full_disk(tmp_path: Path, full: Callable[..., Uploads], code: int) -> None:
    taking = full(4, code)
    old = [send(taking, fill, owner=B) for fill in range(4)]
    taking.release(B)
    assert send(taking, 9, 2).exists()
    assert [path.exists() for path in old] == [False, False, True, True]


def test_they_stay_where_it_would_not_help(tmp_path: Path, full: Callable[..., Uploads]) -> None:
    taking = full(4, errno.EDQUOT)
    old = [send(taking, fill, owner=B) for fill in range(2)]
    taking.release(B)
    with pytest.raises(Unavailable, match=os.strerror(errno.EDQUOT)):
        send(taking, 9, 9000)
    assert all(path.exists() for path in old)
    with pytest.raises(Unavailable, match=os.strerror(errno.EROFS)):
        send(full(2, errno.EROFS), 8)
    assert all(path.exists() for path in old)


def test_what_models_need_stays_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.os, "pwrite", Disk(tmp_path, 2).write)
    used: list[str] = []
    taking = Uploads(str(tmp_path), 1 << 20, lambda: used)
    needed, other = send(taking, 1, owner=B), send(taking, 2, owner=B)
    used.append(os.path.realpath(needed))
    taking.release(B)
    assert send(taking, 3).exists()
    assert needed.exists()
    assert not other.exists()
    with pytest.raises(Unavailable):
        send(taking, 4, owner=C)
    assert needed.exists()


def test_an_error_at_the_end_costs_that_upload_only(tmp_path: Path) -> None:
    """Network file systems tell only then that the disk is full."""
    taking = Uploads(str(tmp_path), 1 << 20)
    error = OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
    with mock.patch.object(os, "fdatasync", side_effect=error), pytest.raises(Unavailable, match=r"models\.uploads"):
        send(taking, 1, 2)
    assert list(tmp_path.iterdir()) == []
    assert send(taking, 1, 2).exists()


def free(blocks: int, size: int = 4096) -> os.statvfs_result:
    return os.statvfs_result((size, size, 1 << 20, blocks, blocks, 1, 1, 1, 0, 255))


def test_a_disk_without_room_is_told_before_anything_is_sent(tmp_path: Path) -> None:
    taking = Uploads(str(tmp_path), 1 << 30)
    old = send(taking, 1, owner=B)
    with mock.patch.object(os, "statvfs", return_value=free(2)):
        with pytest.raises(Unavailable, match=r"No space left on device; make room there .*larger disk"):
            begin(taking, 2, 4096, A)
        assert send(taking, 3, 4, owner=A).exists()
    assert old.exists()


def test_parts_under_way_count_with_what_they_will_take(tmp_path: Path) -> None:
    taking = Uploads(str(tmp_path), 1 << 30)
    with mock.patch.object(os, "statvfs", return_value=free(10)):
        send(taking, 1, 4096, owner=B, stop=1)
        with pytest.raises(Unavailable, match="No space left on device"):
            begin(taking, 2, 2048, A)
        taking.release(B)
        begin(taking, 2, 2048, A)


def test_a_file_system_that_does_not_tell_what_is_free_is_tried(tmp_path: Path) -> None:
    silent = os.statvfs_result((4096, 4096, 0, 0, 0, 0, 0, 0, 0, 255))
    with mock.patch.object(os, "statvfs", return_value=silent):
        assert send(Uploads(str(tmp_path), 1 << 30), 1, 3).exists()


def test_an_upload_that_was_given_up_is_begun_again(tmp_path: Path, full: Callable[..., Uploads]) -> None:
    taking = full(1, errno.ENOSPC)
    name = begin(taking, 1, 2, A)
    taking.add(name, 0, content(1, 2)[0], A)
    with pytest.raises(Unavailable):
        taking.add(name, 8, content(1, 2)[1], A)
    with pytest.raises(ArgumentError, match="begin it again"):
        taking.add(name, 8, content(1, 2)[1], A)

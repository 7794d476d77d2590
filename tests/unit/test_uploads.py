"""What lies in the uploads' folder is what was announced, and what is under way is bounded."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path
from unittest import mock

import pytest

from tacod.serving import uploads as module
from tacod.serving.upload_folder import UploadFolder
from tacod.serving.uploads import Uploads
from tacod_client.errors import ArgumentError, ModelNotAllowed, Unavailable

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


STRANGERS = [
    "my-own-model.safetensors",
    "A" * 64 + ".tacod.safetensors",
    "a" * 63 + ".tacod.safetensors",
    "a" * 65 + ".tacod.part",
    "a" * 64 + ".safetensors",
    "a" * 64 + ".part",
    "a" * 64 + ".tacod.safetensors.bak",
    "a" * 64 + ".tacod.safetensors\n",
    "copy of " + "a" * 64 + ".tacod.safetensors",
    "." + "a" * 64 + ".tacod.part",
    "a" * 64 + "xtacod.part",
    "a" * 64,
    os.fsdecode(b"caf\xe9.safetensors"),
]


def fill(taking: Uploads, first: int) -> str:
    """Upload eight bytes of their own."""
    piece = bytes([first]) * 8
    name, _ = taking.begin(8, [hashlib.sha256(piece).digest()])
    taking.add(name, 0, piece)
    return name


def test_only_what_tacod_put_there_makes_room(tmp_path: Path) -> None:
    """Whatever else lies there counts, and stays: files of any name, links, folders and what is in them."""
    for name in STRANGERS:
        (tmp_path / name).write_bytes(b"theirs")
        os.utime(tmp_path / name, (0, 0))
    own = "b" * 64 + module.WHOLE
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / own).write_bytes(b"theirs")
    (tmp_path / own).symlink_to(tmp_path / STRANGERS[0])
    (tmp_path / ("c" * 64 + module.PART)).mkdir()
    os.mkfifo(tmp_path / ("d" * 64 + module.WHOLE))
    before = set(tmp_path.rglob("*"))
    taking = Uploads(str(tmp_path), 6 * len(STRANGERS) + 20)
    names = [fill(taking, n) for n in range(9)]
    assert before < set(tmp_path.rglob("*"))
    assert [taking.path(name).exists() for name in names] == [False] * 7 + [True] * 2
    assert all((tmp_path / name).read_bytes() == b"theirs" for name in STRANGERS)


def test_parts_that_nobody_goes_on_with_make_room_too(tmp_path: Path) -> None:
    taking = Uploads(str(tmp_path), 30)
    name, _ = taking.begin(24, DIGESTS)
    taking.add(name, 0, PIECES[0])
    os.utime(tmp_path / (name + module.PART), (0, 0))
    for n in (7, 8, 9):
        fill(taking, n)
    assert not (tmp_path / (name + module.PART)).exists()


def test_no_room_beside_others_files_is_told_before_anything_is_sent(tmp_path: Path) -> None:
    (tmp_path / "theirs").write_bytes(bytes(90))
    taking = Uploads(str(tmp_path), 100)
    fill(taking, 1)
    with pytest.raises(ModelNotAllowed, match=r"tacod didn't put there take 90 of it.*a folder of its own"):
        taking.begin(24, DIGESTS)
    assert fill(taking, 2), "a smaller one finds room"
    assert (tmp_path / "theirs").stat().st_size == 90


def test_files_that_fill_the_folder_meanwhile_refuse_it_too(tmp_path: Path) -> None:
    taking = Uploads(str(tmp_path), 100)
    name, _ = taking.begin(24, DIGESTS)
    (tmp_path / "theirs").write_bytes(bytes(90))
    with pytest.raises(ModelNotAllowed, match="tacod didn't put there"):
        taking.add(name, 0, PIECES[0])


@pytest.mark.parametrize("suffix", [module.PART, module.WHOLE])
@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_nothing_is_written_through_what_has_its_name(tmp_path: Path, suffix: str, when: str) -> None:
    """A link, a pipe, a folder, and for what is written to a hard link: somebody put it there."""
    taking = Uploads(str(tmp_path / "up"), 100)
    (tmp_path / "up").mkdir()
    theirs = tmp_path / "theirs"
    theirs.write_bytes(bytes(8))
    name, _ = taking.begin(24, DIGESTS)
    place = tmp_path / "up" / (name + suffix)
    makes = [
        lambda: place.symlink_to(theirs),
        lambda: place.symlink_to(tmp_path / "nothing"),
        lambda: os.mkfifo(place),
        lambda: place.mkdir(),
        *([lambda: place.hardlink_to(theirs)] if suffix == module.PART else []),
    ]

    def send() -> None:
        if when == "before":
            taking.begin(24, DIGESTS)
        for n, piece in enumerate(PIECES):
            taking.add(name, 8 * n, piece)

    for make in makes:
        make()
        with pytest.raises(Unavailable, match="which tacod didn't make; move it away"):
            send()
        assert theirs.read_bytes() == bytes(8)
        assert not (tmp_path / "nothing").exists()
        place.rmdir() if place.is_dir() and not place.is_symlink() else place.unlink()
        (tmp_path / "up" / (name + module.PART)).unlink(missing_ok=True)
    assert [taking.add(name, 8 * n, piece) for n, piece in enumerate(PIECES)] == [8, 16, 24]


def test_a_whole_file_may_have_another_name_too(tmp_path: Path) -> None:
    """Somebody keeps it by a hard link."""
    taking = Uploads(str(tmp_path / "up"), 20)
    name = fill(taking, 1)
    (tmp_path / "kept").hardlink_to(taking.path(name))
    assert taking.begin(8, [hashlib.sha256(b"\1" * 8).digest()]) == (name, 8)
    os.utime(taking.path(name), (0, 0))
    for n in (2, 3):
        fill(taking, n)
    assert not taking.path(name).exists()
    assert (tmp_path / "kept").read_bytes() == b"\1" * 8


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
    with (
        mock.patch.object(UploadFolder, "holds", side_effect=denied),
        pytest.raises(Unavailable, match=r"models\.uploads"),
    ):
        taking.begin(8, DIGESTS[:1])


def test_what_is_here_is_answered_where_nothing_can_be_written(tmp_path: Path) -> None:
    """A folder that has become read-only still has what is in it."""
    taking = Uploads(str(tmp_path), 100)
    name = fill(taking, 1)
    readonly = OSError(errno.EROFS, "Read-only file system")
    with mock.patch("os.utime", side_effect=readonly), mock.patch("os.open", wraps=os.open) as opened:
        assert taking.begin(8, [hashlib.sha256(bytes([1]) * 8).digest()]) == (name, 8)
    assert all(not call.args[1] & (os.O_WRONLY | os.O_RDWR) for call in opened.call_args_list)

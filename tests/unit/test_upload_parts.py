"""What is gone on with is what was announced: parts and whole files are compared with it if somebody wrote to them."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import pytest

from tacod.serving import uploads as module
from tacod.serving.uploads import PART, WHOLE, Uploads
from tacod_client.errors import ArgumentError, ModelNotFound

PIECES = [bytes([n + 1]) * 8 for n in range(9)] + [b"end"]
DIGESTS = [hashlib.sha256(piece).digest() for piece in PIECES]
CONTENT = b"".join(PIECES)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE_BYTES", 8)


@pytest.fixture
def taking(tmp_path: Path) -> Uploads:
    return Uploads(str(tmp_path), 1 << 20)


def begin(taking: Uploads, owner: bytes = b"") -> tuple[str, int]:
    """Announce it, as clients do: until all that is there is compared."""
    name, here = taking.begin(len(CONTENT), DIGESTS, owner)
    while taking.unchecked(name):
        name, here = taking.begin(len(CONTENT), DIGESTS, owner)
    return name, here


def send(taking: Uploads, stop: int = len(PIECES), owner: bytes = b"") -> list[int]:
    """Upload it, up to a piece, as clients do; returns which pieces were sent."""
    name, here = begin(taking, owner)
    sent = []
    for index in range(stop):
        if 8 * index >= here:
            here = taking.add(name, 8 * index, PIECES[index], owner)
            sent.append(index)
    return sent


def part_of(folder: Path) -> Path:
    (path,) = folder.glob(f"*{PART}")
    return path


def whole_of(folder: Path) -> Path:
    (path,) = folder.glob(f"*{WHOLE}")
    return path


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


DAMAGES = {
    "zeros in the middle": (lambda path: overwrite(path, 20, bytes(4)), [2]),
    "zeros over two pieces": (lambda path: overwrite(path, 14, bytes(4)), [1, 2]),
    "the first byte": (lambda path: overwrite(path, 0, b"x"), [0]),
    "the last piece": (lambda path: overwrite(path, 47, b"x"), [5]),
    "all zeros": (lambda path: overwrite(path, 0, bytes(48)), [0, 1, 2, 3, 4, 5]),
    "cut within a piece": (lambda path: os.truncate(path, 37), [4, 5]),
    "cut between pieces": (lambda path: os.truncate(path, 32), [4, 5]),
    "empty": (lambda path: os.truncate(path, 0), [0, 1, 2, 3, 4, 5]),
    "gone": (Path.unlink, [0, 1, 2, 3, 4, 5]),
    "longer than the file": (lambda path: overwrite(path, 48, b"x" * 60), []),
    "another file in its place": (lambda path: [path.unlink(), path.write_bytes(CONTENT[:24])], [3, 4, 5]),
    "the same": (lambda path: path.write_bytes(CONTENT[:48]), []),
}


@pytest.mark.parametrize("restarted", [False, True])
@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_is_sent_anew_and_nothing_else(tmp_path: Path, damage: str, restarted: bool) -> None:
    taking = Uploads(str(tmp_path), 1 << 20)
    assert send(taking, 6) == [0, 1, 2, 3, 4, 5]
    change, bad = DAMAGES[damage]
    change(part_of(tmp_path))  # type: ignore[no-untyped-call]
    if restarted:
        taking = Uploads(str(tmp_path), 1 << 20)
    assert send(taking) == [*bad, 6, 7, 8, 9]
    assert whole_of(tmp_path).read_bytes() == CONTENT
    assert list(tmp_path.iterdir()) == [whole_of(tmp_path)]


def test_a_complete_part_of_a_killed_daemon_is_finished(tmp_path: Path) -> None:
    send(Uploads(str(tmp_path), 1 << 20))
    whole = whole_of(tmp_path)
    whole.rename(whole.with_name(whole.name.replace(WHOLE, PART)))
    taking = Uploads(str(tmp_path), 1 << 20)
    assert send(taking) == []
    assert whole.read_bytes() == CONTENT


def test_one_request_compares_a_few_pieces(taking: Uploads, tmp_path: Path) -> None:
    """So that others needn't wait for the whole of a large file."""
    send(taking, 9)
    again = Uploads(str(tmp_path), 1 << 20)
    seen = []
    for _ in range(4):
        name, here = again.begin(len(CONTENT), DIGESTS)
        seen.append((here, again.unchecked(name)))
    assert seen == [(32, 40), (64, 8), (72, 0), (72, 0)]


def test_what_nobody_else_wrote_to_is_not_compared(taking: Uploads) -> None:
    send(taking, 9)
    name, here = taking.begin(len(CONTENT), DIGESTS)
    assert (here, taking.unchecked(name)) == (72, 0)


def test_who_does_not_ask_on_sends_what_was_not_compared(taking: Uploads, tmp_path: Path) -> None:
    """As clients do that don't know ``unchecked``."""
    send(taking, 9)
    again = Uploads(str(tmp_path), 1 << 20)
    name, here = again.begin(len(CONTENT), DIGESTS)
    for index in range(here // 8, len(PIECES)):
        again.add(name, 8 * index, PIECES[index])
    assert whole_of(tmp_path).read_bytes() == CONTENT


def test_damage_between_two_pieces_has_the_client_begin_again(taking: Uploads, tmp_path: Path) -> None:
    send(taking, 5)
    name, _ = begin(taking)
    overwrite(part_of(tmp_path), 3, b"x")
    with pytest.raises(ArgumentError, match="begin the upload again") as caught:
        taking.add(name, 40, PIECES[5])
    assert caught.value.argument == "upload"
    assert send(taking) == [0, 5, 6, 7, 8, 9]
    assert whole_of(tmp_path).read_bytes() == CONTENT


def test_two_clients_at_once_share_the_work(taking: Uploads, tmp_path: Path) -> None:
    name, _ = begin(taking, b"a")
    assert begin(taking, b"b") == (name, 0)
    here = {b"a": 0, b"b": 0}
    while max(here.values()) < len(CONTENT):
        for owner in here:
            if max(here.values()) < len(CONTENT):
                here[owner] = taking.add(name, here[owner], PIECES[here[owner] // 8], owner)
    assert whole_of(tmp_path).read_bytes() == CONTENT
    with pytest.raises(ArgumentError, match="begin it again"):
        taking.add(name, 0, PIECES[0], b"b")
    assert begin(taking, b"b") == (name, len(CONTENT))


def test_a_piece_that_is_there_is_not_written_again(taking: Uploads, tmp_path: Path) -> None:
    send(taking, 5)
    name, _ = begin(taking)
    before = part_of(tmp_path).stat()
    assert [taking.add(name, 8 * index, PIECES[index]) for index in (4, 0, 2)] == [40, 40, 40]
    assert part_of(tmp_path).stat().st_mtime_ns == before.st_mtime_ns


def test_two_daemons_may_share_a_folder(tmp_path: Path) -> None:
    """What the other one writes is no damage, but it is compared."""
    first, second = (Uploads(str(tmp_path), 1 << 20) for _ in range(2))
    send(first, 3)
    assert send(second, 6) == [3, 4, 5]
    assert send(first) == [6, 7, 8, 9]
    assert send(second) == []


# --- whole files ------------------------------------------------------------------------------------------------------


def test_a_second_upload_changes_nothing_that_a_model_is_known_by(taking: Uploads, tmp_path: Path) -> None:
    send(taking)
    before = whole_of(tmp_path).stat()
    assert send(taking) == []
    assert send(Uploads(str(tmp_path), 1 << 20)) == []
    after = whole_of(tmp_path).stat()
    assert (after.st_mtime_ns, after.st_size, after.st_ino) == (before.st_mtime_ns, before.st_size, before.st_ino)
    assert after.st_atime_ns > before.st_atime_ns, "it was used"


def test_the_same_content_sent_again_after_it_went_is_the_same_file(taking: Uploads, tmp_path: Path) -> None:
    send(taking)
    before = whole_of(tmp_path).stat().st_mtime_ns
    whole_of(tmp_path).unlink()
    assert len(send(taking)) == len(PIECES)
    assert whole_of(tmp_path).stat().st_mtime_ns == before


WHOLE_DAMAGES = {
    "zeros": (lambda path: overwrite(path, 20, bytes(4)), [2]),
    "cut": (lambda path: os.truncate(path, 37), [4, 5, 6, 7, 8, 9]),
    "longer": (lambda path: overwrite(path, len(CONTENT), b"x"), []),
    "touched": (os.utime, []),
    "empty": (lambda path: os.truncate(path, 0), list(range(10))),
    "replaced": (lambda path: [path.unlink(), path.write_bytes(b"x" * len(CONTENT))], list(range(10))),
}


@pytest.mark.parametrize("damage", WHOLE_DAMAGES)
def test_a_whole_file_that_is_not_as_it_was_finished_is_mended(taking: Uploads, tmp_path: Path, damage: str) -> None:
    send(taking)
    path = whole_of(tmp_path)
    before = path.stat().st_mtime_ns
    taking.check(str(path))
    change, bad = WHOLE_DAMAGES[damage]
    change(path)  # type: ignore[operator]
    for name in (str(path), path.name):
        with pytest.raises(ModelNotFound, match="changed this file since it was sent; upload it again"):
            taking.check(name)
    assert send(taking) == bad
    assert path.read_bytes() == CONTENT
    assert path.stat().st_mtime_ns == before
    taking.check(str(path))


def test_a_restored_backup_is_taken_for_what_it_is(taking: Uploads, tmp_path: Path) -> None:
    send(taking)
    path = whole_of(tmp_path)
    backup = tmp_path / "backup"
    shutil.copy2(path, backup)
    path.unlink()
    shutil.copy2(backup, path)
    taking.check(str(path))
    assert send(taking) == []


def test_what_somebody_keeps_by_another_name_is_not_written_to(taking: Uploads, tmp_path: Path) -> None:
    send(taking)
    path, kept = whole_of(tmp_path), tmp_path / "kept"
    kept.hardlink_to(path)
    overwrite(kept, 20, bytes(4))
    damaged = kept.read_bytes()
    assert len(send(taking)) == len(PIECES)
    assert path.read_bytes() == CONTENT
    assert kept.read_bytes() == damaged


def test_to_load_an_upload_that_is_gone_says_what_to_do(taking: Uploads, tmp_path: Path) -> None:
    send(taking)
    path = whole_of(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path)
    path.unlink()
    for name in (str(path), str(tmp_path / "link" / path.name)):
        with pytest.raises(ModelNotFound, match="upload it again"):
            taking.check(name)
    for other in (f"/elsewhere/{path.name}", "flux.safetensors", "", str(tmp_path / "flux.safetensors")):
        taking.check(other)
    Uploads(None, 1).check(str(path))

"""Tensors from files: in order, whole wherever they are cut into pieces, and no thread or file left behind."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tacod.checkpoint import Checkpoint
from tacod.checkpoint.header import File, Part
from tacod.rank.weights import reader
from tacod.rank.weights.pinned import GpuMemory, Memory
from tacod.rank.weights.reader import Reader
from tacod_client.errors import ModelCorrupt

CPU = torch.device("cpu")
PIECE = 64
SIZES = [0, 1, PIECE - 1, PIECE, 0, PIECE + 1, 5 * PIECE, 37 * PIECE + 3, 2, 0]


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "_PIECE", PIECE)
    monkeypatch.setattr(reader, "_AHEAD", 4 * PIECE)


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    threads, files = threading.enumerate(), len([*Path("/proc/self/fd").iterdir()])
    yield
    assert threading.enumerate() == threads
    assert len([*Path("/proc/self/fd").iterdir()]) == files


def checkpoint(folder: Path, sizes: list[int] = SIZES, files: int = 1) -> tuple[Checkpoint, dict[str, bytes]]:
    """Tensors of random bytes, each in so many files; and their bytes."""
    rooms = [bytearray(os.urandom(7)) for _ in range(files)]
    paths = [str(folder / f"{number}") for number in range(files)]
    parts: dict[str, tuple[Part, ...]] = {}
    contents: dict[str, bytes] = {}
    for number, size in enumerate(sizes):
        pieces = [os.urandom(size + file) for file in range(files)]
        starts = [len(room) for room in rooms]
        for room, piece in zip(rooms, pieces, strict=True):
            room += piece
        places = zip(paths, starts, rooms, strict=True)
        parts[f"t{number}"] = tuple(Part(path, start, len(room)) for path, start, room in places)
        contents[f"t{number}"] = b"".join(pieces)
    for path, room in zip(paths, rooms, strict=True):
        Path(path).write_bytes(room)
    stats = [os.stat(path) for path in paths]
    states = [File(path, stat.st_size, stat.st_mtime_ns) for path, stat in zip(paths, stats, strict=True)]
    return Checkpoint(str(folder), {}, "", None, "", tuple(states), parts), contents


def as_bytes(tensor: Tensor) -> bytes:
    assert (tensor.dtype, tensor.ndim) == (torch.uint8, 1)
    return tensor.numpy().tobytes()


@pytest.mark.parametrize("mode", [nullcontext, torch.inference_mode])
@pytest.mark.parametrize("files", [1, 3])
def test_tensors_come_whole_and_in_the_order_asked_for(tmp_path: Path, files: int, mode: Callable[[], Any]) -> None:
    made, contents = checkpoint(tmp_path, files=files)
    names = [*contents, *reversed(contents)]
    with mode(), Reader(made, CPU) as opened:
        assert [as_bytes(each) for each in opened.read(names)] == [contents[name] for name in names]
        assert list(opened.read([])) == []


def test_tensors_keep_their_memory(tmp_path: Path) -> None:
    made, contents = checkpoint(tmp_path)
    with Reader(made, CPU) as opened:
        kept = list(opened.read(contents))
    assert [as_bytes(each) for each in kept] == [*contents.values()]
    assert all(each.untyped_storage().nbytes() == len(each) for each in kept)


def test_so_many_bytes_are_read_ahead_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[int] = []

    def allocate(memory: Memory, size: int) -> Tensor:
        begun.append(size)
        return torch.empty(size, dtype=torch.uint8)

    monkeypatch.setattr(Memory, "allocate", allocate)
    made, contents = checkpoint(tmp_path, [PIECE] * 20)
    with Reader(made, CPU) as opened:
        for count, _ in enumerate(opened.read(contents), start=1):
            assert len(begun) == min(count + 4, 20)


def test_error_in_a_thread_reaches_the_caller_in_its_tensor_s_turn(tmp_path: Path) -> None:
    made, contents = checkpoint(tmp_path, [3 * PIECE] * 9)
    with Reader(made, CPU) as opened:
        os.truncate(tmp_path / "0", os.stat(tmp_path / "0").st_size - PIECE)
        tensors = opened.read(contents)
        assert [as_bytes(next(tensors)) for _ in range(8)] == [*contents.values()][:8]
        with pytest.raises(ModelCorrupt, match="changed while it was being loaded"):
            next(tensors)


def test_any_error_in_a_thread_reaches_the_caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def preadv(*_: Any) -> int:
        raise OSError(5, "Input/output error")

    made, contents = checkpoint(tmp_path)
    with Reader(made, CPU) as opened:
        monkeypatch.setattr(os, "preadv", preadv)
        with pytest.raises(OSError, match="Input/output"):
            list(opened.read(contents))


def test_reader_may_be_left_in_the_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What no thread has begun by then is not read."""
    gate, real = threading.Event(), os.preadv
    reads: list[int] = []

    def preadv(file: int, rooms: list[memoryview], at: int) -> int:
        reads.append(at)
        if len(reads) > 1:
            gate.wait()
        return real(file, rooms, at)

    made, contents = checkpoint(tmp_path, [PIECE] + [40 * PIECE] * 2)
    monkeypatch.setattr(os, "preadv", preadv)
    opens = threading.Timer(0.3, gate.set)
    with Reader(made, CPU) as opened:
        next(opened.read(contents))
        opens.start()
    opens.join()
    assert len(reads) <= 1 + reader._THREADS


def test_files_that_were_opened_are_closed_if_another_is_gone(tmp_path: Path) -> None:
    made, _ = checkpoint(tmp_path, files=3)
    (tmp_path / "2").unlink()
    with pytest.raises(ModelCorrupt, match="went while"), Reader(made, CPU):
        pass


# --- a GPU's memory, with a stream that copies as late as it may ------------------------------------------------------


class Stream:
    """Stands in for a CUDA stream: a copy within it is made when somebody waits for it, and no earlier."""

    def __init__(self, device: torch.device) -> None:
        self.lock = threading.Lock()
        self.late: list[tuple[Tensor, Tensor]] = []
        self.waits_for: list[Stream] = []

    def wait_stream(self, other: Stream) -> None:
        self.waits_for.append(other)
        other.synchronize()

    def synchronize(self) -> None:
        with self.lock, torch.inference_mode():
            for place, part in self.late:
                place.copy_(part)
            self.late.clear()


class Within(TorchFunctionMode):
    """A stream as the current one of a thread."""

    def __init__(self, stream: Stream) -> None:
        super().__init__()
        self.stream = stream

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.Tensor.copy_:
            assert kwargs == {"non_blocking": True}
            assert torch.is_inference_mode_enabled(), "what was made in that mode may be written in it only"
            with self.stream.lock:
                self.stream.late.append(args)
            return args[0]
        return function(*args, **(kwargs or {}))


class Event:
    def __init__(self, blocking: bool) -> None:
        self.stream: Stream | None = None

    def record(self, stream: Stream) -> None:
        self.stream = stream

    def synchronize(self) -> None:
        if self.stream is not None:
            self.stream.synchronize()


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> Stream:
    """The stream of whoever loads."""
    current, empty = Stream(CPU), torch.empty

    def on_cpu(*args: Any, pin_memory: bool = False, **options: Any) -> Tensor:
        return empty(*args, **{**options, "device": CPU})

    monkeypatch.setattr(torch, "empty", on_cpu)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", Within)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    return current


@pytest.mark.parametrize("mode", [nullcontext, torch.inference_mode])
def test_buffers_are_not_written_before_they_are_copied(tmp_path: Path, late: Stream, mode: Callable[[], Any]) -> None:
    made, contents = checkpoint(tmp_path, files=2)
    with mode(), Reader(made, torch.device("cuda")) as opened:
        found = [as_bytes(each) for each in opened.read(contents)]
    assert found == [*contents.values()]


def test_streams_wait_for_each_other(late: Stream) -> None:
    """The copies for those that used the memory before, and the use of the bytes for the copies."""
    memory = GpuMemory(torch.device("cuda"), 2, PIECE)
    memory.allocate(PIECE)
    assert not late.waits_for
    memory.arrive()
    (beside,) = late.waits_for
    assert beside.waits_for == [late]


def test_no_copy_is_under_way_when_the_reader_ends(late: Stream) -> None:
    memory = GpuMemory(torch.device("cuda"), 2, PIECE)
    data = memory.allocate(PIECE).fill_(0)
    memory.fill(data, lambda room: room.__setitem__(slice(None), bytes([7]) * PIECE))
    assert not data.any()
    memory.close()
    assert (data == 7).all()


def test_buffer_of_a_failed_read_is_used_again(late: Stream) -> None:
    def fail(room: memoryview) -> None:
        raise ModelCorrupt("gone")

    memory = GpuMemory(torch.device("cuda"), 1, PIECE)
    data = memory.allocate(PIECE)
    for _ in range(3):
        with pytest.raises(ModelCorrupt, match="gone"):
            memory.fill(data, fail)
    memory.fill(data, lambda room: None)

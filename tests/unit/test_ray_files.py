"""Model files on several hosts: what is the same file, what is sent to hosts that lack it, and where it lies there."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import FLUX, SD3

from tacod import logs
from tacod.checkpoint import read_checkpoint
from tacod.config import Group
from tacod.group.arena import Arena
from tacod.group.ray import cache as caches
from tacod.group.ray import claims, sending
from tacod.group.ray import host as hosts
from tacod.group.ray.cache import Copy, ModelCache, Piece
from tacod.group.ray.files import FoundFile, NamedFile, find_files, look_for, use_found
from tacod.group.ray.sending import Refused, send_missing
from tacod.group.work import Envelope, Load, read_envelope
from tacod_client.errors import Cancelled, ModelCorrupt, ModelNotAllowed, ModelNotFound, ModelUnsupported, TacodError

GIB = 1 << 30


def load(path: Path, **more: Any) -> Load:
    return Load("m", str(path), read_checkpoint(str(path)).identity, None, None, None, [], **more)


def named(path: Path) -> NamedFile:
    (found,) = find_files(load(path))
    return found


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[ModelCache]:
    made = ModelCache(str(tmp_path / "cache"), GIB)
    yield made
    made.release()


def find(cache: ModelCache, file: NamedFile) -> str | None:
    found = cache.find(file["identity"], file["contents"], file["main"])
    return found and found.path


def put(cache: ModelCache, file: NamedFile) -> str:
    """Have a file come to a host, as it is."""
    copy = cache.begin(file["identity"], file["contents"], file["parts"])
    for number, part in enumerate(file["parts"]):
        copy.write(number, 0, Path(part["source"]).read_bytes())
    return cache.add(copy, file["main"]).path


# --- the same file elsewhere ------------------------------------------------------------------------------------------


def test_a_copy_elsewhere_is_the_same_file(tmp_path: Path, cache: ModelCache) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
        FLUX.save(folder)
    command = load(first / FLUX.file)
    file = named(first / FLUX.file)
    os.utime(second / FLUX.file, (1, 1))
    # As a root that is a link to another place on that host.
    link = tmp_path / "link"
    link.symlink_to(second)
    (found,) = look_for([{**file, "path": str(link / FLUX.file)}], [str(link)], cache)
    assert found["error"] is None
    assert found["there"] == str(second / FLUX.file)
    message = use_found(Envelope(7, command).message(), [{**found, "path": command.path}], None)
    changed = read_envelope(message).command
    assert isinstance(changed, Load)
    assert (changed.path, changed.identity) == (found["there"], read_checkpoint(found["there"]).identity)


def test_a_host_that_lacks_the_file_or_has_another_one(tmp_path: Path, cache: ModelCache) -> None:
    FLUX.save(tmp_path)
    SD3.save(tmp_path)
    file = named(tmp_path / FLUX.file)
    roots = [str(tmp_path)]
    cases = (
        (tmp_path / "none.safetensors", roots, ModelNotFound),
        (tmp_path / SD3.file, roots, ModelNotFound),
        (tmp_path / FLUX.file, ["/nowhere"], ModelNotAllowed),
    )
    for path, roots_there, kind in cases:
        (found,) = look_for([{**file, "path": str(path)}], roots_there, cache)
        error = TacodError.from_wire(found["error"])
        assert type(error) is kind
        refused = read_envelope(use_found(Envelope(7, load(tmp_path / FLUX.file)).message(), [found], found["error"]))
        assert isinstance(refused.command, Load)
        assert refused.command.refused == found["error"]
    there = put(cache, file)
    for path, roots_there, _ in cases:
        (found,) = look_for([{**file, "path": str(path)}], roots_there, cache)
        assert (found["there"], found["error"]) == (there, None)


def test_a_file_that_has_changed_is_refused(tmp_path: Path) -> None:
    """Ranks whose host has it would say another thing than those whose host lacks it."""
    FLUX.save(tmp_path)
    command = load(tmp_path / FLUX.file)
    os.utime(tmp_path / FLUX.file, (1, 1))
    with pytest.raises(ModelCorrupt, match="has changed since it was asked for"):
        find_files(command)
    (tmp_path / FLUX.file).unlink()
    with pytest.raises(ModelNotFound):
        find_files(command)


def test_a_tensor_that_cant_be_read_is_the_files_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no error of the bridge's or of a host's, which would end all ranks."""
    checkpoint = read_checkpoint(str(FLUX.save(tmp_path)))

    def pread(*told: Any) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "pread", pread)
    with pytest.raises(ModelCorrupt, match=r"can't be read \(Input/output error\)"):
        checkpoint.sample_tensors()


def save_folder(folder: Path) -> Path:
    """A transformer in two shards, whose files are links to others' names, as in the hub's cache."""
    from safetensors.torch import save_file

    blobs = folder / "blobs"
    blobs.mkdir(parents=True)
    (folder / "transformer").mkdir()
    names = sorted(FLUX.model.state_dict())
    shards = {f"diffusion_pytorch_model-0000{n}-of-00002.safetensors": names[n - 1 :: 2] for n in (1, 2)}
    config = {"_class_name": "FluxTransformer2DModel"}
    index = {"weight_map": {name: shard for shard, held in shards.items() for name in held}}
    texts = {"config.json": config, "diffusion_pytorch_model.safetensors.index.json": index}
    for number, (name, value) in enumerate(texts.items()):
        (blobs / f"text{number}").write_text(json.dumps(value))
        (folder / "transformer" / name).symlink_to(blobs / f"text{number}")
    for number, (name, held) in enumerate(shards.items()):
        save_file({each: FLUX.model.state_dict()[each] for each in held}, blobs / f"shard{number}")
        (folder / "transformer" / name).symlink_to(blobs / f"shard{number}")
    return folder


@pytest.mark.parametrize("name", ["", "transformer", "transformer/diffusion_pytorch_model.safetensors.index.json"])
def test_a_folder_goes_as_one(tmp_path: Path, cache: ModelCache, name: str) -> None:
    source = save_folder(tmp_path / "model") / name
    (tmp_path / "model" / "model_index.json").write_text("{}")
    there = Path(put(cache, named(source)))
    here, copied = read_checkpoint(str(source)), read_checkpoint(str(there))
    assert copied.contents == here.contents
    assert (copied.tensors, copied.config) == (here.tensors, here.config)
    folder = there if there.is_dir() else there.parent
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        path.name for path in (tmp_path / "model" / "transformer").iterdir()
    )
    assert not any(path.is_symlink() for path in folder.iterdir())


# --- the folder on a host ---------------------------------------------------------------------------------------------


def saved(folder: Path, count: int) -> list[NamedFile]:
    """Files of the same size with other contents."""
    path = FLUX.save(folder)
    whole = path.read_bytes()
    made = []
    for number in range(count):
        each = folder / f"{number}.safetensors"
        each.write_bytes(whole[:-1] + bytes([number]))
        made.append(named(each))
    return made


def test_the_least_recently_used_leaves_and_what_is_in_use_stays(tmp_path: Path) -> None:
    files = saved(tmp_path, 4)
    size = files[0]["parts"][0]["size"]
    cache, other = (ModelCache(str(tmp_path / "cache"), 2 * size) for _ in range(2))
    for number, file in enumerate(files[:2]):
        os.utime(Path(put(cache, file)).parents[1], (number, number))
    cache.release()
    assert find(cache, files[0]) is not None
    cache.release()
    put(other, files[2])
    other.release()
    kept = [find(cache, file) is not None for file in files]
    assert kept == [True, False, True, False]
    # `cache` holds both: nothing of them may leave.
    with pytest.raises(ModelNotFound, match=r"in use in .*group\.model_cache_bytes = \d+ allow"):
        other.begin(files[3]["identity"], files[3]["contents"], files[3]["parts"])
    cache.release()
    put(other, files[3])
    other.release()


def test_what_has_no_room_or_no_name_is_refused(tmp_path: Path) -> None:
    (file,) = saved(tmp_path, 1)
    parts, size = file["parts"], file["parts"][0]["size"]
    for limit, reason in ((0, "turned off"), (size - 1, "raise that")):
        with pytest.raises(ModelNotFound, match=reason):
            ModelCache(str(tmp_path / "cache"), limit).begin(file["identity"], file["contents"], parts)
    for name in ("../a", "/a", "..", ""):
        with pytest.raises(ModelUnsupported, match="no file's name"):
            ModelCache(str(tmp_path / "cache"), GIB).begin(
                file["identity"], file["contents"], [{"name": name, "size": 1}]
            )
    assert not (tmp_path / "cache").exists()
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    with pytest.raises(ModelNotFound, match="others may write there"):
        ModelCache(str(tmp_path / "cache"), GIB).begin(file["identity"], file["contents"], parts)


def test_a_full_disk_is_told_before_anything_is_removed(
    tmp_path: Path, cache: ModelCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = saved(tmp_path, 2)
    put(cache, first)
    cache.release()
    huge: list[Piece] = [{"name": "model.safetensors", "size": 1 << 29}]
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 20))
        with pytest.raises(ModelNotFound, match=r"is full: 1\.0 MiB of the 512\.0 MiB that it needs are free"):
            cache.begin(second["identity"], second["contents"], huge)

    def fallocate(*told: Any) -> None:
        raise OSError(errno.ENOSPC, "no space")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", fallocate)
        with pytest.raises(ModelNotFound, match=r"\(group\.model_cache\) is full"):
            cache.begin(second["identity"], second["contents"], second["parts"])
    assert find(cache, first) is not None
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == [".lock", first["identity"]]


def test_what_is_not_whole_is_never_found(tmp_path: Path, cache: ModelCache) -> None:
    first, second = saved(tmp_path, 2)
    copy = cache.begin(first["identity"], first["contents"], first["parts"])
    copy.write(0, 0, Path(second["parts"][0]["source"]).read_bytes())
    assert find(cache, first) is None
    with pytest.raises(ModelNotFound, match="not what was to be sent"):
        cache.add(copy, first["main"])
    # As after a kill: nobody holds it any more.
    left = cache.begin(first["identity"], first["contents"], first["parts"])
    left.close()
    there = Path(put(cache, first))
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == [".lock", first["identity"]]
    with there.open("r+b") as file:
        file.truncate(100)
    cache.release()
    assert find(cache, first) is None


def test_two_actors_of_a_host_may_get_the_same_file(tmp_path: Path, cache: ModelCache) -> None:
    (file,) = saved(tmp_path, 1)
    other = ModelCache(str(tmp_path / "cache"), GIB)
    copies = [each.begin(file["identity"], file["contents"], file["parts"]) for each in (cache, other)]
    for copy in copies:
        copy.write(0, 0, Path(file["parts"][0]["source"]).read_bytes())
    assert cache.add(copies[0], file["main"]) == other.add(copies[1], file["main"])
    assert len(list((tmp_path / "cache").glob("*"))) == 2
    other.release()


def test_a_file_with_the_same_samples_is_another_one(tmp_path: Path, cache: ModelCache) -> None:
    """`Checkpoint.contents` reads a part of a large file, and what is found must be all of it."""
    from safetensors.torch import save_file

    path, other = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file({"weight": torch.zeros(4 << 20, dtype=torch.uint8)}, path)
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 100] = 1
    other.write_bytes(whole)
    first, second = named(path), named(other)
    assert first["contents"] == second["contents"]
    put(cache, first)
    assert find(cache, second) is None
    assert Path(put(cache, second)).read_bytes() == whole
    assert find(cache, first) is not None


def test_a_hosts_own_file_that_differs_in_one_tensor_alone_is_not_used(tmp_path: Path, cache: ModelCache) -> None:
    from safetensors.torch import save_file

    here, there = tmp_path / "here" / "a.safetensors", tmp_path / "there" / "a.safetensors"
    weights = {"blocks.0.weight": torch.zeros(2 << 20), **{f"blocks.{n}.bias": torch.zeros(64) for n in range(1, 40)}}
    for path in (here, there):
        path.parent.mkdir()
        save_file(weights, path)
    file = {**named(here), "path": str(there)}
    (found,) = look_for([file], [str(tmp_path)], cache)
    assert found["there"] == str(there)
    whole = bytearray(there.read_bytes())
    part = read_checkpoint(str(there)).parts["blocks.10.bias"][0]
    whole[part.start : part.stop] = torch.ones(64).numpy().tobytes()
    there.write_bytes(whole)
    assert read_checkpoint(str(there)).contents == file["contents"], "samples of the whole file don't see it"
    (found,) = look_for([file], [str(tmp_path)], cache)
    assert found["error"] is not None
    assert "another file" in found["error"]["message"]


def test_a_process_that_makes_room_for_ever_is_named(
    tmp_path: Path, cache: ModelCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    (file,) = saved(tmp_path, 1)
    put(cache, file)
    lock = cache._lock()
    monkeypatch.setattr(caches, "LOCK_S", 0.1)
    with pytest.raises(ModelNotFound, match=r"another process has made room in .* for 0\.1 s: if it hangs, end it"):
        ModelCache(str(tmp_path / "cache"), GIB).begin(file["identity"], file["contents"], file["parts"])
    os.close(lock)
    cache.begin(file["identity"], file["contents"], file["parts"]).discard()


def test_what_is_being_removed_is_not_found(tmp_path: Path, cache: ModelCache, monkeypatch: pytest.MonkeyPatch) -> None:
    files = saved(tmp_path, 2)
    put(cache, files[0])
    cache.release()
    small, found = ModelCache(str(tmp_path / "cache"), files[1]["parts"][0]["size"]), []
    rmtree = shutil.rmtree

    def removing(path: Any, *told: Any, **more: Any) -> None:
        # Its lock is a file that may leave before the others.
        (Path(path) / ".lock").unlink(missing_ok=True)
        found.append(find(cache, files[0]))
        rmtree(path, *told, **more)

    monkeypatch.setattr(shutil, "rmtree", removing)
    copy = small.begin(files[1]["identity"], files[1]["contents"], files[1]["parts"])
    assert found == [None]
    copy.discard()
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_nothing_is_taken_from_a_folder_where_others_may_write(tmp_path: Path, cache: ModelCache) -> None:
    (file,) = saved(tmp_path, 1)
    put(cache, file)
    (tmp_path / "cache").chmod(0o777)
    assert find(cache, file) is None
    (tmp_path / "cache").chmod(0o755)
    assert find(cache, file) is not None


# --- folders whose owners may be in other containers ------------------------------------------------------------------


def test_a_folder_is_removed_when_its_owner_is_gone(tmp_path: Path) -> None:
    """Not by its pid, which another pid namespace doesn't show."""
    folder, lock = claims.make_folder(tmp_path, "owned-")
    (tmp_path / "another").mkdir()
    claims.remove_leavings(tmp_path, "owned-")
    assert folder.is_dir()
    assert claims.claim(folder) is None
    os.close(lock)
    claims.remove_leavings(tmp_path, "owned-")
    assert [path.name for path in tmp_path.iterdir()] == ["another"]
    assert claims.claim(folder) is None


# --- sending ----------------------------------------------------------------------------------------------------------


class Actors:
    """Two hosts' actors in this process, with a cache each and nothing in their roots."""

    def __init__(self, folder: Path, limits: tuple[int, int] = (GIB, GIB)) -> None:
        self.hosts = {name: hosts.Host() for name in ("a", "b")}
        self.agents: Any = [SimpleNamespace(name=name) for name in self.hosts]
        self.caches = {name: folder / name for name in self.hosts}
        self.arena = Arena()
        self.calls: list[str] = []
        for (name, each), limit in zip(self.hosts.items(), limits, strict=True):
            each._cache = ModelCache(str(self.caches[name]), limit)
            each._epoch = 1
            each._processes = SimpleNamespace(arena=self.arena, kill=lambda: None, close=lambda: None)  # type: ignore[assignment]

    async def ask(self, agent: Any, method: str, *arguments: Any) -> Any:
        self.calls.append(method)
        # As with Ray, a call goes on if nobody waits for it any more.
        return await asyncio.shield(getattr(self.hosts[agent.name], method)(1, *arguments))

    async def send(self, files: list[NamedFile], **more: Any) -> list[list[FoundFile]]:
        found = [await each.find(files, ["/nowhere"]) for each in self.hosts.values()]
        told: list[tuple[int, int]] = []
        options = {"tell": lambda *sent: told.append(sent), "is_stopped": lambda: False, **more}
        await send_missing(files, self.agents, found, self.ask, lambda chunk: chunk, **options)
        assert not told or told[-1][0] == told[-1][1] == sum(part["size"] for file in files for part in file["parts"])
        return found

    async def close(self) -> None:
        for each in self.hosts.values():
            await each.close()
            each._cache.release()
        self.arena.close()

    def leavings(self) -> list[str]:
        """What is in the hosts' folders that is no model."""
        entries = [path for folder in self.caches.values() if folder.exists() for path in folder.iterdir()]
        return [path.name for path in entries if path.name.startswith("unfinished")]


@pytest.fixture
def in_a_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr(logs, "configure", lambda level: None)
    monkeypatch.setattr(sending, "CHUNK_BYTES", 100_000)


@pytest.mark.usefixtures("in_a_temporary_folder")
def test_what_hosts_lack_is_sent_once(tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "model")
    file = named(FLUX.save(tmp_path))
    files = [file, named(folder / "transformer")]

    async def run() -> None:
        actors = Actors(tmp_path)
        # One has one of them already.
        put(actors.hosts["a"]._cache, file)
        found = await actors.send(files)
        for name, each in zip(actors.hosts, found, strict=True):
            for source, there in zip(files, each, strict=True):
                assert there["error"] is None
                assert Path(there["there"]).is_relative_to(actors.caches[name])
                copied = read_checkpoint(there["there"])
                assert (copied.contents, copied.identity) == (source["contents"], there["identity"])
                for part in source["parts"]:
                    copies = Path(there["there"])
                    copies = copies / part["name"] if copies.is_dir() else copies
                    assert copies.read_bytes() == Path(part["source"]).read_bytes()
        assert actors.calls.count("begin_file") == 3
        actors.calls.clear()
        assert await actors.send(files) == found
        assert not actors.calls
        await actors.close()

    asyncio.run(run())
    assert not list((tmp_path / "tmp").iterdir())


@pytest.mark.usefixtures("in_a_temporary_folder")
def test_a_host_without_room_refuses_for_all(tmp_path: Path) -> None:
    file = named(FLUX.save(tmp_path))

    async def run() -> None:
        actors = Actors(tmp_path, (GIB, 1000))
        with pytest.raises(Refused) as caught:
            await actors.send([file])
        error = TacodError.from_wire(caught.value.error)
        assert type(error) is ModelNotFound
        assert error.message.startswith(f"host {socket.gethostname()} can't use {file['path']}: its ")
        assert "raise that" in error.message
        assert f"(what is there by itself: {file['path']} lies outside models.roots" in error.message
        await actors.close()
        assert not actors.leavings()

    asyncio.run(run())


@pytest.mark.usefixtures("in_a_temporary_folder")
def test_a_cancel_ends_it_and_leaves_nothing(tmp_path: Path) -> None:
    file = named(FLUX.save(tmp_path))

    async def run() -> None:
        actors = Actors(tmp_path)
        with pytest.raises(Refused) as caught:
            await actors.send([file], is_stopped=lambda: "write_file" in actors.calls)
        assert type(TacodError.from_wire(caught.value.error)) is Cancelled
        await actors.close()
        assert actors.calls.count("write_file") < 12
        assert not actors.leavings()

    asyncio.run(run())


@pytest.mark.usefixtures("in_a_temporary_folder")
def test_a_cancel_does_not_wait_for_another_actor_that_makes_room(tmp_path: Path) -> None:
    file = named(FLUX.save(tmp_path))
    (tmp_path / "a").mkdir(0o700)
    lock = ModelCache(str(tmp_path / "a"), GIB)._lock()

    async def run() -> None:
        actors = Actors(tmp_path)
        try:
            with pytest.raises(Refused) as caught:
                await asyncio.wait_for(actors.send([file], is_stopped=lambda: "begin_file" in actors.calls), 60)
        finally:
            os.close(lock)
        assert type(TacodError.from_wire(caught.value.error)) is Cancelled
        # What was asked of the host goes on there.
        await asyncio.wait(asyncio.all_tasks() - {asyncio.current_task()}, timeout=60)
        await actors.close()

    asyncio.run(run())
    assert sorted(path.name for name in "ab" for path in (tmp_path / name).iterdir()) == [".lock", ".lock"]


@pytest.mark.usefixtures("in_a_temporary_folder")
def test_a_cancel_does_not_wait_for_a_slow_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = named(FLUX.save(tmp_path))
    goes_on, finish = threading.Event(), Copy.finish

    def slowly(copy: Copy) -> None:
        assert goes_on.wait(60)
        finish(copy)

    monkeypatch.setattr(Copy, "finish", slowly)

    async def run() -> None:
        actors = Actors(tmp_path)
        try:
            with pytest.raises(Refused) as caught:
                await asyncio.wait_for(actors.send([file], is_stopped=lambda: "end_file" in actors.calls), 60)
        finally:
            goes_on.set()
        assert type(TacodError.from_wire(caught.value.error)) is Cancelled
        # What was asked of the hosts goes on there, and serves the next load.
        await asyncio.wait(asyncio.all_tasks() - {asyncio.current_task()}, timeout=60)
        actors.calls.clear()
        (found,), (other,) = await actors.send([file])
        assert (found["error"], other["error"], actors.calls) == (None, None, [])
        await actors.close()
        assert not actors.leavings()

    asyncio.run(run())


@pytest.mark.usefixtures("in_a_temporary_folder")
@pytest.mark.parametrize("how", ["cut short", "touched", "gone"])
def test_a_file_that_changes_meanwhile_is_refused(tmp_path: Path, how: str) -> None:
    path = FLUX.save(tmp_path)
    file = named(path)

    def change(chunk: Any) -> Any:
        if how == "touched":
            os.utime(path, (1, 1))
        elif how == "cut short":
            os.truncate(path, 10)
        else:
            path.unlink(missing_ok=True)
        return chunk

    async def run() -> None:
        actors = Actors(tmp_path)
        found = [await each.find([file], []) for each in actors.hosts.values()]
        with pytest.raises(Refused) as caught:
            await send_missing([file], actors.agents, found, actors.ask, change, lambda *sent: None, lambda: False)
        error = TacodError.from_wire(caught.value.error)
        assert type(error) is ModelCorrupt
        assert "has changed while it was sent" in error.message
        await actors.close()
        assert not actors.leavings()

    asyncio.run(run())


@pytest.mark.usefixtures("in_a_temporary_folder")
def test_a_write_that_fails_names_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = named(FLUX.save(tmp_path))

    def pwrite(*told: Any) -> int:
        raise OSError(errno.ENOSPC, "no space")

    async def run() -> None:
        actors = Actors(tmp_path)
        monkeypatch.setattr(os, "pwrite", pwrite)
        with pytest.raises(Refused) as caught:
            await actors.send([file])
        assert "is full" in caught.value.error["message"]
        assert socket.gethostname() in caught.value.error["message"]
        await actors.close()
        assert not actors.leavings()

    asyncio.run(run())


def begun(file: NamedFile) -> tuple[str, str, str, list[Any]]:
    """What `Host.begin_file` is told of a file."""
    return file["path"], file["identity"], file["contents"], list(file["parts"])


@pytest.mark.usefixtures("in_a_temporary_folder")
def test_a_write_of_an_earlier_file_that_comes_late_is_lost(tmp_path: Path) -> None:
    """As after a cancel: calls that were under way still arrive."""
    first, second = saved(tmp_path, 2)
    whole = np.fromfile(second["path"], np.uint8)

    async def run() -> None:
        actors = Actors(tmp_path)
        host = actors.hosts["a"]
        assert await host.begin_file(1, 1, *begun(first)) is None
        await host.drop_file(1, 1)
        assert await host.begin_file(1, 2, *begun(second)) is None
        assert await host.write_file(1, 2, 0, 0, whole) is None
        assert await host.write_file(1, 1, 0, 0, np.zeros(len(whole), np.uint8)) is None
        await host.drop_file(1, 1)
        assert (await host.end_file(1, 1, first["main"]))["error"] is not None
        found = await host.end_file(1, 2, second["main"])
        assert found["error"] is None
        assert np.array_equal(np.fromfile(found["there"], np.uint8), whole)
        await actors.close()

    asyncio.run(run())


@pytest.mark.usefixtures("in_a_temporary_folder")
def test_a_file_that_is_given_up_while_room_is_made_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = saved(tmp_path, 2)

    async def run() -> None:
        actors = Actors(tmp_path)
        host, makes, goes_on = actors.hosts["a"], threading.Event(), threading.Event()
        make = Copy.make

        def slowly(copy: Copy, pieces: Any) -> None:
            makes.set()
            assert goes_on.wait(60)
            make(copy, pieces)

        monkeypatch.setattr(Copy, "make", slowly)
        beginning = asyncio.create_task(host.begin_file(1, 1, *begun(first)))
        await asyncio.to_thread(makes.wait, 60)
        await host.drop_file(1, 1)
        goes_on.set()
        assert await beginning is None
        assert not actors.leavings()
        assert await host.begin_file(1, 2, *begun(second)) is None
        await host.drop_file(1, 2)
        assert not actors.leavings()
        await actors.close()

    asyncio.run(run())


@pytest.mark.usefixtures("in_a_temporary_folder")
def test_room_is_made_when_what_was_given_up_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It still takes room; and whoever waits for the end of removals waits for all."""
    first, second = saved(tmp_path, 2)

    async def run() -> None:
        actors = Actors(tmp_path, (first["parts"][0]["size"], GIB))
        host, goes_on, discard = actors.hosts["a"], threading.Event(), Copy.discard

        def slowly(copy: Copy) -> None:
            assert goes_on.wait(60)
            discard(copy)

        monkeypatch.setattr(Copy, "discard", slowly)
        assert await host.begin_file(1, 1, *begun(first)) is None
        await host.kill(1)  # which doesn't wait
        host._epoch = 1
        beginning = asyncio.create_task(host.begin_file(1, 2, *begun(second)))
        given_up = asyncio.create_task(host.begin_file(1, 3, *begun(second)))
        await asyncio.sleep(0.05)
        assert not beginning.done()
        goes_on.set()
        assert [await beginning, await given_up] == [None, None]
        assert len(actors.leavings()) == 1
        await actors.close()
        assert not actors.leavings()

    asyncio.run(run())


@pytest.mark.usefixtures("in_a_temporary_folder")
def test_ranks_that_have_ended_hold_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (file,) = saved(tmp_path, 1)
    before = ModelCache(str(tmp_path / "a"), GIB)
    put(before, file)
    before.release()
    entry = tmp_path / "a" / file["identity"]

    def is_held() -> bool:
        lock = claims.claim(entry)
        if lock is not None:
            os.close(lock)
        return lock is None

    async def run() -> None:
        actors = Actors(tmp_path)
        host, looks, goes_on = actors.hosts["a"], threading.Event(), threading.Event()
        (found,) = await host.find([file], ["/nowhere"])
        assert found["error"] is None
        assert is_held()
        await host.kill(1)
        assert not is_held()

        def slowly(*told: Any) -> list[FoundFile]:
            looks.set()
            assert goes_on.wait(60)
            return look_for(*told)

        # One that looks for a file while other ranks start.
        monkeypatch.setattr(hosts, "look_for", slowly)
        finding = asyncio.create_task(host.find([file], ["/nowhere"]))
        await asyncio.to_thread(looks.wait, 60)
        host._cache = ModelCache(str(tmp_path / "a"), GIB)
        goes_on.set()
        await finding
        assert not is_held()
        await actors.close()

    asyncio.run(run())


def test_the_ranks_end_while_a_file_comes(tmp_path: Path, in_a_temporary_folder: None) -> None:
    file = named(FLUX.save(tmp_path))

    async def run() -> None:
        actors = Actors(tmp_path)
        host = actors.hosts["a"]
        assert await host.begin_file(1, 1, *begun(file)) is None
        assert await host.write_file(1, 1, 0, 0, np.zeros(10, np.uint8)) is None
        await host.kill(1)
        assert await host.write_file(1, 1, 0, 0, np.zeros(10, np.uint8)) is None
        assert (await host.end_file(1, 1, file["main"]))["error"] is not None
        await actors.close()

    asyncio.run(run())
    assert not [path for path in (tmp_path / "a").iterdir() if path.name != ".lock"]


# --- the setting ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["cache", "", "~other/cache", "~/\0"])
def test_where_the_cache_may_be(folder: str) -> None:
    with pytest.raises(ValueError, match="expected an absolute path"):
        Group.model_validate({"model_cache": folder})
    assert Group.model_validate({"model_cache": "~/models"}).model_cache == "~/models"

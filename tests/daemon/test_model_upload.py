"""Models that the daemon can't read: sent once, by content, in pieces that it checks."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from helpers import FLUX, Daemon
from safetensors.torch import load_file

from tacod_client import ArgumentError, Client, ModelNotAllowed, ModelNotFound, Unavailable
from tacod_client.upload import PIECE_BYTES

METADATA = {"tacod.config": json.dumps(FLUX.config)}


@pytest.fixture(scope="module")
def taking(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon that takes uploads."""
    folder = tmp_path_factory.mktemp("uploads")
    settings = {"models.uploads": str(folder), "models.upload_bytes": 40 << 20}
    with Daemon(1, [models], settings) as daemon:
        yield daemon


def taken(daemon: Daemon) -> Path:
    """The folder that it keeps uploads in."""
    (line,) = (line for line in daemon.config.read_text().splitlines() if line.startswith("models.uploads = "))
    return Path(json.loads(line.partition(" = ")[2]))


def large() -> dict[str, torch.Tensor]:
    """More than two pieces."""
    return {"filler": torch.arange(5 << 20, dtype=torch.float32)}


def test_an_uploaded_model_runs(taking: Daemon) -> None:
    with taking.client() as client:
        path = client.upload(FLUX.model.state_dict(), METADATA)
        FLUX.check(client.load(path))
        numpy = {name: tensor.numpy() for name, tensor in FLUX.model.state_dict().items()}
        assert client.upload(numpy, METADATA) == path, "the same content is the same file"


def test_progress_is_told_and_what_is_there_is_not_sent_again(taking: Daemon) -> None:
    with taking.client() as client:
        told: list[tuple[int, int]] = []
        client.upload(large(), progress=lambda done, total: told.append((done, total)))
        assert [done for done, _ in told] == [PIECE_BYTES, 2 * PIECE_BYTES, told[-1][1]]
        again: list[int] = []
        client.upload(large(), progress=lambda done, total: again.append(done))
        assert again == []


class Interrupted(Exception):
    """What ends an upload in these tests."""


def test_one_that_was_killed_goes_on_where_it_was(taking: Daemon) -> None:
    tensors = {"other": large()["filler"] + 1}

    def interrupt(done: int, total: int) -> None:
        if done == 2 * PIECE_BYTES:
            raise Interrupted

    with taking.client() as client, pytest.raises(Interrupted):
        client.upload(tensors, progress=interrupt)
    taking.signal(signal.SIGKILL)
    taking.wait()
    taking.start()
    rest: list[int] = []
    with taking.client() as client:
        client.upload(tensors, progress=lambda done, total: rest.append(done))
    assert len(rest) == 1, "the first two pieces were there"


def test_the_oldest_uploads_make_room(taking: Daemon) -> None:
    with taking.client() as client:
        first = Path(client.upload({"a": large()["filler"] + 2}))
        second = Path(client.upload({"a": large()["filler"] + 3}))
    assert second.exists()
    assert not first.exists()


def test_what_was_damaged_on_the_disk_is_sent_anew(taking: Daemon) -> None:
    tensors = {"damaged": large()["filler"] + 4}

    def interrupt(done: int, total: int) -> None:
        if done == 2 * PIECE_BYTES:
            raise Interrupted

    with taking.client() as client:
        with pytest.raises(Interrupted):
            client.upload(tensors, progress=interrupt)
        (part,) = taken(taking).glob("*.tacod.part")
        with part.open("r+b") as file:
            file.seek(PIECE_BYTES // 2)
            file.write(bytes(1000))
        told: list[int] = []
        path = Path(client.upload(tensors, progress=lambda done, total: told.append(done)))
        assert told[0] == 2 * PIECE_BYTES, "the second piece was right"
        assert len(told) == 2
        assert torch.equal(load_file(path)["damaged"], tensors["damaged"])
        with path.open("r+b") as file:
            file.truncate(PIECE_BYTES + 1)
        assert Path(client.upload(tensors)) == path
        assert torch.equal(load_file(path)["damaged"], tensors["damaged"])


def test_an_upload_that_somebody_changed_is_not_loaded_for_it(taking: Daemon) -> None:
    with taking.client() as client:
        path = Path(client.upload(FLUX.model.state_dict(), METADATA))
        old = client.load(str(path))
        with path.open("r+b") as file:
            file.seek(-4, 2)
            file.write(b"beef")
        with pytest.raises(ModelNotFound, match="upload it again"):
            client.load(str(path))
        with pytest.raises(ModelNotFound, match="upload it again"):
            client.load(FLUX.file, [{"path": str(path), "strength": 1.0}])
        new = client.load(client.upload(FLUX.model.state_dict(), METADATA))
        assert new.id == old.id, "ids stand for contents"
        FLUX.check(new)


def test_an_upload_is_there_until_its_client_has_loaded_it(models: Path, tmp_path: Path) -> None:
    state = FLUX.model.state_dict()
    size = sum(weight.nbytes for weight in state.values())
    settings = {"models.uploads": str(tmp_path), "models.upload_bytes": int(2.5 * size)}

    def changed(number: int) -> dict[str, torch.Tensor]:
        return {**state, "img_in.bias": state["img_in.bias"] + number}

    with Daemon(1, [models], settings) as daemon, daemon.client() as first, daemon.client() as second:
        path = first.upload(state, METADATA)
        for number in (1, 2, 3):
            second.upload(changed(number), METADATA)
        model = first.load(path)
        others = second.load(second.upload(changed(4), METADATA))
        with pytest.raises(Unavailable, match="needed by loaded models"):
            second.upload(changed(5), METADATA)
        os.kill(daemon.rank_pids()[0], signal.SIGKILL)
        FLUX.check(model)
        first.unload(model.id)
        second.upload(changed(5), METADATA)
        with pytest.raises(ModelNotFound, match="upload it again"):
            first.load(path)
        second.unload(others.id)
        FLUX.check(first.load(first.upload(state, METADATA)))


def test_the_same_from_two_clients_at_once(taking: Daemon) -> None:
    """Both are told of one file, which is right, and is loaded once."""
    state = {**FLUX.model.state_dict(), "img_in.bias": FLUX.model.state_dict()["img_in.bias"] + 1}
    # Metadata may have any size: this makes it several pieces.
    metadata = {**METADATA, "note": "x" * (3 * PIECE_BYTES)}

    def send(_: int) -> tuple[str, str]:
        with taking.client() as client:
            path = client.upload(state, metadata)
            return path, client.load(path).id

    with ThreadPoolExecutor() as pool:
        assert len(set(pool.map(send, range(3)))) == 1
    assert not list(taken(taking).glob("*.tacod.part"))


def test_what_is_too_large_or_not_wanted_is_refused(taking: Daemon, client: Client) -> None:
    with taking.client() as taker, pytest.raises(ModelNotAllowed, match="upload_bytes"):
        taker.upload({"a": torch.zeros(11 << 20)})
    with pytest.raises(ModelNotAllowed, match=r"models\.uploads"):
        client.upload(FLUX.model.state_dict(), METADATA)
    with taking.client() as taker, pytest.raises(ArgumentError, match="complex"):
        taker.upload({"complex": torch.zeros(3, dtype=torch.complex64)})

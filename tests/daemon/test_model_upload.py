"""Models that the daemon can't read: sent once, by content, in pieces that it checks."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import FLUX, Daemon

from tacod_client import ArgumentError, Client, ModelNotAllowed
from tacod_client.upload import PIECE_BYTES

METADATA = {"tacod.config": json.dumps(FLUX.config)}


@pytest.fixture(scope="module")
def taking(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon that takes uploads."""
    folder = tmp_path_factory.mktemp("uploads")
    settings = {"models.uploads": str(folder), "models.upload_bytes": 40 << 20}
    with Daemon(1, [models], settings) as daemon:
        yield daemon


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


def test_what_is_too_large_or_not_wanted_is_refused(taking: Daemon, client: Client) -> None:
    with taking.client() as taker, pytest.raises(ModelNotAllowed, match="upload_bytes"):
        taker.upload({"a": torch.zeros(11 << 20)})
    with pytest.raises(ModelNotAllowed, match=r"models\.uploads"):
        client.upload(FLUX.model.state_dict(), METADATA)
    with taking.client() as taker, pytest.raises(ArgumentError, match="complex"):
        taker.upload({"complex": torch.zeros(3, dtype=torch.complex64)})

"""A model's file changes on disk: the next load sees that, and nobody gets what he didn't ask for."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import SD3, Daemon

from tacod_client import Client, ModelNotFound

OLD = replace(SD3, name="edited")
NEW = replace(OLD, seed=1)


@pytest.fixture
def path(models: Path) -> Iterator[Path]:
    """The old file."""
    path = OLD.save(models)
    yield path
    path.unlink()


def test_the_next_load_has_the_new_weights(client: Client, path: Path) -> None:
    old = client.load(OLD.file)
    OLD.check(old)
    size = path.stat().st_size
    NEW.save(path.parent)
    assert path.stat().st_size == size
    OLD.check(old, seed=1)
    new = client.load(NEW.file)
    assert new.id != old.id
    NEW.check(new)
    OLD.check(old, seed=2)


def test_one_that_looks_as_old_as_before(client: Client, path: Path) -> None:
    """As a copy that keeps times does; the header differs."""
    old, then = client.load(OLD.file), path.stat()
    path.write_bytes(path.read_bytes().replace(b'"tacod.config"', b'"tacod.CONFIG"', 1))
    os.utime(path, ns=(then.st_atime_ns, then.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (then.st_size, then.st_mtime_ns)
    assert client.load(OLD.file).id != old.id


def test_ranks_that_are_replaced_do_not_take_it_for_the_old_one(sturdy: Daemon, client: Client, path: Path) -> None:
    old = client.load(OLD.file)
    NEW.save(path.parent)
    os.kill(sturdy.rank_pids()[0], signal.SIGKILL)
    with pytest.raises(ModelNotFound, match="load it again"):
        OLD.check(old)
    NEW.check(client.load(NEW.file))

"""A model's or a LoRA's file changes on disk: the next load sees that, and nobody gets what he didn't ask for."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import FP32, SD3, START_S, Daemon, eventually, relative_error
from safetensors.torch import save_file

from tacod_client import Client, ModelCorrupt, ModelNotFound

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
    """As a copy that keeps times does; the header differs, or after training the weights alone."""
    old, then = client.load(OLD.file), path.stat()
    header = path.read_bytes().replace(b'"tacod.config"', b'"tacod.CONFIG"', 1)
    seen = {old.id}
    for change in (lambda: path.write_bytes(header), lambda: NEW.save(path.parent)):
        keeping_its_time(path, change)
        assert (path.stat().st_size, path.stat().st_mtime_ns) == (then.st_size, then.st_mtime_ns)
        seen.add(client.load(OLD.file).id)
    assert len(seen) == 3
    OLD.check(old)
    NEW.check(client.load(NEW.file))


KEY = "joint_blocks.0.x_block.attn.qkv.weight"


def lora(path: Path, seed: int) -> list[dict[str, Any]]:
    """Write a LoRA's file, its look always the same; returns the patches that name it."""
    rows, columns = SD3.model.state_dict()[KEY].shape
    drawn = torch.Generator().manual_seed(seed)
    module = f"diffusion_model.{KEY.removesuffix('.weight')}"
    tensors = {
        f"{module}.lora_down.weight": torch.randn(4, columns, generator=drawn),
        f"{module}.lora_up.weight": torch.randn(rows, 4, generator=drawn),
    }
    save_file(tensors, path)
    return [{"path": path.name, "strength": 1.0}]


def lose_a_rank(daemon: Daemon, client: Client) -> None:
    """Have all ranks replaced, and wait for that."""
    restarts = client.stats()["group_restarts"]
    os.kill(daemon.rank_pids()[0], signal.SIGKILL)

    def back() -> bool:
        status = client.status()
        return status["state"] == "ready" and status["group"]["restarts"] > restarts

    eventually(back, START_S, "the ranks are back")


def keeping_its_time(path: Path, change: Callable[[], object]) -> None:
    """As archives and copies do that give a file its old time."""
    then = path.stat()
    change()
    os.utime(path, ns=(then.st_atime_ns, then.st_mtime_ns))


LORA_CHANGES: dict[str, Callable[[Path], object]] = {
    "trained further": lambda path: lora(path, 91),
    "replaced by another file": lambda path: [lora(path.with_suffix(".n"), 91), path.with_suffix(".n").rename(path)],
    "trained further, but as old": lambda path: keeping_its_time(path, lambda: lora(path, 91)),
    "cut short": lambda path: os.truncate(path, path.stat().st_size - 4),
    "no safetensors file any more": lambda path: path.write_bytes(b"<html>"),
    "gone": Path.unlink,
}


def test_a_lora_s_file_is_what_it_was_when_it_was_named(sturdy: Daemon, client: Client, models: Path) -> None:
    """Whatever happens to the file; ranks are lost once for all of it."""
    changed = {models / f"style{n}.safetensors": change for n, change in enumerate(LORA_CHANGES.values())}
    beside = models / "other.safetensors"
    inputs = SD3.inputs()
    try:
        named = {path: client.load(SD3.file, lora(path, n)) for n, path in enumerate((beside, *changed))}
        before = {path: model.forward(**inputs) for path, model in named.items()}
        assert all(relative_error(out, SD3.forward(**inputs)) > 0.01 for out in before.values()), "it does something"
        for path, change in changed.items():
            change(path)
            assert torch.equal(named[path].forward(**inputs), before[path]), "a new file changes nothing by itself"
        lose_a_rank(sturdy, client)
        for path in changed:
            with pytest.raises((ModelNotFound, ModelCorrupt)) as caught:
                named[path].forward(**inputs)
            assert path.name in caught.value.message or "a file of its patches has changed" in caught.value.message
            assert relative_error(named[beside].forward(**inputs), before[beside]) <= FP32, "others go on"
            assert client.load(SD3.file, lora(path, 90)).id != named[path].id
    finally:
        for path in (beside, *changed):
            path.unlink(missing_ok=True)


def test_a_link_that_leads_elsewhere_later_changes_nothing(sturdy: Daemon, client: Client, models: Path) -> None:
    first, second, link = (models / f"{name}.safetensors" for name in ("first", "second", "link"))
    try:
        lora(first, 1), lora(second, 2)
        link.symlink_to(first)
        model = client.load(SD3.file, [{"path": link.name, "strength": 1.0}])
        assert client.load(SD3.file, [{"path": first.name, "strength": 1.0}]).id == model.id, "one file by two names"
        before = model.forward(**SD3.inputs())
        link.unlink()
        link.symlink_to(second)
        lose_a_rank(sturdy, client)
        assert relative_error(model.forward(**SD3.inputs()), before) <= FP32
        assert client.load(SD3.file, [{"path": link.name, "strength": 1.0}]).id != model.id
    finally:
        for path in (first, second, link):
            path.unlink(missing_ok=True)


def test_ranks_that_are_replaced_do_not_take_it_for_the_old_one(sturdy: Daemon, client: Client, path: Path) -> None:
    old = client.load(OLD.file)
    NEW.save(path.parent)
    os.kill(sturdy.rank_pids()[0], signal.SIGKILL)
    with pytest.raises(ModelNotFound, match="load it again"):
        OLD.check(old)
    NEW.check(client.load(NEW.file))

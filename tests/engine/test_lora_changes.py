"""A LoRA's file is read as it was when it was named, all of it, or not at all."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import FLUX
from safetensors.torch import save, save_file
from torch import Tensor

from tacod.checkpoint import Checkpoint, read_checkpoint
from tacod.rank.weights import lora
from tacod.rank.weights.lora import read_lora
from tacod.rank.weights.patches import Patch
from tacod_client.errors import ModelCorrupt, ModelUnsupported

MODULE = "double_blocks.0.img_attn.qkv"


def tensors(fill: float) -> dict[str, Tensor]:
    rows, columns = FLUX.model.state_dict()[f"{MODULE}.weight"].shape
    shapes = {"down": (4, columns), "up": (rows, 4)}
    return {f"diffusion_model.{MODULE}.lora_{name}.weight": torch.full(shapes[name], float(fill)) for name in shapes}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file of a second ago: two that are written within one tick of the kernel's clock have the same time."""
    path = tmp_path / "style.safetensors"
    save_file(tensors(1), path)
    past = path.stat().st_mtime - 1
    os.utime(path, (past, past))
    return path


def read(path: Path, identity: str | None) -> dict[str, list[Patch]]:
    shapes = {key: tuple(value.shape) for key, value in FLUX.model.state_dict().items()}
    return read_lora(str(path), type(FLUX.model).diffusers_layout(FLUX.config), shapes, identity=identity)


def identity(path: Path) -> str:
    return read_checkpoint(str(path)).identity


def down(patches: dict[str, list[Patch]]) -> Tensor:
    (patch,) = patches[f"{MODULE}.weight"]
    value = patch.change.contents()["down"]
    assert isinstance(value, Tensor)
    return value


def test_it_is_read_in_the_state_in_which_it_was_named(path: Path) -> None:
    named = identity(path)
    assert torch.equal(down(read(path, named)), down(read(path, None)))
    save_file(tensors(2), path)
    with pytest.raises(ModelCorrupt, match=r"style\.safetensors changed while it was being loaded; load it again"):
        read(path, named)
    assert down(read(path, identity(path))).mean() == 2


CHANGES: dict[str, Callable[[Path], object]] = {
    "written to": lambda path: path.write_bytes(save(tensors(2))),
    "cut short": lambda path: os.truncate(path, path.stat().st_size - 100),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "gone": Path.unlink,
    "another file": lambda path: [save_file(tensors(2), path.with_name("new")), path.with_name("new").rename(path)],
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_while_it_is_read_is_seen(path: Path, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    named = identity(path)

    def read_header(name: str) -> Checkpoint:
        found = read_checkpoint(name)
        CHANGES[change](path)
        return found

    monkeypatch.setattr(lora, "read_checkpoint", read_header)
    with pytest.raises(ModelCorrupt, match=r"while it was being loaded.*; load it again"):
        read(path, named)


def test_nothing_of_it_is_looked_at_later(path: Path) -> None:
    """Were it mapped, a change would reach what was read, and a cut would end the process."""
    patches = read(path, None)
    path.write_bytes(save(tensors(2)))
    assert down(patches).mean() == 1
    os.truncate(path, 8)
    assert down(patches).mean() == 1


def test_numbers_that_torch_lacks_are_named(path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F4", "shape": [16], "data_offsets": [0, 8]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(ModelUnsupported, match="has tensors of F4"):
        read(path, None)

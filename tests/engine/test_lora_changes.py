"""A LoRA's file is read as it was when it was named, all of it, or not at all."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import FLUX
from safetensors.torch import save, save_file
from torch import Tensor

from tacod.checkpoint import Checkpoint, read_checkpoint
from tacod.rank.weights import lora, reader
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

    def read_header(name: str, prefix: str, whole: bool) -> Checkpoint:
        found = read_checkpoint(name, prefix, whole)
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


def described(path: Path, header: dict[str, Any], size: int) -> Path:
    """A file with this header, and so many bytes that take no room."""
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw)
    os.truncate(path, 8 + len(raw) + size)
    return path


def test_numbers_that_torch_lacks_are_named(path: Path) -> None:
    name = f"{MODULE}.lora_up.weight"
    with pytest.raises(ModelUnsupported, match=rf"{name} is F4, which"):
        read(described(path, {name: {"dtype": "F4", "shape": [16, 1], "data_offsets": [0, 8]}}, 8), None)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16], ids=str)
def test_factors_that_have_scales_are_refused(path: Path, dtype: torch.dtype) -> None:
    """ComfyUI takes them without."""
    name = f"diffusion_model.{MODULE}.lora_up.weight"
    save_file({**tensors(1), name: torch.ones(240, 4).to(dtype), f"{name}_scale": torch.ones(())}, path)
    with pytest.raises(ModelUnsupported, match=rf"{name} is .*which this version doesn't read in a LoRA"):
        read(path, None)


def test_no_more_of_it_is_read_than_counts(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What matches nothing, doesn't fit, or is replaced by another change of the layer may be of any size."""
    shapes = {name: [*tensor.shape] for name, tensor in tensors(1).items()}
    counting = sum(4 * tensor.numel() for tensor in tensors(1).values())
    shapes |= {
        f"diffusion_model.{MODULE}.lora_B.weight": [1 << 20, 4],
        f"diffusion_model.{MODULE}.lora_A.weight": [4, 1 << 20],
        "diffusion_model.double_blocks.1.img_attn.qkv.diff": [1 << 20],
        "diffusion_model.no.such.layer.diff": [1 << 20],
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": [1 << 20],
    }
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    count, pread = 0, os.preadv

    def counted(file: int, rooms: list[memoryview], at: int) -> int:
        nonlocal count
        got = pread(file, rooms, at)
        count += got
        return got

    monkeypatch.setattr(reader.os, "preadv", counted)
    assert down(read(described(path, header, end), None)).shape == (4, 80)
    assert count == counting

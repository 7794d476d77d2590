"""Model files that can't be loaded, and paths that may not be: a typed error, nothing loaded, the memory back."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import psutil
import pytest
import torch
from helpers import FLUX, Daemon, unharmed
from safetensors.torch import save_file

from tacod_client import Client, ModelCorrupt, ModelNotAllowed, ModelNotFound, ModelUnsupported, TacodError

MIB = 1 << 20


def raw_safetensors(header: dict[str, Any], contents: bytes) -> bytes:
    """A safetensors file as it lies on the disk."""
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + contents


def make_unet(path: Path) -> None:
    keys = {
        "input_blocks.0.0.weight": (4, 4, 3, 3),
        "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": (2, 2048),
        "middle_block.0.in_layers.0.weight": (4,),
    }
    save_file({f"model.diffusion_model.{key}": torch.zeros(shape) for key, shape in keys.items()}, path)


def make_incomplete(path: Path) -> None:
    weights = {key: value for key, value in FLUX.model.state_dict().items() if not key.startswith("final_layer.adaLN")}
    save_file(weights, path, metadata={"tacod.config": json.dumps(FLUX.config)})


def make_odd_family(path: Path) -> None:
    save_file({"a": torch.zeros(2)}, path, metadata={"tacod.config": '{"image_model": "pixeldream"}'})


def make_truncated(path: Path) -> None:
    whole = (path.parent / FLUX.file).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


def make_unknown_gguf(path: Path) -> None:
    writer = gguf.GGUFWriter(path, "flux")
    writer.add_string("tacod.config", json.dumps(FLUX.config))
    kind = gguf.GGMLQuantizationType.IQ2_XXS
    rows = np.zeros((80, gguf.quants.quant_shape_to_byte_shape((256,), kind)[0]), np.uint8)
    writer.add_tensor("img_in.weight", rows, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


FILES: dict[str, tuple[type[TacodError], str, Callable[[Path], object]]] = {
    "unet.safetensors": (ModelUnsupported, "UNet.*SDXL", make_unet),
    "incomplete.safetensors": (ModelCorrupt, "lacks final_layer", make_incomplete),
    "other.safetensors": (ModelUnsupported, "pixeldream", make_odd_family),
    "unknown.safetensors": (ModelUnsupported, "no family", lambda path: save_file({"a": torch.zeros(2)}, path)),
    "truncated.safetensors": (ModelCorrupt, "truncated", make_truncated),
    "empty.safetensors": (ModelCorrupt, "no whole safetensors", lambda path: path.write_bytes(b"")),
    "zeros.safetensors": (ModelCorrupt, "no whole safetensors", lambda path: path.write_bytes(bytes(4096))),
    "huge.safetensors": (ModelCorrupt, "no whole safetensors", lambda path: path.write_bytes(b"\xff" * 64)),
    "text.safetensors": (ModelCorrupt, "not JSON", lambda path: path.write_bytes(struct.pack("<Q", 8) + b"nonsense")),
    "list.safetensors": (ModelCorrupt, "JSON object", lambda path: path.write_bytes(struct.pack("<Q", 2) + b"[]")),
    "nested.safetensors": (
        ModelCorrupt,
        "nested",
        lambda path: path.write_bytes(struct.pack("<Q", 200_000) + b"[" * 200_000),
    ),
    "bomb.safetensors": (
        ModelCorrupt,
        "hold",
        lambda path: path.write_bytes(
            raw_safetensors({"a": {"dtype": "F32", "shape": [1 << 40] * 3, "data_offsets": [0, 4]}}, bytes(4))
        ),
    ),
    "negative.safetensors": (
        ModelCorrupt,
        "'a'",
        lambda path: path.write_bytes(
            raw_safetensors({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}}, bytes(4))
        ),
    ),
    "model.ckpt": (ModelUnsupported, "pickle", lambda path: path.write_bytes(b"\x80\x04.")),
    "model.gguf": (ModelCorrupt, "GGUF", lambda path: path.write_bytes(b"GGUF")),
    "unknown.gguf": (ModelUnsupported, "IQ2_XXS", make_unknown_gguf),
    "folder": (ModelUnsupported, "folder", lambda path: path.mkdir()),
    "link.safetensors": (ModelNotAllowed, r"models\.roots", lambda path: path.symlink_to("/etc/passwd")),
    "loop.safetensors": (ModelNotFound, "loop", lambda path: path.symlink_to(path.name)),
    "dangling.safetensors": (ModelNotFound, "no such file", lambda path: path.symlink_to("nowhere.safetensors")),
}


@pytest.mark.parametrize("name", FILES)
def test_file(client: Client, models: Path, name: str) -> None:
    kind, words, make = FILES[name]
    path = models / name
    if not path.is_symlink() and not path.exists():
        make(path)
    with unharmed(client), pytest.raises(kind, match=f"(?s){words}") as caught:
        client.load(name)
    assert name in caught.value.message or kind is ModelUnsupported


def test_memory_is_given_back(sturdy: Daemon, client: Client, models: Path) -> None:
    """Whether it was refused by its header or once its weights were read."""
    paths = [models / name for name in ("lacking.safetensors", "half.safetensors")]
    make_incomplete(paths[0])
    make_truncated(paths[1])
    ranks = [psutil.Process(pid) for pid in sturdy.rank_pids()]

    def fail() -> int:
        for path in paths:
            with pytest.raises(ModelCorrupt):
                client.load(path.name)
        return max(rank.memory_info().rss for rank in ranks)

    FLUX.check(client.load(FLUX.file))
    before = fail()
    for _ in range(20):
        after = fail()
    assert after - before < 8 * MIB
    for path in paths:
        path.unlink()


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("missing.safetensors", ModelNotFound),
        ("", ModelNotFound),
        ("a\0b", ModelNotFound),
        ("x" * 300, ModelNotFound),
        ("/etc/passwd", ModelNotAllowed),
        ("../../../etc/passwd", ModelNotAllowed),
        ("/dev/zero", ModelNotAllowed),
    ],
)
def test_path(client: Client, path: str, kind: type[TacodError]) -> None:
    with unharmed(client), pytest.raises(kind):
        client.load(path)

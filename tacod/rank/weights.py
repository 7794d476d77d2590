"""Weights from safetensors files into a model, by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from tacod.checkpoint import Checkpoint
from tacod.rank.families import detect
from tacod.rank.families.base import DiT
from tacod_client.errors import ModelCorrupt, ModelUnsupported

__all__ = ["DTYPES", "choose_dtype", "load_model"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_OF_FILE = {"F64": "fp32", "F32": "fp32", "BF16": "bf16", "F16": "fp16"}


def choose_dtype(checkpoint: Checkpoint, asked: str | None, device: torch.device) -> str:
    """The compute dtype: as asked; else fp32 on a CPU, as ComfyUI has it, and the file's own on CUDA."""
    if asked is not None:
        return asked
    if device.type == "cpu":
        return "fp32"
    kinds = [_OF_FILE.get(info.dtype) for info in checkpoint.tensors.values() if len(info.shape) > 1]
    return next((kind for kind in kinds if kind is not None), "bf16")


def load_model(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> DiT:
    """Build the family that the file holds and fill it; weights are read through mmap, one tensor at a time.

    Raises `ModelUnsupported` if the family or its weights are unknown, `ModelCorrupt` if tensors lack or don't fit.
    """
    family, config = detect(checkpoint.tensors, checkpoint.config)
    with torch.device("meta"):
        model = family(config)
    wanted = {name: tuple(parameter.shape) for name, parameter in model.state_dict().items()}
    _check_shapes(checkpoint, wanted)
    try:
        with safe_open(checkpoint.path, framework="pt", device="cpu") as file:
            for name in wanted:
                tensor = file.get_tensor(checkpoint.prefix + name).to(device=device, dtype=dtype)
                _assign(model, name, tensor)
    except SafetensorError as error:
        raise ModelCorrupt(f"{checkpoint.path}: {error}; download the file again") from None
    return model.eval().requires_grad_(False)


def _check_shapes(checkpoint: Checkpoint, wanted: dict[str, tuple[int, ...]]) -> None:
    absent = [name for name in wanted if name not in checkpoint.tensors]
    if absent:
        raise ModelCorrupt(f"{checkpoint.path} lacks {_some(absent)}; download the file again")
    unknown = [name for name in checkpoint.tensors if name not in wanted]
    if unknown:
        raise ModelUnsupported(
            f"{checkpoint.path} has tensors that this family doesn't use: {_some(unknown)}; "
            "it may be a variant or a quantised file that this version doesn't run"
        )
    for name, shape in wanted.items():
        info = checkpoint.tensors[name]
        if info.shape != shape:
            raise ModelCorrupt(
                f"{checkpoint.path}: {name} is {list(info.shape)}, but its configuration asks for {list(shape)}"
            )
        if info.dtype not in _OF_FILE:
            raise ModelUnsupported(f"{checkpoint.path}: {name} is {info.dtype}; this version reads bf16, fp16 and fp32")


def _assign(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    *path, leaf = name.split(".")
    owner: Any = model.get_submodule(".".join(path))
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[leaf] = tensor


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")

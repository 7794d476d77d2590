"""Between the wire's tensors and the caller's: torch or numpy in, the same kind out.

Each of them is used only if the caller uses it; importing this module imports neither.
"""

from __future__ import annotations

import functools
import math
import sys
from typing import TYPE_CHECKING, Any, Literal

from tacod_client.errors import ArgumentError, ProtocolError
from tacod_client.wire import Buffer, Tensor, split

if TYPE_CHECKING:
    import numpy as np
    import torch

    Bytes = np.ndarray[Any, np.dtype[np.uint8]]

__all__ = [
    "TORCH_NAMES",
    "Kind",
    "all_like",
    "as_bytes",
    "description",
    "fill",
    "from_wire",
    "kind_of",
    "like",
    "nbytes_of",
    "rows",
    "to_wire",
]

Kind = Literal["torch", "numpy"]

TORCH_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
"""Torch's names of dtypes by the wire's names, which are safetensors'."""
_NUMPY_NAMES = {
    wire: name for wire, name in TORCH_NAMES.items() if name not in ("bfloat16", "float8_e4m3fn", "float8_e5m2")
}
_FROM_NUMPY = {name: wire for wire, name in _NUMPY_NAMES.items()}


@functools.cache
def _from_torch_dtypes() -> dict[torch.dtype, str]:
    """The wire's names of dtypes by torch's."""
    import torch

    return {getattr(torch, name): wire for wire, name in TORCH_NAMES.items()}


def kind_of(value: Any) -> Kind | None:
    """Whether a value is a torch tensor or a numpy array; None if it is neither."""
    numpy, torch = sys.modules.get("numpy"), sys.modules.get("torch")
    if numpy is not None and isinstance(value, numpy.ndarray):
        return "numpy"
    return "torch" if torch is not None and isinstance(value, torch.Tensor) else None


def nbytes_of(value: Any) -> int:
    """The bytes of a torch tensor's or numpy array's numbers; of a sparse tensor as if it were dense."""
    return int(value.nbytes if kind_of(value) == "numpy" else value.numel() * value.element_size())


def to_wire(value: Any, argument: str) -> Tensor:
    """A torch tensor (any device) or numpy array as a wire tensor; bytes are copied only if necessary.

    Raises `ArgumentError`, naming ``argument``, for a dtype that can't be sent.
    """
    if kind_of(value) == "numpy":
        return _from_numpy(value, argument)
    return _from_torch(value, argument)


def description(value: Any) -> Tensor | None:
    """What a torch tensor or numpy array is as a wire tensor without its bytes; None for a dtype that isn't sent."""
    if kind_of(value) == "numpy":
        dtype = _FROM_NUMPY.get(value.dtype.name)
    else:
        import torch

        dtype = _from_torch_dtypes().get(value.dtype) if value.layout is torch.strided else None
    return Tensor(dtype, tuple(value.shape), None) if dtype is not None else None


def fill(room: memoryview, value: Any) -> None:
    """Write the contents of a torch tensor (any device) or numpy array, of what `description` says, to ``room``."""
    if kind_of(value) == "numpy":
        import numpy as np

        there = np.frombuffer(room, value.dtype.newbyteorder("<")).reshape(value.shape)
        there[...] = value
        return
    import torch

    if value.is_cpu:
        import numpy as np

        # By one thread: to wake others takes longer than to copy a latent.
        np.frombuffer(room, np.uint8)[:] = _flat(value)
    else:
        torch.frombuffer(room, dtype=value.dtype).view(value.shape).copy_(value.detach())


def _from_numpy(array: np.ndarray[Any, Any], argument: str) -> Tensor:
    import numpy as np

    dtype = _FROM_NUMPY.get(array.dtype.name)
    if dtype is None:
        raise ArgumentError(
            f"{argument}: numpy dtype {array.dtype} doesn't travel; use one of {', '.join(_FROM_NUMPY)}",
            argument=argument,
        )
    little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    return Tensor(dtype, array.shape, split(little.reshape(-1).view(np.uint8).data))


def _from_torch(tensor: torch.Tensor, argument: str) -> Tensor:
    import torch

    dtype = _from_torch_dtypes().get(tensor.dtype)
    if dtype is None or tensor.layout is not torch.strided:
        raise ArgumentError(
            f"{argument}: {tensor.dtype} ({tensor.layout}) doesn't travel; "
            f"use one of {', '.join(map(str, _from_torch_dtypes()))}",
            argument=argument,
        )
    return Tensor(dtype, tuple(tensor.shape), split(_flat(tensor).data))


def _flat(tensor: torch.Tensor) -> Bytes:
    """The contents on the CPU as bytes, copied only if necessary."""
    if tensor.requires_grad:
        tensor = tensor.detach()
    if tensor.is_neg():
        tensor = tensor.resolve_neg()
    if not tensor.is_cpu:
        tensor = tensor.cpu()
    raw: Bytes = as_bytes(tensor).numpy()
    return raw


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The contents of a strided tensor (any device) as uint8 [nbytes], copied only if necessary."""
    import torch

    tensor = tensor.contiguous()
    if not tensor.dim() or tensor.stride(-1) != 1:
        # Where the last dimension has one number, its stride may be any; numbers can be seen as bytes only with 1.
        tensor = tensor.as_strided((tensor.numel(),), (1,))
    return tensor.view(torch.uint8).view(-1)


def from_wire(tensor: Tensor, kind: Kind, locked: bool = False) -> Any:
    """A writable torch tensor (on the CPU) or numpy array that holds a wire tensor's contents.

    bf16 and 8-bit floats have no numpy dtype: as numpy they come as float32, which holds each of their values exactly.
    ``locked`` puts a torch tensor where a GPU can copy it from by itself.
    """
    if tensor.frames is None:
        raise ValueError("a tensor that travelled by digest has no bytes to read")
    import numpy as np

    if kind == "numpy":
        return _as_numpy(np.concatenate(_views(tensor)), tensor)
    import torch

    dtype: torch.dtype = getattr(torch, TORCH_NAMES[tensor.dtype])
    if not math.prod(tensor.shape):
        return torch.empty(tensor.shape, dtype=dtype, device="cpu")
    if not locked:
        # numpy asks for huge pages: of 64 MiB it makes a copy in a third of the time.
        return torch.frombuffer(np.concatenate(_views(tensor)), dtype=dtype).view(tensor.shape)
    room = torch.empty(tensor.shape, dtype=dtype, device="cpu", pin_memory=True)
    np.concatenate(_views(tensor), out=as_bytes(room).numpy())
    return room


def _views(tensor: Tensor) -> list[Bytes]:
    """A wire tensor's frames as numpy sees them. Raises `ValueError` if they aren't all of its bytes."""
    import numpy as np

    views = [np.frombuffer(frame, np.uint8) for frame in tensor.frames or ()] or [np.empty(0, np.uint8)]
    came = sum(map(len, views))
    if came != tensor.nbytes:
        raise ValueError(f"a tensor of {tensor.nbytes} bytes came with {came}")
    return views


def rows(tensor: Tensor, start: int, stop: int) -> Tensor:
    """Some rows of a wire tensor, counted over all its dimensions but the last: [stop - start, width].

    Nothing is copied.
    """
    width = tensor.shape[-1]
    row = tensor.nbytes // max(math.prod(tensor.shape[:-1]), 1)
    first, last = start * row, stop * row
    frames: list[Buffer] = []
    position = 0
    for frame in tensor.frames or ():
        view = memoryview(frame).cast("B")
        part = view[max(first - position, 0) : max(last - position, 0)]
        if len(part):
            frames.append(part)
        position += len(view)
    return Tensor(tensor.dtype, (stop - start, width), tuple(frames))


def like(tensor: Tensor, example: Any) -> Any:
    """A wire tensor's contents in the kind, dtype and device of ``example``."""
    if kind_of(example) == "numpy":
        return from_wire(tensor, "numpy").astype(example.dtype, copy=False)
    frames = tensor.frames or ()
    # In one copy, from memory that a tensor may refer to.
    if example.device.type != "cpu" and len(frames) == 1 and not memoryview(frames[0]).readonly:
        import torch

        there = torch.frombuffer(frames[0], dtype=getattr(torch, TORCH_NAMES[tensor.dtype]))
        return there.view(tensor.shape).to(device=example.device).to(dtype=example.dtype)
    made = from_wire(tensor, "torch")
    if (made.dtype, example.device.type) == (example.dtype, "cpu"):
        return made
    return made.to(device=example.device, dtype=example.dtype)


def all_like(out: Any, examples: Any) -> Any:
    """The output of a model: a wire tensor as `like` gives it, or several for a list of several ``examples``.

    Raises `ProtocolError` if there are more or fewer outputs than examples.
    """
    latents = list(examples) if isinstance(examples, (list, tuple)) else [examples]
    outs = out if isinstance(out, list) else [out]
    if len(outs) != len(latents):
        raise ProtocolError(
            f"{len(latents)} latents, but the daemon gave {len(outs)} outputs; run tacod and this package in one "
            "version"
        )
    made = list(map(like, outs, latents))
    return made if len(made) > 1 else made[0]


def _as_numpy(raw: np.ndarray[Any, Any], tensor: Tensor) -> np.ndarray[Any, Any]:
    import numpy as np

    name = _NUMPY_NAMES.get(tensor.dtype)
    if name is not None:
        return raw.view(np.dtype(name)).reshape(tensor.shape)
    if tensor.dtype == "BF16":
        wide = raw.view(np.uint16).astype(np.uint32) << 16
        return np.asarray(wide.view(np.float32)).reshape(tensor.shape)
    return np.asarray(_float8(tensor.dtype)[raw]).reshape(tensor.shape)


def _float8(dtype: str) -> np.ndarray[Any, Any]:
    """The float32 value of each of the 256 codes of an 8-bit float (OCP FP8 formats, arXiv:2209.05433)."""
    import numpy as np

    codes = np.arange(256)
    exponent_bits, bias = (4, 7) if dtype == "F8_E4M3" else (5, 15)
    mantissa_bits = 7 - exponent_bits
    exponent = (codes >> mantissa_bits) & ((1 << exponent_bits) - 1)
    mantissa = (codes & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits)
    values = np.where(
        exponent == 0, mantissa * 2.0 ** (1 - bias), (1 + mantissa) * 2.0 ** (exponent.astype(float) - bias)
    )
    if dtype == "F8_E4M3":
        values[(codes & 0x7F) == 0x7F] = np.nan
    else:
        values[exponent == 31] = np.where(mantissa[exponent == 31] == 0, np.inf, np.nan)
    return np.where(codes & 0x80, -values, values).astype(np.float32)

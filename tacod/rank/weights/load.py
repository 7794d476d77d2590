"""Loads weights from a checkpoint into a model, by name, and gives access to them for patches."""

from __future__ import annotations

import copy
import logging
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tacod.checkpoint import Checkpoint, TensorInfo
from tacod.checkpoint.header import BLOCKS, FLOAT8, PLAIN
from tacod.checkpoint.quantization import FORMATS, INPUT_SCALE, SCALED, beside
from tacod.rank.families.base import DiT
from tacod.rank.ops.packed.base import PackedLinear
from tacod.rank.ops.packed.float8 import FLOAT8_DTYPES
from tacod.rank.ops.packed.fp8 import Fp8Linear
from tacod.rank.ops.packed.gguf import dequantize_blocks
from tacod.rank.weights.fp8 import quantize_block
from tacod.rank.weights.packing import PACKED, Layer, pack, pack_plain
from tacod.rank.weights.parts import assign, parts_of
from tacod.rank.weights.reader import FILE_DTYPES, Reader
from tacod.rank.weights.remap import identify, some
from tacod.rank.weights.sizes import sizes_of
from tacod.rank.weights.stage import Stage
from tacod.rank.weights.streaming import Streaming, Turn
from tacod.rank.weights.unfilled import Unfilled
from tacod_client.dtypes import COMPUTE_DTYPES, of_numbers
from tacod_client.errors import ModelCorrupt, ModelUnsupported

__all__ = [
    "DTYPES",
    "Progress",
    "adapt_weight",
    "choose_dtype",
    "get_weight",
    "is_packed",
    "load_model",
    "set_weight",
    "share",
    "weight_bytes",
]

_NUMBERS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DTYPES = {name: _NUMBERS[of_numbers(name)] for name in COMPUTE_DTYPES}
"""Torch's dtype of a model's numbers, by the compute dtype's name. For fp8 see also `tacod.rank.weights.fp8`."""
_OF_FILE = {"F64": "fp32", "F32": "fp32", "BF16": "bf16", "F16": "fp16"}
_DECODED = {name: FILE_DTYPES[name] for name in (*_OF_FILE, *FLOAT8_DTYPES)}
"""What numbers of a file are seen as; others are seen as bytes."""

_MARK = re.compile("__.+__")

_log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called with the bytes that are loaded and the bytes that will be."""

Module = TypeVar("Module", bound=nn.Module)


def choose_dtype(checkpoint: Checkpoint, asked: str | None, device: torch.device) -> str:
    """The compute dtype: as asked; otherwise fp32 on a CPU, as in ComfyUI, and the file's own on CUDA.

    The file's own is the dtype of most of its numbers; for weights of 8 bits or fewer it is bf16.
    """
    if asked is not None:
        return asked
    if device.type == "cpu":
        return "fp32"
    numbers: Counter[str] = Counter()
    for info in checkpoint.tensors.values():
        if len(info.shape) > 1:
            numbers[info.dtype] += info.size
    if any(kind in (*PACKED, *FORMATS) for kind in numbers):
        return "bf16"
    return next((_OF_FILE[kind] for kind, _ in numbers.most_common() if kind in _OF_FILE), "bf16")


def load_model(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress | None = None,
    weight_only: bool = False,
    fp8: bool = False,
    streaming: Streaming | None = None,
) -> DiT:
    """Build the family that the checkpoint holds and fill it, tensor by tensor and block by block.

    Linear layers of 8 bits or fewer are kept so, as `PackedLinear`; everything else is cast to ``dtype``, or to fp32
    where the family says so. With ``weight_only`` activations are never quantized. With ``fp8`` blocks are quantized
    (`quantize_block`). ``streaming`` stores blocks that don't stay whole on each rank. Which tensors were left out, as
    other modules' or as notes of whoever saved the file, is said in the log.

    Raises `ModelUnsupported` if the family or its weights are unknown, `ModelCorrupt` if tensors lack or don't fit, or
    if a file changes meanwhile.
    """
    with Unfilled():
        family, config, checkpoint = identify(checkpoint)
        with torch.device("meta"):
            model = family(config)
    wanted = {name: tuple(parameter.shape) for name, parameter in model.state_dict().items()}
    lacking = [name for name, _ in model.named_buffers() if name not in checkpoint.tensors]
    for name in lacking:
        # No forward looks at it: diffusers' files have none.
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner).register_buffer(leaf, torch.zeros(wanted.pop(name), dtype=dtype, device=device))
    _check(checkpoint, wanted, family.beside)
    if others := checkpoint.others:
        _log.info("%s: %d tensors are other modules', and left out: %s", checkpoint.path, len(others), some(others))
    sides = {
        name: [beside(name, leaf) for leaf in each.sides]
        for name, each in checkpoint.quantization.items()
        if name in wanted
    }
    sizes = {name: sum(part.stop - part.start for part in checkpoint.parts[name]) for name in wanted}
    if streaming is not None:
        streaming.begin(model, sizes_of(model, checkpoint, dtype, fp8, streaming.smallest))
    blocks = set(model.blocks_at)
    groups = _groups(blocks | set(streaming.units if streaming is not None else ()), wanted, checkpoint.parts)
    turns = [Turn(list(groups))] if streaming is None else streaming.turns(list(groups))
    names = [name for turn in turns for path in turn.mine for name in groups[path]]
    done, mine, total = 0, sum(map(sizes.__getitem__, names)), sum(sizes.values())
    with Reader(checkpoint, device) as reader:
        tensors = reader.read(each for name in names for each in (name, *sides.get(name, ())))
        for turn in turns:
            for path in turn.mine:
                for name in groups[path]:
                    data = next(tensors)
                    found = {each: _decode(next(tensors), checkpoint.tensors[each]) for each in sides.get(name, ())}
                    _place(model, checkpoint, name, wanted[name], data, found, model.dtype_of(name, dtype), weight_only)
                    done += sizes[name]
                    if progress is not None:
                        # This rank's part of them stands for all.
                        progress(done * total // mine, total)
                if fp8 and path in blocks:
                    quantize_block(model, path)
            if streaming is not None:
                streaming.store(model, turn)
        reader.check()
    if streaming is not None:
        streaming.finish(model)
    return model.eval().requires_grad_(False)


def _groups(units: Collection[str], names: Iterable[str], parts: Mapping[str, Any]) -> dict[str, list[str]]:
    """The tensors of each unit by its path, and of what is in none by an empty one; as they lie in the files.

    A tensor in a unit within another one is the inner one's.
    """
    groups: dict[str, list[str]] = {"": []}
    # For disks that like to go on.
    for name in sorted(names, key=parts.__getitem__):
        path = name
        while path and path not in units:
            path = path.rpartition(".")[0]
        groups.setdefault(path, []).append(name)
    return groups


def _check(checkpoint: Checkpoint, wanted: Mapping[str, tuple[int, ...]], ignored: tuple[str, ...] = ()) -> None:
    """Compare a file's tensors with the wanted ones; names that begin with one of ``ignored`` are not checked."""
    absent = [name for name in wanted if name not in checkpoint.tensors]
    if absent:
        if len(absent) == len(wanted):
            raise ModelUnsupported(
                f"{checkpoint.path} has none of the names that its configuration asks for ({some(absent)}), but "
                f"{some(list(checkpoint.tensors))}; save it under the names of the authors' file, or of diffusers"
            )
        raise ModelCorrupt(f"{checkpoint.path} lacks {some(absent)}; download the file again")
    # Behind a prefix that was taken off, all is the model's.
    strange = [name for name in _unknown(checkpoint, wanted) if not name.startswith(ignored)]
    unknown = [name for name in strange if not _is_note(name, checkpoint.tensors[name], wanted)]
    if len(unknown) < len(strange):
        notes = [name for name in strange if name not in unknown]
        _log.info("%s: %d tensors are no weights, and left out: %s", checkpoint.path, len(notes), some(notes))
    if unknown:
        raise ModelUnsupported(
            f"{checkpoint.path} has tensors that this family doesn't use: {some(unknown)}; "
            "it may be a variant or a quantized file that this version doesn't run"
        )
    for name, shape in wanted.items():
        info, quantization = checkpoint.tensors[name], checkpoint.quantization.get(name)
        if quantization is None and info.dtype not in PLAIN and info.dtype not in PACKED:
            known = ", ".join([*PLAIN, *PACKED])
            raise ModelUnsupported(
                f"{checkpoint.path}: {name} is {info.dtype}, and nothing says how it is packed; this version reads "
                f"{known}, and what comfy_quant describes"
            )
        if not _fits(info.shape, shape, 1 if quantization is None else quantization.padding):
            raise ModelCorrupt(
                f"{checkpoint.path}: {name} is {list(info.shape)}, but its configuration asks for {list(shape)}"
            )


def _fits(found: tuple[int, ...], wanted: tuple[int, ...], padding: int) -> bool:
    """Whether a tensor has the shape that is wanted, padded to multiples of ``padding``.

    It may lack leading sizes of one, as in GGUF files.
    """
    padded = tuple(-(-size // padding) * padding for size in wanted)
    lost = len(padded) - len(found)
    return lost >= 0 and padded == (1,) * lost + found


def _unknown(checkpoint: Checkpoint, wanted: Mapping[str, tuple[int, ...]]) -> list[str]:
    """The names in a file that are neither wanted nor lie beside a wanted one."""
    sides = checkpoint.sides
    unused = {beside(name, INPUT_SCALE) for name in wanted if checkpoint.tensors[name].dtype in FLOAT8}
    return [name for name in checkpoint.tensors if name not in wanted and name not in sides and name not in unused]


def _is_note(name: str, info: TensorInfo, wanted: Iterable[str]) -> bool:
    """Whether a tensor that nothing asks for says something of the file and changes no forward.

    As SkyReels-V2's ``model_type.SkyReels-V2-T2V-14B-540P``. One in a module of the network may be its scale, and a
    name like ``__x0__`` tells ComfyUI how to compute.
    """
    path, _, leaf = name.rpartition(".")
    if info.size > 1 or leaf in ("weight", "bias") or _MARK.fullmatch(leaf):
        return False
    return not path or not any(each.startswith(f"{path}.") for each in wanted)


def _decode(data: Tensor, info: TensorInfo) -> Tensor:
    """The numbers of a tensor, in its own dtype; in fp32 if they are in blocks, as bytes if torch can't be sure."""
    if info.dtype in BLOCKS:
        return dequantize_blocks(data, info.dtype).reshape(info.shape)
    return data.view(_DECODED.get(info.dtype, torch.uint8)).reshape(info.shape)


def _place(
    model: nn.Module,
    checkpoint: Checkpoint,
    name: str,
    shape: tuple[int, ...],
    data: Tensor,
    sides: Mapping[str, Tensor],
    dtype: torch.dtype,
    weight_only: bool,
) -> None:
    path, _, leaf = name.rpartition(".")
    owner: Any = model.get_submodule(path)
    info, quantization = checkpoint.tensors[name], checkpoint.quantization.get(name)
    linear = isinstance(owner, nn.Linear) and leaf == "weight"
    packed: PackedLinear | None = None
    if quantization is not None and quantization.format == SCALED:
        (scale,) = sides.values()
        assign(owner, leaf, (_decode(data, TensorInfo(info.dtype, shape)).float() * scale.float()).to(dtype))
        return
    if quantization is not None:
        leaves = {each.rpartition(".")[2]: tensor for each, tensor in sides.items()}
        where, bias = f"{checkpoint.path}: {path}", owner.bias if linear else None
        rows, columns = shape[-2:]
        packed = pack(Layer(where, quantization, data, leaves, (rows, columns), bias, dtype, weight_only))
    elif info.dtype in PACKED and linear and _in_rows(info.dtype, shape):
        packed = pack_plain(data, info.dtype, shape[0], owner.bias, dtype)
    if packed is not None and linear:
        model.set_submodule(path, packed)
        return
    if packed is not None:
        # A table, whose rows are looked up.
        assign(owner, leaf, packed.weight.reshape(shape))
        return
    assign(owner, leaf, _decode(data, TensorInfo(info.dtype, shape)).to(dtype))


def _in_rows(kind: str, shape: tuple[int, ...]) -> bool:
    """Whether every row of a matrix is whole blocks; where GGUF files tell another shape than they have, it needn't."""
    return shape[-1] % BLOCKS.get(kind, (1, 1))[0] == 0


def get_weight(model: DiT, key: str) -> Tensor:
    """A weight by its name in the single file: the parameter itself, or the numbers of a packed layer in fp32.

    Raises `KeyError` if the model has no such weight.
    """
    owner, leaf = _find(model, key)
    if isinstance(owner, PackedLinear) and leaf == "weight":
        return owner.dequantized(torch.float32)
    if (own := model.own_weight(owner, leaf)) is not None:
        return own
    tensor: Tensor = owner._parameters[leaf] if leaf in owner._parameters else owner._buffers[leaf]
    return tensor


def set_weight(model: DiT, key: str, tensor: Tensor) -> None:
    """Replace a weight by a tensor of its shape, cast to the weight's dtype and moved to its device.

    A packed layer becomes a plain one, an fp8 layer stays fp8. Models that share the old weight keep it. Raises
    `KeyError` if the model has no such weight, `ValueError` for another shape.
    """
    owner, leaf = _find(model, key)
    stored = isinstance(owner, PackedLinear) and leaf == "weight"
    old = owner.data if stored else owner._parameters.get(leaf, owner._buffers.get(leaf))
    shape = (owner.out_features, owner.in_features) if stored else tuple(old.shape)
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{key}: a tensor of {list(tensor.shape)} can't replace one of {list(shape)}")
    if model.put_own_weight(owner, leaf, key, tensor.detach()):
        return
    if stored:
        path = key.rpartition(".")[0]
        fp8 = isinstance(owner, Fp8Linear)
        plain = nn.Linear(owner.in_features, owner.out_features, bias=False, device="meta").train(owner.training)
        plain.register_parameter("bias", owner.bias)
        owner = plain
        assign(owner, leaf, tensor.detach().to(old.device, model.dtype_of(key, model.dtype)))
        model.set_submodule(path, Fp8Linear.of(plain) if fp8 else plain)
        return
    assign(owner, leaf, tensor.detach().to(old.device, model.dtype_of(key, model.dtype)))


def adapt_weight(model: DiT, key: str, up: Tensor, down: Tensor) -> None:
    """Have a packed layer add a product of low rank (`PackedLinear.adapted`); models that share it don't change.

    Raises `KeyError` if the model has no such packed layer.
    """
    owner, leaf = _find(model, key)
    if not isinstance(owner, PackedLinear) or leaf != "weight":
        raise KeyError(key)
    model.set_submodule(key.rpartition(".")[0], owner.adapted(up, down))


def is_packed(model: DiT, key: str) -> bool:
    """Whether a weight is packed. Raises `KeyError` if the model has no such weight."""
    owner, leaf = _find(model, key)
    return isinstance(owner, PackedLinear) and leaf == "weight"


def _find(model: nn.Module, key: str) -> tuple[Any, str]:
    """The module that holds a weight, and the weight's name in it."""
    path, _, leaf = key.rpartition(".")
    try:
        owner: Any = model.get_submodule(path)
    except AttributeError:
        raise KeyError(key) from None
    held = owner._parameters.get(leaf) is not None or owner._buffers.get(leaf) is not None
    if isinstance(owner, PackedLinear):
        held = leaf == "weight" or (leaf == "bias" and held)
    if not held:
        raise KeyError(key)
    return owner, leaf


def share(model: Module) -> Module:
    """Another instance of a model over the same tensors: nothing is copied.

    Setting its weights doesn't change the first. A compiled module is shared as it was before it was compiled, and a
    model with a ``twin`` of its own as that is.
    """
    if (own := getattr(model, "twin", None)) is not None:
        made: Module = own()
        return made
    twin = copy.copy(model)
    twin._parameters = dict(model._parameters)
    twin._buffers = dict(model._buffers)
    twin._modules = {name: module if module is None else share(module) for name, module in model._modules.items()}
    return twin


def weight_bytes(*models: DiT) -> int:
    """The device's memory that this rank keeps for models' weights, packed ones as they are; shared ones count once."""
    tensors = [
        part
        for model in models
        for tensor in (*model.parameters(), *model.buffers(), *_held(model))
        for _, part in parts_of(tensor)
    ]
    storages = [tensor.untyped_storage() for tensor in tensors if tensor.device.type != "meta"]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _held(model: DiT) -> list[Tensor]:
    return model.weights.held if isinstance(model.weights, Stage) else []

"""Where a model's weights are in this process: in a MODEL, or in a file."""

from __future__ import annotations

import ast
import functools
import inspect
import json
import logging
import os
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from safetensors import safe_open

from tacod.checkpoint.quantization import DESCRIPTION, Quantization

from . import hooks
from .errors import Failed, Refused
from .names import DTYPES, Names, is_gguf, read_header
from .patches import PREFIX
from .quantized import check_formats, check_layouts, layers_of, note_of, parts_of

__all__ = ["GGUF_TYPE", "FileState", "Source", "State", "plain", "state_of"]

log = logging.getLogger(__name__)

GGUF_TYPE = "tensor_type"
"""The attribute in which ComfyUI-GGUF's tensors keep their kind."""
_MODEL_DTYPE = "_comfy_model_dtype"
"""Where ComfyUI, with dynamic VRAM, notes what it casts a layer's parameter to, after the parameter's name."""


@dataclass
class Source:
    """Weights that are in a file, in a MODEL, or both. The MODEL is held weakly: its memory is ComfyUI's to free."""

    name: str
    path: str | None
    names: Names
    """What ComfyUI's names are in the file."""
    config: Mapping[str, Any]
    """ComfyUI's ``unet_config``."""
    layers: Mapping[str, Quantization] = field(default_factory=dict)
    """The quantized ones."""
    model: Callable[[], ModelPatcher | None] = lambda: None

    def __post_init__(self) -> None:
        self._stamp = _stamp(self.path)

    @property
    def file(self) -> str | None:
        """The file, if it is there and still what it was."""
        return self.path if self._stamp is not None and _stamp(self.path) == self._stamp else None

    def state(self) -> Mapping[str, torch.Tensor]:
        """All weights, by ComfyUI's names, without patches.

        Raises `Failed` if they are gone, `Refused` if they are in a GGUF file, which only the daemon reads.
        """
        model = self.model()
        if model is not None:
            return state_of(model)
        if self.file is None:
            raise self._gone()
        if is_gguf(self.file):
            raise Refused(f"a use of {self.name}'s weights here", "GGUF files are read by the daemon alone")
        return FileState(self.file, self.names)

    def upload(self) -> Mapping[str, torch.Tensor]:
        """All weights, by the file's names, to be sent.

        Raises `Refused` for weights that can't be, `Failed` if they are gone.
        """
        if self.file is not None and is_gguf(self.file):
            raise Refused(f"{self.name} from here", "a GGUF file is read by the daemon; put it under its models.roots")
        state = self.state()
        if isinstance(state, State) and state.packed:
            raise Refused(
                "GGUF weights whose file isn't found",
                "load the file with TACO-DiT UNET Loader, or put it into ComfyUI's folder diffusion_models",
            )
        notes: dict[str, torch.Tensor] = {}
        if not isinstance(state, State) and self.file is not None:
            # What stands in the file's metadata: an upload's tensors say it themselves.
            header = read_header(self.file)
            said = {} if header.marked else header.layers
            notes = {f"{key}.{DESCRIPTION}": note_of(each) for key, each in said.items()}
        return _Sent(state, {self.names.for_daemon(name): name for name in state}, notes)

    def metadata(self) -> dict[str, str]:
        """What an upload says of itself: the configuration, so far as it is plain data.

        Nothing for the families that ComfyUI doesn't name there: the daemon knows those by their tensors.
        """
        if "image_model" not in self.config:
            return {}
        return {"tacod.config": json.dumps({key: value for key, value in self.config.items() if _plain(value)})}

    def local(self) -> ModelPatcher:
        """A MODEL that runs here. Raises `Failed` if the weights are gone, `Refused` if no loader here reads them."""
        model = self.model()
        if model is not None:
            return model.clone()
        if self.file is not None:
            return load_here(self.file)
        raise self._gone()

    def _gone(self) -> Failed:
        return Failed(
            f"TACO-DiT: the weights of {self.name} are no longer here, or its file has changed; "
            "change a setting of their loader and queue again"
        )


def load_here(path: str) -> ModelPatcher:
    """A file's MODEL by ComfyUI's own loader. Raises `Refused` for a GGUF file, which needs another pack's."""
    if is_gguf(path):
        raise Refused(
            f"{os.path.basename(path)} with enable_taco_dit off",
            "ComfyUI itself reads no such file; load it with Unet Loader (GGUF) of ComfyUI-GGUF",
        )
    load = hooks.find("comfy.sd.load_diffusion_model")
    if load is None:
        raise Refused(f"{os.path.basename(path)} with enable_taco_dit off", hooks.UPDATE)
    loaded: ModelPatcher = load(path)
    return loaded


def _stamp(path: str | None) -> tuple[int, int, int] | None:
    """What tells a file's state without reading it; None if there is none."""
    try:
        status = os.stat(path) if path is not None else None
    except OSError:
        return None
    return (status.st_ino, status.st_size, status.st_mtime_ns) if status is not None else None


def _plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _plain(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(map(_plain, value))
    return value is None or isinstance(value, str | int | float | bool)


@dataclass(frozen=True, eq=False)
class State(Mapping[str, torch.Tensor]):
    """A network's weights by ComfyUI's names, as ComfyUI computes with them, but for patches."""

    tensors: Mapping[str, torch.Tensor]
    rounded: Mapping[str, torch.dtype] = field(default_factory=dict)
    """Those that ComfyUI casts to 8 bits whenever it uses them: its loader was told to, and the file holds more."""
    packed: bool = False
    """Whether they are ComfyUI-GGUF's: blocks of bytes under the shape of the numbers."""
    layers: Mapping[str, Quantization] = field(default_factory=dict)
    """The quantized layers, whose weights lie here as a file has them."""

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = self.tensors[name]
        return tensor.to(self.rounded[name]) if name in self.rounded else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def state_of(model: ModelPatcher) -> State:
    """A MODEL's weights as they were loaded: what patches have altered in place is in its backup.

    Those of quantized layers as a file has them: packed, with scales and ``comfy_quant`` beside them.

    Raises `Refused` for a layer in a format that the daemon doesn't read.
    """
    network = model.model.diffusion_model
    parameters = dict(network.named_parameters())
    check_layouts(parameters)
    state = dict(network.state_dict())
    packed = any(getattr(each, GGUF_TYPE, None) is not None for each in parameters.values())
    if packed:
        # Its state_dict is there to be counted, and not to be read.
        buffers = {name for name, _ in network.named_buffers()}
        state = {**{name: each for name, each in state.items() if name in buffers}, **parameters}
    layers = layers_of(state)
    check_formats(parameters, layers)
    for key, kept in model.backup.items():
        state[key.removeprefix(PREFIX)] = kept.weight
    for key, kept in getattr(model, "backup_buffers", {}).items():
        state[key.removeprefix(PREFIX)] = kept
    for key, kept in model.hook_backup.items():
        state[key.removeprefix(PREFIX)] = kept[0]
    for key, weight in list(state.items()):
        # A backup's scales are its own: those of the layer are of what patches have made of it.
        state |= parts_of(key, weight)
    dynamic = getattr(model, "is_dynamic", None)
    rounded = _rounded(network, state) if dynamic is not None and dynamic() and not packed else {}
    return State(state, rounded, packed, layers)


def _rounded(network: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> dict[str, torch.dtype]:
    """What dynamic VRAM casts to 8 bits at each use; what it keeps in them as it lies is no rounding."""
    found = {}
    whole = _bytes_loaded_whole()
    for path, module in network.named_modules():
        if hasattr(module, "comfy_cast_weights") and sum(each.nbytes for each in module.state_dict().values()) <= whole:
            continue
        for attribute, dtype in vars(module).items():
            name = f"{path}.{attribute.removesuffix(_MODEL_DTYPE)}".lstrip(".")
            if attribute.endswith(_MODEL_DTYPE) and isinstance(dtype, torch.dtype) and name in state:
                stored = state[name].dtype
                if stored.is_floating_point and dtype.is_floating_point and dtype.itemsize == 1 and dtype != stored:
                    found[name] = dtype
    return found


@functools.cache
def _bytes_loaded_whole() -> int:
    """Up to which size dynamic VRAM loads a layer as it lies, and doesn't cast it; as its code says."""
    load = hooks.find("comfy.model_patcher.ModelPatcherDynamic.load")
    code = ast.parse(textwrap.dedent(inspect.getsource(load))) if load is not None else ast.Module([], [])
    for node in ast.walk(code):
        if isinstance(node, ast.Compare) and isinstance(node.left, ast.Name) and node.left.id == "module_mem":
            size = _product(node.comparators[0])
            if size is None:
                log.warning("TACO-DiT: this ComfyUI's dynamic VRAM is another one: small layers of fp8 may differ")
            return size or 0
    return 0


def _product(node: ast.expr) -> int | None:
    """What a constant or a product of constants comes to; None for anything else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        left, right = _product(node.left), _product(node.right)
        return None if left is None or right is None else left * right
    return None


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of another pack's kind of tensor, without what that makes of them."""
    return tensor.detach().as_subclass(torch.Tensor)


class _Sent(Mapping[str, torch.Tensor]):
    """Weights by the names under which they are sent, and what is said of their layers.

    Dtypes that don't travel, such as scales that are powers of two (e8m0), go as bytes; so files have them, too.
    """

    def __init__(
        self, state: Mapping[str, torch.Tensor], names: Mapping[str, str], notes: Mapping[str, torch.Tensor]
    ) -> None:
        self._state, self._names, self._notes = state, names, notes

    def __getitem__(self, key: str) -> torch.Tensor:
        if key in self._notes:
            return self._notes[key]
        tensor = self._state[self._names[key]]
        as_bytes = tensor.dtype.itemsize == 1 and tensor.dtype not in DTYPES.values()
        return tensor.view(torch.uint8) if as_bytes else tensor

    def __iter__(self) -> Iterator[str]:
        return iter({**self._names, **self._notes})

    def __len__(self) -> int:
        return len({**self._names, **self._notes})


class FileState(Mapping[str, torch.Tensor]):
    """A file's weights by ComfyUI's names, each read when it is asked for."""

    def __init__(self, path: str, names: Mapping[str, str]) -> None:
        self._names = names
        self._file = safe_open(path, framework="pt")

    def __getitem__(self, key: str) -> torch.Tensor:
        tensor: torch.Tensor = self._file.get_tensor(self._names[key])
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

"""What a file has for a network of ComfyUI's: which of its tensors make which weights, and the weights themselves.

ComfyUI renames a file's tensors, and of some it makes others, such as three matrices of one. It does so with empty
tensors first, which shows what is made of what; then a unit's tensors are read, and it does so again with these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tacod.checkpoint import Checkpoint
from tacod.rank.comfyui.installation import quiet
from tacod.rank.comfyui.network import Network
from tacod.rank.comfyui.units import sizes_of_units
from tacod.rank.oom import describe_oom
from tacod.rank.weights.called import hook_units
from tacod.rank.weights.reader import Reader, as_tensor
from tacod.rank.weights.streaming import Streaming
from tacod_client.errors import ModelUnsupported

__all__ = ["BESIDE", "ON_HOST", "Contents"]

BESIDE = "conditioner.conditioners."
"""The beginning of names of tensors that ComfyUI makes a model of, beside its network."""

ON_HOST = ("comfy_quant", "scaled_fp8")
"""Last names of tensors that ComfyUI reads as text and numbers while it loads."""
_SMALL = 4096
"""Tensors of at most so many numbers, if they are read already, are given to ComfyUI with these."""

State = dict[str, Tensor]


class Contents:
    """The weights of a network, by its own names.

    Args:
        process: ComfyUI's function that makes them of a file's tensors.
        tensors: The file's tensors without a prefix; what isn't read yet is on the device meta.
        file: The file.
        names: The file's names of what isn't read yet, by the ``id`` of each in ``tensors``.
    """

    def __init__(
        self, process: Callable[[State], State], tensors: State, file: Checkpoint, names: Mapping[int, str]
    ) -> None:
        self._process = process
        self._tensors = tensors
        self._file = file
        self._names = names
        self._dtypes: dict[str, torch.dtype] = {}
        """Of weights that are cast."""
        with _Origins(names) as origins:
            made = process(dict(tensors))
        made = {name: each for name, each in made.items() if not name.startswith(BESIDE)}
        theirs = {id(tensor): name for name, tensor in tensors.items()}
        self.renamed = {theirs[id(each)]: name for name, each in made.items() if theirs.get(id(each), name) != name}
        """The network's names of weights, by those of the file where they differ."""
        self._origins = {name: origins.of(each) for name, each in made.items()}
        """The file's tensors of which each weight is made; none if it is known already."""
        self._known = {name: each for name, each in made.items() if not each.is_meta}
        self._made = {name for name, each in made.items() if each.is_meta and id(each) not in theirs}
        """What ComfyUI makes of other tensors."""
        self.empty: State = {name: each if each.numel() <= _SMALL else each.to("meta") for name, each in made.items()}
        """All weights, most of them on the device meta."""

    def cast_to(self, dtypes: Mapping[str, torch.dtype]) -> None:
        """Have weights of these names be of these dtypes, if both are of floating-point numbers."""
        for name, dtype in dtypes.items():
            tensor = self.empty.get(name)
            if tensor is not None and tensor.is_floating_point() and tensor.dtype != dtype:
                self._dtypes[name] = dtype
                self.empty[name] = tensor.to(dtype)

    def fill(
        self, network: Network, device: torch.device, streaming: Streaming, progress: Callable[[int, int], None]
    ) -> None:
        """Read the weights into a network, unit by unit; ``streaming`` stores units that don't stay whole on each rank.

        Raises `ModelCorrupt` if the file has changed, `OutOfMemory` if there is no room, `ModelUnsupported` for what
        ComfyUI raises.
        """
        inner, units = network.inner, network.blocks_at
        streaming.begin(network, sizes_of_units(inner, units, streaming.smallest))
        for module in inner.modules():
            for leaf, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    module._buffers[leaf] = buffer.to(device)
        groups = self._groups(units)
        turns = streaming.turns(list(groups))
        needed = {path: self._needed(names) for path, names in groups.items()}
        mine = [name for turn in turns for path in turn.mine for name in needed[path]]
        sizes = {name: self._bytes(name) for names in needed.values() for name in names}
        done, all_mine, total = 0, sum(map(sizes.__getitem__, mine)), sum(sizes.values())
        with Reader(self._file, device) as reader:
            tensors = reader.read(mine)
            for turn in turns:
                for path in turn.mine:
                    read = {}
                    for name in needed[path]:
                        read[name] = as_tensor(self._file, name, next(tensors))
                        done += sizes[name]
                        # This rank's part of them stands for all.
                        progress(done * total // all_mine, total)
                    self._load(inner, path, groups[path], read, device)
                    del read
                streaming.store(network, turn)
            reader.check()
        streaming.finish(network)
        if network.weights is not None:
            hook_units(network, units)

    def _groups(self, units: Iterable[str]) -> dict[str, list[str]]:
        """The names of each unit's weights by its path, and first of those that are in none by an empty one."""
        groups: dict[str, list[str]] = {"": [], **{path: [] for path in units}}
        for name in self.empty:
            path = name
            while path and path not in groups:
                path = path.rpartition(".")[0]
            groups[path].append(name)
        return groups

    def _needed(self, names: Iterable[str]) -> list[str]:
        """The file's tensors of which these weights are made, as they lie there: disks like to go on."""
        return sorted({each for name in names for each in self._origins[name]}, key=self._file.parts.__getitem__)

    def _bytes(self, name: str) -> int:
        return sum(part.stop - part.start for part in self._file.parts[name])

    def _weights(
        self, names: Iterable[str], read: Mapping[str, Tensor], device: torch.device
    ) -> Iterator[tuple[str, Tensor]]:
        """Weights of these names, by what is read of the file."""
        made: State = {}
        if not self._made.isdisjoint(names):
            given = {name: read.get(self._names.get(id(each), ""), each) for name, each in self._tensors.items()}
            with quiet():
                made = self._process(given)
        for name in names:
            if name in self._made:
                tensor = made[name]
            elif name in self._known:
                tensor = self._known[name]
            else:
                (origin,) = self._origins[name]
                tensor = read[origin]
            on_host = name.rpartition(".")[2] in ON_HOST
            yield name, tensor if on_host else tensor.to(device, self._dtypes.get(name, tensor.dtype))

    def _load(
        self, network: nn.Module, path: str, names: Iterable[str], read: Mapping[str, Tensor], device: torch.device
    ) -> None:
        """Fill a unit, or with an empty path all that is in none, by what is read of the file."""
        try:
            state = {name.removeprefix(f"{path}."): each for name, each in self._weights(names, read, device)}
            if not path:
                # A layer without a weight in the state takes it for lost, so the units' are given empty ones.
                state = self.empty | state
            with quiet():
                network.get_submodule(path).load_state_dict(state, strict=False, assign=True)
        except Exception as error:  # whatever ComfyUI raises, on a rank that loads this alone
            if describe_oom(error) is not None:
                raise
            raise ModelUnsupported(
                f"{self._file.path}: ComfyUI can't load {path or 'its network'}: {type(error).__name__}: {error}; "
                "see whether that ComfyUI loads it by itself, and update it if not"
            ) from error


class _Origins(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within, notes of which tensors others are made.

    ``names`` are the first ones, by the ``id`` of each.
    """

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._names: dict[int, frozenset[str]] = {each: frozenset({name}) for each, name in names.items()}
        self._held: list[Any] = []
        """So that no other tensor gets the same ``id``."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: to keep PyTorch's compiler out of a mode, PyTorch imports it, which takes seconds."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call one of PyTorch's operations."""
        out = func(*args, **(kwargs or {}))
        known = [self.of(each) for each in tree_leaves((args, kwargs))]
        for each in tree_leaves(out):
            if isinstance(each, Tensor):
                self._names[id(each)] = frozenset().union(*known)
                self._held.append(each)
        return out

    def of(self, tensor: Any) -> frozenset[str]:
        """The names of the tensors of which one is made."""
        return self._names.get(id(tensor), frozenset())

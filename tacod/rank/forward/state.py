"""What a network and the code around it keep between calls, to tell whether a call has changed anything."""

from __future__ import annotations

import functools
import itertools
import logging
import random
import sys
from collections import deque
from collections.abc import Hashable, Iterator, Mapping
from types import FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["State"]

log = logging.getLogger(__name__)

MOST = 300_000
"""Most things that are compared."""
DEPTH = 12
"""Most containers and objects within each other."""
_SCALARS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)
_CONTAINERS = (list, tuple, deque)
_SETS = (set, frozenset)
_LRU = type(functools.lru_cache(lambda: None))
_OF_EVERY_MODULE = frozenset(vars(nn.Module())) - {"training"}


class State:
    """What can be seen of it now: attributes of modules, classes and objects, globals, closures, and random states.

    Containers and objects of the network's own packages are looked into. Of tensors the memory counts, not the numbers;
    of what a C library or an iterator keeps nothing is known. It holds tensors, and objects that it doesn't look into.

    Args:
        network: The network. What its packages' Python modules have is part of it.
        device: The device that computes.
    """

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        self._found: dict[str, Hashable] = {}
        self._held: list[Any] = []
        self._seen: set[int] = set()
        self.complete = True
        """False if there was too much to compare, or something that can't be."""
        classes = {cls for each in network.modules() for cls in type(each).__mro__}
        self._packages = {_package(cls) for cls in classes} - {"torch", "builtins", "typing"}
        self._random = dict(_random(device))
        try:
            for count, (path, value) in enumerate(itertools.chain(self._walk("", network, 0), self._globals())):
                if count == MOST:
                    self.complete = False
                    return
                self._found[path] = value
        except Exception:
            # Things that a network keeps run code of their own when they are looked at.
            log.debug("what %s keeps can't be looked at", type(network).__name__, exc_info=True)
            self.complete = False

    def changed(self, before: State) -> str:
        """What differs from an earlier state of the network, in words; empty if nothing does."""
        if not (self.complete and before.complete):
            return "it keeps more than can be compared, or what can't be"
        names = self._found.keys() ^ before._found.keys() or (
            each for each, value in self._found.items() if before._found[each] != value
        )
        name = min(names, key=len, default="")
        return name and f"a call changes what the network keeps: {name}"

    def drew(self, before: State) -> str:
        """Whose random numbers were drawn since an earlier state, in words; empty if none were."""
        names = [name for name, value in self._random.items() if before._random.get(name) != value]
        return f"a call draws random numbers of {', '.join(names)}" if names else ""

    def _globals(self) -> Iterator[tuple[str, Hashable]]:
        for name, module in sorted(sys.modules.items()):
            if name.partition(".")[0] in self._packages and type(module) is ModuleType:
                for key, value in list(vars(module).items()):
                    if not key.startswith("__"):
                        yield from self._walk(f"{name}.{key}", value, 0)

    def _walk(self, path: str, value: Any, depth: int) -> Iterator[tuple[str, Hashable]]:
        """What tells this value, and what is within it, from others."""
        if isinstance(value, _SCALARS):
            yield path, (type(value).__name__, repr(value))
        elif isinstance(value, Tensor):
            self._held.append(value)
            yield path, (*_place(value), tuple(value.shape), value.dtype)
        elif isinstance(value, _LRU):
            known = value.cache_info()
            yield path, (id(value), known.misses, known.currsize)
        elif isinstance(value, itertools.count):
            yield path, repr(value)
        elif isinstance(value, random.Random) and not isinstance(value, random.SystemRandom):
            yield path, repr(value.getstate())
        elif type(value).__module__.startswith("numpy.random") and hasattr(value, "bit_generator"):
            yield path, repr(value.bit_generator.state)
        elif isinstance(value, torch.Generator):
            yield path, value.get_state().numpy().tobytes()
        elif isinstance(value, _SETS):
            yield path, (type(value).__name__, frozenset(map(self._key, value)))
        elif type(value).__module__ == "numpy" and hasattr(value, "tobytes"):
            yield path, (str(value.dtype), value.shape, value.tobytes())
        else:
            parts = self._parts(value)
            if parts is None:
                # By its identity, which no other thing has while it is held.
                self._held.append(value)
            yield path, (type(value).__name__, id(value) if parts is None else tuple(parts))
            if parts and id(value) not in self._seen and depth < DEPTH:
                self._seen.add(id(value))
                for key, part in parts.items():
                    where = f".{key}" if isinstance(key, str) and key.isidentifier() else f"[{key!r}]"
                    yield from self._walk((path + where).removeprefix("."), part, depth + 1)

    def _parts(self, value: Any) -> dict[Any, Any] | None:
        """What is looked into, by names; None for what is known by its identity alone."""
        if isinstance(value, Mapping):
            return {self._key(key): part for key, part in list(value.items())}
        if isinstance(value, _CONTAINERS):
            return dict(enumerate(value))
        if isinstance(value, nn.Module):
            named = {key: part for key, part in vars(value).items() if key not in _OF_EVERY_MODULE}
            return named | value._parameters | value._buffers | value._modules
        if isinstance(value, FunctionType):
            if value.__module__ is None or value.__module__.partition(".")[0] not in self._packages:
                return None
            cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
            closed = {name: _contents(cell) for name, cell in cells}
            parts = {**closed, "defaults": value.__defaults__, "named": value.__kwdefaults__, **vars(value)}
            return {name: part for name, part in parts.items() if part is not None}
        if isinstance(value, type):
            if _package(value) not in self._packages:
                return None
            return {name: part for name, part in vars(value).items() if not name.startswith("__")}
        if isinstance(value, staticmethod | classmethod):
            return {"function": value.__func__}
        if isinstance(value, MethodType):
            return {"function": value.__func__, "object": value.__self__}
        if isinstance(value, functools.partial):
            return {"function": value.func, "args": value.args, "named": value.keywords}
        if type(value) is SimpleNamespace or (_package(type(value)) in self._packages and hasattr(value, "__dict__")):
            return dict(vars(value))
        return None

    def _key(self, key: Any) -> Hashable:
        if isinstance(key, str | int):
            return key
        if isinstance(key, _SCALARS):
            return type(key).__name__, repr(key)
        if isinstance(key, tuple):
            return tuple(map(self._key, key))
        return type(key).__name__, id(key)


def _random(device: torch.device) -> Iterator[tuple[str, Any]]:
    yield "Python", random.getstate()
    yield "torch", torch.get_rng_state().numpy().tobytes()
    if device.type == "cuda":
        yield "the device", torch.cuda.get_rng_state(device).numpy().tobytes()
    if (numpy := sys.modules.get("numpy")) is not None:
        yield "numpy", repr(numpy.random.get_state())


def _package(cls: type) -> str:
    return cls.__module__.partition(".")[0]


def _contents(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return None


def _place(tensor: Tensor) -> tuple[Hashable, ...]:
    """Where a tensor lies, and how often it was written to; weights may be, as a graph reads them each time."""
    try:
        counts = not (tensor.is_inference() or isinstance(tensor, nn.Parameter))
        return tensor.data_ptr(), tensor.stride(), tensor._version if counts else 0
    except RuntimeError:
        # One that has no memory of its own, such as a quantized weight.
        return (id(tensor),)

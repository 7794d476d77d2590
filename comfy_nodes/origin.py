"""The file that a MODEL's weights came from, found and checked before it is trusted.

Where it may be is learnt in four ways, and each is only a hint: what counts is that the file holds these weights.
"""

from __future__ import annotations

import functools
import inspect
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import torch
from comfy.model_patcher import ModelPatcher
from safetensors import SafetensorError, safe_open

from tacod.checkpoint import Checkpoint, read_checkpoint
from tacod.checkpoint.header import BLOCKS
from tacod.checkpoint.quantization import DESCRIPTION
from tacod_client.errors import TacodError
from tacod_client.tensors import as_bytes

from . import hooks
from .errors import Refused
from .names import DTYPES, Header, Names, is_gguf, layers_in_file, names_in_file, read_header
from .quantized import canonical, stands_beside
from .source import GGUF_TYPE, State, plain

__all__ = ["origin_of", "watch_loaders"]

_STAMP = "taco_dit_file"
_LOADERS = ("comfy.sd.load_diffusion_model", "comfy.sd.load_checkpoint_guess_config")
_WIDGETS = {"unet_name": "diffusion_models", "ckpt_name": "checkpoints"}
_MAPS = "/proc/self/maps"
NUMBERS = 64
"""How many numbers are compared with the file's at each of these places in a weight."""
PLACES = 6
"""So many, evenly spread: what was merged into values alone may begin behind queries and keys, in one weight."""
SAMPLE_BYTES = 4 * NUMBERS
"""The same in a GGUF file, whose numbers are packed."""
DEPTH = 64
"""How far up the graph to look for a loader."""


def watch_loaders() -> None:
    """Note on every model that ComfyUI loads from now on which file it came from; older versions forget that."""
    for where in _LOADERS:
        module, _, name = where.rpartition(".")
        original = hooks.find(where)
        if original is not None and not hasattr(original, _STAMP):
            setattr(hooks.find(module), name, _stamping(original))


def _stamping(load: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(load)

    @functools.wraps(load)
    def stamped(*args: Any, **kwargs: Any) -> Any:
        loaded = load(*args, **kwargs)
        # However the loader was called, the path comes first in what it takes.
        path = next(iter(signature.bind(*args, **kwargs).arguments.values()), None)
        for model in loaded if isinstance(loaded, tuple) else (loaded,):
            if isinstance(model, ModelPatcher) and isinstance(path, str):
                # On the inner model, which all clones of a MODEL share.
                setattr(model.model, _STAMP, path)
        return loaded

    setattr(stamped, _STAMP, True)
    return stamped


def origin_of(model: ModelPatcher, state: State, graph: Any, node: str | None) -> tuple[str, Names] | None:
    """The file with just these weights, and what they are called there; None if none is found.

    Args:
        model: The MODEL.
        state: Its network's weights as they were loaded, without patches.
        graph: The graph that is being run, by node ids.
        node: The id of the node whose input ``model`` leads to the loader.
    """
    if state.rounded:
        # What ComfyUI computes with is in no file: its loader was told to round the weights.
        return None
    config = getattr(model.model, "model_config", None)
    seen = set()
    for path in _candidates(model, state, graph, node):
        real = os.path.realpath(path)
        if real not in seen and os.path.isfile(real):
            seen.add(real)
            names = _names_if_held(real, state, config)
            if names is not None:
                return real, names
    return None


def _candidates(model: ModelPatcher, state: State, graph: Any, node: str | None) -> Iterator[str]:
    """Where the file may be, the likeliest first."""
    for path in (getattr(model.model, _STAMP, None), *_noted(model), _mapped(state.values()), _upstream(graph, node)):
        if isinstance(path, str):
            yield path


def _noted(model: ModelPatcher) -> Iterator[Any]:
    """Newer versions note how to load a model again: a function and its arguments, the path among them.

    Other packs put functions of their own there, so only the arguments are looked at.
    """
    init = getattr(model, "cached_patcher_init", None)
    arguments = init[1] if isinstance(init, tuple | list) and len(init) > 1 else ()
    for argument in arguments if isinstance(arguments, tuple | list) else ():
        yield from argument if isinstance(argument, tuple | list) else (argument,)


def _mapped(weights: Iterable[torch.Tensor]) -> str | None:
    """The file that is mapped into memory where the largest weight lies; None if it was copied from one."""
    here = [each for each in weights if each.device.type == "cpu" and not each.is_meta]
    address = max(here, key=lambda each: plain(each).nbytes).data_ptr() if here else 0
    try:
        with open(_MAPS, encoding="utf-8", errors="surrogateescape") as maps:
            for line in maps:
                first, _, last = line.partition(" ")[0].partition("-")
                if int(first, 16) <= address < int(last, 16):
                    # Range, permissions, offset, device, inode; then the path, if there is one.
                    return (line.rstrip("\n").split(maxsplit=5)[5:] or [None])[0]
    except OSError:
        pass
    return None


def _upstream(graph: Any, node: str | None) -> str | None:
    """The file that a loader further up the graph names in its widget."""
    find_path = hooks.find("folder_paths.get_full_path")
    for _ in range(DEPTH if find_path is not None else 0):
        inputs = _inputs(graph, node)
        for widget, folder in _WIDGETS.items():
            if isinstance(inputs.get(widget), str):
                path: str | None = find_path(folder, inputs[widget])
                return path
        link = inputs.get("model")
        if not isinstance(link, list) or len(link) != 2:
            return None
        node = link[0]
    return None


def _inputs(graph: Any, node: str | None) -> Mapping[str, Any]:
    try:
        found: Mapping[str, Any] = graph.get_node(node)["inputs"]
    except Exception:  # its own kind of error, which differs by version
        return {}
    return found


def _names_if_held(path: str, state: State, config: Any) -> Names | None:
    """What a file calls these weights, if it holds them; None if it doesn't, or is of a kind that nobody here reads."""
    try:
        if is_gguf(path) != state.packed:
            return None
        if state.packed:
            return _names_if_held_packed(path, state, config)
        header = read_header(path)
        names = names_in_file(header, config)
        return names if _same_formats(header, names, state) and _holds(path, names, state) else None
    except (OSError, SafetensorError, TacodError, Refused):  # no model file after all, or one that is gone by now
        return None


def _same_formats(header: Header, names: Names, state: State) -> bool:
    """Whether a file and a network say the same of the layers that both quantize."""
    theirs = layers_in_file(header, names)
    if header.marked and not state.layers:
        # Versions before 0.4.0 know scaled fp8 alone, and need no format to be said.
        return True
    return all(
        theirs.get(layer) == state.layers.get(layer)
        for layer in {**theirs, **state.layers}
        if f"{layer}.weight" in state
    )


def _holds(path: str, names: Names, state: State) -> bool:
    """Whether a file holds these weights: names, shapes, and some numbers of each as ComfyUI rounds them.

    Of quantized layers the packed numbers, and what stands beside them: either side may leave out a scale of 1.
    """
    weights = {key: weight for key, weight in state.items() if not stands_beside(key)}
    beside = {canonical(key): each for key, each in state.items() if stands_beside(key)}
    keys = {canonical(name): key for name, key in names.items()}
    scaled = not state.layers and any(name.endswith(".weight_scale") for name in keys)
    with safe_open(path, framework="pt") as file:
        for key, weight in weights.items():
            if key not in keys or file.get_slice(keys[key]).get_shape() != list(weight.shape):
                return False
        for key, weight in weights.items():
            if not _same_sample(file.get_slice(keys[key]), weight, scaled):
                return False
        for key in {**beside, **keys}:
            layer, _, leaf = key.rpartition(".")
            if f"{layer}.weight" not in weights or not stands_beside(key) or leaf == DESCRIPTION:
                continue
            if leaf == "input_scale" and key not in beside and not _rounds_inputs(state, layer):
                continue
            if not _same_scales(file.get_slice(keys[key]) if key in keys else None, beside.get(key)):
                return False
    return True


def _rounds_inputs(state: State, layer: str) -> bool:
    return layer in state.layers and state.layers[layer].quantizes


def _same_sample(stored: Any, weight: torch.Tensor, scaled: bool) -> bool:
    """Whether some numbers agree, and the model's dtype isn't one of those that lose more than a device's own.

    Of a file of scaled weights ComfyUI 0.3.64 keeps more in 8 bit than the file does, and nobody asked for that.
    """
    theirs = _sample(stored, stored.get_shape())
    if weight.dtype.itemsize == 1 and weight.dtype != theirs.dtype and not scaled:
        return False
    return _same_bytes(theirs.to(weight.dtype), _sample(weight, weight.shape))


def _same_scales(stored: Any, ours: torch.Tensor | None) -> bool:
    """Whether scales agree; a file may store those of 8 bits as bytes. One that is left out is 1."""
    if stored is None or ours is None:
        there = stored[...] if ours is None else ours
        return there.dtype.itemsize > 1 and bool((there == 1).all())
    if stored.get_shape() != list(ours.shape):
        return False
    theirs, ours = _sample(stored, stored.get_shape()), _sample(ours, ours.shape)
    if theirs.dtype.itemsize == 1 or ours.dtype.itemsize == 1:
        return theirs.dtype.itemsize == ours.dtype.itemsize and _same_bytes(theirs, ours)
    return _same_bytes(theirs.to(ours.dtype), ours)


def _sample(tensor: Any, shape: Sequence[int]) -> torch.Tensor:
    """Some numbers of a tensor, or of one in a file: those of its first rows, and of others throughout."""
    if not len(shape):
        whole: torch.Tensor = tensor[...]
        return whole.reshape(1)
    rows = -(-NUMBERS // max(math.prod(shape[1:]), 1))
    return torch.cat([tensor[place : place + rows].flatten()[:NUMBERS] for place in _places(shape[0])])


def _places(length: int) -> list[int]:
    """Where samples of so many rows, or bytes, begin."""
    return [length * number // PLACES for number in range(PLACES)]


def _same_bytes(theirs: torch.Tensor, ours: torch.Tensor) -> bool:
    # What is no number equals nothing, itself neither.
    pair = (theirs, ours.detach().cpu())
    return torch.equal(*(each.contiguous().view(torch.uint8) for each in pair))


def _names_if_held_packed(path: str, state: State, config: Any) -> Names | None:
    """As `_names_if_held`, for a GGUF file: names, shapes, and some bytes or numbers of each weight."""
    checkpoint = read_checkpoint(path)
    names = names_in_file(Header.of_gguf(checkpoint), config)
    held = all(key in names and _same_blocks(checkpoint, names[key], weight) for key, weight in state.items())
    return names if held else None


def _same_blocks(checkpoint: Checkpoint, key: str, weight: torch.Tensor) -> bool:
    info, (part,) = checkpoint.tensors[key], checkpoint.parts[key]
    if info.shape != tuple(weight.shape):
        return False
    # Whole numbers begin there.
    places = [place // 8 * 8 for place in _places(part.stop - part.start)]
    with open(part.file, "rb") as file:
        theirs = b"".join(_read_at(file, part.start + place, part.stop) for place in places)
    if getattr(weight, GGUF_TYPE, None) is not None:
        packed = as_bytes(plain(weight))
        ours = torch.cat([packed[place : place + SAMPLE_BYTES] for place in places]).cpu()
        return ours.numpy().tobytes() == theirs
    # The pack has made numbers of it as it read the file (vectors).
    dtype = DTYPES.get(info.dtype)
    if dtype is None or info.dtype in BLOCKS:
        return False
    numbers = torch.frombuffer(bytearray(theirs), dtype=dtype)
    flat, size = plain(weight).reshape(-1), dtype.itemsize
    ours = torch.cat([flat[place // size : (place + SAMPLE_BYTES) // size] for place in places]).cpu()
    return torch.equal(ours, numbers.to(weight.dtype))


def _read_at(file: BinaryIO, start: int, stop: int) -> bytes:
    file.seek(start)
    return file.read(min(SAMPLE_BYTES, stop - start))

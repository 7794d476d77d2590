"""A model file as ComfyUI loads it: its own detection, its own network and its own layers.

ComfyUI makes the network of shapes alone, as far as it can; weights are read afterwards, unit by unit.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tacod.checkpoint import Checkpoint
from tacod.checkpoint.safetensors import read_safetensors
from tacod.rank.comfyui.contents import BESIDE, ON_HOST, Contents
from tacod.rank.comfyui.installation import Installation, quiet
from tacod.rank.comfyui.network import Network
from tacod.rank.comfyui.tables import keeps_together, table_of
from tacod.rank.comfyui.units import find_units, sizes_of_units
from tacod.rank.ops.packed.float8 import FLOAT8_DTYPES
from tacod.rank.weights.placement import Sizes
from tacod.rank.weights.reader import FILE_DTYPES, Reader, as_tensor, changed
from tacod.rank.weights.remap import some
from tacod.rank.weights.streaming import Streaming
from tacod_client.errors import ModelCorrupt, ModelUnsupported

__all__ = ["load_network", "plan_weights"]

_FEW = 4
"""Tensors of so few numbers are scales, which ComfyUI may look at too."""
_REFUSED = {
    **dict.fromkeys(("UNetModel", "StageB", "StageC"), "is no diffusion transformer: use ComfyUI's own loader"),
    **dict.fromkeys(("RTv4", "SAM3Model", "DepthAnything3Net"), "is no diffusion model"),
    "CausalWanModel": "keeps keys and values from frame to frame, and ranks keep nothing between forwards",
}
"""Networks of ComfyUI's that ranks don't run, by their classes' names, and why."""


class _NotMade(ModelUnsupported):
    """ComfyUI can't make a network of what it was given."""


log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Found:
    """What ComfyUI's detection says of a file."""

    config: Any
    """ComfyUI's ``model_config``."""
    tensors: dict[str, Tensor]
    """The diffusion model's, by the file's names without a prefix; what isn't read yet is on the device meta."""
    file: Checkpoint
    """The file, under its own names."""
    names: dict[int, str]
    """The file's names of tensors that aren't read yet, by the ``id`` of each in ``tensors``."""


def _find(installation: Installation, checkpoint: Checkpoint, refusal: str, *, whole: bool = False) -> _Found:
    """Have ComfyUI detect what a file holds.

    Args:
        installation: The ComfyUI.
        checkpoint: The file; only its path and identity are looked at, for ComfyUI has names of its own for all else.
        refusal: Why no family here runs it.
        whole: Whether to read all of the file into the host's memory, and not only what says how to read the others.

    Raises `ModelUnsupported` if ComfyUI doesn't know the file either, or ranks can't run it; `ModelCorrupt` if the file
    has changed or is cut short.
    """
    path = checkpoint.path
    if checkpoint.diffusers or not path.lower().endswith((".safetensors", ".sft")):
        raise ModelUnsupported(f"{refusal}. Of ComfyUI's networks tacod loads .safetensors files alone")
    detection, utils = (installation.module(name) for name in ("comfy.model_detection", "comfy.utils"))
    header = read_safetensors(path)
    unknown = sorted({entry.info.dtype for entry in header.entries.values()} - FILE_DTYPES.keys())
    if unknown:
        raise ModelUnsupported(f"{refusal}. For ComfyUI's networks tacod doesn't read {', '.join(unknown)}")
    raw = Checkpoint(
        path,
        {name: entry.info for name, entry in header.entries.items()},
        prefix="",
        config=None,
        identity=checkpoint.identity,
        files=(header.file,),
        parts={name: (entry.part,) for name, entry in header.entries.items()},
    )
    if checkpoint.files and checkpoint.files[0] != header.file:
        raise changed(path)
    # Its detection looks at names and shapes: only what it knows is read.
    empty = {
        name: torch.empty(info.shape, dtype=FILE_DTYPES[info.dtype], device="meta")
        for name, info in raw.tensors.items()
    }
    prefix = detection.unet_prefix_from_state_dict(empty)
    names = [name for name in empty if name.startswith((prefix, BESIDE))]
    if all(name.startswith(BESIDE) for name in names):
        names = list(empty)
    prefix = prefix if any(name.startswith(prefix) for name in names) else ""
    said = dict(checkpoint.config or {})
    models = getattr(installation.module("comfy.supported_models"), "models", ())
    if said.get("image_model") not in {each.unet_config.get("image_model") for each in models}:
        # It may be a name that only this version knows.
        said.pop("image_model", None)
    refused = ModelUnsupported(f"{refusal}. The ComfyUI at {installation.path} doesn't know it either; a later one may")
    if _detect(installation, {name.removeprefix(prefix): empty[name] for name in names}, header.texts, said) is None:
        raise refused
    read = [name for name in names if whole or _is_read_at_once(name, empty[name])]
    with Reader(raw, torch.device("cpu")) as reader:
        known = {name: as_tensor(raw, name, data) for name, data in zip(read, reader.read(read), strict=True)}
        reader.check()
    bare = {name.removeprefix(prefix): known.get(name, empty[name]) for name in names}
    try:
        with quiet():
            bare, texts = utils.convert_old_quants(bare, "", metadata=dict(header.texts))
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ModelCorrupt(f"{path}: what it says of its quantized layers can't be read ({error})") from None
    config = _detect(installation, bare, texts, said)
    if config is None:
        raise refused
    return _Found(config, bare, raw, {id(empty[name]): name for name in names if name not in known})


def _made_of(installation: Installation, found: _Found, dtype: torch.dtype) -> tuple[Network, Contents]:
    """The network without weights and without a split, and what fills it.

    Weights will be in the compute ``dtype``, those that the file has in 8 bits as ComfyUI keeps them, and those that
    the network itself wants in a dtype of their own in that.

    Raises `ModelUnsupported` for a network that ranks don't run, `ModelCorrupt`, naming them, if weights lack;
    `_NotMade` if ComfyUI can't make it of this.
    """
    config, path = found.config, found.file.path
    packed = _packed_dtype(found.tensors) if config.quant_config is None else None
    config.set_inference_dtype(packed or dtype, None if packed is None else dtype)
    if config.quant_config is not None:
        # It makes layers for numbers of this dtype beside the packed ones.
        config.set_inference_dtype(dtype, dtype)
    try:
        with quiet():
            # On the host, where memory that nothing is written to costs nothing; buffers are computed here.
            network = config.get_model(dict(found.tensors), "").diffusion_model
            contents = Contents(config.process_unet_state_dict, found.tensors, found.file, found.names)
    except Exception as error:  # whatever a network raises for a configuration that it can't be made of
        raise _NotMade(f"{path}: ComfyUI can't make its network: {type(error).__name__}: {error}") from error
    kind = type(network).__name__
    if kind in _REFUSED:
        raise ModelUnsupported(f"{path}: ComfyUI's {kind} {_REFUSED[kind]}")
    contents.cast_to({name: each.dtype for name, each in network.named_parameters()})
    with quiet():
        try:
            missing, unexpected = network.load_state_dict(contents.empty, strict=False, assign=True)
        except RuntimeError as error:
            if found.names and "meta" in str(error):
                raise _NotMade(f"{path}: ComfyUI's {kind} can't be filled: {error}") from None
            raise ModelCorrupt(f"{path} doesn't fit ComfyUI's {kind}: {error}; download it again") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelCorrupt(f"{path}: ComfyUI's {kind} can't be filled ({error}); download it again") from None
    if missing:
        raise ModelCorrupt(f"{path} lacks {some(missing)}, which ComfyUI's {kind} needs; download it again")
    if unexpected:
        # As in ComfyUI, which says so in its log too.
        log.warning("%s: ComfyUI's %s doesn't use %s", path, kind, some(unexpected))
    network.eval().requires_grad_(False)
    made = Network(
        network,
        dtype,
        installation.version,
        contents.renamed,
        find_units(network),
        table_of(network),
        installation.module("comfy.utils").string_to_seed,
        keeps_together(network),
    )
    made.eval().requires_grad_(False)
    return made, contents


def load_network(
    installation: Installation,
    checkpoint: Checkpoint,
    refusal: str,
    dtype: torch.dtype,
    device: torch.device,
    streaming: Streaming,
    progress: Callable[[int, int], None],
) -> Network:
    """A file's network, filled, and without a split yet.

    Args:
        installation: The ComfyUI.
        checkpoint: The file.
        refusal: Why no family here runs it.
        dtype: The compute dtype.
        device: Where weights go.
        streaming: Stores units that don't stay whole on each rank.
        progress: Hears how many bytes of how many are read.

    Raises `ModelUnsupported`, `ModelCorrupt` and `OutOfMemory`.
    """
    network, contents = _make(installation, checkpoint, refusal, dtype)
    contents.fill(network, device, streaming, progress)
    return network


def plan_weights(
    installation: Installation, checkpoint: Checkpoint, refusal: str, dtype: torch.dtype
) -> tuple[Network, Sizes]:
    """A file's network without weights, and how many bytes these would be; raises what `load_network` does."""
    network, _ = _make(installation, checkpoint, refusal, dtype)
    return network, sizes_of_units(network.inner, network.blocks_at)


def _make(
    installation: Installation, checkpoint: Checkpoint, refusal: str, dtype: torch.dtype
) -> tuple[Network, Contents]:
    """`_made_of` of shapes alone, or of the whole file if ComfyUI can't make it of these."""
    try:
        return _made_of(installation, _find(installation, checkpoint, refusal), dtype)
    except _NotMade as error:
        log.info("ComfyUI is given all weights at once, and not shapes alone: %s", error.message)
    return _made_of(installation, _find(installation, checkpoint, refusal, whole=True), dtype)


def _detect(
    installation: Installation, tensors: Mapping[str, Tensor], texts: Mapping[str, str], said: Mapping[str, Any]
) -> Any:
    """ComfyUI's ``model_config``, with what the file says of itself in place of what its shapes tell; or None."""
    detection = installation.module("comfy.model_detection")
    try:
        with quiet():
            config = detection.detect_unet_config(tensors, "", metadata=texts)
            if config is None:
                return None
            config = detection.model_config_from_unet_config({**config, **said}, tensors, "")
            if config is not None:
                # Some models have settings that go before those of the file.
                config.unet_config.update(said)
            quantization = installation.module("comfy.utils").detect_layer_quantization(tensors, "")
            if config is not None and quantization:
                config.quant_config = quantization
    except Exception as error:  # its detection looks into what isn't there in a file that it doesn't know
        log.info("ComfyUI's detection ended with %s: %s", type(error).__name__, error)
        return None
    if config is not None and "model_channels" in config.unet_config and "image_model" not in config.unet_config:
        return None
    return config


def _is_read_at_once(name: str, tensor: Tensor) -> bool:
    """Whether ComfyUI looks at a tensor's numbers while it makes a network."""
    return name.startswith(BESIDE) or name.rpartition(".")[2] in ON_HOST or tensor.numel() <= _FEW


def _packed_dtype(state: Mapping[str, Tensor]) -> torch.dtype | None:
    """The dtype of 8 bits that most of a file's numbers are in without scales; None if they are in another one."""
    counts: dict[torch.dtype, int] = {}
    for tensor in state.values():
        counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.numel()
    most = max(counts, key=counts.__getitem__)
    return most if most in FLOAT8_DTYPES.values() else None

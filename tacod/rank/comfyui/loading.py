"""A model file as ComfyUI loads it: its own detection, its own network, its own layers, filled from the file."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tacod.checkpoint import Checkpoint
from tacod.checkpoint.safetensors import read_safetensors
from tacod.rank.comfyui.installation import Installation, quiet
from tacod.rank.comfyui.network import Network
from tacod.rank.comfyui.tables import keeps_together, table_of
from tacod.rank.ops.packed.float8 import FLOAT8_DTYPES
from tacod.rank.weights.reader import Reader, changed
from tacod.rank.weights.remap import some
from tacod_client.errors import ModelCorrupt, ModelUnsupported

__all__ = ["Found", "find_network", "load_network"]

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    **FLOAT8_DTYPES,
    "F8_E8M0": torch.float8_e8m0fnu,
}
"""Torch's dtypes by safetensors' names for them."""
_ON_HOST = ("comfy_quant", "scaled_fp8")
"""Last names of tensors that ComfyUI reads as text and numbers while it loads."""
_BESIDE = "conditioner.conditioners."
"""The beginning of names of tensors that ComfyUI makes a model of, beside its network."""
_REFUSED = {
    **dict.fromkeys(("UNetModel", "StageB", "StageC"), "is no diffusion transformer: use ComfyUI's own loader"),
    **dict.fromkeys(("RTv4", "SAM3Model", "DepthAnything3Net"), "is no diffusion model"),
    "CausalWanModel": "keeps keys and values from frame to frame, and ranks keep nothing between forwards",
}
"""Networks of ComfyUI's that ranks don't run, by their classes' names, and why."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """What ComfyUI's detection says of a file."""

    config: Any
    """ComfyUI's ``model_config``."""
    tensors: dict[str, Tensor]
    """The diffusion model's, by the file's names without a prefix."""


def find_network(
    installation: Installation,
    checkpoint: Checkpoint,
    refusal: str,
    device: torch.device,
    reserve: Callable[[int], None],
    progress: Callable[[int, int], None],
) -> Found:
    """Have ComfyUI detect what a file holds, and read it onto the device.

    Args:
        installation: The ComfyUI.
        checkpoint: The file; only its path and identity are looked at, for ComfyUI has names of its own for all else.
        refusal: Why no family here runs it.
        device: Where tensors go.
        reserve: Hears how many bytes these will take, before any is read, and raises if there is no room.
        progress: Hears how many bytes of how many are read.

    Raises `ModelUnsupported` if ComfyUI doesn't know the file either, or ranks can't run it; `ModelCorrupt` if the file
    has changed or is cut short.
    """
    path = checkpoint.path
    if checkpoint.diffusers or not path.lower().endswith((".safetensors", ".sft")):
        raise ModelUnsupported(f"{refusal}. Of ComfyUI's networks tacod loads .safetensors files alone")
    detection, utils = (installation.module(name) for name in ("comfy.model_detection", "comfy.utils"))
    header = read_safetensors(path)
    unknown = sorted({entry.info.dtype for entry in header.entries.values()} - _DTYPES.keys())
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
        name: torch.empty(info.shape, dtype=_DTYPES[info.dtype], device="meta") for name, info in raw.tensors.items()
    }
    prefix = detection.unet_prefix_from_state_dict(empty)
    names = [name for name in empty if name.startswith((prefix, _BESIDE))]
    if all(name.startswith(_BESIDE) for name in names):
        names = list(empty)
    prefix = prefix if any(name.startswith(prefix) for name in names) else ""
    said = dict(checkpoint.config or {})
    models = getattr(installation.module("comfy.supported_models"), "models", ())
    if said.get("image_model") not in {each.unet_config.get("image_model") for each in models}:
        # It may be a name that only this version knows.
        said.pop("image_model", None)
    refused = ModelUnsupported(f"{refusal}. The ComfyUI at {installation.path} doesn't know it either")
    if _detect(installation, {name.removeprefix(prefix): empty[name] for name in names}, header.texts, said) is None:
        raise refused
    total = sum(part.stop - part.start for name in names for part in raw.parts[name])
    reserve(total)
    tensors = _read(raw, names, device, total, progress)
    bare = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    try:
        with quiet():
            bare, texts = utils.convert_old_quants(bare, "", metadata=dict(header.texts))
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ModelCorrupt(f"{path}: what it says of its quantized layers can't be read ({error})") from None
    config = _detect(installation, bare, texts, said)
    if config is None:
        raise refused
    return Found(config, bare)


def load_network(
    installation: Installation, found: Found, path: str, dtype: torch.dtype, device: torch.device
) -> Network:
    """The network, filled and without a split yet; ``found.tensors`` is empty afterwards.

    Weights are in the compute ``dtype``, those that the file has in 8 bits as ComfyUI keeps them, and those that the
    network itself wants in a dtype of their own in that.

    Raises `ModelUnsupported` for a network that ranks don't run, `ModelCorrupt`, naming them, if weights lack.
    """
    config, state = found.config, found.tensors
    packed = _packed_dtype(state) if config.quant_config is None else None
    config.set_inference_dtype(packed or dtype, None if packed is None else dtype)
    if config.quant_config is not None:
        # It makes layers for numbers of this dtype beside the packed ones.
        config.set_inference_dtype(dtype, dtype)
    try:
        with quiet():
            # On the host, where memory that nothing is written to costs nothing; buffers are computed here.
            network = config.get_model(state, "").diffusion_model
            renamed = config.process_unet_state_dict(dict(state))
    except Exception as error:  # whatever a network raises for a configuration that it can't be made of
        raise ModelUnsupported(f"{path}: ComfyUI can't make its network: {type(error).__name__}: {error}") from error
    kind = type(network).__name__
    if kind in _REFUSED:
        raise ModelUnsupported(f"{path}: ComfyUI's {kind} {_REFUSED[kind]}")
    renamed = {name: each for name, each in renamed.items() if not name.startswith(_BESIDE)}
    theirs = {id(tensor): name for name, tensor in state.items()}
    names = {theirs[id(each)]: name for name, each in renamed.items() if theirs.get(id(each), name) != name}
    state.clear()
    own = dict(network.named_parameters())
    for name, tensor in renamed.items():
        if name in own and tensor.is_floating_point() and own[name].dtype != tensor.dtype:
            renamed[name] = tensor.to(own[name].dtype)
    with quiet():
        try:
            missing, unexpected = network.load_state_dict(renamed, strict=False, assign=True)
        except RuntimeError as error:
            raise ModelCorrupt(f"{path} doesn't fit ComfyUI's {kind}: {error}; download it again") from None
    if missing:
        raise ModelCorrupt(f"{path} lacks {some(missing)}, which ComfyUI's {kind} needs; download it again")
    if unexpected:
        # As in ComfyUI, which says so in its log too.
        log.warning("%s: ComfyUI's %s doesn't use %s", path, kind, some(unexpected))
    network.to(device)
    network.eval().requires_grad_(False)
    made = Network(
        network,
        dtype,
        installation.version,
        names,
        table_of(network),
        installation.module("comfy.utils").string_to_seed,
        keeps_together(network),
    )
    made.eval().requires_grad_(False)
    return made


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


def _read(
    raw: Checkpoint, names: list[str], device: torch.device, total: int, progress: Callable[[int, int], None]
) -> dict[str, Tensor]:
    """The tensors of these names on the device, but for those that ComfyUI reads on the host."""
    on_host = [name for name in names if name.rpartition(".")[2] in _ON_HOST]
    others = [name for name in names if name not in on_host]
    tensors: dict[str, Tensor] = {}
    done = 0
    for where, mine in ((torch.device("cpu"), on_host), (device, others)):
        with Reader(raw, where) as reader:
            for name, data in zip(mine, reader.read(mine), strict=True):
                info = raw.tensors[name]
                tensors[name] = data.view(_DTYPES[info.dtype]).reshape(info.shape)
                done += data.nbytes
                progress(done, total)
            reader.check()
    return {name: tensors[name] for name in names}


def _packed_dtype(state: Mapping[str, Tensor]) -> torch.dtype | None:
    """The dtype of 8 bits that most of a file's numbers are in without scales; None if they are in another one."""
    counts: dict[torch.dtype, int] = {}
    for tensor in state.values():
        counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.numel()
    most = max(counts, key=counts.__getitem__)
    return most if most in FLOAT8_DTYPES.values() else None

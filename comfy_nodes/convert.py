"""From a MODEL, or from a file, to a MODEL whose network is in the daemon."""

from __future__ import annotations

import logging
import os
import weakref
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import torch
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher
from safetensors import SafetensorError

from tacod_client import Client, Model

from . import hooks
from .clients import client_of
from .dit import RemoteDiT, refuse_weight_only
from .errors import Failed, Refused, errors_explained
from .names import Names, layers_in_file, names_in_file, read_header
from .network import Network, skeleton_layers
from .origin import origin_of
from .patches import to_request
from .remote import DTYPES, Progress, Remote
from .shell import RemotePatcher, carry_over, check_honourable, check_untouched, make_shell, release
from .source import GGUF_TYPE, Source, state_of

__all__ = ["Converted", "Settings", "convert", "open_file"]

log = logging.getLogger(__name__)

_STATEFUL = {"CausalWanModel": "it keeps keys and values from frame to frame, and the daemon's forwards keep nothing"}
"""Networks that aren't functions of their inputs, by their classes' names, and why."""
_NO_DIT = "it is no diffusion transformer; UNets (SD 1.5, SDXL) run in ComfyUI itself"


@dataclass(frozen=True)
class Settings:
    """What a loader node was set to."""

    auto_detect: bool
    sequence_parallel_degree: int
    cfg_parallel: bool
    use_flash_attention: bool
    endpoint: str

    @property
    def plan(self) -> Any:
        """What is asked of the daemon's planner."""
        asked: dict[str, Any] = {}
        if not self.auto_detect:
            asked |= {"sequence_parallel_degree": self.sequence_parallel_degree, "cfg_parallel": self.cfg_parallel}
        if not self.use_flash_attention:
            asked["flash_attention"] = False
        return asked or "auto"


@dataclass(frozen=True)
class Converted:
    """A MODEL in the daemon, and what there is to tell about it."""

    patcher: ModelPatcher
    network: RemoteDiT
    model: Model
    client: Client


def convert(
    model: ModelPatcher,
    settings: Settings,
    graph: Any = None,
    node: str | None = None,
    progress: Progress | None = None,
) -> Converted:
    """A MODEL like this one, with all that has been put on it, whose network is in the daemon.

    Raises `Refused` for a model or a patch that the daemon can't honour, `NotAvailable` without a daemon, `Failed` with
    the daemon's reason.
    """
    base = model.model
    if isinstance(getattr(base, "diffusion_model", None), RemoteDiT):
        raise Refused("a second TACO-DiT Model Loader", "the MODEL has gone through one; take this one off")
    config = getattr(getattr(base, "model_config", None), "unet_config", None)
    if not isinstance(config, dict) or _is_unet(config):
        raise Refused(f"a {type(base).__name__}", _NO_DIT)
    check_honourable(model)
    check_untouched(base.diffusion_model)
    # ComfyUI leaves what a clone has put on the model they share until the next one is loaded: it is not this MODEL's.
    release(model)
    state = state_of(model)
    origin = origin_of(model, state, graph, node)
    path, names = origin or (None, Names())
    source = Source(
        name=os.path.basename(path) if path else f"a {type(base).__name__} without a file",
        path=path,
        names=names,
        config=config,
        layers=state.layers,
        model=weakref.ref(model),
    )
    if model.force_cast_weights:
        refuse_weight_only(source)
    patches = to_request(model.patches, names)
    not_sizes = ("disable_unet_model_creation", "dtype", "device", "operations")
    sizes = {key: value for key, value in config.items() if key not in not_sizes}
    skeleton = type(base.diffusion_model)(**sizes, device="meta", operations=skeleton_layers())
    # On a GPU ComfyUI has chosen what this model computes in; on a CPU that says nothing of the daemon's devices.
    stock = base.manual_cast_dtype or base.get_dtype()
    dtype = DTYPES.get(stock) if comfy.model_management.get_torch_device().type != "cpu" else None
    converted = _connect(base, skeleton, source, settings, patches, dtype, model.load_device, progress)
    if any(getattr(each, GGUF_TYPE, None) is not None and each.dtype == torch.uint8 for each in state.values()):
        _note_dequantization(base, converted.network.remote)
    fast = hooks.find("comfy.ops.fp8_ops.Linear")
    if fast is not None and any(isinstance(module, fast) for module in base.diffusion_model.modules()):
        converted.network.remote.remark = (
            "the daemon leaves the inputs of fp8 weights as they are, and ComfyUI was told to round them to fp8 "
            "(fp8_e4m3fn_fast in Load Diffusion Model, --fast fp8_matrix_mult)"
        )
    if model.additional_models.get("multigpu"):
        log.warning("TACO-DiT: MultiGPU CFG Split has no effect: the daemon runs the model, on its own GPUs")
    carry_over(model, converted.patcher)
    # There is nothing to cast here.
    converted.patcher.force_cast_weights = False
    return converted


def _note_dequantization(base: BaseModel, remote: Remote) -> None:
    """Say where ComfyUI-GGUF makes other numbers of the file's blocks than the daemon does."""
    layer = getattr(getattr(base.model_config, "custom_operations", None), "Linear", None)
    dtype = getattr(layer, "dequant_dtype", None)
    if dtype != torch.float32:
        named = "the compute dtype" if dtype == "target" else str(dtype or torch.float16).removeprefix("torch.")
        remote.remark = (
            f"the daemon dequantizes GGUF weights in fp32, and ComfyUI-GGUF's loader in {named}; weights differ by up "
            "to 5e-4 of their size. For the same numbers set dequant_dtype to float32 in Unet Loader (GGUF/Advanced)"
        )


def open_file(path: str, settings: Settings, progress: Progress | None = None) -> Converted:
    """A MODEL from a file's header; its weights are never read here.

    Raises as `convert` does.
    """
    try:
        with errors_explained():
            header = read_header(path)
    except SafetensorError as error:
        raise Failed(f"TACO-DiT: {path} can't be read ({error}); download it again") from error
    state = header.bare
    detect = hooks.find("comfy.model_detection.model_config_from_unet")
    config = detect(state, "", metadata=header.metadata)
    if config is None:
        convert_diffusers = hooks.find("comfy.model_detection.convert_diffusers_mmdit")
        converted = convert_diffusers(state, "") if convert_diffusers is not None else None
        config = converted and detect(converted, "")
        state = converted
    if not config or _is_unet(config.unet_config):
        raise Refused(os.path.basename(path), _NO_DIT)
    config.set_inference_dtype(torch.float32, None)
    config.custom_operations = skeleton_layers()
    base = config.get_model(state, "", device="meta")
    names = names_in_file(header, config)
    layers = layers_in_file(header, names)
    source = Source(os.path.basename(path), os.path.realpath(path), names, config.unet_config, layers)
    device = comfy.model_management.get_torch_device()
    dtype = _usual_dtype(config, state, bool(layers))
    return _connect(base, base.diffusion_model, source, settings, [], dtype, device, progress)


def _connect(
    base: BaseModel,
    skeleton: torch.nn.Module,
    source: Source,
    settings: Settings,
    patches: list[dict[str, Any]],
    dtype: str | None,
    device: torch.device,
    progress: Progress | None,
) -> Converted:
    kind = type(skeleton).__name__
    if kind in _STATEFUL:
        raise Refused(kind, _STATEFUL[kind])
    client = client_of(settings.endpoint)
    remote = Remote(client, source, settings.plan)
    with errors_explained():
        model = remote.load(patches, dtype, progress)
    compute = next(ours for ours, name in DTYPES.items() if name == model.dtype)
    network = RemoteDiT(Network(skeleton), remote, compute)
    shell = make_shell(base, network)
    offload = comfy.model_management.unet_offload_device()
    # Size 1: ComfyUI would otherwise count the meta tensors of the state dict.
    patcher = RemotePatcher(shell, load_device=device, offload_device=offload, size=1)
    return Converted(patcher, network, model, client)


def _usual_dtype(config: Any, state: dict[str, torch.Tensor], quantized: bool) -> str | None:
    """What ComfyUI would compute these weights in; None on a CPU, where that says nothing of the daemon's devices.

    With quantized layers that is what its card is fastest in, whatever the other weights are stored in.
    """
    device = comfy.model_management.get_torch_device()
    if device.type == "cpu":
        return None
    supported = config.supported_inference_dtypes
    parameters = hooks.find("comfy.utils.calculate_parameters")(state)
    stored = None if quantized else hooks.find("comfy.utils.weight_dtype")(state)
    choose = hooks.find("comfy.model_management.unet_dtype")
    kept = choose(model_params=parameters, supported_dtypes=supported, weight_dtype=stored)
    cast = hooks.find("comfy.model_management.unet_manual_cast")(None if quantized else kept, device, supported)
    return DTYPES.get(cast or kept)


def _is_unet(config: dict[str, Any]) -> bool:
    return "model_channels" in config and "image_model" not in config

"""A MODEL whose network is in the daemon: all of ComfyUI's own around it, and a few KB of memory."""

from __future__ import annotations

import copy
import functools
import weakref
from typing import Any

import torch
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher

from . import hooks
from .dit import RemoteDiT, remote_of
from .errors import Refused
from .patches import PREFIX

__all__ = [
    "RemotePatcher",
    "carry_over",
    "check_honourable",
    "check_untouched",
    "make_shell",
    "refuse_bypass",
    "release",
]

_LOADED_STATE = (
    "model_loaded_weight_memory",
    "lowvram_patch_counter",
    "model_lowvram",
    "current_weight_patches_uuid",
    "model_offload_buffer_memory",
    "dynamic_vbars",
    "dynamic_pins",
    "dynamic_patchers",
)
"""What ComfyUI's memory manager notes on a model; the names differ by version."""
_CARRIED = (
    "patches",
    "object_patches",
    "weight_wrapper_patches",
    "wrappers",
    "callbacks",
    "attachments",
    "additional_models",
    "hook_patches",
    "injections",
)
_INTO_BLOCKS = {"set_model_options_patch_replace", "set_model_patch_replace", "patches_replace"}
_COMPILED = "torch.compile"
_GUARDED = "taco_dit_guarded"
_BEFORE = "do that before the TACO-DiT Model Loader and save the result with ModelSave, then load that file"


class RemotePatcher(ModelPatcher):
    """A patcher whose weights are elsewhere: patches of them are noted and sent, what needs them here is refused."""

    def add_object_patch(self, name: str, obj: Any) -> None:
        """See ComfyUI's; a part of the network can't be replaced."""
        _check_object_patch(name, obj)
        super().add_object_patch(name, obj)

    def add_weight_wrapper(self, name: str, function: Any) -> None:
        """Refused."""
        raise Refused(f"a weight wrapper on {name}", "it is code that needs the weights here; take that node off")

    def get_key_patches(self, filter_prefix: str | None = None) -> Any:
        """Refused: merging, saving and extracting read the weights."""
        raise Refused("a read of the model's weights (ModelMerge, ModelSave, LoRA extraction)", _BEFORE)

    def model_dtype(self) -> torch.dtype:
        """See ComfyUI's; on a CPU (Select Model Device) fp32: nothing is cast for it."""
        return torch.float32 if self.load_device.type == "cpu" else super().model_dtype()

    def deepclone_multigpu(self, *args: Any, **kwargs: Any) -> Any:
        """Refused."""
        raise Refused(
            "a copy of the model on another GPU of ComfyUI's (MultiGPU CFG Split, Select Model Device)",
            "the network runs in the daemon, on all of its GPUs (group.gpus); take that node off",
        )

    def pre_run(self) -> None:
        """See ComfyUI's; this is before the first step, so what can't be honoured is refused here."""
        check_honourable(self)
        super().pre_run()
        network = remote_of(self)
        if network is not None:
            network.begin()

    def partially_load(self, *args: Any, **kwargs: Any) -> Any:
        """See ComfyUI's; from now on the network computes with these patches, also outside of a run."""
        loaded = super().partially_load(*args, **kwargs)
        network = remote_of(self)
        if network is not None:
            network.loaded = weakref.ref(self)
        return loaded

    def patch_hooks(self, hooks: Any) -> None:
        """Note which hooks' patches apply; the network sends them with its next call."""
        self.current_hooks = hooks


def check_honourable(model: ModelPatcher) -> None:
    """Raise `Refused` for what is on a MODEL and can't be honoured by the daemon, by its name.

    Some functions around the sampler put code into the blocks in the midst of a run (skip layer guidance does); they
    are known by what they call.
    """
    for name, functions in model.model_options.items():
        for function in functions if isinstance(functions, list) else [functions]:
            code = getattr(function, "__code__", None)
            if code is not None and not _INTO_BLOCKS.isdisjoint((*code.co_names, *code.co_consts)):
                raise Refused(
                    f"{function.__qualname__} ({name})",
                    "it puts code into the blocks, which run in the daemon; take that node off",
                )
    for name, obj in model.object_patches.items():
        _check_object_patch(name, obj)
    for name in getattr(model, "weight_wrapper_patches", {}):
        raise Refused(f"a weight wrapper on {name}", "it is code that needs the weights here; take that node off")
    for name in getattr(model, "injections", {}):
        raise Refused(
            f"the injection {name!r}",
            "it changes the network here; take that node off, or for a LoRA use Load LoRA: the daemon merges it",
        )


def check_untouched(network: torch.nn.Module) -> None:
    """Raise `Refused` for code that was put into a network in place: the daemon's has none of it."""
    for name, module in network.named_modules():
        where = f"diffusion_model.{name}".rstrip(".")
        if module._forward_hooks or module._forward_pre_hooks:
            raise Refused(f"a hook on {where}", "it is code that runs in the network; take off what put it there")
        for attribute, value in vars(module).items():
            if attribute != "_compiled_call_impl" and callable(value) and hasattr(type(module), attribute):
                raise Refused(
                    f"a replacement of {where}.{attribute}",
                    "it is code that runs in the network; take off what put it there",
                )


def _check_object_patch(name: str, obj: Any) -> None:
    # torch.compile around the whole network changes nothing in its results.
    compiled = name == "diffusion_model" and isinstance(getattr(obj, "_orig_mod", None), RemoteDiT)
    if name.startswith(PREFIX.rstrip(".")) and not compiled:
        raise Refused(f"a replacement of {name}", "the network is in the daemon; take that node off")


def make_shell(base: BaseModel, network: RemoteDiT) -> BaseModel:
    """``base`` with another network: its class, sampling, latent format and conditioning, and none of its weights.

    A model of its own: an object patch would show on all clones of the MODEL that came in.
    """
    kind = type(base)
    shell: BaseModel = object.__new__(_saveless(kind))
    state = {name: value for name, value in vars(base).items() if name not in _LOADED_STATE}
    for registry in ("_parameters", "_buffers", "_modules"):
        state[registry] = copy.copy(state[registry])
    vars(shell).update(state)
    shell._modules["diffusion_model"] = network
    shell.device = None
    shell.current_patcher = None
    shell.manual_cast_dtype = None
    # The work is elsewhere: ComfyUI shall neither free memory for it here, nor split batches for want of it.
    shell.memory_usage_factor = 0
    network.shell = weakref.ref(shell)
    return shell


_saveless_kinds: dict[type[BaseModel], type[BaseModel]] = {}


def _saveless(kind: type[BaseModel]) -> type[BaseModel]:
    """The same class, but it refuses to be saved, for it has no weights to save, and to get another network."""

    def state_dict_for_saving(self: BaseModel, *args: Any, **kwargs: Any) -> Any:
        raise Refused(
            "saving the model (ModelSave, CheckpointSave)", "its weights are in the daemon; save the original"
        )

    def set_attribute(self: BaseModel, name: str, value: Any) -> None:
        if name == "diffusion_model" and not isinstance(getattr(value, "_orig_mod", value), RemoteDiT):
            raise Refused("a replacement of diffusion_model", "the network is in the daemon; take off what replaces it")
        kind.__setattr__(self, name, value)

    if kind not in _saveless_kinds:
        own = {"state_dict_for_saving": state_dict_for_saving, "__setattr__": set_attribute}
        _saveless_kinds[kind] = type(kind.__name__, (kind,), own)
    return _saveless_kinds[kind]


def carry_over(source: ModelPatcher, target: ModelPatcher) -> ModelPatcher:
    """Put on ``target`` all that has been put on ``source``: patches, options, wrappers, hooks."""
    clone = source.clone()
    for name in _CARRIED:
        if hasattr(clone, name):
            setattr(target, name, getattr(clone, name))
    # Copies of the network on other devices of this process: there are none of ours.
    target.additional_models.pop("multigpu", None)
    target.model_options = clone.model_options
    target.patches_uuid = clone.patches_uuid
    target.force_cast_weights = target.force_cast_weights or clone.force_cast_weights
    # ComfyUI's own wrapper puts the network that it has compiled in the place of the one that is there.
    kind = hooks.find("comfy.patcher_extension.WrappersMP.APPLY_MODEL")
    if kind is not None:
        target.remove_wrappers_with_key(kind, _COMPILED)
    return target


def refuse_bypass() -> None:
    """Have LoRAs in bypass mode refused for a network that is in the daemon.

    They are code around its layers, and ComfyUI leaves out a layer that it can't find.
    """
    manager = hooks.find("comfy.weight_adapter.BypassInjectionManager")
    original = getattr(manager, "create_injections", None)
    if original is None or hasattr(original, _GUARDED):
        return

    @functools.wraps(original)
    def guarded(self: Any, model: BaseModel, *args: Any, **kwargs: Any) -> Any:
        if isinstance(getattr(model, "diffusion_model", None), RemoteDiT):
            raise Refused("a LoRA in bypass mode", "its layers are in the daemon; use Load LoRA: the daemon merges it")
        return original(self, model, *args, **kwargs)

    setattr(guarded, _GUARDED, True)
    manager.create_injections = guarded


def release(model: ModelPatcher) -> None:
    """Take a model's weights off the GPU, if ComfyUI put them there when it loaded the file."""
    loaded = hooks.find("comfy.model_management.current_loaded_models")
    empty_cache = hooks.find("comfy.model_management.soft_empty_cache")
    if loaded is None or empty_cache is None:
        return
    for each in [each for each in loaded if each.model is not None and model.is_clone(each.model)]:
        if each.model_unload():
            loaded.remove(each)
    empty_cache()

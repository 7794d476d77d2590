"""Every function and class of ComfyUI that the nodes call, replace or derive from; docs/comfyui.md says what for.

A version may lack one. As the nodes are imported each is looked for; what is missing is named on the console, with what
doesn't work without it, and the rest works. Looked up at each use, for other packs replace some of them.
"""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from types import ModuleType
from typing import Any

__all__ = ["HOOKS", "UNET_LOADER", "UPDATE", "Hook", "find", "have", "missing", "tell_missing"]

log = logging.getLogger(__name__)

UPDATE = "this ComfyUI lacks what it takes (see its console at start); update TACO-DiT, or take that node off"


@dataclass(frozen=True)
class Hook:
    """A function, class or attribute of ComfyUI's."""

    where: str
    """Module and names, with dots: ``comfy.sd.load_diffusion_model``."""
    without: str
    """What doesn't work where it is missing."""
    takes: tuple[str, ...] = ()
    """Parameters that are passed by name."""

    @property
    def essential(self) -> bool:
        """Whether there are no nodes without it."""
        return self.without == _NOTHING


_NOTHING = "nothing works"
_NOTED = "a MODEL's file is looked for in ComfyUI's notes, the memory map and the graph"
_UNET_LOADER = "there is no TACO-DiT UNET Loader"
_NAMES = "weights that ComfyUI renames are not found in their file, and are sent"
_WRAPPERS = "EasyCache and other wrappers around the network are refused"
_HOOKED = "hooks on the conditioning (LoRAs for a part of the steps) are refused"
_STEPS = "statistics have no steps"
_LATER = "what can't be honoured is refused at the first step, and not by the node that asks for it"
_SAVING = "merging or saving a MODEL of ours fails in ComfyUI's words"
_COMPILED = "torch.compile before the loader is not taken off"
_OUTSIDE = "LoRAs are left out where a node asks the network something outside of a run"
_RELEASE = "weights that ComfyUI has on its GPU stay there until it needs the room"

HOOKS = (
    Hook("comfy.model_base.BaseModel", _NOTHING),
    Hook("comfy.model_patcher.ModelPatcher", _NOTHING),
    Hook("comfy.ops.disable_weight_init", _NOTHING),
    Hook("comfy.model_management.get_torch_device", _NOTHING),
    Hook("comfy.model_management.unet_offload_device", _NOTHING),
    Hook("comfy.model_patcher.ModelPatcher.clone", _NOTHING),
    Hook("comfy.model_patcher.ModelPatcher.pre_run", _NOTHING),
    Hook("comfy.model_patcher.ModelPatcher.patch_hooks", _NOTHING),
    Hook("comfy.sd.load_diffusion_model", f"{_NOTED}; nothing runs here with enable_taco_dit off in the UNET Loader"),
    Hook("comfy.sd.load_checkpoint_guess_config", _NOTED),
    Hook("folder_paths.get_full_path", f"a MODEL's file is not looked for in the graph, and {_UNET_LOADER}"),
    Hook("comfy.supported_models_base.BASE.process_unet_state_dict", _NAMES),
    Hook("comfy.model_detection.unet_prefix_from_state_dict", "files with a prefix before their names are not found"),
    Hook("comfy.model_detection.model_config_from_unet", _UNET_LOADER, ("metadata",)),
    Hook("comfy.model_management.unet_dtype", _UNET_LOADER, ("model_params", "supported_dtypes", "weight_dtype")),
    Hook("comfy.model_management.unet_manual_cast", _UNET_LOADER),
    Hook("comfy.utils.calculate_parameters", _UNET_LOADER),
    Hook("comfy.utils.weight_dtype", _UNET_LOADER),
    Hook("folder_paths.get_filename_list", _UNET_LOADER),
    Hook("folder_paths.get_folder_paths", "TACO-DiT UNET Loader lists no .gguf files"),
    Hook("folder_paths.recursive_search", "TACO-DiT UNET Loader lists no .gguf files"),
    Hook("comfy.model_detection.convert_diffusers_mmdit", "TACO-DiT UNET Loader knows no files in diffusers' names"),
    Hook("nodes.KSampler", "there is no TACO-DiT KSampler"),
    Hook("comfy.patcher_extension.WrapperExecutor.new_class_executor", _WRAPPERS),
    Hook("comfy.patcher_extension.get_all_wrappers", _WRAPPERS),
    Hook("comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL", _WRAPPERS),
    Hook("comfy.patcher_extension.WrappersMP.APPLY_MODEL", _COMPILED),
    Hook("comfy.patcher_extension.WrappersMP.OUTER_SAMPLE", _STEPS),
    Hook("comfy.model_patcher.ModelPatcher.add_wrapper_with_key", _STEPS),
    Hook("comfy.model_patcher.ModelPatcher.get_combined_hook_patches", _HOOKED),
    Hook("comfy.model_patcher.ModelPatcher.partially_load", _OUTSIDE),
    Hook("comfy.model_patcher.ModelPatcher.add_object_patch", _LATER),
    Hook("comfy.model_patcher.ModelPatcher.add_weight_wrapper", _LATER),
    Hook("comfy.model_patcher.ModelPatcher.get_key_patches", _SAVING),
    Hook("comfy.model_base.BaseModel.state_dict_for_saving", _SAVING),
    Hook("comfy.model_patcher.ModelPatcher.remove_wrappers_with_key", _COMPILED),
    Hook("comfy.model_management.current_loaded_models", _RELEASE),
    Hook("comfy.model_management.soft_empty_cache", _RELEASE),
    Hook(
        "comfy.model_management.throw_exception_if_processing_interrupted",
        "Cancel is heard at the end of a step, not within it",
    ),
    Hook("comfy.utils.ProgressBar", "loading shows no bar", ("node_id",)),
    Hook("server.PromptServer.send_progress_text", "loading shows no text in the node's body"),
    Hook("server.PromptServer.instance.routes", "there is no TACO-DiT tab in the sidebar"),
    Hook("comfy_execution.utils.get_executing_context", "the sampler's body doesn't show how far a long step is"),
)


UNET_LOADER = tuple(hook.where for hook in HOOKS if hook.without.endswith(_UNET_LOADER))
"""What TACO-DiT UNET Loader can't be without."""


def find(where: str) -> Any:
    """What stands at a dotted path in ComfyUI; None if nothing does."""
    found: Any = None
    path = ""
    for name in where.split("."):
        path = f"{path}.{name}".lstrip(".")
        inner = getattr(found, name, None)
        if inner is None and (found is None or isinstance(found, ModuleType)):
            with suppress(ImportError):
                inner = importlib.import_module(path)
        if inner is None:
            return None
        found = inner
    return found


def missing() -> list[Hook]:
    """The hooks that this ComfyUI lacks, or that don't take what they are passed."""
    return [hook for hook in HOOKS if not _is_there(hook)]


def tell_missing() -> None:
    """Name on the console what this ComfyUI lacks, with what that disables.

    Raises `ImportError` if it is something without which there are no nodes.
    """
    lacking = missing()
    for hook in lacking:
        if hook.essential:
            raise ImportError(
                f"TACO-DiT not available: this ComfyUI has no {hook.where}; update TACO-DiT, or take a version of "
                "ComfyUI that its README names"
            )
    for hook in lacking:
        log.warning("TACO-DiT: this ComfyUI has no %s: %s. Update TACO-DiT", _described(hook), hook.without)


def have(wheres: Iterable[str]) -> bool:
    """Whether the hooks at these places are all there."""
    return not {hook.where for hook in missing()}.intersection(wheres)


def _is_there(hook: Hook) -> bool:
    found = find(hook.where)
    return found is not None and all(_takes(found, name) for name in hook.takes)


def _takes(found: Any, name: str) -> bool:
    """Whether a parameter can be passed by name; what another pack wrapped takes any, as far as can be told."""
    try:
        parameters = inspect.signature(found).parameters
    except (TypeError, ValueError):
        return True
    return name in parameters or any(each.kind is each.VAR_KEYWORD for each in parameters.values())


def _described(hook: Hook) -> str:
    return f"{hook.where}({', '.join(f'{name}=' for name in hook.takes)})" if hook.takes else hook.where

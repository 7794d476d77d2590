"""The nodes. V1 definitions: every version of ComfyUI loads them."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

from comfy.model_patcher import ModelPatcher

from tacod_client import __version__

from . import hooks
from .convert import Converted, Settings, convert, open_file
from .dit import RemoteDiT, remote_of
from .errors import Refused, errors_explained
from .listing import model_files
from .progress import say
from .record import Run, Totals
from .shell import carry_over
from .source import load_here
from .text import info_text, stats_text, success_text, version_text

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]

log = logging.getLogger(__name__)

CATEGORY = "TACO-DiT"
OFF = "taco_dit_off"
"""Marks a MODEL that went through a loader that was switched off."""

SETTINGS: dict[str, Any] = {
    "enable_taco_dit": (
        "BOOLEAN",
        {"default": True, "tooltip": "Run the model in the TACO-DiT daemon, on all of its GPUs. Off: run it here."},
    ),
    "auto_detect": (
        "BOOLEAN",
        {
            "default": True,
            "tooltip": "Let the daemon plan how each step is spread over its GPUs. Off: ask for what is set below.",
        },
    ),
    "sequence_parallel_degree": (
        "INT",
        {
            "default": 3,
            "min": 1,
            "max": 64,
            "tooltip": "GPUs that share an image's tokens. Used without auto_detect.",
        },
    ),
    "cfg_parallel": (
        "BOOLEAN",
        {
            "default": True,
            "tooltip": "Give the positive and the negative prompt to different GPUs; twice as many are needed. "
            "Used without auto_detect.",
        },
    ),
    "use_flash_attention": (
        "BOOLEAN",
        {"default": True, "tooltip": "Let the fastest attention kernel run. Off: the plain one, for comparison."},
    ),
}
ENDPOINT: dict[str, Any] = {
    "endpoint": (
        "STRING",
        {"default": "", "tooltip": "Where the daemon listens. Empty: TACOD_ENDPOINT, or the system's own."},
    ),
}
_WATCHING = ("comfy.patcher_extension.WrappersMP.OUTER_SAMPLE", "comfy.model_patcher.ModelPatcher.add_wrapper_with_key")
HIDDEN = {"graph": "DYNPROMPT", "node": "UNIQUE_ID"}


class _Loader:
    """What both loaders share: settings, outputs, and telling how far a load is."""

    CATEGORY = CATEGORY
    RETURN_TYPES = ("MODEL", "TACO_DIT_INFO")
    RETURN_NAMES = ("MODEL", "TACO_DIT_INFO")
    OUTPUT_TOOLTIPS = (
        "The model, for any sampler; its network runs in the daemon.",
        "What was loaded and how it is spread; for TACO-DiT Info Display.",
    )
    FUNCTION = "load"

    @staticmethod
    def report(node: str | None) -> Any:
        """A listener to a load's progress, for the bar and the text of this node."""
        make_bar = hooks.find("comfy.utils.ProgressBar") if hooks.have(["comfy.utils.ProgressBar"]) else None
        bar = make_bar(100, node_id=node) if make_bar is not None else None

        def hear(what: str, done: int, total: int) -> None:
            if bar is not None:
                bar.update_absolute(done, max(total, 1))
            say(f"{what} {done >> 20} of {total >> 20} MiB", node)

        return hear

    @staticmethod
    def outputs(made: Converted, node: str | None) -> tuple[ModelPatcher, dict[str, Any]]:
        """A node's outputs; the console gets to hear of the success."""
        info = _info(made)
        log.info("%s", success_text(info))
        say(f"in the daemon, on {info['world_size']} rank{'s' * (info['world_size'] > 1)}", node)
        return made.patcher, info


def _info(made: Converted) -> dict[str, Any]:
    """What TACO_DIT_INFO holds."""
    with errors_explained():
        status = made.client.status()
    group = made.model.group_in(status)
    remote = made.network.remote
    ages = version_text(status["version"], __version__)
    if ages:
        log.warning("TACO-DiT: %s", ages)
    return {
        "enabled": True,
        "name": remote.source.name,
        "family": made.model.family,
        "parameters": made.model.parameters,
        "dtype": made.model.dtype,
        "quantization": made.model.quantization,
        "plan": made.model.plan,
        "note": remote.note,
        "remarks": [each for each in (ages, remote.remark, made.model.network) if each],
        "patches": len(made.patcher.patches),
        "weights": f"sent to {remote.uploaded}" if remote.uploaded else f"read by the daemon from {remote.source.path}",
        "placement": made.model.weights,
        "resident_bytes": list(made.model.resident_bytes),
        "streamed_bytes": list(made.model.streamed_bytes),
        "group": made.model.group,
        "world_size": group["world_size"],
        "devices": [rank["device"] for rank in group["ranks"]],
        "version": status["version"],
        "state": status["state"],
        "endpoint": made.client.endpoint,
    }


def _local(model: ModelPatcher) -> ModelPatcher:
    """A MODEL of one's own that runs here; with what is on it, if it ran in the daemon."""
    network = remote_of(model)
    return model.clone() if network is None else carry_over(model, network.remote.source.local())


class TACODiTModelLoader(_Loader):
    """A MODEL in, the same MODEL out, run by the daemon."""

    DESCRIPTION = (
        "Runs a diffusion transformer on all GPUs of the TACO-DiT daemon. The daemon reads the file itself; "
        "LoRAs and other patches go along. The result is the one that ComfyUI itself gives."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """See ComfyUI."""
        model = ("MODEL", {"tooltip": "From any loader, with or without LoRAs and other changes to it."})
        return {"required": {"model": model, **SETTINGS}, "optional": ENDPOINT, "hidden": HIDDEN}

    def load(
        self,
        model: ModelPatcher,
        enable_taco_dit: bool,
        graph: Any = None,
        node: str | None = None,
        endpoint: str = "",
        **settings: Any,
    ) -> tuple[ModelPatcher, dict[str, Any]]:
        """The node's outputs."""
        if not enable_taco_dit:
            local = _local(model)
            local.attachments[OFF] = True
            return local, {"enabled": False}
        wanted = Settings(**settings, endpoint=endpoint)
        return self.outputs(convert(model, wanted, graph, node, self.report(node)), node)


class TACODiTUNETLoader(_Loader):
    """A file in, a MODEL out whose weights were never here."""

    FOLDERS = ("diffusion_models", "checkpoints")
    DESCRIPTION = (
        "The quick way: reads a file's header only, and has the daemon load the weights. For a diffusion model, or for "
        "the diffusion model of a checkpoint; load CLIP and VAE apart."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """See ComfyUI."""
        names = list(dict.fromkeys(name for folder in cls.FOLDERS for name in model_files(folder)))
        unet = (names, {"tooltip": "A .safetensors or .gguf file from models/diffusion_models or models/checkpoints."})
        return {"required": {"unet_name": unet, **SETTINGS}, "optional": ENDPOINT, "hidden": HIDDEN}

    @classmethod
    def IS_CHANGED(cls, unet_name: str, **settings: Any) -> Any:
        """The file's state: one that was replaced is opened again."""
        path = cls._path(unet_name)
        if path is None:
            return unet_name
        state = os.stat(path)
        return path, state.st_mtime_ns, state.st_size

    @classmethod
    def _path(cls, name: str) -> str | None:
        paths = (hooks.find("folder_paths.get_full_path")(folder, name) for folder in cls.FOLDERS)
        return next((path for path in paths if path), None)

    def load(
        self,
        unet_name: str,
        enable_taco_dit: bool,
        graph: Any = None,
        node: str | None = None,
        endpoint: str = "",
        **settings: Any,
    ) -> tuple[ModelPatcher, dict[str, Any]]:
        """The node's outputs."""
        path = self._path(unet_name)
        if path is None:
            raise FileNotFoundError(f"TACO-DiT: {unet_name} is in none of ComfyUI's folders {', '.join(self.FOLDERS)}")
        if not enable_taco_dit:
            local = load_here(path)
            local.attachments[OFF] = True
            return local, {"enabled": False}
        return self.outputs(open_file(path, Settings(**settings, endpoint=endpoint), self.report(node)), node)


class TACODiTKSampler(hooks.find("nodes.KSampler") or object):  # type: ignore[misc]
    """ComfyUI's own KSampler, and what the run came to."""

    CATEGORY = CATEGORY
    RETURN_TYPES = ("LATENT", "TACO_DIT_STATS")
    RETURN_NAMES = ("LATENT", "TACO_DIT_STATS")
    OUTPUT_TOOLTIPS = ("The denoised latent.", "What the run came to; for TACO-DiT Stats Display.")
    DESCRIPTION = "KSampler for a model from a TACO-DiT loader, with statistics of the run. The result is KSampler's."
    totals = Totals()

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """KSampler's, of this version of ComfyUI, and a switch."""
        inputs: dict[str, Any] = super().INPUT_TYPES()
        switch = ("BOOLEAN", {"default": True, "tooltip": "Off: run the model here, on one device, for comparison."})
        return {**inputs, "required": {**inputs["required"], "enable_taco_dit": switch}}

    def sample(self, model: ModelPatcher, *args: Any, enable_taco_dit: bool = True, **kwargs: Any) -> tuple[Any, ...]:
        """The node's outputs."""
        network = remote_of(model)
        if network is None and enable_taco_dit and OFF not in model.attachments:
            raise Refused(
                "a model that went through no TACO-DiT loader",
                "put TACO-DiT Model Loader before this node, or switch enable_taco_dit off here",
            )
        if network is not None and not enable_taco_dit:
            model, network = _local(model), None
        run = Run()
        watched = model.clone()
        if hooks.have(_WATCHING):
            watched.add_wrapper_with_key(hooks.find(_WATCHING[0]), "taco_dit", run.watch)
        if network is None:
            with run:
                (latent,) = super().sample(watched, *args, **kwargs)
        else:
            with run, network.record.to(run):
                (latent,) = super().sample(watched, *args, **kwargs)
        return latent, self._stats(run, network)

    @classmethod
    def _stats(cls, run: Run, network: RemoteDiT | None) -> dict[str, Any]:
        if network is None:
            return {"enabled": False, **run.to_stats()}
        name = network.remote.source.name
        about = {"model": name, "family": network.remote.family}
        return {"enabled": True, **about, **run.to_stats(), **cls.totals.add(name, run)}


class _Display:
    """A node that shows a text in its body and on the console."""

    CATEGORY = CATEGORY
    RETURN_TYPES = ()
    OUTPUT_NODE = True
    FUNCTION = "show"

    @staticmethod
    def shown(text: str) -> dict[str, Any]:
        """The text for the node's body; the console gets it too."""
        log.info("%s", text)
        return {"ui": {"text": (text,)}}


class TACODiTInfoDisplay(_Display):
    """Shows what a loader has loaded."""

    DESCRIPTION = "Shows which model the daemon holds, on which GPUs, and how it is spread over them."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """See ComfyUI."""
        return {"required": {"info": ("TACO_DIT_INFO", {"tooltip": "From a TACO-DiT loader."})}}

    def show(self, info: Mapping[str, Any]) -> dict[str, Any]:
        """The node's text."""
        return self.shown(info_text(info))


class TACODiTStatsDisplay(_Display):
    """Shows what a run came to."""

    DESCRIPTION = "Shows a run's steps, times and where they went, and how often this model ran so far."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """See ComfyUI."""
        return {"required": {"stats": ("TACO_DIT_STATS", {"tooltip": "From TACO-DiT KSampler."})}}

    def show(self, stats: Mapping[str, Any]) -> dict[str, Any]:
        """The node's text."""
        return self.shown(stats_text(stats))


_NEEDS = {
    "TACODiTUNETLoader": hooks.UNET_LOADER,
    "TACODiTKSampler": ("nodes.KSampler",),
}
"""What nodes can't be without; such as this ComfyUI can't have are not offered."""

NODE_CLASS_MAPPINGS = {
    kind.__name__: kind
    for kind in (TACODiTModelLoader, TACODiTUNETLoader, TACODiTKSampler, TACODiTInfoDisplay, TACODiTStatsDisplay)
    if hooks.have(_NEEDS.get(kind.__name__, ()))
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "TACODiTModelLoader": "TACO-DiT Model Loader",
    "TACODiTUNETLoader": "TACO-DiT UNET Loader",
    "TACODiTKSampler": "TACO-DiT KSampler",
    "TACODiTInfoDisplay": "TACO-DiT Info Display",
    "TACODiTStatsDisplay": "TACO-DiT Stats Display",
}

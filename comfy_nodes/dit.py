"""The module that stands where ComfyUI expects a network, and has the daemon run it."""

from __future__ import annotations

import copy
import functools
import inspect
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher

from tacod_client import Model
from tacod_client.errors import ModelNotFound

from . import hooks, plain
from .errors import NotRemote, Refused, errors_explained
from .network import Network
from .patches import PREFIX, to_request
from .progress import Blocks
from .record import Record
from .remote import DTYPES, Remote
from .source import Source

__all__ = ["RemoteDiT", "refuse_weight_only", "remote_of"]

Latents = torch.Tensor | list[torch.Tensor]
"""A network's latent, or a list where it has several."""
Times = torch.Tensor | Sequence[torch.Tensor]
VARIANTS = 8
"""Sets of patches whose handle is kept, as many as the daemon keeps by default (``models.variants``)."""
_COPIED_LAYERS = ("x_embedder", "y_embedder")
"""Small layers that ControlNets copy from the model that they control."""
_SHOWN_LAYERS = ("img_in", "patch_embedding", "lq_proj", *_COPIED_LAYERS)
"""Layers whose shapes and settings ComfyUI looks at."""
_WITHOUT_WEIGHTS = ("process_img", "pe_embedder")
_RUN_LAYERS = ("img_in", "txt_norm", "txt_in", "time_text_embed")
"""What Qwen-Image's Fun ControlNet runs of the model that it controls: methods without weights, and small layers."""
_CALLED = {"preprocess_text_embeds": {"text_embeds": "context", "text_states": "context", "text_ids": "t5xxl_ids"}}
"""Methods that ComfyUI calls outside of a forward, and the daemon's names of their arguments where they differ."""
_OF_A_RUN = "reset_prefix_cache"
"""Qwen-Image-2.1's, called as a run begins and ends, for what the network keeps within it: nothing is kept here."""
_SENT_OPTIONS = ("rope_options", "minimax_h3_sigma_shift_video", "minimax_h3_sigma_shift_audio")
"""Options that are arguments of the daemon's networks."""
SOUND_TIMESTEP = "a_timestep"
"""The name by which wrappers around LTX-2's network get the sound's timestep."""
_WRAPPING = ("WrappersMP.DIFFUSION_MODEL", "get_all_wrappers", "WrapperExecutor.new_class_executor")


class RemoteDiT(torch.nn.Module):
    """A network without weights: its forward is a call of the daemon, its state dict the real one's keys and shapes.

    Args:
        network: The stock network, by its class and shapes.
        remote: The model in the daemon.
        dtype: The compute dtype, to which ComfyUI casts the inputs.
    """

    def __init__(self, network: Network, remote: Remote, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.remote = remote
        self.record = Record()
        self.shown = Blocks()
        self.shell: weakref.ref[BaseModel] | None = None
        """The model around this one, set by who makes it."""
        self.loaded: weakref.ref[ModelPatcher] | None = None
        """The patcher whose patches ComfyUI would have merged into the weights now."""
        self._variants: OrderedDict[Any, Model] = OrderedDict()
        self._lent: dict[Any, torch.nn.Module] = {}
        self.network = network

    # --- what ComfyUI looks at ------------------------------------------------------------------------------------

    def state_dict(self, *, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """The real network's keys and shapes, as meta tensors: LoRA loaders match names against them."""
        out = OrderedDict() if destination is None else destination
        out.update({prefix + key: tensor for key, tensor in self.network.skeleton.state_dict().items()})
        return out

    def __getattr__(self, name: str) -> Any:
        """The network's sizes and settings, shapes of its first layers, and what makes contexts of texts."""
        network = vars(self).get("network")
        if network is None or name.startswith("_") or not hasattr(network.skeleton, name):
            return super().__getattr__(name)
        value = getattr(network.skeleton, name)
        if name in _CALLED:
            return functools.partial(self._call, name)
        if name == _OF_A_RUN:
            return _nothing
        if name in _COPIED_LAYERS:
            return self._layer_with_weights(name, value)
        if network.is_qwen and name in _WITHOUT_WEIGHTS:
            return value
        if network.is_qwen and name in _RUN_LAYERS:
            return Lent(value, functools.partial(self._lend, name, value))
        if name not in _SHOWN_LAYERS and (callable(value) or isinstance(value, torch.Tensor)):
            raise NotRemote(
                f"TACO-DiT can't honour a use of diffusion_model.{name}: the network is in the daemon; "
                "do it before the TACO-DiT Model Loader, or without that"
            )
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse what would replace a part of the real network: here it would do nothing, in silence."""
        network = vars(self).get("network")
        if (
            network is not None
            and name not in vars(self)
            and (hasattr(type(self), name) or hasattr(network.skeleton, name))
        ):
            raise Refused(f"a replacement of diffusion_model.{name}", "the network is in the daemon; take it off")
        # Past torch's registry, so that nobody moves or counts the skeleton's tensors.
        vars(self)[name] = value

    def _layer_with_weights(self, name: str, layer: torch.nn.Module) -> torch.nn.Module:
        """A layer for others to copy or run; with the weights of the file, so not under patches of it."""
        self._check_unpatched(name)
        if any(layer == name or layer.startswith(f"{name}.") for layer in self.remote.source.layers):
            raise Refused(
                f"a ControlNet that copies {name}, which is quantized",
                "it computes here; take a file that has this layer in bf16, fp16 or fp32",
            )
        copied = copy.deepcopy(layer).to_empty(device="cpu")
        state, prefix = self.remote.source.state(), f"{name}."
        weights = {key.removeprefix(prefix): state[key] for key in state if key.startswith(prefix)}
        copied.load_state_dict(weights)
        return copied

    def _check_unpatched(self, name: str) -> None:
        if any(key.startswith(f"{PREFIX}{name}.") for key in self._patches(self.patcher)):
            raise Refused(f"a patch of {name} beside a ControlNet that copies it", "take one of the two off")

    def _lend(self, name: str, layer: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
        """The layer with its weights where and as it is to run; it stays there."""
        self._check_unpatched(name)
        key = name, device, dtype
        if key not in self._lent:
            self._lent[key] = self._layer_with_weights(name, layer).to(device, dtype)
        return self._lent[key]

    @property
    def patcher(self) -> ModelPatcher | None:
        """The patcher that samples now, or outside of a run the one that ComfyUI loaded last."""
        model = self.shell() if self.shell is not None else None
        sampling = model.current_patcher if model is not None else None
        return sampling if sampling is not None or self.loaded is None else self.loaded()

    def begin(self) -> None:
        """A sampling begins."""
        self.record.begin(self.remote.client.endpoint, self.remote.source.name, self.remote.family)

    # --- the forward ----------------------------------------------------------------------------------------------

    # Nothing here can be compiled; TorchCompileModel behind the loader would try.
    @torch.compiler.disable
    def forward(self, x: Latents, timestep: Times, context: Any = None, **named: Any) -> Latents:
        """One forward in the daemon, with the arguments and the result of the real network's.

        A network of several latents, such as video and audio, gets a list of them and gives one. It may get a timestep
        for each. Of a list of one it gives a tensor.

        Raises `Refused`, before anything is sent, for what the daemon can't honour.
        """
        named = {"context": context, **named}
        if self.network.changes_latents:
            changed: Latents = type(self.network.skeleton).forward(self, x, timestep, **named)
            return changed
        wrapped, options = self.network.wrapped, named.get("transformer_options") or {}
        if wrapped is None:
            return self._run(x, timestep, named)
        kind, all_of, executor = (hooks.find(f"comfy.patcher_extension.{name}") for name in _WRAPPING)
        if kind is None or all_of is None or executor is None:
            if (options.get("wrappers") or {}).get("diffusion_model"):
                raise Refused("a wrapper around the network (EasyCache or the like)", hooks.UPDATE)
            return self._run(x, timestep, named)
        # Wrappers find some arguments by their position, others by name: they get what the real network gives them.
        positional = [named.pop(name, default) for name, default in wrapped.positional.items()]

        is_pair = self.network.is_ltxav and not isinstance(timestep, torch.Tensor)
        if self.network.is_ltxav:
            # As LTX-2's network does before it runs them.
            timestep, named[SOUND_TIMESTEP] = timestep if is_pair else (timestep, timestep)

        def run(x: Latents, timestep: Times, *values: Any, **rest: Any) -> Latents:
            given = {**dict(zip(wrapped.positional, values, strict=False)), **rest}
            sound = given.pop(SOUND_TIMESTEP, timestep)
            return self._run(x, (timestep, sound) if is_pair else timestep, given)

        calls = executor(run, self, all_of(kind, options))
        out: Latents = calls.execute(x, timestep, *positional, **{**wrapped.named, **named})
        return out

    def _forward(
        self, x: Latents, timestep: Times, context: torch.Tensor, transformer_options: Any = None, **named: Any
    ) -> Latents:
        """What such a network's own forward calls, with the latents as the network itself sees them."""
        named |= {"context": context, "transformer_options": transformer_options}
        payload = named.get("minimax_payload")
        if payload is not None:
            # A layout follows from what is laid out; the sound is at its own noise level here.
            sent = {name: value for name, value in payload.items() if name != "layout"}
            named["minimax_payload"] = {**sent, "audio_scale": 1.0}
        return self._run(x, timestep, named)

    def _run(self, x: Latents, timestep: Times, named: dict[str, Any]) -> Latents:
        options = named.pop("transformer_options", None) or {}
        self._check(options)
        if self.remote.runs_comfyuis:
            return self._send(x, timestep, plain.arguments(named, options, self.network))
        # ComfyUI's networks look whether they are there: an empty map and a 0 are.
        named |= {name: options[name] for name in _SENT_OPTIONS if options.get(name) is not None}
        arguments = {name: value for name, value in named.items() if value is not None and self.network.takes(name)}
        dtype = (x if isinstance(x, torch.Tensor) else x[0]).dtype
        arguments |= self.network.meanings(arguments, dtype, options)
        return self._send(x, timestep, arguments)

    def _send(self, x: Latents, timestep: Times, arguments: dict[str, Any]) -> Latents:
        dtype = (x if isinstance(x, torch.Tensor) else x[0]).dtype
        try:
            out, model = self._asked(dtype, lambda model: model.forward(x=x, timestep=timestep, **arguments))
        finally:
            self.shown.clear()
        self.record.add(model)
        return out

    def _call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """What the network does outside of a forward, in the daemon."""
        given = inspect.signature(getattr(self.network.skeleton, method)).bind(*args, **kwargs).arguments
        names = {} if self.remote.runs_comfyuis else _CALLED[method]
        dtype = next(
            each.dtype for each in given.values() if isinstance(each, torch.Tensor) and each.is_floating_point()
        )
        arguments = {names.get(name, name): value for name, value in given.items()}
        out, _ = self._asked(dtype, lambda model: model.call(method, **arguments))
        return out

    def _asked(self, dtype: torch.dtype, ask: Callable[[Model], Any]) -> tuple[Any, Model]:
        """What the model with the patches of now answers, and that model."""
        model = self._variant(dtype)
        with errors_explained():
            try:
                return ask(model), model
            except ModelNotFound:
                # It has made room for others in the daemon, which can't load it again: its weights were sent, or its
                # file has changed since. Those of this MODEL are sent then.
                self._variants = OrderedDict(each for each in self._variants.items() if each[1] is not model)
                model = self._variant(dtype)
                return ask(model), model

    def _check(self, options: Mapping[str, Any]) -> None:
        """Raise `Refused` for options that the real network would have followed, and that are code."""
        for kind in ("patches", "patches_replace"):
            given = [name for name, patches in (options.get(kind) or {}).items() if patches]
            if given and self.network.reads(kind):
                makers = sorted({_maker(patch) for name in given for patch in _patches_in(options[kind][name])})
                raise Refused(
                    f"{kind} of {', '.join(map(repr, given))} ({', '.join(makers)}, by set_model_…patch)",
                    "it is code that reaches into the blocks, which run in the daemon; take off the node that puts it "
                    "there, or run this MODEL without the TACO-DiT Model Loader",
                )
        # The size of tiles changes what ComfyUI holds at once, and no number.
        others = {*(options.get("chroma_radiance_options") or {})} - {"nerf_tile_size"}
        if others and self.network.reads("chroma_radiance_options"):
            raise Refused(
                f"{', '.join(sorted(others))} of ChromaRadianceOptions",
                "the daemon's network goes by its file; turn it off",
            )
        cache = options.get("qwen_image21_cache") or {}
        if cache.get("dtype", "default") != "default" and self.network.reads("qwen_image21_cache"):
            raise Refused(
                f"a prefix cache in {cache['dtype']}", "the daemon keeps no rounded keys and values; choose default"
            )
        if options.get("optimized_attention_override") is not None and self.network.reads_attention_options:
            raise Refused("optimized_attention_override", "attention runs in the daemon; take that node off")

    def _variant(self, dtype: torch.dtype) -> Model:
        """The model with the patches of the patcher that samples now."""
        patcher = self.patcher
        if patcher is not None and patcher.force_cast_weights:
            refuse_weight_only(self.remote.source)
        patches = self._patches(patcher)
        key = (_state(patcher) if patches else None, dtype)
        if key not in self._variants:
            if dtype not in DTYPES:
                raise Refused(f"a compute dtype of {dtype}", f"the daemon computes in {', '.join(DTYPES.values())}")
            with errors_explained():
                wanted = None if dtype == self.dtype else DTYPES[dtype]
                self._variants[key] = self.remote.load(to_request(patches, self.remote.source.names), wanted)
                self._variants[key].on_blocks = self.shown
        self._variants.move_to_end(key)
        while len(self._variants) > VARIANTS:
            self._variants.popitem(last=False)
        return self._variants[key]

    @staticmethod
    def _patches(patcher: ModelPatcher | None) -> dict[str, list[Any]]:
        """Those on the model, and after them those that hooks on the conditioning put on for this call."""
        if patcher is None:
            return {}
        patches = {key: list(entries) for key, entries in patcher.patches.items()}
        combine = getattr(patcher, "get_combined_hook_patches", None)
        if combine is None:
            if patcher.current_hooks is not None:
                raise Refused("hooks on the conditioning", hooks.UPDATE)
            return patches
        for key, entries in combine(patcher.current_hooks).items():
            patches.setdefault(key, []).extend(entries)
        return patches


class Lent:
    """A layer without weights, by its attributes; where others run it, it is given them.

    Args:
        layer: The layer on the meta device.
        lend: Gives it with weights, on a device and in a dtype.
    """

    def __init__(self, layer: torch.nn.Module, lend: Callable[[torch.device, torch.dtype], torch.nn.Module]) -> None:
        self._layer, self._lend = layer, lend

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)

    def __call__(self, *inputs: Any) -> Any:
        """Run it where, and in the dtype in which, its last input is."""
        return self._lend(inputs[-1].device, inputs[-1].dtype)(*inputs)


def _nothing(*args: Any, **kwargs: Any) -> None:
    pass


def _patches_in(given: Any) -> list[Any]:
    """The code in a list of patches, or in a map of replacements by block."""
    return list(given.values() if isinstance(given, Mapping) else given)


def _maker(patch: Any) -> str:
    """What a patch is called: its class, or the function's name."""
    name: str = getattr(patch, "__qualname__", type(patch).__qualname__)
    return name


def _state(patcher: ModelPatcher) -> Any:
    """What tells two sets of patches apart without looking at their tensors."""
    hooks = patcher.current_hooks.hooks if patcher.current_hooks is not None else ()
    return patcher.patches_uuid, tuple((hook.hook_ref, hook.strength) for hook in hooks)


def refuse_weight_only(source: Source) -> None:
    """Raise `Refused` if a compute dtype of the user's choice changes more than the dtype.

    Quantized layers then leave their inputs as they are in ComfyUI, and round them in the daemon.
    """
    formats = sorted({layer.format for layer in source.layers.values() if layer.quantizes})
    if formats:
        raise Refused(
            f"ModelComputeDtype with layers in {', '.join(formats)}",
            "ComfyUI then computes them without quantizing their inputs; take that node off, or set it to default",
        )


def remote_of(model: ModelPatcher) -> RemoteDiT | None:
    """The daemon's end of a MODEL, if it has one."""
    network = getattr(model.model, "diffusion_model", None)
    network = getattr(network, "_orig_mod", network)  # under torch.compile
    return network if isinstance(network, RemoteDiT) else None

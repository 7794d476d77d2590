"""What a stock network reads of its call, found in its own source: what it doesn't read, it doesn't need.

ComfyUI's networks ignore arguments and options that they don't know, and each version knows others. So this looks at
the code that would have run here, rather than keep a list for every version.
"""

from __future__ import annotations

import ast
import copy
import functools
import inspect
import sys
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import comfy.model_management
import comfy.ops
import torch

from . import hooks, ltx
from .errors import Refused

__all__ = ["Network", "skeleton_layers"]

METHODS = ("offset", "index", "uxo")
"""The ways to place reference latents that the daemon has."""

H3 = "MiniMaxH3Model"
"""MiniMax-H3's network is called so."""

LUMINA = "NextDiT"
"""Lumina 2's and Z-Image's network is called so."""

QWEN = "QwenImageTransformer2DModel"
AT_ZERO = "index_timestep_zero"
"""Places reference latents one behind the other, and takes them as clean: their timestep is 0."""
METHODS_OF_QWEN = ("offset", "index", AT_ZERO, "negative_index")
"""Those that it has for Qwen-Image's network, which is called so."""

_WRAPPERS = "WrappersMP.DIFFUSION_MODEL"
"""Where a network asks for the wrappers around it."""

_TEXT_MASK = "encoder_hidden_states_mask"

_USUAL_EPS = 1e-6, torch.finfo(torch.float32).eps
"""What networks add to the mean square in the norms of queries and keys: their authors, and PyTorch by default."""


@functools.cache
def skeleton_layers() -> Any:
    """ComfyUI's layers (its ``operations``), with all of their tensors from the start.

    With dynamic VRAM ComfyUI's own have none until a file fills them, but for classes that bring their own way to be
    filled.
    """
    layers = {
        name: type(name, (layer,), {"_load_from_state_dict": _fill})
        for name, layer in vars(comfy.ops.disable_weight_init).items()
        if isinstance(layer, type) and issubclass(layer, torch.nn.Module)
    }
    return type("SkeletonLayers", (comfy.ops.disable_weight_init,), layers)


def _source_of(modules: Iterable[str]) -> str:
    return "\n".join(inspect.getsource(sys.modules[name]) for name in sorted(modules))


def _fill(module: torch.nn.Module, *args: Any) -> None:
    torch.nn.Module._load_from_state_dict(module, *args)


@dataclass(frozen=True)
class WrappedCall:
    """What a network passes to the wrappers around it after latents and timestep: wrappers go by position and name."""

    positional: Mapping[str, Any]
    """The arguments by position, in order, with their defaults; None where there are none."""
    named: Mapping[str, Any]
    """Those by name, with theirs; all others that the network is called with are passed by name too."""


class Network:
    """A stock network by its class and shapes; all its tensors are on the meta device, without contents."""

    def __init__(self, skeleton: torch.nn.Module) -> None:
        self.skeleton = skeleton
        kind = type(skeleton)
        modules = {type(part).__module__ for part in skeleton.modules()}
        modules = {name for name in modules if name.split(".")[0] == kind.__module__.split(".")[0]} | {kind.__module__}
        self._source = _source_of({name for name in modules if "ops" not in name})
        self._own = _source_of(
            {each.__module__ for each in kind.__mro__ if issubclass(each, torch.nn.Module)} & modules
        )
        inner = getattr(kind, "_forward", kind.forward)
        self._inner = inner
        self._eps: dict[torch.dtype, float | None] = {}
        self.wrapped = _wrapped_call(kind)
        """How it has EasyCache and its like run around it; None as some of ComfyUI's networks leave them out."""
        self.changes_latents = kind.__name__ == H3
        """Whether its forward changes latents around wrappers and network; it is run as it is then, on the latter."""
        self.parameters = {
            name: None if parameter.default is parameter.empty else parameter.default
            for name, parameter in list(inspect.signature(inner).parameters.items())[3:]
            if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        }
        """What it takes after x and the timestep, in order, with the defaults; None where there are none."""
        self._handed = _handed_on(kind, inner)

    def takes(self, name: str) -> bool:
        """Whether it looks at an argument of this name; parts of it see none but those that it hands on."""
        return name in self.parameters or name in self._handed or f'"{name}"' in self._own

    def reads(self, name: str) -> bool:
        """Whether it, or a part of it, looks at an option of this name."""
        return f'"{name}"' in self._source

    @property
    def reads_attention_options(self) -> bool:
        """Whether its attention gets to see the options, and with them another attention to run."""
        return "transformer_options=transformer_options" in self._source

    def meanings(
        self, arguments: Mapping[str, Any], dtype: torch.dtype, options: Mapping[str, Any] = MappingProxyType({})
    ) -> dict[str, Any]:
        """Arguments that say what this version makes of others, and of the options, where versions or models differ.

        Raises `Refused` for what only this version's network knows.
        """
        meanings: dict[str, Any] = {}
        if arguments.get("rope_options") and arguments.get("ref_latents"):
            meanings |= {} if self.stretches_references else {"rope_options_for": "image"}
        method = arguments.get("ref_latents_method")
        methods = self.reference_methods
        if isinstance(method, str) and self.takes("ref_latents_method"):
            if not self.reads(method):
                # One that it doesn't know it lays out as what its last branch is for.
                meanings["ref_latents_method"] = "offset"
            elif method not in methods and arguments.get("ref_latents"):
                raise Refused(f"ref_latents_method {method!r}", f"the daemon has {', '.join(methods)}; choose one")
        elif self.is_qwen and arguments.get("ref_latents"):
            # What this version found in the file, which an older one doesn't know of Edit-2511 and Layered.
            meanings["ref_latents_method"] = getattr(self.skeleton, "default_ref_method", "index")
        if arguments.get("attention_mask") is not None:
            if type(self.skeleton).__name__ == LUMINA and "cap_mask = None" not in self._own:
                # Since 0.11 it drops the mask, as the daemon does.
                raise Refused(
                    "a text with padding",
                    "this ComfyUI's network hides the padding from the rest of the text, and the daemon doesn't; "
                    "update ComfyUI (0.11 or newer), or run it without the TACO-DiT nodes",
                )
            if not self.applies_text_mask:
                meanings["attention_mask"] = None
        eps = self.qk_norm_eps(dtype)
        if eps is not None:
            meanings["qk_norm_eps"] = eps
        if arguments.get("guiding_frame_index") is not None:
            self._check_guidance(arguments.get("guidance"))
            meanings["joint_order"] = self.joint_order
        if getattr(self.skeleton, "time_r_in", None) is not None and not arguments.get("disable_time_r"):
            meanings |= _next_timestep(options, len(arguments["context"]))
        if self.is_ltxav:
            meanings |= ltx.meanings(self.skeleton, options)
        return meanings

    def _check_guidance(self, guidance: torch.Tensor | None) -> None:
        """Raise `Refused` for guidances of two images, each of which ComfyUI adds to a part of both videos."""
        guided = getattr(getattr(self.skeleton, "params", None), "guidance_embed", False)
        if guided and guidance is not None and len(guidance) > 1 and not bool((guidance == guidance[0]).all()):
            raise Refused(
                "a given first frame with two guidances at once",
                "ComfyUI's network mixes them up; give positive and negative the same FluxGuidance, or set cfg to 1",
            )

    @functools.cached_property
    def joint_order(self) -> str:
        """Which tokens HunyuanVideo's single blocks have first: the image's up to 0.13, and later the text's."""
        source = inspect.getsource(getattr(type(self.skeleton), "forward_orig", self._inner))
        for order, joined in {"text_first": "cat((txt, img), 1)", "image_first": "cat((img, txt), 1)"}.items():
            if joined in source:
                return order
        raise Refused("guiding_frame_index", f"this version's single blocks aren't known; {hooks.UPDATE}")

    @property
    def reference_methods(self) -> tuple[str, ...]:
        """The ways to place reference latents that the daemon has for this network."""
        if self.is_qwen:
            return METHODS_OF_QWEN
        at_zero = getattr(
            getattr(self.skeleton, "params", None), "global_modulation", type(self.skeleton).__name__ != "Flux"
        )
        return (*METHODS, AT_ZERO) if at_zero else METHODS

    @property
    def is_qwen(self) -> bool:
        """Whether it is Qwen-Image's."""
        return type(self.skeleton).__name__ == QWEN

    @property
    def is_ltxav(self) -> bool:
        """Whether it is LTX-2's."""
        return type(self.skeleton).__name__ == ltx.NETWORK

    @functools.cached_property
    def applies_text_mask(self) -> bool:
        """Whether a text's mask counts: up to 0.10 Qwen-Image's attention is handed it, and doesn't look at it."""
        forwards = {type(part).forward for part in self.skeleton.modules()}
        handed = [each for each in forwards if _TEXT_MASK in inspect.signature(each).parameters]
        return all(inspect.getsource(each).count(_TEXT_MASK) > 1 for each in handed)

    @functools.cached_property
    def stretches_references(self) -> bool:
        """Whether stretched positions are those of reference latents too: they are given the options (0.19 and on)."""
        placing = _calls_in(self._inner, "process_img")
        return all(any(given.arg == "transformer_options" for given in node.keywords) for node in placing)

    def qk_norm_eps(self, dtype: torch.dtype) -> float | None:
        """What the norm of queries adds to their mean square; None for a network without such a norm.

        Measured where ComfyUI would run it, for PyTorch's own choice depends on version, device and dtype.
        """
        if dtype not in self._eps:
            norms = [each for name, each in self.skeleton.named_modules() if name.endswith(".query_norm")]
            self._eps[dtype] = _measure_eps(norms[0], dtype) if norms else None
        return self._eps[dtype]


def _next_timestep(options: Mapping[str, Any], images: int) -> dict[str, torch.Tensor]:
    """The timestep after this one, for models that are told where a step goes; none between a run's steps.

    Raises `Refused` where the sampler says nothing of its steps.
    """
    now, levels = options.get("sigmas"), options.get("sample_sigmas")
    if now is None or levels is None:
        raise Refused("a sampler that doesn't tell a distilled model its steps (sample_sigmas)", "take another one")
    found = (levels == now[0]).nonzero().flatten()
    if not len(found):
        return {}
    return {"timestep_r": (1000.0 * levels[found[0] + 1].float()).repeat(images)}


def _wrapped_call(kind: type) -> WrappedCall | None:
    """Read from the forward that runs wrappers: the class's own, or the one that this hands on to."""
    for each in kind.__mro__:
        forward = vars(each).get("forward")
        if forward is None:
            continue
        if _WRAPPERS not in inspect.getsource(forward):
            if not any(_is_super(call.func) for call in _calls_in(forward, "forward")):
                return None
            continue
        calls = _calls_in(forward, "execute")
        if len(calls) != 1:
            # What stands where isn't known, and by their names wrappers find most of it.
            return WrappedCall({}, {})
        (call,) = calls
        defaults = {
            name: None if parameter.default is parameter.empty else parameter.default
            for name, parameter in inspect.signature(forward).parameters.items()
        }
        # An argument may be any expression; its place is then that of a name that nobody gives.
        positional = [given.id if isinstance(given, ast.Name) else ast.unparse(given) for given in call.args[2:]]
        named = [given.arg for given in call.keywords if given.arg is not None]
        return WrappedCall(*({name: defaults.get(name) for name in names} for names in (positional, named)))
    return None


def _is_super(function: ast.expr) -> bool:
    """Whether a method is called on ``super()``."""
    owner = getattr(function, "value", None)
    return isinstance(owner, ast.Call) and isinstance(owner.func, ast.Name) and owner.func.id == "super"


def _calls_in(function: Any, method: str) -> list[ast.Call]:
    """The calls of a method of this name in a function's source."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [node for node in calls if isinstance(node.func, ast.Attribute) and node.func.attr == method]


def _handed_on(kind: type, inner: Any) -> set[str]:
    """What ``forward_orig`` takes by name, if it is called with all that the network doesn't take itself."""
    original = getattr(kind, "forward_orig", None)
    if original is None or all(given.arg for call in _calls_in(inner, "forward_orig") for given in call.keywords):
        return set()
    return set(inspect.signature(original).parameters)


def _measure_eps(norm: torch.nn.Module, dtype: torch.dtype) -> float:
    device = comfy.model_management.get_torch_device()
    norm = copy.deepcopy(norm).to_empty(device=device).to(dtype)
    (scale,) = norm.parameters()
    torch.nn.init.ones_(scale)
    small = 2.0**-13
    with torch.no_grad():
        out = float(norm(torch.full((1, *scale.shape), small, dtype=dtype, device=device)).double().mean())
    # out = x / sqrt(x² + eps)
    eps = (small / out) ** 2 - small**2
    return next((each for each in _USUAL_EPS if abs(eps - each) <= 0.02 * each), eps)

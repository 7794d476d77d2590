"""What a stock network reads of its call, found in its own source: what it doesn't read, it doesn't need.

ComfyUI's networks ignore arguments and options that they don't know, and each version knows others. So this looks at
the code that would have run here, rather than keep a list for every version.
"""

from __future__ import annotations

import inspect
import sys

import torch

__all__ = ["Network"]


class Network:
    """A stock network by its class and shapes; all its tensors are on the meta device, without contents."""

    def __init__(self, skeleton: torch.nn.Module) -> None:
        self.skeleton = skeleton
        kind = type(skeleton)
        modules = {type(part).__module__ for part in skeleton.modules()}
        modules = {name for name in modules if name.split(".")[0] == kind.__module__.split(".")[0]} | {kind.__module__}
        self._source = "\n".join(inspect.getsource(sys.modules[name]) for name in sorted(modules) if "ops" not in name)
        inner = getattr(kind, "_forward", kind.forward)
        self.runs_wrappers = "WrappersMP.DIFFUSION_MODEL" in inspect.getsource(kind.forward)
        """Whether EasyCache and its like are run around it. ComfyUI's SD3 and PixArt leave them out."""
        self.parameters = {
            name: parameter.default
            for name, parameter in list(inspect.signature(inner).parameters.items())[3:]
            if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        }
        """What it takes after x and the timestep, in order, with the defaults."""

    def reads(self, name: str) -> bool:
        """Whether it looks at an argument or an option of this name."""
        return name in self.parameters or f'"{name}"' in self._source

    @property
    def reads_attention_options(self) -> bool:
        """Whether its attention gets to see the options, and with them another attention to run."""
        return "transformer_options=transformer_options" in self._source

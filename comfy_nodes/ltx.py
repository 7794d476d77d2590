"""What versions of ComfyUI mean by LTX-2's network, and the options that it reads."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import torch

from . import hooks
from .errors import Refused

__all__ = ["NETWORK", "meanings"]

NETWORK = "LTXAVModel"
"""ComfyUI's class."""
_SWITCHES = ("run_vx", "run_ax", "a2v_cross_attn", "v2a_cross_attn")
_UNATTENDED = "stg_self_attn_blocks"


def meanings(skeleton: torch.nn.Module, options: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments for the daemon that the options ask for, and that say what this version of ComfyUI computes.

    Raises `Refused` for a version whose video and sound know of each other's times in another way.
    """
    reads_video, read = _version(type(skeleton), type(skeleton.transformer_blocks[0]))  # type: ignore[index]
    given: dict[str, Any] = {"reads_video": reads_video}
    given |= {name: bool(options[name]) for name in _SWITCHES if name in options and name in read}
    if options.get(_UNATTENDED) and _UNATTENDED in read:
        given[_UNATTENDED] = sorted(int(number) for number in options[_UNATTENDED])
    return given


@functools.cache
def _version(kind: Any, block: Any) -> tuple[str, frozenset[str]]:
    """When this version reads the video for the sound, and which options it reads. Raises what `meanings` does."""
    times = inspect.getsource(kind._prepare_timestep)
    # Until May 2026 these were unscaled, and each for the other's tokens.
    if "a_timestep.max()" in times:
        raise Refused("LTX-2 in this version", f"it gives video and sound other times; {hooks.UPDATE}")
    text = inspect.getsource(inspect.getmodule(kind))  # type: ignore[arg-type]
    read = frozenset(name for name in (*_SWITCHES, _UNATTENDED) if f'"{name}"' in text)
    return "before" if "vx_norm3" in inspect.getsource(block.forward) else "after", read

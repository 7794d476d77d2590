"""What a call of ComfyUI's own network in the daemon is sent: all that ComfyUI passes, if it is data and no code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .errors import Refused
from .network import Network

__all__ = ["arguments"]

_ELSEWHERE = (
    *("patches", "patches_replace", "optimized_attention_override"),
    *("wrappers", "callbacks", "prefetch_dynamic_vbars", "context_window"),
)
"""Options that are refused where they matter, that run around the network, or that are about this process's memory.

Wan Animate 2 looks at the ``context_window`` beside a cache alone, which is refused."""


def arguments(named: Mapping[str, Any], options: Mapping[str, Any], network: Network) -> dict[str, Any]:
    """The arguments of a call beside latents and timestep, and of its options those that the network looks at.

    Raises `Refused` for code among them.
    """
    sent = {name: _plain(name, value) for name, value in named.items() if value is not None}
    read = {name: value for name, value in options.items() if name not in _ELSEWHERE and network.reads(name)}
    if read:
        sent["transformer_options"] = {name: _plain(name, value) for name, value in read.items()}
    return sent


def _plain(name: str, value: Any) -> Any:
    """The same in lists and maps, for tuples and the like."""
    if isinstance(value, Mapping):
        return {str(key): _plain(f"{name}.{key}", each) for key, each in value.items()}
    if isinstance(value, list | tuple | torch.Size):
        return [_plain(name, each) for each in value]
    if value is None or isinstance(value, bool | int | float | str | torch.Tensor):
        return value
    raise Refused(
        f"{name}, a {type(value).__name__}",
        "ComfyUI's network is in the daemon, which is sent tensors, numbers and texts; take off the node that adds it",
    )

"""A ModelPatcher's weight patches (LoRA and its kin), as the daemon takes them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .errors import Refused
from .names import Names

__all__ = ["to_request"]

PREFIX = "diffusion_model."
_FIELDS = {
    "lora": ("up", "down", "alpha", "mid", "dora_scale", "reshape"),
    "loha": ("w1_a", "w1_b", "alpha", "w2_a", "w2_b", "t1", "t2", "dora_scale"),
    "lokr": ("w1", "w2", "alpha", "w1_a", "w1_b", "w2_a", "w2_b", "t2", "dora_scale"),
}
"""The order in which ComfyUI's adapters keep their tensors."""


def to_request(patches: Mapping[str, Iterable[Sequence[Any]]], names: Names) -> list[dict[str, Any]]:
    """What ``ModelPatcher.patches`` holds, as the ``patches`` of a load request, in its order and by the file's names.

    Raises `Refused`, naming the weight and the kind, for what the daemon doesn't apply.
    """
    request = []
    for key, entries in patches.items():
        if not key.startswith(PREFIX):
            raise Refused(f"a patch of {key}", "it patches something other than the diffusion model")
        for strength, value, strength_model, offset, function in entries:
            request.append(
                {
                    "key": names.for_daemon(key.removeprefix(PREFIX)),
                    "strength": float(strength),
                    "strength_model": float(strength_model),
                    "offset": None if offset is None else [int(size) for size in offset],
                    "function": None if function is None else function.__name__,
                    **_change(value, key),
                }
            )
    return request


def _change(value: Any, key: str) -> dict[str, Any]:
    if isinstance(value, list):
        raise Refused(
            f"a merge (ModelMerge or the like) of {key}",
            "it needs both models' weights here; save the merged model with ModelSave and load that file",
        )
    kind = getattr(value, "name", None)
    if kind in _FIELDS:
        fields = dict(zip(_FIELDS[kind], value.weights, strict=True))
        return {"kind": kind, **{name: _number_or_tensor(item) for name, item in fields.items() if item is not None}}
    if isinstance(value, tuple):
        name, body = ("diff", value) if len(value) == 1 else value
        if name == "diff":
            padded = len(body) > 1 and bool(body[1].get("pad_weight"))
            return {"kind": "diff", "diff": body[0], "pad_weight": padded}
        if name == "set":
            return {"kind": "set", "value": body[0]}
        kind = name
    raise Refused(
        f"a patch of kind {kind or type(value).__name__!r} on {key}",
        "the daemon applies LoRA, DoRA, LoHa, LoKr, diff and set; take it off, or save the patched model and load that",
    )


def _number_or_tensor(value: Any) -> Any:
    """As it is, but for a number that came as a tensor of one."""
    return value.item() if getattr(value, "ndim", None) == 0 else value

"""Reading a model's configuration: from a file's keys and shapes, and with checks from ComfyUI's ``unet_config``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tacod.checkpoint import TensorInfo
from tacod_client.errors import ModelUnsupported

__all__ = [
    "choice",
    "count_blocks",
    "fixed",
    "integer",
    "kv_heads_of",
    "number",
    "numbers",
    "optional_integer",
    "optional_number",
    "rope_axes",
    "shape_of",
    "width_of_heads",
]


def integer(
    config: Mapping[str, Any], key: str, default: int | None = None, *, least: int = 1, most: int = 1 << 20
) -> int:
    """A whole number from a model's configuration; raises `ModelUnsupported`, naming the key, for anything else."""
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ModelUnsupported(f"config key {key!r} is {value!r:.80}; expected a whole number from {least} to {most}")
    return value


def choice(config: Mapping[str, Any], key: str, *allowed: Any) -> Any:
    """A choice from a model's configuration, by default the first; raises `ModelUnsupported`, naming the key."""
    value = config.get(key, allowed[0])
    if not any(type(value) is type(choice) and value == choice for choice in allowed):
        choices = " or ".join(map(repr, allowed))
        raise ModelUnsupported(f"config key {key!r} is {value!r:.80}; this version runs {choices}")
    return value


def shape_of(tensors: Mapping[str, TensorInfo], key: str, dims: int) -> tuple[int, ...]:
    """The shape of a required tensor; raises `ModelUnsupported`, naming it, if it is missing or of other dimensions."""
    info = tensors.get(key)
    if info is None or len(info.shape) != dims:
        found = "it is missing" if info is None else f"its shape is {list(info.shape)}"
        raise ModelUnsupported(f"{key}: expected a tensor of {dims} dimensions, but {found}; is the file complete?")
    return info.shape


def count_blocks(tensors: Mapping[str, TensorInfo], name: str) -> int:
    """How many blocks ``name.0``, ``name.1``, … a file holds, up to the first gap."""
    found = {key.removeprefix(f"{name}.").split(".")[0] for key in tensors if key.startswith(f"{name}.")}
    return next(n for n in range(len(found) + 1) if str(n) not in found)


def number(config: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """A number above 0 from a model's configuration; raises `ModelUnsupported`, naming the key."""
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9:
        raise ModelUnsupported(f"config key {key!r} is {value!r:.80}; expected a number above 0")
    return float(value)


def numbers(config: Mapping[str, Any], key: str, default: Sequence[float]) -> list[float]:
    """As many numbers above 0 as there are by default; raises `ModelUnsupported`, naming the key."""
    values = config.get(key, list(default))
    if not isinstance(values, list | tuple) or len(values) != len(default):
        raise ModelUnsupported(f"config key {key!r} is {values!r:.80}; expected {len(default)} numbers above 0")
    return [number({key: value}, key) for value in values]


def optional_integer(config: Mapping[str, Any], key: str, least: int = 1) -> int | None:
    """A whole number, or None where a configuration has none; raises `ModelUnsupported`, naming the key."""
    return None if config.get(key) is None else integer(config, key, least=least)


def optional_number(config: Mapping[str, Any], key: str) -> float | None:
    """A number above 0, or None where a configuration has none; raises `ModelUnsupported`, naming the key."""
    return None if config.get(key) is None else number(config, key)


def fixed(config: Mapping[str, Any], **values: Any) -> None:
    """Raise `ModelUnsupported`, naming the key, if a configuration has another value than these."""
    for key, value in values.items():
        choice(config, key, value)


def width_of_heads(config: Mapping[str, Any], width_key: str, heads_key: str) -> tuple[int, int]:
    """The width of a model and its number of heads, which must divide it; raises `ModelUnsupported`."""
    width, heads = integer(config, width_key), integer(config, heads_key)
    if width % heads:
        raise ModelUnsupported(f"config key {heads_key!r} is {heads}; it must divide {width_key!r}, which is {width}")
    return width, heads


def kv_heads_of(config: Mapping[str, Any], key: str, heads: int) -> int:
    """Heads of keys and values, by default as many as ``heads``, which they must divide; raises `ModelUnsupported`."""
    count = optional_integer(config, key) or heads
    if heads % count:
        raise ModelUnsupported(f"config key {key!r} is {count}; it must divide the number of heads, which is {heads}")
    return count


def rope_axes(config: Mapping[str, Any], key: str, count: int, head_width: int | None = None) -> list[int]:
    """How many channels of a head rotate with each axis of the positions; raises `ModelUnsupported`, naming the key.

    They must be all of ``head_width``, if it is given.
    """
    axes = config.get(key)
    if not isinstance(axes, list) or len(axes) != count or any(type(n) is not int or n < 0 or n % 2 for n in axes):
        numbers = {2: "two", 3: "three", 4: "four"}[count]
        raise ModelUnsupported(f"config key {key!r} is {axes!r:.80}; expected {numbers} even numbers")
    if head_width is not None and sum(axes) != head_width:
        raise ModelUnsupported(
            f"config key {key!r} is {axes}, which sums to {sum(axes)}; it must sum to the width of a head, "
            f"which is {head_width} (the width of a token over the number of heads)"
        )
    return axes

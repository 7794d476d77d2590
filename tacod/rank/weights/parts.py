"""The plain tensors of which a weight is made: itself, or those within a tensor class of its own.

Such a class, for example ComfyUI's quantized tensors, tells its parts by PyTorch's protocol for wrapper subclasses
(``__tensor_flatten__`` and ``__tensor_unflatten__``).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

__all__ = ["SEPARATOR", "assign", "get", "parts_of", "replaced"]

SEPARATOR = "/"
"""Stands between the name of a weight and that of a part of it."""


def parts_of(tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The plain tensors of a tensor, each with what comes behind the tensor's name: nothing for a plain one."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield "", tensor
        return
    names, _ = tensor.__tensor_flatten__()
    for name in names:
        for behind, part in parts_of(getattr(tensor, name)):
            yield f"{SEPARATOR}{name}{behind}", part


def replaced(whole: Any, path: str, part: Tensor) -> Any:
    """A tensor like ``whole`` with another part, by what `parts_of` says of its place; no other part is copied."""
    if not path:
        return part
    name, _, behind = path.removeprefix(SEPARATOR).partition(SEPARATOR)
    names, context = whole.__tensor_flatten__()
    inner = {each: getattr(whole, each) for each in names}
    inner[name] = replaced(inner[name], behind and SEPARATOR + behind, part)
    return type(whole).__tensor_unflatten__(inner, context, whole.shape, whole.stride())


def get(owner: Any, leaf: str) -> Tensor | None:
    """A module's parameter or buffer, or a part of it; None if it has none."""
    leaf, _, path = leaf.partition(SEPARATOR)
    tensor: Tensor | None = owner._parameters.get(leaf, owner._buffers.get(leaf))
    return tensor if tensor is None or not path else dict(parts_of(tensor)).get(SEPARATOR + path)


def assign(owner: Any, leaf: str, tensor: Tensor) -> None:
    """Make a tensor a module's parameter, or its buffer if it has such a one; or a part of either."""
    leaf, _, path = leaf.partition(SEPARATOR)
    table = owner._parameters if leaf in owner._parameters else owner._buffers
    if path:
        tensor = replaced(table[leaf], SEPARATOR + path, tensor)
    if table is owner._parameters and not path:
        tensor = nn.Parameter(tensor, requires_grad=False)
    elif table is owner._parameters:
        # Making a parameter of it would copy some of its parts.
        tensor._is_param = True
    table[leaf] = tensor

"""Which loaded model a verb means, and whether its tensors fit in a message."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from tacod_client import units
from tacod_client.cli import show
from tacod_client.client import Client
from tacod_client.errors import MessageTooLarge, ModelNotFound
from tacod_client.model import Model

__all__ = ["check_size", "find", "find_or_load", "the_one"]


def find(client: Client, start: str) -> dict[str, Any] | None:
    """The daemon's description of the loaded model whose id begins so; None if there is no such model.

    Raises `ModelNotFound` for what several ids begin with, and for an empty text, with which all do.
    """
    if not start:
        raise ModelNotFound("an empty id stands for no model; `tacoctl models` lists them", model=start)
    found = [reply for reply in client.models() if reply["id"].startswith(start)]
    if len(found) > 1:
        ids = ", ".join(reply["id"] for reply in found[:8])
        raise ModelNotFound(f"{start!r} is not unique: {ids}; give more of the id", model=start)
    return found[0] if found else None


def the_one(client: Client, start: str) -> dict[str, Any]:
    """As `find`; there must be one."""
    reply = find(client, start)
    if reply is None:
        raise ModelNotFound(f"{start!r} is no loaded model; `tacoctl models` lists them", model=start)
    return reply


def find_or_load(client: Client, name: str, quiet: bool) -> Model:
    """A model by the start of its id, or by its file, which is loaded if it isn't yet.

    One that comes from a file loads itself again if the daemon has forgotten it, one that is known by its id can't.
    """
    reply = find(client, name)
    if reply is not None:
        return client.model(reply["id"])
    with show.loading(quiet) as progress:
        return client.load(name, progress=progress)


def check_size(client: Client, shapes: Sequence[Sequence[int]]) -> None:
    """Raise `MessageTooLarge` for tensors in fp32 that no message could hold, before they take memory here."""
    nbytes = sum(4 * math.prod(shape) for shape in shapes)
    limit = client.limits["message_bytes"]
    if nbytes > limit:
        raise MessageTooLarge(
            f"the inputs would take {units.size(nbytes)}, and the daemon takes {units.size(limit)} in a message "
            "(limits.message_bytes); ask for a smaller size or batch",
            limit=limit,
        )

"""One connection a daemon for the whole ComfyUI process, and Cancel's way into it."""

from __future__ import annotations

from tacod_client import Client
from tacod_client.endpoint import find_endpoint

from . import hooks

__all__ = ["client_of", "endpoints"]

_clients: dict[str, Client] = {}


def client_of(endpoint: str) -> Client:
    """The client for an endpoint; an empty one means the default.

    Its calls end within 20 ms of a click on Cancel, with ComfyUI's own exception, and the daemon then stops at the
    next step, or before the next block of a long one.
    """
    where = find_endpoint(endpoint or None)
    if where not in _clients:
        _clients[where] = Client(where, on_wait=_raise_if_interrupted)
    return _clients[where]


def endpoints() -> list[str]:
    """The default endpoint, and after it those that nodes of this process have named."""
    return list(dict.fromkeys((find_endpoint(), *_clients)))


def _raise_if_interrupted() -> None:
    # Looked up at each call: ComfyUI's tests and some packs replace it.
    throw = hooks.find("comfy.model_management.throw_exception_if_processing_interrupted")
    if throw is not None:
        throw()

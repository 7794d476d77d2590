"""Requests whose tensors are sent by content: named by digest, and uploaded when the daemon asks for them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from tacod_client.connection import Connection
from tacod_client.errors import ArgumentError, QueueFull, TacodError
from tacod_client.tensors import kind_of, nbytes_of, to_wire
from tacod_client.text import encodable
from tacod_client.wire import Message, Tensor, map_tensors, split

__all__ = ["Address", "Uploads", "converse", "each_once", "own", "pack"]

BY_CONTENT_BYTES = 4096
"""Tensors from this size on are sent once and named by their digest after that."""
PUT_BYTES = 32 << 20
PUT_TENSORS = 256
"""Most tensors in one `put`."""
FULL_S = 0.05
"""How long a request waits before it is sent again if the daemon's store will soon have room."""
TRIES = 8
"""How many times a request is sent again because the store lost a tensor."""

Uploads = dict[bytes, Tensor]
"""A request's tensors by digest, to be sent if the daemon lacks them."""


Address = Callable[[Any, str], Tensor]
"""Gives a caller's tensor as a wire tensor with its digest. Raises `ArgumentError`, naming it by the second argument.
"""


def pack(value: Any, name: str, uploads: Uploads, address: Address | None) -> Any:
    """A value as it is sent; its large tensors are put into ``uploads`` and replaced by their digests.

    Without ``address`` all tensors are sent with their bytes. Raises `ArgumentError`, naming the value, for what can't
    be sent.
    """
    if kind_of(value) is not None:
        if address is None or nbytes_of(value) < BY_CONTENT_BYTES:
            return to_wire(value, name)
        tensor = address(value, name)
        assert tensor.digest is not None
        uploads[tensor.digest] = tensor
        return tensor.without_bytes()
    if isinstance(value, dict):
        if (odd := next((key for key in map(str, value) if encodable(key) != key), None)) is not None:
            raise ArgumentError(
                f"{name}: the key {odd!r:.80} is not valid Unicode, and can't be sent to the daemon", argument=name
            )
        return {key: pack(item, f"{name}.{key}", uploads, address) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [pack(item, name, uploads, address) for item in value]
    if isinstance(value, str) and encodable(value) != value:
        raise ArgumentError(
            f"{name}: {value!r:.80} is not valid Unicode, and can't be sent to the daemon", argument=name
        )
    if value is None or isinstance(value, (str, float, bool)):
        return value
    if isinstance(value, int) and -(2**63) <= value < 2**64:
        return value
    what = "number of over 64 bits" if isinstance(value, int) else type(value).__name__
    raise ArgumentError(f"{name}: a {what} can't be sent to the daemon", argument=name)


def own(value: Any) -> Any:
    """A packed value with a copy of its bytes, which its caller can't change."""

    def copied(tensor: Tensor) -> Tensor:
        return tensor if tensor.frames is None else replace(tensor, frames=split(b"".join(tensor.frames)))

    return map_tensors(value, copied)


def each_once(control: Any) -> dict[str, Any]:
    """ComfyUI's residuals as the wire has them: ``tensors``, each once, and lists of their places.

    Raises `ArgumentError` for anything but a map of lists of tensors and None.
    """
    tensors: list[Any] = []
    places: dict[int, int] = {}
    lists: dict[str, Any] = {}
    if not isinstance(control, dict):
        raise ArgumentError(f"control: expected a map of lists, got {type(control).__name__}", argument="control")
    for name, residuals in control.items():
        if not isinstance(residuals, list) or any(each is not None and kind_of(each) is None for each in residuals):
            raise ArgumentError(f"control.{name}: expected a list of tensors or None", argument="control")
        for each in residuals:
            if each is not None and id(each) not in places:
                places[id(each)] = len(tensors)
                tensors.append(each)
        lists[str(name)] = [None if each is None else places[id(each)] for each in residuals]
    return {**lists, "tensors": tensors}


def converse(
    connection: Connection,
    kind: str,
    build: Callable[[], dict[str, Any]],
    uploads: Uploads,
    holds: Callable[[], bool] = lambda: True,
) -> Iterator[Message]:
    """Send a request, with uploads as they prove needed, and yield its messages up to the last, or to its completion.

    While others' loads and forwards fill the daemon's store, it waits, for as long as for a daemon that is away.
    ``holds`` says, when the request is under way, whether it may be; if not, it is cancelled and built and sent anew.
    Whatever ends this early (an exception from ``on_wait``, ctrl-C, a generator that is dropped) cancels the request.
    """
    deadline = time.monotonic() + connection.reconnect_s
    tries = 0
    while tries < TRIES:
        tries += 1
        request = connection.start(kind, build)
        ended = False
        try:
            if not holds():
                continue
            for reply in connection.replies(request):
                ended = reply.type in ("done", "completion", "missing")
                if reply.type == "missing":
                    _upload(connection, reply.body["digests"], uploads)
                    break
                yield reply
                if ended:
                    return
        except QueueFull as error:
            ended = True
            if not error.details.get("soon") or time.monotonic() > deadline:
                raise
            connection.pause(FULL_S)
            tries -= 1
        except TacodError:
            ended = True
            raise
        finally:
            if not ended:
                connection.cancel(request)
            connection.forget(request)
    raise TacodError(
        "the daemon's tensor store keeps losing this request's tensors; it is too small for the clients that share it "
        "(limits.store_bytes)"
    )


def _upload(connection: Connection, digests: list[bytes], uploads: Uploads) -> None:
    batch: list[Tensor] = []
    nbytes = 0
    for digest in digests:
        tensor = uploads[digest]
        if batch and (nbytes + tensor.nbytes > PUT_BYTES or len(batch) == PUT_TENSORS):
            _put(connection, batch)
            batch, nbytes = [], 0
        batch.append(tensor)
        nbytes += tensor.nbytes
    _put(connection, batch)


def _put(connection: Connection, tensors: list[Tensor]) -> None:
    connection.ask("put", lambda: {"tensors": tensors})

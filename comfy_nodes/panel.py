"""What the sidebar's tab shows of a daemon, and its one button.

Browsers poll. However many there are, a daemon is asked once in `PERIOD_S`, on a thread and a connection of its own, so
neither ComfyUI's event loop nor a step waits for it.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from tacod_client import Client
from tacod_client.errors import TacodError

from .clients import endpoints
from .record import latest

__all__ = ["IDLE_S", "PERIOD_S", "Panel", "Panels", "UnknownEndpoint", "UnloadUnderWay", "error_of"]

PERIOD_S = 1.5
"""How old a snapshot gets before the daemon is asked again."""
IDLE_S = 30.0
"""After this long without a poll, the connection is closed."""
ANSWER_S = 3.0
"""How long the daemon may take to say hello."""

T = TypeVar("T")


class UnknownEndpoint(LookupError):
    """No node of this ComfyUI uses a daemon at that endpoint, so a browser can't have it asked."""


class UnloadUnderWay(RuntimeError):
    """The model is being unloaded already."""


class Panel:
    """One daemon, as the tab shows it."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self._client: Client | None = None
        self._asking: asyncio.Task[dict[str, Any]] | None = None
        """The last time that the daemon was asked, or is."""
        self._asked_s = -math.inf
        self._closing: asyncio.TimerHandle | None = None
        self._unloading: set[str] = set()

    async def snapshot(self) -> dict[str, Any]:
        """``status``, ``stats`` and ``jobs`` as the client gives them, and ``error`` if the daemon doesn't answer."""
        old = time.monotonic() - self._asked_s >= PERIOD_S
        if self._asking is None or (self._asking.done() and old):
            self._asked_s = time.monotonic()
            self._asking = asyncio.create_task(self._ask())
        # A browser that goes away doesn't take the answer from the others.
        return await asyncio.shield(self._asking)

    async def unload(self, model: str) -> None:
        """Unload a model by its id; it waits for its turn in the daemon's queue.

        Raises the daemon's `TacodError`, and `UnloadUnderWay`.
        """
        if model in self._unloading:
            raise UnloadUnderWay(f"{model} is being unloaded already; it waits for the work before it")
        self._unloading.add(model)
        try:
            await _in_thread(lambda: self._unload(model))
        finally:
            self._unloading.discard(model)
            self._asked_s = -math.inf

    def _unload(self, model: str) -> None:
        # On a connection of its own: an unload may wait for minutes.
        with Client(self.endpoint, timeout_s=ANSWER_S, reconnect_s=0) as client:
            client.unload(model)

    async def _ask(self) -> dict[str, Any]:
        if self._closing is not None:
            self._closing.cancel()
        try:
            return await _in_thread(self._read)
        finally:
            self._closing = asyncio.get_running_loop().call_later(IDLE_S, self._close)

    def _read(self) -> dict[str, Any]:
        if self._client is None:
            self._client = Client(self.endpoint, timeout_s=ANSWER_S, reconnect_s=0)
        client = self._client
        try:
            return {"status": client.status(), "stats": client.stats(), "jobs": client.jobs(), "error": None}
        except TacodError as error:
            # The next one is to find a daemon that was restarted at once.
            self._client = None
            client.close()
            return {"status": None, "stats": None, "jobs": [], "error": error_of(error)}

    def _close(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            threading.Thread(target=client.close, name="taco-dit panel", daemon=True).start()


class Panels:
    """The daemons that this ComfyUI uses."""

    def __init__(self, known: Callable[[], list[str]] = endpoints) -> None:
        self._known = known
        self._panels: dict[str, Panel] = {}

    async def snapshot(self, endpoint: str) -> dict[str, Any]:
        """What the tab shows of one daemon; an empty endpoint means the default one.

        Raises `UnknownEndpoint`.
        """
        known = self._known()
        panel = self._panel(endpoint or known[0], known)
        seen = await panel.snapshot()
        run = latest.get(panel.endpoint)
        if run is not None:
            # Nobody else asks for the last forward's time, once a sampler of ComfyUI's own has ended.
            await _in_thread(run.run.settle)
        return {
            "endpoint": panel.endpoint,
            "endpoints": known,
            **seen,
            "last_run": run.to_wire() if run is not None else None,
        }

    async def unload(self, endpoint: str, model: str) -> None:
        """Unload a model in one daemon.

        Raises as `Panel.unload`, and `UnknownEndpoint`.
        """
        await self._panel(endpoint, self._known()).unload(model)

    def _panel(self, endpoint: str, known: list[str]) -> Panel:
        if endpoint not in known:
            raise UnknownEndpoint(f"no node here uses a daemon at {endpoint!r}; it is one of {', '.join(known)}")
        return self._panels.setdefault(endpoint, Panel(endpoint))


def error_of(error: Exception) -> dict[str, str]:
    """An error's name and message, for the tab."""
    return {"code": type(error).__name__, "message": str(error)}


async def _in_thread(function: Callable[[], T]) -> T:
    """What a function gives that may wait; its thread doesn't keep the process from ending."""
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if answer.cancelled():
            return
        if error is not None:
            answer.set_exception(error)
        else:
            answer.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        result: T | None = None
        failed: BaseException | None = None
        try:
            result = function()
        except BaseException as error:
            failed = error
        # The loop is closed if ComfyUI ends.
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(settle, result, failed)

    threading.Thread(target=run, name="taco-dit panel", daemon=True).start()
    return await answer

"""The sidebar's two routes on ComfyUI's server: what a daemon does, and unloading one of its models."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

from tacod_client.errors import ConnectionFailed, ModelNotFound, NotAllowed, TacodError, Unavailable

from . import hooks
from .panel import Panels, UnknownEndpoint, UnloadUnderWay, error_of

__all__ = ["Answer", "Routes", "register"]

BODY_BYTES = 4096
"""The largest body that is read."""
Answer = tuple[int, dict[str, Any]]
"""HTTP's status, and what goes into the body as JSON."""

_CODES: dict[type[Exception], int] = {
    UnknownEndpoint: 404,
    ModelNotFound: 404,
    UnloadUnderWay: 409,
    NotAllowed: 403,
    ConnectionFailed: 503,
    Unavailable: 503,
    TacodError: 502,
}


class _Refused(Exception):
    """A request that isn't answered, with HTTP's status for that."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class Routes:
    """The handlers; requests are aiohttp's, answers are plain."""

    def __init__(self, panels: Panels) -> None:
        self._panels = panels

    async def status(self, request: Any) -> Answer:
        """``GET /taco_dit/status?endpoint=…``: see `Panels.snapshot`."""
        return await _answered(self._panels.snapshot(request.query.get("endpoint", "")))

    async def unload(self, request: Any) -> Answer:
        """``POST /taco_dit/unload`` with ``{"endpoint": …, "model": …}``, from ComfyUI's own page."""
        return await _answered(self._unload(request))

    async def _unload(self, request: Any) -> dict[str, Any]:
        _check_origin(request)
        asked = await _body(request)
        await self._panels.unload(asked["endpoint"], asked["model"])
        return {"model": asked["model"]}


async def _answered(work: Awaitable[dict[str, Any]]) -> Answer:
    try:
        return 200, await work
    except _Refused as error:
        return error.code, {"error": {"code": "Refused", "message": str(error)}}
    except tuple(_CODES) as error:
        code = next(code for kind, code in _CODES.items() if isinstance(error, kind))
        return code, {"error": error_of(error)}


def _check_origin(request: Any) -> None:
    """Raise `_Refused` for what another site's page sends; a program that is no browser says nothing of its origin."""
    site, origin = (request.headers.get(name) for name in ("Sec-Fetch-Site", "Origin"))
    if site is not None:
        # A proxy may change the host, but not this.
        allowed = site == "same-origin"
    else:
        try:
            allowed = origin is None or urlsplit(origin).netloc == request.headers.get("Host")
        except ValueError:  # it is no address
            allowed = False
    if not allowed:
        raise _Refused(403, "only ComfyUI's own page may unload models; open ComfyUI there")


async def _body(request: Any) -> dict[str, str]:
    # Another site's page can't send this type without ComfyUI's leave.
    if request.content_type != "application/json":
        raise _Refused(415, "expected a body of type application/json")
    if request.content_length is None or request.content_length > BODY_BYTES:
        raise _Refused(413, f"expected a body of a known length, {BODY_BYTES} bytes at most")
    try:
        asked = json.loads(await request.read())
    except (ValueError, RecursionError):
        raise _Refused(400, "the body is no JSON") from None
    fields = {"endpoint", "model"}
    if not isinstance(asked, dict) or set(asked) != fields or not all(isinstance(asked[name], str) for name in fields):
        raise _Refused(400, 'expected {"endpoint": "…", "model": "…"}, both texts')
    return asked


def register() -> None:
    """Put the routes on ComfyUI's server, if there is one."""
    table = hooks.find("server.PromptServer.instance.routes")
    if table is None:
        return
    from aiohttp import web

    def served(handle: Callable[[Any], Awaitable[Answer]]) -> Callable[[Any], Awaitable[Any]]:
        async def handler(request: Any) -> Any:
            code, body = await handle(request)
            return web.json_response(body, status=code, headers={"Cache-Control": "no-store"})

        return handler

    routes = Routes(Panels())
    table.get("/taco_dit/status")(served(routes.status))
    table.post("/taco_dit/unload")(served(routes.unload))

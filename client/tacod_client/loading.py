"""How a model is loaded, the first time and again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tacod_client.connection import Connection
from tacod_client.errors import ModelNotFound
from tacod_client.exchange import Uploads, converse

__all__ = ["Found", "Loading"]


@dataclass(frozen=True)
class Loading:
    """How to load a model, the first time and again."""

    path: str
    dtype: str | None
    patches: Any
    plan: Any
    uploads: Uploads
    weights: str = "auto"

    def run(self, connection: Connection, progress: Callable[[int, int], None] | None = None) -> dict[str, Any]:
        """Load it, and return the daemon's description of it."""
        body = {"path": self.path, "dtype": self.dtype, "patches": self.patches, "plan": self.plan}
        if self.weights != "auto":
            # A daemon that is older doesn't know the word.
            body["weights"] = self.weights
        described: dict[str, Any] = {}
        for reply in converse(connection, "load", lambda: body, self.uploads):
            if reply.type == "done":
                described = reply.body["model"]
            elif progress is not None:
                progress(reply.body["done_bytes"], reply.body["total_bytes"])
        return described


class Found(Loading):
    """A model that was found by its id; how it was loaded isn't known here."""

    def run(self, connection: Connection, progress: Callable[[int, int], None] | None = None) -> dict[str, Any]:
        """See `Loading.run`. Raises `ModelNotFound`, because another load could give another model."""
        raise ModelNotFound(f"the daemon holds this model of {self.path} no more; load its file again")

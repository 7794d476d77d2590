"""The request of one forward: packed once, and built each time that it is sent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tacod_client.connection import Connection
from tacod_client.digests import Digests, Glance
from tacod_client.exchange import Uploads, each_once, pack
from tacod_client.latents import Latents, check_latents
from tacod_client.wire import CHANGING

__all__ = ["ForwardRequest"]


class ForwardRequest:
    """What a forward asks for: its latents, and conditioning that is named by content.

    A tensor that looks as it did in an earlier call is named by the digest of that call. `holds` compares it whole,
    while the ranks compute.
    """

    def __init__(
        self, connection: Connection, digests: Digests, plan: Any, arguments: Mapping[str, Any], shares: bool
    ) -> None:
        """``arguments`` are those of `Model.forward`; the latents may lie in shared memory if it ``shares``.

        Raises `ArgumentError`, naming the argument.
        """
        self.x = arguments.get("x")
        check_latents("x", self.x)
        self.latents = Latents(connection, self.x, shares)
        self.uploads: Uploads = {}
        """Tensors by digest, for a daemon that lacks them."""
        self._plan = plan
        self._conditioning = {
            name: each_once(value) if name == "control" else value
            for name, value in arguments.items()
            if value is not None and name != "x"
        }
        self._glance = Glance(digests)
        self._packed = self._pack()

    def _pack(self) -> dict[str, Any]:
        return {
            name: pack(value, name, self.uploads, None if name in CHANGING else self._glance.address)
            for name, value in self._conditioning.items()
        }

    def build(self) -> dict[str, Any]:
        """The request's fields."""
        x, places = self.latents.pack()
        return {"plan": self._plan, "arguments": {"x": x, **self._packed}, **places}

    def holds(self) -> bool:
        """Whether its digests are those of its tensors; if not, it is packed anew, to be sent again."""
        if self._glance.holds():
            return True
        self.latents.close(answered=False)
        self._packed = self._pack()
        return False

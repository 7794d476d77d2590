"""What clients may load and take, and who may connect."""

from __future__ import annotations

import ipaddress
import os
from typing import Annotated

from pydantic import AfterValidator, Field, model_validator

from tacod.config.section import Count, CountOrZero, Section, check_absolute, check_address
from tacod_client.endpoint import UNIX_PATH_BYTES

__all__ = ["ComfyUI", "Curve", "Limits", "Metrics", "Models"]


class Models(Section):
    """The files that clients may load."""

    roots: list[Annotated[str, AfterValidator(check_absolute)]] = Field(default_factory=list)
    preload: list[str] = Field(default_factory=list)
    uploads: Annotated[str, AfterValidator(check_absolute)] | None = None
    """A folder for model files that clients send because tacod can't read theirs; without it, uploads are off."""
    upload_bytes: Count = 64 << 30
    """Most bytes of the files in `uploads`; the least recently used make room."""
    memory_bytes: Count | None = None
    """Most bytes of weights on each rank; the least recently used models make room. By default, what fits."""
    variants: Count = 8
    """Most patched models (LoRA) of each file; each takes the memory of the layers that its patches change. The least
    recently used make room."""

    @property
    def readable(self) -> list[str]:
        """The folders whose files may be loaded: the roots and the folder of uploads."""
        return [*self.roots, *([self.uploads] if self.uploads is not None else [])]


class Limits(Section):
    """Bounds on what clients can make tacod hold."""

    queue: Count = 64
    """Most waiting and running jobs of all clients."""
    queue_per_user: Count = 48
    """Most of these of one user (uid)."""
    clients: Count = 64
    clients_per_user: Count = 48
    store_bytes: Count = 2 << 30
    """Most bytes of client tensors stored by content in host memory."""
    message_bytes: Count = 512 << 20
    """Largest message, and largest tensor, from a client."""
    shared_bytes: CountOrZero = 512 << 20
    """Most bytes of memory that clients on this machine share with the ranks, beside `memory_bytes`; each takes half of
    what the others leave. 0 turns it off: then all tensors go through the socket."""
    memory_bytes: Count | None = None
    """Most bytes that clients can make the supervisor hold; beyond it connections end. By default, what the store and
    four messages take, and 256 MiB; less is refused."""

    @property
    def held_bytes(self) -> int:
        """`memory_bytes`, or its default."""
        return self.memory_bytes if self.memory_bytes is not None else self._least_bytes

    @property
    def share_bytes(self) -> int:
        """Most bytes of queued jobs, and most bytes of unread answers: a quarter each of what the store leaves.

        The other half is for messages in transit.
        """
        return (self.held_bytes - self.store_bytes) // 4

    @property
    def _least_bytes(self) -> int:
        return self.store_bytes + 4 * self.message_bytes + (256 << 20)

    @model_validator(mode="after")
    def _hold_what_is_allowed(self) -> Limits:
        if self.held_bytes < self._least_bytes:
            raise ValueError(
                f"memory_bytes = {self.memory_bytes} is less than store_bytes, 4 * message_bytes and 256 MiB take "
                f"together: set at least {self._least_bytes}, or lower these"
            )
        return self


def _check_listen(listen: str) -> str:
    path = listen.removeprefix("unix:")
    if path != listen:
        size = len(os.fsencode(path))
        if not os.path.isabs(path) or path.endswith("/") or "\0" in path or size > UNIX_PATH_BYTES:
            raise ValueError(f"expected unix:/absolute/path of {UNIX_PATH_BYTES} bytes at most, got {listen!r}")
        return listen
    example = '"127.0.0.1:9464", "[::1]:9464" or "unix:/path"'
    if "%" in listen:
        # ZeroMQ can listen on an address with a scope ("%eth0"), the server of metrics can't.
        raise ValueError(f"expected {example}, got {listen!r}")
    return check_address(listen, example)


def _check_tcp(listen: str) -> str:
    address = listen.removeprefix("tcp://")
    if address == listen:
        raise ValueError(f'expected "tcp://0.0.0.0:5555", got {listen!r}')
    check_address(address, '"tcp://0.0.0.0:5555" or "tcp://[::]:5555", by number')
    if address.endswith(":0"):
        raise ValueError("port 0 is none that a client could know")
    return listen


class Curve(Section):
    """TCP for clients on other machines whose keys are known."""

    listen: Annotated[str, AfterValidator(_check_tcp)]
    """Such as ``tcp://0.0.0.0:5555``, beside the unix socket."""
    secret_key: Annotated[str, AfterValidator(check_absolute)]
    """The daemon's own key, a file that ``tacoctl keygen`` made."""
    clients: Annotated[str, AfterValidator(check_absolute)]
    """The allowed clients: a folder of public keys, ``NAME.key`` each, or a single key."""
    admins: list[str] = Field(default_factory=list)
    """Names of clients that may do what root and tacod's own user may."""


class Metrics(Section):
    """Metrics for Prometheus, over HTTP without a password."""

    listen: Annotated[str, AfterValidator(_check_listen)] | None = None
    """``127.0.0.1:9464``, or ``unix:/run/tacod/metrics.sock``; by default nothing is exported."""
    allow_remote: bool = False
    """Whether `listen` may be an address that other machines reach, where anybody may read the metrics."""

    @model_validator(mode="after")
    def _on_loopback(self) -> Metrics:
        if self.listen is not None and not self.listen.startswith("unix:") and not self.allow_remote:
            host = self.listen.rpartition(":")[0].strip("[]")
            if not ipaddress.ip_address(host).is_loopback:
                raise ValueError(
                    f"{self.listen} can be reached from other machines; listen on 127.0.0.1, "
                    "or set allow_remote = true if a firewall decides who may read"
                )
        return self


class ComfyUI(Section):
    """A ComfyUI on this machine, whose networks ranks may run where no family here has one."""

    path: Annotated[str, AfterValidator(check_absolute)] | None = None
    """Its folder, the one with main.py; without it only this version's own families are run. Ranks import its code, so
    only those who may change tacod's own code should be able to write there."""

"""What all sections of the configuration share."""

from __future__ import annotations

import ipaddress
import os
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["ConfigError", "ConfigUnreadable", "Count", "CountOrZero", "Section", "check_absolute", "check_address"]


class ConfigError(Exception):
    """The configuration can't be used; one line a fault, each ``file:key: reason``."""


class ConfigUnreadable(ConfigError):
    """This user may not read what the configuration names, which says nothing of tacod's own user."""


class Section(BaseModel):
    """A table: frozen, with known keys alone, each of its own type."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


Count = Annotated[int, Field(gt=0, lt=1 << 63)]
CountOrZero = Annotated[int, Field(ge=0, lt=1 << 63)]
"""Numbers that the wire, ZeroMQ and the ranks can hold. Python itself refuses to print far longer ones."""


def check_absolute(path: str) -> str:
    """The path, if it is absolute. Raises `ValueError`."""
    if not os.path.isabs(path) or "\0" in path:
        raise ValueError(f"expected an absolute path, got {path!r}")
    return path


def check_address(address: str, example: str) -> str:
    """The address, if it is an IP address and a port, as the ``example`` is. Raises `ValueError`."""
    host, _, port = address.rpartition(":")
    try:
        ip = ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
    except ValueError:
        ip = None
    if ip is None or (ip.version == 6) != host.startswith("[") or not port.isascii() or not port.isdigit():
        raise ValueError(f"expected {example}, got {address!r}")
    if not 0 <= int(port) <= 65535:
        raise ValueError(f"port {port} is none of 0 to 65535")
    return address

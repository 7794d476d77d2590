"""All sections together."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, PositiveFloat, field_validator, model_validator

from tacod.config.group import Group, check_apart
from tacod.config.section import Section
from tacod.config.sections import ComfyUI, Curve, Limits, Metrics, Models
from tacod.config.testing import Testing
from tacod_client.endpoint import UNIX_PATH_BYTES

__all__ = ["Config"]


def _check_endpoint(endpoint: str) -> str:
    if endpoint.startswith("tcp://"):
        raise ValueError(
            "TCP needs CURVE keys and an allow-list: this is the unix socket, ipc:///path/to/socket; "
            "set listen, secret_key and clients in [curve] for TCP"
        )
    path = endpoint.removeprefix("ipc://")
    if path == endpoint or not path.startswith("/") or path.endswith("/") or "\0" in path:
        raise ValueError(f"expected ipc:///absolute/path, got {endpoint!r}")
    if len(os.fsencode(path)) > UNIX_PATH_BYTES:
        raise ValueError(f"the socket's path is longer than the {UNIX_PATH_BYTES} bytes that a unix socket takes")
    return endpoint


class Config(Section):
    """All settings of tacod."""

    endpoint: Annotated[str, AfterValidator(_check_endpoint)] = "ipc:///run/tacod/tacod.sock"
    heartbeat_s: float = Field(5.0, ge=0.01, le=3600)
    """A client that is silent for longer loses its queued work."""
    drain_timeout_s: PositiveFloat = 30.0
    """How long SIGTERM lets running work finish."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    groups: list[Group] = Field(default_factory=lambda: [Group.model_validate({})], alias="group")
    """The groups of ranks: of ``[group]``, or of each ``[[group]]``."""
    models: Models = Field(default_factory=Models)
    limits: Limits = Field(default_factory=Limits)
    comfyui: ComfyUI = Field(default_factory=ComfyUI)
    metrics: Metrics = Field(default_factory=Metrics)
    curve: Curve | None = None
    testing: Testing | None = None

    @field_validator("groups", mode="before")
    @classmethod
    def _table_or_tables(cls, value: Any) -> Any:
        if isinstance(value, dict | Group):
            return [value]
        if not isinstance(value, list) or not value:
            raise ValueError("expected a table, [group], or several, [[group]]")
        return [{"name": str(at), **each} if isinstance(each, dict) else each for at, each in enumerate(value)]

    @field_validator("groups", mode="after")
    @classmethod
    def _groups_apart(cls, groups: list[Group]) -> list[Group]:
        if len(groups) == 1:
            return groups
        for name, times in Counter(group.name for group in groups).items():
            if times > 1:
                raise ValueError(f"{times} groups are named {name!r}; give each a name of its own")
        if len({group.device for group in groups}) > 1:
            raise ValueError("all groups must have the same device; run a second tacod for the others")
        if len({group.launcher for group in groups}) > 1:
            raise ValueError("all groups must have the same launcher; run a second tacod for the others")
        for group in groups:
            if group.device == "cuda" and group.gpus is None and group.launcher == "local":
                raise ValueError(f"group {group.name!r} has no gpus; with several groups, each must name its own")
        named = [(gpu, group.name) for group in groups for gpu in group.gpus or ()]
        check_apart([gpu for gpu, _ in named], named)
        return groups

    @model_validator(mode="after")
    def _faults_of_groups(self) -> Config:
        names = [group.name for group in self.groups]
        for fault in self.testing.faults if self.testing is not None else ():
            if fault.group not in (None, *names):
                raise ValueError(f"testing.faults: no group is named {fault.group!r}; there are {', '.join(names)}")
        return self

    @property
    def device(self) -> Literal["cuda", "cpu"]:
        """What the ranks of all groups run on."""
        return self.groups[0].device

    @property
    def launcher(self) -> Literal["local", "ray"]:
        """What starts the ranks of all groups."""
        return self.groups[0].launcher

    @property
    def shared_bytes(self) -> int:
        """Most bytes of memory that clients may share with the ranks: none with those that Ray has on other hosts."""
        return 0 if self.launcher == "ray" else self.limits.shared_bytes

    def group(self, name: str) -> Group:
        """The group of this name, which must be there."""
        return next(group for group in self.groups if group.name == name)

    @property
    def socket_path(self) -> Path:
        """The unix socket's path."""
        return Path(self.endpoint.removeprefix("ipc://"))

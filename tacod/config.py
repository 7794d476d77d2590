"""The configuration: one TOML file, checked whole, frozen.

Unknown keys are errors, and every error reads ``file:key: reason``.
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from tacod.shares import MOST, Shares
from tacod_client.endpoint import UNIX_PATH_BYTES

__all__ = ["Config", "ConfigError", "check_apart", "load_config", "to_toml"]


class ConfigError(Exception):
    """The configuration can't be used; one line a fault, each ``file:key: reason``."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


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


def _check_root(root: str) -> str:
    if not os.path.isabs(root) or "\0" in root:
        raise ValueError(f"expected an absolute path, got {root!r}")
    return root


Count = Annotated[int, Field(gt=0, lt=1 << 63)]
"""A bound that goes on the wire and to ZeroMQ."""


def _check_address(address: str, example: str) -> str:
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


def _check_shares(shares: Any) -> Any:
    if shares == "auto":
        return shares
    if isinstance(shares, list) and shares and all(type(each) is int and 1 <= each <= MOST for each in shares):
        return shares
    raise ValueError(f'expected "auto" or a whole number from 1 to {MOST} for each rank, such as [2, 1, 1]')


def _check_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,32}", name):
        raise ValueError(f"expected 1 to 32 letters, digits, - and _, got {name!r:.80}")
    return name


def _check_ray(address: str) -> str:
    if address.startswith("ray://"):
        raise ValueError(
            "Ray's client (ray://) can't carry tensors to several hosts; have this machine join the cluster "
            '(`ray start --address=HOST:6379 --num-gpus=0`), and set "auto"'
        )
    if address == "auto" or (":" in address and address.rpartition(":")[2].isdecimal() and "/" not in address):
        return address
    raise ValueError(
        f'expected "auto" or the HOST:PORT of the cluster\'s head, such as "10.0.0.1:6379"; got {address!r}'
    )


class Group(_Section):
    """The ranks: which devices, and how long to wait for them."""

    name: Annotated[str, AfterValidator(_check_name)] = "0"
    """What status, metrics and the log call the group; in an array of tables by default its place, from 0 on."""
    device: Literal["cuda", "cpu"] = "cuda"
    gpus: list[NonNegativeInt | str] | None = None
    """For ``cuda``: indexes as nvidia-smi shows them, or UUIDs; all GPUs if absent."""
    ranks: PositiveInt = Field(1, le=64)
    """For ``cpu``: how many processes; for ``launcher = "ray"``: how many GPUs of the cluster, one for each rank."""
    launcher: Literal["local", "ray"] = "local"
    """What starts the ranks: tacod, on this machine, or Ray, on the hosts of a cluster that there is already."""
    ray_address: Annotated[str, AfterValidator(_check_ray)] | None = None
    """For ``ray``: the cluster, as HOST:PORT of its head, or ``auto`` for the one that this machine is in."""
    min_ranks: PositiveInt | None = None
    """For ``ray``: with how many ranks to go on when hosts of the cluster are lost, and to start; by default with one,
    and to start only with all."""
    step_timeout_s: PositiveFloat = 120.0
    """Longest time that one forward may take before the ranks count as stuck; a step may have several."""
    load_timeout_s: PositiveFloat = 900.0
    """Longest time without progress of a load."""
    start_timeout_s: PositiveFloat = 180.0
    retries: NonNegativeInt = 2
    """How many times a step is run again on new ranks before its job fails."""
    max_restarts: NonNegativeInt = 5
    """More restarts of the group than this within `restart_window_s`, and tacod gives up."""
    restart_window_s: PositiveFloat = 600.0
    cache_bytes: PositiveInt = 1 << 30
    """Client tensors that each rank keeps, so that a prompt's embeddings travel once."""
    prefix_bytes: NonNegativeInt = 4 << 30
    """Memory of each rank for what doesn't change from step to step, such as a text's keys and values (Qwen-Image-2.1);
    CUDA graphs may take as much again. With 0 it is computed at each step, and such a model has no CUDA graphs."""
    cuda_graphs: bool = True
    """Whether repeated forwards are replayed as CUDA graphs. Turn it off to see whether they cause a problem."""
    peer_memory: bool = True
    """Whether a Ulysses group's GPUs exchange through each other's memory, or else the host's, instead of NCCL."""
    warm_up: bool = True
    """Whether a load on GPUs runs and measures forwards of 1024 pixels. Turn it off for cards that have no room for
    these."""

    shares: Annotated[Literal["auto"] | list[int], BeforeValidator(_check_shares)] = "auto"
    """How much of each forward each rank takes, such as [2, 1, 1]; by default by its pace, which a load on GPUs
    measures. Equal numbers turn that off. A change is for models that are loaded from then on."""

    @property
    def asked_shares(self) -> Shares | None:
        """The shares that are set here; None to measure them."""
        return None if self.shares == "auto" else Shares.of(self.shares)

    def check_shares(self, ranks: int) -> None:
        """Raise `ValueError` if there is not one share for each of so many ranks."""
        if self.shares != "auto" and len(self.shares) != ranks:
            raise ValueError(f"shares: expected a number for each of {ranks} ranks, got {len(self.shares)}")

    @model_validator(mode="after")
    def _one_kind_of_device(self) -> Group:
        if self.device == "cpu" and self.gpus is not None:
            raise ValueError('gpus is for device = "cuda"; on "cpu" set ranks')
        if self.gpus is not None and (not self.gpus or len(set(self.gpus)) != len(self.gpus)):
            raise ValueError("gpus must name each device once, and at least one")
        if self.launcher == "ray":
            self._check_on_ray()
            return self
        if self.ray_address is not None or self.min_ranks is not None:
            raise ValueError('ray_address and min_ranks are for launcher = "ray"; remove them, or set that')
        if self.device == "cuda" and "ranks" in self.model_fields_set:
            raise ValueError('ranks is for device = "cpu"; on "cuda" there is one rank for each of gpus')
        if self.device == "cpu" or self.gpus is not None:
            self.check_shares(self.ranks if self.gpus is None else len(self.gpus))
        return self

    def _check_on_ray(self) -> None:
        if self.gpus is not None:
            raise ValueError('with launcher = "ray" the cluster chooses the GPUs; set ranks, their number')
        if self.device == "cuda" and "ranks" not in self.model_fields_set:
            raise ValueError('with launcher = "ray" set ranks: how many GPUs of the cluster')
        if self.min_ranks is not None and self.min_ranks > self.ranks:
            raise ValueError(f"min_ranks = {self.min_ranks} is more than ranks = {self.ranks}")
        self.check_shares(self.ranks)
        if self.shares != "auto" and self.min_ranks not in (None, self.ranks):
            raise ValueError("shares has a number for each of ranks, so there can be no fewer: remove min_ranks")

    @property
    def fewest_ranks(self) -> int:
        """On Ray, the number of ranks with which to go on when hosts are lost."""
        if self.shares != "auto":
            return self.ranks
        return self.min_ranks or 1


class Models(_Section):
    """The files that clients may load."""

    roots: list[Annotated[str, AfterValidator(_check_root)]] = []
    preload: list[str] = []
    uploads: Annotated[str, AfterValidator(_check_root)] | None = None
    """A folder for model files that clients send because tacod can't read theirs; without it, uploads are off."""
    upload_bytes: PositiveInt = 64 << 30
    """Most bytes of the files in `uploads`; the least recently used make room."""
    memory_bytes: PositiveInt | None = None
    """Most bytes of weights on each rank; the least recently used models make room. By default, what fits."""
    variants: PositiveInt = 8
    """Most patched models (LoRA) of each file; each takes the memory of the layers that its patches change. The least
    recently used make room."""

    @property
    def readable(self) -> list[str]:
        """The folders whose files may be loaded: the roots and the folder of uploads."""
        return [*self.roots, *([self.uploads] if self.uploads is not None else [])]


class Limits(_Section):
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
    shared_bytes: NonNegativeInt = 512 << 20
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
    return _check_address(listen, '"127.0.0.1:9464", "[::1]:9464" or "unix:/path"')


def _check_tcp(listen: str) -> str:
    address = listen.removeprefix("tcp://")
    if address == listen:
        raise ValueError(f'expected "tcp://0.0.0.0:5555", got {listen!r}')
    _check_address(address, '"tcp://0.0.0.0:5555" or "tcp://[::]:5555", by number')
    if address.endswith(":0"):
        raise ValueError("port 0 is none that a client could know")
    return listen


class Curve(_Section):
    """TCP for clients on other machines whose keys are known."""

    listen: Annotated[str, AfterValidator(_check_tcp)]
    """Such as ``tcp://0.0.0.0:5555``, beside the unix socket."""
    secret_key: Annotated[str, AfterValidator(_check_root)]
    """The daemon's own key, a file that ``tacoctl keygen`` made."""
    clients: Annotated[str, AfterValidator(_check_root)]
    """The allowed clients: a folder of public keys, ``NAME.key`` each, or a single key."""
    admins: list[str] = []
    """Names of clients that may do what root and tacod's own user may."""


class Metrics(_Section):
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


class ComfyUI(_Section):
    """A ComfyUI on this machine, whose networks ranks may run where no family here has one."""

    path: Annotated[str, AfterValidator(_check_root)] | None = None
    """Its folder, the one with main.py; without it only this version's own families are run. Ranks import its code, so
    only those who may change tacod's own code should be able to write there."""


def check_apart(gpus: Sequence[int | str], named: Sequence[tuple[int | str, str]]) -> None:
    """Raise `ValueError` if two of these ``gpus`` are the same; ``named`` says what each is called, and by whom."""
    seen: dict[int | str, tuple[int | str, str]] = {}
    for gpu, (called, group) in zip(gpus, named, strict=True):
        if gpu in seen:
            before, owner = seen[gpu]
            if owner == group:
                raise ValueError(f"group {group!r} has GPU {called!r} twice (also as {before!r}); name it once")
            also = "" if before == called else f" (there {before!r})"
            raise ValueError(f"group {group!r}: GPU {called!r} is in group {owner!r} too{also}; leave it to one")
        seen[gpu] = called, group


I_KNOW = "this daemon fails on purpose"


class Fault(_Section):
    """One fault in a rank, on purpose."""

    kind: Literal["raise", "out_of_memory", "exit", "segfault", "sleep", "slow", "collective"]
    """``collective`` waits for an exchange that no other rank takes part in, for ever, as ``sleep`` does in Python.
    ``slow`` waits for `seconds` and goes on."""
    at: Literal["start", "load", "unload", "forward", "call", "sample"] = "forward"
    """In which work; each step of a sampling run is one."""
    when: Literal["before", "after", "block"] = "before"
    """Before the rank's part of the work, so that the others wait for it, after it, or before a block of a watched
    forward."""
    block: NonNegativeInt | None = None
    """With ``block``: before which one; each of them if absent."""
    seconds: PositiveFloat = 1.0
    rank: NonNegativeInt | None = None
    """Which rank; all of them if absent."""
    group: str | None = None
    """In which group; in each of them if absent."""
    skip: NonNegativeInt = 0
    """How many times such work goes well first."""
    always: bool = False
    """Whether it happens every time from then on, not once."""

    @model_validator(mode="after")
    def _can_be(self) -> Fault:
        if self.at == "start" and (self.when != "before" or self.kind in ("collective", "out_of_memory")):
            raise ValueError(f'at = "start" is before all work: no {self.kind} there, and nothing after it')
        if self.when == "block" and self.at not in ("forward", "sample"):
            raise ValueError(f'when = "block": there are none in {self.at}; use at = "forward" or "sample"')
        if self.block is not None and self.when != "block":
            raise ValueError('block is for when = "block" alone; remove it, or set that')
        return self


class Testing(_Section):
    """Faults on purpose, so that tests can watch how tacod handles them."""

    i_know: Literal["this daemon fails on purpose"]
    faults: list[Fault] = []

    @model_validator(mode="before")
    @classmethod
    def _is_meant(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("i_know") != I_KNOW:
            raise ValueError(f'is for tests alone; remove it, or set i_know = "{I_KNOW}" in it')
        return values


class Config(_Section):
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


def load_config(path: str | os.PathLike[str]) -> Config:
    """Read and check a configuration file.

    Raises `ConfigError` with a line for each fault.
    """
    try:
        with open(path, "rb") as file:
            values: dict[str, Any] = tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; pass --config FILE") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not TOML: {error}") from None
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(_line(path, fault, values) for fault in error.errors())) from None


def _line(path: str | os.PathLike[str], fault: Any, values: dict[str, Any]) -> str:
    key = ".".join(str(part) for part in _key(fault["loc"], values) if part not in ("int", "str", "constrained-int"))
    reason = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "extra_forbidden":
        reason = "unknown key; `tacod --print-config` shows the known ones"
    elif fault["type"] == "missing" and key.startswith("curve."):
        reason = "required: TCP is for clients with CURVE keys on an allow-list; `tacoctl keygen` makes keys"
    # What two sections don't agree on names its key itself.
    return f"{path}:{key}: {reason}" if key else f"{path}:{reason}"


def _key(loc: Sequence[int | str], values: dict[str, Any]) -> Sequence[int | str]:
    """The place of a fault as the file has it: a single group's without a number, one of several by its name."""
    if len(loc) < 2 or loc[0] != "group":
        return loc
    groups, at = values["group"], loc[1]
    if not isinstance(groups, list):
        return ["group", *loc[2:]]
    assert isinstance(at, int)
    name = groups[at].get("name") if isinstance(groups[at], dict) else None
    return ["group", name if isinstance(name, str) and name.isprintable() else at, *loc[2:]]


def to_toml(config: Config) -> str:
    """The configuration with all its defaults, as TOML that `load_config` reads; keys without a value are comments."""
    values = config.model_dump()
    groups = values.pop("groups")
    tables = {key: value for key, value in values.items() if isinstance(value, dict)}
    lines = [_line_of_toml(key, value) for key, value in values.items() if key not in tables]
    for group in groups:
        del group["ranks" if config.device == "cuda" and config.launcher == "local" else "gpus"]
    head = "[group]" if len(groups) == 1 else "[[group]]"
    for name, table in (
        *((head, group) for group in groups),
        *((f"[{name}]", table) for name, table in tables.items()),
    ):
        lines += ["", name, *(_line_of_toml(key, value) for key, value in table.items())]
    return "\n".join(lines) + "\n"


def _line_of_toml(key: str, value: Any) -> str:
    return f"# {key} is not set" if value is None else f"{key} = {_toml(value)}"


def _toml(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items() if item is not None) + " }"
    if isinstance(value, str):
        # JSON's escapes are TOML's too, but TOML wants one for DEL as well.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)
